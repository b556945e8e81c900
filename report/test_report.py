"""Tests of the programs in report/: the published numbers depend on them. Run with `python -m pytest -q`."""
import csv
import html
import json
import re
import sys
import time
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

@pytest.fixture
def trained(monkeypatch):
    """Fake training: a list of its runs, and a dictionary of losses by run, or of what it raises (default: 0.001)."""
    runs, losses = [], {}
    def main(flags):
        args = train.parse_flags(flags)[0]
        runs.append(run := (args.model, args.lam, args.seed))
        args.out_dir.mkdir()
        if isinstance(loss := losses.get(run, 0.001), BaseException):
            raise loss
        result = {"seed": args.seed, "val_loss_sparse": loss, "blocks": 1 + 0.01 / args.lam + 0.1 * args.seed}
        (args.out_dir / "result.json").write_text(json.dumps(result))
    monkeypatch.setattr(train, "main", main)
    return runs, losses

def test_sweep_follows_its_rule(trained, capsys):
    """Lambda triples until seed 0 fails. Fresh seeds decide; if one fails, the setting with the next fewest blocks."""
    runs, losses = trained
    losses |= {("tsa", 0.3, 0): FloatingPointError("diverged"), ("tsa", 0.09, 0): 0.01, ("tsa", 0.09, 3): 0.007}
    sweep.main(["--gate", "straight", "--halt"])
    assert runs == [("tsa", lam, 0) for lam in (0.01, 0.03, 0.09, 0.3)] + [("tsa", 0.09, seed) for seed in (1, 2, 3)]
    out = capsys.readouterr().out
    assert out.endswith("`--gate straight --halt --lam 0.09`|1.31 ± 0.10|0.0030\n") and out.count("exceeds") == 1
    losses["tsa", 0.09, 2] = 0.02
    sweep.main(["--gate=straight"])
    assert runs[-5:] == [("tsa", 0.09, 1), ("tsa", 0.09, 2), *(("tsa", 0.03, seed) for seed in (1, 2, 3))]
    losses |= {("tsa", lam, 1): 0.02 for lam in (0.01, 0.03, 0.09)}
    with pytest.raises(SystemExit, match="no row"):
        sweep.main(["--gate=skip"])
    sweep.main("--model=plain --n_layer=3 --max_iters=9 --seeds=2".split())
    assert runs[-2:] == [("plain", 0.001, 1), ("plain", 0.001, 2)]
    assert "because of --max_iters=9" in capsys.readouterr().out

def test_limit_on_text_is_relative_to_the_plain_model_of_the_same_seed(trained, monkeypatch):
    """Seeds differ by more than designs do. Plain models share the settings that are not part of a design."""
    runs, losses = trained
    losses |= {("plain", 0.001, seed): 1.0 + seed for seed in range(4)} | {("tsa", 0.003, 0): 1.0051}
    losses |= {("tsa", 0.001, seed): 1.0049 * (1.0 + seed) for seed in range(4)}
    monkeypatch.setattr(plot, "draw", MagicMock())
    sweep.main("--preset=deep --gate=stretch --n_layer=9 --gate_bias=0 --max_iters=9 --svg=x.svg".split())
    assert [row["seed"] for row in plot.draw.call_args.args[-1]] == [0, 1, 2, 3]        # the sweep's own plain models
    assert [run[1:] for run in runs if run[0] == "tsa"] == [(0.001, 0), (0.003, 0), (0.001, 1), (0.001, 2), (0.001, 3)]
    assert sweep.PRESETS["laptop"][0] == sweep.PRESETS["deep"][0] == 0.001          # the paper's lambda
    assert [path.name for path in Path("out").glob("*/*plain*=1")] == ["preset=deep-model=plain-max_iters=9-seed=1"]

def test_same_command_continues_a_sweep_unless_the_code_has_changed(trained, monkeypatch, capsys):
    """Finished runs are not trained again, but those of an older gate must not pass for a new one."""
    runs, losses = trained
    losses["tsa", 0.03, 0] = KeyboardInterrupt()        # before the first checkpoint
    with pytest.raises(KeyboardInterrupt):
        sweep.main(["--gate=skip"])
    (ckpt := next(Path("out").glob("*/*lam=0.03-seed=0")) / "ckpt.pt").touch()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):          # this time, after one
        patch.setattr(train, "main", resume := MagicMock(side_effect=KeyboardInterrupt))
        sweep.main(["--gate=skip"])
    assert ckpt.exists() and resume.call_args.args[0][-1] == f"--resume={ckpt.parent}"
    ckpt.unlink()
    losses["tsa", 0.03, 0] = 0.02
    for flags, n in ((["--gate_bias=-1"], 2 + 4), (["--gate_bias", "1"], 6 + 5), (["--gate_bias=1"], 11)):
        sweep.main(["--gate=skip", *flags])
        assert len(runs) == n
    assert sweep.CODE == b"".join((HERE / name).read_bytes() for name in ("tsa.py", "train.py", "data.py"))
    monkeypatch.setattr(sweep, "FOLDER", Path("out/sweep-edited"))
    sweep.main(["--gate=skip"])
    assert len(runs) == 11 + 5 and "code has changed" in capsys.readouterr().out

@pytest.fixture
def panels(monkeypatch):
    """Fake matplotlib: the panels of its figure, which draw nothing."""
    module, panels = MagicMock(), (MagicMock(), MagicMock())
    module.figure.Figure.return_value.subplots.return_value = panels
    monkeypatch.setitem(sys.modules, "matplotlib", module)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", module.figure)
    return panels

@pytest.mark.parametrize("flags", ["--lam 5", "--lam=5", "--lam_ramp 0", "--seed=1", "--out_dir x", "--gate nosuch",
                                   "--seeds 1", "--svg no/x.svg", "--svg x.svg --preset laptop"])
def test_sweep_notices_mistakes_before_the_first_run(flags, trained, panels, capsys):
    """It takes 20 minutes, or hours."""
    with pytest.raises(SystemExit):
        sweep.main(flags.split())
    assert " error: " in capsys.readouterr().err and not trained[0]

def test_figure_shows_the_readers_row(trained, panels):
    """A star at its means; on text, its loss is relative to plain models of the same sweep and seed."""
    plot.main(["--svg=x.svg"])
    assert {call.kwargs.get("label") for call in panels[0].errorbar.call_args_list} == {None, *plot.MARKS}
    drawn = {f"{x:.0f}%|{y:+.2f}%" for x, y in (call.args for call in panels[1].errorbar.call_args_list)}
    cells = re.findall(r"\|(\d+%\|[+-]\d\.\d\d%) ±", (HERE / "README.md").read_text(encoding="utf-8"))
    assert len(cells) == 4 and drawn >= set(cells)          # README's table on text
    sweep.main(["--gate=skip", "--svg=x.svg"])
    star = panels[0].errorbar.call_args
    assert star.args == (pytest.approx(1 + 0.01 / 20 + 0.2), 0.001) and star.kwargs["label"] == "--gate skip --lam 20"
    size = {"model": "plain", "n_layer": 12, "n_embd": 128, "block_size": 64, "vocab_size": 166, "blocks": 12}
    plain = [size | {"seed": seed, "val_loss": 1.0 + seed} for seed in (1, 2)]
    own = [row | {"n_layer": 6, "blocks": 6, "val_loss_sparse": 1.01 * row["val_loss"]} for row in plain]
    plot.draw("x.svg", "deep", "half", own, plain)
    assert panels[1].errorbar.call_args.kwargs["yerr"] == pytest.approx(0, abs=1e-9)
    assert panels[1].errorbar.call_args.args == pytest.approx((50.43, 1.0), abs=0.01)      # % of 12 layers, above them
    plot.draw("x.svg", "deep", "plain", own)            # without its own plain models, relative to those of the page
    assert panels[1].errorbar.call_args.args[1] > 50

def test_rows_are_scored_on_validation_and_unseen_data(monkeypatch):
    """A setting must also hold on data that did not choose it. A second score of a run replaces the first."""
    assert plot.blocks_needed("7ab4dc") == [1, 1, 2, 1, 1, 2] and plot.blocks_needed("7abcdefgh")[-1] == 4      # 8 hops
    fit("--preset chain --data chain --block_size 30 --max_iters 2 --gate skip")
    Path("run").rename("gate=skip-seed=0")
    monkeypatch.setattr(plot, "CSV", Path("r.csv"))
    plot.CSV.write_bytes((HERE / "report/results.csv").read_bytes())
    n, (model, _), corpus = len(plot.read_csv()), load_checkpoint("gate=skip-seed=0/ckpt.pt"), data.chain(seed=1)
    for _ in range(2):
        plot.main(["gate=skip-seed=0", "--about", "commit=abc"])
    *old, val, unseen, soft = plot.read_csv()
    assert len(old) == n and (val["run"], unseen["split"], soft["run"]) == ("gate=skip", "test", "gate=soft")
    assert val["val_loss"] == soft["val_loss"] and val["val_loss_sparse"] != soft["val_loss_sparse"]
    idx, targets = corpus.windows("val", 30)
    logits, gates = model(idx, sparse=True)
    needed = torch.tensor([plot.blocks_needed([corpus.vocab[i] for i in text]) for text in idx])
    accuracy = (logits.argmax(-1) == targets).double().mean().item()
    assert unseen["commit"] == "abc" and unseen["accuracy"] == pytest.approx(accuracy)
    assert unseen["exact"] == pytest.approx(((gates != 0).sum(0) == needed)[needed > 1].double().mean().item())
    assert unseen["blocks"] == pytest.approx((gates != 0).double().mean((1, 2)).sum().item())
    fit("--max_iters 1")
    windows = data.load("t.txt").windows("test", 16)
    loss, _ = train.evaluate(load_checkpoint("run/ckpt.pt")[0], *windows, sparse=False)
    _, unseen = plot.score(Path("run"), {})
    assert unseen["val_loss"] == pytest.approx(loss) and unseen["family"] == "t.txt"    # of a text, the test split

def test_models_are_compared_at_equal_multiply_adds_with_their_own_seed():
    """Seeds differ by more than models do, so only paired differences say anything. Seed 0 has chosen lambda."""
    t = plot.T_95[3]        # with 2 degrees of freedom, Student's t has a closed form
    assert 0.5 + t / 2 / (2 + t * t) ** 0.5 == pytest.approx(0.975, abs=1e-5)
    assert plot.interval([1.0, 2.0, 6.0]) == pytest.approx(t * 7 ** 0.5 / 3 ** 0.5)
    def row(model, seed, cost, loss):
        return {"model": model, "run": f"{model}-lam=1", "family": "a", "split": "val", "variant": "", "seed": seed,
                "n_embd": 8, "cost": cost, "val_loss": loss, "val_loss_sparse": loss}
    plain = [row("plain", seed, *point) for seed in (0, 1) for point in ((1, 1.0 + seed), (0.8, 1.1 + seed))]
    plain.append(row("plain", 2, 0.9, 1.0))             # seed 2 has no full plain model, and so no comparison
    ours = [row("tsa", 0, 0.9, 1.0), row("tsa", 1, 0.8, 2.5), row("tsa", 1, 0.7, 2.5), row("tsa", 2, 0.9, 2.5)]
    others = [other | {"val_loss": 9.0} | changed for other in plain
              for changed in ({"split": "test"}, {"family": "b"}, {"variant": "x"}, {"n_embd": 9})]
    assert plot.against_plain(ours, plain + others) == pytest.approx([1.0 - 1.05, 2.5 - 2.1])       # no extrapolation
    assert plot.above_full(ours, plain + others) == pytest.approx([0, 0.25, 0.25])
    assert plot.group(ours)["tsa-lam=1", "val"] == ours[1:]

def test_numbers_on_the_pages_are_those_of_results_and_clock():
    """A table that drifts away from its rows costs a reader's trust."""
    readme, report = ((HERE / name).read_text(encoding="utf-8") for name in ("README.md", "report/README.md"))
    lines = plot.table(rows := plot.read_csv())
    cells = {"1.4422", "1.4482"} | {cell for line in lines for cell in line}        # of the paper; means over seeds
    cells |= {f"{row[name]:.4f}" for row in rows for name in ("val_loss", "val_loss_sparse")}
    assert all(plot.cost(row) == pytest.approx(row["cost"]) for row in rows if row["variant"] != "noffn")
    assert all(len({run.partition("-lam=")[0] for run in runs}) == 1 for _, _, *runs in plot.MARKS.values())
    assert not any(line[-2] for line in lines if "chain" in line[0])       # percentages of a loss near 0 mislead
    numbers = r"[+-]?\d\.\d{4} ± \d\.\d{4}|\d\.\d\d ± \d\.\d\d|[+-]?\d+\.\d+% ± \d+\.\d+%|\b1\.\d{4}\b"
    used = set(re.findall(numbers, readme + report))
    assert len(rows) > 500 and len(used) > 60 and not used - cells, used - cells
    leaderboard = re.findall(r"^`--(.*)`\|(.*)\|(.*)$", readme, flags=re.MULTILINE)
    found = {line[0]: (line[5], line[4].split()[0]) for line in lines if line[1] == "val"}
    for flags, *cells in leaderboard:
        assert found["preset=chain-" + flags.replace(" --", "-").replace(" ", "=")] == tuple(cells)
    assert len(leaderboard) > 3
    name = "preset=laptop-gate=soft-data=shakespeare-lam=0.001"
    first, = (row for row in rows if (row["run"], row["split"], row["seed"]) == (name, "val", 0))
    assert f"runs {first['blocks']:.2f} of 6 blocks, saving {float(first['saved']):.1%} of" in readme
    with open(HERE / "report/clock.csv", newline="") as file:
        times = list(csv.DictReader(file))
    python = {f"{float(row['speedup']):.2f}" for row in times if (row["n_embd"], row["batch"]) == ("128", "64")}
    speeds = re.findall(r"\|(\d\.\d\d) times", readme)
    assert len(speeds) == 4 and python >= set(speeds)
    ratios = {f"{float(row['speedup']):.2f} ({float(row['predicted']):.2f})" for row in times}
    used = set(re.findall(r"\d\.\d\d \(\d\.\d\d\)", report))
    assert len(used) > 20 and not used - ratios, used - ratios

def test_shipped_chain_model_runs_the_blocks_that_the_readme_says():
    """A reader may count them."""
    (model, _), corpus = load_checkpoint(HERE / "report/chain.pt"), data.load("chain")
    idx, targets = corpus.windows("val", 30)
    with torch.no_grad():
        logits, gates = model(idx, sparse=True)
    points = idx - len(data.DIGITS)             # the place that a letter points to, below 0 for a digit
    hops = torch.zeros_like(idx)
    for t in range(30):
        hops[:, t] = torch.where(points[:, t] < 0, 0, 1 + hops.gather(1, points[:, t:t + 1].clamp(min=0))[:, 0])
    blocks, shares = (gates != 0).sum(0), []
    for least, most, needed in ((0, 1, 1), (2, 2, 2), (3, 3, 2), (4, 4, 3)):
        shares.append(f"{(blocks == needed)[(hops >= least) & (hops <= most)].double().mean().item():.0%}")
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    assert f"tokens that run exactly as many|{'|'.join(shares)}\n" in readme
    assert f"{(logits.argmax(-1) == targets).double().mean().item():.1%} of the answers" in readme

def test_maps_on_the_page_are_what_sample_prints(capsys):
    """The pictures are the first thing that a reader sees."""
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    sample.main([str(HERE / "report/chain.pt"), "--device=cpu"])
    assert f"$ python sample.py report/chain.pt\n{capsys.readouterr().out.strip()}\n" in readme
    sample.main([str(HERE / "report/python-skip.pt"), "--map", "--device=cpu"])
    picture = html.unescape(re.sub(r"<[^>]*>", "", (HERE / "report/map.svg").read_text("utf-8")))
    for line in capsys.readouterr().out.splitlines():
        assert "".join(line.split()) in re.sub(r"\s", "", picture)

def test_clock_times_what_it_says(monkeypatch, capsys):
    """The models take turns, gates are open as asked, and `predicted` is what their multiply-adds promise."""
    def rows(*flags):
        clock.main([*flags, "--device=cpu", "--seconds=0", "--csv=c.csv"])
        with open("c.csv", newline="") as file:
            return list(csv.DictReader(file))
    monkeypatch.setattr(torch.accelerator, "synchronize", MagicMock())
    assert clock.seconds_of(lambda: time.sleep(0.01), "cuda") >= 0.01 and torch.accelerator.synchronize.called
    gates_of, shapes = clock.gates_of, set()
    monkeypatch.setattr(clock, "gates_of", lambda *args: shapes.add(args[2].shape) or gates_of(*args))
    random = rows("--layers", "2", "--n_embd", "16", "--works", "prefill 8")
    assert shapes == {(8, 256)}
    assert [float(row["open"]) for row in random] == pytest.approx([1, *clock.SHARES], abs=0.1)
    times = iter([4.0, 2.0, 1.0, 8.0, 2.0, 1.0, 9.0, 3.0, 3.0] * 5)
    monkeypatch.setattr(clock, "seconds_of", lambda call, device: call() is None or next(times))
    plain6, plain3, chain, *_, decoding = rows(f"{HERE}/report/chain.pt", "--layers", "6", "3")[4:]
    assert [float(row["speedup"]) for row in (plain6, plain3, chain)] == [1, 3, 4] and float(plain6["ms"]) == 8000
    assert decoding["gates"].endswith("chain.pt") and float(decoding["ms"]) == 1000 / 15       # 15 tokens in a round
    assert float(plain3["predicted"]) == pytest.approx(1 / 0.504, abs=0.01) and 0.05 < float(chain["open"]) < 0.15
    assert chain["n_embd"] == "64" and [row["batch"] for row in random] == 4 * ["8"]
