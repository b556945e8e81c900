"""
Collect finished runs: python -m report.plot out --csv report/results.csv --svg report/frontier.svg

Read every result.json under the folders, and the scores.json of report.depth beside it; with --rows, read the rows of a
csv file as well. Folders are named FAMILY-NAME-s0, -s1, ... for runs that differ only in their seed. What each row
saved is counted anew from `ran`, the shares of tokens that ran each block, relative to the family's plain model.

Print means and standard deviations over the seeds, then the comparison with plain models of equal multiply-adds: the
losses of plain models with the same seed are interpolated to the multiply-adds that the model saved. Rows named
`several` are halting models trained with lambda 0, but counted as plain models: their loss is that of the full pass.
The plot shows the loss against the multiply-adds saved.
"""
import csv
import json
import re
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np

from data import UserError
from train import Parser, one_line
from tsa import Config, multiply_adds

SIZES = ("n_layer", "n_embd", "block_size", "vocab_size")
COLUMNS = ("family", "run", "split", "model", "gate", *SIZES, "lam", "threshold", "variant", "gate_bias", "seed",
           "val_loss", "val_loss_sparse", "tlops_saved", "macs_saved", "accuracy", "permuted", "permuted_sparse", "ran",
           "gates", "by_block", "hops", "n_params", "device", "dtype", "torch", "seconds", "commit")
LAYERS = {"alone": 12, "deep": 12, "drop": 12, "long": 12, "rate": 12}      # of a family's plain model, elsewhere 6
LENGTHS = {"copy": 42, "sort": 42}                  # tokens per sequence, elsewhere block_size
SCORES = ("val_loss", "val_loss_sparse", "tlops_saved", "macs_saved")
# The number of seeds: the 97.5% quantile of Student's t
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def is_plain(row):
    return row["model"] == "plain" or "several" in row["run"]


def count(row):
    """Add to a row what it saved relative to the plain model of its family, counted from `ran`."""
    config = Config(model=row["model"], **{name: int(row[name]) for name in SIZES})
    ran = row["ran"]
    if is_plain(row):
        config, ran = replace(config, model="plain"), [1] * config.n_layer
        row["val_loss_sparse"] = row["val_loss"]
    if row["model"] == "plain":
        row["threshold"] = None
    L, T = LAYERS.get(row["family"], 6), LENGTHS.get(row["family"])
    used = multiply_adds(config, ran, T)
    if row["variant"] == "exit-nofloor":
        used += config.n_embd * config.vocab_size       # one more prediction, after block 0
    row["tlops_saved"] = 1 - sum(ran) / L
    row["macs_saved"] = 1 - used / multiply_adds(replace(config, model="plain"), [1] * L, T)


def read_rows(folders):
    """The rows of all finished runs: result.json, and rows of scores.json with another split, gate or threshold."""
    rows = []
    for path in sorted(path for folder in folders for path in Path(folder).rglob("result.json")):
        result = json.loads(path.read_text("utf-8"))
        name, scores, commit = path.parent.name, path.with_name("scores.json"), path.with_name("commit")
        result |= {"run": name, "family": name.partition("-")[0], "split": "val", "variant": result.get("variant", ""),
                   "commit": commit.read_text().strip() if commit.exists() else ""}
        rows.append(result)
        for score in json.loads(scores.read_text("utf-8")) if scores.exists() else []:
            if score["step"] < result["max_iters"]:
                continue        # of a checkpoint that was saved before the run had finished
            if all(score[key] == result.get(key, score[key]) for key in ("split", "gate", "threshold", "variant")):
                result |= score
            else:
                rows.append(result | score)
    for row in rows:
        count(row)
    return rows


def read_csv(path):
    """The rows of a csv file that this program wrote."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {"seed": int(row["seed"]), "gate": row["gate"] or None, "threshold": row["threshold"] or None}
        row |= {name: float(row[name]) for name in (*SCORES, "threshold") if row[name]}
        row["ran"] = json.loads(row["ran"])
        count(row)
    return rows


def name_of(row):
    return re.sub(r"-s\d+$", "", row["run"])


def summarize(rows):
    """Rows -> a dictionary per group of seeds, with the mean and standard deviation of each score."""
    groups = {}
    for row in rows:
        key = row["family"], name_of(row), row["split"], row.get("gate"), row.get("threshold"), row["variant"]
        groups.setdefault(key, []).append(row)
    summary = []
    for key, group in groups.items():
        line = dict(zip(("family", "name", "split", "gate", "threshold", "variant"), key), n=len(group), rows=group,
                    model="several" if "several" in key[1] else group[0]["model"])
        for score in SCORES:
            values = [row[score] for row in group]
            line[score] = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        summary.append(line)
    return sorted(summary, key=lambda line: (line["family"], line["split"], line["macs_saved"]))


def against_plain(line, rows, reference="plain"):
    """
    The differences, by seed, of a line's sparse loss from the reference models of equal multiply-adds. A model that
    saves nothing is compared with the plain model itself. Seeds without a reference that saves at least as much are
    left out.
    """
    differences = []
    for row in line["rows"]:
        points = sorted({(other["macs_saved"], other["val_loss_sparse"]) for other in rows
                         if name_of(other).startswith(f"{row['family']}-{reference}") and other["seed"] == row["seed"]
                         and other["split"] == row["split"]})
        if points and points[0][0] == 0 and row["macs_saved"] <= points[-1][0]:
            differences.append(row["val_loss_sparse"] - np.interp(row["macs_saved"], *zip(*points)))
    return differences


def interval(differences):
    """The mean of differences by seed, and the half-width of its 95% interval (nan for a single seed)."""
    n = len(differences)
    half = T_95[n] * statistics.stdev(differences) / n ** 0.5 if n > 1 else float("nan")
    return statistics.mean(differences), half


def draw(summary, path):
    from matplotlib.figure import Figure        # only the figures of report/ need matplotlib
    families = {"deep": "Python, 12 layers, 2,400 steps", "drop": "7,200 steps, dropout 0.1"}
    styles = {"plain": ("plain", "C0"), "halt": ("halting", "C1"), "exit": ("early exit", "C2"),
              "tsa skip": ("skip", "C4"), "tsa stretch": ("stretch", "C5"),
              "several": ("loss after every block", "C3")}
    figure, legend = Figure(figsize=(5 * len(families), 4), layout="constrained"), {}
    for axes, (family, title) in zip(figure.subplots(1, len(families), squeeze=False)[0], families.items()):
        curves = {}
        for line in summary:
            name = f"{line['model']} {line['gate'] or ''}".strip()
            is_drawn = re.search(r"-(plain\d+|several\d+|tsa|stretch|exit|halt-lam0.03)$", line["name"])
            if line["family"] == family and line["split"] == "val" and is_drawn and line["n"] > 1 and name in styles:
                curves.setdefault(name, []).append((100 * line["macs_saved"][0], *line["val_loss_sparse"]))
        for name, points in curves.items():
            saved, loss, spread = zip(*points)
            label, color = styles[name]
            legend[label] = axes.errorbar(saved, loss, spread, fmt="o-", capsize=3, color=color)
        best = min((loss for points in curves.values() for _, loss, _ in points), default=1)
        axes.set(title=title, xlabel="multiply-adds saved (%)", ylabel="validation loss, sparse")
        axes.set(xlim=(-5, 55), ylim=(0.993 * best, 1.03 * best))
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(legend.values(), legend.keys(), frameon=False, loc="outside lower center", ncols=6)
    figure.savefig(path, format="svg", metadata={"Date": None})


@one_line()
def main(argv=None):
    parser = Parser(prog="report.plot", description="Collect finished runs.")
    parser.add_argument("folders", nargs="*", help="folders of runs, searched recursively")
    parser.add_argument("--rows", type=Path, help="csv file whose rows are read, too")
    parser.add_argument("--pool", nargs=2, metavar=("FAMILY", "INTO"), help="count one family's seeds as another's")
    parser.add_argument("--csv", type=Path, help="write all rows to this file")
    parser.add_argument("--svg", type=Path, help="write the plot to this file")
    args = parser.parse_args(argv)
    rows = read_rows(args.folders)
    if args.rows:
        runs = {row["run"] for row in rows}
        rows += [row for row in read_csv(args.rows) if row["run"] not in runs]
    if args.pool:
        for row in rows:
            row["run"] = re.sub(f"^{args.pool[0]}-", f"{args.pool[1]}-", row["run"])
            row["family"] = row["run"].partition("-")[0]
    if not rows:
        raise UserError(f"no finished run (result.json) under {', '.join(args.folders)}")
    summary = summarize(rows)
    for line in summary:
        name = "{name:32} {split:4} {gate!s:8} {threshold!s:4} {variant:12} n={n}".format(**line)
        print(name.replace("None", "    "),
              *("{:.4f} ± {:.4f}".format(*line[score]) for score in SCORES[:2]),
              *("{:.1%} ± {:.1%}".format(*line[score]) for score in SCORES[2:]), sep="  ")
    for reference in ("plain", "several"):
        print(f"\nLoss against {reference} models of equal multiply-adds: mean, 95% interval, by seed")
        for line in summary:
            by_seed = [] if line["model"] in ("plain", reference) else against_plain(line, rows, reference)
            if by_seed:
                print("{name:32} {split:4} {gate!s:8} {threshold!s:4} ".format(**line), f"n={len(by_seed)} ",
                      "{:+.4f} ± {:.4f} ".format(*interval(by_seed)),
                      *(f"{difference:+.4f}" for difference in by_seed))
    if args.csv:
        with open(args.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(sorted(rows, key=lambda row: (row["family"], row["run"])))
    if args.svg:
        draw(summary, args.svg)


if __name__ == "__main__":
    main()
