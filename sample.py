"""
Inspect a trained model:

    python sample.py                            generate text; colors show at which depth each character was predicted
    python sample.py report/chain-halt.pt       show what the model predicts at each token after each block
"""
import argparse
import os
import shutil
import sys
import time
from pathlib import Path

import torch

import data
from train import COUNT, between, load_checkpoint, pick_device, user_errors
from tsa import generate, savings

SHIPPED = Path(__file__).resolve().parent / "report" / "text-halt.pt"
COLORS = (153, 159, 157, 229, 223, 217)     # terminal backgrounds, from blue (shallow, closed) to red (deep, open)


def is_colored():
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def paint(text, share):
    """In a terminal, put the text on a background from blue (share 0) to red (share 1)."""
    if not is_colored():
        return text
    level = round(min(max(share, 0), 1) * (len(COLORS) - 1))
    return f"\033[30;48;5;{COLORS[level]}m{text}\033[0m"


def summary(model, ran, sparse, T, decode):
    """The closing line: what was computed, and what that saved."""
    L = model.config.n_layer
    if not sparse:
        return f"full: all {L} blocks were computed for every token; --sparse skips blocks whose inference gate is 0"
    tlops, macs = savings(model.config, ran, T, decode)
    return (f"sparse: {sum(ran):.2f} of {L} blocks were computed per token, saving {tlops:.1%} of token-layer "
            f"operations and {macs:.1%} of multiply-adds")


def write_text(model, vocab, idx, args, sparse):
    """Print idx (1, T) and its continuation."""
    L, n, ran, began = model.config.n_layer, args.max_new_tokens, 0, time.perf_counter()
    print("".join(vocab[i] for i in idx[0]), end="")
    for idx_next, gates in generate(model, idx, n, args.temperature, args.top_k, sparse):
        c, depth = vocab[idx_next.item()], gates.sum().item()   # the number of blocks that ran, if gates are 0 or 1
        ran = ran + (gates[:, 0] != 0).cpu()
        print(c if c == "\n" else paint(c, (depth - 1) / max(L - 1, 1)), end="", flush=True)
    print()
    print(f"{n} tokens, {n / (time.perf_counter() - began):.0f} per second;",
          summary(model, (ran / n).tolist(), sparse, None, decode=True), file=sys.stderr)


@torch.inference_mode()
def write_map(model, vocab, idx, sparse, answers):
    """
    Print a row per block, the last on top, and a column per token of idx (1, T). A cell shows the character that the
    model would predict after that block, and is blank if the token skipped it. If `answers` are given, a last row shows
    them and marks those that the model got wrong.
    """
    outputs, L, T = [], model.config.n_layer, idx.size(1)
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, x: outputs.append(x))
    logits, gates = model(idx, sparse)
    norms = [*getattr(model, "exit_norms", [model.ln_f] * (L - 1)), model.ln_f]
    predicted = [model.head(norm(x))[0].argmax(-1).tolist() for norm, x in zip(norms, outputs)]       # (L, T)
    final, gates = logits[0].argmax(-1).tolist(), gates[:, 0].cpu()                        # (T,), (L, T)

    shown = [{"\n": "⏎", " ": "␣", "\t": "⇥"}.get(c, c) for c in vocab]
    width = max((shutil.get_terminal_size().columns - len("answer  ")) // 2, 1)
    for start in range(0, T, width):
        columns = range(start, min(start + width, T))
        for l in reversed(range(L)):
            cells = [shown[predicted[l][t]] if gates[l, t] != 0 or not sparse else " " for t in columns]
            row = "".join(paint(f" {c}", gates[l, t].item()) for c, t in zip(cells, columns))
            print(f"block {l:<2}{row}".rstrip())
        print("token   " + "".join(f" {shown[idx[0, t]]}" for t in columns))
        if answers:
            wrong = "\033[31m {}\033[0m" if is_colored() else "!{}"
            marked = (f" {answers[t]}" if vocab[final[t]] == answers[t] else wrong.format(answers[t]) for t in columns)
            print("answer  " + "".join(marked))
        print()
    print(summary(model, (gates != 0).double().mean(1).tolist(), sparse, T, decode=False), file=sys.stderr)


@user_errors()
def main(argv=None):
    parser = argparse.ArgumentParser(prog="sample.py", usage=argparse.SUPPRESS,
                                     description="Generate text with a trained model, or show its predictions.")
    add = parser.add_argument
    add("ckpt", type=Path, nargs="?",
        help="checkpoint; by default the newest out/*/ckpt.pt, or if there is none, report/text-halt.pt")
    add("--map", action="store_true", help="show the prediction at each token of the prompt after each block")
    add("--prompt", help="text to continue or to map; by default from the checkpoint")
    add("--sparse", action=argparse.BooleanOptionalAction,
        help="skip blocks whose inference gate is 0; on by default, except for tsa")
    add("--max_new_tokens", type=COUNT, default=500, help="tokens to generate (default: 500)")
    add("--temperature", type=between(0.0, 100.0), default=0.8, help="0 picks the most likely token (default: 0.8)")
    add("--top_k", type=COUNT, help="sample from the k most likely tokens; by default from all")
    add("--seed", type=between(0, 2**63 - 1), default=0, help="random seed (default: 0)")
    add("--device", default="auto", help="cpu, cuda, mps ...; by default the best one available")
    args = parser.parse_args(argv)

    path = args.ckpt or max(Path("out").glob("*/ckpt.pt"), key=os.path.getmtime, default=SHIPPED)
    model, saved = load_checkpoint(path)
    model, vocab = model.to(pick_device(args.device)), saved["vocab"]
    sparse = model.config.model != "tsa" if args.sparse is None else args.sparse
    shows_map = args.map or not saved["prompt"]             # for chains, there is nothing to generate
    prompt = saved["example" if shows_map else "prompt"] if args.prompt is None else args.prompt
    if not prompt:
        raise ValueError("--prompt is empty: give at least one character")
    idx = torch.tensor([data.encode(prompt, vocab)], device=model.wte.weight.device)       # (1, T)
    print(f"{path}: {model.config.model} model, step {saved['step']}", file=sys.stderr)
    torch.manual_seed(args.seed)
    if shows_map:
        is_chain = vocab == data.DIGITS + data.LETTERS
        write_map(model, vocab, idx, sparse, data.chain_answers(prompt) if is_chain else None)
    else:
        write_text(model, vocab, idx, args, sparse)


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):          # notebooks have none
        sys.stdout.reconfigure(errors="replace")    # for plain-ASCII terminals
    main()
