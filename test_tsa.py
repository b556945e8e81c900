"""
Run `python -m pytest -q`: offline, on the CPU. In the order of tsa.py, data.py, train.py, sample.py, report/.
"""
import hashlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import data
import sample
import train
import tsa
from report import clock, counts, depth, figure, plot, strip
from tsa import Config, GATES, KV, MODELS, Router, UserError, build, generate, stack, tlops_saved

HERE = Path(__file__).resolve().parent
SYNTHETIC = dict(vocab_size=32, block_size=64, n_head=4, n_embd=128)


def tiny(model="tsa", seed=0, **settings):
    """A small model with weights far from their start, so that gates and exits differ from token to token."""
    torch.manual_seed(seed)
    defaults = dict(vocab_size=11, block_size=16, n_layer=4, n_head=2, n_embd=16, dropout=0.0)
    model = build(Config(model=model, **defaults | settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def tokens(B=3, T=16, vocab_size=11, seed=1):
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\n" * 60, encoding="utf-8")
    return path


WILD = ["--warmup_iters", 0, "--learning_rate", 0.1, "--gate_bias", 0]      # soon opens some gates and closes some


def run(program, *flags):
    """A program's main, run in this process -> exit status"""
    try:
        return train.run_program("program", program.main, [str(flag) for flag in flags])
    except SystemExit as end:       # argparse refuses a flag so
        return end.code


@pytest.fixture
def run_train(text_file, tmp_path):
    """train.py on that text, small, into the folder `run`; of a flag given twice the last counts -> exit status"""
    small = ["--device", "cpu", "--dtype", "float32", "--n_layer", 3, "--n_embd", 16, "--n_head", 2, "--block_size", 16,
             "--batch_size", 4, "--data", text_file, "--out_dir", tmp_path / "run"]
    return lambda *flags: run(train, *small, *flags)


@pytest.fixture
def finished(run_train, tmp_path):
    """The folder of a run in which some gates are open and some closed."""
    assert run_train("--max_iters", 6, *WILD) == 0
    return tmp_path / "run"


def run_sample(*flags):
    return run(sample, "--device", "cpu", *flags)


def refused(capsys, status, *words):
    """A user's mistake: status 2, and one line on stderr with these words in it."""
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1, error
    assert all(word in error for word in words), error


# ----------------------------------------------------------------------------------------------------------------
# tsa.py: the parts

@pytest.mark.parametrize("settings, expected", [
    (dict(model="dense"), 4_782_336), (dict(model="tsa"), 4_864_901), (dict(model="exit"), 4_784_896),
    (dict(model="dense", vocab_size=6064, block_size=256), 6_350_848),
    (dict(model="tsa", vocab_size=6064, block_size=256), 6_433_413),
    (dict(model="dense", **SYNTHETIC), 1_199_104), (dict(model="tsa", **SYNTHETIC), 1_219_909),
])
def test_parameter_counts_are_the_papers(settings, expected):
    """A missing bias or an untied head would make another architecture than the one whose results we check."""
    assert sum(p.numel() for p in build(Config(**settings)).parameters()) == expected


def test_weights_start_as_in_the_paper():
    """A residual stream that starts out larger is a different experiment."""
    torch.manual_seed(0)
    model = build(Config())
    for block in model.blocks:
        for linear in (block.attn.proj, block.ffn.proj):
            assert abs(linear.weight.std() / (0.02 / 12 ** 0.5) - 1) < 0.02
        assert abs(block.attn.query.weight.std() / (1 / 3 ** 0.5 / 16) - 1) < 0.02         # torch's own start
    for embedding in (model.wte, model.wpe):
        assert abs(embedding.weight.std() / 0.02 - 1) < 0.03
    assert all(router.out.bias.item() == -1 for router in model.routers)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("mode", tsa.MODES)
def test_no_token_sees_the_future(model, mode):
    """A gate or an exit that looked ahead would score well and generate rubbish."""
    model, idx = tiny(model), tokens()
    changed = idx.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 11
    before, after = model(idx, mode)[0], model(changed, mode)[0]
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_attention_by_hand():
    """A head and a token at a time: some tokens ask, and each reads itself and all before it."""
    attn, x, source = tiny().blocks[0].attn, torch.randn(2, 3, 16), torch.randn(2, 8, 16)
    at = torch.tensor([[0, 5, 7], [2, 3, 7]])
    k, v = (source @ attn.key_value.weight.T).split(16, dim=-1)
    q, rows = x @ attn.query.weight.T, torch.empty(2, 3, 16)
    for b in range(2):
        for i in range(3):
            for head in (slice(0, 8), slice(8, 16)):
                seen = at[b, i] + 1
                weights = (k[b, :seen, head] @ q[b, i, head] / 8 ** 0.5).softmax(0)
                rows[b, i, head] = weights @ v[b, :seen, head]
    torch.testing.assert_close(attn(x, source, at), rows @ attn.proj.weight.T)
    torch.testing.assert_close(attn(source), attn(source, source, torch.arange(8).repeat(2, 1)))


def test_feed_forward_uses_exact_gelu():
    """The tanh approximation differs in the fourth digit: too little for a loss, but not for a comparison."""
    ffn, x = tiny().blocks[0].ffn, torch.randn(5, 16)
    hidden = x @ ffn.fc.weight.T + ffn.fc.bias
    hidden = hidden * (1 + torch.erf(hidden / 2 ** 0.5)) / 2
    torch.testing.assert_close(ffn(x), hidden @ ffn.proj.weight.T + ffn.proj.bias, rtol=1e-6, atol=1e-6)


def test_dropout_drops_its_share_and_keeps_the_mean():
    """The CPU's quick dropout spends 16 bits on an element: its rate must be exact, its draws independent."""
    drop, x = tsa.Dropout(0.1), torch.ones(1001, 1003)     # four elements share a draw, and here one is left over
    torch.manual_seed(0)
    y = drop(x)
    kept = y > 0
    assert abs(kept.float().mean() - 0.9) < 0.002 and torch.equal(y[kept], x[kept] / 0.9)
    assert (kept.float().mean(0) - 0.9).abs().max() < 0.05 and (kept.float().mean(1) - 0.9).abs().max() < 0.05
    both = (kept[:, :-1] & kept[:, 1:]).float().mean()      # neighbours share one draw
    assert abs(both - 0.81) < 0.003 and not torch.equal(drop(x), y) and torch.equal(drop.eval()(x), x)


def test_dropout_sits_at_the_papers_four_places(monkeypatch):
    """On the embeddings, the attention weights, after GELU and after the feed-forward output, and nowhere else."""
    places = []
    monkeypatch.setattr(tsa.Dropout, "forward", lambda self, x: places.append(tuple(x.shape)) or x)
    tiny("dense", n_layer=1, dropout=0.1).bfloat16().train()(tokens(B=2))
    assert places == [(2, 16, 16), (2, 2, 16, 16), (2, 16, 64), (2, 16, 16)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0.03)])
def test_attention_in_training_is_that_of_inference(dtype, tolerance, monkeypatch):
    """Training on a CPU may write attention out: it must be the same function, and both ways must apply dropout."""
    q, k, v = torch.randn(3, 2, 2, 9, 8).to(dtype)
    causal = torch.full((9, 9), -torch.inf).triu(1)
    drop = tsa.Dropout(1e-9)        # drops nothing, yet asks for the way that can drop
    trained, inferred = (tsa.attend(q, k, v, causal, None, drop.train(mode)) for mode in (True, False))
    torch.testing.assert_close(trained, inferred, rtol=tolerance, atol=tolerance)
    dropped = tsa.attend(q, k, v, causal, None, tsa.Dropout(0.5).train())
    assert not torch.allclose(dropped, inferred, atol=0.1)
    fused = []
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda *args, is_causal: fused.append((*args[3:], is_causal)))
    for mode in (True, False):
        tsa.attend(*(x.to("meta") for x in (q, k, v)), causal, None, tsa.Dropout(0.5).train(mode))
    assert fused == [(None, 0.5, True), (None, 0.0, True)]      # mask, dropout, causal: on a GPU it is the kernel's


def test_router_is_the_papers_gate_mlp():
    """Equation (3) by hand, with the paper's width."""
    router, h = tiny().routers[0], torch.randn(2, 5, 16)
    hidden = torch.relu(h @ router.fc.weight.T + router.fc.bias)
    p = torch.sigmoid((hidden @ router.out.weight.T + router.out.bias)[..., 0])
    torch.testing.assert_close(router(h), p)
    assert [Router(Config(n_embd=n)).fc.out_features for n in (256, 128, 32)] == [64, 32, 16]
    router = Router(Config(gate_bias=6.0))      # near p = 1 bfloat16 would round 1 - p to 0: a closed gate
    with torch.autocast("cpu", torch.bfloat16):
        p = router(torch.randn(1, 64, 256))
    assert p.dtype == torch.float32 and (1 - p).min() > 0 and len(p.unique()) > 8


@pytest.mark.parametrize("gate, expected", [("soft", ([.9, .5, .25, .1], [True, True, True, False])),
                                            ("skip", ([.9, .5, .25, .1], [.9, .5, .25, .0]))])
def test_gate_pairs_follow_their_definitions(gate, expected):
    """What training sees and what inference runs are the two halves of a design; p at the threshold still runs."""
    p = torch.tensor([.1, .5, .75, .9])
    for make_gate, values in zip(GATES[gate], expected):
        torch.testing.assert_close(make_gate(p, 0.75), torch.tensor(values))    # dtypes as well: a scale or a switch


@pytest.mark.parametrize("design", [tsa.binary, lambda p, threshold: (p <= threshold).float()])
def test_design_that_passes_no_gradient_is_refused(monkeypatch, design):
    """With a switch in training, even one made a float, the routers would silently never learn."""
    monkeypatch.setitem(GATES, "hard", (design, tsa.binary))
    with pytest.raises(UserError, match="no gradient"):
        build(Config(gate="hard"))


# ----------------------------------------------------------------------------------------------------------------
# tsa.py: the four models

def assert_same_with_gradients(model, ours, by_hand):
    """A detach too many or too few shows in a gradient and nowhere else."""
    torch.testing.assert_close(ours, by_hand)
    parameters = list(model.parameters())
    for a, b in zip(*(torch.autograd.grad(total, parameters) for total in (ours, by_hand))):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_papers_model_by_hand():
    """Equations (1) to (4), the loss over scored tokens, and the mean gate, which is the price of depth."""
    model, idx, targets = tiny(), tokens(), tokens(seed=2)
    targets[:, :10] = -1        # not scored
    x, gates = model.wte(idx) + model.wpe(torch.arange(16)), [torch.ones(3, 16)]
    for l, block in enumerate(model.blocks):
        if l > 0:
            gates.append(1 - model.routers[l - 1](x))
        x = x + gates[l][..., None] * block.attn(block.ln1(x))
        x = x + gates[l][..., None] * block.ffn(block.ln2(x))
    logits = model.norms[0](x) @ model.wte.weight.T
    expected = F.cross_entropy(logits[:, 10:].flatten(0, 1), targets[:, 10:].flatten())
    task, used = model.loss(idx, targets)
    torch.testing.assert_close(model(idx)[0], logits)
    torch.testing.assert_close(used, torch.stack(gates))
    assert_same_with_gradients(model, task + 0.3 * used[1:].mean(), expected + 0.3 * torch.stack(gates[1:]).mean())


def test_exit_trains_on_the_mean_of_all_exits():
    """Paper, section 1: the uniform mean of the L cross-entropies, each with its own LayerNorm and the tied head."""
    model, idx, targets = tiny("exit"), tokens(), tokens(seed=2)
    targets[0, :7] = -1
    x, losses = model.wte(idx) + model.wpe(torch.arange(16)), []
    for block, norm in zip(model.blocks, model.norms):
        x = block(x)
        logits = norm(x) @ model.wte.weight.T
        losses.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1))
    assert_same_with_gradients(model, model.loss(idx, targets)[0], sum(losses) / 4)
    torch.testing.assert_close(model(idx)[0], logits)


def test_sweep_of_exits_leaves_the_threshold_as_it_was():
    """Otherwise whatever runs after the sweep would use its last threshold."""
    model, idx = tiny("exit", threshold=0.4), tokens()
    rows = train.sweep_exits(model, (idx, idx))
    assert model.config.threshold == 0.4
    assert [row["threshold"] for row in rows] == [.99, .95, .90, .85, .80, .75, .70, .65, .60, .55, .50, .40, .30]
    losses = [row["val_loss"] for row in rows if row["threshold"] == 0.4]
    assert losses == [train.evaluate(model, (idx, idx), "gathered")["loss"]]


def test_exited_token_really_stops():
    """In the paper's code only its logits freeze; here its h stays, and the others read keys made from it."""
    model, idx = tiny("exit", threshold=0.4), tokens()
    logits, used = model(idx, "masked")
    gates = stack(used, idx)
    left, stays = gates[2] == 0, gates[3] == 1
    assert 0 < left.float().mean() < 1 and 0 < stays.float().mean() < 1 and not (left & stays).any()
    x = model.wte(idx) + model.wpe(torch.arange(16))
    for block in model.blocks[:2]:
        x = block(x)
    sure = (model.norms[1](x) @ model.wte.weight.T).softmax(-1).amax(-1) > 0.4
    assert torch.equal(sure, left)
    torch.testing.assert_close(logits[left], (model.norms[1](x) @ model.wte.weight.T)[left])
    x = torch.where(left[..., None], x, model.blocks[2](x))
    x = torch.where(stays[..., None], model.blocks[3](x), x)
    torch.testing.assert_close(logits[stays], (model.norms[3](x) @ model.wte.weight.T)[stays])


def test_halting_trains_what_it_runs():
    """In training every token runs to the top, yet its prediction where it halts must be the one inference makes."""
    model, idx = tiny("halt", seed=6, threshold=0.3).double(), tokens()
    executed, used = model(idx, "masked")
    last = stack(used, idx).sum(0).long() - 1
    assert len(last.unique()) > 2, last
    levels = torch.stack([logits for logits, _, _ in model.levels(idx)])                   # (L, B, T, V)
    trained = levels.gather(0, last[None, :, :, None].expand_as(levels[:1]))[0]
    torch.testing.assert_close(trained, executed, rtol=1e-10, atol=1e-10)


def test_halting_loss_and_its_gradient_by_hand():
    """Equation (5), a token at a time."""
    model, idx, targets = tiny("halt", seed=6, threshold=0.3), tokens(), tokens(seed=2)
    targets[0, :8] = -1         # not scored, as in the tasks; their depth has its price all the same
    x = left = model.wte(idx) + model.wpe(torch.arange(16))
    runs, p, log_p = torch.ones(3, 16), [], []
    for l, block in enumerate(model.blocks):
        x = x + block.attn(block.ln1(x), block.ln1(left))
        x = x + block.ffn(block.ln2(x))
        left = runs[..., None] * x + (1 - runs[..., None]) * left
        p.append(model.routers[l](x) if l < 3 else torch.ones(3, 16))
        runs = runs * (p[l] <= 0.3)
        log_p.append((model.norms[0](x) @ model.wte.weight.T).log_softmax(-1))
    expected, depth = 0, 0
    for b in range(3):
        for t in range(16):
            survive = 1.0
            for l in range(4):
                weight = 0.4 * survive * p[l][b, t] + (l > 0) * 0.1 / 3 + (l == 3) * 0.5
                if targets[b, t] >= 0:
                    expected = expected - weight * log_p[l][b, t, targets[b, t]] / 40
                depth = depth + (survive / 48 / 3 if l > 0 else 0)
                survive = survive * (1 - p[l][b, t])
    task, survives = model.loss(idx, targets)
    torch.testing.assert_close(task, expected)
    assert_same_with_gradients(model, task + 0.3 * survives[1:].mean(), expected + 0.3 * depth)


@pytest.mark.parametrize("model", MODELS)
def test_step_never_waits_for_a_gpu(model):
    """On torch's meta device mixing devices raises, and so does reading a value: no GPU is needed."""
    model = tiny(model).to("meta").train()
    idx = torch.zeros(3, 16, dtype=torch.long, device="meta")
    task, gates = model.loss(idx, idx)
    (task + 0.1 * gates[1:].mean()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert all(parameter.grad is not None for parameter in model.parameters())


# ----------------------------------------------------------------------------------------------------------------
# tsa.py: gathered, cached, generated, counted

KEEP = {
    "ragged": torch.tensor([[1, 0, 1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 0]]),
    "all": torch.ones(3, 8), "none": torch.zeros(3, 8), "one row": F.one_hot(torch.tensor(13), 24).view(3, 8),
    "batch of one": torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1]]), "one token": torch.ones(1, 1),
}


@pytest.mark.parametrize("pattern", KEEP)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 0.05)])
def test_gathered_block_equals_masked_block(pattern, dtype, tolerance):
    """The heart of it: tokens that are not computed must not change a number, whether gates are scales or switches."""
    keep = KEEP[pattern]
    scale = keep * (0.2 + 0.8 * torch.rand(keep.shape, generator=torch.Generator().manual_seed(0)))
    block, x = tiny().blocks[1].to(dtype), torch.randn(*keep.shape, 16, dtype=dtype)
    for gate in (scale, keep > 0):
        with torch.no_grad():
            gathered = block.gathered(x, gate)
            torch.testing.assert_close(gathered, block(x, gate), rtol=tolerance, atol=tolerance)
        assert torch.equal(gathered[keep == 0], x[keep == 0])


def test_gathered_block_refuses_to_train():
    """Its dropout would fall on other tensors than in training: silently a different model."""
    with pytest.raises(AssertionError, match="dropout"):
        tiny().blocks[1].train().gathered(torch.randn(1, 4, 16), torch.ones(1, 4))


HARD = [dict(model="dense"), dict(model="tsa", gate="soft"), dict(model="tsa", gate="skip"),
        dict(model="exit", threshold=0.4), dict(model="halt", seed=6)]


@pytest.mark.parametrize("settings", HARD)
def test_gathered_model_equals_masked_model(settings):
    """On its own gates in float64, where rounding flips none; and on given gates, which any model replays."""
    model, idx = tiny(**settings).double(), tokens()
    masked, gathered = model(idx, "masked"), model(idx, "gathered")
    torch.testing.assert_close(masked[0], gathered[0], rtol=1e-10, atol=1e-10)
    assert torch.equal(stack(masked[1], idx) > 0, stack(gathered[1], idx) > 0)
    if settings["model"] != "dense":
        assert 0 < (stack(gathered[1], idx) > 0).double().mean() < 1
    gates = torch.bernoulli(torch.full((4, 3, 16), 0.7)).cumprod(0)     # who left stays out
    gates[0] = 1
    scales = [] if settings["model"] in ("exit", "halt") else [gates * torch.rand(4, 3, 16)]
    for gates in (gates > 0, *scales):
        masked, gathered = (model(idx, mode, gates=gates) for mode in ("masked", "gathered"))
        torch.testing.assert_close(masked[0], gathered[0], rtol=1e-10, atol=1e-10)
        assert all(torch.equal(stack(used, idx)[1:], gates[1:].float()) for _, used in (masked, gathered))


@pytest.mark.parametrize("settings", HARD)
def test_cached_text_is_uncached_text(settings):
    """Character for character, past the context twice, alone or beside a sequence that skips other tokens."""
    model = tiny(**settings).double()
    for B, mode in [(2, "trained"), (2, "masked"), (2, "gathered"), (1, "gathered")]:
        drawn = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            steps = list(generate(model, tokens(B, T=3), 40, mode=mode, use_cache=use_cache))
            drawn.append((torch.cat([step[0] for step in steps], 1), torch.cat([step[1] for step in steps], 1)))
        assert torch.equal(drawn[0][0], drawn[1][0])
        torch.testing.assert_close(drawn[0][1], drawn[1][1])


def test_generation_keeps_half_a_window_and_greedy_is_argmax(monkeypatch):
    """The rule past the context is fixed, so that cached and uncached text agree; top_k of 1 is greedy."""
    model, text = tiny("dense"), tokens(B=1, T=1)
    window, read, embed = text, [], model.embed
    monkeypatch.setattr(model, "embed", lambda idx, cache=None: read.append(idx.size(1)) or embed(idx, cache))
    for idx_next, gates in generate(model, text, 30, temperature=0, use_cache=False):
        if window.size(1) == 17:
            window = window[:, -8:]
        assert read.pop() == window.size(1) and gates.shape == (4, 1)
        assert idx_next.item() == model(window)[0][0, -1].argmax()
        window = torch.cat([window, idx_next], 1)
    read.clear()
    list(generate(model, text, 20))
    assert read == [1] * 16 + [8] + [1] * 3         # with the cache one token a step, half a window when it is full
    greedy, tiny_temperature, top_1 = (
        torch.cat([t for t, _ in generate(model, text, 12, *how)]) for how in ((0,), (1e-40,), (1.0, 1)))
    assert torch.equal(greedy, top_1) and torch.equal(greedy, tiny_temperature)


@pytest.mark.parametrize("temperature, top_k", [(0.5, None), (1.5, 3)])
def test_draws_follow_temperature_and_top_k(temperature, top_k):
    """Counted over 20,000 draws of one token: the shares are those of the softmax, cut to the k likeliest."""
    model, idx = tiny("dense"), tokens(B=1, T=5)
    logits = model(idx)[0][0, -1]
    if top_k is not None:
        logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
    torch.manual_seed(0)
    drawn, _ = next(iter(generate(model, idx.repeat(20_000, 1), 1, temperature, top_k)))
    shares = torch.bincount(drawn[:, 0], minlength=11) / 20_000
    assert (shares - (logits / temperature).softmax(0)).abs().max() < 0.015


@pytest.mark.parametrize("alpha, saved", [(.341, .549), (.730, .225), (.726, .228), (.833, .139), (.755, .204)])
def test_token_layer_operations_are_the_papers(alpha, saved):
    """The paper's table (section 3): the same alpha must give the same saving."""
    assert abs(tlops_saved([1] + [alpha] * 5) - saved) < 0.0006


# ----------------------------------------------------------------------------------------------------------------
# data.py

def test_text_survives_encoding(tmp_path):
    """Any UTF-8 text, whatever its alphabet: every character comes back, in the splits' order."""
    text = "naïve 漢字 🙂\n" * 50
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    corpus = data.load(str(tmp_path / "t.txt"))
    assert corpus.vocab == "".join(sorted(set(text)))
    joined = torch.cat([corpus.splits[s] for s in ("train", "val", "test")])
    assert "".join(corpus.vocab[i] for i in joined) == text
    assert data.encode("naïve", corpus.vocab) == [corpus.vocab.index(c) for c in "naïve"]
    assert [len(corpus.splits[s]) for s in ("train", "val", "test")] == [440, 55, 55]


@pytest.mark.parametrize("task", ["copy", "sort"])
def test_the_papers_tasks_are_what_they_say(task):
    """`^source|target$`, and only target and end are scored; training sequences are not those of validation."""
    corpus = data.load(task)
    idx, targets = corpus.windows("val", 64)
    text = "".join(corpus.vocab[i] for i in idx[0])
    source, target = text[1:].split("|")
    assert len(corpus.vocab) == 32 and len(source) == 20 and len(idx) == 1000 and len(corpus.splits["train"]) == 10_000
    assert target == (source if task == "copy" else "".join(sorted(source, key=corpus.vocab.index)))
    assert targets[0, :21].eq(-1).all()
    assert "".join(corpus.vocab[i] for i in targets[0, 21:]) == target + "$"
    seen = {tuple(row) for row in corpus.splits["train"][:, 0].tolist()}
    assert not any(tuple(row) in seen for row in idx.tolist())


def test_chain_asks_for_the_digit_that_the_letters_lead_to():
    """Followed by hand, a letter at a time: a wrong target would turn the task into guessing."""
    corpus = data.load("chain")
    idx, targets = corpus.windows("val", 64)
    for row, target in zip(idx[:20], targets):
        text = "".join(corpus.vocab[i] for i in row)
        assert len(text) == 56 and text[:8].isdigit()
        for place in range(56):
            at = place
            while not text[at].isdigit():
                at = data.PLACES.index(text[at])
            assert corpus.vocab[target[place]] == text[at]
        letters = [c for c in text if c.isalpha()]
        assert len(set(letters)) == len(letters)        # so that chains stay apart


@pytest.fixture
def server():
    """A server on loopback that sends what it is told to."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            time.sleep(self.server.pause)
            self.send_response(self.server.status)
            if self.server.status == 302:
                self.send_header("Location", self.path)
            length = len(self.server.body) if self.server.length is None else self.server.length
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(self.server.body)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.status, server.body, server.length, server.pause = 200, b"", None, 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def serve(server, monkeypatch, folder, name, body):
    """Make `body` the corpus `name` of data.py, its home the server, its folder one of the test's own."""
    server.body = body
    url, sha256 = f"http://127.0.0.1:{server.server_port}/x", hashlib.sha256(body).hexdigest()
    monkeypatch.setattr(data, "FOLDER", folder / "data")
    monkeypatch.setitem(data.HOMES, name, (data.HOMES[name][0], url, sha256))
    return folder / "data" / data.HOMES[name][0]


VERSE = b"To be, or not to be, that is the question.\n" * 40


def test_download_is_verified_and_kept(server, monkeypatch, tmp_path):
    """The first run fetches the file, the second needs no network, and a file damaged since is refused."""
    path = serve(server, monkeypatch, tmp_path, "shakespeare", VERSE)
    corpus = data.load("shakespeare")
    server.status = 404
    assert data.load().vocab == corpus.vocab and path.read_bytes() == VERSE
    path.write_bytes(b"To be, or")
    with pytest.raises(UserError, match="damaged"):
        data.load("shakespeare")


@pytest.mark.parametrize("status, body, length, pause", [
    (404, VERSE, None, 0), (200, b"another file", None, 0), (200, VERSE[:9], 1720, 0), (200, VERSE, None, 1),
    (302, VERSE, None, 0), (200, b"", 0, 0)])
def test_bad_download_leaves_nothing_and_falls_back(server, monkeypatch, tmp_path, capsys, status, body, length, pause):
    """Missing, another, cut, stalling, redirected in circles, empty: nothing is kept, and stdlib is read instead."""
    path = serve(server, monkeypatch, tmp_path, "shakespeare", VERSE)
    monkeypatch.setattr(data, "STALL_SECONDS", 0.3)
    server.status, server.body, server.length, server.pause = status, body, length, pause
    with pytest.raises(UserError, match="--data stdlib"):
        data.load("shakespeare")
    assert not path.parent.exists()
    assert data.load().name == "stdlib"
    line = capsys.readouterr().out
    assert "stdlib" in line and path.name in line and line.count("\n") == 1


def test_enwik8_is_unpacked_and_cut_by_characters(server, monkeypatch, tmp_path):
    """A zip of unicode text: verified before it is opened, split at characters, not bytes."""
    text, packed = "<page>naïve 漢字 🙂</page>\n" * 50, io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("enwik8", text)
    serve(server, monkeypatch, tmp_path, "enwik8", packed.getvalue())
    monkeypatch.setattr(data, "ENWIK8_CUTS", (900, 1000))
    corpus = data.load("enwik8")
    assert "".join(corpus.vocab[i] for i in corpus.splits["val"]) == text[900:1000]
    assert [len(corpus.splits[split]) for split in ("train", "val", "test")] == [900, 100, len(text) - 1000]


def test_written_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    """A disk that fills up, or a kill, while a checkpoint is written must not cost the one that was there."""
    path = tmp_path / "ckpt.pt"
    data.write_atomic(path, b"old")

    def full(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        data.write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


# ----------------------------------------------------------------------------------------------------------------
# train.py

def slow_score(model, text, vocab, mode, unscored=0):
    """
    Score a text's validation split one window and one character at a time, without the first `unscored` of each window
    -> loss, mean gates, shares run.
    """
    stream = [vocab.index(c) for c in text[int(0.8 * len(text)):int(0.9 * len(text))]]
    losses, n, gate_sum, ran = [], 0, 0, 0
    for start in range(0, len(stream) - 16, 16):
        x, y = stream[start:start + 16], stream[start + 1:start + 17]
        with torch.no_grad():
            logits, used = model(torch.tensor([x]), mode)
        losses += [-logits[0, t].log_softmax(0)[y[t]].item() for t in range(unscored, 16)]
        gates = stack(used, torch.tensor([x]))
        n, gate_sum, ran = n + 16, gate_sum + gates.sum((1, 2)), ran + (gates != 0).sum((1, 2))
    return sum(losses) / len(losses), (gate_sum / n).tolist(), (ran / n).tolist()


@pytest.mark.parametrize("settings", [dict(gate="skip"), dict(gate="soft"), dict(model="halt", seed=6)])
def test_evaluation_equals_a_slow_loop(text_file, settings):
    """Means over the whole split, not over unequal batches; what is unscored counts in the gates, not in the loss."""
    corpus = data.load(str(text_file))
    model = tiny(vocab_size=len(corpus.vocab), **settings)
    for mode, unscored in (("trained", 0), ("masked", 0), ("gathered", 5)):
        idx, targets = (part.clone() for part in corpus.windows("val", 16))
        targets[:, :unscored] = -1
        score = train.evaluate(model, (idx, targets), mode, batch_size=7)
        loss, alpha, ran = slow_score(model, text_file.read_text(), corpus.vocab, mode, unscored)
        assert abs(score["loss"] - loss) < 1e-5
        assert score["alpha_by_block"] == pytest.approx(alpha[1:], abs=1e-5)
        assert score["ran"] == pytest.approx(ran, abs=1e-6) and (mode == "trained" or 0 < sum(ran[1:]) < 3)


def test_result_is_the_score_of_the_checkpoint(finished, text_file):
    """result.json is what the tables are made of: validation split, both modes, neither taken for the other."""
    result = json.loads((finished / "result.json").read_text())
    model, saved = train.load_checkpoint(finished / "ckpt.pt")
    trained, executed = (slow_score(model, text_file.read_text(), saved["vocab"], mode)
                         for mode in ("trained", "masked"))
    for scores in (result, saved["rows"][-1]):          # the log scores 64 windows, and this text has fewer
        assert scores["val_loss"] == pytest.approx(trained[0], abs=1e-5)
        assert scores["alpha"] == pytest.approx(sum(trained[1][1:]) / 2, abs=1e-5)
        assert scores["val_loss_executed"] == pytest.approx(executed[0], abs=1e-5)
        assert scores["alpha_executed"] == pytest.approx(sum(executed[2][1:]) / 2, abs=1e-6)
        assert scores["tlops_saved_executed"] == pytest.approx(1 - sum(executed[2]) / 3, abs=1e-6)
    assert abs(trained[0] - executed[0]) > 1e-4 and 0 < result["alpha_executed"] < 1
    assert result["ran"] == pytest.approx(executed[2], abs=1e-6)


def test_run_equals_a_loop_written_out(run_train, text_file, tmp_path):
    """Ten steps of train.py against the settings spelled out: seeds, split, warm-up, cosine, decay, clip, lam."""
    assert run_train("--max_iters", 10, "--learning_rate", 0.02, "--warmup_iters", 4, "--lam", 0.3, "--seed", 5) == 0
    trained = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["model"]
    corpus = data.load(str(text_file))

    def seed(step):
        torch.manual_seed(int(np.random.SeedSequence((5, step)).generate_state(1)[0]))

    seed(0)
    model = build(Config(vocab_size=len(corpus.vocab), block_size=16, n_layer=3, n_head=2, n_embd=16, dropout=0.0))
    named = dict(model.named_parameters())
    decayed = [name for name in named if not re.search("bias|ln|norms|wte|wpe", name)]
    assert len(decayed) == 3 * 5 + 2 * 2
    groups = [{"params": [named[name] for name in decayed], "weight_decay": 0.1},
              {"params": [named[name] for name in named if name not in decayed], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=False)
    clipped = 0
    for step in range(1, 11):
        seed(step)
        start = torch.randint(int(0.8 * len(text_file.read_text())) - 16, (4, 1))
        rows = corpus.splits["train"].long()[start + torch.arange(17)]
        task, gates = model.loss(rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad()
        (task + 0.3 * gates[1:].mean()).backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
        clipped += norm > 1
        for p in model.parameters():
            p.grad /= max(norm, 1)
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * min(step / 4, 1) * (0.55 + 0.45 * math.cos(math.pi * (step - 1) / 9))
        optimizer.step()
    assert clipped > 2
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained[name], parameter.detach(), rtol=1e-3, atol=2e-4)


def flags_of(*argv, device="cpu", corpus="shakespeare"):
    return train.new_flags(vars(train.make_parser().parse_args(["--dtype", "float32", *argv])), corpus, device)


def test_paper_preset_is_the_papers():
    """Section 2: what `--preset paper` promises, with enwik8's context and the tasks' sizes; a GPU gets it unasked."""
    flags = flags_of("--preset", "paper")
    expected = dict(n_layer=6, n_head=8, n_embd=256, block_size=128, batch_size=64, max_iters=5000, learning_rate=3e-4,
                    warmup_iters=0, dropout=0.1, lam=0.001, gate_bias=-1.0, threshold=0.5, gate="soft")
    assert {flag: flags[flag] for flag in expected} == expected
    assert flags_of(device="cuda:0")["n_embd"] == 256 and flags_of()["n_embd"] == 128
    assert flags_of("--preset", "paper", corpus="enwik8")["block_size"] == 256
    laptop, gpu = flags_of("--model", "halt"), flags_of("--model", "halt", device="cuda")
    assert (laptop["lam"], laptop["lam_iters"], gpu["lam"], gpu["lam_iters"]) == (0.01, 550, 0.03, 200)
    copy = flags_of("--preset", "paper", corpus="copy")
    expected = dict(n_embd=128, n_head=4, block_size=64, batch_size=256, max_iters=390, lam=0.01, learning_rate=3e-4)
    assert {flag: copy[flag] for flag in expected} == expected
    assert flags_of("--preset", "paper", "--n_embd", "64", corpus="copy")["n_embd"] == 64       # what is given wins


def die():
    raise KeyboardInterrupt         # not a signal, so nothing is saved: as sudden as kill -9


@pytest.mark.parametrize("end, saved_at", [(lambda: os.kill(os.getpid(), signal.SIGINT), 33), (die, 20)])
def test_interrupted_run_resumes_to_the_bit(run_train, tmp_path, monkeypatch, end, saved_at):
    """Stopped by Ctrl-C, which saves, or killed, then resumed: the weights and the log of one long run."""
    flags, seed_step = ["--max_iters", 50, "--eval_interval", 20, "--dropout", 0.1], train.seed_step
    assert run_train(*flags, "--out_dir", tmp_path / "whole") == 0

    def end_at_33(seed, step):
        seed_step(seed, step)
        if step == 33:
            end()

    with monkeypatch.context() as patch:
        patch.setattr(train, "seed_step", end_at_33)
        assert run_train(*flags) == 130
    assert torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["step"] == saved_at
    assert run(train, "--resume", "--device", "cpu", "--out_dir", tmp_path / "run") == 0
    a, b = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True) for name in ("whole", "run"))
    assert a["step"] == b["step"] == 50 and len(a["rows"]) == 4
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert [row | {"tokens_per_s": 0} for row in a["rows"]] == [row | {"tokens_per_s": 0} for row in b["rows"]]
    assert len((tmp_path / "run" / "log.csv").read_text().splitlines()) == 5


@pytest.mark.parametrize("flags, prices", [(["--model", "halt"], (0.25, 0.5, 0.5)), (["--gate", "soft"], (0.5,) * 3),
                                           (["--model", "halt", "--lam_iters", 50], (0.2, 0.4, 0.5))])
def test_price_of_halting_rises(run_train, tmp_path, flags, prices):
    """At full price no block would be worth it early on, and routers would halt; the paper's price is full at once."""
    assert run_train(*flags, "--lam", 0.5, "--max_iters", 80, "--eval_interval", 80) == 0
    rows = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["rows"]
    for row, lam in zip(rows[1:], prices):
        assert row["loss"] == pytest.approx(row["task_loss"] + lam * row["depth_loss"], abs=1e-5)


@pytest.mark.parametrize("model", ["tsa", "halt"])
def test_task_trains_on_its_own_sequences_in_bfloat16(run_train, monkeypatch, model):
    """How a GPU trains the paper's tasks: whole sequences, dropout, blocks in bfloat16, logits in float32."""
    seen, loss = [], MODELS[model].loss

    def watched(self, idx, targets):
        assert self.training and torch.is_autocast_enabled("cpu") and self(idx)[0].dtype == torch.float32
        seen.append((idx, targets))
        return loss(self, idx, targets)

    monkeypatch.setattr(MODELS[model], "loss", watched)
    assert run_train("--model", model, "--data", "copy", "--block_size", 64, "--max_iters", 2, "--dtype",
                     "bfloat16") == 0
    known = {(tuple(idx), tuple(targets)) for idx, targets in data.load("copy").splits["train"].tolist()}
    for idx, targets in seen:
        assert {(tuple(i), tuple(t)) for i, t in zip(idx.tolist(), targets.tolist())} < known


def test_infinite_loss_stops_the_run_and_keeps_the_checkpoint(run_train, tmp_path, capsys, monkeypatch):
    """A diverged run must not overwrite the weights that were still good."""
    original = train.schedule
    monkeypatch.setattr(train, "schedule", lambda step, *n: original(step, *n) if step <= 12 else math.inf)
    refused(capsys, run_train("--max_iters", 60, "--eval_interval", 10), "not finite")
    model, saved = train.load_checkpoint(tmp_path / "run" / "ckpt.pt")
    assert saved["step"] == 10 and all(parameter.isfinite().all() for parameter in model.parameters())


def test_results_and_table(run_train, tmp_path, capsys):
    """The keys are the contract of every later comparison; early exit brings its sweep."""
    keys = {"model", "gate", "lam", "gate_bias", "threshold", "seed", "data", "n_params", "val_loss", "alpha",
            "val_loss_executed", "alpha_executed", "alpha_by_block", "ran", "tlops_saved_executed", "tokens_per_s",
            "device", "dtype", "torch", "seconds", "max_iters", "batch_size", "learning_rate"}
    for model in MODELS:
        assert run_train("--model", model, "--max_iters", 3, "--out_dir", tmp_path / model) == 0
        result = json.loads((tmp_path / model / "result.json").read_text())
        assert keys < result.keys() and len(result["ran"]) == 3
        assert (result["lam"] is None) == (model in ("dense", "exit")) == (result["alpha"] == 1)
        assert (result["threshold"] is None) == (model == "dense")
        assert ("thresholds" in result) == (model == "exit")
    capsys.readouterr()
    assert run(train, "--table", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 == len((tmp_path / "results.csv").read_text().splitlines())
    assert lines[1].split()[:2] == ["dense", "dense"]
    curves = plot.read_curves(tmp_path / "results.csv")
    assert curves.keys() == {"dense", "tsa soft, 3 blocks", "exit, 3 blocks", "halt, 3 blocks"}
    assert len(curves["exit, 3 blocks"]) == len(train.THRESHOLDS)


# ----------------------------------------------------------------------------------------------------------------
# Mistakes

@pytest.mark.parametrize("content, word", [(b"", "empty"), (b"aaaa" * 99, "one character"),
                                           (b"abcdef" * 9, "block_size"), (b"ab\xff" * 999, "UTF-8")])
def test_bad_text_is_one_line(run_train, text_file, tmp_path, capsys, content, word):
    """An empty, one-character, too short or binary text: say so, and leave no run behind."""
    text_file.write_bytes(content)
    refused(capsys, run_train(), word)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, words", [
    (["--n_head", 3], ["n_head 3", "n_embd 16"]), (["--n_layer", 1], ["n_layer"]), (["--device", "abacus"], ["abacus"]),
    (["--model", "dense", "--lam", 1], ["--lam"]), (["--data", "copy"], ["--block_size"]),
    (["--dropout", "nan"], ["--dropout"]), (["--gate", "ajar"], ["--gate", "soft"]), (["--seed", "many"], ["many"]),
    (["--resume", "--fresh"], ["--fresh"]), (["--n_layer", 0], ["--n_layer"]), (["--n_embd", -1], ["--n_embd"]),
    (["--batch_size", 0], ["--batch_size"]), (["--max_iters", -1], ["--max_iters"]),
    (["--model", "halt", "--gate", "soft"], ["--gate"]), (["--table", "no/such/folder"], ["no finished run"]),
    (["--data", "no/such/file"], ["not a file"]), (["--data", "."], ["not a file"]),
    (["--model", "exit", "--n_layer", 2], ["n_layer of 3"]),
])
def test_bad_flags_are_one_line(run_train, capsys, flags, words):
    """Nonsense in a flag is answered by its name, with status 2."""
    refused(capsys, run_train(*flags), *words)


def test_device_is_tried_before_it_is_taken(monkeypatch):
    """A GPU that torch lists but cannot use must end neither in a traceback nor, silently, on the CPU."""
    def broken(*shape, device):
        raise RuntimeError("the driver is too old\nand more")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", broken)
    with pytest.raises(UserError, match="--device cuda cannot be used here .the driver is too old.: .*cpu"):
        train.pick_device()


def test_folder_that_holds_a_run_is_refused(finished, run_train, text_file, capsys):
    """Both ways out are named, and nothing is lost, not even when the text changes but keeps its letters."""
    before, flags = (finished / "ckpt.pt").read_bytes(), ["--max_iters", 6, *WILD]
    refused(capsys, run_train(*flags), "--resume", "--fresh")
    assert run_train(*flags, "--resume") == 0
    assert "finished" in capsys.readouterr().out        # what a loop over experiments has done is not done again
    refused(capsys, run_train(*flags, "--resume", "--lam", 0.5), "--lam 0.5", "0.001")
    text_file.write_text(text_file.read_text()[::-1])
    (finished / "result.json").unlink()
    refused(capsys, run(train, "--resume", "--device", "cpu", "--out_dir", finished), "has changed")
    assert (finished / "ckpt.pt").read_bytes() == before
    assert run_train("--max_iters", 1, "--fresh") == 0
    (finished / "ckpt.pt").unlink()         # to save space, say; its result is still wanted
    refused(capsys, run_train("--max_iters", 1), "--fresh")
    assert (finished / "result.json").exists()


def test_folder_that_cannot_be_written_is_one_line(run_train, text_file, capsys):
    """A file in the way of the output folder."""
    refused(capsys, run_train("--out_dir", text_file / "run"), str(text_file))


def test_bad_checkpoint_is_one_line_and_runs_no_code(finished, tmp_path, capsys):
    """Missing, cut, empty, foreign; and a pickle, which can run anything when it is loaded."""
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    path = finished / "ckpt.pt"
    whole = path.read_bytes()
    for content in (whole[:-100], b"", Bomb(), {"model": {}}, [1, 2]):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        refused(capsys, run_sample("--ckpt", path), "it is damaged or not of this train.py")
    path.unlink()
    refused(capsys, run_sample("--ckpt", path), "cannot be read")
    assert not (tmp_path / "exploded").exists()


def test_failed_compilation_is_one_line(run_train, capsys, monkeypatch):
    """Without a compiler the user gets one line, neither a page of traceback nor a run that silently goes without."""
    def fail(loss):
        raise torch._dynamo.exc.Unsupported("no compiler\nhere")
    monkeypatch.setattr(torch, "compile", fail)
    refused(capsys, run_train("--max_iters", 1, "--compile"), "--compile", "no compiler")
    assert run_train("--max_iters", 1, "--resume") == 0         # without it, as the line says


# ----------------------------------------------------------------------------------------------------------------
# sample.py

def test_unknown_prompt_character_is_named(finished, capsys):
    """Not a KeyError: the line names the characters, even in a plain-ASCII terminal."""
    refused_prompts = {"The §": "'\\xa7'", "": "empty"}
    for prompt, word in refused_prompts.items():
        capsys.readouterr()
        assert run_sample("--ckpt", finished / "ckpt.pt", "--prompt", prompt) == 2
        assert word in capsys.readouterr().err


def test_depth_shows_as_colour_or_digit(finished, capsys, monkeypatch):
    """In a terminal each character has the colour of its depth; in a pipe, or where NO_COLOR asks, a digit below."""
    flags = ["--ckpt", finished / "ckpt.pt", "--prompt", "The", "--max_new_tokens", 30, "--mode", "masked"]
    model, saved = train.load_checkpoint(finished / "ckpt.pt")
    torch.manual_seed(0)
    prompt = torch.tensor([data.encode("The", saved["vocab"])])
    drawn = [(saved["vocab"][idx_next], int(gates.sum())) for idx_next, gates in
             generate(model, prompt, 30, 0.8, mode="masked")]
    written = "The" + "".join(c for c, _ in drawn)
    assert len({depth for _, depth in drawn}) > 1
    capsys.readouterr()
    assert run_sample(*flags) == 0
    plain, remarks = capsys.readouterr()
    text, digits = plain.splitlines()[::2], plain.splitlines()[1::2]
    assert "\n".join(text) == written and "30 tokens" in remarks
    assert [int(digit) for line in digits for digit in line.strip()] == [depth for _, depth in drawn]
    assert digits[0][:3].isspace()                          # nothing was predicted below the prompt
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run_sample(*flags) == 0
    colored, remarks = capsys.readouterr()
    code_of_depth = {1: 153, 2: 157, 3: 217}
    assert re.findall(r"48;5;(\d+)m(.)", colored) == [(str(code_of_depth[depth]), c) for c, depth in drawn if c != "\n"]
    assert re.sub(r"\033\[[0-9;]*m", "", colored) == written + "\n" and "of 3 blocks" in remarks
    monkeypatch.setenv("NO_COLOR", "1")
    assert run_sample(*flags) == 0 and capsys.readouterr().out == plain


def test_sampling_skips_unless_the_gates_are_soft(finished, capsys):
    """Cut to a switch, the soft gate writes rubbish, so it runs as trained unless the user asks for a cut."""
    modes = [tsa.default_mode(Config(model=model, gate=gate)) for model, gate in
             (("tsa", "soft"), ("tsa", "skip"), ("halt", "soft"), ("exit", "soft"))]
    assert modes == ["trained", "gathered", "gathered", "gathered"]
    for model, is_cut in ((tiny("halt", seed=6), True), (tiny(), False)):       # generate itself does the same
        gates = next(generate(model, tokens(1), 1))[1]
        assert torch.equal(gates, gates.round()) == is_cut and not gates.requires_grad
    flags, texts = ["--ckpt", finished / "ckpt.pt", "--max_new_tokens", 40], []
    for more, remark in ((["--threshold", 0], "mean depth 1.00 of 3"), (["--gate", "skip"], "gates as gathered"),
                         (["--seed", 1], "gates as trained"), (["--seed", 2], "add --mode gathered"),
                         (["--top_k", 1], "gates as trained"), (["--temperature", 0], "gates as trained")):
        capsys.readouterr()
        assert run_sample(*flags, *more) == 0
        text, remarks = capsys.readouterr()
        assert remark in remarks
        texts.append(text)
    assert texts[2] != texts[3] and texts[4] == texts[5]


def test_map_has_a_box_for_each_gate(finished, tmp_path):
    """Tokens across, blocks up, as dark as the gates; a bar as long as the loss; of validation text or of a prompt."""
    flags = ["--ckpt", finished / "ckpt.pt", "--map", tmp_path / "map.svg"]
    model, saved = train.load_checkpoint(finished / "ckpt.pt")
    assert run_sample(*flags) == 0 and run_sample(*flags, "--prompt", "T") == 2
    boxes = [e for e in ElementTree.parse(tmp_path / "map.svg").iter() if e.get("opacity")]
    assert len(boxes) == 16 * (3 + 1)
    prompt = "lazy dog.\n"
    assert run_sample(*flags, "--prompt", prompt) == 0
    elements = list(ElementTree.parse(tmp_path / "map.svg").iter())
    boxes = [e for e in elements if e.get("opacity")]
    read = torch.tensor([data.encode(prompt, saved["vocab"])])
    logits, gates = model(read[:, :-1])
    assert [e.get("opacity") for e in boxes[:27]] == [f"{0.08 + 0.92 * gate:.2f}" for gate in
                                                     stack(gates, read[:, 1:]).flatten().tolist()]
    losses = F.cross_entropy(logits[0], read[0, 1:], reduction="none").tolist()
    assert [e.get("height") for e in boxes[27:]] == [f"{10 * min(loss, 6):.1f}" for loss in losses]
    words = [e.text for e in elements if e.tag.endswith("text") and len(e.text) == 1]
    assert "".join(words) == "".join(a + b for a, b in zip(prompt, prompt[1:].replace("\n", "⏎")))
    heights = {e.text: float(e.get("y")) for e in elements if e.text and e.text.startswith("block")}
    assert heights["block 0"] > heights["block 2"] and float(boxes[0].get("y")) > float(boxes[9].get("y"))
    flags = ["--tsa", finished / "ckpt.pt", "--halt", finished / "ckpt.pt", "--prompt", prompt]
    assert run(figure, *flags, "--out", tmp_path / "map.svg") == 0          # the README's: three of these
    assert (tmp_path / "map.svg").read_text(encoding="utf-8").count("opacity") == 3 * 9 * (3 + 1)


def test_both_programs_run_as_programs(text_file, tmp_path):
    """As a user starts them, from another folder, with a plain-ASCII terminal: train, then sample the newest run."""
    def start(program, *flags):
        environment = os.environ | {"PYTHONIOENCODING": "ascii:strict", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run([sys.executable, str(HERE / program), "--device", "cpu", *flags], cwd=tmp_path,
                              env=environment, capture_output=True, text=True, timeout=120)
    done = start("sample.py", "--max_new_tokens", "20")
    assert done.returncode == 0 and "comes with the code" in done.stderr, done.stderr
    text_file.write_text("häuser über flüsse\n" * 60, encoding="utf-8")
    done = start("train.py", "--data", str(text_file), "--n_layer", "3", "--n_embd", "16", "--block_size", "16",
                 "--max_iters", "2")
    assert done.returncode == 0 and "ln(12)" in done.stdout, done.stderr
    assert (tmp_path / "out" / "tsa-soft" / "log.csv").exists()
    done = start("sample.py", "--max_new_tokens", "40", "--temperature", "0", "--prompt", "h")
    assert done.returncode == 0 and done.stdout.startswith("h"), done.stderr


# ----------------------------------------------------------------------------------------------------------------
# report/

@pytest.mark.parametrize("settings", HARD)
@pytest.mark.parametrize("keep, decode", [(0.6, False), (0.6, True), (1, False)])
def test_counted_multiply_adds_are_what_ran(settings, keep, decode, monkeypatch):
    """PyTorch counts the products, attention's shapes give the rest: no table may promise more than was skipped."""
    model, idx, keys_read, attend = tiny(**settings), tokens(B=1), [], tsa.attend

    def counting(q, k, v, causal, mask, drop):
        n, S = q.size(2), k.size(2)
        keys_read.append(n * (S if mask is not None or n == 1 else S / 2))      # the causal kernel reads half
        return attend(q, k, v, causal, mask, drop)

    monkeypatch.setattr(tsa, "attend", counting)
    gates = None if settings["model"] == "dense" else clock.draw_gates(model.config, idx, keep)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if decode:
            cache = [KV(1, model.config, model.wte.weight) for _ in model.blocks]
            for t in range(16):
                model(idx[:, t:t + 1], "gathered", None if gates is None else gates[:, :, t:t + 1], cache)
        else:
            model(idx, "gathered", gates)
    ran = [1.0] * 4 if gates is None else gates.double().mean((1, 2)).tolist()
    # While decoding, token t reads t + 1 keys, where the formula has the average over a full window, T / 2.
    attention = sum(ran) * 16 * 16 if decode else 2 * 16 * sum(keys_read) / 16
    # Fused attention is left out: some versions of PyTorch count it, as if it were not causal, and some do not.
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op)) / 2
    assert products / 16 + attention == pytest.approx(counts.macs_per_token(model.config, ran, decode))


def test_saved_multiply_adds_by_hand():
    """Routers that skip nothing cost what they compute; and a row of the report's table, from its saved operations."""
    config = Config(model="tsa", vocab_size=5, block_size=4, n_layer=2, n_head=2, n_embd=8)
    plain, router, head = 12 * 8 * 8 + 2 * 8 * 2, 8 * 16 + 16, 8 * 5        # 2 keys on average, for scores and values
    assert counts.macs_saved(config, [1, 1]) == pytest.approx(-router / (2 * plain + head))
    config = Config(model="halt", block_size=128, n_head=4, n_embd=128)
    six_layers = counts.macs_per_token(Config("dense", n_head=4, n_embd=128), [1] * 6)
    assert round(1 - counts.macs_of_old_row(config, .194) / six_layers, 3) == .098


def test_rank_correlation_by_counting():
    """Spearman's with ties: depth takes six values, so nearly everything is a tie."""
    x, y = torch.tensor([3., 1, 2, 2, 5, 2]), torch.tensor([1., 2, 2, 3, 4, 0])
    place = [[sum((a > b).item() + (a == b).item() / 2 for b in v) for a in v] for v in (x, y)]
    expected = torch.corrcoef(torch.tensor(place))[0, 1].item()
    assert abs(depth.rank_correlation(x, y) - expected) < 1e-6 and abs(depth.rank_correlation(x, -x) + 1) < 1e-9


def test_depth_of_a_text_covers_every_character(finished, tmp_path):
    """The kinds of character add up to the whole validation split, and their mean depths to its mean depth."""
    assert run(depth, "--ckpt", finished / "ckpt.pt", "--device", "cpu", "--out", tmp_path / "depth.json") == 0
    result, whole = (json.loads(path.read_text()) for path in (tmp_path / "depth.json", finished / "result.json"))
    assert result["trained"]["loss"] == pytest.approx(whole["val_loss"], abs=1e-5)
    assert result["executed"]["loss"] == pytest.approx(whole["val_loss_executed"], abs=1e-5)
    assert result["trained"]["loss, gates permuted"] != result["trained"]["loss"]
    groups = {group: n for group, n in result["n"].items() if group.startswith("reads")}
    assert sum(groups.values()) == 2700 // 10 // 16 * 16
    mean_depth = sum(n * result["executed"]["depth"][group] for group, n in groups.items()) / sum(groups.values())
    assert mean_depth == pytest.approx(sum(whole["ran"]), abs=1e-5)


def test_chains_are_scored_by_hops():
    """If hops were wrong, or right and wrong answers were swapped, depth against hops would mean nothing."""
    idx, targets = data.load("chain").windows("val", 64, 50)
    hops = depth.hops_of(idx)
    for row, counted in zip(idx.tolist(), hops.tolist()):
        for place, n in enumerate(counted):
            for _ in range(n):
                place = row[place] - 10
            assert 0 <= row[place] < 10
    right, targets = hops < 3, targets.clone()
    targets[:, 40:] = -1        # not scored
    score = depth.score_task(right, targets, torch.ones(3, 50, 56), hops)
    assert score["hops 1"]["accuracy"] == 1 and score["hops 5"] == {"n": (hops == 5).sum(), "accuracy": 0, "depth": 3}
    scored = [right[b, t].item() for b in range(50) for t in range(40)]
    assert score["token_accuracy"] == pytest.approx(sum(scored) / len(scored)) and score["sequence_accuracy"] == 0


def test_clock_writes_a_row_for_each_way_to_run(finished, tmp_path, monkeypatch):
    """Gathered at every share and on the model's own gates; the plain model is the baseline of them all."""
    monkeypatch.setattr(clock, "BATCHES", {"prefill": (1, 3), "decode": (2,)})
    flags = ["--ckpt", finished / "ckpt.pt", "--device", "cpu", "--seconds", 0]
    assert run(clock, *flags, "--out", tmp_path / "c.json") == 0
    rows = json.loads((tmp_path / "c.json").read_text())
    assert len(rows) == 3 * (1 + 1 + 7)
    assert all(row["speedup"] == 1 and row["allowed"] == 1 for row in rows if row["mode"] == "dense")
    gates = torch.tensor([[[1, 1, 1], [1, 1, 1]], [[1, 1, 0], [1, 0, 0]], [[0, 0, 0], [0, 0, 0]]]).bool()
    assert clock.filling(gates) == pytest.approx(4 / 3)


def test_curves_are_those_of_the_report(tmp_path, capsys, monkeypatch):
    """Seeds are averaged and depths kept apart; and whoever lacks matplotlib is told how to get it."""
    curves = plot.read_curves(HERE / "report" / "results.csv")
    assert len(curves["dense"]) == 5 and len(curves["exit, 6 blocks"]) == 13
    assert curves["dense"][-1] == pytest.approx([1.286272, 1.5392], abs=1e-4)       # million multiply-adds, loss
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused(capsys, run(plot, HERE / "report" / "results.csv", tmp_path / "p.svg"), "pip install matplotlib")


def test_stripped_checkpoint_samples_alike(finished, tmp_path):
    """The model that comes with the code is the one that was trained, up to bfloat16 rounding."""
    assert run(strip, finished / "ckpt.pt", tmp_path / "s.pt") == 0
    (small, saved), (model, _) = (train.load_checkpoint(path) for path in (tmp_path / "s.pt", finished / "ckpt.pt"))
    assert "optimizer" not in saved
    torch.testing.assert_close(small(tokens())[0], model(tokens())[0], atol=0.02, rtol=0.02)


# ----------------------------------------------------------------------------------------------------------------
# README.md

def blocks_of_readme():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)


def test_excerpts_of_the_readme_are_in_the_code():
    """A tutorial that quotes a different program from the one it comes with is worse than none."""
    code = " ".join(" ".join((HERE / name).read_text(encoding="utf-8").split()) for name in ("tsa.py", "train.py"))
    excerpts = [block for block in blocks_of_readme() if "GATES[" not in block]
    assert len(excerpts) >= 4
    for excerpt in excerpts:
        for part in excerpt.split("..."):
            assert " ".join(part.split()) in code, part


def test_gate_of_the_readme_works_as_printed(run_train, tmp_path, monkeypatch):
    """The first thing a hacker tries is the snippet: it trains as it runs, with the gradient of the soft gate."""
    monkeypatch.setitem(GATES, "straight", None)        # pytest takes it out again
    exec(next(block for block in blocks_of_readme() if 'GATES["straight"]' in block), dict(vars(tsa)))
    assert run_train("--gate", "straight", "--lam", 0.01, "--max_iters", 6, *WILD) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert abs(result["val_loss"] - result["val_loss_executed"]) < 1e-5 and 0 < result["alpha_executed"] < 1
    p = torch.tensor([0.1, 0.5, 0.9], requires_grad=True)
    gate = GATES["straight"][0](p, 0.5)
    gate.sum().backward()
    assert gate.tolist() == [1, 1, 0] and p.grad.tolist() == [-1, -1, -1]
    del GATES["straight"]
    with pytest.raises(UserError, match="gate 'straight' is unknown"):
        train.load_checkpoint(tmp_path / "run" / "ckpt.pt")
