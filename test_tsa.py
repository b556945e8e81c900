"""What the code promises. Run `python -m pytest -q`, without network or GPU. It tests all gates in GATES, yours too."""
import copy
import hashlib
import json
import os
import re
import runpy
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import data
import sample
import train
import tsa
from tsa import GATES, MODELS, TSA, Config, Router, generate, load_checkpoint, saving

HERE = Path(__file__).resolve().parent
CHAIN = HERE / "report" / "chain.pt"            # a shipped model
TEXT = "The quick brown fox jumps over the lazy dog.\n" * 302
SMALL = "--device cpu --dtype float32 --data t.txt --n_layer 3 --n_embd 16 --block_size 16 --batch_size 8"
EXCERPTS = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
torch.set_num_threads(1)                        # faster for models this small


class Everything(Router):
    """All that a reader's gate may have: a matrix, a memory, noise in training, and a buffer that counts the steps."""
    def __init__(self, config):
        super().__init__(config)
        self.mix = torch.nn.Linear(config.n_embd, config.n_embd)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def scale(self, x, gates):
        self.steps += self.training
        scale = super().scale(x + self.mix(x), gates) * (0.5 + 0.5 * torch.stack(gates).mean(0))
        return scale * torch.rand_like(scale) if self.training else scale * (scale > 0.5)


GATES["everything"] = Everything
exec("".join(excerpt for excerpt in EXCERPTS if "GATES[" in excerpt), vars(tsa).copy())     # README's gates
DESIGNS = {gate: dict(gate=gate) for gate in GATES} | {
    "skip": dict(gate="skip", gate_bias=1.0), "halt": dict(gate="skip", halt=True, gate_bias=-3.0),
    "closed": dict(gate="stretch", gate_bias=50.0),         # every token skips every block but the first
    "exit": dict(model="exit", confidence=0.4), "plain": dict(model="plain")}
all_designs = pytest.mark.parametrize("design", DESIGNS)
full_and_sparse = pytest.mark.parametrize("sparse", [False, True], ids=["full", "sparse"])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, which holds a text."""
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_bytes(TEXT.encode())
    monkeypatch.setattr(data, "FOLDER", tmp_path / "data")
    monkeypatch.setenv("NO_COLOR", "")


def fit(flags):
    """Train a small model in ./run, and return its checkpoint; of repeated flags, the last one counts."""
    train.main(f"{SMALL} --out_dir run {flags}".split())
    return load_checkpoint("run/ckpt.pt")[1]


def tiny(model="tsa", **settings):
    """A small model with weights far from their initial values, so that gates and exits differ from token to token."""
    torch.manual_seed(0)
    defaults = dict(vocab_size=11, block_size=16, n_layer=4, n_head=2, n_embd=16)
    model = MODELS[model](Config(model=model, **defaults | settings)).eval().double()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.3
    return model


def tokens(B=3, T=16, seed=1):
    return torch.randint(11, (B, T), generator=torch.Generator().manual_seed(seed))


def read(vocab, tokens):
    return "".join(vocab[i] for i in tokens)


def save(model, path="x.pt", **others):
    """Write a checkpoint as train.py does."""
    saved = {"vocab": "abcdefghijk", "prompt": "abc", "flags": {"data": "t.txt"}, "config": vars(model.config)}
    torch.save(saved | {"model": model.state_dict()} | others, path)


def look(capsys, *flags):
    sample.main([*flags, "--device=cpu"])
    return capsys.readouterr()


def interrupt_at(step, monkeypatch):
    """Press Ctrl-C while the checkpoint of this step is being written."""
    def save_or_stop(run, path, save=torch.save):
        save(run, path)
        if run["step"] == step:
            path.write_bytes(b"half a file")
            raise KeyboardInterrupt
    monkeypatch.setattr(torch, "save", save_or_stop)


def attention_by_hand(attn, h):
    """Causal attention, head by head: (B, T, C) -> (B, T, C)."""
    q, (k, v) = h @ attn.query.weight.T, (h @ attn.key_value.weight.T).chunk(2, dim=-1)
    heads, future = [], torch.ones(h.size(1), h.size(1)).triu(1).bool()
    for q, k, v in zip(*(part.chunk(attn.n_head, dim=-1) for part in (q, k, v))):
        scores = (q @ k.mT / q.size(-1) ** 0.5).masked_fill(future, -torch.inf)
        heads.append(scores.softmax(-1) @ v)
    return torch.cat(heads, dim=-1) @ attn.proj.weight.T


def pass_by_hand(model, idx, sparse=False):
    """Scale every token by its gate -> lists of each block's gates (B, T), and of the logits after it (B, T, V)."""
    config, gates, logits = model.config, [torch.ones(idx.shape)], []
    norms = [*getattr(model, "exit_norms", [model.ln_f] * (config.n_layer - 1)), model.ln_f]
    x = model.wte(idx) + model.wpe.weight[:idx.size(1)]
    for l, block in enumerate(model.blocks):
        exits = config.model == "exit" and sparse and l > 1         # no token exits after block 0
        if l > 0:
            gates.append(model.routers[l - 1](x, gates, sparse) if config.model == "tsa" else gates[-1])
        if exits:
            gates[l] = gates[l] * (logits[-1].softmax(-1).amax(-1) <= config.confidence)
        gate = gates[l].unsqueeze(-1)
        x = x + gate * attention_by_hand(block.attn, block.ln1(x))                                      # equation (1)
        x = x + gate * block.ffn.proj(F.gelu(block.ffn.fc(block.ln2(x))))                               # equation (2)
        prediction = (norms[l](x) @ model.wte.weight.T).float()
        logits.append(prediction.where(gate == 1, logits[-1]) if exits else prediction)         # a token keeps its own
    return gates, logits


@pytest.mark.parametrize("model, vocab_size, block_size, width, count", [
    ("plain", 65, 128, 256, 4_782_336), ("tsa", 65, 128, 256, 4_864_901), ("exit", 65, 128, 256, 4_784_896),
    ("plain", 32, 64, 128, 1_199_104), ("tsa", 32, 64, 128, 1_219_909), ("tsa", 6064, 256, 256, 6_433_413)])
def test_number_of_parameters_is_the_papers(model, vocab_size, block_size, width, count):
    """A missing bias or an untied head would be a different model. On Tiny-Shakespeare, the routers add 1.7%."""
    config = Config(vocab_size=vocab_size, block_size=block_size, n_layer=6, n_head=8, n_embd=width)
    assert sum(parameter.numel() for parameter in MODELS[model](config).parameters()) == count


def test_preset_paper_has_the_papers_settings():
    """The paper's numbers can be compared with ours only at its settings."""
    assert vars(train.parse_flags(["--preset=paper"])[0]).items() >= dict(
        n_layer=6, n_head=8, n_embd=256, block_size=128, dropout=0.1, batch_size=64, max_iters=5000, learning_rate=3e-4,
        warmup_iters=0, lam=0.001, model="tsa", gate="soft", gate_bias=-1.0, halt=False, confidence=0.9).items()


def test_initial_weights_and_gates_are_the_papers():
    """So an untrained model "saves" 22% by the paper's count, 1 - (1 + (L - 1) alpha) / L: alpha is 1 - sigmoid(-1)."""
    model = TSA(Config(n_layer=8, n_embd=256, gate_bias=3.0))
    block, pytorchs, small = model.blocks[3], 1 / (3 * 256) ** 0.5, 0.02 / (2 * 8) ** 0.5
    for layer, std in [(model.wte, 0.02), (model.wpe, 0.02), (block.attn.proj, small), (block.ffn.proj, small),
                       (block.attn.query, pytorchs), (block.attn.key_value, pytorchs), (block.ffn.fc, pytorchs)]:
        assert layer.weight.std().item() == pytest.approx(std, rel=0.03)
    assert model.routers[4].out.bias.item() == 3
    idx = torch.randint(65, (20, 64))
    assert train.score(TSA(Config()), idx, idx)["tlops_saved"] == pytest.approx(1 - (1 + 5 * 0.731) / 6, abs=0.01)


@pytest.mark.parametrize("n_embd, width, halt", [(256, 64, False), (32, 16, True)])
def test_router_is_equation_3(n_embd, width, halt):
    """Its width is a quarter of the model's, but at least 16. If halt, a gate that is 0 stays 0 in later blocks."""
    router, x = Router(Config(n_embd=n_embd, halt=halt)), torch.randn(1, 3, n_embd)
    hidden = (x @ router.fc.weight.T + router.fc.bias).clamp(min=0)
    p = 1 / (1 + torch.exp(-(hidden @ router.out.weight[0] + router.out.bias)))
    gates = [torch.ones(1, 3), torch.tensor([[0.0, 0.5, 1.0]])]
    assert hidden.size(-1) == width
    assert_close(router(x, gates), (1 - p) * (gates[-1] if halt else 1))


@pytest.mark.parametrize("design, full, sparse, slope", [
    ("soft", [.9, .5, .4, .1, .05], [1., 1., 0., 0., 0.], [1., 1., 1., 1., 1.]),
    ("skip", [.9, .5, .4, .1, .05], [.9, .5, .4, .1, 0.], [1., 1., 1., 1., 1.]),
    ("straight", [1., 1., 0., 0., 0.], [1., 1., 0., 0., 0.], [1., 1., 1., 1., 1.]),
    ("stretch", [1., .5, .36, 0., 0.], [1., .5, .36, 0., 0.], [0., 1.4, 1.4, 0., 0.])])
def test_gate_follows_its_definition(design, full, sparse, slope):
    """A token at a threshold still runs. Without the slope, the routers would not learn."""
    router, scale = GATES[design](Config()), torch.tensor([.9, .5, .4, .1, .05], requires_grad=True)
    assert_close(router.gate(scale).tolist(), full)
    assert_close(router.sparse_gate(scale).tolist(), sparse)
    assert_close(torch.autograd.grad(router.gate(scale).sum(), scale)[0].tolist(), slope)


@pytest.mark.parametrize("sparse, in_training", [(False, False), (True, False), (False, True)])
@all_designs
def test_no_token_sees_the_future(design, sparse, in_training):
    """A gate or an exit that looked ahead would score well and generate rubbish."""
    model, idx, changed = tiny(**DESIGNS.get(design, dict(gate=design))).train(in_training), tokens(50), tokens(50)
    changed[:, 9:] = (changed[:, 9:] + 1) % 11
    twin = copy.deepcopy(model)         # because a design may count its calls
    torch.manual_seed(0)
    logits, gates = model(idx, sparse)
    torch.manual_seed(0)                # the same noise
    logits2, gates2 = twin(changed, sparse)
    assert_close((logits[:, :9], gates[:, :, :9]), (logits2[:, :9], gates2[:, :, :9]), msg=f"{design} sees the future")


@full_and_sparse
def test_a_gate_that_looks_ahead_is_named(sparse, monkeypatch):
    """The test above is what stands between a reader's gate and a wrong result."""
    class Lookahead(Router):
        def gate(self, scale):
            return scale * (scale > scale.mean(dim=1, keepdim=True))
    monkeypatch.setitem(GATES, "lookahead", Lookahead)
    with pytest.raises(AssertionError, match="lookahead sees the future"):
        test_no_token_sees_the_future("lookahead", sparse, in_training=False)


@full_and_sparse
@all_designs
def test_pass_equals_one_written_out(design, sparse):
    """Skipping a block is the same as scaling its updates by 0. Tokens without a target do not count in the loss."""
    model, idx, targets = tiny(**DESIGNS[design]), tokens(), tokens(seed=2)
    targets[0, :10] = -1
    (logits, gates), (gates_by_hand, logits_by_hand) = model(idx, sparse), pass_by_hand(model, idx, sparse)
    assert_close(gates, torch.stack(gates_by_hand))
    assert_close(logits, logits_by_hand[-1])
    if not sparse:          # as in training, where early exit learns from its predictions after every block
        losses = [F.cross_entropy(each[targets >= 0], targets[targets >= 0]) for each in logits_by_hand]
        loss, by_hand = model.loss(idx, targets)[0], sum(losses) / 4 if design == "exit" else losses[-1]
        assert_close(loss, by_hand)
        how = dict(inputs=list(model.parameters()), allow_unused=True, materialize_grads=True)
        assert_close(torch.autograd.grad(loss, **how), torch.autograd.grad(by_hand, **how), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("in_training, fraction", [(True, 0.25), (False, 0.0)])
def test_dropout_sits_at_the_papers_four_places_in_training(in_training, fraction):
    """On the embeddings, on the attention weights, after GELU, and after the feed-forward layer."""
    model, inputs = tiny(dropout=0.25).train(in_training), []
    block = model.blocks[0]
    for layer in (block.attn.proj, block.ffn.proj):     # their inputs: attention to a single token, and GELU's output
        layer.register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
    x = model.embed(tokens(B=2000, T=1))
    block.attn(x, block.attn.key_value(x))
    for output in (x, block.ffn(x), *inputs):
        assert (output == 0).double().mean().item() == pytest.approx(fraction, abs=0.03 * in_training)


@pytest.mark.parametrize("precision, dtype", [("bfloat16", torch.float32), ("float32", torch.bfloat16)])
def test_bfloat16_neither_closes_an_open_gate_nor_changes_a_token_that_skips(precision, dtype):
    """A scale of 0.002 is 1 - p with a p that bfloat16 rounds to 1, and a gate of 0 learns nothing."""
    router, block = Router(Config(gate_bias=6.0, n_embd=256)).to(dtype), tiny().blocks[1].to(dtype)
    x, gate = torch.randn(3, 16, 16, dtype=dtype), torch.randn(3, 16).relu()
    with train.precision("cpu", precision):
        scale = router(torch.randn(1, 64, 256, dtype=dtype), [torch.ones(1, 64)])
        sparse, full = block(x, gate, sparse=True), block(x, gate)
        assert block.ffn.fc(x).dtype == torch.bfloat16
    assert scale.dtype == torch.float32 and scale.min() > 0
    assert torch.equal(sparse[gate == 0], x[gate == 0])
    assert_close(sparse, full, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("T", [16, 7])
@all_designs
def test_counted_multiply_adds_are_those_that_ran(design, T):
    """PyTorch counts the same, except that saving() counts causal attention: half the square of queries and keys."""
    model = tiny(**DESIGNS[design])
    with FlopCounterMode(display=False) as counter, train.sdpa_kernel(train.SDPBackend.MATH), torch.no_grad():
        _, gates = model(tokens(T=T), sparse=True)
    ran = (gates != 0).double().mean((1, 2)).tolist()
    flops = counter.get_flop_counts()["Global"]
    attention = flops.pop(torch.ops.aten.bmm) / sum(share > 0 for share in ran)     # of a block that some token ran
    counted = sum(flops.values()) + 4 * attention / 2           # saving() counts it for all four blocks
    plain = 3 * T * 2 * (4 * (12 * 16 * 16 + T / 2 * 2 * 16) + 11 * 16)     # two flops per multiply-add; blocks, head
    assert saving(model, ran, T if T < 16 else None) == pytest.approx(1 - counted / plain)


def test_readme_quotes_tsa_and_adds_a_gate():
    """Code that README explains is code that runs. The gate is tested above, with its name."""
    code = " ".join((HERE / "tsa.py").read_text(encoding="utf-8").split())
    quotes = [" ".join(excerpt.split()) for excerpt in EXCERPTS if "GATES[" not in excerpt]
    assert len(quotes) < len(EXCERPTS)
    assert [quote for quote in quotes if quote not in code] == []


@pytest.mark.parametrize("design, sparse", [*((design, True) for design in DESIGNS), ("soft", False), ("exit", False)])
@pytest.mark.parametrize("shape, temperature, top_k", [((2, 3), 1.5, 3), ((2, 2), 0.5, None), ((1, 20), 0, 99)])
def test_generation_equals_a_slow_loop_without_a_cache(design, sparse, shape, temperature, top_k):
    """A mistake would only make the text worse. When it outgrows the context of 16, it restarts from its last 8."""
    model, idx = tiny(**DESIGNS[design]), tokens(*shape)
    torch.manual_seed(3)
    steps = list(generate(model, idx, 22, temperature, top_k, sparse))
    torch.manual_seed(3)
    for new, gates in steps:
        idx = idx[:, -8:] if idx.size(1) > 16 else idx
        logits, all_gates = model(idx, sparse)
        p, order = (logits[:, -1] / (temperature or 1)).softmax(-1), logits[:, -1].argsort(descending=True)
        if top_k:
            p = p.scatter(1, order[:, top_k:], 0)
        assert torch.equal(new, torch.multinomial(p, 1) if temperature else order[:, :1])
        assert_close(gates, all_gates[:, :, -1])
        idx = torch.cat([idx, new], dim=1)


def test_generators_and_calls_of_one_model_do_not_mix():
    """In a notebook, one looks at logits while a text is being written. The cache is lent only during a step."""
    model, interleaved = tiny(), []
    one, two = ([new.item() for new, _ in generate(model, tokens(1, 5, seed), 20, 0)] for seed in (1, 2))
    logits = model(tokens())[0]
    for (a, _), (b, _) in zip(*(generate(model, tokens(1, 5, seed), 20, 0) for seed in (1, 2))):
        interleaved.append((a.item(), b.item()))
        assert_close(model(tokens())[0], logits)
    assert interleaved == list(zip(one, two))


def test_several_tokens_with_a_filled_cache_are_refused():
    """The causal mask would be wrong, and silently so."""
    model = tiny()
    model.blocks[0].attn.cache = [torch.zeros(1, 16, 32).double(), 3]
    with pytest.raises(AssertionError, match="one token at a time"):
        model(tokens(1, 2))


@pytest.mark.parametrize("name, a, b", [("u.txt", 85, 96), ("stdlib", 85, 96), ("enwik8", 96, 101)])
def test_text_is_split_at_characters_and_cut_into_windows(name, a, b, monkeypatch, tmp_path):
    """80/10/10 or, for enwik8, the paper's 90/5/5. No training window may reach into the validation split."""
    text = "".join(map(chr, [*range(100, 206), 0x1F642]))           # token i is at place i
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    for start in range(0, 107, 10):                                 # a file system lists them in any order
        Path(f"{start:03}.py").write_bytes(text[start:start + 10].encode())
    Path("u.txt").write_bytes(text.encode())
    os.mkdir("data")
    with zipfile.ZipFile("data/enwik8.zip", "w") as archive:
        archive.writestr("enwik8", text)
    corpus = data.load(name)
    assert corpus.vocab == text and corpus.prompt == text[a:a + 32]
    for split, start, end in [("train", 0, a), ("val", a, b), ("test", b, 107)]:
        idx, targets = corpus.windows(split, 2)
        assert idx.tolist() == [[i, i + 1] for i in range(start, end - 2, 2)] and torch.equal(targets, idx + 1)
    idx, targets = corpus.batch(3000, 16)
    assert set(idx[:, 0].tolist()) == set(range(a - 16))            # a window may begin anywhere
    assert torch.equal(idx, idx[:, :1] + torch.arange(16)) and torch.equal(targets, idx + 1)


@pytest.mark.parametrize("task", ["copy", "sort"])
def test_the_papers_tasks_are_what_they_say(task):
    """The format is `^source|target$`; only target and end mark are scored. Validation sequences are not trained on."""
    corpus = data.load(task)
    (idx, targets), (trained, _) = corpus.windows("val", 64), corpus.windows("train", 64)
    assert idx.shape == (1000, 42) and idx.unique().tolist() == [1, 2, *range(4, 32)]       # 3 is $, only a target
    for row, target in zip(idx[:50], targets):
        source, answer = read(corpus.vocab, row)[1:].split("|")
        assert answer == (source if task == "copy" else "".join(sorted(source, key=corpus.vocab.index)))
        assert target[:21].eq(-1).all() and read(corpus.vocab, target[21:]) == answer + "$"
    assert corpus.prompt == read(corpus.vocab, idx[0, :22]) and corpus.prompt[-1] == "|"
    trained, held_out, batch = (set(map(tuple, x.tolist())) for x in (trained, idx, corpus.batch(64, 64)[0]))
    assert len(trained) == 10_000 and batch < trained and trained.isdisjoint(held_out)


def test_target_of_a_chain_is_the_digit_that_the_letters_lead_to():
    """With wrong targets, a model could only guess."""
    corpus = data.load("chain")
    assert data.chain_answers("7418534bfadclhi0gjnm4o30uwtx56") == "741853443781143047414330431056"     # by hand
    for row, target in zip(*corpus.windows("val", 30)):
        assert read(corpus.vocab, target) == data.chain_answers(read(corpus.vocab, row))


@pytest.fixture
def server(monkeypatch):
    """A local server stands for the internet. It serves the test's folder, with t.txt as Tiny-Shakespeare."""
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        url, sha256 = f"http://127.0.0.1:{server.server_port}/t.txt", hashlib.sha256(TEXT.encode()).hexdigest()
        monkeypatch.setitem(data.FILES, "shakespeare", ("text.txt", url, sha256))
        yield
        server.shutdown()


def test_eight_runs_that_download_at_once_get_one_complete_file(server, monkeypatch):
    """None may read a file that another one has not finished."""
    wait = threading.Barrier(8, timeout=10).wait            # until all eight have asked for the file
    monkeypatch.setattr(SimpleHTTPRequestHandler, "copyfile", lambda _, file, to: (wait(), to.write(file.read())))
    paths = list(ThreadPoolExecutor(8).map(data.fetch, ["shakespeare"] * 8))
    assert set(paths) == {data.FOLDER / "text.txt"} and os.listdir("data") == ["text.txt"]
    assert data.load("shakespeare").vocab == "".join(sorted(set(TEXT)))


@pytest.mark.parametrize("sent, reason", [(b"?" * len(TEXT), "different file"), (b"The quick", "IncompleteRead")])
def test_a_damaged_download_falls_back_to_the_standard_library(sent, reason, server, monkeypatch, tmp_path, capsys):
    """The first command of README works anywhere, and says what it trains on. No damaged file is left."""
    monkeypatch.setattr(SimpleHTTPRequestHandler, "copyfile", lambda _, file, to: to.write(sent))
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    Path("a.py").write_bytes(b"import this\n" * 99)
    assert fit("--data auto --max_iters 1")["vocab"] == "\n himoprst" and not os.path.exists("data")
    message, flags, *_ = capsys.readouterr().out.splitlines()
    assert reason in message and str(data.FOLDER / "text.txt") in message and "data=stdlib" in flags


def test_ten_steps_equal_a_loop_written_out():
    """Another seed, warm-up, cosine, weight decay, clipping or rise of lambda would be another experiment."""
    saved = fit("--max_iters 10 --learning_rate 0.02 --warmup_iters 4 --lam 0.3 --lam_ramp 0.5 --seed 5 --dropout 0.1")
    seeds, groups, corpus = [np.random.SeedSequence((5, step)) for step in range(11)], [], data.load("t.txt")
    torch.manual_seed(int(seeds[0].generate_state(1)[0]))
    model = TSA(Config(vocab_size=len(corpus.vocab), block_size=16, n_layer=3, n_head=4, n_embd=16, dropout=0.1))
    for name, weights in model.named_parameters():
        groups.append({"params": [weights], "weight_decay": 0.0 if re.search("bias|ln|wte|wpe", name) else 0.1})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step in range(1, 11):
        torch.manual_seed(int(seeds[step].generate_state(1)[0]))
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * min(step / 4, 1) * (0.55 + 0.45 * np.cos(np.pi * (step - 1) / 9))
        task_loss, gates = model.loss(*corpus.batch(8, 16))
        optimizer.zero_grad()
        (task_loss + 0.3 * min(step / 5, 1) * gates[1:].mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert_close(saved["model"], model.state_dict(), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("run", ["--model plain --n_layer 1", "--model exit", "--halt --data copy --block_size 50"])
def test_result_scores_all_windows_and_checkpoints_some_from_the_whole_split(run, monkeypatch):
    """The first windows in a row may be easier than the others, and the result must be comparable."""
    scored, score = [], train.score
    monkeypatch.setattr(train, "score", lambda model, idx, targets: scored.append(idx) or score(model, idx, targets))
    saved = fit(f"--max_iters 1 --dropout 0.1 {run}")
    idx, targets = data.load(saved["flags"]["data"]).windows("val", saved["flags"]["block_size"])
    assert torch.equal(scored[0], idx[::max(len(idx) // 256, 1)])
    result = saved["config"] | saved["flags"] | score(load_checkpoint("run/ckpt.pt")[0], idx, targets)
    assert json.loads(Path("run/result.json").read_text()) == result


def test_training_runs_in_the_given_precision():
    """Speeds and losses are those of bfloat16 only if --dtype is obeyed."""
    exact = fit("--max_iters 1 --dtype float32")["model"]
    os.rename("run", "exact")
    rounded = fit("--max_iters 1 --dtype bfloat16")["model"]
    assert not torch.equal(rounded["blocks.0.ffn.fc.weight"], exact["blocks.0.ffn.fc.weight"])


def test_score_prints_two_short_lines(capsys):
    """Full and sparse, as README explains them, and narrow enough to be quoted there."""
    model, idx, targets = tiny(gate="skip", gate_bias=1.0, n_layer=6), tokens(100, 11), tokens(100, 11, seed=2) - 1
    (logits, gates), (sparse_logits, sparse_gates) = model(idx), model(idx, sparse=True)
    mean = " ".join(f"{gate:.2f}" for gate in gates.mean((1, 2)).tolist())
    ran = (sparse_gates != 0).double().mean((1, 2)).tolist()
    full = f"full    loss {F.cross_entropy(logits.mT, targets, ignore_index=-1):.4f}  mean gates {mean}"
    full += f"  {1 - gates.mean():.1%} saved by the paper's count"
    sparse = f"sparse  loss {F.cross_entropy(sparse_logits.mT, targets, ignore_index=-1):.4f}  open gates"
    sparse += "".join(f" {share:.2f}" for share in ran) + f"  {saving(model, ran, 11):.1%} of the multiply-adds saved"
    train.score(model, idx, targets)
    assert capsys.readouterr().out.splitlines() == ["validation (100 windows)", full, sparse]
    assert len(full) <= 96 and len(sparse) <= 96


def test_an_interrupted_run_resumes_to_the_bit(monkeypatch):
    """After a stop in the middle of saving, the weights and the result are those of a whole run."""
    flags = "--max_iters 6 --eval_interval 2 --dropout 0.1 --seed 5 --gate everything --lam 0.1"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="python train.py --resume run$"):
        interrupt_at(4, patch)
        fit(flags)
    monkeypatch.setattr(train, "supports_bfloat16", lambda device: True)        # as on another machine
    train.main("--resume run/ckpt.pt --device cpu".split())
    os.rename("run", "resumed")
    whole, resumed = fit(flags), load_checkpoint("resumed/ckpt.pt")[1]
    assert_close([resumed["model"], resumed["optimizer"]], [whole["model"], whole["optimizer"]], rtol=0, atol=0)
    assert Path("resumed/result.json").read_text() == Path("run/result.json").read_text()


@pytest.mark.parametrize("step, advice", [(0, ""), (1, "To continue from step 0: python train.py --resume run")])
def test_ctrl_c_ends_in_one_line(step, advice, monkeypatch):
    """It says how to continue. A folder without a checkpoint, which could not be used again, is not left behind."""
    interrupt_at(step, monkeypatch)
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL.split(), "--max_iters=1", "--out_dir=run"])
    with pytest.raises(SystemExit, match=f"^\ninterrupted. {advice}$"):
        runpy.run_path(str(HERE / "train.py"), run_name="__main__")
    assert os.path.exists("run") == bool(advice)


@pytest.mark.parametrize("path, flags, changes", [
    ("run", [], {}), ("run/ckpt.pt", ["--halt"], dict(halt=True)), (CHAIN, ["--no-halt"], dict(halt=False)),
    ("run/ckpt.pt", ["--gate=skip"], dict(gate="skip")), ("exit/ckpt.pt", ["--confidence=0"], dict(confidence=0.0))])
def test_score_evaluates_another_gate_and_writes_nothing(path, flags, changes, capsys):
    """A model may be better with a gate that it was not trained with."""
    fit("--max_iters 1 --gate_bias 0")
    fit("--max_iters 1 --model exit --out_dir exit")
    model, saved = load_checkpoint(path, **changes)
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    train.score(model, *data.load(saved["flags"]["data"]).windows("val", model.config.block_size))
    expected = capsys.readouterr().out
    train.main(["--score", str(path), "--device=cpu", *flags])
    flags, printed = capsys.readouterr().out.split("\n", 1)
    assert printed == expected and sorted(Path().rglob("*")) == before


def test_runs_are_numbered_and_sample_shows_the_newest(capsys):
    """No run overwrites another, and after training, `python sample.py` needs no path. A run's folder will do, too."""
    for model in ("tsa", "tsa", "exit"):
        train.main(f"{SMALL} --max_iters 1 --model {model}".split())
    assert sorted(os.listdir("out")) == ["exit-1", "tsa-1", "tsa-2"]
    os.utime("out/tsa-1/ckpt.pt", (4e9, 4e9))
    for flags, shown in [([], Path("out/tsa-1/ckpt.pt")), (["out/tsa-2"], Path("out/tsa-2"))]:
        assert look(capsys, "--max_new_tokens=2", *flags).err.startswith(f"{shown}, ")


@pytest.mark.parametrize("gate", [lambda router, scale: scale.detach(), lambda router, scale: scale * 0 + 1])
def test_a_gate_that_passes_no_gradient_stops(gate, monkeypatch):
    """Its routers would never learn. No folder is left, so the same command works once the gate has been mended."""
    monkeypatch.setitem(GATES, "flat", type("Flat", (Router,), {"gate": gate}))
    with pytest.raises(SystemExit, match="^error: --gate flat passes no gradient"):
        fit("--gate flat")
    assert not os.path.exists("run")


def test_a_resumed_run_without_a_gradient_keeps_its_folder(monkeypatch):
    """Only a folder that the run itself has made may be deleted."""
    monkeypatch.setitem(GATES, "flat", Router)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(1, patch)
        fit("--gate flat --max_iters 1")
    monkeypatch.setitem(GATES, "flat", type("Flat", (Router,), {"gate": lambda router, scale: scale.detach()}))
    with pytest.raises(SystemExit, match="passes no gradient"):
        train.main("--resume run --device cpu".split())
    assert load_checkpoint("run")[1]["step"] == 0


def test_a_gradient_that_is_not_finite_stops_before_the_next_checkpoint():
    """Weights of nan must not overwrite good ones, such as those saved before the first step."""
    with pytest.raises(FloatingPointError, match="not finite: start again with a lower --learning_rate"):
        fit("--max_iters 8 --eval_interval 4 --warmup_iters 0 --learning_rate 1e30")
    assert load_checkpoint("run/ckpt.pt")[1]["step"] == 0


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    """A folder with a finished run whose text has changed since, and with all kinds of unusable files."""
    class Bomb:             # a malicious checkpoint: unpickling it runs code
        def __reduce__(self):
            return os.mkdir, ("exploded",)
    folder, saved, chain = tmp_path_factory.mktemp("mistakes"), torch.load(CHAIN), CHAIN.read_bytes()
    (folder / "t.txt").write_bytes(TEXT.encode())
    train.main([*SMALL.split(), "--max_iters=2", f"--data={folder / 't.txt'}", f"--out_dir={folder / 'run'}"])
    for name, content in {
            "t.txt": TEXT.replace("fox", "xof", 1).encode(), "latin1.txt": b"\xe9" * 999, "short.txt": b"ab" * 70,
            "aaa.txt": b"a" * 999, "ckpt.pt": chain, "cut.pt": chain[:-9], "empty.pt": b"",
            "flipped.pt": chain[:300_000] + bytes([chain[300_000] ^ 1]) + chain[300_001:]}.items():
        (folder / name).write_bytes(content)
    torch.save(Bomb(), folder / "bomb.pt")
    torch.save([3], folder / "foreign.pt")
    for key in ("vocab", "flags", "prompt", "config", "model"):
        torch.save({name: value for name, value in saved.items() if name != key}, folder / f"no-{key}.pt")
    for key, value in {"model": "nosuch", "gate": "nosuch", "n_layer": 9}.items():
        torch.save(saved | {"config": saved["config"] | {key: value}}, folder / f"other-{key}.pt")
    return folder


@pytest.mark.parametrize("program, flags, words", [
    *((train, flag, f"argument {flag.split()[0]}: ") for flag in (
        "--dropout 1.5", "--learning_rate -1", "--warmup_iters -5", "--lam nan", "--lam_ramp 2", "--seed -1",
        "--max_iters 0", "--confidence 2", "--device gpu")),
    (train, "--n_embd 16 --n_head 3", "16 is not divisible by --n_head 3"), (train, "--n_layer 1", "needs --n_layer 2"),
    (train, "--data copy --block_size 41", "at least 42"), (train, "--data aaa.txt", "repeats one character"),
    (train, "--data short.txt", "only 13 characters: --block_size"), (train, "--data latin1.txt", "decode"),
    (train, "--data nosuch", "No such file"), (sample, "nosuch", "No such file"), (train, "--resume nosuch", "No such"),
    (train, "--out_dir run", "use --resume run"), (train, "--resume run --n_head 2", "--n_head cannot change"),
    (train, "--resume run --gate skip", "--gate cannot"), (train, "--resume run --max_iters 1", "reached step 2"),
    (train, "--resume run", "text has changed"), (train, "--score run/ckpt.pt --lam 1", "--lam cannot change"),
    (train, "--resume .", "no optimizer state: use --score"), (train, "--score cut.pt", "cut.pt is damaged"),
    *((sample, f"{name}.pt", f"{name}.pt is damaged or from another version") for name in (
        "flipped", "cut", "empty", "foreign", "bomb", "no-vocab", "no-flags", "no-prompt", "no-config", "no-model")),
    (sample, "other-model.pt", "no model nosuch"), (sample, "other-n_layer.pt", "Missing key(s) in state_dict"),
    (sample, "other-gate.pt", "no model tsa with gate nosuch"), (sample, "ckpt.pt --prompt=", "at least one character"),
    (sample, "ckpt.pt --prompt 7bc", "'b' at place 2"), (sample, "ckpt.pt --prompt §", r"vocabulary: '\xa7'"),
    (sample, f"ckpt.pt --prompt {'7' * 31}", "at most 30")])
def test_a_mistake_ends_in_one_line(program, flags, words, mistakes, monkeypatch, capsys):
    """It says what is wrong, without a traceback. Nothing is overwritten or left behind, and no foreign code runs."""
    monkeypatch.chdir(mistakes)
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        program.main(["--device=cpu", *flags.split()])
    message = capsys.readouterr().err.splitlines()[-1] if stop.value.code == 2 else stop.value.code     # 2: argparse
    assert "error: " in message and words in message and "\n" not in message
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("design, sparse", [("soft", False), ("skip", True), ("exit", True)])
def test_map_shows_the_prediction_after_each_block(design, sparse, capsys):
    """A cell is what a model that stops after that block would predict, and blank if the token skipped it."""
    model, prompt, answers = tiny(**DESIGNS[design]), "2301a0bcd", "230120301"         # a and b lead to places 1 and 2
    save(model, vocab="\n \t0123abcd", flags={"data": "chain"})
    gates, logits = pass_by_hand(model, data.encode(prompt, "\n \t0123abcd")[None], sparse)
    rows, ran = ["token    " + " ".join(prompt), "answer  "], [(gate != 0).double().mean().item() for gate in gates]
    for predicted, gate in zip(logits, gates):
        letters = read("⏎␣⇥0123abcd", predicted[0].argmax(-1))
        cells = [c if is_open else " " for c, is_open in zip(letters, gate[0])]
        rows.insert(0, f"block {len(rows) - 2}  {' '.join(cells)}".rstrip())
    for c, answer in zip(letters, answers):
        rows[-1] += (" " if c == answer else "!") + answer
    out, err = look(capsys, "x.pt", f"--prompt={prompt}", "--sparse" if sparse else "--no-sparse")
    assert out.splitlines() == [*rows, ""]
    assert (f"{sum(ran):.2f} of 4 blocks, saving {saving(model, ran, 9):.1%}" if sparse else "full: every token") in err


@full_and_sparse
def test_color_of_a_character_is_its_depth(sparse, capsys, monkeypatch):
    """The fraction of the blocks that ran or, in a full pass, the mean gate. Without a run, a shipped model writes."""
    model, saved = load_checkpoint(HERE / "report" / "python-skip.pt")
    torch.manual_seed(1)
    expected = saved["prompt"]
    for new, gates in generate(model, data.encode(saved["prompt"], saved["vocab"])[None], 40, 0.8, 3, sparse):
        depth = (gates != 0 if sparse else gates).double().mean().item()
        c, color = saved["vocab"][new], [195, 159, 117, 75, 33][round(depth * 4)]           # from pale to deep
        expected += c if c == "\n" else f"\033[30;48;5;{color}m{c}\033[0m"
    flags = ["--max_new_tokens=40", "--top_k=3", "--seed=1", "--sparse" if sparse else "--no-sparse"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert look(capsys, *flags).out == expected + "\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in look(capsys, *flags).out


@pytest.mark.parametrize("design, flags, is_full, hint", [
    ("soft", [], True, True), ("soft", ["--sparse"], False, False), ("soft", ["--gate=skip"], False, False),
    ("stretch", ["--no-sparse"], True, False), ("exit", [], False, False)])
def test_only_soft_gates_run_in_full_by_default(design, flags, is_full, hint, capsys):
    """Rounding breaks them. The summary recommends --gate skip only where it helps."""
    save(tiny(**DESIGNS[design]))
    err = look(capsys, "x.pt", "--max_new_tokens=2", *flags).err
    assert ("full: every token" in err) == is_full and ("--gate skip skips some" in err) == hint


@pytest.mark.parametrize("task, ends", [("sort", True), ("copy", True), ("t.txt", False)])
def test_text_of_a_task_ends_at_its_end_mark(task, ends, capsys):
    """What follows the mark was never trained."""
    save(tiny(), vocab="abcdefghij$", flags={"data": task})
    out = look(capsys, "x.pt", "--max_new_tokens=200", "--temperature=9").out
    assert bool(re.fullmatch(r"abc[a-j]*\$\n", out)) == ends


def test_head_ends_sample_quietly():
    """As in `python sample.py | head`: the reader of the pipe is gone before the text is complete."""
    command = [sys.executable, str(HERE / "sample.py"), "--max_new_tokens=5000", "--device=cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 0
