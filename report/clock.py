"""
Measure what skipping saves in wall-clock time:

    python -m report.clock report/python-skip.pt --layers 12 10 9 --out report/clock.csv
    python -m report.clock out/stretch/ckpt.pt --layers 12 10 9 --train float32

Time plain models with the given numbers of layers and the sparse model in turn, in one process, on text of the
validation split. Prefill processes whole windows; decode processes the second half of each window token by token; both
are in float32. With --train, time training steps (forward, backward and optimizer) that leave the weights unchanged, in
full and, if the model can, sparse. Without a checkpoint, the text and the weights are random, and the gates are open at
random with the probabilities in KEEPS. `predicted` is the speed-up that the saved multiply-adds alone would give,
counted as for a prefill.
"""
import copy
import csv
import functools
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

import data
from report.depth import set_gate
from data import UserError
from train import (COUNT, SHARE, Parser, keep_freed_memory, load_checkpoint, make_optimizer, one_line, pick_device,
                   precision)
from tsa import GATES, MODELS, Config, KVCache, can_train_sparse, multiply_adds

BATCHES = {"prefill": (64, 8, 1), "decode": (8, 1)}
TRAINING_TOKENS = 2048          # per step, as with the laptop preset
KEEPS = (0.726, 0.5, 0.3)       # 0.726 is the mean gate that the paper reports on Tiny-Shakespeare


def random_gate(p, threshold):
    """A gate that is 1 with the probability `threshold`, otherwise 0."""
    return (torch.rand_like(p) < threshold).float()


def timed(call, device):
    """Seconds that a call takes, including the work that it queues on the device."""
    began = time.perf_counter()
    call()
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - began


def prefill(model, idx):
    """Return a function that runs idx (B, T) in one sparse pass."""
    return torch.inference_mode()(functools.partial(model, idx, sparse=True))


@torch.inference_mode()
def decode(model, idx):
    """Return a function that decodes the second half of idx (B, T) token by token, with the first half cached."""
    half, prompt = idx.size(1) // 2, KVCache()
    model(idx[:, :half], True, prompt)

    @torch.inference_mode()
    def call():
        cache = copy.copy(prompt)       # without the tokens of the previous round
        for t in range(half, idx.size(1)):
            model(idx[:, t:t + 1], True, cache)
    return call


def training_step(model, idx, sparse, dtype):
    """Return a function that runs a training step on idx (B, T), with a learning rate of 0."""
    model.train()
    optimizer = make_optimizer(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    loss_of = functools.partial(model.loss, sparse=True) if sparse else model.loss

    def call():
        with precision(idx.device.type, dtype):
            loss, gates = loss_of(idx, idx.roll(-1, 1))
            loss = loss + 0.001 * gates[1:].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return call


def clock(models, text, work, B, seconds, device):
    """
    Time one kind of work ("prefill", "decode", or "train" and the dtype) on B windows of text (n, T). Return a row for
    each of `models` (name: model), relative to the first. The model called "full" trains in full. `ms` is the median
    time of a prefill, a decode step or a training step; `ms_low` and `ms_high` are its quartiles.
    """
    idx, T = text.repeat(B // len(text) + 1, 1)[:B], text.size(1)
    kind, *dtype = work.split()
    if kind == "train":
        calls = [training_step(model, idx, name != "full", *dtype) for name, model in models.items()]
    else:
        calls = [{"prefill": prefill, "decode": decode}[kind](model, idx) for model in models.values()]
    rounds, end = [], time.perf_counter() + seconds
    while len(rounds) < 4 or time.perf_counter() < end:
        rounds.append([timed(call, device) for call in calls])
    all_times = list(zip(*rounds[1:]))              # the first round is the warm-up
    start, steps = (T // 2, T - T // 2) if work == "decode" else (0, 1)
    rows, baseline = [], next(iter(models.values())).config
    for (name, model), times in zip(models.items(), all_times):
        low, median, high = (1000 * t / steps for t in statistics.quantiles(times, n=4))
        with torch.no_grad():
            gates = model(idx, sparse=True)[1][:, :, start:]
        ran = (torch.ones_like(gates) if name == "full" else gates != 0).cpu().double().mean((1, 2)).tolist()
        predicted = multiply_adds(baseline, [1] * baseline.n_layer, T) / multiply_adds(model.config, ran, T)
        rows.append({"work": work, "batch": B, "gates": name, "open": sum(ran[1:]) / max(len(ran) - 1, 1), "ms": median,
                     "ms_low": low, "ms_high": high, "predicted": predicted,
                     "speedup": statistics.median(a / b for a, b in zip(all_times[0], times))})
    return rows


@one_line()
def main(argv=None):
    parser = Parser(prog="report.clock", description="Time plain and sparse models.")
    parser.add_argument("ckpt", type=Path, nargs="?", help="time this model (default: random weights and gates)")
    parser.add_argument("--gate", choices=GATES, help="gate design (default: the checkpoint's)")
    parser.add_argument("--threshold", type=SHARE, help="threshold (default: the checkpoint's)")
    parser.add_argument("--layers", type=COUNT, nargs="+",
                        help="layers of the plain models, first of the one that the others are compared with (default: "
                             "as many as the model has, and half of them)")
    parser.add_argument("--train", choices=("float32", "bfloat16"), metavar="DTYPE",
                        help="time training steps in float32 or bfloat16 (default: inference)")
    parser.add_argument("--n_embd", type=COUNT, help="width of the random weights (default: 256, the paper's)")
    parser.add_argument("--device", default="auto", help="device to use (default: the best one available)")
    parser.add_argument("--seconds", type=float, default=20, help="seconds per measurement (default: 20)")
    parser.add_argument("--out", type=Path, help="csv file to which the rows are appended")
    args = parser.parse_args(argv)
    if not args.ckpt and (args.gate or args.threshold is not None):
        raise UserError("--gate and --threshold need a checkpoint")
    if args.n_embd and (args.ckpt or args.n_embd % 8):
        raise UserError("--n_embd must be a multiple of 8 (the heads), and is only for random weights")
    device = pick_device(args.device)
    keep_freed_memory()
    torch.manual_seed(0)
    if args.ckpt:
        model, saved = load_checkpoint(args.ckpt)
        set_gate(model, args.gate, args.threshold)
        config = model.config
        text = data.load(saved["flags"]["data"]).windows("val", config.block_size)[0]
        own = {f"own {config.gate}" if config.model == "tsa" else "own": model}
    else:
        GATES["random"] = random_gate, random_gate
        config = Config(gate="random", block_size=256, n_embd=args.n_embd or 256, dropout=0.0)
        own = {f"random {keep}": MODELS["tsa"](replace(config, threshold=keep)) for keep in KEEPS}
        text = torch.randint(config.vocab_size, (64, config.block_size))
    works = BATCHES
    if args.train:
        works = {f"train {args.train}": (max(TRAINING_TOKENS // text.size(1), 1),)}
        if args.ckpt and not can_train_sparse(config):
            own = {"full": model}
        else:
            own["full"] = next(iter(own.values()))
    L = config.n_layer
    models = {f"plain {n}": MODELS["plain"](replace(config, model="plain", n_layer=n))
              for n in args.layers or (L, max(L // 2, 1))} | own
    for each in models.values():
        each.to(device).eval()
    print(f"{torch.get_num_threads()} threads on {device}, torch {torch.__version__}, {config}")
    for work, batches in works.items():
        for B in batches:
            rows = clock(models, text.to(device), work, B, args.seconds, device)
            for row in rows:
                print("{work} batch {batch:<3} {gates:12} {open:.3f} {ms:10.3f} ms ({ms_low:.3f} to {ms_high:.3f})  "
                      "speed-up {speedup:.2f}, predicted {predicted:.2f}".format(**row))
            if args.out:
                with open(args.out, "a", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, ["model", *rows[0]])
                    if file.tell() == 0:        # a new file
                        writer.writeheader()
                    writer.writerows({"model": args.ckpt or f"random weights, width {config.n_embd}"} | row
                                     for row in rows)


if __name__ == "__main__":
    main()
