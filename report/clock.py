"""
What skipping is worth on the clock: python -m report.clock --ckpt out/halt/ckpt.pt

Times the plain model, masked with all gates open, and gathered, taking turns in one process and in float32, at two
kinds of work: prefill reads a whole window, decode reads its second half token by token. Gathered gates are random and
replayed, open for each share of KEEPS; a checkpoint runs with its own too, on validation text. Without one, random
weights have the paper's width.
"""
import json
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import data
from report.counts import macs_per_token
from train import Parser, load_checkpoint, load_corpus, mean, number, pick_device, run_program
from tsa import KV, Config, UserError, build, keep_freed_memory, stack

BATCHES = {"prefill": (1, 8, 64), "decode": (1, 8)}
KEEPS = (1.0, 0.9, 0.726, 0.5, 0.3, 0.1)        # 0.726 is the paper's alpha on Tiny-Shakespeare


def timed(call, device):
    """Seconds that a call takes, with the work that it leaves on the device."""
    began = time.perf_counter()
    call()
    if device != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - began


def decode(model, idx, mode, gates):
    """-> a function that reads the second half of idx (B, T) token by token, after the first half was cached."""
    half, T = idx.size(1) // 2, idx.size(1)
    cache = [KV(len(idx), model.config, model.wte.weight) for _ in model.blocks]
    pieces = [slice(0, half)] + [slice(t, t + 1) for t in range(half, T)]
    gates = [None if gates is None else gates[:, :, piece] for piece in pieces]
    model(idx[:, :half], mode, gates[0], cache)

    def read():
        for kv in cache:
            kv.length = half        # forget the tokens of the last round
        for piece, gate in zip(pieces[1:], gates[1:]):
            model(idx[:, piece], mode, gate, cache)
    return read


def draw_gates(config, idx, keep):
    """Switches (L, B, T) to replay: block 0 runs, and the others are open for a share `keep` of the tokens."""
    gates = torch.rand(config.n_layer, *idx.shape, device=idx.device) < keep
    gates[0] = True
    if config.model in ("exit", "halt"):        # a token that left stays out: as many blocks, but the lowest
        gates[1:] = gates[1:].sort(0, descending=True).values
    return gates


def filling(gates):
    """gates (L, B, T) -> tokens that gathered attention computes, n from every sequence, over those that are open."""
    n_open = gates[~gates.all(2).all(1)].sum(2)                                            # (blocks that gather, B)
    return (n_open.amax(1).sum() * gates.size(1) / n_open.sum()).item() if n_open.any() else 1.0


@torch.inference_mode()
def clock(dense, model, text, work, B, seconds, device):
    """
    Time one kind of work at batch B -> rows. ms is the median, with quartiles, of a prefill or of decoding a token;
    speedup, over dense, the median of the ratios round by round; allowed what multiply-adds of a full window give.
    """
    config, T = model.config, model.config.block_size
    if text is None:
        idx = torch.randint(config.vocab_size, (B, T), device=device)
    else:
        idx = text.repeat(B * T // len(text) + 1)[:B * T].view(B, T)
    prepare, n = (partial, T) if work == "prefill" else (decode, T - T // 2)        # a call that reads n tokens
    whole = draw_gates(config, idx, 1.0)
    cases = [("dense", "none", whole, prepare(dense, idx, "trained", None)),
             ("masked", "all open", whole, prepare(model, idx, "masked", whole))]
    if text is not None:
        own = stack(model(idx, "gathered")[1], idx) != 0
        cases.append(("gathered", "own", own, prepare(model, idx, "gathered", None)))
    for keep in KEEPS:
        gates = draw_gates(config, idx, keep)
        cases.append(("gathered", f"random {keep}", gates, prepare(model, idx, "gathered", gates)))
    rounds, end = [], time.perf_counter() + seconds
    while len(rounds) < 4 or time.perf_counter() < end:
        rounds.append([timed(call, device) for *_, call in cases])

    rows, all_times = [], list(zip(*rounds[1:]))        # the first round warmed up
    for (mode, kind, gates, _), times in zip(cases, all_times):
        low, median, high = (1000 * t / (1 if work == "prefill" else n) for t in statistics.quantiles(times, n=4))
        ran = gates[:, :, T - n:].cpu().double().mean((1, 2)).tolist()
        macs = macs_per_token(dense.config if mode == "dense" else config, ran, decode=work == "decode")
        rows.append({
            "work": work, "batch": B, "mode": mode, "gates": kind, "keep": mean(ran[1:]), "block_size": T,
            "device": device, "ms": median, "ms_low": low, "ms_high": high,
            "speedup": statistics.median(plain / t for plain, t in zip(all_times[0], times)),
            "allowed": macs_per_token(dense.config, [1.0] * len(ran)) / macs,
            "filling": filling(gates) if mode == "gathered" and work == "prefill" else None})
    return rows


def main(argv):
    parser = Parser(prog="report.clock", description="Time the plain model, masked and gathered.")
    parser.add_argument("--ckpt", type=Path, help="time this model, with its own gates too (default: random weights)")
    parser.add_argument("--device", help="cpu, cuda, mps ... (default: the best that works)")
    parser.add_argument("--seconds", type=number(float, 0, 3600), default=25, help="per work and batch (default 25)")
    parser.add_argument("--out", type=Path, default=Path("clock.json"), help="where rows go (default clock.json)")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    keep_freed_memory()
    torch.manual_seed(0)
    model, text = build(Config(block_size=256)), None
    if args.ckpt:
        model, saved = load_checkpoint(args.ckpt, device)
        text = load_corpus(saved, args.ckpt).windows("val", model.config.block_size)[0].flatten().to(device)
    config = model.config
    if config.model == "dense" or config.block_size < 2:
        raise UserError(f"{args.ckpt} has nothing to skip or decode: give one with gates and a block_size above 1")
    model, dense = (m.to(device).eval() for m in (model, build(replace(config, model="dense"))))
    print(f"{torch.get_num_threads()} threads on {device}, torch {torch.__version__}, {config}")
    rows = []
    for work, batches in BATCHES.items():
        for B in batches:
            for row in clock(dense, model, text, work, B, args.seconds, device):
                rows.append(row)
                print("{work:8} batch {batch:<3} {mode:9}{gates:12} {keep:.3f} {ms:10.3f} ms ({ms_low:.3f} to "
                      "{ms_high:.3f})  {speedup:.2f}x of {allowed:.2f}x allowed"
                      .format(**row), f"  filled up {row['filling']:.2f}x" if row["filling"] else "")
            data.write_atomic(args.out, json.dumps(rows, indent=1).encode("utf-8"))     # Ctrl-C keeps what is done
    print(f"written to {args.out}; filled up: the tokens that attention computes over those whose gate is open")


if __name__ == "__main__":
    sys.exit(run_program("report.clock", main))
