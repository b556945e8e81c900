"""
Run with `python -m pytest -q`; no network or GPU is needed. The tests follow the order of tsa.py, data.py, train.py,
sample.py, report/ and README.md.
"""
import functools
import hashlib
import itertools
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
import zipfile
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import data
import sample
import train
import tsa
from report import clock, depth, figure, plot
from tsa import GATES, KV, MODELS, Block, Config, Halt, Router, build, generate, macs_saved, multiply_adds, tlops_saved

HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)        # faster for models this small


def tiny(model="tsa", seed=0, **settings):
    """A small model with weights far from their initial values, so that gates and exits differ from token to token."""
    torch.manual_seed(seed)
    defaults = dict(vocab_size=11, block_size=16, n_layer=4, n_head=2, n_embd=16, dropout=0.0)
    model = build(Config(model=model, **defaults | settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def tokens(B=3, T=16, vocab_size=11, seed=1):
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def masked(model, idx):
    """The reference for "executed": the inference gates, applied by multiplication."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Block, "gathered", Block.forward)
        return model(idx, "executed")


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\n" * 302, encoding="utf-8")
    return path


WILD = ["--warmup_iters", 0, "--learning_rate", 0.1, "--gate_bias", 0]      # soon open some gates and close others


def run(program, *flags):
    """Run a program's main in this process; return 0, or the exit status or message with which it ended."""
    try:
        program.main([str(flag) for flag in flags])
        return 0
    except SystemExit as end:
        return end.code


@pytest.fixture
def run_train(text_file, tmp_path):
    """A function that runs train.py with a small model on text_file, into the folder `run`; later flags win."""
    small = ["--device", "cpu", "--dtype", "float32", "--n_layer", 3, "--n_embd", 16, "--n_head", 2, "--block_size", 16,
             "--batch_size", 4, "--data", text_file, "--out_dir", tmp_path / "run"]
    return lambda *flags: run(train, *small, *flags)


@pytest.fixture
def finished(run_train, tmp_path):
    """The folder of a run in which some gates are open and some closed."""
    assert run_train("--max_iters", 6, *WILD) == 0
    return tmp_path / "run"


@pytest.fixture
def run_sample(finished, capsys):
    """A function that runs sample.py on the finished run and returns what it writes to stdout and to stderr."""
    def call(*flags):
        capsys.readouterr()
        assert run(sample, "--device", "cpu", "--ckpt", finished / "ckpt.pt", *flags) == 0
        return capsys.readouterr()
    return call


def refused(capsys, end, *words):
    """Assert a user error: one line on stderr that contains these words, and a nonzero exit status."""
    line = capsys.readouterr().err if end == 2 else str(end)       # argparse prints the message itself
    assert end != 0 and line.strip().count("\n") == 0, line
    assert all(word in line for word in words), line


# ----------------------------------------------------------------------------------------------------------------
# tsa.py: the parts

@pytest.mark.parametrize("settings, expected", [
    (dict(model="dense"), 4_782_336), (dict(model="tsa"), 4_864_901), (dict(model="exit"), 4_784_896),
    (dict(model="dense", vocab_size=6064, block_size=256), 6_350_848),
    (dict(model="tsa", vocab_size=6064, block_size=256), 6_433_413),
])
def test_parameter_counts_are_the_papers(settings, expected):
    """A missing bias or an untied head would make this a different architecture from the one whose results we check."""
    assert sum(p.numel() for p in build(Config(**settings)).parameters()) == expected


def test_weights_start_as_in_the_paper():
    """A residual stream that starts out larger would be a different experiment."""
    torch.manual_seed(0)
    model = build(Config())
    for block in model.blocks:
        for linear in (block.attn.proj, block.ffn.proj):
            assert abs(linear.weight.std() / (0.02 / 12 ** 0.5) - 1) < 0.02
        assert abs(block.attn.query.weight.std() / (1 / 3 ** 0.5 / 16) - 1) < 0.02         # torch's default
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
    """One head and one token at a time: a query attends to its own position and those before it."""
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
    kv = attn.keys_values(source)
    torch.testing.assert_close(attn(x, kv, at), rows @ attn.proj.weight.T)
    torch.testing.assert_close(attn(source, kv), attn(source, kv, torch.arange(8).repeat(2, 1)))
    torch.testing.assert_close(attn(source[:, -1:], kv), attn(source, kv)[:, -1:])      # the newest token alone


def test_dropout_sits_at_the_papers_four_places(monkeypatch):
    """On the embeddings and attention weights, after GELU and after the feed-forward output; never in evaluation."""
    places = []
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: places.append((*x.shape, self.p, self.training)) or x)
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda q, k, v, mask, dropout_p, is_causal: places.append(("attention", dropout_p)) or q)
    model = tiny("dense", n_layer=1, dropout=0.1)
    for training in (True, False):
        places.clear()
        model.train(training)(tokens(B=2))
        assert places == [(2, 16, 16, 0.1, training), ("attention", 0.1 if training else 0.0),
                          (2, 16, 64, 0.1, training), (2, 16, 16, 0.1, training)]


def test_router_keeps_p_below_1_in_bfloat16():
    """The width is the paper's. The sigmoid runs in float32: in bfloat16, 1 - p would round to 0, a closed gate."""
    assert [Router(Config(n_embd=n, n_head=1)).fc.out_features for n in (256, 128, 32)] == [64, 32, 16]
    with torch.autocast("cpu", torch.bfloat16):
        p = Router(Config(gate_bias=6.0))(torch.randn(1, 64, 256))
    assert p.dtype == torch.float32 and (1 - p).min() > 0 and len(p.unique()) > 8


@pytest.mark.parametrize("gate, expected", [("soft", ([.9, .5, .25, .1], [True, True, True, False])),
                                            ("skip", ([.9, .5, .25, .1], [.9, .5, .25, .0]))])
def test_gate_designs_follow_their_definitions(gate, expected):
    """The training gate and the inference gate make up a design; a token with p equal to the threshold still runs."""
    p = torch.tensor([.1, .5, .75, .9])
    for make_gate, values in zip(GATES[gate], expected):
        torch.testing.assert_close(make_gate(p, 0.75), torch.tensor(values))    # dtypes as well: a scale or a switch


# ----------------------------------------------------------------------------------------------------------------
# tsa.py: the four models

def assert_same_with_gradients(model, ours, by_hand):
    """One detach too many or too few shows in a gradient and nowhere else."""
    torch.testing.assert_close(ours, by_hand)
    parameters = list(model.parameters())
    for a, b in zip(*(torch.autograd.grad(total, parameters) for total in (ours, by_hand))):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_papers_model_by_hand():
    """Equations (1) to (4), the loss over scored tokens, and the mean gate, which lam multiplies."""
    model, idx, targets = tiny(), tokens(), tokens(seed=2)
    targets[:, :10] = -1        # not scored
    x, gates = model.wte(idx) + model.wpe(torch.arange(16)), [torch.ones(3, 16)]
    for l, block in enumerate(model.blocks):
        if l > 0:
            router = model.routers[l - 1]
            hidden = torch.relu(x @ router.fc.weight.T + router.fc.bias)
            gates.append(1 - torch.sigmoid((hidden @ router.out.weight.T + router.out.bias)[..., 0]))
        x = x + gates[l][..., None] * block.attn(block.ln1(x), block.attn.keys_values(block.ln1(x)))
        hidden = block.ffn.fc(block.ln2(x))
        hidden = hidden * (1 + torch.erf(hidden / 2 ** 0.5)) / 2        # exact GELU, as in the paper
        x = x + gates[l][..., None] * block.ffn.proj(hidden)
    logits = model.ln_f(x) @ model.wte.weight.T
    expected = F.cross_entropy(logits[:, 10:].flatten(0, 1), targets[:, 10:].flatten())
    task, used = model.loss(idx, targets)
    torch.testing.assert_close(model(idx)[0], logits, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(used, torch.stack(gates))
    assert_same_with_gradients(model, task + 0.3 * used[1:].mean(), expected + 0.3 * torch.stack(gates[1:]).mean())


def test_exit_trains_on_the_mean_of_all_exits():
    """Paper, section 1: the uniform mean of the L cross-entropies, each with its own LayerNorm and the tied head."""
    model, idx, targets = tiny("exit"), tokens(), tokens(seed=2)
    targets[0, :7] = -1
    x, losses = model.wte(idx) + model.wpe(torch.arange(16)), []
    for block, norm in zip(model.blocks, [*model.exit_norms, model.ln_f]):
        x = block(x)
        logits = norm(x) @ model.wte.weight.T
        losses.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1))
    assert_same_with_gradients(model, model.loss(idx, targets)[0], sum(losses) / 4)
    torch.testing.assert_close(model(idx)[0], logits)


def test_exited_token_stops():
    """The paper's code freezes only an exited token's logits. Here its x is frozen too, and others attend to that x."""
    model, idx = tiny("exit", n_layer=5, threshold=0.4), tokens()
    logits, gates = masked(model, idx)
    x, running = model.wte(idx) + model.wpe(torch.arange(16)), torch.ones(3, 16, dtype=torch.bool)
    expected = torch.full_like(logits, torch.nan)
    for l, (block, norm) in enumerate(zip(model.blocks, [*model.exit_norms, model.ln_f])):
        assert torch.equal(gates[l].bool(), running)
        x = torch.where(running[..., None], block(x), x)
        prediction = norm(x) @ model.wte.weight.T
        leaves = running & (prediction.softmax(-1).amax(-1) > 0.4) if 0 < l < 4 else running & (l == 4)
        assert l == 0 or 0 < leaves.sum() < 48, l      # some exit after each block but the first
        expected[leaves] = prediction[leaves]
        running = running & ~leaves
    torch.testing.assert_close(logits, expected)


def test_halting_loss_and_its_gradient_by_hand(monkeypatch):
    """Equation (5) holds, and a token halts in the same state in training as at inference."""
    for name, value in (("HALT_SHARE", 0.5), ("EVERY_SHARE", 0.2), ("LAST_SHARE", 0.3), ("BARRIER", 0.01)):
        monkeypatch.setattr(Halt, name, value)
    model, idx, targets = tiny("halt", seed=6, threshold=0.3), tokens(), tokens(seed=2)
    targets[0, :8] = -1         # not scored, as in the tasks, but their depth still counts
    x = frozen = model.wte(idx) + model.wpe(torch.arange(16))
    survive, running, expected, depth = torch.ones(3, 16), torch.ones(3, 16, dtype=torch.bool), 0, 0
    for l, block in enumerate(model.blocks):
        x = x + block.attn(block.ln1(x), block.attn.keys_values(block.ln1(frozen)))
        x = x + block.ffn(block.ln2(x))
        frozen = torch.where(running[..., None], x, frozen)
        p = model.routers[l](x) if l < 3 else torch.ones(3, 16)
        logits = model.ln_f(x) @ model.wte.weight.T
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none").view(3, 16)
        expected = expected + ((0.5 * survive * p + (l > 0) * 0.2 / 3 + (l == 3) * 0.3) * losses).sum() / 40
        if l < 3:
            expected = expected - 0.01 * (p.log() + (1 - p).log()).mean()
        depth = depth + (survive.mean() / 3 if l > 0 else 0)
        survive, running = survive * (1 - p), running & (p <= 0.3)
    task, survives = model.loss(idx, targets)
    torch.testing.assert_close(task, expected)
    assert_same_with_gradients(model, task + 0.3 * survives[1:].mean(), expected + 0.3 * depth)
    torch.testing.assert_close(model(idx)[0], logits)
    executed, gates = masked(model, idx)
    torch.testing.assert_close(executed, model.ln_f(frozen) @ model.wte.weight.T)
    assert len(gates.sum(0).unique()) > 2


def test_barrier_reopens_a_saturated_router():
    """At p = 1 the other terms have no gradient, so without the barrier a saturated router would stay saturated."""
    model = tiny("halt")
    nn.init.constant_(model.routers[0].out.bias, 200)
    model.loss(tokens(), tokens())[0].backward()
    assert model.routers[0].out.bias.grad.item() == pytest.approx(1e-4, rel=1e-3)


@pytest.mark.parametrize("model", MODELS)
def test_loss_never_waits_for_a_gpu(model):
    """On torch's meta device, mixing devices or reading a value raises an error, so this test needs no GPU."""
    model = tiny(model).to("meta").train()
    idx = torch.zeros(3, 16, dtype=torch.long, device="meta")
    task, gates = model.loss(idx, idx)
    (task + 0.1 * gates[1:].mean()).backward()


# ----------------------------------------------------------------------------------------------------------------
# tsa.py: gathered block, cache, generation, counts

KEEP = {
    "ragged": torch.tensor([[1, 0, 1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 0]]),
    "all": torch.ones(3, 8), "none": torch.zeros(3, 8), "one row": F.one_hot(torch.tensor(13), 24).view(3, 8),
    "batch of one": torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1]]), "one token": torch.ones(1, 1),
}


@pytest.mark.parametrize("pattern", KEEP)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 0.05)])
def test_gathered_block_equals_masked_block(pattern, dtype, tolerance):
    """The central test: skipping tokens must not change the result, whether gates are scales or switches."""
    keep = KEEP[pattern]
    scale = keep * (0.2 + 0.8 * torch.rand(keep.shape, generator=torch.Generator().manual_seed(0)))
    block, x = tiny().blocks[1].to(dtype), torch.randn(*keep.shape, 16, dtype=dtype)
    for gate in (scale, keep > 0):
        with torch.no_grad():
            gathered = block.gathered(x, gate)
            torch.testing.assert_close(gathered, block(x, gate), rtol=tolerance, atol=tolerance)
        assert torch.equal(gathered[keep == 0], x[keep == 0])


def test_gathered_block_computes_only_open_tokens_and_padding(monkeypatch):
    """Equal results alone would not show that anything is skipped. In training, dropout would differ."""
    block, seen = tiny().blocks[1], []
    monkeypatch.setattr(block.ffn, "forward", lambda x: seen.append(x.shape) or x)
    block.gathered(torch.randn(2, 4, 16), torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]]).bool())        # README's example
    block.gathered(torch.randn(2, 4, 16), torch.zeros(2, 4))
    assert seen == [(2, 2, 16)]
    with pytest.raises(AssertionError, match="dropout"):
        block.train().gathered(torch.randn(1, 4, 16), torch.ones(1, 4))


HARD = [dict(model="dense"), dict(model="tsa", gate="soft"), dict(model="tsa", gate="skip"),
        dict(model="exit", threshold=0.4), dict(model="halt", seed=6)]


@pytest.mark.parametrize("settings", HARD)
def test_cached_text_is_that_of_a_slow_loop(settings):
    """
    A cache and a gathered block must not change the text, even past the end of the context, for one sequence or for two
    whose tokens skip different blocks. In float64, rounding changes no gate.
    """
    model = tiny(**settings).double()
    for B, mode, temperature, top_k in [(2, "trained", 1.0, None), (2, "executed", 0.5, None), (1, "executed", 1.5, 3)]:
        torch.manual_seed(3)
        steps = list(generate(model, tokens(B, T=3), 40, temperature, top_k, mode))
        torch.manual_seed(3)
        window = tokens(B, T=3)
        for idx_next, gates in steps:
            if window.size(1) > 16:
                window = window[:, -8:]
            with torch.no_grad():
                logits, all_gates = model(window) if mode == "trained" else masked(model, window)
            p, order = (logits[:, -1] / temperature).softmax(-1), logits[:, -1].argsort(-1, descending=True)
            if top_k is not None:
                p = p.scatter(1, order[:, top_k:], 0)
            assert torch.equal(idx_next, torch.multinomial(p, 1))
            torch.testing.assert_close(gates, all_gates[:, :, -1], rtol=1e-6, atol=1e-6)
            assert gates.dtype == torch.float32 and gates[0].eq(1).all()
            window = torch.cat([window, idx_next], 1)


def test_generation_computes_one_token_per_step_and_greedy_is_argmax(monkeypatch):
    """A step processes one token, or half a window when the context is full; temperature 0 is greedy."""
    model, text, sizes = tiny("dense"), tokens(B=1, T=1), []
    greedy, tiny_temperature = (torch.cat([t for t, _ in generate(model, text, 12, how)]) for how in (0, 1e-40))
    assert torch.equal(greedy, tiny_temperature) and greedy[0].item() == model(text)[0][0, -1].argmax()
    embed = model.embed
    monkeypatch.setattr(model, "embed", lambda idx, cache=None: sizes.append(idx.size(1)) or embed(idx, cache))
    list(generate(model, text, 20))
    assert sizes == [1] * 16 + [8] + [1] * 3


@pytest.mark.parametrize("alpha, saved", [(.341, .549), (.730, .225), (.726, .228), (.833, .139), (.755, .204)])
def test_token_layer_operations_are_the_papers(alpha, saved):
    """The paper's table (section 3): the same alpha must give the same saving."""
    assert abs(tlops_saved([1] + [alpha] * 5) - saved) < 0.0006


@pytest.mark.parametrize("settings", HARD)
@pytest.mark.parametrize("decode", [False, True])
def test_counted_multiply_adds_are_what_ran(settings, decode, monkeypatch):
    """PyTorch counts the products and the attention shapes give the rest, so no table claims more than was skipped."""
    model, idx, attended, attention = tiny(**settings), tokens(B=1, seed=4), [], F.scaled_dot_product_attention

    def counting(q, k, v, mask, dropout_p, is_causal):
        attended.append(q.size(2) * k.size(2) / (2 if is_causal else 1))       # the causal kernel computes half
        return attention(q, k, v, mask, dropout_p, is_causal)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    cache = [KV(1, model.config, model.wte.weight) for _ in model.blocks] if decode else None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        gates = [model(part, "executed", cache)[1] for part in idx.split(1 if decode else 16, dim=1)]
    ran = (torch.cat(gates, dim=2) != 0).double().mean((1, 2)).tolist()
    assert settings["model"] == "dense" or sum(ran) < 4
    # In decoding, token t attends to t + 1 keys, but the formula uses the average over a full window, T / 2.
    products = sum(ran) * 16 * 16 if decode else 2 * 16 * sum(attended) / 16
    # Fused attention is left out: some versions of PyTorch count it, as if it were not causal, and some do not.
    products += sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op)) / 2 / 16
    assert products == pytest.approx(multiply_adds(model.config, ran, decode=decode))
    plain = 4 * (12 * 16 * 16 + 2 * 8 * 16) + 16 * 11       # by hand; 8 keys on average, for scores and values
    assert macs_saved(model.config, ran, decode=decode) == pytest.approx(1 - products / plain)
    assert multiply_adds(model.config, [1] * 4) - multiply_adds(model.config, [1] * 4, T=8) == 4 * 2 * 4 * 16


# ----------------------------------------------------------------------------------------------------------------
# data.py

def test_text_comes_back_split_at_characters(tmp_path, monkeypatch):
    """Any UTF-8 text, from a file or from enwik8's zip, comes back, split in order and at characters, not bytes."""
    text, path = "naïve 漢字 🙂\n" * 50, tmp_path / "enwik8.zip"
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("enwik8", text)
    monkeypatch.setattr(data, "FOLDER", tmp_path)
    monkeypatch.setitem(data.DOWNLOADS, "enwik8", (path.name, "", hashlib.sha256(path.read_bytes()).hexdigest()))
    monkeypatch.setattr(data, "ENWIK8_SPLIT", (300, 400))
    for name, a, b in ((str(tmp_path / "t.txt"), 440, 495), ("enwik8", 300, 400)):
        corpus = data.load(name)
        assert corpus.vocab == "".join(sorted(set(text))) and corpus.example == text[a:a + 64]
        for split, part in (("train", text[:a]), ("val", text[a:b]), ("test", text[b:])):
            assert "".join(corpus.vocab[i] for i in corpus.splits[split]) == part


@pytest.mark.parametrize("task", ["copy", "sort"])
def test_the_papers_tasks_are_what_they_say(task):
    """The format is `^source|target$`; only target and EOS are scored. No validation sequence occurs in training."""
    corpus = data.load(task)
    idx, targets = corpus.windows("val", 64)
    text = "".join(corpus.vocab[i] for i in idx[0])
    source, target = text[1:].split("|")
    assert len(corpus.vocab) == 32 and len(source) == 20 and len(idx) == 1000 and len(corpus.splits["train"]) == 10_000
    assert target == (source if task == "copy" else "".join(sorted(source, key=corpus.vocab.index)))
    assert targets[0, :21].eq(-1).all()
    assert "".join(corpus.vocab[i] for i in targets[0, 21:]) == target + "$"
    assert corpus.example.startswith(corpus.prompt) and corpus.prompt.endswith("|") and corpus.new_tokens == 21
    seen = {tuple(row) for row in corpus.splits["train"][:, 0].tolist()}
    assert not any(tuple(row) in seen for row in idx.tolist())


def test_target_of_a_chain_is_the_digit_that_the_letters_lead_to():
    """With wrong targets a model could only guess, so this test follows the letters one at a time."""
    corpus = data.load("chain")
    idx, targets = corpus.windows("val", 30)
    assert idx.shape == (1000, 30) and len(corpus.splits["train"]) == 100_000
    for row, target, hops in zip(idx[:20], targets, depth.hops_of(idx[:20])):
        text = "".join(corpus.vocab[i] for i in row)
        for place in range(30):
            at, n = place, 0
            while not text[at].isdigit():
                assert data.LETTERS.index(text[at]) // 6 == at // 6 - 1        # one round before
                at, n = data.LETTERS.index(text[at]), n + 1
            assert corpus.vocab[target[place]] == text[at] and hops[place] == n
        letters = [c for c in text if c.isalpha()]
        assert len(set(letters)) == len(letters)        # so that chains stay apart


@pytest.fixture
def offer(tmp_path, monkeypatch):
    """offer(body, sha256): serve `body` from loopback as Tiny-Shakespeare; return the path it will be saved to"""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *args: None)
    monkeypatch.setattr(data, "FOLDER", tmp_path / "data")

    def call(body, sha256):
        (tmp_path / "served").write_bytes(body)
        url = f"http://127.0.0.1:{server.server_port}/served"
        monkeypatch.setitem(data.DOWNLOADS, "shakespeare", ("text.txt", url, sha256))
        return tmp_path / "data" / "text.txt"

    yield call
    server.shutdown()


VERSE = b"To be, or not to be, that is the question.\n" * 40
VERSE_SHA256 = hashlib.sha256(VERSE).hexdigest()


def test_download_is_verified_and_kept(offer, tmp_path):
    """The first run fetches the file, the second needs no network, and a file damaged afterwards is refused."""
    path = offer(VERSE, VERSE_SHA256)
    corpus = data.load("shakespeare")
    (tmp_path / "served").unlink()
    assert data.load("shakespeare").vocab == corpus.vocab and path.read_bytes() == VERSE
    path.write_bytes(b"To be, or")
    with pytest.raises(SystemExit, match="delete it"):
        train.load_data(train.parse_args([]))


@pytest.mark.parametrize("problem", ["missing", "another file", "stalled"])
def test_bad_download_leaves_nothing_and_training_falls_back(offer, tmp_path, monkeypatch, capsys, problem):
    """No file is left behind, and train.py says in one line that it uses the standard library instead."""
    path = offer(VERSE, "0" * 64 if problem == "another file" else VERSE_SHA256)
    monkeypatch.setattr(data, "TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        if problem == "missing":
            (tmp_path / "served").unlink()
        if problem == "stalled":
            url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
            monkeypatch.setitem(data.DOWNLOADS, "shakespeare", (path.name, url, VERSE_SHA256))
        with pytest.raises(SystemExit, match="save it as"):        # an explicit --data has no fallback
            train.load_data(train.parse_args(["--data", "shakespeare"]))
        args = train.parse_args([])
        assert len(train.load_data(args).vocab) > 90 and args.data == "stdlib"
    line = capsys.readouterr().out
    assert "save it as" in line and "--data stdlib" in line and path.name in line and line.count("\n") == 1
    assert not list(path.parent.iterdir())


# ----------------------------------------------------------------------------------------------------------------
# train.py

def slow_score(model, text, vocab, mode, unscored=0):
    """
    Score the validation split of a text one window and one character at a time, leaving the first `unscored` characters
    of each window out of the loss -> loss, mean gates, shares of tokens that ran.
    """
    stream = [vocab.index(c) for c in text[int(0.8 * len(text)):int(0.9 * len(text))]]
    losses, n, gate_sum, ran = [], 0, 0, 0
    for start in range(0, len(stream) - 16, 16):
        x, y = stream[start:start + 16], stream[start + 1:start + 17]
        with torch.no_grad():
            logits, gates = model(torch.tensor([x])) if mode == "trained" else masked(model, torch.tensor([x]))
        losses += [-logits[0, t].log_softmax(0)[y[t]].item() for t in range(unscored, 16)]
        n, gate_sum, ran = n + 16, gate_sum + gates.sum((1, 2)), ran + (gates != 0).sum((1, 2))
    return sum(losses) / len(losses), (gate_sum / n).tolist(), (ran / n).tolist()


def test_result_is_the_score_of_the_checkpoint(finished, text_file):
    """The tables are built from result.json: validation split, both modes, both savings, and the flags."""
    result, log = (json.loads((finished / name).read_text()) for name in ("result.json", "log.json"))
    model, saved = train.load_checkpoint(finished / "ckpt.pt")
    text, vocab = text_file.read_text(), saved["vocab"]
    trained, executed = (slow_score(model, text, vocab, mode) for mode in tsa.MODES)
    expected = dict(val_loss=trained[0], gates=trained[1], val_loss_executed=executed[0], ran=executed[2],
                    tlops_saved=1 - sum(executed[2]) / 3, macs_saved=macs_saved(model.config, executed[2]))
    for key, value in expected.items():
        assert result[key] == pytest.approx(value, abs=1e-5), key
    assert abs(trained[0] - executed[0]) > 1e-4 and 0 < result["tlops_saved"] < 2 / 3
    assert {path.name for path in finished.iterdir()} == {"ckpt.pt", "log.json", "result.json"}    # no .tmp
    assert saved["flags"].items() < result.items() and {"n_params", "vocab_size", "torch", "seconds"} < result.keys()
    idx, targets = (part.clone() for part in data.load(str(text_file)).windows("val", 16))
    first = train.score(model, (idx[:64], targets[:64]))["val_loss_executed"]       # during training
    assert log == saved["rows"] and log[-1]["val_loss_executed"] == pytest.approx(first) != result["val_loss_executed"]
    targets[:, :5] = -1             # unscored tokens count for the gates, but not for the loss
    model = tiny(vocab_size=len(vocab), gate="skip", threshold=0.8)
    for value, expected in zip(train.evaluate(model, (idx, targets), "executed"),
                               slow_score(model, text, vocab, "executed", unscored=5)):
        assert value == pytest.approx(expected, abs=1e-5)


def test_run_equals_a_loop_written_out(run_train, text_file, tmp_path):
    """Ten steps of train.py match a loop with every setting spelled out: seeds, warm-up, cosine, decay, clip, lam."""
    assert run_train("--max_iters", 10, "--learning_rate", 0.02, "--warmup_iters", 4, "--lam", 0.3, "--seed", 5) == 0
    trained = train.load_checkpoint(tmp_path / "run" / "ckpt.pt")[1]["model"]
    corpus, clipped = data.load(str(text_file)), 0
    seeds = [int(np.random.SeedSequence((5, step)).generate_state(1)[0]) for step in range(11)]
    torch.manual_seed(seeds[0])
    model = build(Config(vocab_size=len(corpus.vocab), block_size=16, n_layer=3, n_head=2, n_embd=16, dropout=0.0))
    groups = [{"params": [parameter], "weight_decay": 0.0 if re.search("bias|ln|wte|wpe", name) else 0.1}
              for name, parameter in model.named_parameters()]
    assert sum(group["weight_decay"] > 0 for group in groups) == 3 * 5 + 2 * 2
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=False)
    for step in range(1, 11):
        torch.manual_seed(seeds[step])
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


def test_defaults_are_those_of_preset_task_and_model():
    """`--preset paper` uses the settings of the paper's section 2, and an explicit flag overrides any default."""
    flags = vars(train.parse_args(["--preset", "paper"]))
    expected = dict(n_layer=6, n_head=8, n_embd=256, block_size=128, batch_size=64, max_iters=5000, learning_rate=3e-4,
                    warmup_iters=0, dropout=0.1, lam=0.001, lam_ramp=0, gate_bias=-1.0, threshold=0.5, gate="soft")
    assert expected.items() <= flags.items()
    flags = vars(train.parse_args(["--data", "copy", "--preset", "paper", "--n_embd", "64"]))
    assert dict(n_embd=64, block_size=64, batch_size=256, max_iters=390, learning_rate=3e-4).items() <= flags.items()
    flags = vars(train.parse_args(["--model", "exit"]))
    assert (flags["threshold"], flags["lam"], flags["gate"], flags["n_embd"]) == (0.9, None, None, 128)


def test_interrupted_run_resumes_to_the_bit(run_train, tmp_path, monkeypatch):
    """After Ctrl-C, even while a checkpoint is being saved, --resume gives the results of an uninterrupted run."""
    flags, write = ["--max_iters", 50, "--eval_interval", 20, "--dropout", 0.1], torch.save
    assert run_train(*flags, "--out_dir", tmp_path / "whole") == 0

    def interrupted(contents, path):
        write(contents, path)
        if contents["step"] == 40:
            path.write_bytes(path.read_bytes()[:1000])
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupted)
        message = run_train(*flags)
    assert message.endswith(f"--resume {tmp_path / 'run'}")
    assert train.load_checkpoint(tmp_path / "run" / "ckpt.pt")[1]["step"] == 20
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)       # the run's own device is used all the same
    assert run(train, "--resume", tmp_path / "run") == 0
    a, b = (train.load_checkpoint(tmp_path / name / "ckpt.pt")[1] for name in ("whole", "run"))
    assert a["step"] == b["step"] == 50 and len(a["rows"]) == 3 and a["rows"] == b["rows"]
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])


@pytest.mark.parametrize("flags, weights", [([], (0.25, 0.5, 0.5)), (["--lam_ramp", 1], (0.125, 0.25, 0.375))])
def test_depth_penalty_rises_over_its_share_of_training(run_train, tmp_path, flags, weights):
    """With the full penalty, no block pays off early in training, so every token would halt."""
    assert run_train("--model", "halt", *flags, "--lam", 0.5, "--max_iters", 80, "--eval_interval", 20) == 0
    for row, lam in zip(train.load_checkpoint(tmp_path / "run" / "ckpt.pt")[1]["rows"], weights):
        assert row["loss"] == pytest.approx(row["task_loss"] + lam * row["mean_gate"], abs=1e-5) and row["lam"] == lam


@pytest.mark.parametrize("model", ["tsa", "halt"])
def test_task_trains_on_its_own_sequences_in_bfloat16(run_train, monkeypatch, model):
    """Whole sequences of the training split, in training mode, with blocks in bfloat16 and logits in float32."""
    seen, loss = [], MODELS[model].loss

    def watched(self, idx, targets):
        assert self.training and torch.is_autocast_enabled("cpu") and self(idx)[0].dtype == torch.float32
        assert not torch.backends.cuda.flash_sdp_enabled()      # training with it would be slow here
        seen.extend(zip(idx.tolist(), targets.tolist()))
        return loss(self, idx, targets)

    monkeypatch.setattr(MODELS[model], "loss", watched)
    assert run_train("--model", model, "--data", "copy", "--block_size", 64, "--max_iters", 2, "--eval_interval", 1,
                     "--dtype", "bfloat16") == 0
    assert torch.backends.cuda.flash_sdp_enabled()
    known = data.load("copy").splits["train"].tolist()
    assert all(list(pair) in known for pair in seen[:4] + seen[-4:])


@pytest.mark.parametrize("step, spoil", [       # the program looks only at steps 10 and 20
    (13, lambda loss, weight: loss * math.inf),         # still in the weights at step 20
    (20, lambda loss, weight: loss + (0 * weight).sum().sqrt())])   # infinite slope at 0: a finite loss, a nan gradient
def test_diverged_run_stops_and_keeps_its_checkpoint(run_train, tmp_path, monkeypatch, spoil, step):
    """Weights that are not finite must not overwrite those that were still good."""
    original, calls = MODELS["tsa"].loss, []

    def spoiled(self, idx, targets):
        calls.append(None)
        loss, gates = original(self, idx, targets)
        return (spoil(loss, self.wpe.weight) if len(calls) == step else loss), gates

    monkeypatch.setattr(MODELS["tsa"], "loss", spoiled)
    end = run_train("--max_iters", 60, "--eval_interval", 10)
    assert "not finite" in end and "\n" not in end
    model, saved = train.load_checkpoint(tmp_path / "run" / "ckpt.pt")
    assert saved["step"] == 10 and all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("design", [tsa.binary, lambda p, threshold: (p <= threshold).float()])
def test_design_that_passes_no_gradient_is_refused(run_train, monkeypatch, capsys, design):
    """With a switch in training, even one converted to float, the routers would silently never learn."""
    monkeypatch.setitem(GATES, "hard", (design, tsa.binary))
    refused(capsys, run_train("--gate", "hard"), "no gradient", "hard")


# ----------------------------------------------------------------------------------------------------------------
# User errors

@pytest.mark.parametrize("content, word", [(b"", "empty"), (b"aaaa" * 99, "one character"),
                                           (b"abcdef" * 9, "block_size"), (b"ab\xff" * 999, "utf-8")])
def test_bad_text_is_one_line(run_train, text_file, tmp_path, capsys, content, word):
    """An empty, one-character, too short or binary text is reported, and no folder is left behind."""
    text_file.write_bytes(content)
    refused(capsys, run_train(), word)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, words", [
    (["--n_head", 3], ["n_head 3", "n_embd 16"]), (["--n_layer", 1], ["n_layer"]), (["--device", "abacus"], ["abacus"]),
    (["--model", "dense", "--lam", 1], ["--lam"]), (["--data", "copy"], ["--block_size"]),
    (["--bogus", 1], ["--bogus"]), (["--gate", "ajar"], ["--gate", "soft"]), (["--seed", "many"], ["many"]),
    (["--n_layer", 0], ["--n_layer"]), (["--n_embd", -1], ["--n_embd"]),
    (["--batch_size", 0], ["--batch_size"]), (["--max_iters", -1], ["--max_iters"]),
    (["--model", "halt", "--gate", "soft"], ["--gate"]), (["--data", "no/such/file"], ["no/such/file"]),
    (["--model", "exit", "--n_layer", 2], ["n_layer 3"]), (["--resume", "."], ["no other flag"]),
    (["--dropout", 2], ["dropout"]), (["--learning_rate", "nan"], ["learning rate"]), (["--seed", -1], ["negative"]),
    (["--out_dir", __file__], ["cannot create", "--out_dir"]),
])
def test_bad_flags_are_one_line(run_train, tmp_path, capsys, flags, words):
    """An invalid flag or value is reported by name, and no folder is left behind."""
    refused(capsys, run_train(*flags), *words)
    assert not (tmp_path / "run").exists()


def test_device_is_tried_before_it_is_used(monkeypatch):
    """A GPU that torch lists but cannot use must cause neither a traceback nor a silent fallback to the CPU."""
    def broken(*shape, device):
        raise RuntimeError("the driver is too old\nand more")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", broken)
    with pytest.raises(SystemExit, match="--device cuda does not work here .the driver is too old.; try --device cpu$"):
        train.pick_device("auto")


def test_new_run_gets_a_new_folder_and_overwrites_nothing(finished, run_train, tmp_path, text_file, capsys,
                                                          monkeypatch):
    """Neither a second `python train.py` nor a change to the text may destroy the weights of the first run."""
    before = (finished / "ckpt.pt").read_bytes()
    refused(capsys, run_train("--max_iters", 1), "--resume", str(finished))
    text_file.write_text(text_file.read_text()[::-1])       # another text, with the same alphabet
    refused(capsys, run(train, "--resume", finished, "--device", "cpu"), "text has changed")
    assert (finished / "ckpt.pt").read_bytes() == before
    (finished / "ckpt.pt").unlink()         # for example to save space; the result must stay
    refused(capsys, run_train("--max_iters", 1), "already contains a run")
    monkeypatch.chdir(tmp_path)
    for folder in ("out/tsa-soft", "out/tsa-soft-2", "out/tsa-soft-3"):
        assert train.new_folder(train.parse_args([])).as_posix() == folder
        Path(folder).mkdir(parents=True)
    assert train.new_folder(train.parse_args(["--model", "halt"])).as_posix() == "out/halt"


def test_bad_checkpoint_or_prompt_is_one_line_and_runs_no_code(finished, tmp_path, capsys):
    """A missing, truncated, empty or foreign file, a pickle that would run code when it is loaded, and bad prompts."""
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    path = finished / "ckpt.pt"
    for prompt, word in (("The §", "'\\xa7'"), ("", "empty")):        # readable even in a plain-ASCII terminal
        refused(capsys, run(sample, "--device", "cpu", "--ckpt", path, "--prompt", prompt), word)
    whole = path.read_bytes()
    for content in (whole[:-100], b"", Bomb(), {"model": {}}, [1, 2]):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        refused(capsys, run(sample, "--device", "cpu", "--ckpt", path), "damaged or was not written by")
    path.unlink()
    refused(capsys, run(train, "--resume", finished, "--device", "cpu"), "cannot read")
    assert not (tmp_path / "exploded").exists()


# ----------------------------------------------------------------------------------------------------------------
# sample.py

def test_depth_shows_as_color_or_digit(finished, run_sample, monkeypatch):
    """In a terminal each character has the color of its depth; in a pipe, or with NO_COLOR, a digit below it."""
    flags = ["--prompt", "The", "--max_new_tokens", 30, "--mode", "executed"]
    model, saved = train.load_checkpoint(finished / "ckpt.pt")
    torch.manual_seed(0)
    steps = list(generate(model, torch.tensor([data.encode("The", saved["vocab"])]), 30, 0.8, mode="executed"))
    text = "".join(saved["vocab"][idx_next] for idx_next, _ in steps)
    depths, ran = [int(gates.sum()) for _, gates in steps], (sum(gates for _, gates in steps) / 30)[:, 0].tolist()
    plain, remarks = run_sample(*flags)
    digits = plain.splitlines()[1::2]
    assert "\n".join(plain.splitlines()[::2]) == "The" + text and len(set(depths)) > 1
    assert digits[0][:3] == "   " and [int(digit) for digit in "".join(digits).lstrip()] == depths
    assert f"mean depth {sum(depths) / 30:.2f} of 3, saving {tlops_saved(ran):.1%} of token" in remarks
    assert f"{macs_saved(model.config, ran, decode=True):.1%} of mult" in remarks
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    colored = run_sample(*flags).out
    code_of_depth = {1: "153", 2: "157", 3: "217"}
    assert re.findall(r"48;5;(\d+)m(.)", colored) == [
        (code_of_depth[depth], c) for depth, c in zip(depths, text) if c != "\n"]
    assert re.sub(r"\033\[[0-9;]*m", "", colored) == "The" + text + "\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert run_sample(*flags).out == plain


def test_sampling_skips_unless_the_gates_are_soft(run_sample):
    """A thresholded soft gate generates rubbish, so by default the soft gate runs as trained."""
    for model, mode in ((tiny(gate="soft"), "trained"), (tiny(gate="skip"), "executed"), (tiny("exit"), "executed"),
                        (tiny("halt", seed=6), "executed")):
        assert tsa.default_mode(model.config) == mode
        for (_, gates), (_, expected) in zip(*(generate(model, tokens(1), 9, 0, mode=m) for m in (None, mode))):
            assert torch.equal(gates, expected) and not gates.requires_grad
    texts, remarks = zip(*(run_sample("--max_new_tokens", 40, *flags) for flags in (
        ["--seed", 1], ["--seed", 2], ["--top_k", 1], ["--temperature", 0])))
    assert all("gates as trained" in remark and "--mode executed" in remark for remark in remarks)
    assert texts[0] != texts[1] and texts[2] == texts[3]


@pytest.mark.parametrize("mode", tsa.MODES)
def test_map_shows_each_gate(finished, run_sample, monkeypatch, mode):
    """One row per block, the last on top, and one column per token, wrapped to the width; in color on a terminal."""
    model, saved = train.load_checkpoint(finished / "ckpt.pt")
    prompt = "lazy dog.\nThe q"
    gates = model(torch.tensor([data.encode(prompt, saved["vocab"])]), mode)[1][:, 0]
    shades = ["".join(" .:-=+*#%@"[min(int(10 * gate), 9)] for gate in row) for row in gates.tolist()]
    monkeypatch.setenv("COLUMNS", "19")
    lines = run_sample("--map", "--mode", mode, "--prompt", prompt).out.split("\n")
    assert lines[:4] == [f"block {l}  {shades[l][:10]}" for l in (2, 1, 0)] + ["token    lazy dog.⏎"]
    assert lines[5:9] == [f"block {l}  {shades[l][10:]}" for l in (2, 1, 0)] + ["token    The q"]
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    lines = run_sample("--map", "--mode", mode).out.split("\n")        # by default, the example of the corpus
    assert re.findall(r"48;5;(\d+)m ", lines[2]) == ["217"] * 10        # block 0 runs for every token


def test_both_programs_run_as_programs(text_file, tmp_path):
    """A user may start them from another folder and in a plain-ASCII terminal; sample.py finds the newest run."""
    def start(program, *flags):
        environment = os.environ | {"PYTHONIOENCODING": "ascii:strict", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run([sys.executable, str(HERE / program), "--device", "cpu", *flags], cwd=tmp_path,
                              env=environment, capture_output=True, text=True, timeout=120)
    done = start("sample.py", "--max_new_tokens", "20")
    assert done.returncode == 0 and "report/halt.pt: halt model" in done.stderr, done.stderr
    assert "gates as executed" in done.stderr           # a halting model skips by default
    text_file.write_text("häuser über flüsse\n" * 60, encoding="utf-8")
    done = start("train.py", "--data", str(text_file), "--n_layer", "3", "--n_embd", "16", "--block_size", "16",
                 "--max_iters", "2")
    assert done.returncode == 0 and "validation loss" in done.stdout, done.stderr
    done = start("sample.py", "--max_new_tokens", "40", "--temperature", "0", "--prompt", "h")
    assert done.returncode == 0 and done.stdout.startswith("h") and "tsa-soft" in done.stderr, done.stderr


# ----------------------------------------------------------------------------------------------------------------
# report/

def test_scores_of_report_are_those_of_training(finished, text_file):
    """The tables mix rows of depth.py and train.py, and a sweep must not confuse one threshold with another."""
    assert run(depth, finished / "ckpt.pt", "--device", "cpu", "--threshold", 0.5, 0.2) == 0
    assert run(depth, finished / "ckpt.pt", "--device", "cpu", "--gate", "skip", "--threshold", 0.6) == 0
    rows, result = (json.loads((finished / name).read_text()) for name in ("scores.json", "result.json"))
    assert [(row["gate"], row["threshold"]) for row in rows] == [("soft", 0.5), ("soft", 0.2), ("skip", 0.6)]
    for key in ("val_loss", "val_loss_executed", "tlops_saved", "macs_saved"):
        assert rows[0][key] == pytest.approx(result[key], abs=1e-5)
    assert rows[1]["tlops_saved"] > rows[0]["tlops_saved"] and rows[0]["permuted"] != rows[0]["val_loss"]
    assert rows[0]["histogram"][0] == [0] * 9 + [1] and all(sum(b) == pytest.approx(1) for b in rows[0]["histogram"])
    model, saved = train.load_checkpoint(finished / "ckpt.pt")
    idx, targets = data.load(str(text_file)).windows("val", 16)
    by_hand = [masked(model, x[None])[0][0].argmax(-1) for x in idx]
    assert rows[0]["accuracy"] == pytest.approx((torch.stack(by_hand) == targets).float().mean().item())
    assert run(plot, finished.parent, "--csv", finished / "r.csv") == 0
    assert (finished / "r.csv").read_text().count("\n") == 4


@pytest.mark.parametrize("settings", HARD[1:])
def test_replayed_gates_are_the_ones_that_run(settings):
    """Permuted gates and clock.py rely on this: replaying a model's own gates changes nothing."""
    model, idx = tiny(**settings).double(), tokens()
    logits, gates = model(idx, "executed")
    gates = gates if settings.get("gate") == "skip" else gates != 0
    with depth.replay(model, gates):
        torch.testing.assert_close(model(idx, "executed")[0], logits)
    with depth.replay(model, torch.ones_like(gates)):
        assert model(idx, "executed")[1].eq(1).all()
    torch.testing.assert_close(model(idx, "executed")[0], logits)


def test_permuted_gates_keep_tokens_whole_and_in_place():
    """Gates split up across blocks, or moved to another position, would say nothing about the router."""
    gates = torch.arange(5 * 7).view(5, 7) + 100 * torch.arange(4).view(4, 1, 1)           # (L, n, T)
    permuted = depth.permute_tokens(gates)
    assert torch.equal(permuted, permuted[0] + 100 * torch.arange(4).view(4, 1, 1))        # the L gates of one token
    assert torch.equal(permuted[0] % 7, gates[0] % 7)                                      # at the same position
    assert torch.equal(permuted[0].sort(0).values, gates[0]) and not torch.equal(permuted, gates)


def test_chains_are_scored_by_hops():
    """If right and wrong answers were swapped, or early tokens miscounted, the table by hops would mean nothing."""
    idx, _ = data.load("chain").windows("val", 30, 50)
    hops = depth.hops_of(idx)
    gates = (torch.arange(4).view(4, 1, 1) <= hops).float()         # depth is hops + 1
    rows = depth.by_hops(idx, hops < 3, gates)
    assert [row["accuracy"] for row in rows] == [1, 1, 1, 0, 0] and [row["needed"] for row in rows] == [1, 1, 2, 2, 3]
    assert all(row["early"] == 0 for row in rows)
    early = depth.by_hops(idx, hops < 4, gates[:2])[4]      # at most 2 blocks, where 3 suffice
    assert early["early"] == early["n"] > 0 == early["early_right"]
    assert [row["used"] for row in rows] == [1, 2, 3, 4, 4] and sum(row["n"] for row in rows) == 50 * 30


def test_clock_times_each_way_to_run(finished, monkeypatch):
    """The plain model is the baseline for all others; the model's own gates are timed as well as random ones."""
    monkeypatch.setattr(clock, "BATCHES", {"prefill": (3,), "decode": (2,)})
    seconds, timed = itertools.cycle([2, 1, 1, 1, 1, 1]), []       # the plain model, then the five others
    monkeypatch.setattr(clock, "timed", lambda call, device: timed.append(call()) or next(seconds))
    assert run(clock, finished / "ckpt.pt", "--device", "cpu", "--seconds", 0, "--out", finished / "c.csv") == 0
    lines = [line.split(",") for line in (finished / "c.csv").read_text().splitlines()]
    assert [line[3] for line in lines[1:4]] == ["plain", "plain half", "own"] and len(lines) == 1 + 2 * 6
    assert all(float(line[8]) == 1 == float(line[9]) for line in lines[1::6]) and len(timed) == 2 * 4 * 6
    assert all(float(line[8]) == 2 for i, line in enumerate(lines[1:]) if i % 6)
    assert all(float(line[9]) > 2 for line in lines[2::6])          # 1 layer instead of 3
    assert all(0 < float(line[4]) < 1 for i, line in enumerate(lines[1:]) if i % 6 > 1)


def test_mean_and_spread_are_over_the_seeds_of_a_name():
    """A mean over different models, or over scores with another threshold, would be meaningless."""
    runs = (("halt-s0", .5, 1.0), ("halt-s1", .5, 2.0), ("halt-s1", .9, 5.0), ("other-s0", .5, 9.0))
    rows = [dict(setting="a", run=name, split="val", gate=None, threshold=threshold, model="halt",
                 **dict.fromkeys(plot.SCORES, value)) for name, threshold, value in runs]
    summary = plot.summarize(rows)
    assert [(line["name"], line["n"], line["val_loss"][0]) for line in summary] == [
        ("halt", 2, 1.5), ("halt", 1, 5.0), ("other", 1, 9.0)]
    assert summary[0]["macs_saved"][1] == pytest.approx(0.5 ** 0.5)


def test_plain_model_saves_what_its_missing_layers_would_cost(tmp_path):
    """All savings in the tables are relative to 6 layers."""
    result = dict(model="dense", data="t.txt", preset="laptop", vocab_size=65, block_size=64, n_embd=128, n_head=4,
                  n_layer=3, ran=[1, 1, 1])
    (tmp_path / "result.json").write_text(json.dumps(result))
    row = plot.read_rows([tmp_path], "")[0]
    assert row["tlops_saved"] == 0.5 and 0.49 < row["macs_saved"] < 0.5


# ----------------------------------------------------------------------------------------------------------------
# README.md

def blocks_of_readme():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)


def test_excerpts_of_the_readme_are_in_the_code():
    """A tutorial that quotes a different program from the one it comes with is worse than none."""
    code = " ".join(" ".join((HERE / name).read_text(encoding="utf-8").split()) for name in ("tsa.py", "train.py"))
    excerpts = [block for block in blocks_of_readme() if "GATES[" not in block]
    assert len(excerpts) >= 3
    for excerpt in excerpts:
        for part in excerpt.split("..."):
            assert " ".join(part.split()) in code, part


def test_gate_of_the_readme_works_as_printed(run_train, tmp_path, monkeypatch):
    """Readers try this snippet first: what it trains is what it runs, with the gradient of the soft gate."""
    monkeypatch.setitem(GATES, "straight", None)        # pytest takes it out again
    exec(next(block for block in blocks_of_readme() if 'GATES["straight"]' in block), dict(vars(tsa)))
    assert run_train("--gate", "straight", "--lam", 0.01, "--max_iters", 6, *WILD, "--seed", 1) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert abs(result["val_loss"] - result["val_loss_executed"]) < 1e-5 and 0 < result["tlops_saved"] < 2 / 3
    p = torch.tensor([0.1, 0.5, 0.9], requires_grad=True)
    gate = GATES["straight"][0](p, 0.5)
    gate.sum().backward()
    assert gate.tolist() == [1, 1, 0] and p.grad.tolist() == [-1, -1, -1]
    del GATES["straight"]
    with pytest.raises(SystemExit, match="unknown gate 'straight'"):
        train.load_checkpoint(tmp_path / "run" / "ckpt.pt")
