"""
Find the best lambda of a gate design, and print its row of the leaderboard:

    python -m report.sweep --gate half                      on the puzzle (about 25 minutes on one CPU core)
    python -m report.sweep --gate half --preset deep        on Python's standard library (hours)

All designs follow one rule. With seed 0, lambda triples (at most seven times) until the sparse loss exceeds the limit.
Of the earlier lambdas, the one with the fewest blocks per token makes the row if the mean loss of five fresh seeds is
within the limit, too; otherwise, the one with the next fewest is tried. The limit is 0.01 on the puzzle. On text, as in
the paper's abstract, it is 0.5% above the plain model (the mean of the same seeds). Plain models and early exit have no
lambda: they are trained with the five seeds. The same command continues a sweep that was stopped, and reuses finished
runs unless the code or the text has changed.
"""
import argparse
import json
import re
import statistics
import zlib
from contextlib import redirect_stdout, suppress
from functools import cache
from pathlib import Path

import data
import train
import tsa
from report.results import cost, interval

PRESETS = {"chain": 0.01, "laptop": 0.001, "deep": 0.001}                       # the first lambda
N_LAMS, SEEDS = 8, (1, 2, 3, 4, 5)                                              # 0.01, 0.03, 0.09, 0.3, ...
DESIGN = {"model", "gate", "gate_bias", "halt", "confidence", "n_layer"}        # what may differ from row to row
CODE = b"".join(Path(module.__file__).read_bytes() for module in (tsa, train, data))        # as it was imported


@cache
def folder_of(text):
    """The folder of the runs on a text (a name, as for --data): another one if the code or the text has changed."""
    return Path(f"out/sweep-{zlib.crc32(CODE, data.load(text).checksum()):08x}")


def run(preset, flags, seed):
    """Train a run, unless it is finished. Return its flags and scores; the loss of one that diverged is nan."""
    flags = [f"--preset={preset}", *flags, f"--seed={seed}"]
    text = train.parse_flags(flags)[0].data
    folder = folder_of(text) / "-".join(re.sub(r"[^\w.=-]", "_", flag[2:]) for flag in flags)
    if not (folder / "result.json").exists():
        resumes = (folder / "ckpt.pt").exists()
        folder.parent.mkdir(parents=True, exist_ok=True)
        print(f"{'resuming' if resumes else 'training'} {folder} (progress: {folder}.log)", flush=True)
        with open(f"{folder}.log", "a") as log, redirect_stdout(log), suppress(FloatingPointError):
            train.main([f"--resume={folder}"] if resumes else [*flags, f"--out_dir={folder}"])
    if (folder / "result.json").exists():
        return json.loads((folder / "result.json").read_text())
    return {"seed": seed, "val_loss_sparse": float("nan"), "blocks": float("nan")}


def mean(rows, name):
    return statistics.mean(row[name] for row in rows)


def within_limit(preset, flags, shared, rows):
    """Whether the mean sparse loss of the rows (one per seed) is within the limit. Print the means."""
    limit, loss = 0.01, mean(rows, "val_loss_sparse")
    if preset != "chain":
        limit = 1.005 * mean([run(preset, ["--model=plain", *shared], row["seed"]) for row in rows], "val_loss_sparse")
    print(f"{' '.join(flags)}, mean of {len(rows)}: {mean(rows, 'blocks'):.2f} blocks per token, loss {loss:.4f} "
          f"({'within' if loss <= limit else 'exceeds'} the limit, {limit:.4f})", flush=True)
    return loss <= limit


def best(preset, flags, shared):
    """Apply the rule to a design with gates. Return the flags and the runs of its row."""
    candidates = []
    for k in range(N_LAMS):
        tried = [*flags, f"--lam={float(f'{PRESETS[preset] * 3 ** k:.1g}'):g}"]
        row = run(preset, tried, 0)
        if not within_limit(preset, tried, shared, [row]):
            break
        candidates.append((row["blocks"], tried))
    for _, tried in sorted(candidates):
        rows = [run(preset, tried, seed) for seed in SEEDS]
        if within_limit(preset, tried, shared, rows):
            return tried, rows
    raise SystemExit("no row: the loss exceeds the limit with every lambda")


def main(argv=None):
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Further flags are those of train.py.")
    parser.add_argument("--preset", choices=PRESETS, default="chain")
    args, flags = parser.parse_known_args(argv)
    chosen = {flag.partition("=")[0] for flag in flags} & {"--lam", "--seed", "--out_dir", "--resume", "--score"}
    if chosen:
        parser.error(f"the sweep itself chooses {', '.join(chosen)}")
    given, default = (vars(train.parse_flags([f"--preset={args.preset}", *more])[0]) for more in (flags, []))
    if given["data"] == "auto":
        given["data"] = data.shakespeare_or_stdlib()        # once, so that all runs train on the same text
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()
             if value != default[name] or name == "gate" and given["model"] == "tsa"]
    shared = [flag for flag in flags if flag[2:].partition("=")[0] not in DESIGN]       # with its plain models
    if given["model"] == "tsa":
        flags, rows = best(args.preset, flags, shared)
    else:
        rows = [run(args.preset, flags, seed) for seed in SEEDS]
        within_limit(args.preset, flags, shared, rows)
    rows = [row | {"family": args.preset} for row in rows]
    design, half = " ".join(flags).replace("=", " "), interval([row["blocks"] for row in rows])
    numbers = f"{statistics.mean(map(cost, rows)):.0%}|{mean(rows, 'val_loss_sparse'):.4f}"
    print("design|blocks per position (95% interval)|multiply-adds|loss\n"
          f"`{design}`|{mean(rows, 'blocks'):.2f} ± {half:.2f}|{numbers}")
    if others := [flag for flag in shared if not flag.startswith(("--device", "--dtype"))]:
        print(f"not comparable with the leaderboard, because of {' '.join(others)}")


if __name__ == "__main__":
    main()
