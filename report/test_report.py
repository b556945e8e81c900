"""Tests of the programs in report/: the published numbers depend on them. Run with `python -m pytest -q`."""
import csv
import html
import json
import re
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

import data
import sample
import train
from report import clock, plot, sweep
from test_tsa import HERE, fit, folder          # noqa: F401
from tsa import load_checkpoint

README, REPORT = ((HERE / name).read_text(encoding="utf-8") for name in ("README.md", "report/README.md"))

@pytest.fixture
def trained(monkeypatch):
    """Fake training: a list of the runs, and a dictionary of losses by run (or of what it raises); others reach 0.001."""
    runs, losses = [], {}
    def main(flags):
        args = train.parse_flags(flags)[0]
        runs.append(run := (args.model, args.lam, args.seed))
        args.out_dir.mkdir()
        if isinstance(loss := losses.get(run, 0.001), BaseException):
            raise loss
        result = {"seed": args.seed, "val_loss_sparse": loss, "blocks": 1 + 0.01 / args.lam}       # fewer with larger lambda
        (args.out_dir / "result.json").write_text(json.dumps(result))
    monkeypatch.setattr(train, "main", main)
    return runs, losses

def test_sweep_follows_its_rule(trained, capsys):
    """Lambda triples until seed 0 fails. Fresh seeds decide; if one fails, the setting with the next fewest blocks does."""
    runs, losses = trained
    losses |= {("tsa", 0.3, 0): FloatingPointError("diverged"), ("tsa", 0.09, 0): 0.01, ("tsa", 0.09, 3): 0.007}
    sweep.main(["--gate", "straight", "--halt"])
    assert runs == [("tsa", lam, 0) for lam in (0.01, 0.03, 0.09, 0.3)] + [("tsa", 0.09, seed) for seed in (1, 2, 3)]
    assert capsys.readouterr().out.endswith("`--gate straight --halt --lam 0.09`|1.11 ± 0.00|0.0030\n")
    losses["tsa", 0.09, 2] = 0.02
    sweep.main(["--gate=straight"])
    assert runs[-5:] == [("tsa", 0.09, 1), ("tsa", 0.09, 2), *(("tsa", 0.03, seed) for seed in (1, 2, 3))]
    losses |= {("tsa", lam, 1): 0.02 for lam in (0.01, 0.03, 0.09)}
    with pytest.raises(SystemExit, match="no row"):
        sweep.main(["--gate=skip"])
    sweep.main("--model=plain --n_layer=3 --max_iters=9 --seeds=2".split())
    assert runs[-2:] == [("plain", 0.001, 1), ("plain", 0.001, 2)]
    assert "because of --max_iters=9" in capsys.readouterr().out

def test_limit_on_text_is_relative_to_the_plain_model_of_the_same_seed(trained):
    """Seeds differ by more than designs do. Plain models share the settings that are not part of a design."""
    runs, losses = trained
    losses |= {("plain", 0.001, seed): 1.0 + seed for seed in range(4)} | {("tsa", 0.003, 0): 1.0051}
    losses |= {("tsa", 0.001, seed): 1.0049 * (1.0 + seed) for seed in range(4)}
    sweep.main("--preset=deep --gate=stretch --n_layer=9 --max_iters=9".split())
    assert [run[1:] for run in runs if run[0] == "tsa"] == [(0.001, 0), (0.003, 0), (0.001, 1), (0.001, 2), (0.001, 3)]
    assert [path.name for path in Path("out").glob("*/*plain*=1")] == ["preset=deep-model=plain-max_iters=9-seed=1"]

def test_same_command_continues_a_sweep_unless_the_code_has_changed(trained, monkeypatch):
    """Finished runs are not trained again, but those of an older gate must not pass for a new one."""
    runs, losses = trained
    losses["tsa", 0.03, 0] = KeyboardInterrupt()        # before the first checkpoint
    with pytest.raises(KeyboardInterrupt):
        sweep.main(["--gate=skip"])
    losses["tsa", 0.03, 0] = 0.02
    for flags, n in ((["--gate_bias=-1"], 2 + 4), (["--gate_bias", "1"], 6 + 5), (["--gate_bias=1"], 11)):
        sweep.main(["--gate=skip", *flags])
        assert len(runs) == n
    monkeypatch.setattr(sweep, "CODE", b"edited")
    sweep.main(["--gate=skip"])
    assert len(runs) == 11 + 5

@pytest.fixture
def figure(monkeypatch):
    """Fake matplotlib: its figure, which draws nothing."""
    module = MagicMock()
    monkeypatch.setitem(sys.modules, "matplotlib", module)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", module.figure)
    module.figure.Figure.return_value.subplots.return_value = MagicMock(), MagicMock()
    return module.figure.Figure.return_value

@pytest.mark.parametrize("flags", ["--lam 5", "--lam=5", "--lam_ramp 0", "--seed=1", "--out_dir x", "--gate nosuch",
                                   "--svg no/x.svg", "--svg x.svg --preset laptop"])
def test_sweep_notices_mistakes_before_the_first_run(flags, trained, figure, capsys):
    """It takes 20 minutes, or hours."""
    figure.savefig.side_effect = OSError("No such file or directory")
    with pytest.raises(SystemExit):
        sweep.main(flags.split())
    assert " error: " in capsys.readouterr().err and not trained[0]

def test_figure_shows_the_readers_row(trained, figure):
    """As a star with the design's name, at its blocks per token and loss."""
    sweep.main(["--gate=skip", "--svg=x.svg"])
    left, right = figure.subplots.return_value
    star = left.errorbar.call_args
    assert star.args == (pytest.approx(1 + 0.01 / 20), 0.001) and star.kwargs["label"] == "--gate skip --lam 20"
    assert left.errorbar.call_count == 2 * (5 + 6) + 1 and figure.savefig.call_args.args == ("x.svg",)

def test_rows_are_scored_on_validation_and_unseen_data(monkeypatch):
    """A setting must also hold on data that did not choose it. A second score of a run replaces the first."""
    assert plot.blocks_needed("7ab4dc") == [1, 1, 2, 1, 1, 2]
    fit("--preset chain --data chain --block_size 30 --max_iters 2 --gate skip --out_dir gate=skip-seed=0")
    monkeypatch.setattr(plot, "CSV", Path("r.csv"))
    plot.CSV.write_bytes(before := (HERE / "report/results.csv").read_bytes())
    for _ in range(2):
        plot.main(["gate=skip-seed=0", "--about", "commit=abc"])
    *old, soft, soft_unseen, skip, unseen = plot.read_csv()
    assert len(old) == before.count(b"\n") - 1 and (soft["run"], skip["run"]) == ("gate=soft", "gate=skip")
    (model, _), corpus = load_checkpoint("gate=skip-seed=0/ckpt.pt"), data.chain(seed=1)
    idx, targets = corpus.windows("val", 30)
    logits, gates = model(idx, sparse=True)
    blocks, needed = (gates != 0).sum(0), torch.tensor([plot.blocks_needed([corpus.vocab[i] for i in row]) for row in idx])
    assert unseen["accuracy"] == pytest.approx((logits.argmax(-1) == targets).double().mean().item())
    assert unseen["exact"] == pytest.approx((blocks == needed)[needed > 1].double().mean().item())
    assert unseen["blocks"] == pytest.approx(blocks.double().mean().item()) and unseen["cost"] == plot.cost(unseen)
