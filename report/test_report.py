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
from report import clock, plot, score
from test_tsa import HERE, folder, fit, tiny, tokens       # noqa: F401
from tsa import load_checkpoint, savings

README, REPORT = ((HERE / name).read_text(encoding="utf-8") for name in ("README.md", "report/README.md"))


def test_hops_are_counted_along_the_letters():
    """n hops need the smallest l with 2^l - 1 >= n, because all tokens hop at once."""
    assert score.count_hops("7ab4dc") == [0, 1, 2, 0, 1, 3]
    assert [score.blocks_that_suffice(n) for n in range(9)] == [1, 1, 2, 2, 3, 3, 3, 3, 4]

def test_scores_are_those_of_training(monkeypatch):
    """The tables mix rows of score.py and train.py."""
    saved = fit("--data copy --block_size 50 --max_iters 3 --gate straight --halt --gate_bias -0.3 --learning_rate 0.1")
    score.main(["run"])
    (model, _), result = load_checkpoint("run/ckpt.pt"), json.loads(Path("run/result.json").read_text())
    row, = json.loads(Path("run/scores.json").read_text())      # tasks other than chains have no unseen split
    assert all(row[name] == pytest.approx(result[name]) for name in row.keys() & result.keys())
    idx, targets = data.load("copy").windows("val", 50)
    right = (model(idx, sparse=True)[0].argmax(-1) == targets)[:, 21:]          # what precedes | is not scored
    assert row["accuracy"] == pytest.approx(right.double().mean().item()) and saved["step"] == 3
    fit("--max_iters 1 --out_dir text")
    score.main(["text"])
    rows = json.loads(Path("text/scores.json").read_text())
    assert [row["split"] for row in rows] == ["val", "test"] and rows[0]["val_loss"] != rows[1]["val_loss"]
    Path("text/about.json").write_text('{"commit": "abc1234"}')
    collected = plot.read_runs(["."])
    assert [(row["run"], row["split"], row["gate"], row.get("commit")) for row in collected] == [
        ("run", "val", "straight", None), ("text", "val", "soft", "abc1234"), ("text", "test", "soft", "abc1234")]
    assert "accuracy" in collected[0] and collected[2]["val_loss"] == rows[1]["val_loss"]

def test_shipped_chain_model_runs_the_blocks_that_suffice():
    """The README's table of hops is that of this model."""
    model, saved = load_checkpoint(HERE / "report" / "chain.pt")
    result = score.score(model, *(part[:200] for part in data.load("chain").windows("val", 30)), saved["vocab"])
    table = torch.tensor(result["hops"])
    assert table.sum() == 200 * 30 and result["exact"] > 0.9 and result["accuracy"] > 0.99
    assert result["exact"] == pytest.approx(table[[0, 1, 2, 3, 4], [0, 0, 1, 1, 2]].sum().item() / 6000)
    assert result["fewer_right"] <= result["fewer"] == table[2:, 0].sum() + table[4, 1]

def test_tokens_of_the_chain_model_attend_where_the_pages_say():
    """A plausible explanation can be wrong: the pages say what the attention weights show."""
    model, saved = load_checkpoint(HERE / "report" / "chain.pt")
    weights = []                # of each block: (B, nh, T, T)
    def record(attn, args):
        q, k = (part.unflatten(-1, (4, 16)).transpose(1, 2) for part in (attn.query(args[0]), args[1][..., :64]))
        weights.append((q @ k.mT / 4).masked_fill(torch.ones(30, 30).triu(1) > 0, -torch.inf).softmax(-1))
    for block in model.blocks:
        block.attn.register_forward_pre_hook(record)
    model(data.encode(saved["prompt"], saved["vocab"])[None])
    for block, token, place in ((0, "c", 3), (0, "m", 13), (1, "m", 12), (2, "t", 20)):
        assert weights[block][0].mean(0)[saved["prompt"].index(token)].argmax() == place - 1
    weights.clear()
    idx = data.load("chain").windows("val", 30)[0][:200]
    model(idx)
    points = idx - len(data.DIGITS)                         # the place that a letter points to, below 0 for a digit
    n, t = (points >= 0).nonzero(as_tuple=True)
    middle, end = points[n, t], points[n, points[n, t]]     # one hop away and, if there is a letter, two
    memorized = weights[0][n, 3, t].argmax(-1) == end
    pairs = {data.LETTERS[a] + data.LETTERS[b] for a, b in zip(middle[memorized], end[memorized])}
    assert pairs == set("gb je kb le so tr un vr wo xm".split()) and memorized[(middle == 6) & (end == 1)].all()

def row(run, loss, seed=0, macs=0.0, **settings):
    return dict(family=run.partition("-")[0], run=run, split="val", gate="soft", model="tsa", confidence="", seed=seed,
                tlops_saved=0.5, val_loss=9.0, val_loss_sparse=loss, macs_saved=macs) | settings

def test_models_are_compared_at_equal_multiply_adds_with_their_own_seed():
    """Seeds differ by more than models do, so only paired differences say anything."""
    t = plot.T_95[3]        # with 2 degrees of freedom, Student's t has a closed form
    assert 0.5 + t / 2 / (2 + t * t) ** 0.5 == pytest.approx(0.975, abs=1e-5)
    assert plot.interval([1.0, 2.0, 6.0]) == (3.0, pytest.approx(t * 7 ** 0.5 / 3 ** 0.5))
    plain = [row(f"a-plain{n}-s{seed}", loss + seed, seed, macs, model="plain")
             for n, loss, macs in ((6, 1.0, 0.0), (5, 1.1, 0.2), (4, 1.5, 0.4)) for seed in (0, 1)]
    others = [other | {"split": "test", "val_loss_sparse": 9.0} for other in plain]
    ours = [row("a-x-s0", 1.0, 0, 0.1), row("a-x-s1", 2.5, 1, 0.3), row("a-x-s2", 2.5, 2, 0.3)]
    line, = plot.summarize(ours)
    assert line["val_loss_sparse"] == (2.0, pytest.approx(0.75 ** 0.5))
    assert plot.against_plain(line, plain + others + ours) == pytest.approx([1.0 - 1.05, 2.5 - 2.3])
    assert plot.against_plain(line, plain[2:]) == []                # no plain model that saves nothing
    assert plot.against_plain({"rows": [row("a-x-s0", 1.0, 0, 0.5)]}, plain) == []      # no extrapolation
    assert len(plot.summarize(plain + others + ours + [ours[0] | {"gate": "skip"}])) == 3 + 3 + 2

def test_savings_are_counted_from_what_ran_relative_to_the_familys_plain_model():
    """A saving relative to another depth must not get into the tables."""
    layer, head, routers = 12 * 128 ** 2 + 64 * 128, 128 * 65, 2 * 129 * 32
    gated = 3 * (2 * 128 ** 2 + 64 * 128) + 1.5 * 10 * 128 ** 2 + routers + head          # by hand
    sizes = dict(vocab_size="65", block_size="64", n_embd="128", n_layer="3", ran=[1, 0.5, 0], val_loss=1.0)
    for run, L, used, ran in (("chain3-shalt-s0", 6, gated, 1.5), ("deep-x-s0", 12, gated, 1.5),
                              ("deep-several3-s0", 12, 3 * layer + head, 3)):
        counted = plot.count(row(run, 9.0) | sizes)
        assert counted["tlops_saved"] == pytest.approx(1 - ran / L)
        assert counted["macs_saved"] == pytest.approx(1 - used / (L * layer + head))
        assert counted["val_loss_sparse"] == (1.0 if "several" in run else 9.0)
    copied = plot.count(row("copy-x-s0", 9.0) | sizes)      # sequences of 42 tokens
    assert copied["macs_saved"] == pytest.approx(1 - (gated - 3 * 22 * 128) / (6 * (layer - 22 * 128) + head))

def test_numbers_on_the_pages_are_those_of_results_and_clock(monkeypatch, tmp_path, capsys):
    """A table that drifts away from its rows costs a reader's trust."""
    (copied := tmp_path / "r.csv").write_bytes((HERE / "report" / "results.csv").read_bytes())
    fake = MagicMock()
    monkeypatch.setitem(sys.modules, "matplotlib", fake)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", fake.figure)
    plot.main(["--csv", str(copied), "--svg", "x.svg"])
    before, rows = (plot.read_csv(path) for path in (HERE / "report" / "results.csv", copied))
    for ours, theirs in zip(rows, before, strict=True):     # Python 3.12 sums floats more exactly
        assert ours.pop("macs_saved") == pytest.approx(theirs.pop("macs_saved"))
        assert ours.pop("tlops_saved") == pytest.approx(theirs.pop("tlops_saved")) and ours == theirs
    rows = plot.read_csv(copied)
    axes = fake.figure.Figure.return_value.subplots.return_value
    assert len(axes.errorbar.call_args_list) == sum(map(len, plot.FOREST.values()))
    assert axes.errorbar.call_args_list[0].args[0] == pytest.approx(100 * 0.0014 / 1.5256, abs=0.005)      # Shakespeare
    printed, cells = capsys.readouterr().out, set()
    for line in printed.splitlines():
        found = dict(re.findall(r"(\w+) (-?\d\.\d{4} ± (?:\d\.\d{4}|nan))", line))
        cells |= {value.replace(" ± nan", "") for value in found.values()}
        cells |= set(re.findall(r"[+-]\d\.\d{4} ± \d\.\d{4}|[+-]\d\.\d{4}(?= ± nan)", line))
    for line in plot.summarize(rows):
        cells.add("{:.1f} / {:.1%}".format(100 * line["tlops_saved"][0], line["macs_saved"][0]))
        cells |= {f"{100 * each['tlops_saved']:.1f} / {each['macs_saved']:.1%}" for each in line["rows"]}
        cells |= {f"{each[name]:.4f}" for each in line["rows"] for name in ("val_loss", "val_loss_sparse")}
        cells.add("{:.1%} ± {:.1%}".format(*line["macs_saved"]))
    used = set(re.findall(r"[+-]?\d\.\d{4} ± \d\.\d{4}|-?\d+\.\d / -?\d+\.\d%|\d\d\.\d% ± \d\.\d%", README + REPORT))
    assert len(rows) > 300 and len(used) > 80 and not used - cells, used - cells
    with open(HERE / "report" / "clock.csv", newline="") as file:
        ratios = {f"{float(line['speedup']):.2f} ({float(line['predicted']):.2f})" for line in csv.DictReader(file)}
    used = set(re.findall(r"\d\.\d\d \(\d\.\d\d\)", REPORT))
    assert len(used) > 20 and not used - ratios, used - ratios

def test_maps_on_the_page_are_what_sample_prints(capsys):
    """The pictures are the first thing that a reader sees. A full pass claims no saving."""
    for path, *flags in (["report/chain.pt"], ["report/chain-tsa.pt"],
                         ["report/python-skip.pt", "--map", "--prompt", "    def __init__(self, name, value):"]):
        model, saved = load_checkpoint(HERE / path)
        gates = model(data.encode(saved["prompt"], saved["vocab"])[None], sparse=True)[1]
        tlops, macs = savings(model.config, (gates != 0).double().mean((1, 2)).tolist(), gates.size(2))
        sample.main([str(HERE / path), *flags, "--device=cpu"])
        out, err = capsys.readouterr()
        assert (f"saving {tlops:.1%} of token-layer operations and {macs:.1%} of" in err) == ("tsa" not in path)
        if path == "report/chain.pt":
            assert f"$ python sample.py {path}\n{out.strip()}\n" in README
        elif flags:
            picture = html.unescape(re.sub(r"<[^>]*>", "", (HERE / "report" / "map.svg").read_text("utf-8")))
            assert all("".join(line.split()) in re.sub(r"\s", "", picture) for line in out.splitlines())
        assert "!" not in out

def test_clock_times_what_it_says(monkeypatch, tmp_path, capsys):
    """Each model in turn; decoding the second half of the text, every round the same."""
    times, seen = iter([4.0, 2.0, 1.0, 8.0, 2.0, 1.0, 9.0, 3.0, 3.0] * 5), []
    monkeypatch.setattr(clock, "seconds_of", lambda call, device: next(times))
    clock.main([str(HERE / "report" / "chain.pt"), *"--layers 6 3 --device cpu --seconds 0 --csv c.csv".split()])
    with open("c.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["work"], row["batch"], row["gates"]) for row in rows[-3:]] == [
        ("decode", "1", "plain 6"), ("decode", "1", "plain 3"), ("decode", "1", "straight")]
    assert [float(rows[i]["speedup"]) for i in range(3)] == [1, 3, 4] and float(rows[0]["ms"]) == 8000
    assert float(rows[12]["ms"]) == 8000 / 15 and 0.05 < float(rows[2]["open"]) < 0.15      # 15 tokens in a round
    assert float(rows[1]["predicted"]) == pytest.approx(1 / (1 - 0.4965), abs=1e-3)         # half of the layers
    model, idx = tiny(), tokens()
    model.wte.register_forward_pre_hook(lambda wte, args: seen.append(args[0]))
    with torch.inference_mode():
        call = clock.decode(model, idx)
        expected = torch.cat([model(idx[:, :t], sparse=True)[1][:, :, -1:] for t in range(9, 17)], 2)
        seen.clear()
        assert torch.equal(call() != 0, expected != 0) and torch.equal(call() != 0, expected != 0)
    assert torch.equal(torch.cat(seen, 1), torch.cat([idx[:, 8:]] * 2, 1)) and model.blocks[0].attn.cache is None
