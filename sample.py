"""
Look inside a trained model:

    python sample.py                        write text with the newest model; in a terminal, colors show the gates
    python sample.py out/tsa-1 --map        show what the model would predict next at each token, after each block
    python sample.py report/chain.pt        a map of a puzzle, with the correct answers
"""
import argparse
import os
import shutil
import sys
from pathlib import Path

import torch

from data import LETTERS, chain_answers, encode
from tsa import GATES, generate, load_checkpoint
from train import DEVICE, bounded

SHIPPED = Path(__file__).resolve().parent / "report" / "python-skip.pt"
BLUES = (195, 159, 117, 75, 33)         # terminal colors for gates from near 0 (pale) to 1 (deep)


def paint(text, gate):
    """In a terminal, color the background of the text by the gate."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\033[30;48;5;{BLUES[round(min(max(gate, 0), 1) * (len(BLUES) - 1))]}m{text}\033[0m"


def write_text(model, vocab, idx, args, sparse):
    """Print idx (1, T) and n new tokens, colored by the gates of those that predicted them. Return the gates (L, n)."""
    print("".join(vocab[i] for i in idx[0]), end="")
    steps = []
    for idx_next, gates in generate(model, idx, args.max_new_tokens, args.temperature, args.top_k, sparse):
        c, gates = vocab[idx_next.item()], gates.cpu()                          # gates (L, 1)
        depth = (gates != 0).float() if sparse else gates       # if sparse, the fraction of the blocks that ran
        print(c if c == "\n" else paint(c, depth.mean().item()), end="", flush=True)
        steps.append(gates)
    print()
    return torch.cat(steps, dim=1)


@torch.inference_mode()
def write_map(model, vocab, idx, sparse, answers):
    """
    Print a row per block, the last on top, and a column per token of idx (1, T). A cell shows what the model would
    predict at that token if it stopped after that block, in the color of the gate, and is blank if the token skipped
    the block. A puzzle's `answers` are in the last row, with wrong predictions marked by !. Return the gates (L, T).
    """
    outputs, L, T = [], model.config.n_layer, idx.size(1)
    hooks = [block.register_forward_hook(lambda block, args, x: outputs.append(x)) for block in model.blocks]
    logits, gates = model(idx, sparse)
    for hook in hooks:
        hook.remove()
    predicted = [model.head(norm(x))[0].argmax(-1).tolist() for norm, x in zip(model.norms(), outputs)]  # (L, T)
    final, gates = logits[0].argmax(-1).tolist(), gates[:, 0].cpu()     # (T,), (L, T)

    shown = [{"\n": "⏎", " ": "␣", "\t": "⇥"}.get(c, c) for c in vocab]
    width = max((shutil.get_terminal_size().columns - len("answer  ")) // 2, 1)
    for part in torch.arange(T).split(width):
        for l in reversed(range(L)):
            cells = (paint(" " + shown[predicted[l][t]], gates[l, t].item()) if gates[l, t] else "  " for t in part)
            print((f"block {l:<2}" + "".join(cells)).rstrip())
        print("token   " + "".join(" " + shown[idx[0, t]] for t in part))
        if answers:
            print(("name    " + "".join(" " + LETTERS[t:t + 1] for t in part)).rstrip())
            print("answer  " + "".join(" !"[vocab[final[t]] != answers[t]] + answers[t] for t in part))
        print()
    return gates


def main(argv=None):
    parser = argparse.ArgumentParser(description="Look inside a trained model.", allow_abbrev=False)
    add, positive = parser.add_argument, bounded(int, 1)
    add("path", type=Path, nargs="?", help="run or checkpoint (default: the newest run, or report/python-skip.pt)")
    add("--map", action="store_true", help="show each token's prediction after each block; always on for chain")
    add("--prompt", help="text to continue or to map (default: stored in the checkpoint)")
    add("--gate", choices=GATES, help="gate design (default: the checkpoint's)")
    add("--sparse", action=argparse.BooleanOptionalAction,
        help="skip blocks whose gate is 0 (default: yes, unless the gate is soft)")
    add("--max_new_tokens", type=positive, default=500, help="tokens to generate (default: 500)")
    add("--temperature", type=bounded(float, 0), default=0.8, help="0 picks the most likely token (default: 0.8)")
    add("--top_k", type=positive, help="sample from the k most likely tokens (default: from all)")
    add("--seed", type=bounded(int, 0), default=0, help="random seed (default: 0)")
    add("--device", default=DEVICE, help="cpu, cuda, mps ...")
    args = parser.parse_args(argv)

    path = args.path or max(Path("out").glob("*/ckpt.pt"), key=os.path.getmtime, default=SHIPPED)
    try:
        model, saved = load_checkpoint(path, **({"gate": args.gate} if args.gate else {}))
        config, vocab, is_chain = model.config, saved["vocab"], saved["flags"]["data"] == "chain"
        shows_map = args.map or is_chain                    # a puzzle has no continuation
        prompt = saved["prompt"] if args.prompt is None else args.prompt
        if not prompt or (shows_map and len(prompt) > config.block_size):
            raise ValueError(f"--prompt needs at least one character and, for a map, at most {config.block_size}")
        idx = encode(prompt, vocab)[None].to(args.device)               # (1, T)
        answers = chain_answers(prompt) if is_chain else None
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    model.to(args.device)
    soft = (config.model, config.gate) == ("tsa", "soft")
    sparse = not soft if args.sparse is None else args.sparse
    torch.manual_seed(args.seed)
    gates = write_map(model, vocab, idx, sparse, answers) if shows_map else write_text(model, vocab, idx, args, sparse)
    summary = f"full: all {config.n_layer} blocks for every token" + (" (--gate skip skips some)" if soft else "")
    if sparse:
        summary = f"sparse: a token ran {(gates != 0).double().mean(1).sum():.2f} of {config.n_layer} blocks on average"
    print(f"{path}, {summary}" + "; deeper blue: larger gates" * (paint("x", 1) != "x"), file=sys.stderr)


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):          # a notebook's stdout lacks it
        sys.stdout.reconfigure(errors="replace")    # for plain-ASCII terminals
    try:
        main()
    except (BrokenPipeError, KeyboardInterrupt):    # as in `sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
