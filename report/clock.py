"""
Measure what skipping saves in wall-clock time:

    python -m report.clock report/python-skip.pt --layers 12 9 --csv report/clock.csv
    python -m report.clock --n_embd 256 --layers 6 3 --csv report/clock.csv

Plain and sparse models alternate, in float32. Prefill processes whole windows of the validation split; decode continues
the first half of each, which it processes first. Without a checkpoint, text and weights are random, and SHARES of the
gates are open. `speedup`, over the first plain model, is the median over rounds, `low` and `high` bound its 95%
interval, and `predicted` is the speed-up that the saved multiply-adds alone would give.
"""
import argparse
import csv
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import data
from train import DEVICE, usable_device
from tsa import GATES, MODELS, Config, Router, generate, load_checkpoint, multiply_adds

WORKS = ("prefill 64", "prefill 8", "prefill 1", "decode 8", "decode 1")        # and the batch size
SHARES = (0.726, 0.5, 0.3)      # 0.726 is the mean gate that the paper reports on Tiny-Shakespeare


def random_gates(share):
    """A design whose gates are randomly open for a fraction `share` of the tokens."""
    class Random(Router):
        def gate(self, scale):
            return (torch.rand_like(scale) < share).float()
    return Random


def gates_of(model, work, idx):
    """Prefill or decode windows idx (B, T). Return the gates of these tokens, (L, B, n)."""
    if work == "prefill":
        return model(idx, sparse=True)[1]
    half = idx.size(1) // 2
    torch.manual_seed(0)        # each round decodes the same text
    return torch.stack([gates for _, gates in generate(model, idx[:, :half], half)], dim=2)


def seconds_of(call, device):
    began = time.perf_counter()
    call()
    if device != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - began


@torch.inference_mode()
def clock(models, text, work, B, seconds, device):
    """Time work on B windows of text (n, T). Return a row per model: median times, speed-ups over the first model."""
    idx, T = text.repeat(B // len(text) + 1, 1)[:B], text.size(1)
    calls = [partial(gates_of, model, work, idx) for model in models.values()]
    shares = [(call() != 0).double().mean((1, 2)).tolist() for call in calls]           # also the warm-up
    products = [multiply_adds(model, ran, T) for model, ran in zip(models.values(), shares)]
    rounds, end = [], time.perf_counter() + seconds
    while len(rounds) < 6 or time.perf_counter() < end:
        rounds.append([seconds_of(call, device) for call in calls])
    rows, (baseline, *_) = [], zip(*rounds)
    for name, ran, times, product in zip(models, shares, zip(*rounds), products):
        ms = 1000 * statistics.median(times) / (T // 2 if work == "decode" else 1)
        ratios = sorted(first / own for first, own in zip(baseline, times))
        rank = max(int(len(ratios) / 2 - 0.98 * len(ratios) ** 0.5), 0)     # of the median's interval (binomial)
        rows.append(dict(work=work, batch=B, gates=name, open=sum(ran[1:]) / max(len(ran) - 1, 1), ms=ms,
                         predicted=products[0] / product, speedup=statistics.median(ratios),
                         low=ratios[rank], high=ratios[-1 - rank]))
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("ckpts", type=Path, nargs="*", help="checkpoints to time, all of one size (default: random weights and gates)")
    add("--layers", type=int, nargs="+", required=True, help="layers of the plain models; the first is the baseline")
    add("--n_embd", type=int, default=256, help="width of the random weights (default: 256, the paper's)")
    add("--works", choices=WORKS, nargs="+", default=WORKS, help="what to time, with the batch size (default: all)")
    add("--device", default=DEVICE, type=usable_device)
    add("--seconds", type=float, default=20, help="seconds per measurement (default: 20)")
    add("--csv", type=Path, required=True, help="append the rows to this file")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    own, config, corpus = {}, Config(n_head=8, n_embd=args.n_embd, block_size=256), "random"
    text = torch.randint(config.vocab_size, (64, config.block_size))
    try:
        for path in args.ckpts:
            model, saved = load_checkpoint(path)
            config, corpus = model.config, saved["flags"]["data"]
            name = "exit" if config.model == "exit" else config.gate + " --halt" * config.halt
            name += f", {config.n_layer} layers" * (config.n_layer != args.layers[0])
            if name in own:
                parser.error(f"two checkpoints of {name}")
            own[name] = model
            text = data.load(corpus).windows("val", config.block_size)[0]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for share in () if args.ckpts else SHARES:
        gate = f"random {share}"
        GATES[gate] = random_gates(share)
        own[gate] = MODELS["tsa"](replace(config, gate=gate))
    models = {f"plain {n}": MODELS["plain"](replace(config, model="plain", n_layer=n)) for n in args.layers} | own
    models = {name: model.to(args.device).eval() for name, model in models.items()}
    for work in args.works:
        kind, B = work.split()
        rows = clock(models, text.to(args.device), kind, int(B), args.seconds, args.device)
        about = dict(text=corpus, n_embd=config.n_embd, device=args.device, threads=torch.get_num_threads())
        with open(args.csv, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*about, *rows[0]])
            if file.tell() == 0:        # a new file
                writer.writeheader()
            for row in rows:
                writer.writerow(about | row)
                print(*row.values())


if __name__ == "__main__":
    main()
