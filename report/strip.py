"""
A checkpoint small enough to come with the code: python -m report.strip out/halt/ckpt.pt report/halt.pt

Keeps what sample.py needs, with the weights in bfloat16: no optimizer, no log.
"""
import sys
from pathlib import Path

import torch

from train import Parser, load_checkpoint, run_program, save_checkpoint


def main(argv):
    parser = Parser(prog="report.strip", description="Write a checkpoint with nothing but what sample.py needs.")
    parser.add_argument("source", type=Path, help="a run's ckpt.pt")
    parser.add_argument("target", type=Path, help="where the small one goes")
    args = parser.parse_args(argv)
    model, saved = load_checkpoint(args.source)
    kept = {key: saved[key] for key in ("config", "flags", "vocab", "prompt", "new_tokens", "digest", "step")}
    save_checkpoint(args.target, model=model.to(torch.bfloat16).state_dict(), **kept)
    print(f"{args.target}: {args.target.stat().st_size / 1e6:.2f} MB of {args.source.stat().st_size / 1e6:.2f}")


if __name__ == "__main__":
    sys.exit(run_program("report.strip", main))
