"""Tests of the programs in report/: the published numbers depend on them."""
import csv
import json
import re
from pathlib import Path

import pytest
import torch

import data
import sample
import train
import test_tsa
import tsa
from report import claims, clock, plot, results, sweep
from test_tsa import HERE, fit, folder          # noqa: F401
from tsa import load_checkpoint

README, REPORT = ((HERE / name).read_text(encoding="utf-8") for name in ("README.md", "report/README.md"))


@pytest.fixture
def losses(monkeypatch):
    """Replace training: a dictionary of sparse losses by (lam, seed); all other runs reach 0.001."""
    losses = {}

    def main(flags):
        args = train.parse_flags(flags)[0]
        args.out_dir.mkdir()
        loss = losses.get((args.lam, args.seed), 0.001)
        sizes = {"n_layer": 6, "n_embd": 64, "block_size": 30, "vocab_size": 34}
        result = {"model": args.model, "gate": args.gate, "val_loss_sparse": loss, "blocks": 1 + 0.01 / args.lam}
        (args.out_dir / "result.json").write_text(json.dumps(result | sizes))
    monkeypatch.setattr(train, "main", main)
    return losses


def runs():
    """The runs that a sweep has trained, as (lambda, seed)."""
    found = [re.search(r"lam=(.*)-seed=(\d)$", folder.name) for folder in Path("out").glob("sweep-*/*gate*")]
    return sorted((float(match[1]), int(match[2])) for match in found if match)


def test_lambda_triples_until_seed_0_exceeds_the_limit(losses, capsys):
    """The rule is the same for all designs; otherwise the leaderboard would compare how long somebody searched."""
    losses[0.3, 0] = 0.011
    sweep.main(["--gate", "straight", "--halt"])
    assert runs() == sorted([(0.01, 0), (0.03, 0), (0.09, 0), (0.3, 0)] + [(0.09, seed) for seed in range(1, 6)])
    assert capsys.readouterr().out.endswith("`--gate straight --halt --lam 0.09`|1.11 ± 0.00|37%|0.0010\n")


def test_mean_of_five_new_seeds_decides(losses, capsys):
    """One unlucky seed must not rule a design out, but a bad mean must: then the next lambda is tried."""
    losses |= {(0.3, 0): 0.02, (0.09, 3): 0.04, (0.09, 4): 0.04, (0.03, 2): 0.04}
    sweep.main(["--gate=straight"])
    assert "`--gate straight --lam 0.03`" in capsys.readouterr().out


@pytest.mark.parametrize("flag, loss_of", [("--gate=skip", {(0.01, 0): 0.02}), ("--model=plain", {(0.001, 2): 0.2})])
def test_sweep_without_a_row_says_so(flag, loss_of, losses):
    """A model whose loss is too high has no place on the leaderboard."""
    losses |= loss_of
    with pytest.raises(SystemExit, match="no row"):
        sweep.main([flag])


def test_same_command_continues_a_sweep_unless_the_code_has_changed(losses, monkeypatch, capsys):
    """Finished runs are not trained again, but those of an older gate must not pass for a new one."""
    sweep.main(["--model=plain"])
    sweep.main(["--model=plain"])
    assert capsys.readouterr().out.count("training") == 5
    monkeypatch.setattr(sweep, "FOLDER", Path("out/sweep-edited"))
    sweep.main(["--model=plain"])
    assert capsys.readouterr().out.count("training") == 5
    assert sweep.CODE == b"".join((HERE / name).read_bytes() for name in ("tsa.py", "train.py", "data.py"))


def test_a_negative_bias_has_its_own_runs(losses, capsys):
    """Two designs that share a folder would share a row of the leaderboard."""
    sweep.main(["--gate_bias", "3"])
    sweep.main(["--gate_bias=-3"])
    assert capsys.readouterr().out.count("training") == 2 * 13


@pytest.mark.parametrize("flags", ["--lam 5", "--seed=1", "--out_dir x", "--gate nosuch"])
def test_sweep_notices_mistakes_before_the_first_run(flags, losses):
    """A sweep takes 25 minutes."""
    with pytest.raises(SystemExit):
        sweep.main(flags.split())
    assert not Path("out").exists()


def test_blocks_by_the_rule_are_the_logarithm_of_the_hops():
    """All tokens hop at once: two blocks make three hops, three blocks seven."""
    assert results.blocks_by_rule("7ab4dc") == [1, 1, 2, 1, 1, 2]
    assert results.blocks_by_rule("7abcdefgh")[-1] == 4         # 8 hops


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
    """Otherwise a run that was scored twice would count twice. The name of its text may have a slash."""
    monkeypatch.setattr(results, "CSV", Path("r.csv"))
    Path("r.csv").write_bytes((HERE / "report/results.csv").read_bytes())
    before = len(results.read_csv())
    fit("--max_iters 1 --model plain --data ./t.txt")
    Path("run/result.json").rename("r.json")
    with pytest.raises(SystemExit):         # unfinished
        results.main(["run"])
    Path("r.json").rename("run/result.json")
    for _ in range(2):
        results.main(["run"])
    assert len(results.read_csv()) == before + 2        # validation and test


def row(**changes):
    return {"model": "plain", "gate": "soft", "run": "a", "family": "a", "split": "val", "seed": 1, "n_layer": 6,
            "n_embd": 8, "block_size": 16, "vocab_size": 11, "blocks": 6, "cost": 1, "val_loss": 1.0,
            "val_loss_sparse": 1.0, "tlops_saved": 0.3} | changes


def test_models_are_compared_at_equal_multiply_adds_with_their_own_seed():
    """By hand: between two plain models, the loss is interpolated; beyond them, or with a deeper one, it is not."""
    others = [row(), row(cost=0.8, val_loss=1.1), row(cost=1.5, val_loss=9.0), row(seed=2, val_loss=9.0),
              row(family="b", val_loss=9.0), row(n_embd=9, val_loss=9.0)]
    gated = [row(model="tsa", cost=0.9), row(model="tsa", cost=0.7)]
    assert results.against_plain(gated, others) == pytest.approx([-0.05])
    assert results.above_full([row(val_loss_sparse=1.02)], others) == pytest.approx([0.02])


@pytest.mark.parametrize("family, n_layer", [("shakespeare", 6), ("enwik8", 6), ("deep", 12), ("paper", 6)])
def test_a_plain_model_of_all_layers_costs_1(family, n_layer):
    """All percentages of multiply-adds are relative to it."""
    assert results.cost(row(family=family, n_layer=n_layer, blocks=n_layer)) == 1


def test_early_exit_is_charged_for_the_predictions_that_it_makes():
    """By hand: 3 of 6 blocks per token, the first without a prediction. A block has 12 C^2 weights, a skip saves 10."""
    C, T, head = 8, 16, 11 * 8
    block, prediction = 12 * C * C + T * C, head
    by_hand = (6 * (block - 10 * C * C) + 3 * 10 * C * C + 2 * prediction) / (6 * block + head)
    assert results.cost(row(model="exit", blocks=3)) == pytest.approx(by_hand)


def test_loss_against_early_exit_is_interpolated_to_equal_savings():
    """By hand: halfway between two confidences. A model that saves more than early exit ever does is left out."""
    exits = [row(model="exit", cost=0.8, val_loss_sparse=1.1), row(model="exit", cost=0.6, val_loss_sparse=1.3)]
    found = [row(cost=0.7, val_loss_sparse=1.08), row(cost=0.5, val_loss_sparse=1.0)]
    (compared,), (above,) = claims.above_exit(found, exits, False, "val_loss_sparse")
    assert compared == found[0] and above == pytest.approx(-0.1)


@pytest.mark.parametrize("values, answer", [
    ([0.001, 0.001, 0.002], "**yes**"), ([0.009, 0.009, 0.008], "**no**"), ([0.001, 0.004, 0.008], "probably"),
    ([0.001, 0.006, 0.009], "probably not"), ([0.001], "one seed")])
def test_verdict_follows_its_rule(values, answer):
    """Yes and no: the 95% interval lies on one side of the limit, here 0.005."""
    assert claims.verdict(values, 0.005) == answer


def test_interval_is_students():
    """With two degrees of freedom, Student's t has a closed form."""
    t = results.T_95[1]
    assert 0.5 + t / 2 / (2 + t * t) ** 0.5 == pytest.approx(0.975, abs=1e-5) and len(results.T_95) == 19
    assert results.interval([1.0, 2.0, 6.0]) == pytest.approx(t * 7 ** 0.5 / 3 ** 0.5)


@pytest.mark.parametrize("page, flags", [(README, []), (REPORT, ["--all"])])
def test_page_shows_the_claims_that_the_program_prints(page, flags, capsys):
    """The page quotes the program's verdicts."""
    claims.main(flags)
    assert all(table in page for table in capsys.readouterr().out.split("\n\n"))


def test_the_readmes_code_runs(monkeypatch):
    """The code that it quotes is that of tsa.py, and its gate passes the tests above."""
    code = " ".join((HERE / "tsa.py").read_text(encoding="utf-8").split())
    excerpts = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    gate, = (excerpt for excerpt in excerpts if "GATES[" in excerpt)
    assert [excerpt for excerpt in excerpts if " ".join(excerpt.split()) not in code] == [gate]
    designs = {}
    exec(gate, vars(tsa) | {"GATES": designs})
    for name, design in designs.items():
        monkeypatch.setitem(tsa.GATES, name, design)
        monkeypatch.setitem(test_tsa.DESIGNS, name, dict(gate=name))
        test_tsa.test_no_token_sees("the future", (slice(None), slice(9, None)), name, sparse=True, in_training=False)
        test_tsa.test_design_passes_a_gradient_to_its_routers(name)
        test_tsa.test_gates_scale_both_updates_of_each_block(name, sparse=True)


def fits(run, label):
    """Whether a run's name has the flags, the plain layers and the confidence that the label of a line names."""
    flags = re.findall(r"[\w.]+", "".join(re.findall("`.*?`", label)))
    flags += [f"confidence={value}" for value in re.findall(r"early exit.*?(\d\.\d+)", label)]
    layers = re.findall(r"n_layer=(\d+)", run) or ["12" if "preset=deep" in run else "6"]
    plain = re.findall(r"(\d+) plain", label)
    return all(flag in run for flag in flags) and (not plain or (plain == layers and "model=plain" in run))


def test_numbers_of_the_report_are_those_of_the_rows():
    """A line of a table has the numbers of one run that fits its label."""
    fifths = r"(?:\d\.\d\d, ){4}\d\.\d\d"
    numbers = fifths + r"|[+-]?\d\.\d{4}(?: ± [\d.]+)?|-?\d\.\d\d ± \d\.\d\d|[+-]?\d+\.\d+%(?: ± [\d.]+%)?"
    known, used = {}, 0
    for run, *cells in results.table(results.read_csv()):
        found = re.findall(numbers, "|".join(cells))
        known.setdefault(run, set()).update(found, [number.partition(" ±")[0] for number in found])
    tables = REPORT.partition("## Texts")[2].partition("## Wall-clock")[0]
    lines = re.findall(r"^\|.*\|$", tables, flags=re.MULTILINE) + re.findall(r"^`--.*$", README, flags=re.MULTILINE)
    for line in lines:
        found, label = set(re.findall(numbers, line)), line.strip("|").partition("|")[0]
        assert not found or any(found <= known[run] and fits(run, label) for run in known), line
        used += len(found)
    assert used > 100


def test_times_of_the_report_are_those_of_clock_csv():
    """Every speed-up stands beside what its multiply-adds predict."""
    with open(HERE / "report/clock.csv", newline="") as file:
        times = [*csv.DictReader(file)]
    known, used = {}, 0
    for one in times:
        place = one["text"], one["n_embd"], one["work"], one["batch"]
        known.setdefault(place, set()).add(f"{float(one['speedup']):.2f} ({float(one['predicted']):.2f})")
    for line in REPORT.splitlines():        # all speed-ups of a line are of one kind of work
        found = set(re.findall(r"\d\.\d\d \(\d\.\d\d\)", line))
        assert any(found <= ratios for ratios in known.values()), line
        used += len(found)
    assert used > 40


def test_shipped_model_solves_the_puzzle_as_the_readme_says():
    """A reader may recount these percentages."""
    model, saved = load_checkpoint(HERE / "report/chain.pt")
    idx, targets = data.load("chain").windows("val", 30)
    with torch.no_grad():
        logits, gates = model(idx, sparse=True)
    texts = [[saved["vocab"][i] for i in puzzle] for puzzle in idx]
    exact = (gates != 0).sum(0) == torch.tensor([results.blocks_by_rule(text) for text in texts])
    right = logits.argmax(-1) == targets
    hops = torch.tensor([results.hops(text) for text in texts])
    groups = [hops <= 1, hops == 2, hops == 3, hops == 4]
    for name, found in (("right answers", right), ("run exactly as many", exact)):
        assert f"{name}|" + "|".join(f"{found[chosen].double().mean():.0%}" for chosen in groups) + "\n" in README
    assert f"{right.double().mean():.1%} of its answers" in README


def test_map_on_the_page_is_what_sample_prints(capsys):
    """It is what a reader compares with first."""
    sample.main([str(HERE / "report/chain.pt"), "--device=cpu"])
    assert capsys.readouterr().out.strip() in README


def test_figures_are_drawn_from_the_rows_and_the_shipped_model():
    """Anybody can draw them again. Only the words are compared, because colors depend on matplotlib's version."""
    pytest.importorskip("matplotlib")
    plot.draw_frontier("frontier.svg")
    plot.draw_map("map.svg")
    for name in ("frontier.svg", "map.svg"):
        new, old = (re.findall(r">([^<>]+)</text>", path.read_text(encoding="utf-8"))
                    for path in (Path(name), HERE / "report" / name))
        assert len(new) > 20 and new == old


def test_clock_compares_with_the_first_plain_model(capsys):
    """`predicted` is what the multiply-adds promise: 6 plain layers against 3."""
    chain = str(HERE / "report" / "chain.pt")
    clock.main([chain, "--layers", "6", "3", "--works", "prefill 8", "--device=cpu", "--seconds=0", "--csv=c.csv"])
    with open("c.csv", newline="") as file:
        six, three, chain = csv.DictReader(file)
    assert float(six["speedup"]) == 1 and float(three["predicted"]) == pytest.approx(1 / 0.504, abs=0.01)
    assert chain["gates"] == "straight --halt" and chain["text"] == "chain"
    assert 0.05 < float(chain["open"]) < 0.15


def test_clock_takes_medians_of_times_that_belong_together(monkeypatch):
    """By hand: 4, 4, 4, 2, 2 and 8 times as fast. With six rounds, the interval goes to both extremes."""
    times = iter([8, 2, 8, 2, 8, 2, 8, 4, 8, 4, 8, 1])
    monkeypatch.setattr(clock, "seconds_of", lambda call, device: next(times))
    models = {"a": test_tsa.tiny("plain"), "b": test_tsa.tiny("plain", n_layer=2)}
    _, row = clock.clock(models, test_tsa.tokens(), "decode", 2, 0, "cpu")
    assert (row["speedup"], row["low"], row["high"]) == (4, 2, 8) and row["ms"] == 1000 * 2 / (16 // 2)
