"""Tests of the programs in report/: the published numbers depend on them. Run with `python -m pytest -q`."""
import csv
import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import sample
import train
from report import clock, plot, results, sweep
from test_tsa import HERE, fit, folder          # noqa: F401
from tsa import load_checkpoint

PAGES = {name: (HERE / name).read_text(encoding="utf-8") for name in ("README.md", "report/README.md")}


@pytest.fixture
def losses(monkeypatch):
    """Replace training: a dictionary of sparse losses by (model, lam, seed); all other runs reach 0.001."""
    losses = {}

    def main(flags):
        args = train.parse_flags(flags)[0]
        args.out_dir.mkdir()
        loss = losses.get((args.model, args.lam, args.seed), 0.001)
        sizes = {"n_layer": 6, "n_embd": 64, "block_size": 30, "vocab_size": 34}
        result = {"model": args.model, "gate": args.gate, "seed": args.seed, "val_loss": loss, "val_loss_sparse": loss,
                  "blocks": 1 + 0.01 / args.lam} | sizes
        (args.out_dir / "result.json").write_text(json.dumps(result))
    monkeypatch.setattr(train, "main", main)
    return losses


def runs():
    """The runs that a sweep has trained, as (lambda, seed)."""
    found = [re.search(r"lam=(.*)-seed=(\d)$", folder.name) for folder in Path("out").glob("sweep-*/*gate=*")]
    return sorted((float(match[1]), int(match[2])) for match in found if match)


def test_lambda_triples_until_seed_0_exceeds_the_limit(losses, capsys):
    """The rule is the same for all designs; otherwise the leaderboard would compare how long somebody searched."""
    losses["tsa", 0.3, 0] = 0.011
    sweep.main(["--gate", "straight", "--halt"])
    assert runs() == sorted([(0.01, 0), (0.03, 0), (0.09, 0), (0.3, 0)] + [(0.09, seed) for seed in range(1, 6)])
    assert capsys.readouterr().out.endswith("`--gate straight --halt --lam 0.09`|1.11 ± 0.00|37%|0.0010\n")


def test_mean_of_five_fresh_seeds_decides(losses, capsys):
    """One unlucky seed must not rule a design out, but a bad mean must: then the next lambda is tried."""
    losses |= {("tsa", 0.3, 0): 0.02, ("tsa", 0.09, 3): 0.04, ("tsa", 0.09, 4): 0.04, ("tsa", 0.03, 2): 0.04}
    sweep.main(["--gate=straight"])
    assert "`--gate straight --lam 0.03`" in capsys.readouterr().out


def test_limit_on_text_is_half_a_percent_above_plain_models(losses):
    """This is the paper's own criterion."""
    losses |= {("plain", 0.001, seed): 1.0 + seed for seed in range(6)} | {("tsa", 0.003, 0): 1.0051}
    losses |= {("tsa", 0.001, seed): 1.0049 * (1.0 + seed) for seed in range(6)}
    sweep.main("--preset=deep --gate=stretch".split())
    assert runs() == [(0.001, seed) for seed in range(6)] + [(0.003, 0)]


def test_sweep_without_a_row_says_so(losses):
    """A design whose loss is too high with every lambda has no place on the leaderboard."""
    losses["tsa", 0.01, 0] = 0.02
    with pytest.raises(SystemExit, match="no row"):
        sweep.main(["--gate=skip"])


def test_same_command_continues_a_sweep_unless_the_code_has_changed(losses, monkeypatch, capsys):
    """Finished runs are not trained again, but those of an older gate must not pass for a new one."""
    sweep.main(["--model=plain"])
    sweep.main(["--model=plain"])
    assert capsys.readouterr().out.count("training") == 5
    monkeypatch.setattr(sweep, "FOLDER", Path("out/sweep-edited"))
    sweep.main(["--model=plain"])
    assert capsys.readouterr().out.count("training") == 5
    assert sweep.CODE == b"".join((HERE / name).read_bytes() for name in ("tsa.py", "train.py", "data.py"))


@pytest.mark.parametrize("flags", ["--lam 5", "--seed=1", "--out_dir x", "--gate nosuch", "--svg no/x.svg"])
def test_sweep_notices_mistakes_before_the_first_run(flags, losses):
    """It takes 25 minutes, or hours."""
    with pytest.raises(SystemExit):
        sweep.main(flags.split())
    assert not Path("out").exists()


def test_blocks_needed_are_the_logarithm_of_the_hops():
    """All tokens hop at once: two blocks make three hops, three blocks seven."""
    assert results.blocks_needed("7ab4dc") == [1, 1, 2, 1, 1, 2]
    assert results.blocks_needed("7abcdefgh")[-1] == 4          # 8 hops


def test_run_of_skip_is_scored_with_the_papers_gate_too():
    """Both run the same weights. Test puzzles had no part in choosing lambda."""
    fit("--preset chain --data chain --block_size 30 --max_iters 2 --gate skip")
    Path("run").rename("gate=skip-seed=0")
    val, test, soft = results.score(Path("gate=skip-seed=0"), {"commit": "abc"})
    assert [row["run"] for row in (val, test, soft)] == ["gate=skip", "gate=skip", "gate=soft"]
    assert val["val_loss"] == soft["val_loss"] and val["commit"] == "abc"
    model, _ = load_checkpoint("gate=skip-seed=0/ckpt.pt")
    loss, _, ran = train.evaluate(model, *data.chain(seed=1).windows("val", 30), sparse=True)
    assert (test["val_loss_sparse"], test["blocks"]) == (loss, sum(ran))


def test_difficulty_is_the_loss_of_the_plain_model():
    """The blocks of the first fifth are those of the tokens that are easiest for a plain model."""
    fit("--max_iters 1 --gate straight")
    model, saved = load_checkpoint("run/ckpt.pt")
    idx, _ = data.load("t.txt").windows("val", 16)
    scale = torch.rand(idx.shape, generator=torch.Generator().manual_seed(0))
    for router in model.routers:
        router.scale = lambda x, gates: scale[:len(x)]
    with torch.no_grad():
        scores = results.depth_scores(model, saved["vocab"], idx[:64], scale[:64])
    assert scores["correlation"] > 0.8 and scores["fifths"][::4] == [1, 3]      # blocks, of 3


def test_a_second_score_replaces_the_row(monkeypatch):
    """Otherwise a run that was scored twice would count twice."""
    monkeypatch.setattr(results, "CSV", Path("r.csv"))
    Path("r.csv").write_bytes((HERE / "report/results.csv").read_bytes())
    before = len(results.read_csv())
    fit("--max_iters 1 --model plain")
    for _ in range(2):
        results.main(["run"])
    assert len(results.read_csv()) == before + 2        # validation and test


def test_models_are_compared_at_equal_multiply_adds_with_their_own_seed():
    """By hand: between two plain models, the loss is interpolated; beyond them, there is no comparison."""
    def row(model, cost, loss):
        return {"model": model, "run": "a", "family": "a", "split": "val", "seed": 1, "n_embd": 8, "cost": cost,
                "val_loss": loss, "val_loss_sparse": loss}
    plain = [row("plain", 1, 1.0), row("plain", 0.8, 1.1)]
    others = [plain[0] | {"val_loss": 9.0} | other for other in ({"seed": 2}, {"family": "b"}, {"n_embd": 9})]
    assert results.against_plain([row("tsa", 0.9, 1.0), row("tsa", 0.7, 1.0)], plain + others) == pytest.approx([-0.05])
    assert results.above_full([row("tsa", 0.9, 1.02)], plain + others) == pytest.approx([0.02])


def test_interval_is_students():
    """With two degrees of freedom, Student's t has a closed form."""
    t = results.T_95[3]
    assert 0.5 + t / 2 / (2 + t * t) ** 0.5 == pytest.approx(0.975, abs=1e-5)
    assert results.interval([1.0, 2.0, 6.0]) == pytest.approx(t * 7 ** 0.5 / 3 ** 0.5)


def test_numbers_on_the_pages_are_those_of_the_rows():
    """A table that drifts away from its rows costs a reader's trust."""
    cells = {cell for line in results.table(results.read_csv()) for cell in line}
    cells |= {f"{row[name]:.4f}" for row in results.read_csv() for name in ("val_loss", "val_loss_sparse")}
    fifths = r"(?:\d\.\d\d, ){4}\d\.\d\d"
    numbers = fifths + r"|[+-]?\d\.\d{4} ± \d\.\d{4}|-?\d\.\d\d ± \d\.\d\d|[+-]?\d+\.\d+% ± \d+\.\d+%|\b1\.\d{4}\b"
    report = PAGES["report/README.md"].partition("## Also tried")[0]        # which quotes earlier versions
    used = set(re.findall(numbers, PAGES["README.md"] + report))
    assert len(used) > 40 and not used - cells, used - cells


@pytest.mark.parametrize("run, saved, loss", [
    ("gate=soft-data=shakespeare-lam=0.001", "tlops_saved", "val_loss"),
    ("gate=stretch-data=shakespeare-lam=0.03", "cost", "val_loss_sparse")])
def test_early_exit_is_compared_at_equal_savings(run, saved, loss):
    """The paper's count is 1 - blocks / layers for early exit. Between two confidences, the loss is interpolated."""
    groups = results.group(results.read_csv())

    def mean(run, column):
        found = [row[column] for row in groups[f"preset=laptop-{run}", "val"] if row[column] != ""]
        return sum(found) / len(found)
    points = []
    for confidence in results.CONFIDENCES:
        name = f"model=exit-data=shakespeare-confidence={confidence}"
        x = mean(name, "cost") if saved == "cost" else 1 - mean(name, "blocks") / 6
        points.append((x, mean(name, "val_loss_sparse")))
    lower = 1 - mean(run, loss) / np.interp(mean(run, saved), *zip(*sorted(points)))
    assert f"{lower:.1%} lower (5 seeds)" in PAGES["README.md"]


def test_times_on_the_pages_are_those_of_clock_csv():
    """Every speed-up stands beside what its multiply-adds predict."""
    with open(HERE / "report/clock.csv", newline="") as file:
        times = list(csv.DictReader(file))
    ratios = {f"{float(row['speedup']):.2f} ({float(row['predicted']):.2f})" for row in times}
    used = set(re.findall(r"\d\.\d\d \(\d\.\d\d\)", PAGES["report/README.md"]))
    assert len(used) > 20 and not used - ratios, used - ratios
    assert set(re.findall(r"\|(\d\.\d\d) times", PAGES["README.md"])) <= {ratio.split()[0] for ratio in ratios}


def test_shipped_chain_model_runs_the_blocks_that_the_readme_says():
    """A reader may count them."""
    (model, saved), corpus = load_checkpoint(HERE / "report/chain.pt"), data.load("chain")
    idx, targets = corpus.windows("val", 30)
    with torch.no_grad():
        logits, gates = model(idx, sparse=True)
    texts = [[saved["vocab"][i] for i in puzzle] for puzzle in idx]
    needed = torch.tensor([results.blocks_needed(text) for text in texts])
    hops = torch.tensor([results.hops(text) for text in texts])
    exact = (gates != 0).sum(0) == needed
    shares = [exact[chosen].double().mean() for chosen in (hops <= 1, hops == 2, hops == 3, hops == 4)]
    assert "exactly as many" + "".join(f"|{share:.0%}" for share in shares) + "\n" in PAGES["README.md"]
    assert f"{(logits.argmax(-1) == targets).double().mean():.1%} of the answers" in PAGES["README.md"]
    assert f"{needed.double().mean():.2f} blocks on average" in PAGES["README.md"]


@pytest.mark.parametrize("flags, picture", [
    ("chain.pt", PAGES["README.md"]), ("python-skip.pt --map", (HERE / "report/map.svg").read_text(encoding="utf-8"))])
def test_maps_on_the_page_are_what_sample_prints(flags, picture, capsys):
    """The pictures are the first thing that a reader sees."""
    name, *flags = flags.split()
    sample.main([str(HERE / "report" / name), *flags, "--device=cpu"])
    shown = re.sub(r"\s", "", html.unescape(re.sub(r"<[^>]*>", "", picture)))
    for line in capsys.readouterr().out.splitlines():
        assert "".join(line.split()) in shown


def test_figure_has_a_star_for_the_readers_row():
    """It stands at the means of the row."""
    pytest.importorskip("matplotlib")
    own = results.group(results.read_csv())["preset=deep-gate=skip-lam=0.001", "val"]
    plot.draw("x.svg", "deep", "my own gate", own)
    assert Path("x.svg").read_text(encoding="utf-8").count("my own gate") == 1


def test_clock_compares_with_the_first_plain_model(capsys):
    """`predicted` is what the multiply-adds promise: 6 plain layers against 3."""
    chain = str(HERE / "report" / "chain.pt")
    clock.main([chain, "--layers", "6", "3", "--works", "prefill 8", "--device=cpu", "--seconds=0", "--csv=c.csv"])
    with open("c.csv", newline="") as file:
        six, three, chain = csv.DictReader(file)
    assert float(six["speedup"]) == 1 and float(three["predicted"]) == pytest.approx(1 / 0.504, abs=0.01)
    assert 0.05 < float(chain["open"]) < 0.15
