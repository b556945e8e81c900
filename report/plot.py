"""
Collect the rows of finished runs, print their means and compare them with plain models of equal multiply-adds:

    python -m report.plot out --csv report/results.csv --svg report/forest.svg

Reads result.json and the scores.json of report.score in every folder FAMILY-NAME-s0, -s1, ..., and the rows of the csv
file. Counts savings anew from `ran`, relative to the plain model with LAYERS. The figure needs matplotlib.
"""
import argparse
import csv
import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np

from tsa import Config, multiply_adds

LAYERS = {"alone": 12, "chain8": 12, "deep": 12, "drop": 12, "long": 12, "rate": 12}       # of plain models; others: 6
SIZES = ("n_layer", "n_embd", "block_size", "vocab_size")
SCORES = ("val_loss", "val_loss_sparse", "tlops_saved", "macs_saved", "accuracy", "exact")
# Means over n seeds: the 97.5% quantile of Student's t with n - 1 degrees of freedom
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}
FOREST = {      # heading: (name of the runs, gate, label); red: models that skip nothing
    "Shakespeare, 6 layers": [("shakespeare-tsa", "skip", "skip"), ("shakespeare-stretch", "stretch", "stretch"),
                              ("shakespeare-straight-lam0.001", "straight", "straight")],
    "Python, 6 layers": [("stdlib-tsa", "skip", "skip"), ("stdlib-stretch", "stretch", "stretch")],
    "Python, 12 layers": [("deep-tsa", "skip", "skip"), ("deep-stretch", "stretch", "stretch"),
                          ("deep-straight-lam0.01", "straight", "straight"),
                          ("deep-several8", "", "8 plain layers with a loss after every block"),
                          ("deep-several10", "", "10 plain layers with a loss after every block")],
    "Python, 12 layers, three times as long, dropout": [("drop-tsa", "skip", "skip")]}


def count(row):
    """Count what a row saved relative to the plain model of its family. Return the row."""
    config = Config(model=row["model"], **{name: int(row[name]) for name in SIZES})
    ran, L = row["ran"], LAYERS.get(row["family"], 6)
    T = 42 if row["family"] in ("copy", "sort") else None       # tokens per sequence, elsewhere block_size
    if "several" in row["run"]:         # trained with a loss after every block, but a plain model
        config, ran, row["val_loss_sparse"] = replace(config, model="plain"), [1] * len(ran), row["val_loss"]
    row["tlops_saved"] = 1 - sum(ran) / L
    row["macs_saved"] = 1 - multiply_adds(config, ran, T) / multiply_adds(replace(config, model="plain"), [1] * L, T)
    return row


def read_runs(folders):
    rows = []
    for path in sorted(path for folder in folders for path in Path(folder).rglob("result.json")):
        result, about, scores = (json.loads(path.with_name(name).read_text()) if path.with_name(name).exists() else {}
                                 for name in ("result.json", "about.json", "scores.json"))
        result |= {"run": path.parent.name, "family": path.parent.name.partition("-")[0], "split": "val", **about}
        rows += [result | score for score in scores or [{}]]
    return rows


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {name: float(row[name]) for name in SCORES if row[name]}
        row |= {"seed": int(row["seed"]), **{name: json.loads(row[name]) for name in ("ran", "hops") if row[name]}}
    return rows


def summarize(rows):
    """Rows -> a dictionary per group that differs only in the seed: its rows, and mean and deviation of each score."""
    groups = {}
    for row in rows:
        gate, confidence = row["gate"] * (row["model"] == "tsa"), str(row["confidence"]) * (row["model"] == "exit")
        key = row["family"], re.sub(r"-s\d+$", "", row["run"]), row["split"], gate, confidence
        groups.setdefault(key, []).append(row)
    summary = []
    for key, group in sorted(groups.items()):
        line = dict(zip(("family", "name", "split", "gate", "confidence"), key), rows=group)
        for score in SCORES:
            values = [row[score] for row in group if isinstance(row.get(score), float)]
            if values:
                line[score] = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan
        summary.append(line)
    return summary


def against_plain(line, rows):
    """
    By seed, the difference of a line's sparse loss from plain models of equal multiply-adds, interpolated between those
    of the same seed. A seed without a plain model that saves as much is left out.
    """
    differences = []
    for row in line["rows"]:
        points = sorted({(other["macs_saved"], other["val_loss_sparse"]) for other in rows if other["model"] == "plain"
                         and all(other[key] == row[key] for key in ("family", "split", "seed"))})
        if points and points[0][0] < 0.01 and row["macs_saved"] <= points[-1][0]:
            differences.append(row["val_loss_sparse"] - np.interp(row["macs_saved"], *zip(*points)))
    return differences


def interval(values):
    """The mean, and the half-width of its 95% interval (nan for a single value)."""
    n = len(values)
    return statistics.mean(values), T_95[n] * statistics.stdev(values) / n ** 0.5 if n > 1 else math.nan


def draw(summary, rows, path):
    """A forest plot: by how many percent the sparse loss differs from plain models of equal multiply-adds."""
    from matplotlib.figure import Figure
    lines = {(line["name"], line["gate"]): line for line in summary if line["split"] == "val"}
    axes = (figure := Figure(figsize=(9, 4.5), layout="constrained")).subplots()
    axes.axvspan(-0.31, 0.31, color="0.9")          # twice the deviation between reruns of one seed
    axes.axvline(0, color="black", lw=0.8)
    y, labels = 0, {}
    for heading, models in FOREST.items():
        labels[y] = heading
        for name, gate, label in models:
            line, color, y = lines[name, gate], "C3" if "several" in name else "C0", y - 1
            plain = lines[f"{line['family']}-plain{LAYERS.get(line['family'], 6)}", ""]["val_loss"][0]
            percent = [100 * difference / plain for difference in against_plain(line, rows)]
            mean, half = interval(percent)
            axes.errorbar(mean, y, xerr=half, fmt="o", color=color, capsize=3)
            axes.plot(percent, [y] * len(percent), "|", color=color, ms=12)
            labels[y] = f"{label} ({line['macs_saved'][0]:.0%} saved)"
        y -= 2
    axes.set_yticks(list(labels), labels.values())
    for text in axes.get_yticklabels():
        text.set_fontweight("bold" if text.get_text() in FOREST else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("sparse loss relative to plain models at equal multiply-adds (%)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, format="svg", metadata={"Date": None})


def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="*", help="folders of runs, searched recursively")
    parser.add_argument("--csv", type=Path, required=True, help="file with the rows; those of new runs are added")
    parser.add_argument("--svg", help="draw the figure into this file")
    args = parser.parse_args(argv)
    new = read_runs(args.folders)
    rows = [row for row in read_csv(args.csv) if row["run"] not in {row["run"] for row in new}] + new
    columns = dict.fromkeys(name for row in rows for name in row)
    rows = sorted(map(count, rows), key=lambda row: (row["family"], row["run"]))
    summary = summarize(rows)
    for line in summary:
        differences = against_plain(line, rows)
        print("{family:12} {name:32} {split:5} {gate:9} {confidence:5}".format(**line), f"n={len(line['rows'])}",
              *("{} {:.4f} ± {:.4f}".format(score, *line[score]) for score in SCORES if score in line),
              "against plain {:+.4f} ± {:.4f}".format(*interval(differences)) if differences else "", sep="  ")
    with open(args.csv, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    if args.svg:
        draw(summary, rows, args.svg)


if __name__ == "__main__":
    main()
