"""
Print what the paper's abstract claims and what we measured, from results.csv, clock.csv and the model's own sizes:

    python -m report.claims             the README's tables
    python -m report.claims --all       the report's, with further models

**Yes** and **no**: the whole 95% interval meets or misses the claim. *Probably (not)*: only the mean does. *Saves too
little*: less than 14% (20% with lambda 0), and not a **no**. Plain models have no verdict.
"""
import argparse
import csv
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from report.results import above_full, group, interval, read_csv, shown
from tsa import MODELS, Config
from train import PRESETS

CLOCK = Path(__file__).resolve().parent / "clock.csv"


@dataclass
class Row:
    """A model in the table. `gates`: counted by the gates of a full pass, otherwise by what runs in a sparse one."""
    label: str
    run: str                # its name in results.csv or, for times, (width, work, batch, gates) in clock.csv
    gates: bool = False
    short: bool = False     # in the README's table, too


@dataclass
class Claim:
    text: str
    baseline: str           # what losses are relative to: the plain model with all layers, or early exit
    limit: float            # what the relative difference of the losses must stay below
    least: float            # the fraction that must be saved
    rows: list


CLAIMS = [
    Claim("saves 14 to 23% at a loss less than 0.5% higher", "plain", 0.005, 0.14, [
        Row("`soft` (full pass), paper's size", "preset=paper-gate=soft-data=shakespeare-lam=0.001", gates=True,
            short=True),
        Row("`soft` (full pass), small", "preset=laptop-gate=soft-data=shakespeare-lam=0.001", gates=True, short=True),
        Row("`soft` (full pass), Python", "preset=deep-gate=soft-lam=0.001", gates=True),
        Row("`soft` (rounded), paper's size", "preset=paper-gate=soft-data=shakespeare-lam=0.001", short=True),
        Row("`soft` (rounded), small", "preset=laptop-gate=soft-data=shakespeare-lam=0.001"),
        Row("`soft` (rounded), Python", "preset=deep-gate=soft-lam=0.001"),
        Row("`skip`, paper's size", "preset=paper-gate=skip-data=shakespeare-lam=0.001"),
        Row("`skip`, small", "preset=laptop-gate=skip-data=shakespeare-lam=0.001", short=True),
        Row("`skip`, Python", "preset=deep-gate=skip-lam=0.001"),
        Row("`stretch`, small", "preset=laptop-gate=stretch-data=shakespeare-lam=0.001"),
        Row("`stretch`, Python", "preset=deep-gate=stretch-lam=0.001", short=True),
        Row("5 plain layers, paper's size", "preset=paper-model=plain-data=shakespeare-n_layer=5"),
        Row("5 plain layers, small", "preset=laptop-model=plain-data=shakespeare-n_layer=5"),
        Row("9 plain layers, Python", "preset=deep-model=plain-n_layer=9", short=True)]),
    Claim("the same on enwik8 (its first 4 MB)", "plain", 0.005, 0.14, [
        Row("`soft` (full pass), small", "preset=laptop-gate=soft-data=enwik8-lam=0.001", gates=True, short=True),
        Row("`soft` (rounded), small", "preset=laptop-gate=soft-data=enwik8-lam=0.001"),
        Row("`skip`, small", "preset=laptop-gate=skip-data=enwik8-lam=0.001"),
        Row("`stretch`, small", "preset=laptop-gate=stretch-data=enwik8-lam=0.001"),
        Row("5 plain layers, small", "preset=laptop-model=plain-data=enwik8-n_layer=5")]),
    Claim("saves 20% at such a loss even if lambda is 0", "plain", 0.005, 0.2, [
        Row("`soft` (full pass), small", "preset=laptop-gate=soft-data=shakespeare-lam=0", gates=True, short=True),
        Row("`skip`, small", "preset=laptop-gate=skip-data=shakespeare-lam=0"),
        Row("`soft` (full pass), enwik8", "preset=laptop-gate=soft-data=enwik8-lam=0", gates=True),
        Row("`skip`, enwik8", "preset=laptop-gate=skip-data=enwik8-lam=0")]),
    Claim("a loss 0.7% below early exit's at equal savings", "exit", -0.007, 0, [
        Row("`soft` (full pass), small", "preset=laptop-gate=soft-data=shakespeare-lam=0.001", gates=True, short=True),
        Row("`soft` (full pass), paper's size", "preset=paper-gate=soft-data=shakespeare-lam=0.001", gates=True,
            short=True),
        Row("`soft` (rounded), paper's size", "preset=paper-gate=soft-data=shakespeare-lam=0.001"),
        Row("`soft` (rounded), small", "preset=laptop-gate=soft-data=shakespeare-lam=0.001"),
        Row("`stretch --lam 0.03`, small", "preset=laptop-gate=stretch-data=shakespeare-lam=0.03", short=True),
        Row("`stretch`, Python", "preset=deep-gate=stretch-lam=0.001"),
        Row("`soft` (full pass), enwik8", "preset=laptop-gate=soft-data=enwik8-lam=0.001", gates=True),
        Row("4 plain layers, small", "preset=laptop-model=plain-data=shakespeare-n_layer=4", short=True)]),
]
HARDER = [
    Row("`skip`, Python", "preset=deep-gate=skip-lam=0.001", short=True),
    Row("`stretch`, Python", "preset=deep-gate=stretch-lam=0.001"),
    Row("`skip`, small", "preset=laptop-gate=skip-data=shakespeare-lam=0.001", short=True),
    Row("`stretch --lam 0.03`, small", "preset=laptop-gate=stretch-data=shakespeare-lam=0.03"),
    Row("`skip`, enwik8", "preset=laptop-gate=skip-data=enwik8-lam=0.001")]
FASTER = [
    Row("`stretch`, Python, 64 texts at once", (128, "prefill", 64, "stretch"), short=True),
    Row("`skip`, Python, 64 texts at once", (128, "prefill", 64, "skip")),
    Row("early exit, Python, 64 texts at once", (128, "prefill", 64, "exit")),
    Row("9 plain layers, Python, 64 texts at once", (128, "prefill", 64, "plain 9"), short=True),
    Row("`stretch`, Python, one text at a time", (128, "prefill", 1, "stretch"), short=True),
    Row("`stretch`, Python, writing one text", (128, "decode", 1, "stretch"))]


def verdict(values, limit):
    """Are the values, one per seed, below the limit?"""
    if len(values) == 1:
        return "one seed"
    mean, half = statistics.mean(values), interval(values)
    if abs(mean - limit) > half:
        return "**yes**" if mean < limit else "**no**"
    return "probably" if mean < limit else "probably not"


def saving(row, gates):
    """What a row of results.csv saves: by the paper's count (None if its gates are not known), or of multiply-adds."""
    if not gates:
        return 1 - row["cost"]
    return None if row["tlops_saved"] == "" else row["tlops_saved"]


def above_exit(found, rows, gates, loss):
    """The rows that can be compared, and their losses relative to early exit's of the same seed and equal savings."""
    above = []
    for row in found:
        points = sorted((saving(other, gates), other["val_loss_sparse"]) for other in rows if other["model"] == "exit"
                        and all(other[key] == row[key] for key in ("family", "split", "seed", "n_embd")))
        share = saving(row, gates)
        if points and share is not None and points[0][0] <= share <= points[-1][0]:
            above.append((row, row[loss] / np.interp(share, *zip(*points)) - 1))     # between two confidences
    return zip(*above)


def loss_cells(claim, row, rows):
    """The cells of a model: how it is counted, its name with the number of seeds, saved, loss, verdict."""
    found, loss = group(rows)[row.run, "val"], "val_loss" if row.gates else "val_loss_sparse"
    if claim.baseline == "plain":
        above = above_full(found, rows, loss)
    else:
        found, above = above_exit(found, rows, row.gates, loss)
    saved = statistics.mean(share for share in (saving(one, row.gates) for one in found) if share is not None)
    answer = verdict(above, claim.limit)
    if saved < claim.least and answer != "**no**":
        answer = "saves too little"
    if found[0]["model"] == "plain":
        answer = ""
    return "gates" if row.gates else "run", f"{row.label} ({len(above)})", f"{saved:.0%}", shown(above, "+.2%"), answer


def harder_cells(row, rows):
    """Blocks of the easiest and the hardest fifth of the tokens, and the correlation of blocks with difficulty."""
    found = group([one for one in rows if one["correlation"] != ""])[row.run, "val"]
    correlations, fifths = ([one[key] for one in found] for key in ("correlation", "fifths"))
    easy, hard = (statistics.mean(one[k] for one in fifths) for k in (0, 4))
    return (f"{row.label} ({len(found)})", f"easiest fifth {easy:.1f} blocks, hardest {hard:.1f}; correlation "
            f"{shown(correlations, '.2f')}",
            verdict([-value for value in correlations], 0))


def parameter_cells():
    config = Config(**{name: value for name, value in PRESETS["paper"].items() if name in vars(Config())})
    tsa, plain = (sum(weight.numel() for weight in MODELS[name](config).parameters()) for name in ("tsa", "plain"))
    more = tsa / plain - 1
    answer = "**yes**" if f"{more:.1%}" == "1.7%" else "**no**"
    return "paper's size", f"{tsa:,}, plain {plain:,}: {more:.2%} more", answer


def speed_cells(row):
    """The speed-up over the plain model with all layers in clock.csv."""
    with open(CLOCK, newline="", encoding="utf-8") as file:
        times = list(csv.DictReader(file))
    width, work, batch, name = row.run
    place = {"text": "stdlib", "n_embd": str(width), "work": work, "batch": str(batch), "gates": name}
    one = [time for time in times if place.items() <= time.items()][-1]
    speed, low, high = (float(one[key]) for key in ("speedup", "low", "high"))
    answer = "**yes**" if low > 1 else "**no**" if high < 1 else "unclear"
    return (row.label, f"{speed:.2f} ({low:.2f} to {high:.2f}) times as fast as 12 plain layers",
            "" if "plain" in name else answer)


def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--all", action="store_true", help="also the rows that only the report has")
    args, rows = parser.parse_args(argv), read_csv()

    def chosen(models):
        return [row for row in models if row.short or args.all]

    print("the abstract|counted|model (seeds)|saved|loss|verdict\n---|---|---|---|---|---")
    for claim in CLAIMS:
        for k, row in enumerate(chosen(claim.rows)):
            print("" if k else claim.text, *loss_cells(claim, row, rows), sep="|")
    print("\nthe abstract|model (seeds)|measured|verdict\n---|---|---|---")
    for k, row in enumerate(chosen(HARDER)):
        print("" if k else "computes more for harder tokens", *harder_cells(row, rows), sep="|")
    print("1.7% more parameters", *parameter_cells(), sep="|")
    for k, row in enumerate(chosen(FASTER)):
        print("" if k else "faster in wall-clock time", *speed_cells(row), sep="|")


if __name__ == "__main__":
    main()
