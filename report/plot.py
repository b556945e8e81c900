"""
Print the rows of results.csv as means over seeds, compare them with plain models, and draw the figure:

    python -m report.plot --svg report/frontier.svg                             (needs matplotlib)
    python -m report.plot out/sweep-1a2b3c4d/* --about processor="AMD EPYC" threads=1 commit=60d58f9

The second command first scores the runs in these folders, also on data that chose nothing (the test split of a text, or
puzzles from another random seed), and adds their rows. For chains, it counts the tokens by hops and blocks, too.
"""
import argparse
import csv
import json
import math
import statistics
from pathlib import Path

import numpy as np
import torch

import data
import train
from tsa import Config, load_checkpoint, multiply_adds

CSV = Path(__file__).resolve().parent / "results.csv"
LAYERS = {"alone": 12, "chain8": 12, "deep": 12, "drop": 12, "long": 12, "rate": 12}    # of the full plain model; others: 6
NUMBERS = ("val_loss", "val_loss_sparse", "blocks", "saved", "accuracy", "lam", "lam_ramp", "gate_bias", "confidence")
# Means over n seeds: the 97.5% quantile of Student's t with n - 1 degrees of freedom
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}
MARKS = {       # label: color, mark, and the rows in the panels "chain" and "deep"
    "the paper's gate, rounded": ("C3", "X", "chain soft --lam 0.01 --lam_ramp 0.5", "deep soft --lam 0.001"),
    "early exit": ("C1", "s", "chain exit", "deep exit exit-heavy"),
    "skip": ("C5", "P", "chain skip --lam 0.01 --lam_ramp 0.5", "deep skip --lam 0.001"),
    "stretch": ("C2", "^", "chain stretch --lam 0.3 --lam_ramp 0.5", "deep stretch --lam 0.001"),
    "straight": ("C0", "v", "chain straight --lam 0.1 --lam_ramp 0.5", "deep straight --lam 0.01"),
    "straight --halt": ("C4", "D", "chain straight --halt --lam 0.03 --lam_ramp 0.5", "deep straight --halt --lam 0.001"),
}


def name_of(row):
    """What a row is, without its seed: "chain straight --halt --n_layer 3 --lam 0.01 --lam_ramp 0.5"."""
    gated = row["model"] == "tsa"
    name = f"{row['family']} {row['gate'] if gated else row['model']} {row['variant']}".rstrip()
    name += " --halt" * (gated and row["halt"] == "True")
    if int(row["n_layer"]) != LAYERS.get(row["family"], 6):
        name += f" --n_layer {row['n_layer']}"
    for flag, default in (("gate_bias", -1), ("lam", None), ("lam_ramp", 0)) if gated else (("confidence", 0.9),):
        name += f" --{flag} {row[flag]:g}" if row[flag] not in (default, "") else ""
    return name


def cost(row):
    """The multiply-adds of a sparse pass, as a share of those of the full plain model."""
    sizes = {name: int(row[name]) for name in ("n_layer", "n_embd", "block_size", "vocab_size")}
    config, L, full = Config(model=row["model"], **sizes), sizes["n_layer"], LAYERS.get(row["family"], 6)
    T = 42 if row["family"] in ("copy", "sort") else None       # tokens per sequence, elsewhere block_size
    plain = Config(model="plain", **sizes | {"n_layer": full})
    return multiply_adds(config, [row["blocks"] / L] * L, T) / multiply_adds(plain, [1] * full, T)


def count_hops(text):
    """The number of letters that the chain of each character goes through: "7ab" -> [0, 1, 2]."""
    hops = []
    for c in text:
        hops.append(0 if c in data.DIGITS else 1 + hops[data.LETTERS.index(c)])
    return hops


def blocks_needed(hops):
    """All tokens hop simultaneously: n blocks make 2^n - 1 hops. Every token runs block 0."""
    return max(hops.bit_length(), 1)


def exact(row):
    """The share that runs exactly as many blocks as needed, of the tokens that need more than one block."""
    table = row["hops"][2:]         # hops[n][l]: tokens with n hops that run l + 1 blocks
    return sum(line[blocks_needed(n) - 1] for n, line in enumerate(table, 2)) / sum(map(sum, table))


@torch.no_grad()
def rows_of(folder, about):
    """Score a run on validation and unseen data. Soft and skip gates are trained alike, so they share a run."""
    model, saved = load_checkpoint(folder / "ckpt.pt")
    flags, T, vocab, gate = saved["flags"], model.config.block_size, saved["vocab"], model.config.gate
    corpus, chains = data.load(flags["data"]), flags["data"] == "chain"
    unseen = data.chain(seed=1).windows("val", T) if chains else corpus.windows("test", T)
    for model.config.gate in ("soft", "skip") if model.config.model == "tsa" and gate in ("soft", "skip") else (gate,):
        for split, (idx, targets) in (("val", corpus.windows("val", T)), ("test", unseen)):
            row = flags | vars(model.config) | about | {"family": flags["preset"], "run": folder.name, "split": split}
            row |= {"variant": "", "halt": str(row["halt"]), "hops": ""} | train.score(model, idx, targets)
            if chains:
                logits, gates = model(idx, sparse=True)
                row["accuracy"] = (logits.argmax(-1) == targets).double().mean().item()
                blocks, hops = (gates != 0).sum(0), torch.tensor([count_hops([vocab[i] for i in text]) for text in idx])
                row["hops"] = [[((hops == n) & (blocks == l)).sum().item() for l in range(1, 1 + len(gates))]
                               for n in range(data.ROUNDS)]
            yield row


def read_csv(path=CSV):
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {name: float(row[name]) for name in NUMBERS if row[name]}
        row |= {"seed": int(row["seed"]), **{name: json.loads(row[name]) for name in ("ran", "hops") if row[name]}}
    return rows


def group(rows):
    """Rows -> lists of rows that differ only in the seed, by (name, split)."""
    groups = {}
    for row in rows:
        groups.setdefault((name_of(row), row["split"]), []).append(row)
    return groups


def interval(values):
    """The mean, and the half-width of its 95% interval (nan for a single value)."""
    n = len(values)
    return statistics.mean(values), T_95[n] * statistics.stdev(values) / n ** 0.5 if n > 1 else math.nan


def against_plain(rows, others):
    """
    By how much the sparse loss of each row differs from plain models of the same seed, interpolated to the same number
    of multiply-adds. A seed without a plain model that needs as few is left out.
    """
    differences = []
    for row in rows:
        points = sorted((cost(other), other["val_loss_sparse"]) for other in others
                        if other["model"] == "plain" and not other["variant"] and all(other[key] == row[key] for key in ("family", "split", "seed")))
        if points and points[0][0] <= cost(row) <= points[-1][0] > 0.99:
            differences.append(row["val_loss_sparse"] - np.interp(cost(row), *zip(*points)))
    return differences


def table(rows):
    """Rows -> lines of cells: name, split, seeds, full loss, sparse loss, blocks, multiply-adds, exact, against plain."""
    lines = []
    for (name, split), found in sorted(group(rows).items()):
        columns = [[row["val_loss"] for row in found], [row["val_loss_sparse"] for row in found],
                   [row["blocks"] for row in found], [cost(row) for row in found],
                   [exact(row) for row in found if row["hops"] and row["model"] != "plain"]]
        cells = []
        for values, form in zip(columns, (".4f", ".4f", ".2f", ".1%", ".0%")):
            cells.append(f"{statistics.mean(values):{form}}" if values else "")
            if len(values) > 1 and form != ".0%":
                cells[-1] += f" ± {statistics.stdev(values):{form}}"
        differences = against_plain(found, rows)
        if differences:
            cells.append("{:+.4f} ± {:.4f}".format(*interval(differences)).replace(" ± nan", ""))
        lines.append([name, split, str(len(found)), *cells])
    return lines


def draw(path, preset="chain", label="", own=(), own_plain={}):
    """
    Loss against computation: blocks per token on chains, multiply-adds on text. A star marks `own` rows, results of
    `preset`, on text relative to `own_plain` (rows by seed). Raise ImportError without matplotlib.
    """
    from matplotlib.figure import Figure
    if preset not in ("chain", "deep"):
        raise ValueError(f"there is no panel for --preset {preset}")
    groups, figure = group(read_csv()), Figure(figsize=(9, 4.4), layout="constrained")
    full = {row["seed"]: row for row in groups["deep plain", "val"]}

    def put(axes, rows, full=full, **style):
        """Draw the mean of some rows. Return its place."""
        x, y, half = statistics.mean(row["blocks"] for row in rows), *interval([r["val_loss_sparse"] for r in rows])
        if axes is right:
            x = statistics.mean(100 * cost(row) for row in rows)
            losses = [100 * (row["val_loss_sparse"] / full[row["seed"]]["val_loss"] - 1) for row in rows]
            y, half = interval(losses)
        axes.errorbar(x, y, yerr=half if axes is right else None, capsize=2, lw=1, **style)
        return x, y

    left, right = figure.subplots(1, 2)
    for axes, name, layers in ((left, "chain plain", (1, 2, 3, 4)), (right, "deep plain", (6, 8, 9, 10, 11)),
                               (right, "deep plain several", (8, 10))):
        color, face, points = "0.6", "white" if "several" in name else "0.6", []
        for n in (*layers, 6 if axes is left else 12):
            rows = groups.get((name + f" --n_layer {n}" * (n in layers), "val"))
            if rows:
                points.append(put(axes, rows, fmt="o", ms=5, color=color, mfc=face, zorder=1))
                axes.annotate(n, points[-1], xytext=(5, 5) if face == color else (-4, -13), color="0.4",
                              textcoords="offset points", fontsize=9)
        axes.plot(*zip(*points), "-" if face == color else "--", color=color, lw=1, zorder=0)
    for design, (color, mark, *names) in MARKS.items():
        for axes, name in zip((left, right), names):
            if rows := groups.get((name, "val")):
                x, y = put(axes, rows, fmt=mark, color=color, ms=7, zorder=3, label=design)
                if axes is right and y > 5:
                    axes.annotate(f"{y:+.0f}%", (x, 5), (x, 4.2), color=color, ha="center", arrowprops=dict(
                        arrowstyle="->", color=color))                  # off the scale
    if own:
        axes = left if preset == "chain" else right
        rows = [row | {"family": preset} for row in own]
        put(axes, rows, own_plain, fmt="*", color="black", ms=11, zorder=4, label=label)
    left.axvline(1.464, color="0.8", lw=1, zorder=0)        # if every token runs exactly the blocks needed
    left.axhline(0.01, color="0.8", lw=1, ls=":", zorder=0)
    left.annotate("needed: 1.46", (1.5, 8e-5), color="0.5", rotation=90, fontsize=8)
    left.annotate("limit of the leaderboard: 0.01", (6, 0.011), color="0.5", fontsize=8, ha="right")
    left.set(yscale="log", xlabel="blocks per token", ylabel="loss", title="Puzzle: gates find the blocks needed")
    right.set(ylim=(-1, 5), xlabel="multiply-adds (% of 12 plain layers)", ylabel="loss above 12 plain layers (%)",
              title="Text: fewer layers do as well")
    handles = {}
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        found, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, found))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, format="svg", metadata={"Date": None})


def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", type=Path, nargs="*", help="folders of finished runs, whose rows are added")
    parser.add_argument("--about", nargs="*", default=[], help="other columns of the new rows, as NAME=VALUE")
    parser.add_argument("--svg", help="draw the figure into this file")
    args = parser.parse_args(argv)
    rows, about = read_csv(), dict(pair.split("=", 1) for pair in args.about)
    new = [row for folder in args.folders if (folder / "ckpt.pt").exists() for row in rows_of(folder, about)]
    if new:
        known = {(name_of(row), row["split"], row["seed"]) for row in new}
        rows = [row for row in rows if (name_of(row), row["split"], row["seed"]) not in known] + new
        with open(CSV, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
            writer.writeheader()
            writer.writerows(sorted(rows, key=lambda row: (row["family"], row["run"])))
    for line in table(rows):
        print(*line, sep="|")
    if args.svg:
        draw(args.svg)


if __name__ == "__main__":
    main()
