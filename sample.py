"""
Write text with a trained model: python sample.py

Needs nothing but the checkpoint: sizes, vocabulary and weights are in it.
"""
import sys
import time
from pathlib import Path

import torch

import data
from train import Parser, UserError, load_checkpoint, number, pick_device
from tsa import RUNS, default_run, generate


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
        for idx_next, gates in generate(model, idx, args.max_new_tokens, args.temperature, args.top_k, run):
            print(vocab[idx_next.item()], end="", flush=True)
            depth += (gates > 0).sum().item()
        seconds, depth = time.time() - began, depth / args.max_new_tokens
        print(f"\n[{args.max_new_tokens} characters, {args.max_new_tokens / seconds:.0f} a second, mean depth {depth:.2f} "
              f"of {model.config.n_layer} blocks]", file=sys.stderr)


def main(argv=None):
    sys.stdout.reconfigure(errors="replace")       # a terminal may lack a character
    try:
        args = parse_args(argv)
        device = pick_device(args.device)
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
    except KeyboardInterrupt:
        print()
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
