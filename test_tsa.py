"""
python -m pytest -q      Offline, on the CPU. In the order of tsa.py, then data.py, train.py and the command lines.
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

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import data
import sample
import train
import tsa
from tsa import Config, GATES, KV, MODELS, Router, UserError, build, generate, macs_per_token, macs_saved, tlops_saved

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


def run_train(*flags):
    small = ["--n_layer", "3", "--n_embd", "16", "--n_head", "2", "--block_size", "16", "--batch_size", "4", "--dtype",
             "float32"]
    return train.main(small + [str(flag) for flag in flags])


# ----------------------------------------------------------------------------------------------------------------
# tsa.py

@pytest.mark.parametrize("settings, expected", [
    (dict(model="dense"), 4_782_336), (dict(model="tsa"), 4_864_901), (dict(model="exit"), 4_784_896),
    (dict(model="dense", vocab_size=6064, block_size=256), 6_350_848),
    (dict(model="tsa", vocab_size=6064, block_size=256), 6_433_413),
    (dict(model="dense", **SYNTHETIC), 1_199_104), (dict(model="tsa", **SYNTHETIC), 1_219_909),
])
def test_parameter_counts_are_the_papers(settings, expected):
    """A missing bias or an untied head would make another architecture than the one whose results we check."""
    assert sum(p.numel() for p in build(Config(**settings)).parameters()) == expected


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("run", ["trained", "masked", "gathered"])
def test_no_token_sees_the_future(model, run):
    """A gate or an exit that looked ahead would score well and generate rubbish."""
    model, idx = tiny(model), tokens()
    changed = idx.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 11
    before, after = model(idx, run=run)[0], model(changed, run=run)[0]
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_gate_scales_both_residual_updates():
    """Equations (1) and (2), their two ends being the plain block and the identity."""
    block, x, gate = tiny().blocks[1], torch.randn(2, 8, 16), torch.rand(2, 8)
    h = x + gate[..., None] * block.attn(block.ln1(x))
    torch.testing.assert_close(block(x, gate), h + gate[..., None] * block.ffn(block.ln2(h)))
    assert torch.equal(block(x, torch.ones(2, 8)), block(x))
    assert torch.equal(block(x, torch.zeros(2, 8)), x)


def test_training_computes_what_inference_does():
    """On a CPU attention is written out for training and fused for inference: one model all the same."""
    model, idx = tiny(), tokens()
    logits = model(idx)[0]
    torch.testing.assert_close(model.train()(idx)[0], logits)


def test_dropout_drops_its_share_and_keeps_the_mean():
    """The CPU's quick dropout takes 16 random bits an element: its share is the paper's, its draws are independent."""
    drop, x = tsa.Dropout(0.1), torch.ones(1000, 1003)
    torch.manual_seed(0)
    y = drop(x)
    kept = y > 0
    assert abs(kept.float().mean() - 0.9) < 0.002 and torch.equal(y[kept], x[kept] / 0.9)
    assert (kept.float().mean(0) - 0.9).abs().max() < 0.05 and (kept.float().mean(1) - 0.9).abs().max() < 0.05
    both = (kept[:, :-1] & kept[:, 1:]).float().mean()      # neighbours share one draw
    assert abs(both - 0.81) < 0.003 and not torch.equal(drop(x), y) and torch.equal(drop.eval()(x), x)


def test_router_is_the_papers_gate_mlp():
    """Equation (3) by hand; at the start p is near 0.27, so alpha is 0.73 before anything was learned."""
    router, h = tiny().routers[0], torch.randn(2, 5, 16)
    hidden = torch.relu(h @ router.fc.weight.T + router.fc.bias)
    p = torch.sigmoid((hidden @ router.out.weight.T + router.out.bias)[..., 0])
    torch.testing.assert_close(router(h), p)
    fresh = build(Config()).routers[0]
    assert fresh.fc.out_features == 64 and abs(fresh(torch.randn(1, 64, 256) * 0.03).mean() - 0.27) < 0.05


def test_router_stays_float32_under_autocast():
    """Near p = 1 bfloat16 rounds 1 - p to 0, which would skip tokens whose gate is small but open."""
    router = Router(Config(gate_bias=6.0))
    with torch.autocast("cpu", torch.bfloat16):
        p = router(torch.randn(1, 64, 256))
    assert p.dtype == torch.float32 and (1 - p).min() > 0 and len(p.unique()) > 32


@pytest.mark.parametrize("gate, expected", [("soft", ([.9, .5, .4, .1], [1, 1, 0, 0])),
                                            ("skip", ([.9, .5, .4, .1], [.9, .5, 0, 0])),
                                            ("straight", ([1, 1, 0, 0], [1, 1, 0, 0]))])
def test_gate_pairs_follow_their_definitions(gate, expected):
    """What training sees and what inference runs are the two halves of a design; p at the threshold still runs."""
    p = torch.tensor([.1, .5, .6, .9])
    for make_gate, values in zip(GATES[gate], expected):
        torch.testing.assert_close(make_gate(p, 0.5), torch.tensor(values, dtype=torch.float32))


def test_depth_loss_and_gates_by_hand():
    """L = L_task + lam * mean over the L-1 routers of mean(1 - p), each block gated by the router before it."""
    model, idx, targets = tiny(lam=0.7), tokens(), tokens(seed=2)
    targets[:, :10] = -1        # not scored
    x, depths = model.wte(idx) + model.wpe(torch.arange(16)), []
    for l, block in enumerate(model.blocks):
        x = block(x, 1 - model.routers[l - 1](x) if l > 0 else None)
        if l < 3:
            depths.append((1 - model.routers[l](x)).mean())
    logits = model.norms[0](x) @ model.wte.weight.T
    task = F.cross_entropy(logits[:, 10:].flatten(0, 1), targets[:, 10:].flatten())
    depth = sum(depths) / 3
    actual_logits, loss, stats = model(idx, targets)
    torch.testing.assert_close(actual_logits, logits)
    torch.testing.assert_close(stats["task_loss"], task)
    torch.testing.assert_close(stats["depth_loss"], depth)
    torch.testing.assert_close(loss, task + 0.7 * depth)


@pytest.mark.parametrize("lam", [0.0, 0.01])
def test_gradient_reaches_every_router(lam):
    """A router that the task loss does not reach could only ever close."""
    model = tiny(lam=lam).train()
    model(tokens(), tokens(seed=2))[1].backward()
    for router in model.routers:
        assert all(parameter.grad.abs().sum() > 0 for parameter in router.parameters())


def test_exit_trains_on_the_mean_of_all_exits():
    """Paper section 1: the uniform mean of the L cross-entropies, each with its own LayerNorm and the tied head."""
    model, idx, targets = tiny("exit"), tokens(), tokens(seed=2)
    x, losses = model.wte(idx) + model.wpe(torch.arange(16)), []
    for block, norm in zip(model.blocks, model.norms):
        x = block(x)
        losses.append(F.cross_entropy((norm(x) @ model.wte.weight.T).flatten(0, 1), targets.flatten()))
    torch.testing.assert_close(model(idx, targets)[1], sum(losses) / 4)


def test_exit_thresholds_zero_and_one():
    """At 0 everyone leaves after block 1, the first that may; at 1 nobody leaves and the model is the full one."""
    model, idx = tiny("exit"), tokens()
    full = model(idx)[2]["exit_logits"]
    model.config.threshold = 0.0
    logits, _, stats = model(idx, run="masked")
    torch.testing.assert_close(logits, full[1])
    assert stats["gates"].mean((1, 2)).tolist() == [1, 1, 0, 0]
    model.config.threshold = 1.0
    logits, _, stats = model(idx, run="masked")
    torch.testing.assert_close(logits, full[-1])
    assert stats["gates"].min() == 1


def test_exited_token_really_stops():
    """In the paper's code only its logits freeze; here its state stays, and the others read keys made from it."""
    model, idx = tiny("exit", threshold=0.4), tokens()
    logits, _, stats = model(idx, run="masked")
    left = stats["gates"][2] == 0
    assert 0 < left.float().mean() < 1
    x = model.wte(idx) + model.wpe(torch.arange(16))
    for block in model.blocks[:2]:
        x = block(x)
    torch.testing.assert_close(logits[left], (model.norms[1](x) @ model.wte.weight.T)[left])
    x = torch.where(left[..., None], x, model.blocks[2](x))
    stays = stats["gates"][3] == 1
    x = torch.where(stays[..., None], model.blocks[3](x), x)
    torch.testing.assert_close(logits[stays], (model.norms[3](x) @ model.wte.weight.T)[stays])


def test_halting_trains_what_it_runs():
    """In training every token goes on to the top, yet what it would say where it halts is what inference says."""
    model, idx = tiny("halt", seed=6).double(), tokens()
    executed, _, stats = model(idx, run="masked")
    last = stats["gates"].sum(0).long() - 1
    assert len(last.unique()) > 2, last
    levels = torch.stack(model(idx)[2]["exit_logits"])                                     # (L, B, T, V)
    trained = levels.gather(0, last[None, :, :, None].expand_as(levels[:1]))[0]
    torch.testing.assert_close(trained, executed, rtol=1e-10, atol=1e-10)


def test_halting_loss_by_hand():
    """Equation (7), a token at a time: what is to be expected where it halts, and what keeps every block learning."""
    model, idx, targets = tiny("halt", seed=2, threshold=1.0, lam=0.3), tokens(), tokens(seed=2)
    targets[0, :8] = -1         # not scored, as in the tasks; their depth has its price all the same
    x, p, log_p = model.wte(idx) + model.wpe(torch.arange(16)), [], []
    for l, block in enumerate(model.blocks):
        x = block(x)
        p.append(model.routers[l](x) if l < 3 else torch.ones(3, 16))
        log_p.append((model.norms[0](x) @ model.wte.weight.T).log_softmax(-1))
    routed, learning, depth = 0, 0, 0
    for b in range(3):
        for t in range(16):
            survive, losses, target = 1.0, [], log_p[3][b, t].detach().exp() / 2
            scored = (targets[b, t] >= 0).item() / 40
            target[targets[b, t]] += 0.5
            for l in range(4):
                depth += survive / 48 / 3 if l > 0 else 0
                routed -= survive * p[l][b, t] * (target * log_p[l][b, t]).sum() * scored
                losses.append(-log_p[l][b, t, targets[b, t]] * scored)
                survive *= 1 - p[l][b, t]
            learning += losses[3] * 5 / 6 + sum(losses[1:]) / 3 / 6
    for progress, a, lam in ((0.25, 0.4, 0.15), (0.5, 0.4, 0.3), (0.75, 0.6, 0.3), (1.0, 0.8, 0.3)):
        model.progress.fill_(progress)
        _, loss, stats = model(idx, targets)
        torch.testing.assert_close(stats["depth_loss"], depth)
        torch.testing.assert_close(loss, a * (routed + lam * depth) + (1 - a) * learning)


KEEP = {
    "ragged": torch.tensor([[1, 0, 1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 0]]),
    "all": torch.ones(3, 8), "none": torch.zeros(3, 8), "one row": F.one_hot(torch.tensor(13), 24).view(3, 8),
    "batch of one": torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1]]), "one token": torch.ones(1, 1),
}


@pytest.mark.parametrize("pattern", KEEP)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_gathered_block_equals_masked_block(pattern, dtype, tolerance):
    """The heart of it: rows that are not computed may not change a number, scales other than 1 included."""
    keep = KEEP[pattern]
    gate = (keep * (0.2 + 0.8 * torch.rand(keep.shape, generator=torch.Generator().manual_seed(0)))).to(dtype)
    block, x = tiny().blocks[1].to(dtype), torch.randn(*keep.shape, 16, dtype=dtype)
    with torch.no_grad():
        gathered = block.gathered(x, gate, gate.flatten().nonzero().squeeze(1))
        torch.testing.assert_close(gathered, block(x, gate), rtol=tolerance, atol=tolerance)
    assert torch.equal(gathered[keep == 0], x[keep == 0])


def test_gathered_block_refuses_to_train():
    """It draws no dropout, so that training with it would silently be another model."""
    block, gate = tiny().blocks[1].train(), torch.ones(1, 4)
    with pytest.raises(AssertionError, match="dropout"):
        block.gathered(torch.randn(1, 4, 16), gate, torch.arange(4))


HARD = [dict(model="dense"), dict(model="tsa", gate="soft"), dict(model="tsa", gate="skip"),
        dict(model="exit", threshold=0.4), dict(model="halt", seed=6)]


@pytest.mark.parametrize("settings", HARD)
def test_gathered_model_equals_masked_model(settings):
    """Free-running in float64, where rounding flips no gate; and on given gates, whatever the model."""
    model, idx = tiny(**settings).double(), tokens()
    masked, gathered = model(idx, run="masked"), model(idx, run="gathered")
    torch.testing.assert_close(masked[0], gathered[0], rtol=1e-10, atol=1e-10)
    assert torch.equal(masked[2]["gates"] > 0, gathered[2]["gates"] > 0)
    if settings["model"] != "dense":
        assert 0 < (gathered[2]["gates"] > 0).double().mean() < 1
    gates = torch.rand(4, 3, 16) * torch.bernoulli(torch.full((4, 3, 16), 0.6))
    masked, gathered = (model(idx, run=run, gates=gates) for run in ("masked", "gathered"))
    torch.testing.assert_close(masked[0], gathered[0], rtol=1e-10, atol=1e-10)
    assert all(torch.equal(stats["gates"][1:], gates[1:]) for stats in (masked[2], gathered[2]))


@pytest.mark.parametrize("settings", HARD)
def test_cached_text_is_uncached_text(settings):
    """To the character, past the context twice, for two sequences that skip different tokens, in all three runs."""
    model, idx = tiny(**settings).double(), tokens(B=2, T=3)
    for run in ("trained", "masked", "gathered"):
        drawn = []
        for cache in (True, False):
            torch.manual_seed(3)
            steps = list(generate(model, idx, 40, run=run, cache=cache))
            drawn.append((torch.cat([step[0] for step in steps], 1), torch.cat([step[1] for step in steps], 1)))
        assert torch.equal(drawn[0][0], drawn[1][0])
        torch.testing.assert_close(drawn[0][1], drawn[1][1])


def matrix_flops(counter):
    """Without fused attention, which some versions of PyTorch count, as if it were not causal, and some do not."""
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))


def test_skipped_token_is_still_cached():
    """While decoding, a token that skips every block does its keys and values there, and nothing else."""
    model, idx = tiny(gate="skip").double(), tokens(B=1)
    cache = [KV(1, model.config, model.wte.weight) for _ in model.blocks]
    gates = torch.ones(4, 1, 16)
    gates[1:, :, 9] = 0
    whole = model(idx, run="masked", gates=gates)[0]
    model(idx[:, :9], run="gathered", gates=gates[:, :, :9], cache=cache)
    with FlopCounterMode(display=False) as counter:
        model(idx[:, 9:10], run="gathered", gates=gates[:, :, 9:10], cache=cache)
    stem, routers, head = 2 * 12 * 16 * 16, 3 * 2 * 16 * 16, 2 * 16 * 11
    assert matrix_flops(counter) == stem + routers + head + 3 * 2 * 2 * 16 * 16
    after = [model(idx[:, t:t + 1], run="gathered", gates=gates[:, :, t:t + 1], cache=cache)[0] for t in range(10, 16)]
    torch.testing.assert_close(torch.cat(after, 1), whole[:, 10:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("settings", HARD)
def test_counted_multiply_adds_are_what_ran(settings):
    """PyTorch counts the operations of a gathered run: the formula must not promise more than was skipped."""
    model, idx, gates = tiny(**settings), tokens(B=1), None
    if settings["model"] in ("tsa", "halt"):
        gates = torch.bernoulli(torch.full((4, 1, 16), 0.6), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        gates = model(idx, run="gathered", gates=gates)[2]["gates"]
    ran = (gates > 0).float().mean((1, 2)).tolist()
    assert min(ran) > 0 and (settings["model"] == "dense" or min(ran) < 1)
    expected = macs_per_token(model.config, ran)
    expected -= sum(ran) * 16 * 16 + 16 * len(getattr(model, "routers", []))      # attention; their last layer is a sum
    assert abs(matrix_flops(counter) / 2 / 16 - expected) < 1e-3


@pytest.mark.parametrize("model", MODELS)
def test_one_batch_is_overfitted(model):
    """The shortest proof that loss, gradients and optimiser work together."""
    torch.manual_seed(0)
    model = build(Config(model=model, vocab_size=11, block_size=16, n_layer=3, n_head=2, n_embd=32, dropout=0.0))
    optimizer, idx = train.make_optimizer(model, 1e-2), tokens(B=2, T=17)
    for _ in range(100):
        _, loss, stats = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert stats["task_loss"] < 0.1


def test_generation_keeps_half_a_window_and_greedy_is_argmax():
    """The rule past the context is stated, so that cached and uncached text can agree; so is top_k: 1 is greedy."""
    model, text = tiny("dense"), tokens(B=1, T=1)
    window = text
    for idx_next, gates in generate(model, text, 30, temperature=0):
        if window.size(1) == 17:
            window = window[:, -8:]
        assert idx_next.item() == model(window)[0][0, -1].argmax() and gates.shape == (4, 1)
        window = torch.cat([window, idx_next], 1)
    drawn = torch.cat([text] + [idx_next for idx_next, _ in generate(model, text, 12, top_k=1)], 1)
    assert torch.equal(drawn, torch.cat([text] + [t for t, _ in generate(model, text, 12, temperature=0)], 1))


@pytest.mark.parametrize("alpha, saved", [(.341, .549), (.730, .225), (.726, .228), (.833, .139), (.755, .204)])
def test_token_layer_operations_are_the_papers(alpha, saved):
    """The paper's table (section 3): the same alpha must give the same saving."""
    assert abs(tlops_saved([1] + [alpha] * 5) - saved) < 0.0006


def test_multiply_adds_by_hand():
    """Two blocks, width 8, context 4, 5 characters, half of the tokens skipping block 1, each product written out."""
    config = Config(model="tsa", vocab_size=5, block_size=4, n_layer=2, n_head=2, n_embd=8)
    block = 4 * 8 * 8 + 2 * 8 * 32 + 2 * 8 * 2      # q k v out; fc proj; scores and values, 2 keys on average
    router, head = 8 * 16 + 16, 8 * 5
    assert macs_per_token(config, [1, 0.5]) == block + (block + 2 * 8 * 8) / 2 + router + head
    assert macs_saved(config, [1, 0.5]) == 1 - (block + (block + 128) / 2 + router + head) / (2 * block + head)
    early = Config(model="exit", vocab_size=5, block_size=4, n_layer=3, n_head=2, n_embd=8)
    assert macs_per_token(early, [1, 1, 0.25]) == 2 * block + block / 4 + 128 * 0.75 + 1.25 * head


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
    assert len(corpus.splits["train"]) == int(0.8 * len(text))


def test_windows_cover_the_split_once_and_batches_are_windows(text_file):
    """The final loss is over the whole validation split: no character scored twice, none left but the last few."""
    corpus = data.load(str(text_file))
    idx, targets = corpus.windows("val", 16)
    stream = corpus.splits["val"].long()
    assert torch.equal(idx.flatten(), stream[:idx.numel()])
    assert torch.equal(targets.flatten(), stream[1:idx.numel() + 1])
    assert len(stream) - idx.numel() <= 16
    idx, targets = corpus.batch("train", 5, 16)
    assert idx.shape == (5, 16) and torch.equal(idx[:, 1:], targets[:, :-1])


@pytest.mark.parametrize("task", ["copy", "sort"])
def test_the_papers_tasks_are_what_they_say(task):
    """`^source|target$`, and only target and end are scored."""
    corpus = data.load(task)
    idx, targets = corpus.windows("val", 64)
    text = "".join(corpus.vocab[i] for i in idx[0])
    source, target = text[1:].split("|")
    assert len(corpus.vocab) == 32 and len(source) == 20 and len(idx) == 1000
    assert target == (source if task == "copy" else "".join(sorted(source, key=corpus.vocab.index)))
    assert targets[0, :21].eq(-1).all()
    assert "".join(corpus.vocab[i] for i in targets[0, 21:]) == target + "$"


def test_chain_asks_for_the_digit_that_the_letters_lead_to():
    """Followed by hand, a letter at a time: if hops were wrong, depth against hops would mean nothing."""
    corpus = data.load("chain")
    idx, targets = corpus.windows("val", 64)
    for row, target, hops in zip(idx[:20], targets, corpus.hops):
        text = "".join(corpus.vocab[i] for i in row)
        assert len(text) == 56 and text[:8].isdigit()
        for place in range(56):
            at, n = place, 0
            while not text[at].isdigit():
                at, n = data.PLACES.index(text[at]), n + 1
            assert (corpus.vocab[target[place]], hops[place]) == (text[at], n)
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
    monkeypatch.setitem(data.HOMES, name, (data.HOMES[name][0], url, len(body), sha256))
    return folder / "data" / data.HOMES[name][0]


VERSE = b"To be, or not to be, that is the question.\n" * 40


def test_download_is_verified_and_kept(server, monkeypatch, tmp_path):
    """The first run fetches the file, the second needs no network."""
    path = serve(server, monkeypatch, tmp_path, "shakespeare", VERSE)
    corpus = data.load("shakespeare")
    server.status = 404
    assert data.load().vocab == corpus.vocab and path.read_bytes() == VERSE
    path.write_bytes(b"To be, or")
    with pytest.raises(UserError, match="damaged"):
        data.load("shakespeare")


@pytest.mark.parametrize("status, body, length, pause", [
    (404, VERSE, None, 0), (200, b"another file", None, 0), (200, VERSE[:9], 1720, 0), (200, b"x" * 100_000, None, 0),
    (200, VERSE, None, 3), (302, VERSE, None, 0), (200, b"", 0, 0)])
def test_bad_download_leaves_nothing_and_falls_back(server, monkeypatch, tmp_path, capsys, status, body, length, pause):
    """Missing, another, cut, overlong, stalling, redirected in circles, empty: nothing stays, and stdlib is read."""
    path = serve(server, monkeypatch, tmp_path, "shakespeare", VERSE)
    monkeypatch.setattr(data, "STALL_SECONDS", 0.3)
    server.status, server.body, server.length, server.pause = status, body, length, pause
    began = time.monotonic()
    with pytest.raises(UserError, match="--data stdlib"):
        data.load("shakespeare")
    assert time.monotonic() - began < 2 and not path.parent.exists()
    assert data.load().name == "stdlib"
    line = capsys.readouterr().out
    assert "stdlib" in line and str(path) in line and line.count("\n") == 1


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


# ----------------------------------------------------------------------------------------------------------------
# train.py

def test_evaluation_equals_a_slow_loop(text_file):
    """Losses, alpha and saved must be means over every character, not over batches of unequal size."""
    corpus = data.load(str(text_file))
    model = tiny(gate="skip", vocab_size=len(corpus.vocab))
    idx, targets = windows = corpus.windows("val", 16)
    score = train.evaluate(model, windows, "masked", batch_size=7)
    losses, ran, gate_sum = [], torch.zeros(4), 0
    with torch.no_grad():
        for x, y in zip(idx, targets):
            logits, _, stats = model(x[None], run="masked")
            losses += [-F.log_softmax(row, 0)[t].item() for row, t in zip(logits[0], y)]
            ran += (stats["gates"][:, 0] > 0).sum(1)
            gate_sum += stats["gates"][1:].sum().item()
    ran = (ran / idx.numel()).tolist()
    assert abs(score["loss"] - sum(losses) / len(losses)) < 1e-5
    assert abs(score["alpha"] - gate_sum / idx.numel() / 3) < 1e-5
    assert abs(score["alpha_executed"] - sum(ran[1:]) / 3) < 1e-6 and 0.05 < score["alpha_executed"] < 0.95
    assert score["macs_saved"] == macs_saved(model.config, ran)


def test_paper_preset_is_the_papers():
    """Section 2: what `--preset paper` promises, with enwik8's context and the sizes of the tasks."""
    given = vars(train.parse_args(["--preset", "paper"]))
    flags = train.resolve(given, "shakespeare", "cpu")
    assert [flags[k] for k in ("n_embd", "n_head", "block_size", "batch_size", "max_iters")] == [256, 8, 128, 64, 5000]
    assert (flags["learning_rate"], flags["dropout"], flags["lam"]) == (3e-4, 0.1, 0.001)
    assert train.resolve(given, "enwik8", "cpu")["block_size"] == 256
    copy = train.resolve(given, "copy", "cpu")
    assert [copy[k] for k in ("n_embd", "n_head", "block_size", "batch_size", "lam")] == [128, 4, 64, 256, 0.01]


def test_weight_decay_is_on_matrices_only():
    """Paper section 2: none on biases, LayerNorms and embeddings."""
    model = tiny()
    decayed, others = (group["params"] for group in train.make_optimizer(model, 1e-3).param_groups)
    assert {p.dim() for p in decayed} == {2} and len(decayed) == 4 * 5 + 3 * 2
    assert any(p is model.wte.weight for p in others) and any(p is model.wpe.weight for p in others)


def test_learning_rate_falls_to_a_tenth():
    """Cosine from the first step to the last, no warm-up."""
    assert train.cosine(1, 100) == 1 and abs(train.cosine(100, 100) - 0.1) < 1e-9
    assert abs(train.cosine(51, 101) - 0.55) < 1e-9


class Killed(BaseException):
    """As sudden as kill -9: nothing catches it."""


@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_interrupted_run_resumes_to_the_bit(text_file, tmp_path, monkeypatch, end):
    """Stopped by Ctrl-C or killed between log and checkpoint, then resumed: the weights and the log of one long run."""
    flags = ["--data", text_file, "--max_iters", 50, "--eval_interval", 20, "--dropout", 0.1]
    assert run_train(*flags, "--out_dir", tmp_path / "a") == 0
    seed_step, save_checkpoint = train.seed_step, train.save_checkpoint

    def stop_at_33(seed, step):
        seed_step(seed, step)
        if step == 33:
            os.kill(os.getpid(), signal.SIGINT)

    def kill_at_40(path, **contents):
        if contents["step"] == 40:
            raise Killed
        save_checkpoint(path, **contents)

    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        if end == "stopped":
            patch.setattr(train, "seed_step", stop_at_33)
            assert run_train(*flags) == 130
        else:
            patch.setattr(train, "save_checkpoint", kill_at_40)
            with pytest.raises(Killed):
                run_train(*flags)
    assert train.main(["--resume"]) == 0
    a, b = (torch.load(path / "ckpt.pt", weights_only=True) for path in (tmp_path / "a", Path("out/tsa-soft")))
    assert a["step"] == b["step"] == 50
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    a, b = (train.read_csv(path / "log.csv") for path in (tmp_path / "a", Path("out/tsa-soft")))
    assert len(a) == 4 and [row | {"tokens_per_s": 0} for row in a] == [row | {"tokens_per_s": 0} for row in b]


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


def test_price_of_depth_rises_from_zero(text_file, tmp_path):
    """At its full price from the start no block is worth it yet, and all characters halt at the stem for good."""
    flags = ["--model", "halt", "--lam", 0.5, "--data", text_file, "--max_iters", 80, "--out_dir", tmp_path / "a"]
    assert run_train(*flags) == 0
    for row, price in zip(train.read_csv(tmp_path / "a" / "log.csv")[1:], (0.1, 0.2, 0.3, 0.4)):
        assert abs((float(row["loss"]) - float(row["task_loss"])) / float(row["depth_loss"]) - price) < 1e-4


def test_infinite_loss_stops_the_run_and_keeps_the_checkpoint(text_file, tmp_path, capsys):
    """A diverged run must not overwrite the weights that were still good."""
    flags = ["--data", text_file, "--max_iters", 60, "--eval_interval", 10, "--out_dir", tmp_path / "a"]
    original = train.cosine
    try:
        train.cosine = lambda step, n: original(step, n) if step <= 12 else math.inf
        assert run_train(*flags) == 2
    finally:
        train.cosine = original
    assert "not finite" in capsys.readouterr().err
    model, saved = train.load_checkpoint(tmp_path / "a" / "ckpt.pt")
    assert saved["step"] == 10 and all(parameter.isfinite().all() for parameter in model.parameters())


def test_results_and_table(text_file, tmp_path, capsys):
    """The keys are the contract of every later comparison; early exit brings its sweep, the tasks their accuracies."""
    keys = """model gate lam gate_bias threshold seed data n_params n_layer n_head n_embd block_size batch_size
        max_iters learning_rate dropout step val_loss val_bpc alpha val_loss_executed alpha_executed alpha_by_block
        tlops_saved_executed macs_saved_executed macs_executed tokens_per_s device dtype torch seconds""".split()
    for model in MODELS:
        assert run_train("--model", model, "--data", text_file, "--max_iters", 3, "--out_dir", tmp_path / model) == 0
        result = json.loads((tmp_path / model / "result.json").read_text())
        assert [key for key in result if key != "thresholds"] == keys
        assert (result["alpha"] is None) == (model in ("dense", "exit"))
        assert (result["threshold"] is None) == (model == "dense")
    sweep = json.loads((tmp_path / "exit" / "result.json").read_text())["thresholds"]
    assert [row["threshold"] for row in sweep] == [.99, .95, .90, .85, .80, .75, .70, .65, .60, .55, .50, .40, .30]
    assert {"threshold", "val_loss", "alpha", "tlops_saved", "macs_saved"} < sweep[0].keys()
    assert run_train("--data", "chain", "--block_size", 56, "--max_iters", 2, "--out_dir", tmp_path / "chain") == 0
    result = json.loads((tmp_path / "chain" / "result.json").read_text())
    right = sum(row["accuracy"] * row["n"] for row in result["by_hops"])
    assert abs(right / 56_000 - result["token_accuracy"]) < 1e-6 and 0 <= result["sequence_accuracy"] <= 1
    capsys.readouterr()
    assert train.main(["--table", str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6 == len(train.read_csv(tmp_path / "results.csv")) + 1


def test_frozen_exit_keeps_logits_but_runs_on():
    """The paper's variant against a token-by-token loop: the first confident block's logits, all blocks computed."""
    model, idx, targets = tiny("exit"), tokens(), tokens(seed=2)
    levels = model(idx)[2]["exit_logits"]
    row = next(r for r in train.sweep_exits(model, (idx, targets)) if r["threshold"] == 0.4)
    total = 0
    for b in range(3):
        for t in range(16):
            confident = [l for l in (1, 2) if levels[l][b, t].softmax(0).max() > 0.4]
            total -= levels[confident[0] if confident else 3][b, t].log_softmax(0)[targets[b, t]].item()
    assert abs(row["val_loss_frozen"] - total / 48) < 1e-4 and row["val_loss_frozen"] != row["val_loss"]


# ----------------------------------------------------------------------------------------------------------------
# Command lines

@pytest.fixture
def finished(text_file, tmp_path):
    assert run_train("--data", text_file, "--max_iters", 2, "--out_dir", tmp_path / "run") == 0
    return tmp_path / "run"


def one_line(capsys, *words):
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error, error
    assert all(word in error for word in words), error


@pytest.mark.parametrize("content, words", [
    (None, ["not a file"]), (b"", ["empty"]), (b"aaaa" * 99, ["one character"]), (b"abcdef" * 9, ["block_size"]),
    (b"ab\xff" * 999, ["UTF-8"]), ("folder", ["not a file"]),
])
def test_bad_text_is_one_line(tmp_path, capsys, content, words):
    """A missing, empty, monotonous, short, binary text or a folder: say so, and leave no run behind."""
    path = tmp_path / "text"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    assert run_train("--data", path, "--out_dir", tmp_path / "run") == 2
    one_line(capsys, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, words", [
    (["--n_head", 3], ["n_head 3", "n_embd 16"]), (["--n_layer", 1], ["n_layer"]), (["--device", "abacus"], ["abacus"]),
    (["--model", "dense", "--lam", 1], ["--lam"]), (["--data", "copy"], ["--block_size"]),
    (["--dropout", "nan"], ["--dropout"]), (["--gate", "ajar"], ["--gate", "soft"]), (["--seed", "many"], ["many"]),
    (["--resume", "--fresh"], ["--fresh"]), (["--n_layer", 0], ["--n_layer"]), (["--n_embd", -1], ["--n_embd"]),
    (["--batch_size", 0], ["--batch_size"]), (["--max_iters", -1], ["--max_iters"]),
])
def test_bad_flags_are_one_line(text_file, tmp_path, capsys, flags, words):
    """Nonsense in a flag is answered by its name, with status 2."""
    try:
        status = run_train("--data", text_file, "--out_dir", tmp_path / "run", *flags)
    except SystemExit as end:
        status = end.code
    assert status == 2
    one_line(capsys, *words)


def test_folder_that_holds_a_run_is_refused(finished, text_file, capsys):
    """The two ways out are named, and nothing is lost."""
    before = (finished / "ckpt.pt").read_bytes()
    capsys.readouterr()
    assert run_train("--data", text_file, "--out_dir", finished) == 2
    one_line(capsys, "--resume", "--fresh")
    assert run_train("--data", text_file, "--out_dir", finished, "--resume") == 0
    assert "finished" in capsys.readouterr().out        # what a loop over experiments has done is not done again
    assert run_train("--data", text_file, "--out_dir", finished, "--resume", "--lam", 0.5) == 2
    one_line(capsys, "--lam 0.5", "0.001")
    text_file.write_text("other characters " * 99)
    (finished / "result.json").unlink()
    assert train.main(["--resume", "--out_dir", str(finished)]) == 2
    one_line(capsys, "has changed")
    assert (finished / "ckpt.pt").read_bytes() == before


def test_folder_that_cannot_be_written_is_one_line(text_file, tmp_path, capsys):
    """A file in the way of the output folder."""
    (tmp_path / "out").write_text("")
    assert run_train("--data", text_file, "--out_dir", tmp_path / "out" / "run") == 2
    one_line(capsys, str(tmp_path / "out"))


@pytest.mark.parametrize("damage, words", [
    (lambda b: None, ["cannot be read"]), (lambda b: b[:-100], ["damaged"]), (lambda b: b"", ["damaged"]),
    (lambda b: b[:len(b) // 2] + bytes([b[len(b) // 2] ^ 1]) + b[len(b) // 2 + 1:], ["damaged"]),
])
def test_bad_checkpoint_is_one_line(finished, capsys, damage, words):
    """Missing, truncated, empty, one bit flipped."""
    path, content = finished / "ckpt.pt", damage((finished / "ckpt.pt").read_bytes())
    path.unlink() if content is None else path.write_bytes(content)
    capsys.readouterr()
    assert sample.main(["--ckpt", str(path)]) == 2
    one_line(capsys, *words)


def test_foreign_checkpoint_runs_no_code(tmp_path, capsys):
    """A pickle can run anything when it is loaded: ours is loaded as plain data or not at all."""
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)
    for content in (Bomb(), {"model": {}}, [1, 2]):
        torch.save(content, tmp_path / "ckpt.pt")
        assert sample.main(["--ckpt", str(tmp_path / "ckpt.pt")]) == 2
        one_line(capsys, "not a checkpoint")
    assert not (tmp_path / "exploded").exists()


def test_unknown_prompt_character_is_named(finished, capsys):
    """Not a KeyError: the line names the characters, in any terminal."""
    capsys.readouterr()
    assert sample.main(["--ckpt", str(finished / "ckpt.pt"), "--prompt", "The §"]) == 2
    assert "'\\xa7'" in capsys.readouterr().err


def test_gate_of_the_readme_works_as_printed(text_file, tmp_path):
    """The first thing a hacker tries is the snippet."""
    snippet = (HERE / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    exec(snippet, vars(tsa))
    try:
        flags = ["--gate", "dead_zone", "--lam", 0.01, "--data", text_file, "--max_iters", 3, "--out_dir", tmp_path]
        assert run_train(*flags) == 0
        result = json.loads((tmp_path / "result.json").read_text())
        assert result["gate"] == "dead_zone" and abs(result["val_loss"] - result["val_loss_executed"]) < 1e-5
    finally:
        del GATES["dead_zone"]


def test_bench_writes_its_rows(finished, monkeypatch, capsys):
    """Every run at every keep fraction and on the model's own gates; nothing but the rows' keys is promised."""
    monkeypatch.setattr(sample, "BENCH_SECONDS", 0)
    monkeypatch.setattr(sample, "BATCHES", {"prefill": (1, 3), "decode": (2,)})
    assert sample.main(["--bench", "--ckpt", str(finished / "ckpt.pt")]) == 0
    rows = json.loads((finished / "bench.json").read_text())
    assert len(rows) == 3 * (1 + 2 * 7)
    assert {"mode", "run", "batch", "block_size", "keep", "dtype", "device", "ms", "ms_low", "ms_high", "tokens_per_s",
            "speedup", "allowed"} < rows[0].keys()
    assert all(row["speedup"] == 1 and row["allowed"] == 1 for row in rows if row["run"] == "dense")
    assert "gates differ" in capsys.readouterr().out


def test_depth_shows_as_colour_or_digit(finished, capsys, monkeypatch):
    """In a terminal each character has the colour of its depth; in a pipe, or where NO_COLOR asks, a digit below."""
    flags = ["--ckpt", str(finished / "ckpt.pt"), "--prompt", "The", "--max_new_tokens", "30", "--run", "masked"]
    capsys.readouterr()
    assert sample.main(flags) == 0
    plain, remarks = capsys.readouterr()
    text, digits = plain.splitlines()[::2], plain.splitlines()[1::2]
    assert sum(map(len, text)) - 3 + plain.count("\n") // 2 - 1 == 30 and "tokens/s" in remarks
    for i, (line, depths) in enumerate(zip(text, digits)):
        unread = 3 * (i == 0)
        assert set(depths[unread:]) <= set("123") and depths[:unread].isspace() == (i == 0)
        assert len(depths) - len(line) in (0, 1)           # the newline has a depth too
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert sample.main(flags) == 0
    colored, remarks = capsys.readouterr()
    assert re.sub(r"\033\[[0-9;]*m", "", colored).split("\n")[:-1] == text
    assert "of 3 blocks" in remarks
    monkeypatch.setenv("NO_COLOR", "1")
    assert sample.main(flags) == 0 and capsys.readouterr().out == plain


def test_map_has_a_box_for_each_gate(finished, tmp_path):
    """Characters across, blocks up, a loss each: of validation text, or of a prompt, newline included."""
    flags = ["--ckpt", str(finished / "ckpt.pt"), "--map", str(tmp_path / "map.svg")]
    for prompt, n in (([], 16), (["--prompt", "lazy dog.\n"], 9)):
        assert sample.main(flags + prompt) == 0
        boxes = [e for e in ElementTree.parse(tmp_path / "map.svg").iter() if e.get("opacity")]
        assert len(boxes) == n * (3 + 1)
    assert sample.main(flags + ["--prompt", "T"]) == 2


def test_rank_correlation_by_counting():
    """Spearman's with ties: depth takes six values, so nearly everything is a tie."""
    x, y = torch.tensor([3., 1, 2, 2, 5, 2]), torch.tensor([1., 2, 2, 3, 4, 0])
    place = [[sum((a > b).item() + (a == b).item() / 2 for b in v) for a in v] for v in (x, y)]
    expected = torch.corrcoef(torch.tensor(place))[0, 1].item()
    assert abs(sample.rank_correlation(x, y) - expected) < 1e-6 and abs(sample.rank_correlation(x, -x) + 1) < 1e-9


def test_analysis_covers_every_character(finished, text_file, tmp_path):
    """Deciles and kinds each share out the whole validation split, and gates of other sequences change the loss."""
    assert run_train("--model", "dense", "--data", text_file, "--max_iters", 2, "--out_dir", tmp_path / "plain") == 0
    flags = ["--ckpt", str(finished / "ckpt.pt"), "--analyse", "--plain", str(tmp_path / "plain" / "ckpt.pt")]
    assert sample.main(flags) == 0
    analysis = json.loads((finished / "analysis.json").read_text())
    for group in ("entropy decile", "reads", "predicts"):
        rows = [row for row in analysis["rows"] if row["by"].startswith(group) and row["depth"] == "as trained"]
        assert sum(row["n"] for row in rows) == len(text_file.read_text()) // 10 // 16 * 16
    assert analysis["loss"]["as trained"] != analysis["loss"]["as trained, gates permuted"]


def test_kinds_of_characters():
    """The kinds that depth is reported by."""
    kinds = "capital, inside a word, space, first letter, punctuation, newline, punctuation".split(", ")
    assert sample.kinds_of("An a.\n7") == kinds


def test_plot_without_matplotlib_is_one_line(tmp_path, capsys, monkeypatch):
    """It is no requirement: who wants the picture is told how to get it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert train.main(["--plot", str(tmp_path / "results.csv")]) == 2
    one_line(capsys, "pip install matplotlib")


def test_both_programs_run_as_programs(text_file, tmp_path):
    """As a user starts them, from another folder, with a plain-ASCII terminal: train, then sample the newest run."""
    def run(program, *flags):
        environment = os.environ | {"PYTHONIOENCODING": "ascii:strict", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run([sys.executable, str(HERE / program), *flags], cwd=tmp_path, env=environment,
                              capture_output=True, text=True, timeout=120)
    text_file.write_text("häuser über flüsse\n" * 60, encoding="utf-8")
    done = run("train.py", "--data", str(text_file), "--n_layer", "2", "--n_embd", "16", "--block_size", "16",
               "--max_iters", "2", "--model", "exit")
    assert done.returncode == 0 and "ln(12)" in done.stdout, done.stderr
    done = run("sample.py", "--max_new_tokens", "40", "--num", "2", "--temperature", "0", "--prompt", "h")
    assert done.returncode == 0 and done.stdout.count("h") >= 2, done.stderr
