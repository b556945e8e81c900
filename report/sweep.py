"""
Find the best lambda of a gate design, print its row of the leaderboard, and draw it into the figure:

    python -m report.sweep --gate half --svg half.svg       on chains (about 20 minutes on one CPU core)
    python -m report.sweep --gate half --preset deep        on Python's sources (hours)

All designs follow one rule. With seed 0, lambda triples until the sparse loss exceeds the limit: 0.01 on chains; on
text, as in the paper's abstract, 0.5% above the plain model of the same seed. Of the settings within the limit, the one
with the fewest blocks per token makes the row if fresh seeds (1, 2 and 3) stay within it, too; otherwise, the next one
is tried. The same command continues a sweep that was stopped, and reuses finished runs unless the code has changed.
"""
import argparse
import itertools
import json
import shutil
import statistics
import tempfile
import time
import zlib
from contextlib import redirect_stdout, suppress
from pathlib import Path

import data
import train
import tsa
from report import plot

PRESETS = {"chain": (0.01, 2), "laptop": (0.001, 6), "deep": (0.001, 15)}      # first lambda, minutes a run on one core
N_LAMS = 8                                                                      # 0.01, 0.03, 0.09, 0.3, ...
DESIGN = {"model", "gate", "gate_bias", "halt", "confidence", "n_layer"}        # what may differ from row to row
CODE = b"".join(Path(module.__file__).read_bytes() for module in (tsa, train, data))        # as it was imported
FOLDER = Path(f"out/sweep-{zlib.crc32(CODE):08x}")


class Sweep:
    def __init__(self, preset, flags, n_seeds):
        self.preset, self.flags, self.seeds = preset, flags, range(1, n_seeds + 1)
        self.shared = [flag for flag in flags if flag[2:].partition("=")[0] not in DESIGN]      # with its plain models
        (self.first_lam, self.minutes), self.plain, self.left = PRESETS[preset], {}, 0          # plain rows by seed

    def run(self, flags, seed):
        """Train a run, unless it is finished. Return its flags and scores; the loss of one that diverged is nan."""
        flags, began = [f"--preset={self.preset}", *flags, f"--seed={seed}"], time.perf_counter()
        folder = FOLDER / "-".join(flag[2:].replace("/", "_") for flag in flags)
        if not (folder / "result.json").exists():
            resumes = (folder / "ckpt.pt").exists()
            if not resumes:
                shutil.rmtree(folder, ignore_errors=True)       # stopped before its first checkpoint
            FOLDER.mkdir(parents=True, exist_ok=True)
            print(f"{'resuming' if resumes else 'training'} {folder} (progress: {folder}.log)", flush=True)
            with open(f"{folder}.log", "a") as log, redirect_stdout(log), suppress(FloatingPointError):
                train.main([*flags, f"--{'resume' if resumes else 'out_dir'}={folder}"])
            self.minutes = (time.perf_counter() - began) / 60
        row = {"seed": seed, "val_loss_sparse": float("nan"), "blocks": float("nan")}
        if (folder / "result.json").exists():
            row = json.loads((folder / "result.json").read_text())
        self.left -= 1
        print(f"  {' '.join(flags[1:])}: loss {row['val_loss_sparse']:.4f}, {row['blocks']:.2f} blocks per token. "
              f"At most {self.left} more runs, {self.left * self.minutes:.0f} min", flush=True)
        return row

    def fits(self, row):
        """Whether a row's sparse loss is within the limit."""
        limit, seed = 0.01, row["seed"]
        if self.preset != "chain":
            if seed not in self.plain:
                self.plain[seed] = self.run(["--model=plain", *self.shared], seed)
            limit = 1.005 * self.plain[seed]["val_loss_sparse"]
        if not row["val_loss_sparse"] <= limit:
            print(f"  a loss of {row['val_loss_sparse']:.4f} exceeds the limit, {limit:.4f}", flush=True)
        return row["val_loss_sparse"] <= limit

    def best(self):
        """Apply the rule. Return the flags of the row, and its runs."""
        gated, text = not any(flag.startswith("--model=") for flag in self.flags), self.preset != "chain"
        fresh = len(self.seeds) * (1 + (gated and text))        # on text, a plain model for each seed, too
        self.left = fresh + gated * (N_LAMS + text)
        print(f"at most {self.left} runs, {self.left * self.minutes} min, unless a fresh seed fails")
        if not gated:
            return self.flags, [self.run(self.flags, seed) for seed in self.seeds]
        flags = [[*self.flags, f"--lam={float(f'{self.first_lam * 3 ** k:.1g}'):g}"] for k in range(N_LAMS)]
        passed = itertools.takewhile(self.fits, (self.run(flags[k], 0) for k in range(N_LAMS)))
        for _, k in sorted((row["blocks"], k) for k, row in enumerate(passed)):
            self.left = fresh
            rows = list(itertools.takewhile(self.fits, (self.run(flags[k], seed) for seed in self.seeds)))
            if len(rows) == len(self.seeds):
                return flags[k], rows
        raise SystemExit("no row: each lambda exceeds the limit with some seed")


def main(argv=None):
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Further flags are those of train.py.")
    parser.add_argument("--preset", choices=PRESETS, default="chain")
    parser.add_argument("--seeds", type=int, choices=range(2, 7), default=3, help="number of fresh seeds (default: 3)")
    parser.add_argument("--svg", help="draw the row into this file (chain and deep; needs matplotlib)")
    args, flags = parser.parse_known_args(argv)
    if chosen := {flag.partition("=")[0] for flag in flags} & set("--lam --lam_ramp --seed --out_dir --resume".split()):
        parser.error(f"the sweep itself chooses {', '.join(chosen)}")
    given, default = (vars(train.parse_flags([f"--preset={args.preset}", *more])[0]) for more in (flags, []))
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()
             if value != default[name] or name == "gate" and given["model"] == "tsa"]
    if args.svg:
        try:
            with tempfile.TemporaryFile(dir=Path(args.svg).parent) as file:
                plot.draw(file, args.preset)        # already now, to notice a missing folder or matplotlib
        except (ImportError, OSError, ValueError) as error:
            parser.error(f"--svg: {error}")
    if not FOLDER.exists() and any(Path("out").glob("sweep-*")):
        print("the code has changed since the last sweep: this one starts anew")
    sweep = Sweep(args.preset, flags, args.seeds)
    flags, rows = sweep.best()
    blocks, loss = ([row[name] for row in rows] for name in ("blocks", "val_loss_sparse"))
    design = " ".join(flags).replace("=", " ")
    print(f"design|blocks per token|loss\n`{design}`|{statistics.mean(blocks):.2f} ± {statistics.stdev(blocks):.2f}|"
          f"{statistics.mean(loss):.4f}")
    if others := [flag for flag in sweep.shared if not flag.startswith(("--device", "--dtype"))]:
        print(f"not comparable with the leaderboard, because of {' '.join(others)}")
    if args.svg:
        plot.draw(args.svg, args.preset, design, rows, sweep.plain.values())


if __name__ == "__main__":
    main()
