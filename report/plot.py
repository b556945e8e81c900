"""Draw the README's figure from results.csv (needs matplotlib): python -m report.plot report/frontier.svg"""
import argparse
import statistics

from report.results import CONFIDENCES, above_full, cost, group, interval, read_csv

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


def draw(path, preset="chain", label="", own=(), own_plain=()):
    """Draw the figure. A star marks the rows `own`; on text, `own_plain` is the baseline (default: results.csv)."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure
    rcParams["svg.hashsalt"] = "tsa"        # the same rows make the same file
    rows, figure = read_csv(), Figure(figsize=(9.2, 4.4), layout="constrained")
    groups, axes = group(rows), dict(zip(("chain", "deep"), figure.subplots(1, 2)))
    if preset not in axes:
        raise ValueError(f"there is no panel for --preset {preset}")

    def put(panel, found, others=rows, **style):
        """Draw the mean of the rows `found` and, on text, its 95% interval. Return its position."""
        x, y = [100 * cost(row) for row in found], [row["val_loss_sparse"] for row in found]
        bar = None
        if panel == "deep":
            y = [100 * share for share in above_full(found, others)]
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
        points = [put(panel, groups[name, "val"], color="C1") for name in names if (name, "val") in groups]
        if points:
            axes[panel].plot(*zip(*points), "s-", color="C1", ms=4, lw=1)
            write(panel, "early exit", points[-1], 8, 4, "C1")
    for design, (color, mark, places) in DESIGNS.items():
        for panel, (name, dx, dy) in places.items():
            x, y = put(panel, groups[f"preset={panel}-{name}", "val"], fmt=mark, color=color, ms=7)
            text = design
            if panel == "deep" and y > 5:
                text, y = f"{design},\n{y:+.0f}% ↑", 4.7         # off the scale
                axes[panel].plot(x, y, mark, color=color, ms=7)
            write(panel, text, (x, y), dx, dy, color)
    if own:
        columns = {"family": preset, "split": "val"}
        full = [row | columns | {"cost": 1} for row in own_plain]
        place = put(preset, [row | columns for row in own], full or rows, fmt="*", color="black", ms=11)
        write(preset, label, place, 8, -8, "black")
    axes["chain"].axhline(0.01, color="0.8", lw=1, ls=":")
    axes["chain"].set(yscale="log", xlabel="multiply-adds (% of 6 plain layers)", ylabel="loss",
                      title="Puzzle: some gates beat fewer layers")
    axes["deep"].set(ylim=(-1, 5), xlabel="multiply-adds (% of 12 plain layers)",
                     ylabel="loss above 12 plain layers (%, 95% intervals)",
                     title="Python: no clear gain over fewer layers")
    for panel in axes.values():
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("svg", help="file to draw into")
    draw(parser.parse_args().svg)
