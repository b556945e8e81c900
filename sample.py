"""
Look at a trained model.

    python sample.py                    write text, coloured by the depth it took to predict it
    python sample.py --map map.svg      draw which token took which block

Needs nothing but the checkpoint: sizes, vocabulary and weights are in it. (A map without --prompt also reads the text
that the model was trained on.)
"""
import html
import os
import sys
import time
from pathlib import Path

import torch

import data
from train import OWN_FLAGS, Parser, load_checkpoint, load_corpus, number, pick_device, run_program
from tsa import GATES, MODES, UserError, cross_entropy, default_mode, generate, stack, tlops_saved

SHIPPED = Path(__file__).resolve().parent / "report" / "halt.pt"
COLORS = (153, 159, 157, 229, 223, 217)     # terminal backgrounds from blue, shallow, to red, deep
MAP_TOKENS = 96                             # of validation text in a map


def parse_args(argv):
    parser = Parser(prog="sample.py", description="Look at a trained model: write text, or draw a map of its gates.")
    parser.add_argument("--ckpt", type=Path, help="checkpoint (default: the newest out/*/ckpt.pt, else report/halt.pt)")
    parser.add_argument("--prompt", help="text to continue, or to draw (default: a new line; for a task, a sequence)")
    parser.add_argument("--max_new_tokens", type=number(int, 1, 10**9), help="tokens to write (default 500)")
    parser.add_argument("--temperature", type=number(float, 0, 100), default=0.8, help="0 is greedy (default 0.8)")
    parser.add_argument("--top_k", type=number(int, 1, 10**6), help="draw from the k likeliest tokens (default: all)")
    parser.add_argument("--seed", type=number(int, 0, 2**31), default=0, help="of the draws (default 0)")
    parser.add_argument("--device", help="cpu, cuda, mps ... (default: the best that works)")
    parser.add_argument("--mode", choices=MODES,
                        help="gates as trained, or those of inference, multiplied (masked) or skipped (gathered, the "
                             "default; trained for the soft gate)")
    parser.add_argument("--gate", choices=GATES, help="run a tsa model with another design's gates")
    parser.add_argument("--threshold", type=number(float, 0, 1), help="run with another threshold than in training")
    parser.add_argument("--map", type=Path, metavar="SVG", help="draw the gates over --prompt, or over validation text")
    return parser.parse_args(argv)


def find_checkpoint():
    paths = sorted(Path("out").glob("*/ckpt.pt"), key=lambda path: path.stat().st_mtime)
    if paths:
        return paths[-1]
    print("There is no out/*/ckpt.pt yet, so here is the halting model that comes with the code.", file=sys.stderr)
    return SHIPPED


def load_model(path, device, **settings):
    """A checkpoint, run with another gate or threshold where settings give one -> model, what was saved."""
    model, saved = load_checkpoint(path, device)
    for flag, value in settings.items():
        if value is not None:
            if flag not in OWN_FLAGS[model.config.model]:
                raise UserError(f"--{flag} means nothing to {path}, a {model.config.model} model: leave it out")
            setattr(model.config, flag, value)
    return model, saved


def depth_of(gates, mode):
    """gates (L, ...) -> (...): how many blocks ran, or as trained, where no gate need be 0, the sum of the gates."""
    return gates.sum(0) if mode == "trained" else (gates != 0).float().sum(0)


# ----------------------------------------------------------------------------------------------------------------
# Text in the colours of depth

def paint(text, depth, n_layer):
    level = round((depth - 1) / max(n_layer - 1, 1) * (len(COLORS) - 1))
    color = COLORS[min(max(level, 0), len(COLORS) - 1)]         # a gate of your own may exceed 1
    return f"\033[30;48;5;{color}m{text}\033[0m"        # in black, which all of COLORS leave readable


def write_text(model, saved, args, mode, device):
    """
    Print the continuation of the prompt as it is drawn. The colour of a token is the depth at which it was predicted.
    Where colours are unwanted (NO_COLOR) or would be noise (a pipe), the depth is a digit below. Remarks go to stderr.
    """
    vocab, L = saved["vocab"], model.config.n_layer
    prompt = saved["prompt"] if args.prompt is None else args.prompt
    if not prompt:
        raise UserError("--prompt is empty: give at least one character, or leave it out")
    idx = torch.tensor([data.encode(prompt, vocab)], device=device)                        # (1, T)
    n = args.max_new_tokens or saved["new_tokens"]
    colored = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    if colored:
        legend = "".join(paint(f" {depth} ", depth, L) for depth in range(1, L + 1))
        print(f"depth {legend} of {L} blocks", file=sys.stderr)
    print(prompt, end="", flush=True)
    digits = " " * len(prompt.rpartition("\n")[2])
    began, depths, ran = time.perf_counter(), [], torch.zeros(L, device=device)
    torch.manual_seed(args.seed)
    for idx_next, gates in generate(model, idx, n, args.temperature, args.top_k, mode):
        c, depth = vocab[idx_next.item()], depth_of(gates, mode).item()
        depths.append(depth)
        ran += gates[:, 0] != 0
        digits += f"{min(round(depth), 9)}"
        print(paint(c, depth, L) if colored and c != "\n" else c, end="", flush=True)
        if c == "\n":
            print("" if colored else digits + "\n", end="")
            digits = ""
    print("" if colored else "\n" + digits)
    print(f"{n} tokens, {n / (time.perf_counter() - began):.0f} a second, mean depth {sum(depths) / n:.2f} of "
          f"{L}, token-layer operations saved {tlops_saved((ran / n).tolist()):.1%}", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------
# The map: an SVG with tokens across, blocks up, and each gate as a shade

LEFT, WIDTH, HEIGHT = 66, 11, 15        # where the boxes begin; a box with its margin


def svg_text(x, y, words):
    words = words.replace("\n", "⏎") if words.isprintable() or words == "\n" else "?"       # XML has no form feed
    return f'<text x="{x}" y="{y}">{html.escape(words)}</text>'


def svg_box(x, y, height, color, opacity):
    size = f'width="{WIDTH - 1}" height="{height:.1f}"'
    return f'<rect x="{x}" y="{y:.1f}" {size} fill="{color}" opacity="{opacity:.2f}"/>'


@torch.inference_mode()
def draw_panel(model, vocab, idx, targets, mode, title, top):
    """
    One sentence, idx and targets (1, T), through one model -> SVG elements below `top`, and the y where they end. A bar
    below each token is its loss, 10 units a nat; `title` is followed by the mean.
    """
    logits, used = model(idx, mode)
    losses = cross_entropy(logits, targets)[0].tolist()         # 0 where nothing is scored
    gates = stack(used, idx)[:, 0].tolist()                                                # L lists of T
    read, predicted = ([vocab[i] if i >= 0 else " " for i in row.tolist()] for row in (idx[0], targets[0]))
    L, first = len(gates), top + 46
    bottom = first + L * HEIGHT + 14
    loss = sum(losses) / (targets >= 0).sum().item()
    parts = [svg_text(8, top + 18, f"{title}. Mean loss {loss:.2f}."), svg_text(8, first - 8, "read")]
    parts += [svg_text(8, bottom + 4, "target"), svg_text(8, bottom + 22, "loss")]
    for l in range(L):
        y = first + (L - 1 - l) * HEIGHT
        parts.append(svg_text(8, y + 11, f"block {l}"))
        for t, gate in enumerate(gates[l]):
            parts.append(svg_box(LEFT + t * WIDTH, y, HEIGHT - 1, "#1f5fbf", 0.08 + 0.92 * gate))
    for t in range(len(losses)):
        x = LEFT + t * WIDTH
        parts += [svg_text(x + 1, first - 8, read[t]), svg_text(x + 1, bottom + 4, predicted[t]),
                  svg_box(x, bottom + 10, 10 * min(losses[t], 6), "#d9480f", 0.85)]
    return parts, bottom + 76


def write_svg(path, parts, n_tokens, height):
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + n_tokens * WIDTH + 12} {height}" '
            'font-family="monospace" font-size="12" fill="#222">\n<rect width="100%" height="100%" fill="#fff"/>')
    data.write_atomic(path, "\n".join([head, *parts, "</svg>"]).encode("utf-8"))


def draw_map(model, saved, args, mode, device):
    block_size = model.config.block_size
    if args.prompt is None:
        idx, targets = load_corpus(saved, args.ckpt).windows("val", min(block_size, MAP_TOKENS), 1)
    else:
        tokens = torch.tensor([data.encode(args.prompt, saved["vocab"])])
        idx, targets = tokens[:, :-1], tokens[:, 1:]
        if not 0 < idx.size(1) <= block_size:
            raise UserError(f"--prompt must have 2 to {block_size + 1} characters to be drawn")
    name = " ".join(filter(None, (model.config.model, model.config.gate)))
    title = f"{name}, gates as {mode}: dark is open, pale is closed"
    parts, height = draw_panel(model, saved["vocab"], idx.to(device), targets.to(device), mode, title, 0)
    write_svg(args.map, parts, idx.size(1), height)
    print(f"written to {args.map}")


def main(argv):
    args = parse_args(argv)
    device = pick_device(args.device)
    args.ckpt = args.ckpt or find_checkpoint()
    model, saved = load_model(args.ckpt, device, gate=args.gate, threshold=args.threshold)
    mode = args.mode or default_mode(model.config)
    if args.mode is None and args.threshold is not None:
        mode = "gathered"       # gates as trained know no threshold
    print(f"{args.ckpt}: {model.config.model}, step {saved['step']}, gates as {mode}", file=sys.stderr)
    if args.mode is None and mode == "trained":
        print("The paper's soft gates run as trained here, so nothing is skipped. To see the text when they are cut to "
              "switches, as the paper runs them, add --mode gathered.", file=sys.stderr)
    if args.map:
        draw_map(model, saved, args, mode, device)
    else:
        write_text(model, saved, args, mode, device)


if __name__ == "__main__":
    sys.exit(run_program("sample.py", main))
