"""
Inspect a trained model.

    python sample.py            generate text; the color of a character shows the depth at which it was predicted
    python sample.py --map      show which tokens ran which blocks

Only the checkpoint is needed: it holds the configuration, the vocabulary, the weights and an example text.
"""
import argparse
import os
import shutil
import sys
import time
from pathlib import Path

import torch

import data
from train import load_checkpoint, pick_device, positive_int
from tsa import MODES, default_mode, generate, macs_saved, tlops_saved

BUNDLED = Path(__file__).resolve().parent / "report" / "halt.pt"
COLORS = (153, 159, 157, 229, 223, 217)     # terminal backgrounds, from blue (shallow, closed) to red (deep, open)
SHADES = " .:-=+*#%@"                       # used without colors: one character for each 0.1 of the gate


def parse_args(argv):
    parser = argparse.ArgumentParser(prog="sample.py", usage=argparse.SUPPRESS,
                                     description="Generate text with a trained model, or show its gates.")
    add = parser.add_argument
    add("--ckpt", type=Path, help="checkpoint; by default the newest out/*/ckpt.pt, or report/halt.pt if there is none")
    add("--prompt", help="text to continue, or to show with --map; by default from the checkpoint")
    add("--max_new_tokens", type=positive_int, help="tokens to generate; by default 500, or one answer for a task")
    add("--temperature", type=float, default=0.8, help="0 always picks the most likely token (default: 0.8)")
    add("--top_k", type=positive_int, help="sample from the k most likely tokens; by default from all")
    add("--seed", type=int, default=0, help="random seed (default: 0)")
    add("--device", default="auto", help="cpu, cuda, mps ...; by default the best one available")
    add("--mode", choices=MODES, help="trained: the training gates; executed: the inference gates; by default "
                                      "executed, or trained for the paper's soft gate")
    add("--map", action="store_true", help="show the gates of the prompt instead of continuing it")
    return parser.parse_args(argv)


def is_colored():
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def paint(text, share):
    """Return the text in black on a background from blue (share 0) to red (share 1)."""
    level = round(share * (len(COLORS) - 1))
    return f"\033[30;48;5;{COLORS[min(max(level, 0), len(COLORS) - 1)]}m{text}\033[0m"


def write_text(model, saved, idx, args, mode):
    """Print the continuation of idx (1, T). Without colors, digits below it show the depths (9 means 9 or more)."""
    vocab, L, colored = saved["vocab"], model.config.n_layer, is_colored()
    prompt = "".join(vocab[i] for i in idx[0].tolist())
    n = args.max_new_tokens or saved["new_tokens"]
    print(prompt, end="", flush=True)
    digits = " " * len(prompt.rpartition("\n")[2])
    ran, depth_sum, began = torch.zeros(L), 0, time.perf_counter()
    torch.manual_seed(args.seed)
    for idx_next, gates in generate(model, idx, n, args.temperature, args.top_k, mode):
        c, depth = vocab[idx_next.item()], gates.sum().item()      # the number of blocks that ran, if gates are 0 or 1
        ran += (gates[:, 0] != 0).cpu()
        depth_sum += depth
        digits += str(min(round(depth), 9))
        print(paint(c, (depth - 1) / max(L - 1, 1)) if colored and c != "\n" else c, end="", flush=True)
        if c == "\n":
            print("" if colored else digits + "\n", end="")
            digits = ""
    print("" if colored else "\n" + digits)
    ran, seconds = (ran / n).tolist(), time.perf_counter() - began
    print(f"{n} tokens, {n / seconds:.0f} per second, mean depth {depth_sum / n:.2f} of {L}, saving "
          f"{tlops_saved(ran):.1%} of token-layer operations and {macs_saved(model.config, ran, decode=True):.1%} of "
          f"multiply-adds", file=sys.stderr)


@torch.inference_mode()
def write_map(model, saved, idx, mode):
    """Print the gates of idx (1, T): a row per block, the last block on top, and a column per token."""
    gates, T = model(idx, mode)[1][:, 0], idx.size(1)                                      # (L, T)
    chars = "".join(saved["vocab"][i] for i in idx[0].tolist()).replace("\n", "⏎")
    width = max(shutil.get_terminal_size().columns - len("block 0  "), 1)
    for start in range(0, T, width):
        for l in reversed(range(len(gates))):
            row = gates[l, start:start + width].tolist()
            cells = [paint(" ", g) if is_colored() else SHADES[min(max(int(10 * g), 0), 9)] for g in row]
            print(f"block {l:<3}" + "".join(cells))
        print("token    " + chars[start:start + width] + "\n")
    print(f"mean depth {gates.sum(0).mean():.2f} of {len(gates)}", file=sys.stderr)


def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    path = args.ckpt or max(Path("out").glob("*/ckpt.pt"), key=os.path.getmtime, default=BUNDLED)
    model, saved = load_checkpoint(path, device)
    mode = args.mode or default_mode(model.config)
    shows_map = args.map or not saved["new_tokens"]        # with chains, there is nothing to generate
    prompt = (saved["example"] if shows_map else saved["prompt"]) if args.prompt is None else args.prompt
    if not prompt:
        sys.exit("sample.py: --prompt is empty; give at least one character, or leave out the flag")
    try:
        idx = torch.tensor([data.encode(prompt, saved["vocab"])], device=device)           # (1, T)
    except ValueError as error:
        sys.exit(f"sample.py: --prompt: {error}")
    print(f"{path}: {model.config.model} model, step {saved['step']}, gates as {mode}", file=sys.stderr)
    if args.mode is None and mode == "trained":
        print("The paper's soft gates are applied as trained, so nothing is skipped; --mode executed thresholds them.",
              file=sys.stderr)
    if shows_map:
        write_map(model, saved, idx[:, :model.config.block_size], mode)
    else:
        write_text(model, saved, idx, args, mode)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")       # for terminals without Unicode
    main()
