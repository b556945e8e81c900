"""
Write text with a trained model: python sample.py
Time what skipping tokens is worth: python sample.py --bench

Sampling needs nothing but the checkpoint: sizes, vocabulary and weights are in it.
"""
import json
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

import data
from train import Parser, keep_freed_memory, load_checkpoint, number, pick_device
from tsa import Config, KV, RUNS, UserError, build, default_run, generate, macs_per_token

BATCHES = {"prefill": (1, 8, 64), "decode": (1, 8)}
KEEPS = (1.0, 0.9, 0.726, 0.5, 0.3, 0.1)        # 0.726 is the paper's alpha on Tiny-Shakespeare
BENCH_SECONDS = 25                              # for each mode and batch size


def parse_args(argv):
    parser = Parser(prog="sample.py", description="Write text with a trained model.")
    parser.add_argument("--ckpt", type=Path, help="checkpoint (default: the newest out/*/ckpt.pt)")
    parser.add_argument("--prompt", help="text to continue (default: a new line; for copy and sort a task)")
    parser.add_argument("--max_new_tokens", type=number(int, 1, 10**9), help="characters a sample (default 500)")
    parser.add_argument("--num", type=number(int, 1, 10**6), default=1, help="samples (default 1)")
    parser.add_argument("--temperature", type=number(float, 0, 100), default=0.8, help="0 is greedy (default 0.8)")
    parser.add_argument("--top_k", type=number(int, 1, 10**6), help="draw from the k likeliest only (default: all)")
    parser.add_argument("--seed", type=number(int, 0, 2**31), default=0, help="of the draws (default 0)")
    parser.add_argument("--device", help="cpu, cuda, mps ... (default: the best there is)")
    parser.add_argument("--run", choices=RUNS, help="gates as trained, or those of inference, multiplied (masked) or "
                                                    "skipped (gathered, the default; trained for the soft gate)")
    parser.add_argument("--no_cache", action="store_true", help="compute the whole window again for each character")
    parser.add_argument("--bench", action="store_true", help="time dense, masked and gathered instead; without a "
                                                             "checkpoint at the paper's width with random weights")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="of --bench (default float32)")
    parser.add_argument("--out_dir", type=Path, help="where --bench writes bench.json (default: beside the checkpoint)")
    return parser.parse_args(argv)


def newest_checkpoint():
    paths = sorted(Path("out").glob("*/ckpt.pt"), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise UserError("there is no out/*/ckpt.pt: run train.py first, or give --ckpt")
    return paths[-1]


def write_samples(model, saved, args, device):
    """Print args.num continuations of the prompt as they are drawn; remarks go to stderr, so that text can be piped."""
    vocab, prompt = saved["vocab"], saved["prompt"] if args.prompt is None else args.prompt
    if not prompt:
        raise UserError("--prompt is empty: give at least one character, or leave it out")
    idx = torch.tensor([data.encode(prompt, vocab)], device=device)                        # (1, T)
    n, run = args.max_new_tokens or saved["new_tokens"], args.run or default_run(model.config)
    if args.run is None and run == "trained":
        print("Running the soft gates as trained: cut to all or nothing for inference, as the paper does, they ruin "
              "the text (see with --run masked).", file=sys.stderr)
    torch.manual_seed(args.seed)
    for _ in range(args.num):
        print(prompt, end="", flush=True)
        began, depth = time.perf_counter(), 0
        for idx_next, gates in generate(model, idx, n, args.temperature, args.top_k, run, cache=not args.no_cache):
            print(vocab[idx_next.item()], end="", flush=True)
            depth += (gates > 0).sum().item()
        print()
        print(f"[{n} characters, {n / (time.perf_counter() - began):.0f} a second, mean depth {depth / n:.2f} of "
              f"{model.config.n_layer} blocks]", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------
# The benchmark

def timed(call, device):
    """Seconds that a call takes, the work it left on the device included."""
    began = time.perf_counter()
    call()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - began


def prefill(model, idx, run, gates):
    """-> a function that reads the window idx (B, T) once."""
    return lambda: model(idx, run=run, gates=gates)


def decode(model, idx, run, gates):
    """-> a function that reads the second half of the window token by token, the first half being cached."""
    half, T = idx.size(1) // 2, idx.size(1)
    cache = [KV(len(idx), model.config, model.wte.weight) for _ in model.blocks]
    pieces = [slice(0, half)] + [slice(t, t + 1) for t in range(half, T)]
    gates = [None if gates is None else gates[:, :, piece] for piece in pieces]
    model(idx[:, :half], run=run, gates=gates[0], cache=cache)

    def read():
        for kv in cache:
            kv.length = half        # forget the tokens of the last round
        for piece, gate in zip(pieces[1:], gates[1:]):
            model(idx[:, piece], run=run, gates=gate, cache=cache)
    return read


@torch.inference_mode()
def bench(dense, model, text, mode, B, device):
    """
    Time one mode, prefill (a window) or decode (a token of its second half), at batch B -> rows for bench.json.

    `dense` is the plain transformer of the model's size. masked and gathered run on Bernoulli gates of each of KEEPS,
    replayed, and on the model's own gates where there is text (n,) to read. All take turns, after a round that does
    not count. ms is the median, with quartiles; speedup, over dense, the median of the ratios round by round;
    allowed what the multiply-adds of a full window would give.
    """
    config, T, L = model.config, model.config.block_size, model.config.n_layer
    if text is None:
        idx = torch.randint(config.vocab_size, (B, T), device=device)
    else:
        idx = text.repeat(B * T // len(text) + 1)[:B * T].view(B, T).long()
    prepare, tokens = (prefill, T) if mode == "prefill" else (decode, T - T // 2)
    cases = [("dense", "none", [1.0] * L, prepare(dense, idx, "trained", None))]           # run, gates, ran, call
    for run in ("masked", "gathered"):
        if text is not None:
            ran = (model(idx, run=run)[2]["gates"] > 0).float().mean((1, 2)).tolist()
            cases.append((run, "own", ran, prepare(model, idx, run, None)))
        for keep in KEEPS:
            gates = torch.bernoulli(torch.full((L, B, T), keep, device=device))
            cases.append((run, "bernoulli", [1.0] + [keep] * (L - 1), prepare(model, idx, run, gates)))
    rounds, end = [], time.perf_counter() + BENCH_SECONDS
    while len(rounds) < 4 or time.perf_counter() < end:
        rounds.append([timed(call, device) for *_, call in cases])
    rounds = rounds[1:]

    rows, dense_work = [], macs_per_token(dense.config, [1.0] * L)
    for i, (run, gates, ran, _) in enumerate(cases):
        times = [1000 * r[i] / (1 if mode == "prefill" else tokens) for r in rounds]
        low, median, high = statistics.quantiles(times, n=4)
        work = macs_per_token(dense.config if run == "dense" else config, ran if run == "gathered" else [1.0] * L)
        rows.append({"mode": mode, "run": run, "gates": gates, "batch": B, "block_size": T,
                     "keep": sum(ran[1:]) / max(L - 1, 1), "dtype": str(dense.wte.weight.dtype).removeprefix("torch."),
                     "device": device, "ms": median, "ms_low": low, "ms_high": high,
                     "tokens_per_s": 1000 * B * (tokens if mode == "prefill" else 1) / median,
                     "speedup": statistics.median(r[0] / r[i] for r in rounds), "allowed": dense_work / work})
    return rows


@torch.inference_mode()
def count_flips(model, text):
    """How many gates of 64 windows are open in one of masked and gathered and closed in the other, out of how many."""
    T = model.config.block_size
    idx = text[:len(text) // T * T][:64 * T].long().view(-1, T)
    masked, gathered = (model(idx, run=run)[2]["gates"][1:] > 0 for run in ("masked", "gathered"))
    return (masked != gathered).sum().item(), masked.numel()


def run_bench(args, device):
    keep_freed_memory()
    torch.manual_seed(args.seed)
    if args.ckpt is None:
        model, text, out_dir = build(Config(gate="skip", block_size=256)), None, args.out_dir or Path("out")
    else:
        model, saved = load_checkpoint(args.ckpt, device)
        corpus, out_dir = data.load(saved["flags"]["data"]), args.out_dir or args.ckpt.parent
        if corpus.vocab != saved["vocab"]:
            raise UserError(f"the text of {args.ckpt} has changed: its characters are not those of the training")
        text = corpus.splits["val"].flatten().to(device)
    dtype = getattr(torch, args.dtype)
    model, dense = (m.to(device, dtype).eval() for m in (model, build(replace(model.config, model="dense"))))
    print(f"{torch.get_num_threads()} threads on {device}, torch {torch.__version__}; {model.config}")
    out_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    for mode in BATCHES:
        for batch in BATCHES[mode]:
            for row in bench(dense, model, text, mode, batch, device):
                rows.append(row)
                print("{mode:8} batch {batch:<3} {run:9}{gates:>10} {keep:.3f} {ms:10.3f} ms ({ms_low:.3f} to "
                      "{ms_high:.3f}) {tokens_per_s:10,.0f} tokens/s  {speedup:.2f}x of {allowed:.2f}x allowed: "
                      .format(**row) + f"{row['speedup'] / row['allowed']:.0%}")
    window, step = (next(row["ms"] for row in rows if row["mode"] == mode) for mode in BATCHES)
    print(f"A character costs a window of {window:.2f} ms without the cache and {step:.2f} ms with it: "
          f"{window / step:.1f}x faster (dense, batch 1)")
    if text is not None:
        flips, n = count_flips(model, text)
        print(f"{flips} of {n:,} gates differ between masked and gathered in {args.dtype}: those next to the threshold")
    data.write_atomic(out_dir / "bench.json", json.dumps(rows, indent=1).encode("utf-8"))
    print(f"written to {out_dir / 'bench.json'}")


def main(argv=None):
    sys.stdout.reconfigure(errors="replace")       # a terminal may lack a character
    try:
        args = parse_args(argv)
        device = pick_device(args.device)
        if args.bench:
            run_bench(args, device)
            return 0
        path = args.ckpt or newest_checkpoint()
        model, saved = load_checkpoint(path, device)
        print(f"{path}: {model.config.model}, step {saved['step']}", file=sys.stderr)
        write_samples(model, saved, args, device)
        return 0
    except UserError as error:
        print(f"sample.py: {error}", file=sys.stderr)
    except BrokenPipeError:         # | head has seen enough; what is left to flush must not complain either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"sample.py: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print()
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
