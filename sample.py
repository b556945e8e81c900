"""
Inspect a trained model:

    python sample.py                            generate text; in a terminal, colors show how many blocks ran
    python sample.py --map                      show what the model would predict for each token after each block
    python sample.py report/chain-halt.pt       show a map of a chain, with the correct answers
"""
import argparse
import os
import shutil
import sys
import time
from pathlib import Path

import torch

import data
from train import COUNT, Parser, between, load_checkpoint, one_line, pick_device
from tsa import generate, savings

SHIPPED = Path(__file__).resolve().parent / "report" / "python-skip.pt"
BLUES = (195, 153, 75, 33)              # terminal backgrounds for open gates, from near 0 (pale) to 1 (deep)


def is_colored():
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def paint(text, gate):
    """In a terminal, color the background of the text: the larger the gate, the deeper. A closed gate gets none."""
    if gate == 0 or not is_colored():
        return text
    level = round(min(max(gate, 0), 1) * (len(BLUES) - 1))
    return f"\033[30;48;5;{BLUES[level]}m{text}\033[0m"


def summary(model, ran, sparse, T=None):
    """Return the last line of the output: how much was computed, and how much that saved."""
    if not sparse:
        return f"full: every token ran all {len(ran)} blocks; with --sparse, it skips those whose inference gate is 0"
    tlops, macs = savings(model.config, ran, T)
    return (f"sparse: a token ran {sum(ran):.2f} of {len(ran)} blocks on average, saving {tlops:.1%} of token-layer "
            f"operations and {macs:.1%} of multiply-adds")


def write_text(model, vocab, idx, args, sparse, end=None):
    """Print idx (1, T) and its continuation, which stops after the character `end`."""
    ran, began = 0, time.perf_counter()
    print("".join(vocab[i] for i in idx[0]), end="")
    new_tokens = generate(model, idx, args.max_new_tokens, args.temperature, args.top_k, sparse)
    for n, (idx_next, gates) in enumerate(new_tokens, start=1):
        c, gates = vocab[idx_next.item()], gates[:, 0].cpu()                               # gates (L,)
        ran = ran + (gates != 0)
        depth = ((gates != 0).float() if sparse else gates).mean().item()       # if sparse, the share of the blocks run
        print(c if c == "\n" else paint(c, depth), end="", flush=True)
        if c == end:
            break
    print()
    print(f"{n} tokens, {n / (time.perf_counter() - began):.0f} per second;",
          summary(model, (ran / n).tolist(), sparse), file=sys.stderr)


@torch.inference_mode()
def write_map(model, vocab, idx, sparse, answers):
    """
    Print a row per block, the last on top, and a column per token of idx (1, T). A cell shows the character that the
    model would predict after that block, and is blank if the token skipped it. With `answers`, a final row shows them
    and marks those that the model got wrong.
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
            row = f"block {l:<2}"
            for t in columns:
                skipped = sparse and gates[l, t] == 0
                row += paint(" " + (" " if skipped else shown[predicted[l][t]]), gates[l, t].item())
            print(row.rstrip())
        print("token   " + "".join(" " + shown[idx[0, t]] for t in columns))
        if answers:
            wrong = "\033[31m {}\033[0m" if is_colored() else "!{}"
            cells = ((" {}" if vocab[final[t]] == answers[t] else wrong).format(answers[t]) for t in columns)
            print("answer  " + "".join(cells))
        print()
    print(summary(model, (gates != 0).double().mean(1).tolist(), sparse, T), file=sys.stderr)


@one_line()
def main(argv=None):
    parser = Parser(prog="sample.py", description="Inspect a trained model.", usage=argparse.SUPPRESS,
                    allow_abbrev=False)
    add = parser.add_argument
    add("ckpt", type=Path, nargs="?",
        help="checkpoint (default: the newest out/*/ckpt.pt or, if there is none, report/python-skip.pt)")
    add("--map", action="store_true", help="show the prediction for each token after each block; always on for chains")
    add("--prompt", help="text to continue or to map (default: stored in the checkpoint)")
    add("--sparse", action=argparse.BooleanOptionalAction,
        help="skip blocks whose inference gate is 0 (default: yes, except for --gate soft, which breaks when rounded)")
    add("--max_new_tokens", type=COUNT, default=500, help="tokens to generate (default: 500)")
    add("--temperature", type=between(0.0, 100.0), default=0.8, help="0 picks the most likely token (default: 0.8)")
    add("--top_k", type=COUNT, help="sample from the k most likely tokens (default: from all)")
    add("--seed", type=between(0, 2**63 - 1), default=0, help="random seed (default: 0)")
    add("--device", default="auto", help="cpu, cuda, mps ... (default: the best one available)")
    args = parser.parse_args(argv)

    path = args.ckpt or max(Path("out").glob("*/ckpt.pt"), key=os.path.getmtime, default=SHIPPED)
    model, saved = load_checkpoint(path)
    model.to(pick_device(args.device))
    config, vocab = model.config, saved["vocab"]
    is_chain = saved["flags"]["data"] == "chain"
    shows_map = args.map or is_chain            # a chain has no continuation
    sparse = (config.model, config.gate) != ("tsa", "soft") if args.sparse is None else args.sparse

    prompt = saved["example" if shows_map else "prompt"] if args.prompt is None else args.prompt
    if not prompt:
        raise data.UserError("--prompt is empty: give at least one character")
    if shows_map and len(prompt) > config.block_size:
        raise data.UserError(f"--prompt has {len(prompt)} tokens: a map shows at most {config.block_size}")
    idx = torch.tensor([data.encode(prompt, vocab)], device=model.wte.weight.device)       # (1, T)
    print(f"{path}: {config.model} model, step {saved['step']}", file=sys.stderr)
    if shows_map:
        write_map(model, vocab, idx, sparse, data.chain_answers(prompt) if is_chain else None)
    else:
        torch.manual_seed(args.seed)
        write_text(model, vocab, idx, args, sparse, end="$" if saved["flags"]["data"] in ("copy", "sort") else None)


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):          # notebooks have none
        sys.stdout.reconfigure(errors="replace")    # for plain-ASCII terminals
    main()
