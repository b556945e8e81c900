"""
Collect finished runs: python -m report.plot out --csv report/results.csv --svg report/frontier.svg

Read every result.json under the folders, and the scores.json of report.depth beside it. If runs differ only
in their seed, name their folders NAME-s0, NAME-s1, ...; their means and standard deviations are printed on one line.
All rows go to a csv file; the plot shows the loss against the multiply-adds saved, both as executed.
"""
import argparse
import csv
import json
import statistics
import sys
from pathlib import Path

from tsa import Config, multiply_adds

COLUMNS = ("setting", "run", "split", "model", "gate", "n_layer", "lam", "threshold", "gate_bias", "seed", "val_loss",
           "val_loss_executed", "tlops_saved", "macs_saved", "accuracy", "permuted", "permuted_executed", "ran",
           "gates", "hops", "n_params", "device", "dtype", "torch", "seconds", "commit")
SCORES = ("val_loss", "val_loss_executed", "tlops_saved", "macs_saved")


def read_rows(folders, commit):
    """The rows of all finished runs: result.json, and rows of scores.json with another split, gate or threshold."""
    rows = []
    for path in sorted(path for folder in folders for path in Path(folder).rglob("result.json")):
        result = json.loads(path.read_text("utf-8"))
        name = Path(result["data"]).name
        result["setting"] = name if name in ("chain", "copy", "sort") else f"{result['preset']} {name}"
        result |= {"run": path.parent.name, "split": "val", "commit": commit}
        rows.append(result)
        scores = path.with_name("scores.json")
        for score in json.loads(scores.read_text("utf-8")) if scores.exists() else []:
            if all(score[key] == result[key] for key in ("split", "gate", "threshold")):
                result |= score
            else:
                rows.append(result | score)
    for row in rows:
        if row["model"] == "dense":     # what fewer layers save compared with the preset's 6
            config = Config(**{key: row[key] for key in ("model", "vocab_size", "block_size", "n_embd", "n_head")})
            row["tlops_saved"] = 1 - row["n_layer"] / 6
            row["macs_saved"] = 1 - multiply_adds(config, row["ran"]) / multiply_adds(config, [1] * 6)
    return rows


def summarize(rows):
    """Rows -> a dictionary per group of seeds, with the mean and standard deviation of each score."""
    groups = {}
    for row in rows:
        key = row["setting"], row["run"].rpartition("-s")[0] or row["run"], row["split"], row["gate"], row["threshold"]
        groups.setdefault(key, []).append(row)
    summary = []
    for key, group in groups.items():
        line = dict(zip(("setting", "name", "split", "gate", "threshold"), key), n=len(group), model=group[0]["model"])
        for score in SCORES:
            values = [row[score] for row in group]
            line[score] = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        summary.append(line)
    return sorted(summary, key=lambda line: (line["setting"], line["macs_saved"]))


def draw(summary, path):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        sys.exit("this figure needs matplotlib: pip install matplotlib")
    settings = sorted({line["setting"] for line in summary})
    styles = {"dense": ("plain", "C0"), "halt": ("halting", "C1"), "exit": ("early exit", "C2"),
              "tsa soft": ("the paper's gate, thresholded", "C3"), "tsa skip": ("the paper's gate, skip", "C4")}
    figure = Figure(figsize=(5 * len(settings), 4), layout="constrained")
    for axes, setting in zip(figure.subplots(1, len(settings), squeeze=False)[0], settings):
        curves = {}
        for line in summary:
            if line["setting"] == setting and line["split"] == "val":
                name = f"{line['model']} {line['gate'] or ''}".strip()
                curves.setdefault(name, []).append((100 * line["macs_saved"][0], *line["val_loss_executed"]))
        best = min(loss for points in curves.values() for _, loss, _ in points)
        for name, points in curves.items():
            saved, loss, spread = zip(*points)
            label, color = styles.get(name, (name, "black"))
            axes.errorbar(saved, loss, spread, fmt="o-", capsize=3, label=label, color=color)
        axes.set(title=setting, xlabel="multiply-adds saved (%)", ylabel="validation loss, as executed")
        axes.set_ylim(0.99 * best, 1.08 * best)     # crops out models whose loss explodes when executed
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper left")
    figure.savefig(path, format="svg", metadata={"Date": None})


def main(argv=None):
    parser = argparse.ArgumentParser(prog="report.plot", description="Collect finished runs.")
    parser.add_argument("folders", nargs="+", help="folders of runs, searched recursively")
    parser.add_argument("--commit", default="", help="the commit that the runs were made with, for the csv file")
    parser.add_argument("--csv", type=Path, help="write all rows to this file")
    parser.add_argument("--svg", type=Path, help="write the plot to this file")
    args = parser.parse_args(argv)
    rows = read_rows(args.folders, args.commit)
    if not rows:
        sys.exit(f"no finished run (result.json) under {', '.join(args.folders)}")
    summary = summarize(rows)
    for line in summary:
        print("{setting:19} {name:24} {split:4} {gate!s:5} {threshold!s:5} n={n}".format(**line),
              *("{:.4f} ± {:.4f}".format(*line[score]) for score in SCORES[:2]),
              *("{:.1%} ± {:.1%}".format(*line[score]) for score in SCORES[2:]), sep="  ")
    if args.csv:
        with open(args.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    if args.svg:
        draw(summary, args.svg)


if __name__ == "__main__":
    main()
