"""
Measure what skipping saves in wall-clock time: python -m report.clock out/halt-1/ckpt.pt --out report/clock.csv

Time three models in turn, in one process and in float32: the plain model, one with half of its layers, and the sparse
model. Prefill processes whole windows; decode processes the second half of each window token by token. All gates are
replayed: the model's own, and random ones, open with one of the probabilities in KEEPS. The text is from the validation
split; without a checkpoint, the text and the weights are random, at the paper's width. `predicted` is the speed-up
predicted from the saved multiply-adds alone.
"""
import argparse
import csv
import functools
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

import data
from report.depth import replay
from report.plot import fewer_layers
from train import keep_freed_memory, load_checkpoint, pick_device, user_errors
from tsa import MODELS, Config, savings

BATCHES = {"prefill": (64, 8, 1), "decode": (8, 1)}
KEEPS = (0.726, 0.5, 0.3)       # 0.726 is the mean gate that the paper reports on Tiny-Shakespeare


def timed(call, device):
    """Seconds that a call takes, including the work that it queues on the device."""
    began = time.perf_counter()
    call()
    if device != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - began


def forward(model, idx, gates, cache=None):
    """One sparse pass: with the given gates, or of the plain model if gates is None."""
    with replay(model, gates):
        return model(idx, True, cache)


def decode(model, idx, gates):
    """Return a function that decodes the second half of idx (B, T) token by token, with the first half cached."""
    half, T = idx.size(1) // 2, idx.size(1)
    prompt = {}
    pieces = [slice(half)] + [slice(t, t + 1) for t in range(half, T)]
    steps = [(idx[:, piece], None if gates is None else gates[:, :, piece]) for piece in pieces]
    forward(model, *steps[0], prompt)

    def call():
        cache = dict(prompt)        # without the tokens of the previous round
        for step in steps[1:]:
            forward(model, *step, cache)
    return call


def draw_gates(config, idx, keep):
    """Random switches (L, B, T): block 0 runs for all tokens, the others for a share `keep` on average."""
    gates = (torch.rand(config.n_layer, *idx.shape, device=idx.device) < keep).float()
    gates[0] = 1
    if config.model in ("exit", "halt"):        # a stopped token stays stopped: move the open gates to the front
        gates[1:] = gates[1:].sort(0, descending=True).values
    return gates


@torch.inference_mode()
def clock(plain, half, model, text, work, B, seconds, device):
    """
    Time one kind of work at batch size B and return its rows, relative to `plain`. `half` is a plain model with half
    of the layers. `ms` is the median time of a prefill or of a decode step; `ms_low` and `ms_high` are its quartiles.
    """
    config, T = model.config, model.config.block_size
    idx = text.repeat(B * T // len(text) + 1)[:B * T].view(B, T)
    cases = [("plain", plain, None), ("plain half", half, None), ("own", model, model(idx, sparse=True)[1])]
    cases += [(f"random {keep}", model, draw_gates(config, idx, keep)) for keep in KEEPS]
    calls = [decode(m, idx, gates) if work == "decode" else functools.partial(forward, m, idx, gates)
             for _, m, gates in cases]
    rounds, end = [], time.perf_counter() + seconds
    while len(rounds) < 4 or time.perf_counter() < end:
        rounds.append([timed(call, device) for call in calls])
    n = 1 if work == "prefill" else T - T // 2
    rows, all_times = [], list(zip(*rounds[1:]))        # the first round is the warm-up
    for (name, m, gates), times in zip(cases, all_times):
        low, median, high = (1000 * t / n for t in statistics.quantiles(times, n=4))
        if gates is None:
            ran, saved = [1.0] * m.config.n_layer, fewer_layers(config, m.config.n_layer, config.n_layer)
        else:
            ran = (gates[:, :, T - T // 2 if work == "decode" else 0:] != 0).cpu().double().mean((1, 2)).tolist()
            saved = savings(config, ran, decode=work == "decode")[1]
        rows.append({"work": work, "batch": B, "gates": name, "open": sum(ran[1:]) / max(len(ran) - 1, 1), "ms": median,
                     "ms_low": low, "ms_high": high,
                     "speedup": statistics.median(a / b for a, b in zip(all_times[0], times)),
                     "predicted": 1 / (1 - saved)})
    return rows


@user_errors()
def main(argv=None):
    parser = argparse.ArgumentParser(prog="report.clock", description="Time the plain and the sparse model.")
    parser.add_argument("ckpt", type=Path, nargs="?", help="time this model (default: random weights)")
    parser.add_argument("--device", default="auto", help="device to use (default: the best one available)")
    parser.add_argument("--seconds", type=float, default=20, help="seconds per measurement (default: 20)")
    parser.add_argument("--out", type=Path, help="csv file to which the rows are appended")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    keep_freed_memory()
    torch.manual_seed(0)
    if args.ckpt:
        model, saved = load_checkpoint(args.ckpt)
        model.to(device)
        text = data.load(saved["flags"]["data"]).windows("val", model.config.block_size)[0].flatten().to(device)
    else:
        model = MODELS["tsa"](Config(block_size=256)).to(device).eval()
        text = torch.randint(65, (64 * 256,), device=device)
    plain, half = (MODELS["plain"](replace(model.config, model="plain", n_layer=n)).to(device).eval()
                   for n in (model.config.n_layer, model.config.n_layer // 2))
    print(f"{torch.get_num_threads()} threads on {device}, torch {torch.__version__}, {model.config}")
    for work, batches in BATCHES.items():
        for B in batches:
            rows = clock(plain, half, model, text, work, B, args.seconds, device)
            for row in rows:
                print("{work:8} batch {batch:<3} {gates:12} {open:.3f} {ms:10.3f} ms ({ms_low:.3f} to {ms_high:.3f})  "
                      "speed-up {speedup:.2f}, predicted {predicted:.2f}".format(**row))
            if args.out:
                with open(args.out, "a", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, ["model", *rows[0]])
                    if file.tell() == 0:        # a new file
                        writer.writeheader()
                    writer.writerows({"model": args.ckpt or "random weights"} | row for row in rows)


if __name__ == "__main__":
    main()
