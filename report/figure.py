"""
Draw chain.svg and gates.svg for the README.

    python -m report.figure chain out/halt/ckpt.pt out/tsa-soft/ckpt.pt report/chain.svg    # a chain, in three ways
    python -m report.figure gates out/tsa-soft/ckpt.pt report/gates.svg                     # histograms by block
"""
import sys
from pathlib import Path

import torch

import data
from report.depth import hops_of, run
from train import load_checkpoint

BLUE = "#1f5fbf"


def new_figure(width, height):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        sys.exit("this figure needs matplotlib: pip install matplotlib")
    return Figure(figsize=(width, height), layout="constrained")


def draw_row(axes, title, model, idx, targets, mode):
    """One sequence (1, T): a square per token and block, darker for larger gates; wrong answers in red."""
    _, right, gates = run(model, (idx, targets), mode)
    axes.imshow(gates[:, 0], cmap="Blues", vmin=0, vmax=1.25, origin="lower", aspect="auto")
    axes.set_xticks(range(idx.size(1)), [(data.DIGITS + data.LETTERS)[i] for i in idx[0]])
    for tick, is_right in zip(axes.get_xticklabels(), right[0].tolist()):
        tick.set_color("black" if is_right else "red")
    axes.set_xticks([x - 0.5 for x in range(1, idx.size(1))], minor=True)
    axes.set_yticks(range(len(gates)))
    axes.set_yticks([y - 0.5 for y in range(1, len(gates))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    wrong = right.numel() - right.sum().item()
    axes.set_title(f"{title}: {gates.sum(0).mean():.2f} per token, {wrong} wrong", fontsize=10, loc="left")
    axes.set_ylabel("block", fontsize=9)
    axes.spines[:].set_visible(False)


def draw_chain(halt_path, tsa_path, svg_path):
    (halt, _), (tsa, _) = load_checkpoint(halt_path), load_checkpoint(tsa_path)
    idx, targets = (tokens[:1] for tokens in data.load("chain").windows("val", halt.config.block_size))
    figure = new_figure(8, 6.5)
    panels = figure.subplots(4, 1, height_ratios=(3, 3, 3, 1))
    draw_row(panels[0], "halting, executed, blocks run", halt, idx, targets, "executed")
    draw_row(panels[1], "the paper's gates as trained (nothing is skipped), sum of gates", tsa, idx, targets, "trained")
    draw_row(panels[2], "the paper's gates thresholded, executed, blocks run", tsa, idx, targets, "executed")
    panels[3].bar(range(idx.size(1)), hops_of(idx)[0], color=BLUE)
    panels[3].set(xlim=panels[0].get_xlim(), xticks=[], yticks=[0, 2, 4])
    panels[3].set_ylabel("hops", fontsize=9)
    panels[3].spines[["top", "right"]].set_visible(False)
    figure.savefig(svg_path, format="svg", metadata={"Date": None})


def draw_gates(ckpt_path, svg_path):
    """For each gated block, a histogram of its gates as trained, over the whole validation split."""
    model, saved = load_checkpoint(ckpt_path)
    windows = data.load(saved["flags"]["data"]).windows("val", model.config.block_size)
    _, _, gates = run(model, windows, "trained")
    figure = new_figure(8, 1.8)
    for l, axes in enumerate(figure.subplots(1, len(gates) - 1, sharey=True, squeeze=False)[0], 1):
        axes.hist(gates[l].flatten().tolist(), bins=50, range=(0, 1), color=BLUE, histtype="stepfilled")
        axes.set_title(f"block {l}", fontsize=10)
        axes.set(xlim=(-0.02, 1.02), xticks=[0, 0.5, 1], xticklabels=["0", "0.5", "1"], yticks=[])
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.supxlabel("gate", fontsize=10)
    figure.savefig(svg_path, format="svg", metadata={"Date": None})


def main(argv=None):
    name, *paths = sys.argv[1:] if argv is None else argv
    with torch.inference_mode():
        {"chain": draw_chain, "gates": draw_gates}[name](*map(Path, paths))


if __name__ == "__main__":
    main()
