"""
Draw the figures of the README (needs matplotlib):

    python -m report.plot frontier report/frontier.svg                  loss against multiply-adds, from results.csv
    python -m report.plot map report/map.svg                            what sample.py --map prints
    python -m report.plot gates report/gates.svg --ckpt out/tsa-1       the gates of a model, by block
"""
import argparse
import io
import statistics
from contextlib import redirect_stdout
from pathlib import Path

import torch

import data
import sample
from report.results import CONFIDENCES, above_full, cost, group, interval, read_csv
from tsa import load_checkpoint

LAYERS = {"chain": (6, 4, 3, 2, 1), "deep": (12, 10, 9, 8, 6)}         # plain models; the first is the default
# Color, mark, and by panel: the run, and where its label stands (points to the right and up)
DESIGNS = {
    "soft, rounded": ("C3", "X", {"chain": ("gate=soft-lam=0.01", 8, 0), "deep": ("gate=soft-lam=0.001", 8, 0)}),
    "skip": ("C5", "P", {"chain": ("gate=skip-lam=0.01", 8, 0), "deep": ("gate=skip-lam=0.001", 5, -9)}),
    "stretch": ("C2", "^", {"chain": ("gate=stretch-lam=0.8", -8, 0), "deep": ("gate=stretch-lam=0.001", -8, -10)}),
    "straight": ("C0", "v", {"chain": ("gate=straight-lam=0.3", -8, -4), "deep": ("gate=straight-lam=0.001", 6, 9)}),
    "straight,\n3 layers": ("C9", "<", {"chain": ("gate=straight-n_layer=3-lam=0.03", -8, 8)}),
    "straight --halt": ("C4", "D", {"chain": ("gate=straight-halt-lam=0.03", 8, -4),
                                    "deep": ("gate=straight-halt-lam=0.001", 8, 4)})}


def new_figure(width, height):
    from matplotlib import rcParams         # here, because only figures need it
    from matplotlib.figure import Figure
    rcParams |= {"svg.hashsalt": "tsa", "svg.fonttype": "none"}     # the same numbers make the same file, with text
    return Figure(figsize=(width, height), layout="constrained")


def save(figure, path):
    figure.savefig(path, format="svg", metadata={"Date": None})


def draw_frontier(path):
    """Draw the loss against the multiply-adds, on the puzzle and on Python."""
    rows, figure = read_csv(), new_figure(9.2, 4.4)
    groups, axes = group(rows), dict(zip(("chain", "deep"), figure.subplots(1, 2)))

    def put(panel, found, **style):
        """Draw the mean of the rows `found` and, on text, its 95% interval. Return its position."""
        x, y = [100 * cost(row) for row in found], [row["val_loss_sparse"] for row in found]
        bar = None
        if panel == "deep":
            y = [100 * share for share in above_full(found, rows)]
            bar = interval(y)
        place = statistics.mean(x), statistics.mean(y)
        axes[panel].errorbar(*place, yerr=bar, capsize=2, lw=1, **style)
        return place

    def write(panel, text, place, dx, dy, color):
        axes[panel].annotate(text, place, (dx, dy), textcoords="offset points", color=color, fontsize=9,
                             va="center", ha="left" if dx > 0 else "right")

    for panel, layers in LAYERS.items():
        name = f"preset={panel}-model=plain"
        points = [put(panel, groups[name + f"-n_layer={n}" * (n != layers[0]), "val"], color="0.6") for n in layers]
        axes[panel].plot(*zip(*points), "o-", color="0.6", ms=5, lw=1)
        for n, place in zip(layers, points):
            write(panel, n, place, 5, 7, "0.4")
        names = [f"preset={panel}-model=exit-confidence={confidence}" for confidence in CONFIDENCES]
        names = [name for name in names if (name, "val") in groups]
        points = [put(panel, groups[name, "val"], color="C1") for name in names]
        axes[panel].plot(*zip(*points), "s-", color="C1", ms=4, lw=1)
        write(panel, "early exit", points[-1], 8, -5, "C1")
        for name, place in zip(names, points):
            if name.endswith(("=0.75", "=0.9") if panel == "deep" else ("=0.4", "=0.75")):     # the others overlap
                write(panel, name.rpartition("=")[2], place, 6, 5, "C1")
    for design, (color, mark, places) in DESIGNS.items():
        for panel, (name, dx, dy) in places.items():
            x, y = put(panel, groups[f"preset={panel}-{name}", "val"], fmt=mark, color=color, ms=7)
            text = design
            if panel == "deep" and y > 5:
                text, y = f"{design},\n{y:+.0f}% ↑", 4.7         # off the scale
                axes[panel].plot(x, y, mark, color=color, ms=7)
            write(panel, text, (x, y), dx, dy, color)
    axes["chain"].axhline(0.01, color="0.8", lw=1, ls=":")
    axes["chain"].set(yscale="log", xlabel="multiply-adds (% of 6 plain layers)", ylabel="loss",
                      title="Puzzle: some gates beat fewer layers")
    axes["deep"].set(ylim=(-1, 5), xlabel="multiply-adds (% of 12 plain layers)",
                     ylabel="loss above 12 plain layers (%, 95% intervals)",
                     title="Python: no clear gain over fewer layers")
    for panel in axes.values():
        panel.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def draw_map(path):
    """Draw the map that `python sample.py report/python-skip.pt --map` prints, with the gates as colors."""
    model, saved = load_checkpoint(sample.SHIPPED)
    with redirect_stdout(io.StringIO()) as printed:
        gates = sample.write_map(model, saved["vocab"], data.encode(saved["prompt"], saved["vocab"])[None], True, None)
    lines, figure = printed.getvalue().splitlines()[:len(gates) + 1], new_figure(9.2, 3.6)     # the last: tokens
    axes = figure.subplots()
    cells = torch.cat([gates.flip(0), torch.zeros(1, gates.size(1))])
    axes.imshow(cells.numpy(), cmap="Blues", vmax=1.6, aspect="auto")
    for y, line in enumerate(lines):
        for t, c in enumerate(line[len("block 0 ") + 1::2]):
            axes.text(t, y, c, ha="center", va="center", family="monospace")
    axes.set(xticks=[], yticks=range(len(lines)), yticklabels=[line[:8].strip() for line in lines])
    axes.spines[:].set_visible(False)
    save(figure, path)


@torch.inference_mode()
def draw_gates(path, ckpt):
    """Draw a histogram of the gates of each block but the first, in a full pass over validation data."""
    model, saved = load_checkpoint(ckpt)
    idx = data.load(saved["flags"]["data"]).windows("val", model.config.block_size)[0]
    gates, figure = torch.cat([model(x)[1] for x in idx[:256].split(64)], dim=1), new_figure(8, 1.8)
    for l, axes in enumerate(figure.subplots(1, len(gates) - 1), start=1):
        axes.hist(gates[l].flatten(), bins=50, range=(0, 1), color="C0")
        axes.axvline(0.5, color="C3", lw=1)
        axes.set(title=f"block {l}", yticks=[], xticks=[0, 0.5, 1])
    save(figure, path)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("figure", choices=("frontier", "map", "gates"))
    parser.add_argument("svg", help="file to draw into")
    parser.add_argument("--ckpt", type=Path, help="run or checkpoint, for gates")
    args = parser.parse_args()
    if args.figure == "gates":
        draw_gates(args.svg, args.ckpt)
    else:
        {"frontier": draw_frontier, "map": draw_map}[args.figure](args.svg)


if __name__ == "__main__":
    main()
