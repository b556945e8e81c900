"""What the code promises. Run with `python -m pytest -q`; no network or GPU is needed."""
import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import data
import sample
import train
from tsa import GATES, MODELS, TSA, Config, Router, generate, load_checkpoint, saving, token_loss

HERE = Path(__file__).resolve().parent
TEXT = "The quick brown fox jumps over the lazy dog.\n" * 302
SMALL = "--device cpu --dtype float32 --data t.txt --n_layer 3 --n_embd 16 --block_size 16 --batch_size 8"
EXCERPTS = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
DESIGNS = {gate: dict(gate=gate) for gate in GATES} | {         # your own gates, too
    "skip": dict(gate="skip", gate_bias=1.0), "halt": dict(gate="skip", halt=True, gate_bias=-3.0),
    "exit": dict(model="exit", confidence=0.4), "plain": dict(model="plain")}
torch.set_num_threads(1)        # faster for models this small

@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, which holds a text and takes the place of the standard library."""
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text(TEXT)
    monkeypatch.setattr(data, "FOLDER", tmp_path / "data")
    monkeypatch.setattr(data, "sysconfig", Mock(get_paths=lambda: {"stdlib": tmp_path}))
    monkeypatch.setenv("NO_COLOR", "")

def fit(flags):
    """Train a small model and return its checkpoint; of repeated flags, the last one counts."""
    train.main(f"{SMALL} --out_dir run {flags}".split())
    return load_checkpoint("run/ckpt.pt")[1]

def tiny(model="tsa", **settings):
    """A small model with weights far from their initial values, so that gates and exits differ from token to token."""
    torch.manual_seed(0)
    defaults = dict(vocab_size=11, block_size=16, n_layer=4, n_head=2, n_embd=16, dropout=0.0)
    model = MODELS[model](Config(model=model, **defaults | settings)).eval().double()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.3
    return model

def tokens(B=3, T=16, seed=1):
    return torch.randint(11, (B, T), generator=torch.Generator().manual_seed(seed))

def read(vocab, tokens):
    return "".join(vocab[i] for i in tokens)

def block_by_hand(block, x, gate):
    """Equations (1) and (2), with causal attention head by head: x (B, T, 16), gate (B, T) -> x."""
    h, future, gate = block.ln1(x), torch.ones(x.size(1), x.size(1)).triu(1).bool(), gate[..., None]
    q, (k, v) = h @ block.attn.query.weight.T, (h @ block.attn.key_value.weight.T).split(16, dim=-1)
    heads = [(q[..., hs] @ k[..., hs].mT / 8 ** 0.5).masked_fill(future, -torch.inf).softmax(-1) @ v[..., hs]
             for hs in (slice(0, 8), slice(8, 16))]
    x = x + gate * (torch.cat(heads, -1) @ block.attn.proj.weight.T)
    return x + gate * block.ffn.proj(F.gelu(block.ffn.fc(block.ln2(x))))            # exact GELU, as in the paper

def pass_by_hand(model, idx, sparse):
    """A pass of tiny() that scales every token -> lists of each block's gates and of the logits after it, and x."""
    config, x, gate = model.config, model.wte(idx) + model.wpe.weight[:idx.size(1)], torch.ones(idx.shape)
    gates, logits = [], []
    for l, block in enumerate(model.blocks):
        if l > 0 and config.model == "tsa":
            p = torch.sigmoid(model.routers[l - 1].out(torch.relu(model.routers[l - 1].fc(x)))[..., 0].float())
            gate = GATES[config.gate][sparse](1 - p) * (gate if config.halt else 1)     # halt: once 0, it remains 0
        if l > 1 and config.model == "exit" and sparse:         # no token exits after block 0
            gate = gate * (logits[-1].softmax(-1).amax(-1) <= config.confidence)
        x = block_by_hand(block, x, gate)
        norm = model.exit_norms[l] if config.model == "exit" and l < 3 else model.ln_f
        prediction = (norm(x) @ model.wte.weight.T).float()
        if l > 1 and config.model == "exit":        # a token that has exited keeps its prediction
            prediction = prediction.where(gate[..., None] == 1, logits[-1])
        gates, logits = gates + [gate], logits + [prediction]
    return gates, logits, x

def test_sizes_initial_weights_and_settings_are_the_papers(capsys):
    """A missing bias, an untied head or another learning rate would be a different experiment."""
    settings = dict(n_layer=6, n_head=8, n_embd=256, block_size=128, dropout=0.1, batch_size=64, max_iters=5000,
                    learning_rate=3e-4, warmup_iters=0, gate_bias=-1.0, lam=0.001, confidence=0.9, eval_interval=250)
    assert settings.items() <= vars(train.parse_flags(["--preset=paper"])[0]).items() and train.schedule(1, 0, 9) == 1
    for name, n_parameters in (("plain", 4_782_336), ("tsa", 4_864_901), ("exit", 4_784_896)):
        model = MODELS[name](Config(n_layer=6, n_head=8, n_embd=256, block_size=128))
        assert sum(parameter.numel() for parameter in model.parameters()) == n_parameters
    model = TSA(Config(n_layer=24, n_embd=256, gate_bias=3.0))
    block, of_torch, scaled = model.blocks[3], 1 / (3 * 256) ** 0.5, 0.02 / (2 * 24) ** 0.5
    for layer, std in ((model.wte, 0.02), (model.wpe, 0.02), (block.attn.proj, scaled), (block.ffn.proj, scaled),
                       (block.attn.query, of_torch), (block.attn.key_value, of_torch), (block.ffn.fc, of_torch)):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.03)
    assert model.routers[4].out.bias.item() == 3 and Router(Config(n_embd=32)).fc.out_features == 16    # the minimum
    assert train.parse_flags([])[0].learning_rate == 1.5e-3 and train.PRESETS["chain"]["lam_ramp"] == 0.5
    assert all(train.PRESETS[name].items() >= {("data", name), ("max_iters", 390)} for name in ("copy", "sort"))
    assert data.FILES["shakespeare"][2] == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    assert data.FILES["enwik8"][2] == "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"
    pytest.raises(SystemExit, train.main, ["--preset=paper", "--help"])
    assert re.search(r"--max_iters[^(]*\(default:\s+5000\)", capsys.readouterr().out)
    for name, flags in (("chain", "--preset=chain --gate=straight --halt --lam=0.03"),
                        ("python-skip", "--preset=deep --gate=skip")):          # models that README.md shows
        flags = vars(train.parse_flags([*flags.split(), "--device=cpu", "--dtype=bfloat16"])[0])
        assert load_checkpoint(HERE / f"report/{name}.pt")[1]["flags"].items() <= flags.items()

@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("sparse", [False, True])
def test_no_token_sees_the_future(design, sparse):
    """A gate (your own, too) or an exit that looked ahead would score well and generate rubbish."""
    model, idx, changed = tiny(**DESIGNS.get(design, dict(gate=design))), tokens(), tokens()
    changed[:, 9:] = (changed[:, 9:] + 1) % 11
    torch.manual_seed(0)
    logits, gates = model(idx, sparse)
    torch.manual_seed(0)        # a design that draws noise draws the same again
    logits2, gates2 = model(changed, sparse)
    assert_close((logits[:, :9], gates[..., :9]), (logits2[:, :9], gates2[..., :9]), msg=f"{design} sees the future")

def test_noise_does_not_see_the_future_but_a_median_does(monkeypatch):
    """Of all designs that a reader might add, the test above could most easily misjudge these."""
    monkeypatch.setitem(GATES, "noisy", 2 * [lambda scale: scale * torch.rand_like(scale)])
    monkeypatch.setitem(GATES, "lookahead", 2 * [lambda scale: scale * (scale > scale.median(1, keepdim=True).values)])
    for sparse in (False, True):
        test_no_token_sees_the_future("noisy", sparse)
        with pytest.raises(AssertionError, match="lookahead sees the future"):
            test_no_token_sees_the_future("lookahead", sparse)

@pytest.mark.parametrize("design", [*DESIGNS, "closed"])
@pytest.mark.parametrize("sparse", [False, True])
def test_pass_equals_one_written_out(design, sparse):
    """Gates, logits, loss and gradients. A sparse pass gives the same result as scaling every token."""
    model = tiny(**DESIGNS.get(design, dict(gate="stretch", gate_bias=50.0)))           # "closed": every token skips
    idx, targets, states = tokens(), tokens(seed=2), []
    targets[0, :10] = -1        # not scored
    model.ln_f.register_forward_hook(lambda ln_f, args, y: states.append(args[0]))
    torch.manual_seed(0)        # for designs with noise
    with torch.device("meta"):          # a default device that must not matter
        logits, gates = model(idx, sparse)
        model.forward = lambda idx: (logits, gates)     # so that model.loss() takes its loss
        loss, _ = model.loss(idx, targets)
    torch.manual_seed(0)
    gates_by_hand, logits_by_hand, x = pass_by_hand(model, idx, sparse)
    assert_close((logits, gates), (logits_by_hand[-1], torch.stack(gates_by_hand)))
    assert_close(states[0], x, rtol=1e-12, atol=1e-12)
    scored = pass_by_hand(model, idx, False)[1] if design == "exit" else logits_by_hand[-1:]    # exit: after each block
    expected = F.cross_entropy(torch.cat(scored).mT, targets.repeat(len(scored), 1), ignore_index=-1)
    if model.config.model == "tsa":
        loss, expected = loss + model.depth_loss(gates), expected + sum(gate.mean() for gate in gates_by_hand[1:]) / 3
    assert_close(loss, expected)
    if not sparse:          # which is never trained: the update of a gate of 0 is not computed
        assert_close(*(torch.autograd.grad(value, list(model.parameters()), allow_unused=True, materialize_grads=True)
                       for value in (loss, expected)), rtol=1e-3, atol=1e-6)

def test_gate_designs_follow_their_definitions():
    """A token at a design's threshold still runs. Without the slope, the routers would not learn."""
    scale = torch.tensor([.9, .5, .15, .1, .05], requires_grad=True)
    switch, stretched, slope = [1., 1., 0., 0., 0.], [1., .5, .01, 0., 0.], [1., 1., 1., 1., 1.]
    for gate, training, inference, gradient in (
            ("soft", scale, switch, slope), ("skip", scale, [.9, .5, .15, .1, 0.], slope),
            ("straight", switch, switch, slope), ("stretch", stretched, stretched, [0., 1.4, 1.4, 0., 0.])):
        gates = [make_gate(scale) for make_gate in GATES[gate]]
        assert_close([*gates, *torch.autograd.grad(gates[0].sum(), scale)],
                     [torch.as_tensor(values) for values in (training, inference, gradient)])

@pytest.mark.parametrize("training, p", [(True, 0.1), (False, 0.0)])
def test_dropout_sits_at_the_papers_four_places(training, p, monkeypatch):
    """On the embeddings and attention weights, after GELU and after the feed-forward output; never in evaluation."""
    monkeypatch.setattr(F, "dropout", Mock(side_effect=lambda x, p, training: x))
    monkeypatch.setattr(F, "scaled_dot_product_attention", Mock(side_effect=lambda q, k, v, dropout_p, is_causal: q))
    tiny(**DESIGNS["skip"], n_layer=2, dropout=0.1).train(training)(tokens(), sparse=True)
    places = [(x.size(-1), p * training) for x, p, training in (call.args for call in F.dropout.call_args_list)]
    assert places == [(16, p)] + [(64, p), (16, p)] * 2
    assert [call.kwargs["dropout_p"] for call in F.scaled_dot_product_attention.call_args_list] == [p, p]

@pytest.mark.parametrize("dtype, precision", [(torch.bfloat16, "float32"), (torch.float32, "bfloat16")])
def test_precisions_and_devices(dtype, precision, monkeypatch):
    """In bfloat16, p must not round to 1, and a token that skips keeps its x to the bit. "meta" stands for a GPU."""
    router, block = Router(Config(gate_bias=6.0, n_embd=256)).to(dtype), tiny().blocks[1].to(dtype)
    x, gate = torch.randn(3, 16, 16, dtype=dtype), torch.randn(3, 16).relu()
    with train.precision("cpu", precision):
        assert torch.backends.cuda.flash_sdp_enabled() == (precision == "float32")      # the unfused kernel is faster
        p, y, full = router(torch.randn(1, 64, 256, dtype=dtype)), block(x, gate, sparse=True), block(x, gate)
        assert block.ffn.fc(x).dtype == torch.bfloat16
    assert p.dtype == torch.float32 and (1 - p).min() > 0 and torch.equal(y[gate == 0], x[gate == 0])
    assert_close(y, full, rtol=0.05, atol=0.05)
    with pytest.raises(RuntimeError, match="item"):         # the loss has been computed there, but has no value
        train.evaluate(tiny().to("meta"), tokens(), tokens(), sparse=False)
    with pytest.raises(RuntimeError, match="autocast.*meta"), train.precision("meta:0", "float32"):
        pass
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    assert train.parse_flags(["--device=cuda:1"])[0].dtype == "bfloat16"
    monkeypatch.setattr(torch, "load", Mock(side_effect=torch.load))
    assert load_checkpoint(sample.SHIPPED) and torch.load.call_args.kwargs["map_location"] == "cpu"
    monkeypatch.setattr(data.Data, "batch", lambda *_: torch.ones(2, 8, 16, dtype=torch.long, device="meta"))
    pytest.raises(NotImplementedError, fit, "--max_iters 1").match("out of meta")       # moved to the model's device

@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("T", [16, 7])
def test_counted_multiply_adds_are_what_ran(design, T):
    """PyTorch counts the same, except that saving() assumes a causal kernel: half the square of queries and keys."""
    model = tiny(**DESIGNS[design])
    with FlopCounterMode(display=False) as counter, train.sdpa_kernel(train.SDPBackend.MATH), torch.no_grad():
        gates = model(tokens(T=T), sparse=True)[1]
    counts, ran = counter.get_flop_counts()["Global"], (gates != 0).double().mean((1, 2)).tolist()
    counts[torch.ops.aten.bmm] *= 4 / sum(share > 0 for share in ran) / 2       # also counts a block that no token ran
    plain = 3 * T * 2 * (4 * (12 * 16 * 16 + T / 2 * 2 * 16) + 16 * 11)         # by hand; two flops per multiply-add
    assert saving(model.config, ran, T if T < 16 else None) == pytest.approx(1 - sum(counts.values()) / plain)

@pytest.mark.parametrize("design, sparse", [*((design, True) for design in DESIGNS), ("soft", False), ("exit", False)])
@pytest.mark.parametrize("shape, temperature, top_k, computed", [
    ((2, 3), 1.5, 3, 3 + 13 + 8 + 7), ((2, 2), 0.5, None, 2 + 14 + 8 + 6), ((1, 20), 0, 99, 8 + 8 + 8 + 8 + 11)])
def test_generation_equals_a_slow_loop_without_a_cache(design, sparse, shape, temperature, top_k, computed):
    """A step computes one token, except when the text outgrows the context and restarts from its last 8 tokens."""
    model, idx, lengths = tiny(**DESIGNS[design]), tokens(*shape), []
    model.wte.register_forward_hook(lambda wte, args, x: lengths.append(x.size(1)))
    torch.manual_seed(3)
    steps = list(generate(model, idx, 22, temperature, top_k, sparse))
    assert len(steps) == 22 and sum(lengths) == computed and not any(gates.requires_grad for _, gates in steps)
    torch.manual_seed(3)
    for idx_next, gates in steps:
        idx = idx[:, -8:] if idx.size(1) > 16 else idx
        logits, all_gates = model(idx, sparse)
        p, order = (logits[:, -1] / (temperature or 1)).softmax(-1), logits[:, -1].argsort(-1, descending=True)
        p = p.scatter(1, order[:, top_k:], 0) if top_k else p
        assert torch.equal(idx_next, torch.multinomial(p, 1) if temperature else order[:, :1])
        assert_close(gates, all_gates[:, :, -1])
        idx = torch.cat([idx, idx_next], 1)
    assert torch.equal(next(generate(model, tokens(), 1))[1], model(tokens(), sparse=True)[1][:, :, -1])
    with pytest.raises(IndexError):
        next(generate(model, torch.tensor([[99]]), 1))      # no such token
    assert all(block.attn.cache is None for block in model.blocks)      # none left, also after an error

def test_readme_quotes_tsa_and_its_own_gate_passes_the_tests():
    """The first thing that a reader adds must not break the tests, and must be tested like the other designs."""
    code, gates = (HERE / "tsa.py").read_text(encoding="utf-8"), "".join(text for text in EXCERPTS if "GATES[" in text)
    assert all(text in gates or " ".join(text.split()) in " ".join(code.split()) for text in EXCERPTS)
    for file in (*HERE.glob("*.py"), HERE / "README.md"):
        Path(file.name).write_bytes(file.read_bytes())
    Path("tsa.py").write_text(re.sub(r"(?ms)^GATES = \{.*?\}\n", lambda m: m[0] + gates, code), encoding="utf-8")
    command = [sys.executable, *"-m pytest -v --basetemp=temporary -k half test_tsa.py".split()]        # not this test
    run = subprocess.run(command, capture_output=True, text=True)
    for test in ("future", "written_out", "multiply_adds", "generation"):
        assert run.returncode == 0 and re.search(f"::test_.*{test}.*half.* PASSED", run.stdout), run.stdout

@pytest.mark.parametrize("name, a, b", [("u.txt", 85, 96), ("enwik8", 96, 101), ("stdlib", 85, 96)])
def test_text_is_split_at_characters_and_cut_into_windows(name, a, b, monkeypatch):
    """A split at bytes would cut a character in two, and windows that overlap would count twice in a score."""
    text, glob = "".join(map(chr, [*range(100, 206), 0x1F642])), Path.glob      # token i is at place i
    os.mkdir("data")
    for file, content in (("u.txt", text), ("b.py", text[40:]), ("a.py", text[:40]), ("data/c.py", "not top-level")):
        Path(file).write_text(content, encoding="utf-8")
    with data.zipfile.ZipFile("data/enwik8.zip", "w") as archive:
        archive.writestr("enwik8", text)
    monkeypatch.setattr(Path, "glob", lambda *args: sorted(glob(*args), reverse=True))      # another file system
    corpus = data.load(name)
    assert corpus.vocab == text and corpus.prompt == text[a:a + 32]
    for split, start, end in (("train", 0, a), ("val", a, b), ("test", b, 107)):
        idx, targets = corpus.splits[split]
        assert idx.tolist() == list(range(start, end - 1)) and torch.equal(targets, idx + 1)
    idx, targets = corpus.batch(3000, 16)
    assert torch.equal(targets, idx + 1) and set(idx[:, 0].tolist()) == set(range(a - 16))      # all but the last 16
    idx, targets = corpus.windows("val", 2)
    assert idx.tolist() == [[i, i + 1] for i in range(a, b - 2, 2)] and torch.equal(targets, idx + 1)
    assert len(corpus.windows("val", b - a - 1)[0]) == 1

@pytest.mark.parametrize("task", ["copy", "sort"])
def test_the_papers_tasks_are_what_they_say(task):
    """The format is `^source|target$`; only target and end mark are scored. No validation sequence is trained on."""
    corpus = data.load(task)
    (idx, targets), (trained, _) = corpus.windows("val", 64), corpus.windows("train", 64)
    assert idx.shape == (1000, 42) and trained.shape == (10_000, 42) and idx.unique().tolist() == [1, 2, *range(4, 32)]
    for row, target in zip(idx[:50], targets):
        source, answer = read(corpus.vocab, row)[1:].split("|")
        assert answer == (source if task == "copy" else "".join(sorted(source, key=corpus.vocab.index)))
        assert target[:21].eq(-1).all() and read(corpus.vocab, target[21:]) == answer + "$"
    batch, known = set(map(tuple, corpus.batch(64, 64)[0].tolist())), set(map(tuple, trained.tolist()))
    assert len(batch) > 60 and batch < known and known.isdisjoint(map(tuple, idx.tolist()))
    assert corpus.prompt == data.load(task).prompt == read(corpus.vocab, idx[0, :22])       # the same in every run

def test_target_of_a_chain_is_the_digit_that_the_letters_lead_to():
    """With wrong targets a model could only guess. Another seed gives puzzles that no model was trained on."""
    corpus, followed_by_hand = data.load("chain"), "741853443781143047414330431056"
    idx, targets = corpus.windows("val", 30)
    assert idx.shape == (1000, 30) and len(corpus.splits["train"][0]) == 100_000 * 30
    assert corpus.prompt == "7418534bfadclhi0gjnm4o30uwtx56" and data.chain_answers(corpus.prompt) == followed_by_hand
    for row, target in zip(idx[:50], targets):
        text = read(corpus.vocab, row)
        assert read(corpus.vocab, target) == data.chain_answers(text)
        assert all(len(set(text[i:i + 6])) == 6 for i in range(0, 30, 6))       # so that chains never merge
    assert not torch.equal(data.chain(seed=1).windows("val", 30)[0], idx)

@pytest.fixture
def server(monkeypatch):
    """A local server stands for the internet. It serves the current folder, with t.txt as Tiny-Shakespeare."""
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        url, sha256 = f"http://127.0.0.1:{server.server_port}/t.txt", data.hashlib.sha256(TEXT.encode()).hexdigest()
        monkeypatch.setitem(data.FILES, "shakespeare", ("text.txt", url, sha256))
        yield
        server.shutdown()

def test_eight_runs_download_at_once_after_one_whose_disk_was_full(server, monkeypatch):
    """No run may train on another corpus instead, and no part of a file may remain: later runs would use it."""
    def write_on_a_full_disk(path, content):
        path.touch()
        raise OSError("No space left on device")
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="^error: No space left on device$"):
        patch.setattr(Path, "write_bytes", write_on_a_full_disk)
        fit("--data auto")
    wait = threading.Barrier(8, timeout=10).wait            # until all eight have asked for the file
    monkeypatch.setattr(SimpleHTTPRequestHandler, "copyfile", lambda _, file, to: (wait(), to.write(TEXT.encode())))
    assert len(list(ThreadPoolExecutor(8).map(data.fetch, ["shakespeare"] * 8))) == 8
    assert data.load("shakespeare").vocab == "".join(sorted(set(TEXT))) and os.listdir("data") == ["text.txt"]

@pytest.mark.parametrize("sent, reason", [(b"?" * len(TEXT), "different file"), (b"The quick", "IncompleteRead")])
def test_failed_download_falls_back_to_the_standard_library(sent, reason, server, monkeypatch, tmp_path, capsys):
    """A first run should work anywhere. A damaged file must not remain, because later runs would use it."""
    Path("a.py").write_text("import this\n" * 99)
    monkeypatch.setattr(SimpleHTTPRequestHandler, "copyfile", lambda handler, file, response: response.write(sent))
    assert fit("--data auto --max_iters 1")["vocab"] == "\n himoprst" and not os.path.exists("data")
    assert re.search(f"{reason}.* {tmp_path}/data/text.txt.*\n.* data=stdlib", capsys.readouterr().out)

def test_run_equals_a_loop_written_out(monkeypatch, capsys):
    """Ten steps match a loop with every setting spelled out: seeds, warm-up, cosine, decay, clip, own depth loss."""
    monkeypatch.setattr(TSA, "depth_loss", lambda model, gates: gates[1].mean() + 2 * gates[2].mean())
    monkeypatch.setattr(torch, "compile", Mock(side_effect=lambda loss: loss))
    saved = fit("--max_iters 10 --learning_rate 0.02 --warmup_iters 4 --lam 0.3 --lam_ramp 0.5 --seed 5 --dropout 0.1 "
                "--eval_interval 3 --compile")
    corpus, clipped = data.load("t.txt"), 0
    seeds = [int(np.random.SeedSequence((5, step)).generate_state(1)[0]) for step in range(11)]
    torch.manual_seed(seeds[0])
    model = TSA(Config(vocab_size=len(corpus.vocab), block_size=16, n_layer=3, n_head=4, n_embd=16, dropout=0.1))
    optimizer = torch.optim.AdamW([{"params": [part], "weight_decay": 0 if re.search("bias|ln|wte|wpe", name) else 0.1}
                                   for name, part in model.named_parameters()], betas=(0.9, 0.95))
    for step in range(1, 11):
        torch.manual_seed(seeds[step])
        task, gates = model.loss(*corpus.batch(8, 16))
        optimizer.zero_grad()
        (task + 0.3 * min(step / 5, 1) * (gates[1].mean() + 2 * gates[2].mean())).backward()
        clipped += torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item() > 1
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * min(step / 4, 1) * (0.55 + 0.45 * np.cos(np.pi * (step - 1) / 9))
        optimizer.step()
    assert clipped > 1 and torch.compile.called and saved["prompt"] == corpus.prompt[:16]
    assert_close(saved["model"], model.state_dict(), rtol=1e-3, atol=2e-4)
    printed = re.search(r"step 10/10  loss (\S+)  gates (\S+) (\S+) (\S+)  ", capsys.readouterr().out).groups()
    assert list(map(float, printed)) == pytest.approx([task.item(), *gates.mean((1, 2)).tolist()], abs=0.006)

@pytest.mark.parametrize("run", ["plain --n_layer 1", "exit", "tsa --gate stretch", "tsa --halt --data copy"])
def test_result_is_the_score_of_the_checkpoint(run, monkeypatch, capsys):
    """It covers the whole validation split. Another gate's score does not replace it, but that of a longer run does."""
    monkeypatch.setattr(train, "precision", Mock(side_effect=train.precision))
    saved = fit("--dtype bfloat16 --block_size 50 --max_iters 15 --learning_rate .5 --dropout .1 --gate_bias 1.4 "
                f"--confidence .2 --model {run}")
    train.precision.assert_called_with("cpu", "bfloat16")
    model, (idx, targets) = load_checkpoint("run/ckpt.pt")[0], data.load(saved["flags"]["data"]).windows("val", 50)
    losses = [F.cross_entropy(model(idx, sparse)[0].mT, targets, ignore_index=-1).item() for sparse in (False, True)]
    ran = (model(idx, sparse=True)[1] != 0).double().mean((1, 2)).tolist()
    before, out = Path("run/result.json").read_text(), capsys.readouterr().out
    share = saving(model.config, ran, idx.size(1))
    for name, value in dict(val_loss=losses[0], val_loss_sparse=losses[1], blocks=sum(ran), ran=ran,
                            saved=share, halt="halt" in run, vocab_size=len(saved["vocab"])).items():
        assert json.loads(before)[name] == pytest.approx(value, abs=1e-5)
    assert (f"{losses[0]:.4f} full, {losses[1]:.4f} sparse: a token runs {sum(ran):.2f} of {len(ran)} blocks, saving "
            f"{share:.1%} of the multiply-adds ({len(idx):,} windows)\n  open gates 1.00 ") in out
    assert ("(64 windows" in out) == ("copy" in run) and (min(ran) == 1) == ("plain" in run)
    if "copy" in run:           # what follows the end mark of a task is noise
        torch.save(saved | {"flags": {"data": "sort"}}, "sort.pt")
        for path in ("run/ckpt.pt", "sort.pt"):
            sample.main([path, "--device=cpu", "--max_new_tokens=300", "--temperature=9"])
            assert re.fullmatch(r"[^$]*\$\n", capsys.readouterr().out)
    model.config.gate = "skip"
    train.main("--resume run --device cpu --gate skip".split())
    assert f"{train.evaluate(model, idx, targets, True)[0]:.4f} sparse" in capsys.readouterr().out.splitlines()[-2]
    assert Path("run/result.json").read_text() == before
    train.main("--resume run --device cpu --max_iters 16".split())
    assert '"max_iters": 16,' in Path("run/result.json").read_text()

def test_interrupted_run_resumes_to_the_bit(monkeypatch):
    """After a stop, even in the middle of saving, --resume gives the weights and the result of a whole run."""
    flags = "--max_iters 6 --eval_interval 2 --dropout .1 --seed 5 --gate stretch --lam .1 --preset copy --device cpu:0"
    def save_until_interrupted(run, path, save=torch.save):
        if run["step"] == 4:
            path.write_bytes(b"PK")         # only the first two bytes
            raise KeyboardInterrupt
        save(run, path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", save_until_interrupted)
        fit(flags)
    assert train.parse_flags(["--resume=run"])[0].device != "cpu:0"     # it may be resumed on another machine,
    monkeypatch.setattr(train, "supports_bfloat16", lambda device: True)        # where bfloat16 is the default
    train.main("--resume run --device cpu:0".split())
    os.remove("run/result.json")
    train.main("--resume run --device cpu:0".split())       # only scores
    os.rename("run", "resumed")
    whole, resumed = fit(flags), load_checkpoint("resumed/ckpt.pt")[1]
    assert_close(*([run["model"], run["optimizer"]] for run in (resumed, whole)), rtol=0, atol=0)
    assert Path("resumed/result.json").read_text() == Path("run/result.json").read_text()

def test_runs_are_numbered_and_sample_shows_the_newest(capsys):
    """No run overwrites another. Rounding breaks soft gates, so they are not rounded by default."""
    for model in ("tsa", "tsa", "exit"):
        train.main(f"{SMALL} --max_iters 1 --model {model}".split())
    assert sorted(os.listdir("out")) == ["exit-1", "tsa-1", "tsa-2"]
    for time, newest, flags, how in (
            (2e9, "tsa-1", "", "full"), (3e9, "tsa-2", "--sparse", "sparse"), (4e9, "tsa-1", "--gate skip", "sparse"),
            (5e9, "exit-1", "", "sparse"), (6e9, "exit-1", "--no-sparse", "full")):
        os.utime(f"out/{newest}/ckpt.pt", (time, time))
        sample.main(f"--max_new_tokens 2 --device cpu --prompt {'jumps' * 4} {flags}".split())
        assert capsys.readouterr().err.startswith(f"out/{newest}/ckpt.pt, {how}: ")

@pytest.mark.parametrize("program, flags, words", [
    (train, "--n_head 3", "not divisible by --n_head 3"), (train, "--n_layer 1", "needs --n_layer 2"),
    (train, "--out_dir .", "--resume ."), (train, "--resume x", "No such"), (train, "--resume run", "text has changed"),
    (train, "--resume run --n_head 2", "--n_head cannot"), (train, "--resume run --model plain", "--model cannot"),
    (train, "--device gpu", "gpu"), (train, "--device xpu", "XPU"), (train, "--data copy --block_size 41", "least 42"),
    (train, "--data short.txt", "13 characters: --block_size"), (train, "--data a.txt", "repeats"),
    (train, "--data latin.txt", "decode"), (train, "--data x", "No such"), (sample, "--prompt=", "one char"),
    (sample, "--prompt §", r"'\\xa7'"), (sample, "--device xpu", "XPU"), (train, "--max_iters 0", "0 is not positive"),
    (sample, f"--map --prompt {'x' * 65}", "at most 64"), (sample, "gate.pt", "no model tsa with gate nosuch"),
    (sample, f"{HERE}/report/chain-tsa.pt --prompt 7bc", "'b' at place 2"), (sample, "x.pt", "No such"),
    (sample, "old.pt", 'Missing.*"wte.weight".*Unexpected.*"wte.norm"'), (sample, "model.pt", "no model nosuch"),
    *((sample, name, f"{name} is damaged or") for name in ("empty.pt", "cut.pt", "foreign.pt", "bomb.pt"))])
def test_mistake_ends_in_one_line(program, flags, words, capsys):
    """No traceback, nothing overwritten or left behind, and a malicious checkpoint (it is a pickle) runs no code."""
    bomb = type("Bomb", (), {"__reduce__": lambda self: (os.mkdir, ("exploded",))})()       # unpickling makes a folder
    files = {"a.txt": b"a" * 99, "short.txt": b"ab" * 70, "latin.txt": b"\xe9" * 99, "empty.pt": b"", "bomb.pt": bomb,
             "cut.pt": sample.SHIPPED.read_bytes()[:-9], "old.pt": {"config": {}, "model": {"wte.norm": torch.ones(1)}},
             "foreign.pt": {"a": 3}, **{f"{x}.pt": {"config": {x: "nosuch"}, "model": 0} for x in ("model", "gate")}}
    for name, content in files.items():
        Path(name).write_bytes(content) if isinstance(content, bytes) else torch.save(content, name)
    fit("--max_iters 1")
    Path("t.txt").write_text(TEXT.replace("fox", "xof", 1))         # too late to resume that run
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        program.main(["--device=cpu", *flags.split()])
    message = capsys.readouterr().err.splitlines()[-1] if stop.value.code == 2 else stop.value.code     # 2: argparse
    assert re.fullmatch(f"(.*: )?error: [^\n]*{words}[^\n]*", message)
    assert sorted(Path().rglob("*")) == before

def test_training_that_cannot_succeed_stops(monkeypatch):
    """Without a gradient, the routers never learn. Weights of nan must not overwrite good ones."""
    for gate in (lambda scale: scale * 0 + 1, lambda scale: scale.detach()):
        monkeypatch.setitem(GATES, "flat", (gate, gate))
        with pytest.raises(SystemExit, match="^error: --gate flat passes no gradient to the routers[^\n]*$"):
            train.main(f"{SMALL} --gate flat --max_iters 1".split())
    factors = iter([1, 1, 1, *[float("nan")] * 5])      # from step 4 on
    monkeypatch.setattr("tsa.token_loss", lambda logits, targets: token_loss(logits, targets) * next(factors))
    with pytest.raises(FloatingPointError, match="not finite: lower --learning_rate"):
        fit("--max_iters 8 --eval_interval 2")
    assert load_checkpoint("run/ckpt.pt")[1]["step"] == 2

@pytest.mark.parametrize("design, sparse", [("soft", False), ("skip", True), ("exit", True)])
def test_map_shows_the_prediction_after_each_block(design, sparse, capsys, monkeypatch):
    """A cell is what a model that stops after that block would predict, and blank if the token skipped it."""
    vocab, shown, prompt, answers = "\n \t0123abcd", "⏎␣⇥0123abcd", "2301a0bcd", "230120301"
    model, idx = tiny(**DESIGNS[design]), data.encode(prompt, vocab)[None]
    torch.save(dict(config=vars(model.config), model=model.state_dict(), vocab=vocab, flags={"data": "chain"}), "x.pt")
    gates, logits, _ = pass_by_hand(model, idx, sparse)
    rows = [("token   ", [f" {c}" for c in prompt]), ("answer  ", [
        f" {c}" if c == best else f"!{c}" for c, best in zip(answers, read(vocab, logits[-1][0].argmax(-1)))])]
    for l in range(4):
        rows.insert(0, (f"block {l} ", [
            f"\033[30;48;5;{(195, 159, 117, 75, 33)[round(gate * 4)]}m {c}\033[0m" if gate else "  "
            for c, gate in zip(read(shown, logits[l][0].argmax(-1)), gates[l][0].tolist())]))
    monkeypatch.setenv("COLUMNS", "20")         # room for 6 cells
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    sample.main(["x.pt", f"--prompt={prompt}", "--device=cpu", "--sparse" if sparse else "--no-sparse"])
    out, err = capsys.readouterr()
    assert out == "".join("".join((name + "".join(cells[part])).rstrip() + "\n" for name, cells in rows) + "\n"
                          for part in (slice(0, 6), slice(6, 9)))
    ran = [(gate != 0).double().mean().item() for gate in gates]
    assert (f"{sum(ran):.2f} of 4 blocks, saving {saving(model.config, ran, 9):.1%}" if sparse else "full: ") in err

@pytest.mark.parametrize("sparse", [True, False])
def test_color_of_a_character_is_its_depth(sparse, capsys, monkeypatch):
    """The share of the blocks that ran or, in a full pass, the mean gate. The seed decides the text."""
    model, saved = load_checkpoint(sample.SHIPPED)          # what sample.py shows if there is no run
    torch.manual_seed(1)
    steps = list(generate(model, data.encode(saved["prompt"], saved["vocab"])[None], 40, 0.8, 30, sparse))
    depth, expected = torch.cat([gates != 0 if sparse else gates for _, gates in steps], 1).double(), saved["prompt"]
    for (idx_next, _), mean in zip(steps, depth.mean(0).tolist()):
        c, color = saved["vocab"][idx_next], (195, 159, 117, 75, 33)[round(mean * 4)]
        expected += c if c == "\n" else f"\033[30;48;5;{color}m{c}\033[0m"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    sample.main(f"--max_new_tokens=40 --top_k=30 --seed=1 --device=cpu --{'' if sparse else 'no-'}sparse".split())
    (out, err), ran = capsys.readouterr(), depth.mean(1).tolist()
    assert out == expected + "\n" and (f"saving {saving(model.config, ran):.1%} of" if sparse else "full: every") in err
    assert sample.paint("a", 1.4) == sample.paint("a", 1.0) != "a"          # a gate of your own may exceed 1
    monkeypatch.setenv("NO_COLOR", "1")
    assert sample.paint("a", 1.0) == "a"
