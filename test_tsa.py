"""
Run with `python -m pytest -q`; no network or GPU is needed. The tests of the models come first, in the order of tsa.py;
those of the data and the programs begin at `# data.py`. The tests of report/ are in report/test_report.py.
"""
import argparse
import hashlib
import itertools
import json
import math
import os
import re
import runpy
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import sample
import train
import tsa
from data import UserError
from tsa import GATES, MODELS, Block, Config, Exit, Halt, KVCache, Router, generate, savings

HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)        # faster for models this small


def tiny(model="tsa", seed=0, **settings):
    """A small model with weights far from their initial values, so that gates and exits differ from token to token."""
    torch.manual_seed(seed)
    defaults = dict(vocab_size=11, block_size=16, n_layer=4, n_head=2, n_embd=16, dropout=0.0)
    model = MODELS[model](Config(model=model, **defaults | settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def tokens(B=3, T=16, vocab_size=11, seed=1):
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def masked(model, idx):
    """The reference for a sparse pass: the inference gates, applied by multiplication."""
    forward = Block.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Block, "forward",
                      lambda self, x, gate=None, sparse=False, cache=None: forward(self, x, gate, False, cache))
        return model(idx, sparse=True)


# ----------------------------------------------------------------------------------------------------------------
# tsa.py: the parts

def test_model_starts_as_in_the_paper():
    """A missing bias, an untied head or a larger residual stream would be a different experiment."""
    for name, n_params in (("plain", 4_782_336), ("tsa", 4_864_901), ("exit", 4_784_896)):
        assert sum(p.numel() for p in MODELS[name](Config(model=name)).parameters()) == n_params
    torch.manual_seed(0)
    model = MODELS["tsa"](Config())
    starts = {model.wte.weight: 0.02, model.wpe.weight: 0.02}
    for block in model.blocks:
        starts |= {block.attn.proj.weight: 0.02 / 12 ** 0.5, block.ffn.proj.weight: 0.02 / 12 ** 0.5,
                   block.attn.query.weight: 1 / 3 ** 0.5 / 16}         # torch's default
    for weight, std in starts.items():
        assert weight.std().item() == pytest.approx(std, rel=0.03)
    assert all(router.out.bias.item() == -1 for router in model.routers)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("sparse", [False, True])
def test_no_token_sees_the_future(model, sparse):
    """A gate or an exit that looked ahead would score well and generate rubbish."""
    model, idx = tiny(model), tokens()
    changed = idx.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 11
    before, after = model(idx, sparse)[0], model(changed, sparse)[0]
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_attention_by_hand():
    """One head and one token at a time: a query attends to its own position and those before it."""
    attn, h, source, rows = tiny().blocks[0].attn, torch.randn(2, 8, 16), torch.randn(2, 8, 16), torch.empty(2, 8, 16)
    kv, q = attn.key_value(source), h @ attn.query.weight.T
    k, v = kv.split(16, dim=-1)
    for b, t, head in itertools.product(range(2), range(8), (slice(0, 8), slice(8, 16))):
        weights = (k[b, :t + 1, head] @ q[b, t, head] / 8 ** 0.5).softmax(0)
        rows[b, t, head] = weights @ v[b, :t + 1, head]
    expected = rows @ attn.proj.weight.T
    torch.testing.assert_close(attn(h, kv), expected)
    torch.testing.assert_close(attn(h, kv, torch.tensor([5, 10, 15])), expected[[0, 1, 1], [5, 2, 7]])
    torch.testing.assert_close(attn(h[:, -1:], kv), expected[:, -1:])       # the newest token alone
    torch.testing.assert_close(attn(h[:, -1:], kv, torch.tensor([1])), expected[1:, -1])        # of the second sequence


def test_dropout_sits_at_the_papers_four_places(monkeypatch):
    """On the embeddings and attention weights, after GELU and after the feed-forward output; never in evaluation."""
    places = []
    monkeypatch.setattr(F, "dropout", lambda x, p, training: places.append((*x.shape, p if training else 0.0)) or x)
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda q, k, v, dropout_p, is_causal: places.append(("attention", dropout_p)) or q)
    model = tiny("plain", n_layer=1, dropout=0.1)
    for training, p in ((True, 0.1), (False, 0.0)):
        places.clear()
        model.train(training)(tokens(B=2))
        assert places == [(2, 16, 16, p), ("attention", p), (2, 16, 64, p), (2, 16, 16, p)]


def test_router_keeps_p_below_1_in_bfloat16():
    """The width is the paper's. The sigmoid runs in float32: in bfloat16, 1 - p would round to 0, a closed gate."""
    assert [Router(Config(n_embd=n, n_head=1)).fc.out_features for n in (256, 128, 32)] == [64, 32, 16]
    with torch.autocast("cpu", torch.bfloat16):
        p = Router(Config(gate_bias=6.0))(torch.randn(1, 64, 256))
    assert p.dtype == torch.float32 and (1 - p).min() > 0 and len(p.unique()) > 8


@pytest.mark.parametrize("gate, expected", [
    ("soft", ([.9, .5, .25, .1], [1., 1., 1., 0.])), ("skip", ([.9, .5, .25, .1], [.9, .5, .25, 0.])),
    ("stretch", ([1., .5, .15, 0.], [1., .5, .15, 0.]))])
def test_gate_designs_follow_their_definitions(gate, expected):
    """The training gate and the inference gate make up a design; a token with p equal to the threshold still runs."""
    p = torch.tensor([.1, .5, .75, .9])
    for make_gate, values in zip(GATES[gate], expected):
        torch.testing.assert_close(make_gate(p, 0.75), torch.tensor(values))        # floats, both of them


def hinge(p, threshold):
    """A reader's own design: exact zeros, and no gradient there."""
    return (1 - p / threshold).clamp(min=0)


@pytest.mark.parametrize("pair, expected", [
    (GATES["stretch"], True), ((hinge, hinge), True), (GATES["soft"], False), (GATES["skip"], False),
    ((lambda p, threshold: (0.9 - p).clamp(min=0),) * 2, True),        # with a kink at a round number
    ((tsa.stretch, tsa.binary), False),                     # runs another gate than it trains
    ((tsa.soft, tsa.soft), False),                          # 0 at p = 1, with a gradient
    ((tsa.binary, tsa.binary), False),                      # no gradient at all
    ((lambda p, threshold: tsa.binary(p, threshold) + p - p.detach(),) * 2, False),        # one at p > threshold only
])
def test_design_trains_sparse_only_if_a_closed_gate_passes_no_gradient(monkeypatch, pair, expected):
    """Otherwise, a token that skips would lose its part of the gradient, and training would change in silence."""
    monkeypatch.setitem(GATES, "own", pair)
    assert tsa.can_train_sparse(Config(gate="own")) is expected
    assert not tsa.can_train_sparse(Config(model="halt", gate="own"))


def test_sequence_of_wrong_length_is_refused():
    """Without these checks, a block_size of 1 would broadcast one position to every token."""
    for model, T in ((tiny(), 17), (tiny(), 0), (tiny(block_size=1), 2)):
        with pytest.raises(ValueError, match=f"{T} tokens.*block_size"):
            model(tokens(T=T))
    model, cache = tiny(), KVCache()
    model(tokens(), cache=cache)
    for T, error, message in ((1, ValueError, "17 tokens"), (2, AssertionError, "one token at a time")):
        with pytest.raises(error, match=message):
            model(tokens(T=T), cache=cache)


# ----------------------------------------------------------------------------------------------------------------
# tsa.py: the four models

def cross_entropy(logits, targets, **options):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, **options)


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
        x = x + gates[l][..., None] * block.attn(block.ln1(x), block.attn.key_value(block.ln1(x)))
        hidden = block.ffn.fc(block.ln2(x))
        hidden = hidden * (1 + torch.erf(hidden / 2 ** 0.5)) / 2        # exact GELU, as in the paper
        x = x + gates[l][..., None] * block.ffn.proj(hidden)
    logits = model.ln_f(x) @ model.wte.weight.T
    task, used = model.loss(idx, targets)
    torch.testing.assert_close(model(idx)[0], logits, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(used, torch.stack(gates))
    expected = cross_entropy(logits, targets) + 0.3 * torch.stack(gates[1:]).mean()
    assert_same_with_gradients(model, task + 0.3 * used[1:].mean(), expected)


@pytest.mark.parametrize("first", [0, 1])
def test_early_exit_by_hand(monkeypatch, first):
    """
    Paper, section 1: the loss is the uniform mean of the L cross-entropies, each with its own LayerNorm and the tied
    head. Its code freezes only an exited token's logits. Here its x stays too, and others attend to that x.
    """
    assert Exit.FIRST == 1      # the paper's
    monkeypatch.setattr(Exit, "FIRST", first)
    model, idx, targets = tiny("exit", n_layer=5, threshold=0.4), tokens(), tokens(seed=2)
    targets[0, :7] = -1
    sparse, gates = masked(model, idx)
    expected, losses = torch.full_like(sparse, torch.nan), []
    x, kept, running = model.embed(idx), model.embed(idx), torch.ones(3, 16, dtype=torch.bool)
    for l, (block, norm) in enumerate(zip(model.blocks, [*model.exit_norms, model.ln_f])):
        assert torch.equal(gates[l].bool(), running)
        x, kept = block(x), torch.where(running[..., None], block(kept), kept)
        full, prediction = norm(x) @ model.wte.weight.T, norm(kept) @ model.wte.weight.T
        losses.append(cross_entropy(full, targets))
        leaves = running & (prediction.softmax(-1).amax(-1) > 0.4) if first <= l < 4 else running & (l == 4)
        assert l < first or 0 < leaves.sum() < 48, l
        expected[leaves] = prediction[leaves]
        running = running & ~leaves
    torch.testing.assert_close(sparse, expected)
    torch.testing.assert_close(model(idx)[0], full)
    assert_same_with_gradients(model, model.loss(idx, targets)[0], sum(losses) / 5)
    sure = tiny("exit", threshold=1.0)
    sure.wte.weight.data.mul_(1000)
    assert sure(idx, sparse=True)[1].eq(1).all()        # a confidence equal to the threshold does not exit


def test_halting_loss_and_its_gradient_by_hand(monkeypatch):
    """Equation (5) holds, and a token halts in the same state in training as at inference."""
    assert (Halt.HALT_SHARE, Halt.EVERY_SHARE, Halt.LAST_SHARE, Halt.BARRIER) == (0.2, 0.05, 0.75, 1e-4)
    for name, value in (("HALT_SHARE", 0.5), ("EVERY_SHARE", 0.2), ("LAST_SHARE", 0.3), ("BARRIER", 0.01)):
        monkeypatch.setattr(Halt, name, value)
    model, idx, targets = tiny("halt", seed=6, threshold=0.3), tokens(), tokens(seed=2)
    targets[0, :8] = -1         # not scored, as in the tasks, but their depth still counts
    x = kept = model.embed(idx)
    survive, running, expected, depth = torch.ones(3, 16), torch.ones(3, 16, dtype=torch.bool), 0, 0
    for l, block in enumerate(model.blocks):
        x = x + block.attn(block.ln1(x), block.attn.key_value(block.ln1(kept)))
        x = x + block.ffn(block.ln2(x))
        kept = torch.where(running[..., None], x, kept)
        p = model.routers[l](x) if l < 3 else torch.ones(3, 16)
        logits = model.ln_f(x) @ model.wte.weight.T
        losses = cross_entropy(logits, targets, reduction="none").view(3, 16)
        expected = expected + ((0.5 * survive * p + (l > 0) * 0.2 / 3 + (l == 3) * 0.3) * losses).sum() / 40
        if l < 3:
            expected = expected - 0.01 * (p.log() + (1 - p).log()).mean()
        depth = depth + (survive.mean() / 3 if l > 0 else 0)
        survive, running = survive * (1 - p), running & (p <= 0.3)
    task, survives = model.loss(idx, targets)
    torch.testing.assert_close(task, expected)
    assert_same_with_gradients(model, task + 0.3 * survives[1:].mean(), expected + 0.3 * depth)
    torch.testing.assert_close(model(idx)[0], logits)
    sparse, gates = masked(model, idx)
    torch.testing.assert_close(sparse, model.ln_f(kept) @ model.wte.weight.T)
    assert len(gates.sum(0).unique()) > 2
    model.config.threshold = 0.5
    for router in model.routers:        # a p equal to the threshold does not halt, neither here nor in training
        torch.nn.init.zeros_(router.out.weight)
        torch.nn.init.zeros_(router.out.bias)
    sparse, gates = model(idx, sparse=True)
    assert gates.eq(1).all()
    torch.testing.assert_close(model(idx)[0], sparse)
    torch.nn.init.constant_(model.routers[0].out.bias, 200)     # p is 1, and only the barrier still has a gradient
    model.loss(idx, targets)[0].backward()
    assert model.routers[0].out.bias.grad.item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("model", MODELS)
def test_loss_never_waits_for_a_gpu(model):
    """On torch's meta device, mixing devices or reading a value raises an error, so this test needs no GPU."""
    model = tiny(model).to("meta").train()
    idx = torch.zeros(3, 16, dtype=torch.long, device="meta")
    task, gates = model.loss(idx, idx)
    (task + 0.1 * gates[1:].mean()).backward()


# ----------------------------------------------------------------------------------------------------------------
# tsa.py: gathered tokens, cache, generation, counts

KEEP = {
    "ragged": torch.tensor([[1, 0, 1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 0]]),
    "none": torch.zeros(3, 8), "all": torch.ones(2, 3), "one full row": torch.tensor([[1, 1, 1], [0, 1, 0]]),
    "one token": torch.ones(1, 1),
}


def watch(block, seen):
    """Append the name and the input's shape without channels, for each of these layers that the block runs."""
    layers = {"key_value": block.attn.key_value, "query": block.attn.query, "proj": block.attn.proj,
              "fc": block.ffn.fc, "ffn.proj": block.ffn.proj}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda layer, args, y, name=name: seen.append((name, args[0].shape[:-1])))


@pytest.mark.parametrize("pattern", KEEP)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 0.05)])
def test_sparse_block_computes_the_open_tokens_and_no_others(pattern, dtype, tolerance):
    """The central test: skipping tokens must not change the result, whether gates are scales or switches."""
    keep = KEEP[pattern].float()
    scale = keep * (0.2 + 0.8 * torch.rand(keep.shape, generator=torch.Generator().manual_seed(0)))
    block, x, seen, N = tiny().blocks[1].to(dtype), torch.randn(*keep.shape, 16, dtype=dtype), [], int(keep.sum())
    watch(block, seen)
    with torch.no_grad():
        for gate in (scale, keep):
            expected = block(x, gate)
            seen.clear()
            sparse = block(x, gate, sparse=True)
            torch.testing.assert_close(sparse, expected, rtol=tolerance, atol=tolerance)
            assert torch.equal(sparse[keep == 0], x[keep == 0]) and (sparse is x) == (N == 0)
            rows = keep.shape if N == keep.numel() else (N,)        # if all are open, nothing is gathered
            assert seen == [("key_value", keep.shape)] + [
                (name, rows) for name in ("query", "proj", "fc", "ffn.proj") if N > 0]
            cache = KVCache()       # the last token alone, as in generation: in some sequences open, in others closed
            for start, end in ((0, keep.size(1) - 1), (keep.size(1) - 1, keep.size(1))):
                cache.length = end
                last = block(x[:, start:end], gate[:, start:end], True, cache)
            torch.testing.assert_close(last, expected[:, -1:], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("design", [tsa.stretch, hinge])
@pytest.mark.parametrize("shifts", [(-20, -20, -20), (0, 0, 0), (3, 3, 3), (0, 50, 0)])     # of the routers' logits
def test_sparse_training_step_has_the_gradients_of_a_full_one(monkeypatch, design, shifts):
    """Skipping while training changes no gradient: with all gates open, some, few, or none of one block."""
    monkeypatch.setitem(GATES, "own", (design, design))
    model, seen, gradients = tiny(gate="own", threshold=0.8).double().train(), [], []
    for router, shift in zip(model.routers, shifts):
        router.out.bias.data += shift
    for block in model.blocks[1:]:
        watch(block, seen)
    for sparse in (True, False):
        task, gates = model.loss(tokens(B=13), tokens(B=13, seed=2), sparse)
        # An unused parameter, which AdamW would not decay, raises an error.
        gradients.append(torch.autograd.grad(task + 0.3 * gates[1:].mean(), list(model.parameters())))
    for sparse, full in zip(*gradients):
        torch.testing.assert_close(sparse, full, rtol=0, atol=1e-9)
    N = (gates[1:] != 0).sum((1, 2)).tolist()
    assert (min(N) == 208) == (shifts[0] == -20) and (min(N) == 0) == (50 in shifts)
    rows = [min(math.ceil(n / 64) * 64, 208) for n in N]       # rounded up to a multiple of 64, so that few sizes occur
    assert [shape.numel() for layer, shape in seen if layer == "fc"] == rows + [208] * 3


HARD = [dict(model="plain"), dict(model="tsa", gate="soft"), dict(model="tsa", gate="skip"),
        dict(model="exit", threshold=0.4), dict(model="halt", seed=6)]


@pytest.mark.parametrize("settings", HARD)
def test_sparse_model_equals_one_that_multiplies_by_its_gates(settings):
    """Exactly the tokens with an open gate reach the query, the projection and the feed-forward layer of a block."""
    model, idx, seen = tiny(**settings).double(), tokens(), []
    scaled, same = masked(model, idx)
    for block in model.blocks:
        watch(block, seen)
    logits, gates = model(idx, sparse=True)
    torch.testing.assert_close(logits, scaled)
    assert torch.equal(gates, same)
    for name in ("query", "proj", "fc"):
        assert [rows.numel() for layer, rows in seen if layer == name] == [N for N in (gates != 0).sum((1, 2)) if N > 0]
    assert settings["model"] == "plain" or len((gates != 0).sum((0, 2)).unique()) == 3      # sequences differ


@pytest.mark.parametrize("settings", HARD)
def test_cached_text_is_that_of_a_slow_loop(settings):
    """
    A cache and a sparse block must not change the text, even past the end of the context, for one sequence or for two
    whose tokens skip different blocks. In float64, rounding changes no gate.
    """
    model = tiny(**settings).double()
    for B, sparse, temperature, top_k in [(2, False, 1.0, None), (2, True, 0.5, None), (1, True, 1.5, 3)]:
        torch.manual_seed(3)
        steps = list(generate(model, tokens(B, T=3), 40, temperature, top_k, sparse))
        torch.manual_seed(3)
        window = tokens(B, T=3)
        for idx_next, gates in steps:
            if window.size(1) > 16:
                window = window[:, -8:]
            with torch.no_grad():
                logits, all_gates = masked(model, window) if sparse else model(window)
            p, order = (logits[:, -1] / temperature).softmax(-1), logits[:, -1].argsort(-1, descending=True)
            if top_k is not None:
                p = p.scatter(1, order[:, top_k:], 0)
            assert torch.equal(idx_next, torch.multinomial(p, 1))
            torch.testing.assert_close(gates, all_gates[:, :, -1], rtol=1e-6, atol=1e-6)
            assert gates.dtype == torch.float32 and gates[0].eq(1).all()
            window = torch.cat([window, idx_next], 1)


def test_generation_computes_one_token_per_step_and_greedy_is_argmax(monkeypatch):
    """A step processes one token, or half a window when the context is full; temperature 0 is greedy."""
    model, text, long, sizes = tiny("plain"), tokens(1, 1), tokens(1, 20), []
    greedy, tiny_temperature = (torch.cat([t for t, _ in generate(model, text, 12, how)]) for how in (0, 1e-40))
    assert torch.equal(greedy, tiny_temperature) and greedy[0].item() == model(text)[0][0, -1].argmax()
    one, same = (next(generate(model, part, 1, 0))[0] for part in (long, long[:, -8:]))
    assert one.item() == same.item()        # of a prompt that exceeds the context, the last 8 tokens count
    embed = model.embed
    monkeypatch.setattr(model, "embed", lambda idx, cache=None: sizes.append(idx.size(1)) or embed(idx, cache))
    list(generate(model.train(), text, 20))
    assert sizes == [1] * 16 + [8] + [1] * 3 and not model.training
    torch.nn.init.zeros_(model.wte.weight)      # all logits are 0: top_k=1 is greedy, not a draw among equals
    for k in (1, 2, 99):        # 99: all 11
        assert len({idx_next.item() for idx_next, _ in generate(model, text, 99, top_k=k)}) == min(k, 11)


@pytest.mark.parametrize("alpha, saved", [(.341, .549), (.730, .225), (.726, .228), (.833, .139), (.755, .204)])
def test_token_layer_operations_are_the_papers(alpha, saved):
    """The paper's table (section 3): the same alpha must give the same saving."""
    assert abs(savings(Config(), [1] + [alpha] * 5)[0] - saved) < 0.0006


@pytest.mark.parametrize("settings", HARD)
@pytest.mark.parametrize("decode", [False, True])
def test_counted_multiply_adds_are_what_ran(settings, decode):
    """
    PyTorch's own count says the same, so no table claims more than was skipped. It counts the whole square of queries
    and keys, but savings() only the half that a causal kernel needs, and in decoding that of the closed tokens, too.
    """
    model, idx, (B, T) = tiny(**settings), tokens(B=2, seed=4), (2, 16) if decode else (2, 12)     # not 16
    cache = KVCache() if decode else None
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        gates = [model(part, True, cache)[1] for part in idx[:, :T].split(1 if decode else T, dim=1)]
    gates = torch.cat(gates, dim=2) != 0                                                   # (L, B, T)
    counts = {op: n / 2 for op, n in counter.get_flop_counts()["Global"].items()}          # two flops per multiply-add
    if decode:      # token t has t + 1 keys; a step skips the block if it is closed in all sequences
        keys = (gates.any(1) * torch.arange(1, T + 1)).sum().item()
    else:
        keys = gates.any(2).any(1).sum().item() * T * T
    assert counts.pop(torch.ops.aten.bmm) == B * keys * 2 * 16      # scores and values
    products = sum(counts.values()) / (B * T) + 4 * T / 2 * 2 * 16
    plain = 4 * (12 * 16 * 16 + T / 2 * 2 * 16) + 16 * 11           # by hand
    ran = gates.double().mean((1, 2)).tolist()
    assert savings(model.config, ran, None if decode else T)[1] == pytest.approx(1 - products / plain)
    assert settings["model"] == "plain" or sum(ran) < 4


# ----------------------------------------------------------------------------------------------------------------
# data.py

def test_text_comes_back_split_at_characters(tmp_path, monkeypatch):
    """Any UTF-8 text, from a file, enwik8's zip or the standard library, comes back, split at characters, not bytes."""
    text, path = "naïve 漢字 🙂\n" * 50, tmp_path / "enwik8.zip"
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("enwik8", text)
    assert data.ENWIK8_SPLIT == (90_000_000, 95_000_000)        # the paper's
    monkeypatch.setattr(data, "FOLDER", tmp_path)
    monkeypatch.setitem(data.FILES, "enwik8", (path.name, "", hashlib.sha256(path.read_bytes()).hexdigest()))
    monkeypatch.setattr(data, "ENWIK8_SPLIT", (300, 400))
    for name, a, b in ((str(tmp_path / "t.txt"), 440, 495), ("enwik8", 300, 400)):
        corpus = data.load(name)
        assert corpus.vocab == "".join(sorted(set(text))) and corpus.example == text[a:a + 64]
        for split, part in (("train", text[:a]), ("val", text[a:b]), ("test", text[b:])):
            assert "".join(corpus.vocab[i] for i in corpus.splits[split]) == part
    files = [tmp_path / "b.py", tmp_path / "a.py"]
    for file in files:
        file.write_text(file.stem * 9)
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: {"stdlib": tmp_path})
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(files))        # a file system in another order
    corpus = data.load("stdlib")
    assert corpus.splits["train"].tolist() == [0] * 9 + [1] * 5 and corpus.prompt == "a"        # without a newline


@pytest.mark.parametrize("task", ["copy", "sort"])
def test_the_papers_tasks_are_what_they_say(task):
    """The format is `^source|target$`; only target and EOS are scored. No validation sequence occurs in training."""
    corpus = data.load(task)
    idx, targets = corpus.windows("val", 64)
    text = "".join(corpus.vocab[i] for i in idx[0])
    source, target = text[1:].split("|")
    assert len(corpus.vocab) == 32 and len(source) == 20 and len(idx) == 1000 and len(corpus.splits["train"]) == 10_000
    assert target == (source if task == "copy" else "".join(sorted(source, key=corpus.vocab.index)))
    assert targets[0, :21].eq(-1).all() and "".join(corpus.vocab[i] for i in targets[0, 21:]) == target + "$"
    assert corpus.example.startswith(corpus.prompt) and corpus.prompt.endswith("|")
    torch.manual_seed(0)
    first = corpus.splits["train"][:64, 0].tolist()
    assert sum(row in first for row in corpus.batch(64, 64)[0].tolist()) < 10       # drawn from all sequences
    seen = {tuple(row) for row in corpus.splits["train"][:, 0].tolist()}
    assert not any(tuple(row) in seen for row in idx.tolist())


def test_target_of_a_chain_is_the_digit_that_the_letters_lead_to():
    """With wrong targets a model could only guess, so this test follows the letters one at a time."""
    corpus = data.load("chain")
    idx, targets = corpus.windows("val", 30)
    assert corpus.example == "7418534bfadclhi0gjnm4o30uwtx56"       # the same chains in every run
    assert idx.shape == (1000, 30) and len(corpus.splits["train"]) == 100_000 and not corpus.prompt
    assert data.chain_answers(corpus.example) == "741853443781143047414330431056"       # by hand, one letter at a time
    for row, target in zip(idx[:20], targets):
        text, answers = ("".join(corpus.vocab[i] for i in tokens) for tokens in (row, target))
        assert answers == data.chain_answers(text)
        assert all(c.isdigit() or data.LETTERS.index(c) // 6 == place // 6 - 1 for place, c in enumerate(text))
        assert all(len(set(places.tolist())) == 6 for places in row.split(6))       # so that chains stay apart
    assert 0.19 < (idx[:, 6:] < 10).double().mean() < 0.21         # DIGIT_SHARE
    with pytest.raises(ValueError, match="'b' at place 2"):
        data.chain_answers("7bc")


VERSE = b"To be, or not to be, that is the question.\n" * 40


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server on loopback that sends server.body as Tiny-Shakespeare, or an error if there is none."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.server.body else 404)
            self.end_headers()
            self.wfile.write(self.server.body)

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(data, "FOLDER", tmp_path / "data")
    file = "text.txt", f"http://127.0.0.1:{server.server_port}", hashlib.sha256(VERSE).hexdigest()
    monkeypatch.setitem(data.FILES, "shakespeare", file)
    yield server
    server.shutdown()
    server.server_close()


def test_download_is_verified_and_kept(server, tmp_path):
    """The first run fetches the file, the second needs no network, and a file damaged afterwards is refused."""
    server.body, path = VERSE, tmp_path / "data" / "text.txt"
    corpus = data.load("shakespeare")
    server.body = b"something else"
    assert data.load("shakespeare").vocab == corpus.vocab and path.read_bytes() == VERSE
    assert [file.name for file in path.parent.iterdir()] == ["text.txt"]
    path.write_bytes(b"To be, or")
    with pytest.raises(UserError, match="delete it"):
        data.load("shakespeare")


@pytest.mark.parametrize("body", [b"", VERSE[:-1]])
def test_bad_download_leaves_nothing_and_training_falls_back(server, run_train, tmp_path, capsys, monkeypatch, body):
    """No file is left behind, and train.py says in one line that it uses the standard library instead."""
    server.body = body
    (tmp_path / "a.py").write_text("import this\n" * 99)
    monkeypatch.setattr(data, "sysconfig", Mock(get_paths=lambda: {"stdlib": tmp_path}))
    refused(run_train("--data", "shakespeare"), "save it as", "text.txt")       # explicit, so no fallback
    assert run_train("--data", "auto", "--dtype", "auto", "--max_iters", 1) == 0
    line, flags, *_ = capsys.readouterr().out.splitlines()
    assert "save it as" in line and "--data stdlib" in line and "data=stdlib" in flags
    saved = train.load_checkpoint(tmp_path / "run" / "ckpt.pt")[1]
    assert saved["vocab"] == "\n himoprst" and saved["flags"]["dtype"] in ("float32", "bfloat16")   # what "auto" meant
    assert not (tmp_path / "data").exists()


# ----------------------------------------------------------------------------------------------------------------
# train.py

WILD = ["--warmup_iters", 0, "--learning_rate", 0.1, "--gate_bias", 0]      # soon open some gates and close others


def run(program, *flags):
    """Run a program's main in this process; return 0, or the exit status or message with which it ended."""
    try:
        program.main([str(flag) for flag in flags])
        return 0
    except SystemExit as end:
        return end.code


def refused(end, *words):
    """Assert a user error: the program ended with one line that contains these words."""
    assert str(end).startswith("error: ") and "\n" not in end, end       # sys.exit prints it, and the status is 1
    assert all(word in end for word in words), end


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\n" * 302, encoding="utf-8")
    return path


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


def by_hand(model, idx, targets, sparse):
    """The score of windows: loss, mean gates, shares of tokens that ran."""
    with torch.no_grad():
        logits, gates = masked(model, idx) if sparse else model(idx)
    ran = (gates != 0).double().mean((1, 2)).tolist()
    return cross_entropy(logits, targets).item(), gates.mean((1, 2)).tolist(), ran


def test_result_is_the_score_of_the_checkpoint(capsys, finished, text_file):
    """The tables are built from result.json: validation split, full and sparse, both savings, and the flags."""
    result = json.loads((finished / "result.json").read_text())
    model, saved = train.load_checkpoint(finished / "ckpt.pt")
    text, vocab = text_file.read_text(), saved["vocab"]
    stream = torch.tensor(data.encode(text, vocab))[int(0.8 * len(text)):int(0.9 * len(text))]
    rows = stream[torch.arange(0, len(stream) - 16, 16)[:, None] + torch.arange(17)]
    idx, targets = rows[:, :-1], rows[:, 1:].clone()
    full, sparse = (by_hand(model, idx, targets, sparse) for sparse in (False, True))
    expected = dict(val_loss=full[0], gates=full[1], val_loss_sparse=sparse[0], ran=sparse[2],
                    tlops_saved=1 - sum(sparse[2]) / 3, macs_saved=savings(model.config, sparse[2])[1])
    for key, value in expected.items():
        assert result[key] == pytest.approx(value, abs=1e-5), key
    assert abs(full[0] - sparse[0]) > 1e-4 and 0 < result["tlops_saved"] < 2 / 3
    assert (f"validation loss {full[0]:.4f} full, {sparse[0]:.4f} sparse, saving {result['tlops_saved']:.1%} of token-"
            f"layer operations and {result['macs_saved']:.1%} of multiply-adds (84 win") in capsys.readouterr().out
    assert {path.name for path in finished.iterdir()} == {"ckpt.pt", "result.json"}        # no temporary file
    assert saved["flags"].items() < result.items() and {"vocab_size", "torch", "seconds"} < result.keys()
    assert result["n_params"] == sum(parameter.numel() for parameter in model.parameters())
    first = train.score(model, (idx[:64], targets[:64]))["val_loss_sparse"]         # during training
    assert saved["history"] == result["history"] and saved["history"][-1]["val_loss_sparse"] == pytest.approx(first)
    targets[:, :5] = -1             # unscored tokens count for the gates, but not for the loss
    model = tiny(vocab_size=len(vocab), gate="skip", threshold=0.8)
    for value, expected in zip(train.evaluate(model, (idx, targets), True), by_hand(model, idx, targets, True)):
        assert value == pytest.approx(expected, abs=1e-5)


def test_run_equals_a_loop_written_out(run_train, text_file, tmp_path):
    """Ten steps of train.py match a loop with every setting spelled out: seeds, warm-up, cosine, decay, clip, lam."""
    assert run_train("--max_iters", 10, "--learning_rate", 0.02, "--warmup_iters", 4, "--lam", 0.3, "--lam_ramp", 0.5,
                     "--seed", 5) == 0
    saved = train.load_checkpoint(tmp_path / "run" / "ckpt.pt")[1]
    corpus, clipped = data.load(str(text_file)), 0
    seeds = [int(np.random.SeedSequence((5, step)).generate_state(1)[0]) for step in range(11)]
    torch.manual_seed(seeds[0])
    model = tsa.TSA(Config(vocab_size=len(corpus.vocab), block_size=16, n_layer=3, n_head=2, n_embd=16, dropout=0.0))
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
        (task + 0.3 * min(step / 5, 1) * gates[1:].mean()).backward()
        clipped += torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item() > 1
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * min(step / 4, 1) * (0.55 + 0.45 * math.cos(math.pi * (step - 1) / 9))
        optimizer.step()
    assert clipped > 2
    row = saved["history"][-1]
    assert row["lam"] == 0.3
    assert row["loss"] - row["task_loss"] == pytest.approx(0.3 * gates[1:].mean().item(), abs=1e-3)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(saved["model"][name], parameter.detach(), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("flags, expected", [
    ("--preset paper", dict(
        n_layer=6, n_head=8, n_embd=256, block_size=128, batch_size=64, max_iters=5000, learning_rate=3e-4,
        warmup_iters=0, dropout=0.1, lam=0.001, lam_ramp=0, gate_bias=-1.0, threshold=0.5, gate="soft")),
    ("", dict(learning_rate=1.5e-3, batch_size=32, max_iters=2400, block_size=64, warmup_iters=100, n_embd=128)),
    ("--preset deep", train.parse_flags([]) | dict(
        preset="deep", n_layer=12, learning_rate=3e-3, warmup_iters=300, data="stdlib")),
    ("--data chain", dict(max_iters=1500, learning_rate=2e-3, batch_size=64, block_size=30, n_embd=64, n_layer=6)),
    ("--data copy --preset paper --n_embd 64", dict(
        n_embd=64, block_size=64, batch_size=256, max_iters=390, learning_rate=3e-4)),
    ("--model exit", dict(threshold=0.9, n_embd=128)), ("--model halt", dict(lam=0.03, lam_ramp=0.5)),
])
def test_defaults_are_those_of_preset_task_and_model(flags, expected):
    """`--preset paper` uses the settings of the paper's section 2, and an explicit flag overrides any default."""
    assert expected.items() <= train.parse_flags(flags.split()).items()
    assert not {"lam", "gate", "gate_bias"} & train.parse_flags(["--model", "exit"]).keys()


def test_help_lists_every_flag_with_its_defaults(capsys):
    """Readers see only there what --preset, --model and a task change."""
    assert run(train, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "weight of the depth penalty in the loss (default: tsa 0.001, halt 0.03)" in text
    assert "embedding width (default: 128, paper 256, copy 128, sort 128, chain 64)" in text
    assert all(f"--{name} " in text for name in train.FLAGS) and "relative to a plain model of the same depth" in text


@pytest.mark.parametrize("model, word", [("plain", "gates"), ("tsa", "gates"), ("halt", "reach")])
def test_printed_gates_are_named_for_what_they_are(run_train, capsys, model, word):
    """Halt prints the probability of reaching each block; block 0 is left out, and plain models have no open gates."""
    assert run_train("--model", model, "--max_iters", 1, *([] if model == "plain" else ["--lam", 100])) == 0
    out = capsys.readouterr().out
    line = re.search(rf"loss ([\d.]+) \(task ([\d.]+)\)  {word} (\d\.\d\d) \d\.\d\d  \d+ ms", out)
    loss, task, first = map(float, line.groups())
    assert (loss > task + 10) == (first < 1) == ("\n  open gates 1.00 1.00" in out) == (model != "plain")


def interrupt(patch, step):
    """Let torch.save raise KeyboardInterrupt when it has written half of the checkpoint of this step."""
    def interrupted(contents, path, write=torch.save):
        write(contents, path)
        if contents["step"] == step:
            path.write_bytes(path.read_bytes()[:1000])
            raise KeyboardInterrupt
    patch.setattr(torch, "save", interrupted)


@pytest.mark.parametrize("model, step", [       # the first evaluation, with sparse training, and a later one
    (["--gate", "stretch", "--batch_size", 16, *WILD], 10), (["--model", "halt"], 40)])
def test_interrupted_run_resumes_to_the_bit(run_train, tmp_path, monkeypatch, model, step):
    """After Ctrl-C, even while the first checkpoint is being saved, --resume gives the results of a whole run."""
    flags = [*model, "--max_iters", 50, "--eval_interval", 10, "--dropout", 0.1, "--seed", 5]
    assert run_train(*flags, "--out_dir", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        interrupt(patch, step)
        assert run_train(*flags) == "\nstopped"
    path = tmp_path / "run" / "ckpt.pt"
    saved = torch.load(path, weights_only=True)
    assert saved["step"] == step - 10
    refused(run_train(*flags), f"--resume {tmp_path / 'run'}")      # which is what the next lines do
    torch.save(saved | {"seconds": 1000.0}, path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)       # the run's own device is used all the same
    assert run(train, "--resume", tmp_path / "run") == 0
    a, b = (train.load_checkpoint(tmp_path / name / "ckpt.pt")[1] for name in ("whole", "run"))
    assert a["step"] == b["step"] == 50 and len(a["history"]) == 5 and a["history"] == b["history"]
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert json.loads((tmp_path / "run" / "result.json").read_text())["seconds"] >= 1000


@pytest.mark.parametrize("model", ["tsa", "halt"])
def test_task_trains_on_its_own_sequences_in_bfloat16(run_train, tmp_path, monkeypatch, model):
    """Training sees whole sequences of the training split, with blocks in bfloat16 and logits in float32."""
    seen, loss = [], MODELS[model].loss

    def watched(self, idx, targets):
        assert self.training and torch.is_autocast_enabled("cpu") and self(idx)[0].dtype == torch.float32
        assert not torch.backends.cuda.flash_sdp_enabled()      # training with it would be slow here
        seen.extend(zip(idx.tolist(), targets.tolist()))
        return loss(self, idx, targets)

    monkeypatch.setattr(MODELS[model], "loss", watched)
    assert run_train("--model", model, "--data", "copy", "--block_size", 64, "--max_iters", 2, "--eval_interval", 1,
                     "--dtype", "bfloat16", *WILD) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    config = train.load_checkpoint(tmp_path / "run" / "ckpt.pt")[0].config
    assert result["macs_saved"] == savings(config, result["ran"], T=42)[1]      # the sequences are shorter than 64
    assert torch.backends.cuda.flash_sdp_enabled()
    known = data.load("copy").splits["train"].tolist()
    assert all(list(pair) in known for pair in seen[:4] + seen[-4:])


def test_sparse_training_reaches_the_losses_of_full_training(run_train, tmp_path, capsys, monkeypatch):
    """60 steps, in float32, during which blocks close for all tokens and open again."""
    flags = ["--gate", "stretch", "--lam", 1, "--warmup_iters", 0, "--learning_rate", 0.02, "--batch_size", 16,
             "--max_iters", 60, "--eval_interval", 10]
    can_train_sparse, pad_rows, runs, padded = tsa.can_train_sparse, tsa.pad_rows, [], []
    monkeypatch.setattr(tsa, "pad_rows", lambda *args: padded.append(True) or pad_rows(*args))
    for word in ("sparse", "full"):
        monkeypatch.setattr(train, "can_train_sparse", lambda config: word == "sparse" and can_train_sparse(config))
        padded.clear()
        assert run_train(*flags, "--out_dir", tmp_path / word) == 0
        assert f"training: {word}\n" in capsys.readouterr().out and len(padded) == (word == "sparse") * 60 * 2
        runs.append(train.load_checkpoint(tmp_path / word / "ckpt.pt")[1])
    sparse, full = runs
    assert [a["loss"] for a in sparse["history"]] == pytest.approx([b["loss"] for b in full["history"]], abs=1e-6)
    assert {share == 0 for row in full["history"] for share in row["ran"]} == {True, False}
    for name in full["model"]:
        torch.testing.assert_close(sparse["model"][name], full["model"][name], rtol=0, atol=1e-5)


def test_training_on_a_gpu_is_full(capsys):
    """There, each block would wait until the number of open tokens is known."""
    for device in ("cpu", "cuda"):
        args = argparse.Namespace(device=device, compile=0, max_iters=0)
        train.train(tiny(gate="stretch"), None, None, None, args, {"step": 0, "seconds": 0.0}, None)
    assert capsys.readouterr().out == "training: sparse\ntraining: full\n"


@pytest.mark.parametrize("model", [["--model", "halt"], ["--gate", "stretch"]])
def test_compiled_loss_trains_the_same_model(run_train, tmp_path, capsys, monkeypatch, model):
    """One graph without breaks, so no sparse training, and the weights of a run without --compile."""
    compiled, losses = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda loss: losses.append(loss) or compiled(loss, fullgraph=True,
                                                                                      backend="aot_eager"))
    for flag in (0, 1):
        assert run_train(*model, "--max_iters", 2, "--compile", flag, "--out_dir", tmp_path / str(flag)) == 0
    assert "training: full\n" in capsys.readouterr().out.partition("compile=1")[2]
    a, b = (train.load_checkpoint(tmp_path / str(flag) / "ckpt.pt")[1]["model"] for flag in (0, 1))
    assert len(losses) == 1
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("step, spoil", [       # the program looks only at steps 10 and 20
    (13, lambda loss, weight: loss * math.inf),         # still in the weights at step 20
    (20, lambda loss, weight: loss + (0 * weight).sum().sqrt())])   # infinite slope at 0: a finite loss, a nan gradient
def test_diverged_run_stops_and_keeps_its_checkpoint(run_train, tmp_path, monkeypatch, spoil, step):
    """Weights that are not finite must not overwrite those that were still good."""
    original, steps = MODELS["tsa"].loss, itertools.count(1)

    def spoiled(self, idx, targets):
        loss, gates = original(self, idx, targets)
        return (spoil(loss, self.wpe.weight) if next(steps) == step else loss), gates

    monkeypatch.setattr(MODELS["tsa"], "loss", spoiled)
    refused(run_train("--max_iters", 60, "--eval_interval", 10), "not finite")
    model, saved = train.load_checkpoint(tmp_path / "run" / "ckpt.pt")
    assert saved["step"] == 10 and all(parameter.isfinite().all() for parameter in model.parameters())


# ----------------------------------------------------------------------------------------------------------------
# User errors

@pytest.mark.parametrize("flags, words, text", [
    ([], ["empty"], b""), ([], ["one character"], b"aaaa" * 99), ([], ["utf-8"], b"ab\xff" * 999),
    ([], ["block_size"], b"abcdefgh" * 20),
    *((flags, words, None) for flags, words in [
        (["--n_head", 3], ["n_head 3", "n_embd 16"]), (["--n_layer", 1], ["n_layer"]), (["--n_embd", 0], ["--n_embd"]),
        (["--model", "exit", "--n_layer", 1], ["n_layer 2"]), (["--device", "abacus"], ["abacus"]),
        (["--model", "plain", "--lam", 1], ["--lam"]), (["--model", "halt", "--gate", "soft"], ["--gate"]),
        (["--data", "copy"], ["--block_size"]), (["--data", "missing.txt"], ["missing.txt"]),
        (["--gate", "ajar"], ["--gate", "soft"]), (["--seed", "many"], ["--seed", "many"]), (["--bogus", 1], ["bogus"]),
        (["--resume", "."], ["no other flag"]), (["--out_dir", __file__], ["exists"])]),
    *(([f"--{name}", value], [f"--{name}"], None) for name, (_, kind, _) in train.FLAGS.items()
      if isinstance(kind, type(train.COUNT)) for value in (-101, 10**30, "nan")),       # a number, in any range
])
def test_bad_flags_and_texts_are_one_line(run_train, text_file, tmp_path, flags, words, text):
    """An invalid value is reported by name, a text that cannot be used by what is wrong; no folder is left behind."""
    text_file.write_bytes(text_file.read_bytes() if text is None else text)
    refused(run_train(*flags), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, words", [
    (["--seed", 10**30], ["--seed"]), (["--temperature", "nan"], ["--temperature"]), (["--top_k", 0], ["--top_k"]),
    (["--temperature", -1], ["--temperature"]), (["--prompt", ""], ["empty"]), (["--max_new_tokens", -1], ["tokens"]),
    (["--prompt", "The §"], ["'\\xa7'"]),       # readable even in a plain-ASCII terminal
    (["--prompt", "The " * 5, "--map"], ["20 tokens", "16"]),
])
def test_bad_flags_of_sample_are_one_line(finished, flags, words):
    """A negative temperature was once silently greedy, and a huge seed ended in a traceback."""
    refused(run(sample, finished / "ckpt.pt", "--device", "cpu", *flags), *words)


@pytest.mark.parametrize("design", [tsa.binary, lambda p, threshold: p.detach()])
def test_design_that_passes_no_gradient_is_refused(run_train, monkeypatch, design):
    """With a switch in training, the routers would silently never learn."""
    monkeypatch.setitem(GATES, "hard", (design, tsa.binary))
    refused(run_train("--gate", "hard"), "no gradient", "hard")


def test_device_is_tried_before_it_is_used(monkeypatch):
    """A GPU that torch lists but cannot use must cause neither a traceback nor a silent fallback to the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", Mock(side_effect=RuntimeError("the driver is too old\nand more")))
    with pytest.raises(UserError, match="--device cuda does not work here .the driver is too old.; try --device cpu$"):
        train.pick_device("auto")


def test_no_run_overwrites_another_or_changes_its_text(finished, run_train, tmp_path, text_file, monkeypatch):
    """Neither a second run nor a changed text may destroy the weights of the first, even before it has saved any."""
    before = (finished / "ckpt.pt").read_bytes()
    refused(run_train("--max_iters", 1), "exists", str(finished))
    text = text_file.read_text()
    changed = [text[:start] + text[start:start + 99][::-1] + text[start + 99:]
               for start in (99, int(0.85 * len(text)), len(text) - 99)]        # in each of the splits
    for other in [*changed, text.replace("z", "{")]:        # and the same tokens with another alphabet
        text_file.write_text(other)
        refused(run(train, "--resume", finished, "--device", "cpu"), "text has changed")
    assert (finished / "ckpt.pt").read_bytes() == before
    refused(run(train, "--resume", finished, "--device", "abacus"), "abacus")      # another device, if asked
    monkeypatch.chdir(tmp_path)
    interrupt(monkeypatch, 1)
    for _ in range(2):
        assert run_train("--max_iters", 1, "--out_dir", "auto").startswith("\nstopped")
    refused(run_train("--max_iters", 1, "--out_dir", "out/tsa-2"), "exists")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["tsa-1", "tsa-2"]


def test_bad_checkpoint_is_one_line_and_runs_no_code(finished, tmp_path):
    """A missing, truncated, empty or foreign file is reported, and so is a pickle that would run code when loaded."""
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    path = finished / "ckpt.pt"
    shipped = torch.load(path, weights_only=True)
    torch.save({key: value for key, value in shipped.items() if key != "history"}, path)
    refused(run(train, "--resume", finished, "--device", "cpu"), "an older version of train.py wrote it")
    del shipped["optimizer"]
    torch.save(shipped, path)
    refused(run(train, "--resume", finished, "--device", "cpu"), "no optimizer state")
    shipped["model"].popitem()
    torch.save(shipped, path)
    refused(run(sample, path, "--device", "cpu"), "does not fit the tsa model")
    for content in (path.read_bytes()[:-100], b"", Bomb(), {"model": {}}, [1, 2]):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        refused(run(sample, path, "--device", "cpu"), "damaged or was not written by")
    path.unlink()
    refused(run(train, "--resume", finished, "--device", "cpu"), "No such file", "ckpt.pt")
    assert not (tmp_path / "exploded").exists()


# ----------------------------------------------------------------------------------------------------------------
# sample.py

def sampled(capsys, *flags):
    """Run sample.py and return what it writes to stdout and to stderr."""
    capsys.readouterr()
    assert run(sample, "--device", "cpu", *flags) == 0
    return capsys.readouterr()


def test_color_of_a_character_is_its_depth(finished, capsys, monkeypatch):
    """Text in a pipe, or with NO_COLOR, stays plain; the closing line says what was computed."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    flags = [finished / "ckpt.pt", "--prompt", "The", "--max_new_tokens", 30, "--sparse"]
    model, saved = train.load_checkpoint(finished / "ckpt.pt")
    for name, value in (("gate", "skip"), ("threshold", 0.85)):         # open gates far below 1
        saved["config"][name] = value
        setattr(model.config, name, value)
    torch.save(saved, finished / "ckpt.pt")
    torch.manual_seed(0)
    steps = list(generate(model, torch.tensor([data.encode("The", saved["vocab"])]), 30, 0.8))
    text = "".join(saved["vocab"][idx_next] for idx_next, _ in steps)
    open_gates = torch.cat([gates != 0 for _, gates in steps], dim=1)                      # (L, 30)
    depths, ran = open_gates.sum(0).tolist(), open_gates.double().mean(1).tolist()
    plain, remarks = sampled(capsys, *flags)
    tlops, macs = savings(model.config, ran)
    assert plain == "The" + text + "\n" and len(set(depths)) > 1
    assert (f"sparse: a token ran {sum(depths) / 30:.2f} of 3 blocks on average, saving {tlops:.1%} of token-layer "
            f"operations and {macs:.1%} of mult") in remarks
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    colored, color = sampled(capsys, *flags).out, {1: "153", 2: "75", 3: "33"}
    assert re.findall(r"48;5;(\d+)m(.)", colored) == [(color[depth], c) for depth, c in zip(depths, text) if c != "\n"]
    assert re.sub(r"\033\[[0-9;]*m", "", colored) == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert sampled(capsys, *flags).out == plain


def test_scales_are_sampled_as_they_were_trained(finished, run_train, tmp_path, capsys):
    """A thresholded soft gate generates rubbish, so tsa runs full by default, and the closing line says so."""
    texts, remarks = zip(*(sampled(capsys, finished / "ckpt.pt", "--max_new_tokens", 40, *flags) for flags in (
        ["--no-sparse"], [], ["--seed", 1], ["--top_k", 1], ["--temperature", 0], ["--sparse"])))
    assert all("every token ran all 3 blocks" in remark for remark in remarks[:5])
    assert texts[0] == texts[1] != texts[2] and texts[3] == texts[4] and "sparse: " in remarks[5]
    assert texts[0].startswith("\n")        # the corpus's own prompt
    assert run_train("--model", "exit", "--max_iters", 1, "--out_dir", tmp_path / "exit") == 0
    assert "sparse: " in sampled(capsys, tmp_path / "exit" / "ckpt.pt", "--max_new_tokens", 2).err
    token = sampled(capsys, finished / "ckpt.pt", "--map").out.splitlines()[3]
    assert token.startswith("token ") and len(token) == 8 + 2 * 16        # the example fits into the context


def test_copied_text_ends_at_its_end_mark(run_train, tmp_path, capsys, monkeypatch):
    """No training sequence continues after the $, so what follows it would be noise."""
    assert run_train("--data", "copy", "--block_size", 42, "--batch_size", 2, "--max_iters", 1) == 0
    vocab = train.load_checkpoint(tmp_path / "run" / "ckpt.pt")[1]["vocab"]
    new_tokens = [(torch.tensor([[i]]), torch.ones(3, 1)) for i in data.encode("ab$cd", vocab)]
    monkeypatch.setattr(sample, "generate", lambda *args: iter(new_tokens))
    text, remarks = sampled(capsys, tmp_path / "run" / "ckpt.pt")
    assert text.endswith("|ab$\n") and "\n3 tokens" in remarks


@pytest.mark.parametrize("model, sparse, seed", [("plain", False, 6), ("tsa", False, 6), ("exit", True, 11),
                                                 ("halt", True, 6)])
def test_map_shows_the_prediction_after_each_block(model, sparse, seed, capsys, monkeypatch):
    """A cell is what a model that stops after that block would predict, and blank if the token skipped it."""
    model, vocab, idx = tiny(model, seed=seed, threshold=0.4), "abcdefghij\n", tokens(1, 9)
    logits, gates = masked(model, idx) if sparse else model(idx)
    monkeypatch.setenv("COLUMNS", "20")         # 6 columns of 2 characters, then 3
    answers = "".join(vocab[i] for i in logits[0].argmax(-1)).replace("\n", "?")[:8] + "?"     # some right, one wrong
    sample.write_map(model, vocab, idx, sparse, answers)
    out, remarks = capsys.readouterr()
    ran, lines = (gates != 0).double().mean((1, 2)).tolist(), out.split("\n")
    assert not sparse or f"{savings(model.config, ran, T=9)[1]:.1%} of multiply-adds" in remarks
    assert [line[:7].strip() for line in lines[:7]] == [f"block {l}" for l in (3, 2, 1, 0)] + ["token", "answer", ""]
    rows = [first[8:].ljust(12) + second[8:].ljust(6) for first, second in zip(lines[:6], lines[7:])]
    x = model.embed(idx)
    for l, block in enumerate(model.blocks):
        norm = model.exit_norms[l] if hasattr(model, "exit_norms") and l < 3 else model.ln_f
        x = block(x, gates[l])
        best = (norm(x) @ model.wte.weight.T)[0].argmax(-1)
        cells = ["⏎" if vocab[i] == "\n" else vocab[i] for i in best]
        assert rows[3 - l][1::2] == "".join(c if gates[l, 0, t] else " " for t, c in enumerate(cells))
    assert 0 < rows[0].count(" ") - 9 if sparse else " " not in rows[0][1::2]
    assert rows[5] == "".join("!?" if c == "?" else f" {c}" for c in answers)


def test_map_of_a_chain_marks_wrong_answers_and_takes_the_readers_own(capsys, monkeypatch):
    """The prompt may be any chain; in a terminal a wrong answer is red and the background of a cell shows its gate."""
    ckpt = HERE / "report" / "chain-tsa.pt"
    assert sampled(capsys, ckpt, "--prompt", "7ab").out.splitlines()[-3:-1] == ["token    7 a b", "answer   7 7 7"]
    plain = sampled(capsys, ckpt, "--sparse").out
    monkeypatch.setattr(sample, "is_colored", lambda: True)
    colored = sampled(capsys, ckpt, "--sparse").out
    assert colored.count("\033[31m") == plain.count("!") > 0
    rows = [re.findall(r"\033\[30;48;5;(\d+)m (.)\033\[0m|(  )", line[8:].ljust(1)) for line in colored.split("\n")[:6]]
    cells = [cell for row in rows for cell in row]
    assert all(color == "33" and c != " " or closed for color, c, closed in cells)      # a switch: deep blue or nothing
    assert [re.sub(r"\033\[[0-9;]*m", "", line) for line in colored.split("\n")[:6]] == plain.split("\n")[:6]
    scales = set(re.findall(r"48;5;(\d+)m", sampled(capsys, ckpt).out))
    assert len(scales) > 2 and scales <= set(map(str, sample.BLUES))
    refused(run(sample, ckpt, "--device", "cpu", "--prompt", "b7"), "'b' at place 1")


@pytest.mark.parametrize("stdout", [StringIO, lambda: TextIOWrapper(BytesIO(), "ascii")])
def test_programs_run_in_notebooks_and_plain_terminals(tmp_path, capsys, monkeypatch, stdout):
    """In a notebook, sys.stdout has no reconfigure; a terminal may be plain ASCII. sample.py finds the newest run."""
    text, older = tmp_path / "flüsse.txt", tmp_path / "out" / "older" / "ckpt.pt"
    text.write_text("häuser über flüsse\n" * 60, encoding="utf-8")
    older.parent.mkdir(parents=True)
    older.touch()
    os.utime(older, (0, 0))
    monkeypatch.chdir(tmp_path)
    for program, flags in (("train.py", [f"--data={text}", "--n_layer=3", "--n_embd=16", "--block_size=16",
                                         "--max_iters=2"]), ("sample.py", ["--max_new_tokens=40", "--prompt=ü"])):
        monkeypatch.setattr(sys, "argv", [program, "--device=cpu", *flags])
        monkeypatch.setattr(sys, "stdout", stdout())
        runpy.run_path(str(HERE / program), run_name="__main__")
    assert "tsa-1" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------
# README.md

def blocks_of_readme():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)


def test_excerpts_of_the_readme_are_in_the_code():
    """A tutorial that quotes a different program from the one it comes with is worse than none."""
    code = " ".join((HERE / "tsa.py").read_text(encoding="utf-8").split())
    excerpts = [block for block in blocks_of_readme() if "GATES[" not in block]
    assert len(excerpts) >= 2
    for excerpt in excerpts:
        for part in excerpt.split("..."):
            assert " ".join(part.split()) in code, part


def test_gate_of_the_readme_works_as_printed(run_train, tmp_path, monkeypatch):
    """Readers try this snippet first: it trains what runs, and its gradient reaches the router."""
    block, = (block for block in blocks_of_readme() if "GATES[" in block)
    monkeypatch.setitem(GATES, "straight", None)        # pytest takes it out again
    exec(block, dict(vars(tsa)))
    assert run_train("--gate", "straight", "--lam", 0.01, "--max_iters", 6, *WILD) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert abs(result["val_loss"] - result["val_loss_sparse"]) < 1e-5 and result["tlops_saved"] > 0
    del GATES["straight"]
    refused(run(sample, tmp_path / "run" / "ckpt.pt", "--device", "cpu"), "no model 'tsa' with gate 'straight'")
