"""
One sentence three times: the paper's gates as trained, the same cut to switches, and halting.

    python -m report.figure --tsa out/tsa-soft/ckpt.pt --halt out/halt/ckpt.pt --prompt "..." --out report/map.svg
"""
import sys
from pathlib import Path

import torch

import data
from sample import draw_panel, load_model, write_svg
from train import Parser, run_program
from tsa import UserError


def main(argv):
    parser = Parser(prog="report.figure", description="Draw one sentence through two models.")
    parser.add_argument("--tsa", type=Path, required=True, help="checkpoint of the paper's model")
    parser.add_argument("--halt", type=Path, required=True, help="checkpoint of a halting model")
    parser.add_argument("--prompt", required=True, help="the sentence")
    parser.add_argument("--out", type=Path, default=Path("report/map.svg"), help="(default report/map.svg)")
    args = parser.parse_args(argv)
    parts, top = [], 0
    for path, mode, title in ((args.tsa, "trained", "The paper's gates as trained: each scales its block"),
                              (args.tsa, "gathered", "The same gates cut to switches: dark ran, pale was skipped"),
                              (args.halt, "gathered", "Halting: dark ran, pale was skipped")):
        model, saved = load_model(path, "cpu")
        tokens = torch.tensor([data.encode(args.prompt, saved["vocab"])])                  # (1, T + 1)
        if not 1 < tokens.size(1) <= model.config.block_size + 1:
            raise UserError(f"--prompt must have 2 to {model.config.block_size + 1} characters for {path}")
        panel, top = draw_panel(model, saved["vocab"], tokens[:, :-1], tokens[:, 1:], mode, title, top)
        parts += panel
    write_svg(args.out, parts, tokens.size(1) - 1, top)
    print(f"written to {args.out}")


if __name__ == "__main__":
    sys.exit(run_program("report.figure", main))
