"""
Loss against work, both as executed: python -m report.plot report/results.csv report/frontier.svg

Reads the results.csv of `train.py --table`. Plain models make one curve, over their depth. Others make one for each
model, gate and depth, over lam or threshold. A point is the mean over seeds.
"""
import ast
import csv
import io
import sys
from dataclasses import replace
from pathlib import Path

import torch

import data
from report.counts import macs_of_old_row, macs_per_token
from train import Parser, mean, reason, run_program
from tsa import Config, UserError, build

COMMON = ("data", "n_embd", "n_head", "block_size", "batch_size", "max_iters", "learning_rate", "dropout")


def new_figure(width, height):
    """A matplotlib figure, in inches; UserError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("this picture needs matplotlib: pip install matplotlib")
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path):
    svg = io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    data.write_atomic(path, svg.getvalue())


def config_of(row):
    """The Config of a row. Its vocabulary is what the other parameters leave of n_params."""
    sizes = {name: int(row[name]) for name in ("n_layer", "n_head", "n_embd", "block_size")}
    config = Config(model=row["model"], vocab_size=1, **sizes)
    with torch.device("meta"):
        others = sum(parameter.numel() for parameter in build(config).parameters())
    return replace(config, vocab_size=1 + (int(row["n_params"]) - others) // config.n_embd)


def points_of(row):
    """A row -> for each of its points its setting, which seeds share, and (million multiply-adds, loss)."""
    config = config_of(row)
    own = {"threshold": row["threshold"], "val_loss": row["val_loss_executed"],
           "tlops_saved": row["tlops_saved_executed"], "ran": ast.literal_eval(row.get("ran") or "[]")}
    for point in ast.literal_eval(row.get("thresholds") or "[]") or [own]:      # early exit: its sweep
        if point.get("ran"):
            macs = macs_per_token(config, point["ran"])
        else:
            macs = macs_of_old_row(config, float(point["tlops_saved"]))
        setting = row["n_layer"], row["lam"], row["gate_bias"], point["threshold"]
        yield setting, (macs / 1e6, float(point["val_loss"]))


def read_curves(path):
    """results.csv -> {label: points, sorted}"""
    kinds, curves = set(), {}
    try:
        for row in csv.DictReader(io.StringIO(path.read_text("utf-8"))):
            kinds.add(tuple(row[name] for name in COMMON))
            label = row["model"]
            if label != "dense":
                label = f"{' '.join(filter(None, (label, row['gate'])))}, {row['n_layer']} blocks"
            for setting, point in points_of(row):
                curves.setdefault(label, {}).setdefault(setting, []).append(point)
    except (ValueError, TypeError, KeyError, SyntaxError) as error:
        raise UserError(f"{path} is not a results.csv of train.py --table ({reason(error)})")
    if len(kinds) != 1:
        raise UserError(f"{path} has {len(kinds)} kinds of {', '.join(COMMON)}, and losses compare only within one")
    return {label: sorted([mean(column) for column in zip(*seeds)] for seeds in settings.values())
            for label, settings in curves.items()}


def main(argv):
    parser = Parser(prog="report.plot", description="Draw loss against multiply-adds, both as executed.")
    parser.add_argument("csv", type=Path, help="results.csv of train.py --table")
    parser.add_argument("svg", type=Path, help="where the picture goes")
    args = parser.parse_args(argv)
    curves, figure = read_curves(args.csv), new_figure(8, 5)
    axes, best = figure.subplots(), min(loss for points in curves.values() for _, loss in points)
    for label, points in curves.items():
        lowest = min(loss for _, loss in points)
        if lowest > 1.07 * best:        # a model that falls apart when executed would leave no room for the others
            label += f" (above: from {lowest:.2f})"
        axes.plot(*zip(*points), "o-", label=label)
    axes.set(xlabel="million multiply-adds per token, executed", ylabel="validation loss, as executed")
    axes.set_ylim(0.99 * best, 1.07 * best)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save_figure(figure, args.svg)
    print(f"written to {args.svg}")


if __name__ == "__main__":
    sys.exit(run_program("report.plot", main))
