"""
Look at a trained model.

    python sample.py                                        write text, coloured by the depth it took to predict it
    python sample.py --map map.svg                          draw which block read which character
    python sample.py --analyse --plain out/dense/ckpt.pt    is depth about difficulty? (a plain model says what that is)
    python sample.py --bench                                what skipping is worth on the clock

Sampling needs nothing but the checkpoint: sizes, vocabulary and weights are in it. The others also read the text that
the model was trained on.
"""
import html
import json
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional as F

import data
from train import MEANINGLESS, Parser, keep_freed_memory, load_checkpoint, load_corpus, number, pick_device
from tsa import (Config, GATES, KV, RUNS, UserError, build, cross_entropy, default_run, generate, macs_per_token,
                 macs_saved, tlops_saved)

BATCHES = {"prefill": (1, 8, 64), "decode": (1, 8)}
KEEPS = (1.0, 0.9, 0.726, 0.5, 0.3, 0.1)        # 0.726 is the paper's alpha on Tiny-Shakespeare
BENCH_SECONDS = 25                              # for each mode and batch size


def parse_args(argv):
    parser = Parser(prog="sample.py", description="Look at a trained model: write text, draw, analyse or time it.")
    parser.add_argument("--ckpt", type=Path, help="checkpoint (default: the newest out/*/ckpt.pt)")
    parser.add_argument("--prompt", help="text to continue (default: a new line; for a task one of its sequences)")
    parser.add_argument("--max_new_tokens", type=number(int, 1, 10**9), help="characters a sample (default 500)")
    parser.add_argument("--num", type=number(int, 1, 10**6), default=1, help="samples (default 1)")
    parser.add_argument("--temperature", type=number(float, 0, 100), default=0.8, help="0 is greedy (default 0.8)")
    parser.add_argument("--top_k", type=number(int, 1, 10**6), help="draw from the k likeliest only (default: all)")
    parser.add_argument("--seed", type=number(int, 0, 2**31), default=0, help="of the draws (default 0)")
    parser.add_argument("--device", help="cpu, cuda, mps ... (default: the best there is)")
    parser.add_argument("--run", choices=RUNS, help="gates as trained, or those of inference, multiplied (masked) or "
                                                    "skipped (gathered, the default; trained for the soft gate)")
    parser.add_argument("--no_cache", action="store_true", help="compute the whole window again for each character")
    parser.add_argument("--gate", choices=GATES, help="run a tsa model with another pair's gates")
    parser.add_argument("--threshold", type=number(float, 0, 1), help="halt above another p, or leave above another "
                                                                      "confidence, than in training")
    parser.add_argument("--map", type=Path, metavar="SVG", help="draw the gates over --prompt, or over validation "
                                                                "text, instead")
    parser.add_argument("--analyse", action="store_true", help="set depth against difficulty on the validation split "
                                                               "instead")
    parser.add_argument("--plain", type=Path, help="with --analyse: checkpoint of a plain model of the same text; its "
                                                   "entropy says what is difficult")
    parser.add_argument("--bench", action="store_true", help="time dense, masked and gathered instead; without a "
                                                             "checkpoint at the paper's width with random weights")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="of --bench (default float32)")
    parser.add_argument("--out_dir", type=Path, help="where --bench and --analyse write (default: beside the "
                                                      "checkpoint)")
    return parser.parse_args(argv)


def load_model(args, device):
    """--ckpt, or the newest one, run with the --gate and --threshold asked for -> model, what was saved."""
    args.ckpt = args.ckpt or newest_checkpoint()
    model, saved = load_checkpoint(args.ckpt, device)
    for flag in ("gate", "threshold"):
        if (value := getattr(args, flag)) is not None:
            if flag in MEANINGLESS[model.config.model]:
                raise UserError(f"--{flag} means nothing to {args.ckpt}, a {model.config.model} model: leave it out")
            setattr(model.config, flag, value)
    return model, saved


def newest_checkpoint():
    paths = sorted(Path("out").glob("*/ckpt.pt"), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise UserError("there is no out/*/ckpt.pt: run train.py first, or give --ckpt")
    return paths[-1]


COLORS = (153, 159, 157, 229, 223, 217)         # backgrounds from blue, shallow, to red, deep: black text on them reads


def depth_of(gates, run):
    """gates (L, ...) -> (...): how many blocks ran; for soft gates, of which none is ever 0, the sum of the scales."""
    return gates.sum(0) if run == "trained" else (gates > 0).float().sum(0)


def paint(text, depth, n_layer):
    level = round((depth - 1) / max(n_layer - 1, 1) * (len(COLORS) - 1))
    return f"\033[30;48;5;{COLORS[level]}m{text}\033[0m"


def write_samples(model, saved, args, device):
    """
    Print args.num continuations of the prompt as they are drawn, each character on the colour of its depth, or with
    its depth as a digit below it where colours are unwanted (NO_COLOR) or would be noise (a pipe). Its depth is that of
    the token that predicted it. Remarks go to stderr.
    """
    vocab, L = saved["vocab"], model.config.n_layer
    prompt = saved["prompt"] if args.prompt is None else args.prompt
    if not prompt:
        raise UserError("--prompt is empty: give at least one character, or leave it out")
    idx = torch.tensor([data.encode(prompt, vocab)], device=device)                        # (1, T)
    n, run = args.max_new_tokens or saved["new_tokens"], args.run or default_run(model.config)
    if args.run is None and run == "trained":
        print("Running the soft gates as trained: cut to all or nothing for inference, as the paper does, they ruin "
              "the text (see with --run masked).", file=sys.stderr)
    colored = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    if colored:
        legend = "".join(paint(f" {depth} ", depth, L) for depth in range(1, L + 1))
        print(f"depth {legend} of {L} blocks", file=sys.stderr)
    torch.manual_seed(args.seed)
    for _ in range(args.num):
        print(prompt, end="", flush=True)
        digits = " " * len(prompt.rpartition("\n")[2])
        began, depths, ran = time.perf_counter(), [], torch.zeros(L, device=device)
        for idx_next, gates in generate(model, idx, n, args.temperature, args.top_k, run, cache=not args.no_cache):
            c, depth = vocab[idx_next.item()], depth_of(gates, run).item()
            depths.append(depth)
            ran += gates[:, 0] > 0
            digits += f"{min(round(depth), 9)}"
            if colored:
                print(c if c == "\n" else paint(c, depth, L), end="", flush=True)
            else:
                print(c, end="", flush=True)
                if c == "\n":
                    print(digits)
            digits = "" if c == "\n" else digits
        print("" if colored else "\n" + digits)
        print(f"{n} characters, {n / (time.perf_counter() - began):.0f} tokens/s, mean depth "
              f"{statistics.mean(depths):.2f} of {L}, token-layer operations saved "
              f"{tlops_saved((ran / n).tolist()):.1%}", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------
# The routing map, and depth against difficulty

@torch.inference_mode()
def draw_map(model, saved, args, device):
    """
    Write an SVG: characters across, blocks up, each gate as a shade, and below them the loss of the character that was
    to be predicted, a bar of 10 units a nat.
    """
    if args.prompt is None:
        T = min(model.config.block_size, 96)
        idx, targets = (tokens.to(device) for tokens in load_corpus(saved, args.ckpt).windows("val", T, 1))
    else:
        tokens = torch.tensor([data.encode(args.prompt, saved["vocab"])], device=device)
        idx, targets = tokens[:, :-1], tokens[:, 1:]
        if not 0 < idx.size(1) <= model.config.block_size:
            raise UserError(f"--prompt must have 2 to {model.config.block_size + 1} characters to be drawn")
    run = args.run or default_run(model.config)
    logits, _, stats = model(idx, run=run)
    losses = cross_entropy(logits, targets)[0].tolist()    # 0 where nothing is scored
    gates = stats["gates"][:, 0].tolist()                                                  # L lists of T
    read, predicted = ([saved["vocab"][i] if i >= 0 else " " for i in row.tolist()] for row in (idx[0], targets[0]))
    L, T = len(gates), len(read)
    left, top, width, height = 66, 46, 11, 15
    bottom = top + L * height + 14

    def text(x, y, words):
        words = words.replace("\n", "⏎") if words.isprintable() or words == "\n" else "?"     # XML has no form feed
        return f'<text x="{x}" y="{y}">{html.escape(words)}</text>'

    def box(x, y, h, color, opacity):
        size = f'width="{width - 1}" height="{h:.1f}"'
        return f'<rect x="{x}" y="{y:.1f}" {size} fill="{color}" opacity="{opacity:.2f}"/>'

    name = " ".join(filter(None, (model.config.model, model.config.gate)))
    title = f"{name}, gates as {run}: dark is open, pale is closed"
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + T * width + 12} {bottom + 76}" '
             'font-family="monospace" font-size="12" fill="#222">',
             '<rect width="100%" height="100%" rx="6" fill="#fff"/>', text(8, 18, title)]
    for y, words in ((top - 8, "read"), (bottom + 4, "target"), (bottom + 22, "loss")):
        parts.append(text(8, y, words))
    for l in range(L):
        y = top + (L - 1 - l) * height
        parts.append(text(8, y + 11, f"block {l}"))
        parts += [box(left + t * width, y, height - 1, "#1f5fbf", 0.08 + 0.92 * gates[l][t]) for t in range(T)]
    for t in range(T):
        x = left + t * width
        parts += [text(x + 1, top - 8, read[t]), text(x + 1, bottom + 4, predicted[t])]
        parts.append(box(x, bottom + 10, 10 * min(losses[t], 6), "#d9480f", 0.85))
    data.write_atomic(args.map, "\n".join([*parts, "</svg>"]).encode("utf-8"))
    print(f"{args.map}: {T} characters, gates as {run}, mean loss {sum(losses) / (targets >= 0).sum():.3f}")


def ranks(x):
    """Place of each element in order, equal ones sharing the mean of theirs."""
    _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[inverse]


def rank_correlation(x, y):
    """Spearman's, with ties."""
    return torch.corrcoef(torch.stack([ranks(x), ranks(y)]).double())[0, 1].item()


def kinds_of(text):
    """The kind of each character of a text."""
    kinds = []
    for before, c in zip(" " + text, text):
        if c.isspace():
            kinds.append("newline" if c == "\n" else "space")
        elif not c.isalpha():
            kinds.append("punctuation")
        elif c.isupper():
            kinds.append("capital")
        else:
            kinds.append("inside a word" if before.isalpha() else "first letter")
    return kinds


@torch.inference_mode()
def analyse(model, plain, saved, args, device):
    """
    For every character of the validation split: the depth it was given, against the plain model's loss on it, and
    against the plain model's entropy there, which is what a causal gate could know. And is the gate about the token?
    Each token is given the gates of the same position in another sequence: if the loss hardly moves, the gates knew
    the position and no more.
    """
    corpus = load_corpus(saved, args.ckpt)
    if corpus.is_task:
        raise UserError(f"{args.ckpt} was trained on {corpus.name}: --analyse needs a model of a text")
    idx, targets = (x.to(device) for x in corpus.windows("val", model.config.block_size))          # (n, T)
    # The soft gates of tsa are scales: how deep a character goes is their sum. Others run a block or do not.
    runs = {"executed": "masked"} | ({"as trained": "trained"} if model.config.model == "tsa" else {})
    columns, losses = {name: [] for name in ("loss", "entropy", *runs)}, {}
    ran = torch.zeros(model.config.n_layer, device=device)
    torch.manual_seed(args.seed)
    for i, (x, y) in enumerate(zip(idx.split(64), targets.split(64))):
        print(f"\r{64 * i} of {len(idx)} windows", end="", file=sys.stderr)
        log_p = F.log_softmax(plain(x)[0], dim=-1)
        columns["loss"].append(-log_p.gather(2, y.unsqueeze(2)).flatten())
        columns["entropy"].append(-(log_p.exp() * log_p).sum(-1).flatten())
        scores = {"plain model": cross_entropy(log_p, y)}
        for name, run in runs.items():
            logits, _, stats = model(x, run=run)
            gates = stats["gates"]
            columns[name].append(depth_of(gates, run).flatten())
            order = torch.rand(x.shape, device=device).argsort(0)       # other sequences, at each position anew
            permuted = model(x, run=run, gates=gates.gather(1, order.expand_as(gates)))[0]
            scores |= {name: cross_entropy(logits, y), f"{name}, gates permuted": cross_entropy(permuted, y)}
            if run == "masked":
                ran += (gates > 0).sum((1, 2))
        for name, score in scores.items():
            losses[name] = losses.get(name, 0) + score.sum().item() / idx.numel()
    print("\r", end="", file=sys.stderr)
    for name, loss in losses.items():
        print(f"loss {name:27} {loss:.4f}")
    ran = (ran / idx.numel()).tolist()
    print(f"executed: {tlops_saved(ran):.1%} of token-layer operations saved, {macs_saved(model.config, ran):.1%} of "
          f"multiply-adds")

    columns = {name: torch.cat(parts).cpu() for name, parts in columns.items()}
    groups = {f"entropy decile {i + 1}": part for i, part in enumerate(columns["entropy"].argsort().tensor_split(10))}
    for verb, tokens in (("reads", idx), ("predicts", targets)):
        kinds = kinds_of("".join(saved["vocab"][i] for i in tokens.flatten().tolist()))
        for kind in sorted(set(kinds)):
            groups[f"{verb} {kind}"] = torch.tensor([k == kind for k in kinds]).nonzero().squeeze(1)
    rows = []
    for name in runs:
        for other in ("entropy", "loss"):
            value = rank_correlation(columns[name], columns[other])
            rows.append({"depth": name, "by": f"rank correlation with {other}", "value": value})
        for group, members in groups.items():
            rows.append({"depth": name, "by": group, "value": columns[name][members].mean().item(), "n": len(members)})
    for row in rows:
        print("{depth:11} {by:32} {value:.3f}".format(**row))
    path = (args.out_dir or args.ckpt.parent) / "analysis.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    data.write_atomic(path, json.dumps({"loss": losses, "ran": ran, "rows": rows}, indent=1).encode("utf-8"))
    print(f"written to {path}")


# ----------------------------------------------------------------------------------------------------------------
# The benchmark

def timed(call, device):
    """Seconds that a call takes, the work it left on the device included."""
    began = time.perf_counter()
    call()
    if device != "cpu":
        torch.accelerator.synchronize(device)
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
        model, saved = load_model(args, device)
        text = load_corpus(saved, args.ckpt).windows("val", model.config.block_size)[0].flatten().to(device)
        out_dir = args.out_dir or args.ckpt.parent
    dtype = getattr(torch, args.dtype)
    model, dense = (m.to(device, dtype).eval() for m in (model, build(replace(model.config, model="dense"))))
    minutes = BENCH_SECONDS * sum(map(len, BATCHES.values())) / 60
    print(f"{torch.get_num_threads()} threads on {device}, torch {torch.__version__}; {model.config}; takes some "
          f"{minutes:.0f} minutes")
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
        model, saved = load_model(args, device)
        print(f"{args.ckpt}: {model.config.model}, step {saved['step']}", file=sys.stderr)
        if args.map:
            draw_map(model, saved, args, device)
        elif args.analyse:
            if args.plain is None:
                raise UserError("--analyse needs --plain, the checkpoint of a plain model of the same text")
            plain, of_plain = load_checkpoint(args.plain, device)
            if of_plain["vocab"] != saved["vocab"] or plain.config.block_size < model.config.block_size:
                raise UserError(f"{args.plain} has another vocabulary or a shorter block_size than {args.ckpt}")
            analyse(model, plain, saved, args, device)
        else:
            write_samples(model, saved, args, device)
        return 0
    except BrokenPipeError:         # | head has seen enough; what is left to flush must not complain either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print()
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
