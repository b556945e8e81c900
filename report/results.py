"""
Score finished runs, add their rows to results.csv, and print all rows as means over seeds:

    python -m report.results out/sweep-1a2b3c4d/preset*=? --about commit=abc threads=1
"""
import argparse
import csv
import json
import math
import platform
import re
import statistics
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

import data
import train
from tsa import MODELS, Config, load_checkpoint, multiply_adds, token_loss

CSV = Path(__file__).resolve().parent / "results.csv"
CONFIDENCES = (0.3, 0.4, 0.5, 0.6, 0.75, 0.8, 0.9, 0.95)     # early exit: each makes a row
SIZES = ("n_layer", "n_embd", "block_size", "vocab_size")
SCORES = dict(tlops_saved=".1%", val_loss=".4f", val_loss_sparse=".4f", blocks=".2f", cost=".1%", exact=".0%",
              correlation=".2f", correlation_nonblank=".2f")
FIFTHS = ("fifths", "fifths_nonblank")
COLUMNS = ("family", "run", "split", "seed", "model", "gate", *SIZES, *SCORES, *FIFTHS, "processor", "threads",
           "python", "commit")
# The 97.5% quantiles of Student's t with 1, 2, ... degrees of freedom, for means over 2, 3, ... seeds
T_95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448,
        2.1314, 2.1199, 2.1098, 2.1009, 2.0930)


def cost(row):
    """The multiply-adds of a sparse pass, as a fraction of those of the plain model with all layers."""
    config, L = Config(**{name: row[name] for name in ("model", "gate", *SIZES)}), row["n_layer"]
    full = replace(config, n_layer=train.PRESETS.get(row["family"], {}).get("n_layer", Config.n_layer))
    ran = [1] + [(row["blocks"] - 1) / max(L - 1, 1)] * (L - 1)         # block 0 always runs
    with torch.device("meta"):
        model, plain = MODELS[config.model](config), MODELS["plain"](full)
    return multiply_adds(model, ran) / multiply_adds(plain, [1] * full.n_layer)


def hops(text):
    """The number of hops from each token of a chain to its digit."""
    counts = []
    for c in text:
        counts.append(0 if c in data.DIGITS else 1 + counts[data.LETTERS.index(c)])
    return counts


def blocks_by_rule(text):
    """For each token of a chain: all tokens hop at once, so n blocks are enough for up to 2^n - 1 hops."""
    return [max(n.bit_length(), 1) for n in hops(text)]     # every token runs block 0


def exact(model, vocab, idx):
    """Of the tokens for which the rule says more than one block, the fraction that run exactly as many."""
    rule = torch.tensor([blocks_by_rule([vocab[i] for i in text]) for text in idx])
    ran = (model(idx, sparse=True)[1] != 0).sum(0)
    return (ran == rule)[rule > 1].double().mean().item()


@cache
def plain_losses(folder):
    """The loss of each validation token under the plain model in a folder, (n, T)."""
    model, saved = load_checkpoint(folder / "ckpt.pt")
    idx, targets = data.load(saved["flags"]["data"]).windows("val", model.config.block_size)
    return torch.cat([token_loss(model(x)[0], y) for x, y in zip(idx.split(64), targets.split(64))])


def depth_scores(model, vocab, idx, losses):
    """
    Do harder tokens run more blocks? A token's difficulty is its loss under a plain model (n, T). Return its
    correlation with the number of blocks, and the mean number for each fifth of the tokens, the easiest first; both
    also without whitespace. For the paper's gate, the number is the sum of the gates in a full pass.
    """
    soft, depth = model.config.gate == "soft", []
    for x in idx.split(64):
        gates = model(x, sparse=not soft)[1]
        depth.append((gates if soft else (gates != 0).float()).sum(0))
    depth, scores = torch.cat(depth), {}
    is_space = torch.tensor([c.isspace() for c in vocab])[idx]
    for name, chosen in (("", torch.ones_like(is_space)), ("_nonblank", ~is_space)):
        fifths = depth[chosen][losses[chosen].argsort()].chunk(5)
        correlation = torch.corrcoef(torch.stack([depth[chosen], losses[chosen]]))[0, 1].item()
        scores["correlation" + name] = correlation if math.isfinite(correlation) else ""    # if no depth differs
        scores["fifths" + name] = [round(fifth.mean().item(), 2) for fifth in fifths]
    return scores


@torch.no_grad()
def score(folder, about):
    """
    Return a run's rows, on validation and test data. On validation data, a run of `skip` also makes a row of the
    paper's gate (same weights), and one of early exit makes a row for each of CONFIDENCES. Raise OSError or ValueError
    if the run is unusable or unfinished.
    """
    saved = load_checkpoint(folder / "ckpt.pt")[1]
    flags, rows = saved["flags"], []
    if not (folder / "result.json").exists():
        raise ValueError(f"{folder} is unfinished: continue it with train.py --resume")
    run = folder.name.partition("-seed=")[0]
    variants = {run: {}}
    if saved["config"]["model"] == "exit":
        variants = {f"{run}-confidence={value}": {"confidence": value} for value in CONFIDENCES}
    elif saved["config"]["model"] == "tsa" and saved["config"]["gate"] == "skip":
        variants[run.replace("gate=skip", "gate=soft") if "gate=skip" in run else f"{run}-gate=soft"] = {"gate": "soft"}
    corpus, is_chain = data.load(flags["data"]), flags["data"] == "chain"
    family = flags["data"] if flags["preset"] == "laptop" else flags["preset"]
    text = "".join(re.findall("-data=[^-]+", folder.name))
    plain = folder.with_name(f"preset={flags['preset']}-model=plain{text}-seed={flags['seed']}")
    for run, changes in variants.items():
        model, _ = load_checkpoint(folder / "ckpt.pt", **changes)
        T = model.config.block_size
        for split in ("val",) if changes else ("val", "test"):
            windows = data.chain(seed=1).windows("val", T) if is_chain and split == "test" else corpus.windows(split, T)
            row = flags | vars(model.config) | {"family": family, "run": run, "split": split} | about
            row["python"] = platform.python_version() if flags["data"] == "stdlib" else ""
            row |= train.score(model, *windows)
            if is_chain:
                row["exact"] = exact(model, corpus.vocab, windows[0])
            elif split == "val" and model.config.model == "tsa" and (plain / "ckpt.pt").exists():
                row |= depth_scores(model, corpus.vocab, windows[0], plain_losses(plain))
            rows.append(row | {"cost": cost(row)})
    return rows


def read_csv():
    with open(CSV, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {name: json.loads(row[name]) for name in ("seed", *SIZES, *SCORES, *FIFTHS) if row[name]}
    return rows


def group(rows):
    """Rows -> lists of rows that differ only in the seed, by (run, split), without seed 0 if more than three."""
    groups = {}
    for row in rows:
        groups.setdefault((row["run"], row["split"]), []).append(row)
    return {key: [row for row in found if row["seed"] > 0 or len(found) <= 3] for key, found in groups.items()}


def interval(values):
    """The half-width of the 95% interval of the mean (nan for a single value)."""
    n = len(values)
    return T_95[n - 2] * statistics.stdev(values) / n ** 0.5 if n > 1 else float("nan")


def plain_points(row, others):
    """Sorted (cost, loss) of plain models of a row's family, split, seed and sizes. [] if none has all layers."""
    points = sorted((other["cost"], other["val_loss"]) for other in others if other["model"] == "plain"
                    and all(other[key] == row[key] for key in ("family", "split", "seed", *SIZES[1:])))
    points = [point for point in points if point[0] <= 1]       # a deeper model is no baseline
    return points if points and points[-1][0] == 1 else []


def above_full(rows, others, loss="val_loss_sparse"):
    """Losses relative to the plain model of the same seed with all layers: 0.01 is 1% above it."""
    return [row[loss] / points[-1][1] - 1 for row in rows if (points := plain_points(row, others))]


def against_plain(rows, others):
    """Sparse losses minus those of plain models of the same seed and multiply-adds (interpolated, not extrapolated)."""
    points = [(row, plain_points(row, others)) for row in rows]
    return [row["val_loss_sparse"] - np.interp(row["cost"], *zip(*found)) for row, found in points
            if found and found[0][0] <= row["cost"] <= 1]


def shown(values, form, n=0):
    """The mean of the values with its 95% interval, and their number if they are fewer than n."""
    if not values:
        return ""
    spread = f" ± {interval(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}" + f" ({len(values)})" * (len(values) < n)


def table(rows):
    """
    Rows -> lines of cells: run, split, number of seeds, means of SCORES and FIFTHS, the full and the sparse loss
    above_full (on text), and the sparse loss against_plain. A cell of fewer seeds says of how many.
    """
    lines, harder = [], group([row for row in rows if row.get("correlation", "") != ""])
    for key, found in sorted(group(rows).items()):
        lines.append([*key, str(len(found))])
        for column, form in SCORES.items():
            chosen = harder.get(key, []) if column.startswith("correlation") else found
            values = [row[column] for row in chosen if row.get(column, "") != ""]
            lines[-1].append(shown(values, form, len(chosen)))
        for column in FIFTHS:
            values = [row[column] for row in harder.get(key, [])]
            lines[-1].append(", ".join(f"{statistics.mean(fifth):.2f}" for fifth in zip(*values)))
        above = [[], []]                # no percentages for chains, because the loss is near 0
        if found[0]["family"] != "chain":
            above = [above_full(found, rows, loss) for loss in ("val_loss", "val_loss_sparse")]
        lines[-1] += [shown(values, "+.2%", len(found)) for values in above]
        lines[-1].append(shown(against_plain(found, rows), "+.4f", len(found)))
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", type=Path, nargs="*", help="folders of finished runs to score")
    parser.add_argument("--about", nargs="*", default=[], help="other columns of the new rows, as NAME=VALUE")
    args = parser.parse_args(argv)
    about = dict(pair.split("=", 1) for pair in args.about)
    try:
        new = [row for folder in args.folders for row in score(folder, about)]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    rows = read_csv()       # now, because scoring takes minutes
    if new:             # a row of an earlier run with the same name and seed is replaced
        rows = list({(row["run"], row["split"], row["seed"]): row for row in rows + new}.values())
        with open(CSV, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    for line in table(rows):
        print(*line, sep="|")


if __name__ == "__main__":
    main()
