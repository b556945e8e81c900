"""Tests of the programs in report/: the published numbers depend on them. Run with `python -m pytest -q`."""
import csv
import html
import itertools
import json
import math
import re
import shutil
import sys
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import data
import sample
import train
import tsa
from report import clock, depth, ngrams, plot, variants
from test_tsa import HARD, HERE, finished, masked, refused, run, run_train, text_file, tiny, tokens     # noqa: F401
from tsa import GATES, Config, Exit, Halt, Router


@pytest.mark.parametrize("name, loss, answers", [("chain-halt", 0.005, True), ("chain-tsa", 0.001, False)])
def test_shipped_chain_models_do_what_the_readme_shows(name, loss, answers, tmp_path, capsys):
    """The README's first commands: halting solves the task; the paper's gates do only when nothing is skipped."""
    model, saved = train.load_checkpoint(HERE / "report" / f"{name}.pt")
    windows = [part[:300] for part in data.load("chain").windows("val", 30)]
    full, sparse = (train.evaluate(model, windows, sparse)[0] for sparse in (False, True))
    assert full < loss and (sparse < loss if answers else sparse > 0.5) and "optimizer" not in saved
    hops = depth.score(model, windows, is_chain=True)["hops"]
    assert len(hops) == 5 and hops[0]["blocks"][0] > 0.99 * hops[0]["n"]        # digits run one block when sparse
    shutil.copy(HERE / "report" / f"{name}.pt", tmp_path)
    assert run(depth, tmp_path / f"{name}.pt", "--device", "cpu") == 0 and "4 hops: accuracy" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "scores.json").read_text())[0]["hops"]) == 5
    assert run(sample, HERE / "report" / f"{name}.pt", "--device", "cpu", "--sparse") == 0
    out = capsys.readouterr().out
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    assert ("!" not in out) == answers and (not answers or out.strip() in readme), out


def test_shipped_text_model_is_the_default(tmp_path, monkeypatch, capsys):
    """`python sample.py` works before any training, and skips blocks."""
    monkeypatch.chdir(tmp_path)
    assert run(sample, "--device", "cpu", "--max_new_tokens", 20) == 0
    assert re.search(r"python-skip.pt: tsa model.*\n.*sparse: a token ran [6-9]\.", capsys.readouterr().err)
    saved = train.load_checkpoint(HERE / "report" / "python-skip.pt")[1]
    flags = train.parse_flags("--preset deep --gate skip --threshold 0.9 --dtype bfloat16 --device cpu".split())
    flags.pop("out_dir")
    assert saved["flags"] | {"preset": "deep"} == flags and saved["step"] == 2400       # the command of the README
    assert sum(path.stat().st_size for path in (HERE / "report").glob("*.pt")) < 7e6
    refused(run(depth, HERE / "report" / "chain-halt.pt", "--device", "cpu", "--gate", "skip"), "--gate does not apply")


def test_picture_of_the_readme_shows_the_shipped_model(capsys):
    """The first thing on the page is the output of the command that it shows."""
    line = "    def __init__(self, name, value):"
    assert run(sample, HERE / "report" / "python-skip.pt", "--device", "cpu", "--map", "--prompt", line) == 0
    picture = re.sub(r"<[^>]*>|\s|\xa0", "", (HERE / "report" / "map.svg").read_text().partition("</defs>")[2])
    picture = html.unescape(picture).replace("\xa0", "")
    for row in capsys.readouterr().out.split("\n"):
        assert "".join(row.split()) in picture, row


def test_mistake_in_the_readers_code_keeps_its_traceback(finished, run_train, monkeypatch):     # noqa: F811
    """One line is for mistakes in flags, files and prompts; who writes a gate or a model has to see where it failed."""
    mine = MagicMock(side_effect=ValueError("mine"))
    for owner, name in ((tsa.TSA, "__init__"), (Router, "forward")):        # when the model is built, and when it runs
        monkeypatch.setattr(owner, name, mine)
        for program in (sample, depth, clock):
            with pytest.raises(ValueError, match="mine"):
                run(program, finished / "ckpt.pt", "--device", "cpu")
        with pytest.raises(ValueError, match="mine"):
            run_train("--max_iters", 1, "--out_dir", finished / name)
        monkeypatch.undo()


# ----------------------------------------------------------------------------------------------------------------
# variants.py

@pytest.fixture
def restore(monkeypatch):
    """Undo the changes of report.variants after a test."""
    for owner, name in ((Router, "logit"), (Exit, "loss"), (Exit, "FIRST"), (Halt, "HALT_SHARE"), (Halt, "EVERY_SHARE"),
                        (Halt, "LAST_SHARE"), (train, "make_optimizer")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(train, "FLAGS", dict(train.FLAGS))


def test_gates_of_the_report_by_hand():
    """`straight` trains what runs, and the others take thresholding apart."""
    p = torch.tensor([.05, .3, .6, .9], requires_grad=True)
    expected = {"straight": ([1, 1, 0, 0], [1, 1, 0, 0]), "round-up": ([.95, .7, .4, .1], [1, 1, .4, .1]),
                "close": ([.95, .7, .4, .1], [.95, .7, 0, 0]), "ones": ([.95, .7, .4, .1], [1, 1, 1, 1])}
    for name, values in expected.items():
        for make_gate, value in zip(GATES[name], values):
            torch.testing.assert_close(make_gate(p, 0.5), torch.tensor(value, dtype=torch.float32))
    GATES["straight"][0](p, 0.5).sum().backward()
    assert p.grad.tolist() == [-1] * 4


def test_variants_change_what_they_say(restore):
    """Every row of the report that needs changed code is one of these."""
    idx, targets = tokens(), tokens(seed=2)
    variants.constant()
    gates = tiny()(idx)[1]
    assert all(len(gate.unique()) == 1 for gate in gates) and len(gates.unique()) == 4
    assert gates.requires_grad      # the constants are learned
    variants.VARIANTS["shares.4"]()
    assert (Halt.HALT_SHARE, Halt.EVERY_SHARE, Halt.LAST_SHARE) == (0.4, 0.1, 0.5)
    variants.VARIANTS["shares.1"]()
    assert (Halt.HALT_SHARE, Halt.EVERY_SHARE, Halt.LAST_SHARE) == (0.1, 0.03, 0.87)
    model = tiny("exit", threshold=0.4)
    x, losses = model.embed(idx), []
    for block, norm in zip(model.blocks, [*model.exit_norms, model.ln_f]):
        x = block(x)
        losses.append(F.cross_entropy(model.head(norm(x)).flatten(0, 1), targets.flatten()))
    variants.exit_heavy()
    torch.testing.assert_close(model.loss(idx, targets)[0], 0.75 * losses[3] + 0.25 * sum(losses[:3]) / 3)
    variants.exit_nofloor()
    assert model(idx, sparse=True)[1][1].mean() < 1         # some tokens exit after block 0


def test_run_starts_from_a_checkpoint(finished, run_train, tmp_path, restore, text_file):  # noqa: F811
    """Fine-tuning with switches must begin with the weights of the paper's model."""
    before, saved = train.load_checkpoint(finished / "ckpt.pt")
    flags = [f"--{name}={value}" for name, value in saved["flags"].items() if name != "gate"]
    flags += ["--learning_rate=0", f"--out_dir={tmp_path / 'tuned'}"]
    assert run(variants, "straight", "--init_from", finished / "ckpt.pt", *flags) == 0
    after, saved = train.load_checkpoint(tmp_path / "tuned" / "ckpt.pt")
    assert saved["flags"]["gate"] == "straight"
    other = [*flags[:-1], "--n_embd=32", f"--out_dir={tmp_path / 'other'}"]
    refused(run(variants, "straight", "--init_from", finished / "ckpt.pt", *other), "other sizes")
    assert not (tmp_path / "other").exists()
    assert run(variants, "straight", f"--resume={tmp_path / 'tuned'}") == 0
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))


def test_change_of_a_run_is_stored_and_cannot_be_dropped(run_train, tmp_path, restore):      # noqa: F811
    """Resumed or scored without its change, a constant gate would silently become a router with random weights."""
    folder = tmp_path / "constant"
    small = ["--n_layer=2", "--n_embd=16", "--max_iters=1", "--device=cpu", "--data=chain", f"--out_dir={folder}"]
    assert run(variants, "constant", *small) == 0
    result = json.loads((folder / "result.json").read_text())
    del train.FLAGS["variant"]
    refused(run(train, "--resume", folder), "report.variants constant --resume")
    assert run(variants, "constant", "--resume", folder) == 0
    Router.logit = None
    assert run(depth, folder / "ckpt.pt", "--device", "cpu") == 0           # changed again
    score, = json.loads((folder / "scores.json").read_text())
    assert score["variant"] == result["variant"] == "constant"
    assert score["val_loss"] == pytest.approx(result["val_loss"])
    refused(run(depth, folder / "ckpt.pt", "--device", "cpu", "--split", "test"), "no test split")
    assert run(variants, "exit-heavy", *small[:-1], f"--out_dir={tmp_path / 'exit'}") == 0
    assert json.loads((tmp_path / "exit" / "result.json").read_text())["model"] == "exit"       # without --model


# ----------------------------------------------------------------------------------------------------------------
# depth.py

def test_scores_of_report_are_those_of_training(finished, text_file, monkeypatch, capsys, restore):  # noqa: F811
    """The tables mix rows of depth.py and train.py, and a sweep must not confuse one score with another."""
    def score(*flags):
        assert run(depth, finished / "ckpt.pt", "--device", "cpu", *flags) == 0
        return json.loads((finished / "scores.json").read_text())
    score("--threshold", 0.5, 0.2)
    score("--gate", "skip", "--threshold", 0.5)
    rows = score("--split", "test")
    result = json.loads((finished / "result.json").read_text())
    assert [(row["split"], row["gate"], row["threshold"]) for row in rows] == [
        ("val", "soft", 0.5), ("val", "soft", 0.2), ("val", "skip", 0.5), ("test", "soft", 0.5)]
    assert rows[2]["val_loss_sparse"] != rows[0]["val_loss_sparse"]
    for key in ("val_loss", "val_loss_sparse", "tlops_saved", "macs_saved"):
        assert rows[0][key] == pytest.approx(result[key], abs=1e-5)
    assert rows[0]["gates"] == pytest.approx(result["gates"]) and rows[3]["gates"] != rows[0]["gates"]
    assert rows[1]["tlops_saved"] > rows[0]["tlops_saved"] and rows[0]["permuted"] != rows[0]["val_loss"]
    assert rows[0]["permuted_sparse"] != rows[0]["val_loss_sparse"] and rows[3]["val_loss"] != rows[0]["val_loss"]
    torch.manual_seed(9)
    assert score("--split", "test") == rows         # permuted with a seed of its own
    model, saved = train.load_checkpoint(finished / "ckpt.pt")
    idx, targets = data.load(str(text_file)).windows("val", 16)
    by_hand = [masked(model, x[None])[0][0].argmax(-1) for x in idx]
    assert rows[0]["accuracy"] == pytest.approx((torch.stack(by_hand) == targets).float().mean().item())
    drawn = []
    monkeypatch.setattr(depth, "draw_histogram", lambda gates, threshold, path: drawn.append(gates))
    score("--histogram", "x.svg")
    assert drawn[0].mean((1, 2)).tolist() == pytest.approx(result["gates"])        # the gates of a full pass
    (finished / "commit").write_text("abc1234\n")
    collected = plot.read_rows([finished])
    assert [row["commit"] for row in collected] == ["abc1234"] * 4
    assert [row["split"] for row in collected] == ["val", "val", "val", "test"]
    assert collected[0]["val_loss"] == rows[0]["val_loss"] and collected[3]["val_loss"] == rows[3]["val_loss"]
    assert run(plot, finished.parent, "--csv", finished / "r.csv") == 0
    assert (finished / "r.csv").read_text().count("\n") == 5
    from_csv = plot.read_csv(finished / "r.csv")
    assert [row["val_loss"] for row in from_csv] == [row["val_loss"] for row in collected]
    assert from_csv[0]["threshold"] == 0.5 and float(from_csv[0]["permuted_sparse"]) == rows[0]["permuted_sparse"]
    capsys.readouterr()
    assert run(plot, finished.parent, "--rows", finished / "r.csv") == 0 and "n=2" not in capsys.readouterr().out
    rows = score("--variant", "constant")
    assert [row["variant"] for row in rows] == [""] * 4 + ["constant"] and rows[4]["val_loss"] != rows[0]["val_loss"]


def test_unscored_tokens_and_short_sequences_count_as_in_training():
    """In the tasks, the source is not scored and sequences are shorter than block_size."""
    model, idx, targets = tiny(gate="skip", threshold=0.8), tokens(B=5, T=12), tokens(B=5, T=12, seed=2)
    targets[:, :5] = -1
    row, (loss, _, ran) = depth.score(model, (idx, targets), False), train.evaluate(model, (idx, targets), True)
    assert row["val_loss_sparse"] == pytest.approx(loss)
    assert row["macs_saved"] == pytest.approx(tsa.savings(model.config, ran, T=12)[1])
    right = (masked(model, idx)[0].argmax(-1) == targets)[:, 5:]
    assert row["accuracy"] == pytest.approx(right.float().mean().item())
    torch.manual_seed(0)
    with depth.replay(model, depth.permute_tokens(model(idx)[1])):
        assert row["permuted"] == pytest.approx(train.evaluate(model, (idx, targets), False)[0])


@pytest.mark.parametrize("settings", HARD[1:])
def test_replayed_gates_are_the_ones_that_run(settings):
    """Permuted gates and clock.py rely on this: replaying a model's own gates changes nothing."""
    model, idx = tiny(**settings).double(), tokens()
    logits, gates = model(idx, sparse=True)
    with depth.replay(model, gates):
        torch.testing.assert_close(model(idx, sparse=True)[0], logits)
    swapped = gates.roll(1, 1)          # the gates of another sequence
    with depth.replay(model, swapped):
        other, used = model(idx, sparse=True)
    assert torch.equal(used[1:], swapped[1:]) and not torch.allclose(other, logits)
    called, last = [], (getattr(model, "routers", None) or model.exit_norms)[2]
    last.register_forward_hook(lambda *_: called.append(1))
    with depth.replay(model, torch.ones_like(gates)):
        assert model(idx, sparse=True)[1].eq(1).all() and called        # the cost of its own gates stays
    by_part, whole = depth.run(model, (idx, idx), True, gates, batch_size=2)[0], depth.run(model, (idx, idx), True)[0]
    torch.testing.assert_close(by_part, whole)
    torch.testing.assert_close(model(idx, sparse=True)[0], logits)


def test_loss_after_each_block_is_that_of_a_model_cut_there():
    """The report explains with it why tokens do not halt."""
    model, idx, targets = tiny("halt", threshold=1.0), tokens(), tokens(seed=2)         # no token would halt
    targets[:, :5] = -1
    by_block = depth.score(model, (idx, targets), False)["by_block"]
    assert by_block[-1] == pytest.approx(train.evaluate(model, (idx, targets), False)[0])
    model.blocks = model.blocks[:2]
    assert by_block[1] == pytest.approx(train.evaluate(model, (idx, targets), False)[0])


def test_permuted_gates_keep_tokens_whole_and_in_place():
    """Gates split up across blocks, or moved to another position, would say nothing about the router."""
    gates = torch.arange(5 * 7).view(5, 7) + 100 * torch.arange(4).view(4, 1, 1)           # (L, n, T)
    permuted = depth.permute_tokens(gates)
    assert torch.equal(permuted, permuted[0] + 100 * torch.arange(4).view(4, 1, 1))        # the L gates of one token
    assert torch.equal(permuted[0] % 7, gates[0] % 7)                                      # at the same position
    assert torch.equal(permuted[0].sort(0).values, gates[0]) and not torch.equal(permuted, gates)


def test_chains_are_scored_by_hops():
    """If right and wrong answers were swapped, or blocks miscounted, the table by hops would mean nothing."""
    example = torch.tensor([data.encode("7418534bfadclhi0gjnm4o30uwtx56", data.DIGITS + data.LETTERS)])
    assert "".join(map(str, depth.hops_of(example)[0].tolist())) == "000000011111222012330300114100"       # by hand
    idx = data.load("chain").windows("val", 30)[0][:50]
    hops = depth.hops_of(idx)
    gates = (torch.arange(4).view(4, 1, 1) <= hops).float()         # depth is hops + 1, at most 4
    rows = depth.by_hops(idx, hops < 3, gates)
    assert [row["accuracy"] for row in rows] == [1, 1, 1, 0, 0] and [row["suffices"] for row in rows] == [1, 1, 2, 2, 3]
    assert [row["blocks"] for row in rows] == [[row["n"] if n == min(row["hops"], 3) else 0 for n in range(4)]
                                               for row in rows]
    assert sum(row["n"] for row in rows) == 50 * 30


# ----------------------------------------------------------------------------------------------------------------
# clock.py and plot.py

def test_clock_times_plain_models_and_the_sparse_one_in_turn(finished, monkeypatch):  # noqa: F811
    """The first plain model is the baseline; the warm-up does not count."""
    monkeypatch.setattr(clock, "BATCHES", {"prefill": (3,), "decode": (2,)})
    # The warm-up, then three times the plain models with 3, 2 and 1 layers and the sparse one; again for decode.
    seconds, timed = itertools.cycle([9] * 4 + [2, 1, 1, 0.5] * 3), []
    monkeypatch.setattr(clock, "timed", lambda call, device: timed.append(call()) or next(seconds))
    flags = ["--device", "cpu", "--gate", "skip", "--threshold", 0.6, "--layers", 3, 2, 1, "--seconds", 0]
    assert run(clock, finished / "ckpt.pt", *flags, "--out", finished / "c.csv") == 0
    with open(finished / "c.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["gates"] for row in rows] == 2 * ["plain 3", "plain 2", "plain 1", "own skip"]
    assert [float(row["speedup"]) for row in rows] == 2 * [1, 2, 2, 4] and len(timed) == 2 * 4 * 4
    assert [float(row["ms_high"]) for row in rows[:4]] == [2000, 1000, 1000, 500]
    assert float(rows[7]["ms"]) == 500 / 8          # 8 steps
    layer, head = 12 * 16 * 16 + 16 * 16, 16 * 30
    assert float(rows[0]["predicted"]) == 1
    refused(run(clock, "--gate", "skip"), "need a checkpoint")
    assert float(rows[2]["predicted"]) == pytest.approx((3 * layer + head) / (layer + head))
    model, saved = train.load_checkpoint(finished / "ckpt.pt")
    model.config.gate, model.config.threshold = "skip", 0.6
    text = data.load(saved["flags"]["data"]).windows("val", 16)[0].flatten()
    for row, B, start in ((rows[3], 3, 0), (rows[7], 2, 8)):
        gates = model(text[:B * 16].view(B, 16), sparse=True)[1][:, :, start:]
        ran = (gates != 0).double().mean((1, 2))
        assert float(row["open"]) == pytest.approx(ran[1:].mean().item()) and 0 < ran[1:].mean() < 1
        assert float(row["predicted"]) == pytest.approx(1 / (1 - tsa.savings(model.config, ran.tolist())[1]))


def test_clock_decodes_the_second_half_of_the_text():
    """Timing the cached half again, or a longer one every round, would say nothing about a step."""
    model, idx, seen = tiny(), tokens(), []
    call = clock.decode(model, idx)
    model.wte.register_forward_pre_hook(lambda wte, args: seen.append(args[0]))
    call()
    call()
    assert torch.equal(torch.cat(seen, 1), torch.cat([idx[:, 8:]] * 2, 1)) and len(seen) == 2 * 8


def test_clock_times_whole_training_steps_sparse_and_full(finished, capsys, monkeypatch):  # noqa: F811
    """A step without its optimizer would be too fast, and one that learned would change the gates between rounds."""
    steps, counted = [], []
    monkeypatch.setattr(clock, "TRAINING_TOKENS", 5 * 16)
    monkeypatch.setattr(clock, "timed", lambda call, device: call() or 1)
    monkeypatch.setattr(tsa.TSA, "loss", lambda self, idx, targets, sparse=False, loss=tsa.TSA.loss: steps.append(
        (sparse, torch.equal(idx[:, 1:], targets[:, :-1]), *idx.shape)) or loss(self, idx, targets, sparse))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, step=torch.optim.AdamW.step: counted.append(
        [p.detach().clone() for group in self.param_groups for p in group["params"]]) or step(self))
    flags = ["--device", "cpu", "--gate", "stretch", "--layers", 3, "--seconds", 0, "--train"]
    for dtype in ("float32", "bfloat16"):
        assert run(clock, finished / "ckpt.pt", *flags, dtype, "--out", finished / "c.csv") == 0
    with open(finished / "c.csv", newline="") as file:
        plain, own, full = list(csv.DictReader(file))[:3]
    assert [own["work"], own["batch"], own["gates"], full["gates"]] == ["train float32", "5", "own stretch", "full"]
    assert 0 < float(own["open"]) < 1 == float(full["open"]) and float(own["predicted"]) > 1 > float(full["predicted"])
    assert steps == [(True, True, 5, 16), (False, True, 5, 16)] * 2 * 4 and len(counted) == 3 * 2 * 4
    assert all(torch.equal(a, b) for a, b in zip(counted[1], counted[10]))      # the sparse model, three rounds apart
    refused(run(clock, finished / "ckpt.pt", "--n_embd", 32), "random weights")
    monkeypatch.setattr(clock, "BATCHES", {})
    assert run(clock, "--n_embd", 32, "--device", "cpu") == 0 and "n_embd=32," in capsys.readouterr().out
    steps.clear()
    assert run(clock, finished / "ckpt.pt", "--device", "cpu", "--seconds", 0, "--train", "float32") == 0
    assert "full " in (text := capsys.readouterr().out) and "own" not in text and {step[0] for step in steps} == {False}


def test_random_gates_are_open_as_often_as_the_table_says(monkeypatch):
    """The router is computed, so that its cost counts, and ignored."""
    p = torch.full((100, 100), 0.9)
    assert 0.28 < clock.random_gate(p, 0.3).mean() < 0.32 and set(clock.random_gate(p, 0.3).unique().tolist()) == {0, 1}


def row(run, threshold, loss, seed=0, macs=0.0, **settings):
    return dict(family=run.partition("-")[0], run=run, split="val", gate=None, threshold=threshold, model="halt",
                variant="", seed=seed, tlops_saved=0.5, val_loss=loss, val_loss_sparse=loss, macs_saved=macs) | settings


def test_mean_and_spread_are_over_the_seeds_of_a_name():
    """A mean over different models, or over scores with another threshold, would be meaningless."""
    rows = [row("a-halt-s0", .5, 1.0), row("a-halt-s1", .5, 2.0, macs=1.0), row("a-halt-s1", .9, 5.0),
            row("a-other-s0", .5, 9.0), row("a-halt-s0", .5, 7.0, split="test"), row("a-halt-s0", .5, 8.0, variant="x")]
    summary = plot.summarize(rows)
    assert sorted((line["name"], line["n"], line["val_loss"][0]) for line in summary) == [
        ("a-halt", 1, 5.0), ("a-halt", 1, 7.0), ("a-halt", 1, 8.0), ("a-halt", 2, 1.5), ("a-other", 1, 9.0)]
    assert next(line for line in summary if line["n"] == 2)["macs_saved"][1] == pytest.approx(0.5 ** 0.5)
    assert [plot.name_of({"run": f"deep-stretch{seed}"}) for seed in ("-s1", "")] == ["deep-stretch"] * 2


def test_models_are_compared_at_equal_multiply_adds_with_their_own_seed(tmp_path, capsys):
    """Seeds differ by more than models do, so only paired differences say anything."""
    t = plot.T_95[3]        # with 2 degrees of freedom, Student's t has a closed form
    assert 0.5 + t / 2 / (2 + t * t) ** 0.5 == pytest.approx(0.975, abs=1e-5)
    plain = [row(f"a-plain{n}-s{seed}", None, loss + seed, seed, macs, model="plain")
             for n, loss, macs in ((6, 1.0, 0.0), (5, 1.1, 0.2), (4, 1.5, 0.4)) for seed in (0, 1)]
    test = [other | {"split": "test", "val_loss_sparse": 9.0} for other in plain]
    halts = [row("a-halt-s0", .5, 1.0, 0, 0.1), row("a-halt-s1", .5, 2.5, 1, 0.3), row("a-halt-s2", .5, 2.5, 2, 0.3)]
    halts = [halt | {"val_loss": 9.0} for halt in halts]
    line = plot.summarize(halts)[0]
    assert plot.against_plain(line, plain[2:] + halts) == []        # no reference that saves nothing
    assert plot.against_plain(line, plain + test + halts) == pytest.approx([1.0 - 1.05, 2.5 - 2.3])
    assert plot.against_plain(line | {"rows": [halts[0] | {"macs_saved": 0.5}]}, plain) == []      # no extrapolation
    with open(tmp_path / "r.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, plot.COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for name, n, loss, model, seed in (("plain6", 6, 1.0, "plain", 0), ("plain5", 5, 1.1, "plain", 0),
                                           ("several5", 5, 1.05, "halt", 0), ("plain6", 6, 1.0, "plain", 1),
                                           ("plain5", 5, 1.1, "plain", 1), ("several5", 5, 1.3, "halt", 1)):
            family = "ab"[seed]         # a family for each seed
            sizes = dict(n_layer=n, n_embd=16, block_size=8, vocab_size=11, ran=[1.0] * n)
            writer.writerow(row(f"{family}-{name}-s{seed}", None, loss, seed, model=model, **sizes))
    assert run(plot, "--rows", tmp_path / "r.csv", "--pool", "b", "a") == 0
    out = capsys.readouterr().out
    assert re.search(r"a-plain5 .* n=2 .* 16.7% ± 0.0%", out)           # counted, whatever the file says
    assert re.search(r"a-several5 .* n=2  \+0.0750 ± 1.588[23]  -0.0500 \+0.2000", out)  # 12.706 · 0.177 / 2 ** .5


def test_numbers_on_the_pages_are_those_of_results_csv():
    """A table that drifts away from its rows costs a reader's trust: some 300 cells are looked up here."""
    rows = plot.read_csv(HERE / "report" / "results.csv")
    six = [row for row in rows if row["family"] in ("fresh", "shakespeare")]        # once more, pooled
    rows += [row | {"family": "six", "run": row["run"].replace(row["family"], "six")} for row in six]
    cells, ours = {f"{100 * row['tlops_saved']:.1f} / {row['macs_saved']:.1%}" for row in rows}, {}
    for line in plot.summarize(rows):
        ours[line["name"], line["split"], line["gate"], line["threshold"], line["variant"]] = line
        cells |= {"{:.4f} ± {:.4f}".format(*line[score]) for score in ("val_loss", "val_loss_sparse")}
        cells.add(f"{100 * line['tlops_saved'][0]:.1f} / {line['macs_saved'][0]:.1%}")
        for reference in ("plain", "several"):
            line[reference] = plot.against_plain(line, rows, reference)
            if len(line[reference]) > 1:
                cells.add("{:+.4f} ± {:.4f}".format(*plot.interval(line[reference])))
    for text in ("shakespeare", "stdlib"):
        pair = (ours[f"{text}-{name}", "val", "soft", 0.5, name.replace("tsa", "")] for name in ("constant", "tsa"))
        pair = zip(*([row["val_loss"] for row in line["rows"]] for line in pair))
        cells.add("{:+.4f} ± {:.4f}".format(*plot.interval([a - b for a, b in pair])))
    for split in ("val", "test"):           # a loss after every block: the mean over 8, 10 and 12 layers in each seed
        seeds = zip(*(ours[f"deep-several{n}", split, None, 0.5, ""]["plain"] for n in (8, 10, 12)))
        cells.add("{:+.4f} ± {:.4f}".format(*plot.interval([sum(seed) / 3 for seed in seeds])))
    report = " ".join((HERE / "report" / "README.md").read_text(encoding="utf-8").split())
    found = set(re.findall(r"[+-]?\d\.\d{4} ± \d\.\d{4}|-?\d+\.\d / -?\d+\.\d%", report))
    assert len(found) > 150 and not found - cells, found - cells

    readme = (HERE / "README.md").read_text(encoding="utf-8")
    for name, gate, threshold in [("deep-plain12", None, None), ("deep-tsa", "skip", 0.9),
                                  ("deep-stretch", "stretch", 0.5), ("deep-several10", None, 0.5),
                                  ("drop-plain12", None, None), ("drop-tsa", "skip", 0.9)]:
        line = ours[name, "val", gate, threshold, ""]
        saved = ""
        if "plain" not in name:
            saved = "{:.0%} | {:+.3f} ± {:.3f}".format(line["macs_saved"][0], *plot.interval(line["plain"]))
        assert f" | {line['val_loss_sparse'][0]:.3f} | {saved}" in readme, name
    for name, gate, threshold in [("chain-straight", "straight", 0.5), ("chain-exit", None, 0.9),
                                  ("chain-plain3", None, None), ("chain-stretch-lam0.1", "stretch", 0.5),
                                  ("chain-halt-lam0.03", None, 0.5), ("chain-halt3", None, 0.5)]:
        line = ours[name, "val", gate, threshold, ""]
        assert f" | {line['macs_saved'][0]:.1%} | {line['val_loss_sparse'][0]:.4f}\n" in readme, name


def test_savings_are_counted_from_what_ran_relative_to_the_familys_plain_model(tmp_path, run_train):    # noqa: F811
    """A saving printed by an older version, or relative to another depth, must not get into the tables."""
    layer, head, routers = 12 * 128 ** 2 + 64 * 128, 128 * 65, 2 * 129 * 32
    halted = 3 * (2 * 128 ** 2 + 64 * 128) + 1.5 * 10 * 128 ** 2 + routers + head          # by hand
    plain = 3 * layer + head
    for name, L, used, ran in (("shakespeare-plain3-s0", 6, plain, 3), ("deep-plain3-s0", 12, plain, 3),
                               ("deep-several3-s0", 12, plain, 3), ("chain-halt3-s0", 6, halted, 1.5)):
        (tmp_path / name).mkdir()
        result = dict(model="plain" if "plain" in name else "halt", vocab_size=65, block_size=64, n_embd=128, n_layer=3,
                      val_loss=1.0, val_loss_sparse=9.0, tlops_saved=0.9, macs_saved=0.9, ran=[1, 0.5, 0])
        (tmp_path / name / "result.json").write_text(json.dumps(result))
        collected, = plot.read_rows([tmp_path / name])
        assert collected["val_loss_sparse"] == (9.0 if name == "chain-halt3-s0" else 1.0)
        assert collected["tlops_saved"] == pytest.approx(1 - ran / L)
        assert collected["macs_saved"] == pytest.approx(1 - used / (L * layer + head))
    sizes = dict(n_embd=128, block_size=64, vocab_size=32, n_layer=6, ran=[0.5] * 6)
    task = row("copy-tsa-s0", 0.5, 1.0, model="exit", **sizes)
    plot.count(task)        # the sequences of copy and sort have only 42 tokens
    config = Config(model="exit", n_embd=128, vocab_size=32)
    assert task["macs_saved"] == pytest.approx(tsa.savings(config, [0.5] * 6, T=42)[1])
    nofloor = task | {"variant": "exit-nofloor"}
    plot.count(nofloor)     # one more prediction, of 128 * 32 products
    products = 6 * (12 * 128 ** 2 + 42 * 128) + 128 * 32
    assert task["macs_saved"] - nofloor["macs_saved"] == pytest.approx(128 * 32 / products)
    assert plot.LAYERS == {"alone": 12, "deep": 12, "drop": 12, "long": 12, "rate": 12}
    assert run_train("--model", "plain", "--max_iters", 1) == 0         # scored again, it is still one row
    assert run(depth, tmp_path / "run" / "ckpt.pt", "--device", "cpu") == 0
    assert len(plot.read_rows([tmp_path / "run"])) == 1
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    (tmp_path / "run" / "scores.json").write_text(json.dumps([scores[0] | {"step": 0, "val_loss": 9.0}]))
    assert plot.read_rows([tmp_path / "run"])[0]["val_loss"] < 9        # not a score of a run that had not finished


def test_figures_show_what_their_axes_say(monkeypatch):
    """Multiply-adds on the x axis, the sparse loss on the y axis, and one histogram for each gated block."""
    axes, fake = MagicMock(), MagicMock()
    fake.Figure.return_value.subplots.return_value = [[axes] * 2]
    monkeypatch.setitem(sys.modules, "matplotlib", MagicMock())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", fake)
    line = row("drop-halt-s0", .5, None, macs_saved=(0.25, 0), val_loss=(9, 9), val_loss_sparse=(1.5, 0.1))
    line |= {"name": "drop-halt-lam0.03", "n": 3}       # the last panel
    plot.draw([line, line | {"split": "test"}, line | {"n": 1}], "x")
    assert axes.errorbar.call_args.args[:2] == ((25,), (1.5,))
    low, high = axes.set.call_args.kwargs["ylim"]
    assert 1.4 < low < 1.5 < high < 1.6
    depth.draw_histogram(torch.tensor([[[1.0]], [[0.3]], [[0.7]]]), 0.1, "x")
    assert [call.args[0] for call in axes.hist.call_args_list] == [pytest.approx([0.3]), pytest.approx([0.7])]
    assert axes.axvline.call_args.args == (0.1,)


# ----------------------------------------------------------------------------------------------------------------
# ngrams.py

def test_character_counts_by_hand():
    """The report compares the rounded gates with trigrams: here, 0 is always followed by 1, and 1 by 0 or 1."""
    train, val = np.array([0, 1, 1, 0, 1, 0, 1]), np.array([0, 1, 0])
    p01, p10 = 3.1 / 3.2, 2.1 / 3.2
    p010 = (1 + 5 * p10) / (2 + 5)      # after 0 1 come a 1 and a 0
    assert ngrams.losses(train, val, 2) == pytest.approx((-math.log(p01 * p10) / 2, -math.log(p010)))
