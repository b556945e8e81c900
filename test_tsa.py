"""What the code promises. Run with `python -m pytest -q`; no network or GPU is needed."""
import hashlib
import json
import math
import os
import re
import sys
import threading
import zipfile
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import data
import sample
import train
import tsa
from tsa import GATES, MODELS, TSA, Config, Router, generate, load_checkpoint, saving, token_loss

HERE = Path(__file__).resolve().parent
TEXT = "The quick brown fox jumps over the lazy dog.\n" * 302
SMALL = "--device cpu --dtype float32 --data t.txt --n_layer 3 --n_embd 16 --block_size 16 --batch_size 8"
DESIGNS = {
    "plain": dict(model="plain"), "soft": dict(gate="soft"), "skip": dict(gate="skip", gate_bias=1.0),
    "stretch": dict(gate="stretch"), "straight": dict(gate="straight"),
    "halt": dict(gate="skip", halt=True, gate_bias=-3.0), "exit": dict(model="exit", confidence=0.4)}
torch.set_num_threads(1)        # faster for models this small

@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, which holds a text and takes the place of the standard library."""
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text(TEXT)
    monkeypatch.setattr(data, "FOLDER", tmp_path / "data")
    monkeypatch.setattr(data, "sysconfig", Mock(get_paths=lambda: {"stdlib": tmp_path}))
    monkeypatch.setenv("NO_COLOR", "")

def tokens(B=3, T=16, seed=1):
    return torch.randint(11, (B, T), generator=torch.Generator().manual_seed(seed))

def read(vocab, tokens):
    return "".join(vocab[i] for i in tokens)

def tiny(model="tsa", **settings):
    """A small model with weights far from their initial values, so that gates and exits differ from token to token."""
    torch.manual_seed(0)
    defaults = dict(vocab_size=11, block_size=16, n_layer=4, n_head=2, n_embd=16, dropout=0.0)
    model = MODELS[model](Config(model=model, **defaults | settings)).eval().double()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.3
    return model

def run_by_hand(block, x, gate):
    """Equations (1) and (2), with causal attention head by head: x (3, 16, 16), gate (3, 16) -> x."""
    h, future, gate = block.ln1(x), torch.ones(16, 16).triu(1).bool(), gate[..., None]
    q, (k, v) = h @ block.attn.query.weight.T, (h @ block.attn.key_value.weight.T).split(16, dim=-1)
    heads = [(q[..., hs] @ k[..., hs].mT / 8 ** 0.5).masked_fill(future, -torch.inf).softmax(-1) @ v[..., hs]
             for hs in (slice(0, 8), slice(8, 16))]
    x = x + gate * (torch.cat(heads, -1) @ block.attn.proj.weight.T)
    hidden = block.ln2(x) @ block.ffn.fc.weight.T + block.ffn.fc.bias
    hidden = hidden * (1 + torch.erf(hidden / 2 ** 0.5)) / 2        # exact GELU, as in the paper
    return x + gate * (hidden @ block.ffn.proj.weight.T + block.ffn.proj.bias)

def assert_same_gradients(model, ours, by_hand):
    assert_close(ours, by_hand)
    assert_close(*(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
                   for loss in (ours, by_hand)), rtol=1e-3, atol=1e-6)

def test_sizes_initial_weights_settings_and_savings_are_the_papers():
    """A missing bias, an untied head or another unit of computation would be a different experiment."""
    settings = dict(n_layer=6, n_head=8, n_embd=256, block_size=128, dropout=0.1, batch_size=64, max_iters=5000,
                    learning_rate=3e-4, warmup_iters=0, gate_bias=-1.0, lam=0.001, confidence=0.9)      # section 2
    assert settings.items() <= vars(train.parse_flags(["--preset=paper"])[0]).items()
    assert all(train.PRESETS[task]["data"] == task for task in ("chain", "copy", "sort"))
    sizes = {name: settings[name] for name in ("n_layer", "n_head", "n_embd", "block_size", "dropout")}
    for name, n_params in (("plain", 4_782_336), ("tsa", 4_864_901), ("exit", 4_784_896)):
        model = MODELS[name](Config(model=name, **sizes)).to("meta")        # a device that computes nothing
        assert sum(p.numel() for p in model.parameters()) == n_params
        assert model(torch.ones(2, 9, dtype=torch.long, device="meta"))[1].is_meta
    model = TSA(Config(**sizes))
    block, router = model.blocks[3], model.routers[4]
    for layer, std in ((model.wte, 0.02), (model.wpe, 0.02), (block.attn.proj, 0.02 / 12 ** 0.5),
                       (block.ffn.proj, 0.02 / 12 ** 0.5), (block.attn.query, 1 / 3 ** 0.5 / 16)):      # torch's own
        assert layer.weight.std().item() == pytest.approx(std, rel=0.03)
    assert router.out.bias.item() == -1 and router.fc.out_features == 64
    assert abs(savings(Config(), [1] + [0.341] * 5)[0] - 0.549) < 0.0006        # section 3

@pytest.mark.parametrize("settings", [*DESIGNS.values(), *(dict(gate=gate) for gate in GATES)])
@pytest.mark.parametrize("sparse", [False, True])
def test_no_token_sees_the_future(settings, sparse):
    """A gate (your own, too) or an exit that looked ahead would score well and generate rubbish."""
    model, idx, changed = tiny(**settings), tokens(), tokens()
    changed[:, 9:] = (changed[:, 9:] + 1) % 11
    (logits, gates), (others, other_gates) = model(idx, sparse), model(changed, sparse)
    assert_close((logits[:, :9], gates[..., :9]), (others[:, :9], other_gates[..., :9]))
    assert not torch.allclose(logits[:, 9:], others[:, 9:])

@pytest.mark.parametrize("settings", [*(settings for settings in DESIGNS.values() if "gate" in settings),
                                      dict(gate="stretch", gate_bias=50.0)])        # closed for everyone
@pytest.mark.parametrize("sparse", [False, True])
def test_pass_equals_one_written_out(settings, sparse):
    """Equations (1) to (4) and their gradients. A sparse pass gives the same result as scaling every token."""
    model, idx, targets = tiny(**settings), tokens(), tokens(seed=2)
    targets[0, :10] = -1        # not scored
    states = []         # x after each block
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, x: states.append(x))
    model.forward = lambda idx, forward=model.forward: forward(idx, sparse)
    task, used = model.loss(idx, targets)
    x, gates = model.wte(idx) + model.wpe.weight, [torch.ones(3, 16)]
    for l, block in enumerate(model.blocks):
        if l > 0:
            router = model.routers[l - 1]
            hidden = torch.relu(x @ router.fc.weight.T + router.fc.bias)
            p = torch.sigmoid((hidden @ router.out.weight.T + router.out.bias)[..., 0].float())
            gate = GATES[settings["gate"]][sparse](1 - p)
            gates.append(gate * gates[-1] if "halt" in settings else gate)      # once it is 0, it remains 0
        x = run_by_hand(block, x, gates[l])
        assert_close(states[l], x, rtol=1e-12, atol=1e-12)
    assert_close(used, torch.stack(gates))
    expected = F.cross_entropy((model.ln_f(x) @ model.wte.weight.T).float().mT, targets, ignore_index=-1)
    assert_same_gradients(model, task + 0.3 * used[1:].mean(), expected + 0.3 * torch.stack(gates[1:]).mean())

def test_early_exit_equals_one_written_out():
    """The loss is the mean of L cross-entropies. A token that exits keeps its x, to which others attend."""
    model, idx, targets, losses = tiny(**DESIGNS["exit"]), tokens(), tokens(seed=2), []
    targets[0, :10] = -1
    logits, gates = model(idx, sparse=True)
    x = kept = model.wte(idx) + model.wpe.weight
    one = running = torch.ones(3, 16)
    for l, (block, norm) in enumerate(zip(model.blocks, [*model.exit_norms, model.ln_f])):
        x, kept = run_by_hand(block, x, one), run_by_hand(block, kept, running)
        full, prediction = ((norm(state) @ model.wte.weight.T).float() for state in (x, kept))
        losses.append(F.cross_entropy(full.mT, targets, ignore_index=-1))
        leaves = running * ((prediction.softmax(-1).amax(-1) > 0.4) & (l > 0) | (l == 3))   # not after block 0
        assert torch.equal(gates[l], running)
        assert_close(logits[leaves == 1], prediction[leaves == 1])
        running = running - leaves
    assert_close(model(idx), (full, model.loss(idx, targets)[1]))
    assert_same_gradients(model, model.loss(idx, targets)[0], sum(losses) / 4)
    model.config.confidence, model.wte.weight.data = 1.0, model.wte.weight.data * 1e4     # probabilities of exactly 1
    assert model(idx, sparse=True)[1].all()

def test_gate_designs_follow_their_definitions():
    """A token at a design's threshold still runs. Without the slope, the routers would not learn."""
    scale = torch.tensor([.9, .5, .15, .1, .05], requires_grad=True)
    switch, stretched, slope = [1., 1., 0., 0., 0.], [1., .5, .01, 0., 0.], [1., 1., 1., 1., 1.]
    for gate, *expected in (
            ("soft", scale, switch, slope), ("skip", scale, [.9, .5, .15, .1, 0.], slope),
            ("straight", switch, switch, slope), ("stretch", stretched, stretched, [0., 1.4, 1.4, 0., 0.])):
        training, inference = (make_gate(scale) for make_gate in GATES[gate])
        for ours, values in zip((training, inference, *torch.autograd.grad(training.sum(), scale)), expected):
            assert_close(ours, torch.as_tensor(values))

def test_dropout_sits_at_the_papers_four_places(monkeypatch):
    """On the embeddings and attention weights, after GELU and after the feed-forward output; never in evaluation."""
    places = []
    monkeypatch.setattr(F, "dropout", lambda x, p, training: places.append((x.size(-1), p * training)) or x)
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda q, *_, dropout_p, **__: places.append(("attention", dropout_p)) or q)
    for training in (True, False):
        tiny(**DESIGNS["skip"], n_layer=2, dropout=0.1).train(training)(tokens(), sparse=True)
    assert places == [place for p in (0.1, 0.0) for place in ((16, p), *[("attention", p), (64, p), (16, p)] * 2)]

@pytest.mark.parametrize("dtype, precision", [(torch.bfloat16, "float32"), (torch.float32, "bfloat16")])
def test_bfloat16_closes_no_gate_and_changes_no_closed_token(dtype, precision):
    """A p of 0.998 would round to 1. A token that skips keeps its x to the bit, and the others nearly match."""
    router, block = Router(Config(gate_bias=6.0, n_embd=256)).to(dtype), tiny().blocks[1].to(dtype)
    x, gate = torch.randn(3, 16, 16, dtype=dtype), torch.randn(3, 16).relu()
    with train.precision("cpu", precision):
        assert torch.backends.cuda.flash_sdp_enabled() == (precision == "float32")      # the unfused kernel is faster
        assert torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
        p, y, full = router(torch.randn(1, 64, 256, dtype=dtype)), block(x, gate, sparse=True), block(x, gate)
        assert block.ffn.fc(x).dtype == torch.bfloat16
    assert p.dtype == torch.float32 and (1 - p).min() > 0 and len(p.unique()) > 8
    assert torch.equal(y[gate == 0], x[gate == 0])
    assert_close(y, full, rtol=0.05, atol=0.05)

@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("T", [16, 7])
def test_counted_multiply_adds_are_what_ran(design, T):
    """PyTorch counts the same, except that savings() assumes a causal kernel: half the square of queries and keys."""
    model = tiny(**DESIGNS[design])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        gates = model(tokens(T=T), sparse=True)[1]
    counts, ran = counter.get_flop_counts()["Global"], (gates != 0).double().mean((1, 2)).tolist()
    counts[torch.ops.aten.bmm] /= 2
    plain = 4 * (12 * 16 * 16 + T / 2 * 2 * 16) + 16 * 11       # by hand, per token; two flops per multiply-add
    assert savings(model.config, ran, T % 16 or None)[1] == pytest.approx(1 - sum(counts.values()) / 2 / 3 / T / plain)

@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("shape, sparse, temperature, top_k, total", [
    ((2, 3), False, 1.5, 3, 3 + 13 + 8 + 7), ((2, 3), True, 0.5, None, 31), ((1, 20), True, 0, 99, 8 + 8 + 8 + 8 + 11)])
def test_generation_equals_a_slow_loop_without_a_cache(design, shape, sparse, temperature, top_k, total):
    """A step computes one token, except when the text outgrows the context and restarts from its last 8 tokens."""
    model, window, computed = tiny(**DESIGNS[design]), tokens(*shape), []
    model.embed = lambda idx, embed=model.embed: computed.append(idx.size(1)) or embed(idx)
    torch.manual_seed(3)
    steps = list(generate(model, window, 22, temperature, top_k, sparse))
    assert sum(computed) == total and len(steps) == 22 and not any(gates.requires_grad for _, gates in steps)
    torch.manual_seed(3)
    for idx_next, gates in steps:
        window = window[:, -8:] if window.size(1) > 16 else window
        logits, all_gates = model(window, sparse)
        p, order = (logits[:, -1] / (temperature or 1)).softmax(-1), logits[:, -1].argsort(-1, descending=True)
        p = p.scatter(1, order[:, top_k:], 0) if top_k else p
        assert torch.equal(idx_next, torch.multinomial(p, 1) if temperature else order[:, :1])
        assert_close(gates, all_gates[:, :, -1])
        window = torch.cat([window, idx_next], 1)
    assert len(list(generate(tiny("plain", block_size=1), tokens(1, 1), 3))) == 3
    with pytest.raises(IndexError):
        next(generate(model, torch.tensor([[99]]), 1))      # no such token
    assert all(block.attn.cache is None for block in model.blocks)      # none left, also after an error

@pytest.mark.parametrize("name, a, b", [("u.txt", 80, 90), ("enwik8", 90, 95), ("stdlib", 80, 90)])
def test_text_is_split_at_characters_and_cut_into_windows(name, a, b, monkeypatch):
    """A split at bytes would cut a character in two, and windows that overlap would count twice in a score."""
    text, glob = "".join(map(chr, range(100, 200))), Path.glob          # token i stands at place i
    for file, content in (("u.txt", text), ("b.py", text[40:]), ("a.py", text[:40])):
        Path(file).write_text(content, encoding="utf-8")
    os.mkdir("data")
    Path("data/c.py").write_text("not a top-level module")
    with zipfile.ZipFile("data/enwik8.zip", "w") as archive:
        archive.writestr("enwik8", text)
    monkeypatch.setattr(Path, "glob", lambda *args: sorted(glob(*args), reverse=True))      # another file system
    corpus = data.load(name)
    assert corpus.vocab == text and corpus.prompt == text[a:a + 32]
    for split, start, end in (("train", 0, a), ("val", a, b), ("test", b, 100)):
        idx, targets = corpus.splits[split]
        assert idx.tolist() == list(range(start, end - 1)) and torch.equal(targets, idx + 1)
    idx, targets = corpus.batch(3000, 16)
    assert torch.equal(idx, idx[:, :1] + torch.arange(16)) and torch.equal(targets, idx + 1)
    assert set(idx[:, 0].tolist()) == set(range(a - 16))        # every place but the last 16 is a start
    idx, targets = corpus.windows("val", 2)
    assert idx.tolist() == [[i, i + 1] for i in range(a, b - 2, 2)] and torch.equal(targets, idx + 1)
    assert len(corpus.windows("val", b - a - 1)[0]) == 1

@pytest.mark.parametrize("task", ["copy", "sort"])
def test_the_papers_tasks_are_what_they_say(task):
    """The format is `^source|target$`; only target and end mark are scored. No validation sequence is trained on."""
    corpus = data.load(task)
    (idx, targets), (trained, _) = corpus.windows("val", 64), corpus.windows("train", 64)
    assert idx.shape == (1000, 42) and trained.shape == (10_000, 42)
    assert idx.unique().tolist() == [1, 2, *range(4, len(corpus.vocab))] == [1, 2, *range(4, 32)]
    for row, target in zip(idx[:50], targets):
        source, answer = read(corpus.vocab, row)[1:].split("|")
        assert answer == (source if task == "copy" else "".join(sorted(source, key=corpus.vocab.index)))
        assert target[:21].eq(-1).all() and read(corpus.vocab, target[21:]) == answer + "$"
    batch, known = set(map(tuple, corpus.batch(64, 64)[0].tolist())), set(map(tuple, trained.tolist()))
    assert len(batch) > 60 and batch < known and known.isdisjoint(map(tuple, idx.tolist()))
    assert corpus.prompt == data.load(task).prompt == read(corpus.vocab, idx[0, :22])       # the same in every run

def test_target_of_a_chain_is_the_digit_that_the_letters_lead_to():
    """With wrong targets a model could only guess."""
    corpus = data.load("chain")
    idx, targets = corpus.windows("val", 30)
    assert idx.shape == (1000, 30) and len(corpus.splits["train"][0]) == 100_000 * 30
    assert corpus.prompt == "7418534bfadclhi0gjnm4o30uwtx56"        # and the answers, followed by hand:
    assert data.chain_answers(corpus.prompt) == "741853443781143047414330431056"
    for row, target in zip(idx[:50], targets):
        text = read(corpus.vocab, row)
        assert read(corpus.vocab, target) == data.chain_answers(text)

def test_download_is_verified_and_kept(monkeypatch, tmp_path, capsys):
    """An interrupted one leaves nothing, and training takes the standard library. A good one is not repeated."""
    monkeypatch.setenv("no_proxy", "*")
    Path("a.py").write_text("import this\n" * 99)
    with HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:      # it serves this test's folder
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        url, sha256 = f"http://127.0.0.1:{server.server_port}/t.txt", hashlib.sha256(TEXT.encode()).hexdigest()
        monkeypatch.setitem(data.FILES, "shakespeare", ("text.txt", url, sha256))
        Path("t.txt").write_text(TEXT[:-1])
        assert fit("--data auto --max_iters 1")["vocab"] == "\n himoprst" and not os.path.exists("data")
        assert re.search(f"different file.* {tmp_path}/data/text.txt.*\n.* data=stdlib", capsys.readouterr().out)
        os.mkdir("data")
        Path("t.txt").write_text(TEXT)
        assert data.shakespeare_or_stdlib() == "shakespeare"
        server.shutdown()
    assert data.load("shakespeare").vocab == "".join(sorted(set(TEXT))) and os.listdir("data") == ["text.txt"]

def fit(flags):
    """Train a small model and return its checkpoint; of repeated flags, the last one counts."""
    train.main(f"{SMALL} --out_dir run {flags}".split())
    return load_checkpoint("run/ckpt.pt")[1]

def test_run_equals_a_loop_written_out(monkeypatch):
    """Ten steps match a loop with every setting spelled out: seeds, warm-up, cosine, decay, clip, depth penalty."""
    for owner, name in ((train, "precision"), (torch, "compile")):
        monkeypatch.setattr(owner, name, Mock(side_effect=train.precision if owner is train else lambda loss: loss))
    saved = fit("--max_iters 10 --learning_rate 0.02 --warmup_iters 4 --lam 0.3 --lam_ramp 0.5 --seed 5 --dropout 0.1 "
                "--eval_interval 3 --compile")
    corpus, clipped = data.load("t.txt"), 0
    assert train.precision.call_args.args == ("cpu", "float32") and saved["prompt"] == corpus.prompt[:16]
    seeds = [int(np.random.SeedSequence((5, step)).generate_state(1)[0]) for step in range(11)]
    torch.manual_seed(seeds[0])
    model = TSA(Config(vocab_size=len(corpus.vocab), block_size=16, n_layer=3, n_head=4, n_embd=16, dropout=0.1))
    groups = [{"params": [parameter], "weight_decay": 0.0 if re.search("bias|ln|wte|wpe", name) else 0.1}
              for name, parameter in model.named_parameters()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step in range(1, 11):
        torch.manual_seed(seeds[step])
        task, gates = model.loss(*corpus.batch(8, 16))
        optimizer.zero_grad()
        (task + 0.3 * min(step / 5, 1) * gates[1:].mean()).backward()
        clipped += torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item() > 1
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * min(step / 4, 1) * (0.55 + 0.45 * math.cos(math.pi * (step - 1) / 9))
        optimizer.step()
    assert clipped > 2 and sum(group["weight_decay"] > 0 for group in groups) == 3 * 5 + 2 * 2 and torch.compile.called
    assert_close(saved["model"], model.state_dict(), rtol=1e-3, atol=2e-4)

@pytest.mark.parametrize("run", ["--model plain --n_layer 1", "--model exit", "--gate stretch", "--halt --data copy"])
def test_result_is_the_score_of_the_checkpoint(run, capsys):
    """It covers the whole validation split, full and sparse. A finished run, scored with another gate, keeps it."""
    saved = fit("--block_size 50 --max_iters 15 --learning_rate .5 --dropout .1 --gate_bias 1.4 --confidence .2 " + run)
    model, before = load_checkpoint("run/ckpt.pt")[0], Path("run/result.json").read_text()
    result, (idx, targets) = json.loads(before), data.load(saved["flags"]["data"]).windows("val", 50)
    for sparse, name in ((False, "val_loss"), (True, "val_loss_sparse")):
        logits, gates = model(idx, sparse)
        assert result[name] == pytest.approx(F.cross_entropy(logits.mT, targets, ignore_index=-1).item(), abs=1e-5)
    ran = (gates != 0).double().mean((1, 2)).tolist()
    assert (result["tlops_saved"], result["macs_saved"]) == pytest.approx(savings(model.config, ran, idx.size(1)))
    assert result["ran"] == pytest.approx(ran) and (min(ran) == 1) == ("plain" in run)
    assert model.config.halt == ("halt" in run) and ("(64 windows" in capsys.readouterr().out) == ("copy" in run)
    model.config.gate = "skip"
    train.main("--resume run --device cpu --gate skip".split())
    assert f"{train.evaluate(model, idx, targets, True)[0]:.4f} sparse" in capsys.readouterr().out.splitlines()[-2]
    assert Path("run/result.json").read_text() == before
    sample.main("run/ckpt.pt --device cpu --max_new_tokens 300 --temperature 9".split())
    assert len(capsys.readouterr().out) < 300 or "copy" not in run         # it ends at the end mark

def test_interrupted_run_resumes_to_the_bit(monkeypatch):
    """After a stop, even in the middle of saving, --resume gives the weights and the result of a whole run."""
    flags = "--max_iters 6 --eval_interval 2 --dropout .1 --seed 5 --gate stretch --lam .1 --preset copy --device cpu:0"
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(torch, "save", lambda run, path, save=torch.save: (
            save(run, path) if run["step"] < 4 else path.write_bytes(b"PK") / 0))       # stops after two bytes
        fit(flags)
    assert load_checkpoint("run/ckpt.pt")[1]["step"] == 2
    assert train.parse_flags(["--resume=run"])[0].device != "cpu:0"         # it may be resumed on another
    train.main("--resume run --device cpu:0".split())
    os.remove("run/result.json")
    train.main("--resume run --device cpu:0".split())       # only scores
    os.rename("run", "resumed")
    whole, resumed = fit(flags), load_checkpoint("resumed/ckpt.pt")[1]
    assert_close(*([run["model"], run["optimizer"]] for run in (resumed, whole)), rtol=0, atol=0)
    assert Path("resumed/result.json").read_text() == Path("run/result.json").read_text()
    Path("t.txt").write_text(TEXT[::-1])
    with pytest.raises(SystemExit, match="text has changed"):
        train.main("--resume run --device cpu".split())

def test_runs_are_numbered_and_sample_shows_the_newest(capsys):
    """No run overwrites another."""
    for model in ("tsa", "tsa", "exit"):
        train.main(f"{SMALL} --max_iters 1 --model {model}".split())
    assert sorted(os.listdir("out")) == ["exit-1", "tsa-1", "tsa-2"]
    for time, newest, flags, how in (
            (2e9, "tsa-1", "", "full"), (3e9, "tsa-2", "--sparse", "sparse"), (4e9, "tsa-1", "--gate skip", "sparse"),
            (5e9, "exit-1", "", "sparse"), (6e9, "exit-1", "--no-sparse", "full")):     # rounding breaks soft gates
        os.utime(f"out/{newest}/ckpt.pt", (time, time))
        sample.main(f"--max_new_tokens 2 --device cpu --prompt {'jumps' * 4} {flags}".split())
        assert capsys.readouterr().err.startswith(f"out/{newest}/ckpt.pt, {how}: ")

@pytest.mark.parametrize("program, flags, words", [
    (train, "--n_head 3", "128 is not divisible by --n_head 3"), (train, "--n_layer 1", "needs --n_layer 2"),
    (train, "--max_iters 0", "0 is not positive"), (train, "--gate sigmoid", "invalid choice"),
    (train, "--out_dir .", "--resume ."), (train, "--resume run --n_head 2", "--n_head cannot change"),
    (train, "--resume missing", "No such"), (train, "--device gpu", "gpu"), (train, "--data one.txt", "repeats one"),
    (train, "--data short.txt", "13 characters: --block_size"), (train, "--data missing.txt", "No such"),
    (train, "--data copy --block_size 41", "at least 42"), (sample, "missing.pt", "No such"),
    (sample, "--prompt=", "one char"), (sample, "--prompt §", r"'\\xa7'"),
     (sample, f"{HERE}/report/chain-tsa.pt --prompt 7bc", "'b' at place 2"),
    (sample, "gate.pt", "no model tsa with gate half"), (sample, "old.pt", "old.pt does not fit"),
    *((sample, name, f"{name} is damaged or") for name in ("empty.pt", "cut.pt", "foreign.pt", "bomb.pt"))])
def test_mistake_ends_in_one_line(program, flags, words, capsys):
    """No traceback, nothing overwritten or left behind, and a malicious checkpoint (it is a pickle) runs no code."""
    bomb = type("Bomb", (), {"__reduce__": lambda self: (os.mkdir, ("exploded",))})()
    files = {"one.txt": b"a" * 99, "short.txt": b"ab" * 70, "empty.pt": b"", "foreign.pt": {"config": {"depth": 3}},
             "cut.pt": sample.SHIPPED.read_bytes()[:-100], "bomb.pt": bomb, "old.pt": {"config": {}, "model": {}},
             "gate.pt": {"config": {"gate": "half"}, "model": {}}}
    for name, content in files.items():
        Path(name).write_bytes(content) if isinstance(content, bytes) else torch.save(content, name)
    if "run" in flags:
        fit("--max_iters 1")
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        program.main(["--device=cpu", *flags.split()])
    message = capsys.readouterr().err.splitlines()[-1] if stop.value.code == 2 else stop.value.code     # 2: argparse
    assert re.fullmatch(f"(.*: )?error: [^\n]*{words}[^\n]*", message)
    assert sorted(Path().rglob("*")) == before

def test_training_that_cannot_succeed_stops(monkeypatch):
    """Weights of nan must not overwrite good ones; with a switch in training, the routers would never learn."""
    powers = iter([1, 1, 1, 0.5])       # the last gives a finite loss with a gradient of nan
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="not finite"):
        patch.setattr(tsa, "token_loss", lambda *args: token_loss(*args) + (0 * token_loss(*args)) ** next(powers))
        fit("--max_iters 8 --eval_interval 2")
    assert load_checkpoint("run/ckpt.pt")[1]["step"] == 2
    monkeypatch.setitem(GATES, "skip", (tsa.binary, tsa.binary))
    with pytest.raises(AssertionError, match="--gate skip passes no gradient"):
        fit("--max_iters 1 --gate skip --out_dir other")

@pytest.mark.parametrize("design, sparse", [("soft", False), ("skip", True), ("exit", True)])
def test_map_shows_the_prediction_after_each_block(design, sparse, capsys, monkeypatch):
    """A cell is what a model that stops after that block would predict, and blank if the token skipped it."""
    model, idx, vocab, shown = tiny(**DESIGNS[design]), tokens(1, 9), "\n !abcdefgh", "⏎␣!abcdefgh"
    (logits, gates), x = model(idx, sparse), model.embed(idx)
    right = read(vocab, logits[0, :-1].argmax(-1))          # the answers are right, except for the last
    rows = [("token   ", [f" {c}" for c in read(shown, idx[0])]), ("answer  ", [f" {c}" for c in right] + ["!?"])]
    for l, block in enumerate(model.blocks):
        x, norm = block(x, gates[l]), model.exit_norms[l] if design == "exit" and l < 3 else model.ln_f
        best = read(shown, (norm(x) @ model.wte.weight.T)[0].argmax(-1))
        rows.insert(0, (f"block {l} ", [
            f"\033[30;48;5;{(195, 159, 117, 75, 33)[round(gate * 4)]}m {c}\033[0m" if gate else "  "
            for c, gate in zip(best, gates[l, 0].tolist())]))
    expected = "".join("".join((name + "".join(cells[part])).rstrip() + "\n" for name, cells in rows) + "\n"
                       for part in (slice(0, 6), slice(6, 9)))          # 20 columns hold 6 cells
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    sample.write_map(model, vocab, idx, sparse, right + "?")
    assert capsys.readouterr().out == expected and not model.blocks[0]._forward_hooks

@pytest.mark.parametrize("sparse", [True, False])
def test_color_of_a_character_is_its_depth(sparse, capsys, monkeypatch):
    """The share of the blocks that ran or, in a full pass, the mean gate. The seed decides the text."""
    model, saved = load_checkpoint(sample.SHIPPED)          # what sample.py shows if there is no run
    torch.manual_seed(1)
    steps = list(generate(model, data.encode(saved["prompt"], saved["vocab"])[None], 40, 2.0, 3, sparse))
    gates, expected = torch.cat([gates for _, gates in steps], 1), saved["prompt"]                         # (L, 40)
    ran = (gates != 0).double() if sparse else gates
    for (idx_next, _), depth in zip(steps, ran.mean(0).tolist()):
        c, color = saved["vocab"][idx_next], (195, 159, 117, 75, 33)[round(depth * 4)]
        expected += c if c == "\n" else f"\033[30;48;5;{color}m{c}\033[0m"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    flag, how = ("--sparse", f"ran {sum(ran.mean(1).tolist()):.2f} of 12") if sparse else ("--no-sparse", "full")
    sample.main(f"--max_new_tokens=40 --temperature=2 --top_k=3 --seed=1 --device=cpu {flag}".split())
    assert (got := capsys.readouterr()).out == expected + "\n" and how in got.err
    assert sample.paint("a", 1.4) == sample.paint("a", 1.0) != "a"          # a gate of your own may exceed 1
    monkeypatch.setenv("NO_COLOR", "1")
    assert sample.paint("a", 1.0) == "a"

def test_code_in_the_readme_is_that_of_tsa_or_works(monkeypatch):
    """A tutorial that quotes a different program from the one it comes with is worse than none."""
    readme, code = ((HERE / name).read_text(encoding="utf-8") for name in ("README.md", "tsa.py"))
    for excerpt in re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL):
        if name := re.search(r'GATES\["(\w+)"\] =', excerpt):        # a reader's own gate
            monkeypatch.setitem(GATES, name[1], None)
            exec(excerpt, vars(tsa).copy())
            fit(f"--max_iters 1 --gate {name[1]}")
        else:
            assert " ".join(excerpt.split()) in " ".join(code.split())
