"""
Find the best lambda of a gate design on the puzzle and print its row of the leaderboard:

    python -m report.sweep --gate half          about 25 minutes on one CPU core; further flags are those of train.py

All designs follow one rule. With seed 0, lambda grows about threefold (at most seven times) until the sparse loss
exceeds the limit. Of the earlier lambdas, the one with the fewest blocks per position makes the row if the mean loss of
five new seeds is within the limit, too; otherwise, the one with the next fewest is tried. Plain models and early exit
have no lambda: they are trained with the five seeds. The same command continues a sweep that was stopped and reuses
finished runs unless tsa.py, train.py or data.py has changed.
"""
import json
import re
import statistics
import sys
import zlib
from contextlib import redirect_stdout, suppress
from pathlib import Path

import data
import train
import tsa
from report.results import cost, interval

LIMIT, SEEDS, LAMS = 0.01, (1, 2, 3, 4, 5), (0.01, 0.03, 0.09, 0.3, 0.8, 2, 7, 20)
CODE = b"".join(Path(module.__file__).read_bytes() for module in (tsa, train, data))        # as it was imported
FOLDER = Path(f"out/sweep-{zlib.crc32(CODE):08x}")


def run(flags, seed):
    """Train a run, unless it is finished. Return its flags and scores; the loss of one that diverged is nan."""
    flags = ["--preset=chain", *flags, f"--seed={seed}"]
    name = re.sub(" (?!--)", "=", " ".join(flags))          # as in preset=chain-gate=half-lam=0.01-seed=0
    folder = FOLDER / re.sub(r"[^\w.=]+", "-", name).strip("-")
    if not (folder / "result.json").exists():
        resumes = (folder / "ckpt.pt").exists()
        FOLDER.mkdir(parents=True, exist_ok=True)
        print(f"{'resuming' if resumes else 'training'} {folder} (progress: {folder}.log)", flush=True)
        with open(f"{folder}.log", "a") as log, redirect_stdout(log), suppress(FloatingPointError):
            train.main([f"--resume={folder}"] if resumes else [*flags, f"--out_dir={folder}"])
    if (folder / "result.json").exists():
        return json.loads((folder / "result.json").read_text())
    return {"seed": seed, "val_loss_sparse": float("nan"), "blocks": float("nan")}


def mean(rows, name):
    return statistics.mean(row[name] for row in rows)


def within_limit(flags, rows):
    """Whether the mean sparse loss of the rows (one per seed) is within the limit. Print the means."""
    loss = mean(rows, "val_loss_sparse")
    print(f"{' '.join(flags)}, mean of {len(rows)}: {mean(rows, 'blocks'):.2f} blocks per position, loss {loss:.4f} "
          f"({'within' if loss <= LIMIT else 'exceeds'} the limit, {LIMIT})", flush=True)
    return loss <= LIMIT


def best(flags):
    """Apply the rule to a design with gates. Return the flags and the runs of its row."""
    candidates = []
    for lam in LAMS:
        tried = [*flags, f"--lam={lam}"]
        row = run(tried, 0)
        if not within_limit(tried, [row]):
            break
        candidates.append((row["blocks"], tried))
    for _, tried in sorted(candidates):
        rows = [run(tried, seed) for seed in SEEDS]
        if within_limit(tried, rows):
            return tried, rows
    raise SystemExit("no row: the loss exceeds the limit with every lambda tried")


def main(argv=None):
    flags = sys.argv[1:] if argv is None else argv
    if chosen := re.findall(r"--(?:preset|data|lam|seed|out_dir|resume|score)\b", " ".join(flags)):
        raise SystemExit(f"error: the sweep itself chooses {', '.join(chosen)}")
    if train.parse_flags(["--preset=chain", *flags])[0].model == "tsa":
        flags, rows = best(flags)
    else:
        rows = [run(flags, seed) for seed in SEEDS]
        if not within_limit(flags, rows):
            raise SystemExit("no row: the loss exceeds the limit")
    blocks, shares = [row["blocks"] for row in rows], [cost(row | {"family": "chain"}) for row in rows]
    print("design|blocks per position (95% interval)|multiply-adds (of 6 plain layers)|loss")
    print(f"`{' '.join(flags).replace('=', ' ')}`", f"{statistics.mean(blocks):.2f} ± {interval(blocks):.2f}",
          f"{statistics.mean(shares):.0%}", f"{mean(rows, 'val_loss_sparse'):.4f}", sep="|")


if __name__ == "__main__":
    main()
