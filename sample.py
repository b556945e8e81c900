"""
Write text with a trained model: python sample.py
Time what skipping tokens is worth: python sample.py --bench

Sampling needs nothing but the checkpoint: sizes, vocabulary and weights are in it.
"""
import json
import statistics
import sys
import time
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
    parser.add_argument("--max_new_tokens", type=number(int, 1, 10**9), default=500, help="characters a sample (default 500)")
    parser.add_argument("--num", type=number(int, 1, 10**6), default=1, help="samples (default 1)")
    parser.add_argument("--temperature", type=number(float, 0, 100), default=0.8, help="0 is greedy (default 0.8)")
    parser.add_argument("--top_k", type=number(int, 1, 10**6), help="draw from the k likeliest characters (default: all)")
    parser.add_argument("--seed", type=number(int, 0, 2**31), default=0, help="of the draws (default 0)")
    parser.add_argument("--device", help="cpu, cuda, mps ... (default: the best there is)")
    parser.add_argument("--run", choices=RUNS, help="gates as trained, or those of inference, multiplied (masked) or "
                                                    "skipped (gathered, the default; trained for the soft gate)")
    parser.add_argument("--no_cache", action="store_true", help="compute the whole window again for each character")
    parser.add_argument("--bench", action="store_true", help="time dense, masked and gathered instead; without a "
                                                             "checkpoint at the paper's size with random weights")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of --bench (default float32)")
    parser.add_argument("--out_dir", type=Path, help="where --bench writes bench.json (default: beside the checkpoint)")
    return parser.parse_args(argv)


def newest_checkpoint():
    paths = sorted(Path("out").glob("*/ckpt.pt"), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise UserError("there is no out/*/ckpt.pt: run train.py first, or give --ckpt")
    return paths[-1]


def write_samples(model, vocab, prompt, args, device):
    """Stream the samples; returns nothing."""
    idx = torch.tensor([data.encode(prompt, vocab)], device=device)                        # (1, T)
    run = args.run or default_run(model.config)
    if args.run is None and run == "trained":
        print("Running the soft gates as trained: cut to all or nothing for inference, as the paper does, they ruin "
              "the text (see with --run masked).", file=sys.stderr)
    torch.manual_seed(args.seed)
    for _ in range(args.num):
        print(prompt, end="", flush=True)
        began, depth = time.time(), 0
        for idx_next, gates in generate(model, idx, args.max_new_tokens, args.temperature, args.top_k, run,
                                        cache=not args.no_cache):
            print(vocab[idx_next.item()], end="", flush=True)
            depth += (gates > 0).sum().item()
        seconds, depth = time.time() - began, depth / args.max_new_tokens
        print(f"\n[{args.max_new_tokens} characters, {args.max_new_tokens / seconds:.0f} a second, mean depth {depth:.2f} "
              f"of {model.config.n_layer} blocks]", file=sys.stderr)


@torch.no_grad()
def bench(model, text, args, device):
    """
    Time prefill (a whole window) and decode (the second half of a window, a token at a time, from a cache) -> rows
    for bench.json. `dense` is the plain transformer of the same size. masked and gathered run on Bernoulli gates of
    each of KEEPS, replayed, and on the model's own gates where there is text (n,) to read. All take turns in one
    process, after a round that does not count. speedup: over dense, the median of the ratios round by round;
    allowed: what the multiply-adds of a full window would give; ms: a window or a token step, with its quartiles.
    """
    config, dtype = model.config, getattr(torch, args.dtype)
    T, L = config.block_size, config.n_layer
    plain = Config(**{**vars(config), "model": "dense"})
    dense, model = build(plain).to(device, dtype).eval(), model.to(device, dtype).eval()
    rows = []

    def prefill(model, idx, run, gates):
        model(idx, run=run, gates=gates)

    def decode(model, idx, run, gates, cache):
        for kv in cache:
            kv.length = T // 2
        for t in range(T // 2, T):
            model(idx[:, t:t + 1], run=run, gates=None if gates is None else gates[:, :, t:t + 1], cache=cache)

    def seconds(mode, B, *call):
        if mode == "decode":
            call += ([KV(B, config, dense.wte.weight) for _ in range(L)],)
        began = time.perf_counter()
        (prefill if mode == "prefill" else decode)(*call)
        if device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - began

    for mode, B in [(mode, B) for mode in BATCHES for B in BATCHES[mode]]:
        if text is None:
            idx = torch.randint(config.vocab_size, (B, T), device=device)
        else:
            idx = text[:B * T].long().repeat(B)[:B * T].view(B, T)
        cases = {("dense", "none"): (dense, idx, "trained", None)}
        ran = {("dense", "none"): [1.0] * L}
        for run in ("masked", "gathered"):
            for keep in KEEPS:
                gates = torch.bernoulli(torch.full((L, B, T), keep, device=device))
                cases[run, keep] = (model, idx, run, gates)
                ran[run, keep] = [1.0] + [keep] * (L - 1)
            if text is not None:
                cases[run, "own"] = (model, idx, run, None)
                ran[run, "own"] = (model(idx, run=run)[2]["gates"] > 0).float().mean((1, 2)).tolist()
        times = {case: [] for case in cases}
        end = time.perf_counter() + BENCH_SECONDS
        while len(times["dense", "none"]) < 4 or time.perf_counter() < end:
            for case, call in cases.items():
                times[case].append(seconds(mode, B, *call))
        reference = times["dense", "none"][1:]
        steps = T // 2 if mode == "decode" else 1
        for case in cases:
            run, gates = case
            low, median, high = (1000 * q / steps for q in statistics.quantiles(times[case][1:], n=4))
            work = macs_per_token(config if run != "dense" else plain, ran[case] if run == "gathered" else [1.0] * L)
            rows.append({
                "mode": mode, "run": run, "batch": B, "block_size": T, "keep": sum(ran[case][1:]) / max(L - 1, 1),
                "gates": gates if gates in ("own", "none") else "bernoulli", "dtype": args.dtype, "device": device,
                "ms": median, "ms_low": low, "ms_high": high,
                "tokens_per_s": 1000 * B * (T if mode == "prefill" else 1) / median,
                "speedup": statistics.median(a / b for a, b in zip(reference, times[case][1:])),
                "allowed": macs_per_token(plain, [1.0] * L) / work})
            print("{mode:8}batch {batch:<4}{run:9}{gates:>10} {keep:.3f}{ms:11.3f} ms ({ms_low:.3f} to {ms_high:.3f})"
                  "{tokens_per_s:13,.0f} tokens/s  {speedup:.2f}x".format(**rows[-1]), end="")
            print(f" of {rows[-1]['allowed']:.2f}x allowed, {rows[-1]['speedup'] / rows[-1]['allowed']:.0%}")
    window, step = (next(row for row in rows if row["mode"] == mode) for mode in ("prefill", "decode"))
    print(f"A character without the cache costs a window of {T}, {window['ms']:.2f} ms; with it {step['ms']:.2f} ms: "
          f"{window['ms'] / step['ms']:.1f}x faster (dense, batch 1)")
    if text is not None:
        idx = text[:len(text) // T * T][:64 * T].long().view(-1, T)
        open_masked, open_gathered = (model(idx, run=run)[2]["gates"][1:] > 0 for run in ("masked", "gathered"))
        print(f"{(open_masked != open_gathered).sum().item()} of {open_masked.numel():,} gates differ between masked and "
              f"gathered in {args.dtype}: those next to the threshold")
    return rows


def run_bench(args, device):
    keep_freed_memory()
    torch.manual_seed(args.seed)
    if args.ckpt is None:
        model, text, out_dir = build(Config(gate="skip", block_size=256)), None, args.out_dir or Path("out")
    else:
        model, saved = load_checkpoint(args.ckpt, device)
        text, out_dir = data.load(saved["flags"]["data"]).splits["val"].flatten().to(device), args.out_dir or args.ckpt.parent
    print(f"{torch.get_num_threads()} threads on {device}, torch {torch.__version__}, {args.dtype}; the model: {model.config}")
    out_dir.mkdir(parents=True, exist_ok=True)
    rows = bench(model, text, args, device)
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
        prompt = saved["prompt"] if args.prompt is None else args.prompt
        if not prompt:
            raise UserError("--prompt is empty: give at least one character, or leave it out")
        write_samples(model, saved["vocab"], prompt, args, device)
        return 0
    except UserError as error:
        print(f"sample.py: {error}", file=sys.stderr)
    except OSError as error:
        print(f"sample.py: {error.filename}: {error.strerror}", file=sys.stderr)
    except KeyboardInterrupt:
        print()
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
