"""
Print the rows of results.csv as means over seeds, compare them with plain models, and draw the figure:

    python -m report.plot --svg report/frontier.svg                                 (needs matplotlib)
    python -m report.plot out/sweep-1a2b3c4d/preset*=? --about threads=1            score these runs, and add their rows
"""
import argparse
import csv
import json
import statistics
from pathlib import Path

import numpy as np
import torch

import data
import train
from tsa import Config, load_checkpoint, multiply_adds

CSV = Path(__file__).resolve().parent / "results.csv"
LAYERS = {"alone": 12, "chain8": 12, "deep": 12, "drop": 12, "long": 12, "rate": 12}    # of the full plain model
SIZES = ("n_layer", "n_embd", "block_size", "vocab_size")
SCORES = dict(val_loss=".4f", val_loss_sparse=".4f", blocks=".2f", cost=".1%", accuracy=".1%", exact=".0%")
# Means over n seeds: the 97.5% quantile of Student's t with n - 1 degrees of freedom
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}
MARKS = {       # label: color, mark, runs in the left and in the right panel
    "the paper's gate, rounded": ("C3", "X", "gate=soft-lam=0.01", "gate=soft-lam=0.001"),
    "early exit": ("C1", "s", "model=exit"),
    "skip": ("C5", "P", "gate=skip-lam=0.01", "gate=skip-lam=0.001"),
    "stretch": ("C2", "^", "gate=stretch-lam=0.8", "gate=stretch-lam=0.001"),
    "straight": ("C0", "v", "gate=straight-lam=0.3", "gate=straight-lam=0.001"),
    "straight --n_layer 3": ("C9", "<", "gate=straight-n_layer=3-lam=0.03"),
    "straight --halt": ("C4", "D", "gate=straight-halt-lam=0.03", "gate=straight-halt-lam=0.001")}


def cost(row):
    """The multiply-adds of a sparse pass, as a share of those of the full plain model."""
    config, L = Config(model=row["model"], **{name: row[name] for name in SIZES}), row["n_layer"]
    plain = Config(**vars(config) | {"model": "plain", "n_layer": LAYERS.get(row["family"], 6)})
    return multiply_adds(config, [row["blocks"] / L] * L) / multiply_adds(plain, [1] * plain.n_layer)


def blocks_needed(text):
    """The blocks that each token of a chain needs. All tokens hop at once, so n blocks make up to 2^n - 1 hops."""
    hops = []
    for c in text:
        hops.append(0 if c in data.DIGITS else 1 + hops[data.LETTERS.index(c)])
    return [max(n.bit_length(), 1) for n in hops]           # every token runs block 0


@torch.no_grad()
def score(folder, about):
    """Return a run's rows, on validation and unseen data. A skip run gives one of the paper's gate, too."""
    model, saved = load_checkpoint(folder / "ckpt.pt")
    flags, T, gate, rows = saved["flags"], model.config.block_size, model.config.gate, []
    corpus, chains = data.load(flags["data"]), flags["data"] == "chain"
    unseen = data.chain(seed=1).windows("val", T) if chains else corpus.windows("test", T)
    val, result = corpus.windows("val", T), json.loads((folder / "result.json").read_text())
    for split, model.config.gate in (("val", gate), ("test", gate), ("val", "soft"))[:3 if gate == "skip" else 2]:
        idx, targets = val if split == "val" else unseen
        run = folder.name.partition("-seed=")[0].replace("gate=skip", f"gate={model.config.gate}")
        family = flags["data"] if flags["preset"] == "laptop" else flags["preset"]
        row = {"family": family, "run": run, "split": split, "variant": ""} | about
        row |= flags | vars(model.config)
        row |= result if (split, model.config.gate) == ("val", gate) else train.score(model, idx, targets)
        if chains:
            logits, opened = model(idx, sparse=True)
            needed = torch.tensor([blocks_needed([saved["vocab"][i] for i in text]) for text in idx])
            row["accuracy"] = (logits.argmax(-1) == targets).double().mean().item()
            row["exact"] = ((opened != 0).sum(0) == needed)[needed > 1].double().mean().item()
        rows.append(row | {"cost": cost(row)})
    return rows


def read_csv():
    with open(CSV, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {name: json.loads(row[name]) for name in ("seed", *SIZES, *SCORES) if row[name]}
    return rows


def group(rows):
    """Rows -> lists that differ only in the seed, by (run, split). Seed 0, which chose, is out if there are enough."""
    groups = {}
    for row in rows:
        groups.setdefault((row["run"], row["split"]), []).append(row)
    return {key: [row for row in found if row["seed"] > 0 or len(found) <= 3] for key, found in groups.items()}


def interval(values):
    """The half-width of the 95% interval of the mean (None for a single value)."""
    return T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def plain_points(row, others):
    """Sorted (cost, loss) of plain models of a row's family, split, seed and width. [] if there is no full one."""
    points = sorted((other["cost"], other["val_loss"]) for other in others
                    if (other["model"], other["variant"]) == ("plain", "")
                    and all(other[key] == row[key] for key in ("family", "split", "seed", "n_embd")))
    return points if points and points[-1][0] == 1 else []


def above_full(rows, others):
    """Sparse losses relative to the full plain model of the same seed: 0.01 is 1% above it."""
    points = [(row, plain_points(row, others)) for row in rows]
    return [row["val_loss_sparse"] / found[-1][1] - 1 for row, found in points if found]


def against_plain(rows, others):
    """Sparse losses minus those of plain models of the same seed and multiply-adds (interpolated, not extrapolated)."""
    points = [(row, plain_points(row, others)) for row in rows]
    return [row["val_loss_sparse"] - np.interp(row["cost"], *zip(*found)) for row, found in points
            if found and found[0][0] <= row["cost"] <= 1]


def table(rows):
    """
    Rows -> lines of cells: run, split, number of seeds, means and deviations of SCORES, and the means and 95%
    intervals of above_full (for text) and against_plain.
    """
    lines = []
    for key, found in sorted(group(rows).items()):
        lines.append([*key, str(len(found))])
        for column, form in SCORES.items():
            values = [row[column] for row in found if row.get(column, "") != ""]
            spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
            lines[-1].append(f"{statistics.mean(values):{form}}{spread}" if values else "")
        above = [] if "chain" in key[0] else above_full(found, rows)        # percentages of a loss near 0 mislead
        for values, form in ((above, ".2%"), (against_plain(found, rows), ".4f")):
            spread = f" ± {interval(values):{form}}" if len(values) > 1 else ""
            lines[-1].append(f"{statistics.mean(values):+{form}}{spread}" if values else "")
    return lines


def draw(path, preset="chain", label="", own=(), own_plain=()):
    """Draw the figure. A star marks the rows `own`; on text, relative to `own_plain` (default: results.csv)."""
    from matplotlib.figure import Figure
    groups, figure = group(rows := read_csv()), Figure(figsize=(9, 4.7), layout="constrained")
    axes = dict(zip(("chain", "deep"), figure.subplots(1, 2)))
    if preset not in axes:
        raise ValueError(f"there is no panel for --preset {preset}")

    def put(panel, found, others=rows, **style):
        """Draw the mean of the rows `found`. Return its place."""
        x, y, bar = [row["blocks"] for row in found], [row["val_loss_sparse"] for row in found], None
        if panel == "deep":
            x, y = [100 * cost(row) for row in found], [100 * share for share in above_full(found, others)]
            bar = interval(y)
        x, y = statistics.mean(x), statistics.mean(y)
        axes[panel].errorbar(x, y, yerr=bar, capsize=2, lw=1, **style)
        return x, y

    for panel, name, layers, line, face, label_of_line in (
            ("chain", "preset=chain-model=plain", (1, 2, 3, 4, 6), "o-", "0.6", None),
            ("deep", "preset=deep-model=plain", (6, 8, 9, 10, 12), "o-", "0.6", "no gates, by layers"),
            ("deep", "deep-several", (8, 10, 12), "o--", "white", "the same, a loss after every block")):
        names = [name + (str(n) if face == "white" else f"-n_layer={n}" * (n < layers[-1])) for n in layers]
        points = [put(panel, groups[name, "val"], color="0.8" if face == "white" else "0.6") for name in names]
        axes[panel].plot(*zip(*points), line, color="0.6", lw=1, ms=5, mfc=face, label=label_of_line)
        for n, point in zip(layers, points):
            offset = (-4, -13) if face == "white" else (-11, 3) if n == 1 else (5, 5)
            axes[panel].annotate(n, point, xytext=offset, textcoords="offset points", color="0.4")
    for design, (color, mark, *names) in MARKS.items():
        for panel, name in zip(axes, names):
            design = design if panel == "chain" else None           # once in the legend
            x, y = put(panel, groups[f"preset={panel}-{name}", "val"], fmt=mark, color=color, ms=7, label=design)
            if panel == "deep" and y > 5:       # off the scale
                axes[panel].annotate(f"{y:+.0f}%", (x, 5), (x, 4.2), color=color, ha="center",
                                     arrowprops={"arrowstyle": "->", "color": color})
    if own:
        columns = {"family": preset, "split": "val", "variant": ""}
        full = [row | columns | {"cost": 1} for row in own_plain]
        put(preset, [row | columns for row in own], full or rows, fmt="*", color="black", ms=11, label=label)
    left, right = axes.values()
    left.axvline(1.465, color="0.8", lw=1)          # if every token runs exactly the blocks that it needs
    left.axhline(0.01, color="0.8", lw=1, ls=":")
    left.annotate("needed: 1.46", (1.55, 0.8), color="0.5", fontsize=8)
    left.annotate("limit: 0.01", (6, 0.011), color="0.5", fontsize=8, ha="right")
    left.set(yscale="log", xlabel="blocks per token", ylabel="loss", title="Puzzle: gates run fewer blocks")
    right.margins(x=0.1)
    right.set(ylim=(-1, 5), title="Python: fewer layers do as well as gates",
              xlabel="multiply-adds (% of 12 plain layers)", ylabel="loss above 12 plain layers (%, 95% intervals)")
    for panel in axes.values():
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, format="svg", metadata={"Date": None})


def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", type=Path, nargs="*", help="folders of finished runs, whose rows are added")
    parser.add_argument("--about", nargs="*", default=[], help="other columns of the new rows, as NAME=VALUE")
    parser.add_argument("--svg", help="draw the figure into this file")
    args = parser.parse_args(argv)
    rows, about = read_csv(), dict(pair.split("=", 1) for pair in args.about)
    if args.folders:        # a row of an earlier run with the same name and seed is replaced
        new = [row for folder in args.folders for row in score(folder, about)]
        rows = list({(row["run"], row["split"], row["seed"]): row for row in rows + new}.values())
        with open(CSV, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    for line in table(rows):
        print(*line, sep="|")
    if args.svg:
        draw(args.svg)


if __name__ == "__main__":
    main()
