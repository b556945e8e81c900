"""Tests of what the code promises. `pytest -q` needs no network or GPU and tests every gate in GATES, yours too."""
import copy
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import zipfile
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
from tsa import GATES, MODELS, TSA, Config, GateMLP, Router, generate, load_checkpoint, multiply_adds

TEXT = "The quick brown fox jumps over the lazy dog.\n" * 302
SMALL = "--device cpu --dtype float32 --data t.txt --n_layer 3 --n_embd 16 --block_size 16 --batch_size 8"
torch.set_num_threads(1)                        # faster for models this small


class Everything(Router):
    """All that a reader's gate may have: a matrix, a memory, noise in training, and a buffer that counts the steps."""
    def __init__(self, config):
        super().__init__(config)
        self.mix = torch.nn.Linear(config.n_embd, 1)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def scale(self, x, gates):
        self.steps += self.training
        scale = torch.sigmoid(self.mix(x).squeeze(-1).float()) * (0.5 + 0.5 * torch.stack(gates).mean(0))
        return scale * torch.rand_like(scale) if self.training else scale * (scale > 0.5)


GATES["everything"] = Everything
DESIGNS = {gate: dict(gate=gate) for gate in GATES} | {
    "skip": dict(gate="skip", gate_bias=1.0), "skip, halt": dict(gate="skip", halt=True, gate_bias=-3.0),
    "soft, halt": dict(gate="soft", halt=True), "exit": dict(model="exit", confidence=0.4),
    "stretch, closed": dict(gate="stretch", gate_bias=50.0), "plain": dict(model="plain")}    # closed: block 0 only
all_designs = pytest.mark.parametrize("design", DESIGNS)
full_and_sparse = pytest.mark.parametrize("sparse", [False, True], ids=["full", "sparse"])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, which holds a text."""
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_bytes(TEXT.encode())
    monkeypatch.setattr(data, "FOLDER", tmp_path / "data")
    monkeypatch.setenv("COLUMNS", "80")
    for program in (train, sample):
        monkeypatch.setattr(program, "DEVICE", "cpu")
    monkeypatch.setitem(train.FLAGS, "device", train.FLAGS["device"]._replace(default="cpu"))


def fit(flags, folder="run"):
    """Train a small model and return its checkpoint; of repeated flags, the last one counts."""
    train.main(f"{SMALL} --out_dir {folder} {flags}".split())
    return load_checkpoint(folder)[1]


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


def save(model, path="x.pt", **others):
    """Write a checkpoint as train.py does."""
    saved = {"vocab": "abcdefghijk", "prompt": "abc", "flags": {"data": "t.txt"}, "checksum": 0}
    torch.save(saved | {"config": vars(model.config), "model": model.state_dict()} | others, path)


def block_by_hand(block, x, gate):
    """Equations (1) and (2) with causal attention, head by head: x (B, T, C), gate (B, T) -> (B, T, C)."""
    h, attn, gate = block.ln1(x), block.attn, gate.unsqueeze(-1)
    q, (k, v) = h @ attn.query.weight.T, (h @ attn.key_value.weight.T).chunk(2, dim=-1)
    heads, future = [], torch.ones(x.size(1), x.size(1)).triu(1).bool()
    for q, k, v in zip(*(part.chunk(attn.n_head, dim=-1) for part in (q, k, v))):
        scores = (q @ k.mT / q.size(-1) ** 0.5).masked_fill(future, -torch.inf)
        heads.append(scores.softmax(-1) @ v)
    x = x + gate * (torch.cat(heads, dim=-1) @ attn.proj.weight.T)
    return x + gate * block.ffn.proj(F.gelu(block.ffn.fc(block.ln2(x))))


def pass_by_hand(model, idx, sparse=False):
    """Scale each update by its gate -> each block's gates (L, B, T) and the logits after it (L, B, T, V)."""
    trained, gates, logits = [], [], []
    x = model.wte(idx) + model.wpe.weight[:idx.size(1)]
    for l, block in enumerate(model.blocks):
        trained.append(torch.ones(idx.shape))
        gates.append(trained[l])
        if l > 0 and model.config.model == "tsa":
            trained[l] = model.routers[l - 1](x, trained[:l])
            gates[l] = model.routers[l - 1].sparse_gate(trained[l]) if sparse else trained[l]
        elif l > 1 and model.config.model == "exit" and sparse:         # no token exits after block 0
            gates[l] = gates[l - 1] * (logits[l - 1].softmax(-1).amax(-1) <= model.config.confidence)
        x = block_by_hand(block, x, gates[l])
        norm = model.exit_norms[l] if model.config.model == "exit" and l < 3 else model.ln_f
        logits.append((norm(x) @ model.wte.weight.T).float())
    return torch.stack(gates), torch.stack(logits)


@pytest.mark.parametrize("model, count", [("plain", 4_782_336), ("tsa", 4_864_901), ("exit", 4_784_896)])
def test_number_of_parameters_is_the_papers(model, count):
    """With a bias missing or the head untied, it would be a different model."""
    model = MODELS[model](Config(vocab_size=65, block_size=128, n_layer=6, n_head=8, n_embd=256))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_initial_weights_and_gates_are_the_papers():
    """With them, an untrained model "saves" 22% by the paper's count, 1 - (1 + 5 * 0.731) / 6."""
    model = TSA(Config(n_layer=8, n_embd=256, gate_bias=3.0))
    block, pytorchs, small = model.blocks[3], 1 / (3 * 256) ** 0.5, 0.02 / (2 * 8) ** 0.5
    for layer, std in [(model.wte, 0.02), (model.wpe, 0.02), (block.attn.proj, small), (block.ffn.proj, small),
                       (block.attn.query, pytorchs), (block.attn.key_value, pytorchs), (block.ffn.fc, pytorchs)]:
        assert layer.weight.std().item() == pytest.approx(std, rel=0.03)
    assert model.routers[4].out.bias.item() == 3
    assert TSA(Config())(tokens())[1][1:].mean().item() == pytest.approx(0.731, abs=0.01)       # 1 - sigmoid(-1)


@pytest.mark.parametrize("n_embd, width", [(256, 64), (32, 16)])
def test_router_is_equation_3(n_embd, width):
    """Its hidden layer has a quarter of the model's width, but at least 16 units."""
    router, x = GateMLP(Config(n_embd=n_embd)), torch.randn(1, 3, n_embd)
    hidden = (x @ router.fc.weight.T + router.fc.bias).clamp(min=0)
    p = 1 / (1 + torch.exp(-(hidden @ router.out.weight[0] + router.out.bias)))
    assert hidden.size(-1) == width
    assert_close(router(x, [torch.ones(1, 3)]), 1 - p)


@pytest.mark.parametrize("design, full, sparse, slope", [
    ("soft", [.9, .5, .4, .1, .05], [1., 1., 0., 0., 0.], [1., 1., 1., 1., 1.]),
    ("skip", [.9, .5, .4, .1, .05], [.9, .5, .4, .1, 0.], [1., 1., 1., 1., 1.]),
    ("straight", [1., 1., 0., 0., 0.], [1., 1., 0., 0., 0.], [1., 1., 1., 1., 1.]),
    ("stretch", [1., .5, .36, 0., 0.], [1., .5, .36, 0., 0.], [0., 1.4, 1.4, 0., 0.])])
def test_gate_follows_its_definition(design, full, sparse, slope):
    """A token at a threshold still runs. Without the slope, the routers would not learn."""
    router, scale = GATES[design](Config()), torch.tensor([.9, .5, .4, .1, .05], requires_grad=True)
    gate = router.gate(scale)
    assert_close(gate.tolist(), full)
    assert_close(router.sparse_gate(gate).tolist(), sparse)
    assert_close(torch.autograd.grad(gate.sum(), scale)[0].tolist(), slope)


def test_halt_multiplies_gates_before_a_sparse_pass_sets_small_ones_to_0():
    """Gates of 0.4, 0.16 and 0.064 in training: a sparse pass skips block 3. A token that stopped stays out."""
    router = GATES["skip"](Config(halt=True))
    scale = torch.full((1, 2), 0.4, requires_grad=True)
    router.scale = lambda x, gates: scale
    gates = [torch.tensor([[1.0, 0.0]])]
    for _ in range(3):
        gates.append(router(torch.zeros(1, 2, 128), gates))
    assert_close(router.sparse_gate(torch.cat(gates)).T.tolist(), [[1.0, 0.4, 0.16, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert_close(torch.autograd.grad(gates[2].sum(), scale)[0].tolist(), [[0.8, 0.0]])        # through both factors


@pytest.mark.parametrize("B, T", [(1, 16), (3, 16), (1, 300), (3, 300)])
@pytest.mark.parametrize("share", ["full pass", 0, 0.1, 0.4, 0.6, 0.9, 1])
def test_block_is_equations_1_and_2_however_its_queries_are_arranged(share, B, T, monkeypatch):
    """A token that runs attends to its own past, even if queries are packed or other sequences have more of them."""
    packed, pack = [], tsa.pack
    monkeypatch.setattr(tsa, "pack", lambda *args: packed.append(pack(*args)) or packed[-1])
    torch.manual_seed(4)
    block, x, gate = tiny().blocks[1], torch.randn(B, T, 16).double(), torch.rand(B, T).double()
    if share != "full pass":
        gate = gate * (torch.rand(B, T) < share)
    assert_close(block(x, gate, sparse=share != "full pass"), block_by_hand(block, x, gate))
    most_skip = T == 300 and share in (0.1, 0.4)        # most of many tokens
    assert [n for _, n, _ in packed] == [(gate != 0).sum(1).max()] * most_skip, "packed into as few slots as possible"


@pytest.mark.parametrize("n_open", [0, 1, 2, 3, 8, 9])
def test_one_new_token_per_sequence_runs_a_block_whether_few_or_most_of_them_do(n_open):
    """In generation, attention has two paths: up to 2 of 9 sequences run as a batch of their own."""
    torch.manual_seed(4)
    block, x, gate = tiny().blocks[1], torch.randn(9, 16, 16).double(), torch.rand(9, 16).double()
    gate[torch.randperm(9)[n_open:], -1] = 0
    cache = tsa.Cache(Config(block_size=16, n_embd=16), 9, x)
    with torch.no_grad():
        before = block(x[:, :-1], gate[:, :-1], sparse=True, cache=cache)
        new = block(x[:, -1:], gate[:, -1:], sparse=True, cache=cache)
    assert_close(torch.cat([before, new], dim=1), block_by_hand(block, x, gate))


@pytest.mark.parametrize("unseen, place", [("the future", np.s_[:, 9:]), ("another sequence", np.s_[1:])])
@pytest.mark.parametrize("sparse, in_training", [(False, False), (True, False), (False, True)])
@all_designs
def test_no_token_sees(unseen, place, design, sparse, in_training):
    """A gate that saw them would score well and generate rubbish, or depend on the batch."""
    model, idx = tiny(**DESIGNS[design]).train(in_training), tokens(50)
    changed, twin = idx.clone(), copy.deepcopy(model)           # a twin, because a design may count its calls
    changed[place] = (changed[place] + 1) % 11
    torch.manual_seed(0)
    logits, gates = model(idx, sparse)
    torch.manual_seed(0)                                        # the same noise
    logits2, gates2 = twin(changed, sparse)
    same = idx == changed
    assert gates.isfinite().all(), f"{design} has a gate that is not finite"
    assert_close((logits[same], gates[:, same]), (logits2[same], gates2[:, same]), msg=f"{design} sees {unseen}")


@pytest.mark.parametrize("design", GATES)
def test_design_passes_a_gradient_to_its_routers(design):
    """Without one, the routers would never learn, and nothing else would say so."""
    model, idx = tiny(gate=design).train(), tokens()            # random weights, because a design's may start at 0
    loss, gates = model.loss(idx, idx)
    (loss + model.routers[0].depth_loss(gates[1:])).backward()          # a number
    for name, _ in model.routers[0].named_parameters():
        grads = [router.get_parameter(name).grad for router in model.routers]       # the first may not need all
        assert any(grad is not None and grad.any() for grad in grads), f"{design}: no gradient in {name} (see Straight)"


@full_and_sparse
@all_designs
def test_gates_are_from_0_to_1_and_without_noise_in_evaluation(design, sparse):
    """Otherwise the paper's count means nothing, and two evaluations of a model differ."""
    model, idx = tiny(**DESIGNS[design]), tokens()
    (_, gates), (_, again) = model(idx, sparse), model(idx, sparse)
    assert gates.min() >= 0 and gates.max() <= 1, f"{design} has gates from {gates.min():.2f} to {gates.max():.2f}"
    assert torch.equal(gates, again), f"{design}: add noise only if self.training"


@pytest.mark.parametrize("method, sparse", [("scale", False), ("sparse_gate", True)])
def test_gate_of_another_shape_is_an_error(method, sparse, monkeypatch):
    """A forgotten squeeze would broadcast, and a token would be scaled by another one's gate."""
    monkeypatch.setattr(GateMLP, method, lambda *args, whole=getattr(GateMLP, method): whole(*args).unsqueeze(-1))
    with pytest.raises(AssertionError, match=re.escape("a gate of shape (3, 16, 1) instead of (3, 16)")):
        tiny(gate="stretch")(tokens(), sparse)


@full_and_sparse
@pytest.mark.parametrize("design", [design for design in DESIGNS if design != "exit"])
def test_logits_and_gates_are_those_of_a_pass_written_out(design, sparse):
    """Skipping a block is the same as scaling its updates by 0."""
    model, idx = tiny(**DESIGNS[design]), tokens()
    gates, logits = pass_by_hand(model, idx, sparse)
    assert_close(model(idx, sparse), (logits[-1], gates))


@pytest.mark.parametrize("confidence", [0.0, 0.4, 1.0])
def test_early_exit_equals_one_written_out(confidence):
    """A token exits once a probability exceeds the confidence and keeps that prediction."""
    model, idx = tiny("exit", confidence=confidence), tokens()
    model.wte.weight.data *= 100 if confidence == 1 else 1      # some probabilities are exactly 1
    gates, logits = pass_by_hand(model, idx, sparse=True)
    blocks = gates.sum(0).long()                                        # (B, T)
    last = logits.gather(0, (blocks - 1)[None, ..., None].expand(1, -1, -1, 11))[0]             # (B, T, V)
    assert_close(model(idx, sparse=True), (last, gates))
    assert blocks.unique().tolist() == {0.0: [2], 0.4: [2, 3, 4], 1.0: [4]}[confidence]


@pytest.mark.parametrize("design", ["plain", "soft", "exit"])
def test_loss_is_the_mean_cross_entropy(design):
    """Early exit learns from its predictions after every block."""
    model, idx, targets = tiny(**DESIGNS[design]), tokens(), tokens(seed=2)
    losses = [F.cross_entropy(logits.flatten(0, 1), targets.flatten()) for logits in pass_by_hand(model, idx)[1]]
    assert_close(model.loss(idx, targets)[0], sum(losses) / 4 if design == "exit" else losses[-1])


def test_dropout_sits_at_the_papers_four_places():
    """They are the embeddings, the attention weights, and the outputs of GELU and of the feed-forward layer."""
    model, inputs = tiny(dropout=0.25).train(), []
    block = model.blocks[0]
    for layer in (block.attn.proj, block.ffn.proj):     # their inputs: attention to a single token, and GELU's output
        layer.register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
    x = model.embed(tokens(B=2000, T=1))
    block.attn(x, block.attn.key_value(x))
    for output in (x, block.ffn(x), *inputs):
        assert (output == 0).double().mean().item() == pytest.approx(0.25, abs=0.03)


def test_bfloat16_does_not_close_an_open_gate():
    """A scale of 0.001 is 1 - p with a p that bfloat16 rounds to 1, and a gate of 0 learns nothing."""
    scale = GateMLP(Config(gate_bias=6.0, n_embd=256)).bfloat16().scale(torch.randn(1, 64, 256).bfloat16(), [])
    assert scale.dtype == torch.float32 and scale.min() > 0


@pytest.mark.parametrize("T", [16, 7])
@all_designs
def test_counted_multiply_adds_are_those_that_ran(design, T):
    """PyTorch counts the same, except that we charge causal attention, and keys and values, in every block."""
    model = tiny(**DESIGNS[design])
    with FlopCounterMode(display=False) as counter, train.sdpa_kernel(train.SDPBackend.MATH), torch.no_grad():
        _, gates = model(tokens(T=T), sparse=True)
    ran = (gates != 0).double().mean((1, 2)).tolist()
    flops = counter.get_flop_counts()
    attention = sum(flops[name].get(torch.ops.aten.bmm, 0) for name in flops if name.endswith(".attn"))
    counted = (counter.get_total_flops() - attention) / 2 / (3 * T)     # per token: two flops are one multiply-add
    counted += 4 * T * 16 + ran.count(0) * 2 * 16 ** 2          # charged
    plain = 4 * (12 * 16 ** 2 + T * 16) + 11 * 16               # the weights and scores of four blocks, the head
    assert multiply_adds(model, ran, T) == pytest.approx((counted, plain)), f"{design}: not one for each matrix weight"


@pytest.mark.parametrize("design, sparse", [*((design, True) for design in DESIGNS), ("soft", False), ("exit", False)])
@pytest.mark.parametrize("shape, temperature, top_k", [((2, 3), 1.5, 3), ((1, 16), 0.5, None), ((1, 20), 0, 99)])
def test_generation_with_cache_top_k_and_restart_equals_a_slow_loop(design, sparse, shape, temperature, top_k):
    """A mistake here would show only as worse text. Beyond the context of 16, only its last 8 tokens are kept."""
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
        assert_close(gates, all_gates[:, :, -1], msg=f"{design}: its gates see other tokens, or it adds noise")
        idx = torch.cat([idx, new], dim=1)


@pytest.mark.parametrize("name, a, b", [("u.txt", 85, 96), ("stdlib", 85, 96), ("enwik8", 96, 101)])
def test_text_is_split_and_cut_into_windows_with_the_next_character_as_target(name, a, b, monkeypatch, tmp_path):
    """80/10/10 or, for enwik8, the paper's 90/5/5."""
    text = "".join(map(chr, [*range(100, 206), 0x1F642]))           # token i is at place i
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    for start in range(0, 107, 10):                                 # a file system lists them in any order
        Path(f"{start:03}.py").write_bytes(text[start:start + 10].encode())
    Path("u.txt").write_bytes(text.encode())
    os.mkdir("data")
    with zipfile.ZipFile("data/enwik8.zip", "w") as archive:
        archive.writestr("enwik8", text)
    corpus = data.load(name)
    for split, start, end in [("train", 0, a), ("val", a, b), ("test", b, 107)]:
        idx, targets = corpus.windows(split, 2)
        assert idx.tolist() == [[i, i + 1] for i in range(start, end - 2, 2)] and torch.equal(targets, idx + 1)
    idx, targets = corpus.batch(3000, 16)               # begins anywhere in train; val begins with the prompt
    assert set(idx[:, 0].tolist()) == set(range(a - 16)) and torch.equal(targets, idx + 1)
    assert text[a:].startswith(corpus.prompt) and corpus.vocab == text


def test_only_the_first_4_million_bytes_of_enwik8_are_used():
    """The report's losses are on these, and all of enwik8 would take many minutes to evaluate."""
    os.mkdir("data")
    with zipfile.ZipFile("data/enwik8.zip", "w") as archive:
        archive.writestr("enwik8", "ab" * 2_000_000 + "c")
    assert data.load("enwik8").vocab == "ab"


def test_puzzles_are_whole_and_a_target_is_the_digit_that_the_letters_lead_to():
    """With wrong targets, a model could only guess. A fifth of the positions below row 0 hold a digit."""
    corpus = data.load("chain")
    assert (corpus.splits["train"][0].view(-1, 30)[:, 6:] < 10).double().mean().item() == pytest.approx(0.2, abs=0.01)
    assert corpus.prompt == "837254efacdb6kjhgl0q2mr7wu43vs"        # the same puzzles in every run
    assert data.chain_answers(corpus.prompt) == "837254548723627453052637324360"        # by hand
    for row, target in [*zip(*corpus.windows("val", 30)), *zip(*corpus.batch(64, 30))]:     # whole puzzles
        text, answers = ("".join(corpus.vocab[i] for i in part) for part in (row, target))
        assert answers == data.chain_answers(text)


@pytest.mark.parametrize("sent, name", [(TEXT, "shakespeare"), (TEXT[1:], "stdlib")])
def test_a_damaged_download_is_replaced_by_the_standard_library(sent, name, monkeypatch):
    """The README's command works anywhere, and a damaged text is never used."""
    url, sha256 = Path("t.txt").absolute().as_uri(), hashlib.sha256(TEXT.encode()).hexdigest()
    monkeypatch.setitem(data.FILES, "shakespeare", ("a.txt", url, sha256))
    Path("t.txt").write_bytes(sent.encode())
    assert data.shakespeare_or_stdlib() == name and Path("data/a.txt").exists() == (name == "shakespeare")


@pytest.mark.parametrize("preset, expected", [("laptop", "skip 6 4 128 64 0.0 32 2400 0.0015 100 200 0.0 auto"),
    ("deep", "skip 12 4 128 64 0.0 32 2400 0.003 300 200 0.0 stdlib"),
    ("paper", "soft 6 8 256 128 0.1 64 5000 0.0003 0 250 0.0 auto"),        # the paper's
    ("chain", "skip 6 4 64 30 0.0 64 1500 0.002 100 100 0.5 chain")])
def test_preset_has_the_documented_settings_unless_others_are_typed(preset, expected):
    """Published numbers hold only for these settings."""
    args, names = vars(train.parse_flags([f"--preset={preset}"])[0]), ("gate n_layer n_head n_embd block_size dropout "
        "batch_size max_iters learning_rate warmup_iters eval_interval lam_ramp data")
    assert " ".join(str(args[name]) for name in names.split()) == expected
    assert (args["model"], args["lam"], args["gate_bias"], args["halt"], args["seed"]) == ("tsa", 0.001, -1.0, False, 0)
    assert train.parse_flags(["--n_embd=8", f"--preset={preset}"])[0].n_embd == 8       # what is typed wins


def test_only_matrices_decay():
    """In the paper, embeddings, biases and LayerNorms do not."""
    model = tiny("exit")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)]: (group["weight_decay"], group["betas"])
             for group in train.make_optimizer(model).param_groups for parameter in group["params"]}
    decays = {name: 0.0 if re.search("bias|ln|norm|wte|wpe", name) else 0.1 for name in names.values()}
    assert found == {name: (decay, (0.9, 0.95)) for name, decay in decays.items()}


@pytest.mark.parametrize("step, warmup, expected", [(1, 0, 1), (11, 0, 0.1), (6, 0, 0.55), (1, 4, 0.25), (4, 8, .4073)])
def test_schedule_is_warmup_times_cosine(step, warmup, expected):
    """From the full learning rate to a tenth of it, here in 11 steps."""
    assert train.schedule(step, warmup, 11) == pytest.approx(expected, abs=1e-4)


def test_ten_steps_equal_those_written_out():
    """A missing part would make it another method. Each part here moves some weight by more than 0.001."""
    trained = fit("--max_iters 10 --learning_rate 0.02 --warmup_iters 4 --lam 0.3 --lam_ramp 0.5 --seed 5 "
                  "--dropout 0.1 --eval_interval 4")["model"]       # after an evaluation, training has dropout again
    corpus = data.load("t.txt")
    for step in range(11):
        torch.manual_seed(int(np.random.SeedSequence((5, step)).generate_state(1)[0]))
        if step == 0:
            model = TSA(Config(vocab_size=len(corpus.vocab), block_size=16, n_layer=3, n_embd=16, dropout=0.1))
            optimizer = train.make_optimizer(model.train())
            continue
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * train.schedule(step, 4, 10)
        task_loss, gates = model.loss(*corpus.batch(8, 16))
        (task_loss + 0.3 * min(step / 5, 1) * gates[1:].mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert_close(trained, model.state_dict(), atol=2e-4, rtol=0)


def test_a_design_may_have_its_own_depth_loss(monkeypatch):
    """It may weight blocks or tokens. Twice the mean of (L - 1, B, T) acts like twice the lambda, bit for bit."""
    usual = fit("--max_iters 2 --lam 0.5", "usual")["model"]
    monkeypatch.setattr(GATES["skip"], "depth_loss", lambda self, gates: 2 * gates.mean() * (gates.shape == (2, 8, 16)))
    assert_close(fit("--max_iters 2 --lam 0.25")["model"], usual, rtol=0, atol=0)


def test_dtype_is_obeyed_and_bfloat16_is_the_default_where_it_is_fast(monkeypatch):
    """Speeds and losses are those of bfloat16 only if it takes effect."""
    seen, depth_loss = [], lambda self, gates: seen.append(torch.is_autocast_enabled("cpu")) or gates.mean()
    monkeypatch.setattr(GATES["skip"], "depth_loss", depth_loss)
    for fast, dtype in ((False, "float32"), (True, "bfloat16")):
        fit(f"--max_iters 1 --dtype {dtype}", dtype)
        monkeypatch.setattr(train, "supports_bfloat16", lambda device: fast)
        assert (seen[-1], train.parse_flags(["--device=cpu"])[0].dtype) == (fast, dtype)


@pytest.mark.parametrize("run", ["--model plain --n_layer 1", "--model exit", "--halt"])
def test_result_has_the_scores_of_all_validation_windows(run):
    """Results must be comparable. During training, a few hundred windows, spread over the split, are enough."""
    saved = fit(f"--max_iters 1 --dropout 0.1 --block_size 2 {run}")
    scores = train.score(load_checkpoint("run")[0], *data.load("t.txt").windows("val", 2))
    assert json.loads(Path("run/result.json").read_text()) == saved["config"] | saved["flags"] | scores


@pytest.mark.parametrize("design", ["skip", "exit", "plain"])
def test_scores_are_of_what_runs_and_of_what_the_paper_counts(design):
    """A full pass of early exit saves nothing. A gate of 0.5 saves only by the paper's count."""
    model, idx, targets = tiny(**DESIGNS[design]), tokens(100, 11), tokens(100, 11, seed=2)
    (logits, gates), (sparse_logits, sparse_gates) = model(idx), model(idx, sparse=True)
    scores, ran = train.score(model, idx, targets), (sparse_gates != 0).double().mean((1, 2))
    total, plain = multiply_adds(model, ran.tolist(), 11)
    by_hand = dict(val_loss=F.cross_entropy(logits.mT, targets), gates=gates.mean((1, 2)), ran=ran, blocks=ran.sum(),
                   val_loss_sparse=F.cross_entropy(sparse_logits.mT, targets), saved=torch.tensor(1 - total / plain),
                   tlops_saved=1 - (ran if design == "exit" else gates).mean())
    assert_close({name: torch.tensor(scores[name]) for name in by_hand}, by_hand, atol=1e-5, rtol=0, check_dtype=False)


def test_speedup_is_the_median_over_the_time_of_a_plain_pass(monkeypatch):
    """Next to its own full pass, a design would seem faster even if it skipped nothing; the best round is luck."""
    model, now = tiny(), [0]
    sparse_seconds = iter([9] + [9] * 7 + [2] + [1] * 7)        # after a warm-up; a plain pass takes 6 seconds

    def forward(self, x, gate=None, sparse=False, cache=None):
        if self is model.blocks[1]:
            now[0] += 6 if gate is None else next(sparse_seconds) if sparse else 99
        return x
    monkeypatch.setattr(tsa.Block, "forward", forward)
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    assert train.speedup(model, tokens()) == 3


def test_diverged_weights_do_not_replace_good_ones():
    """After the first step, the loss is still finite; later, it is not."""
    with pytest.raises(FloatingPointError, match="start again with a lower --learning_rate"):
        fit("--max_iters 4000 --eval_interval 1 --warmup_iters 1000 --learning_rate 1e6")
    assert all(weight.isfinite().all() for weight in load_checkpoint("run")[1]["model"].values())


def test_an_interrupted_run_resumes_to_the_bit(monkeypatch):
    """Stopped while saving and resumed on another machine, a run ends with the weights and result of a whole one."""
    flags = "--max_iters 6 --eval_interval 2 --dropout 0.1 --seed 5 --gate everything --lam 0.1 --lam_ramp 0.9"

    def save_or_stop(run, path, save=torch.save):
        save(run, path)
        if run["step"] == 4:
            path.write_bytes(b"half a file")
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="^\ninterrupted. .* run --max_iters 6$"):
        patch.setattr(torch, "save", save_or_stop)
        fit(flags)
    monkeypatch.setattr(train, "supports_bfloat16", lambda device: True)
    monkeypatch.setattr(train, "DEVICE", "cpu:0")
    train.main("--resume run".split())
    os.rename("run", "resumed")
    whole, resumed = fit(flags), load_checkpoint("resumed")[1]
    assert_close([resumed["model"], resumed["optimizer"]], [whole["model"], whole["optimizer"]], rtol=0, atol=0)
    assert Path("resumed/result.json").read_text() == Path("run/result.json").read_text()


def test_a_finished_run_can_be_trained_longer():
    """Otherwise, it would have to be trained again from the start. The schedule follows the new length."""
    saved = fit("--max_iters 2 --eval_interval 1 --warmup_iters 0")
    train.main("--resume run --max_iters 4".split())
    longer = load_checkpoint("run")[1]
    assert (longer["step"], longer["flags"]) == (4, saved["flags"] | {"max_iters": 4})
    assert longer["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.1 * 1.5e-3)


def test_a_field_that_a_reader_adds_to_config_is_a_flag():
    """A gate of one's own may have hyperparameters."""
    for name in ("tsa.py", "train.py", "data.py"):
        code = Path(tsa.__file__).with_name(name).read_text(encoding="utf-8")
        code = code.replace("    n_layer: int", "    slope: float = 2.0\n    hard: bool = True\n    n_layer: int")
        Path(name).write_text(code, encoding="utf-8")
    flags = f"{SMALL} --max_iters 1 --out_dir run --slope 3 --no-hard".split()
    subprocess.run([sys.executable, "train.py", *flags], check=True)
    assert {"slope": 3.0, "hard": False}.items() <= json.loads(Path("run/result.json").read_text()).items()


@pytest.mark.parametrize("flags, changes", [("", {}), ("--halt", {"halt": True}), ("--gate=soft", {"gate": "soft"})])
def test_score_evaluates_another_gate_and_writes_nothing(flags, changes, monkeypatch):
    """A model may be better with a gate that it was not trained with, and it may be from another machine."""
    saved, scored = fit("--max_iters 1 --gate_bias 0"), []
    torch.save(saved | {"flags": saved["flags"] | {"device": "nosuch"}}, "run/ckpt.pt")
    before = sorted(Path().rglob("*"))
    monkeypatch.setattr(train, "score", lambda *args, timed, score=train.score: scored.append(score(*args)))
    train.main(f"--score run/ckpt.pt {flags}".split())
    model = TSA(Config(**saved["config"] | changes))        # not load_checkpoint, which may ignore the changes
    model.load_state_dict(saved["model"])
    train.score(model, *data.load("t.txt").windows("val", 16), timed=True)
    assert scored[0] == scored[1] and sorted(Path().rglob("*")) == before


def test_score_reads_another_text_with_the_models_vocabulary_and_notes_a_change(capsys, monkeypatch):
    """The standard library differs from one Python to the next, and the shipped model must run everywhere."""
    fit("--max_iters 1")
    losses, notes = [], []
    monkeypatch.setattr(train, "score", lambda *args, timed, score=train.score: losses.append(score(*args)["val_loss"]))
    for text in (TEXT, TEXT + "§", TEXT.replace("fox", "xof", 1)):
        Path("t.txt").write_bytes(text.encode())
        train.main("--score run".split())
        notes.append("note: --data t.txt is not the text" in capsys.readouterr().out)
    assert losses[0] == losses[1] and notes == [False, False, True]


def test_sample_writes_what_generate_yields_without_dropout_or_colors(capsys, monkeypatch):
    """Its flags have an effect, and a model that was trained with dropout writes without it."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    save(tiny(gate="skip", dropout=0.5))
    sample.main("x.pt --device cpu --gate straight --seed 7 --max_new_tokens 20 --temperature 0.5 --top_k 3".split())
    model = tiny(gate="straight").float()
    torch.manual_seed(7)
    steps = [*generate(model, torch.tensor([[0, 1, 2]]), 20, temperature=0.5, top_k=3)]
    out, err = capsys.readouterr()
    assert out == "abc" + "".join("abcdefghijk"[new] for new, _ in steps) + "\n"
    assert f"a token ran {sum((gates != 0).sum().item() for _, gates in steps) / 20:.2f} of 4 blocks" in err


def test_runs_are_numbered_and_sample_shows_the_newest(capsys):
    """No run overwrites another, and after training, `python sample.py` needs no path."""
    for model in ("tsa", "tsa", "exit"):
        train.main(f"{SMALL} --max_iters 1 --model {model}".split())
    assert sorted(os.listdir("out")) == ["exit-1", "tsa-1", "tsa-2"]
    os.utime("out/tsa-1/ckpt.pt", (4e9, 4e9))
    sample.main(["--max_new_tokens=2"])
    assert capsys.readouterr().err.startswith(str(Path("out/tsa-1/ckpt.pt")))


def test_a_second_start_in_the_folder_of_a_run_is_refused(monkeypatch):
    """Two runs would overwrite each other. When the first begins to train, it has not saved anything."""
    monkeypatch.setattr(train, "fit", lambda *args: fit(""))
    with pytest.raises(SystemExit, match="^error: --out_dir run exists; choose another or, .*, --resume run$"):
        fit("")


@pytest.mark.parametrize("flags", ["", "--out_dir run"])
@pytest.mark.parametrize("why, gate, error", [
    ("error: the loss is not finite: .* another gate", lambda router, scale: scale * torch.nan, SystemExit),
    ("gates from 1 to 1.4.*, not 0 to 1", lambda router, scale: 2 * scale, AssertionError),
    ("nosuch", lambda router, scale: router.nosuch if router.training else scale, AttributeError),
    ("interrupted", lambda router, scale: signal.raise_signal(signal.SIGTERM), SystemExit)])
def test_a_run_that_ends_early_leaves_no_folder(why, gate, error, flags, monkeypatch):
    """A folder with untrained weights would be the newest run, and a diverged model has nothing to show."""
    usual = signal.signal(signal.SIGTERM, signal.SIG_IGN)       # otherwise, if train.py ignored it, pytest would end
    monkeypatch.setattr(GATES["soft"], "gate", gate)
    with pytest.raises(error, match=why):
        train.run_program(lambda: train.main(f"{SMALL} --gate soft {flags}".split()))
    signal.signal(signal.SIGTERM, usual)
    assert [*Path().glob("**/run"), *Path().glob("out/*")] == []


@pytest.fixture
def mistakes():
    """A run whose text has changed since, and unusable files."""
    class Bomb:             # a malicious checkpoint: unpickling it runs code
        def __reduce__(self):
            return os.mkdir, ("exploded",)
    os.mkdir("run")
    os.mkdir("gpu")
    save(tiny(), "run/ckpt.pt", optimizer={}, step=5, vocab="".join(sorted(set(TEXT))))
    save(tiny(), "gpu/ckpt.pt", optimizer={}, step=5, flags={"device": "nosuch"})
    content = Path("run/ckpt.pt").read_bytes()
    Path("flipped.pt").write_bytes(content[:9000] + b"flip" + content[9004:])
    Path("latin1.txt").write_bytes(b"\xe9" * 999)
    torch.save(Bomb(), "bomb.pt")
    save(tiny(), "gate.pt", config=vars(Config(gate="nosuch")))
    save(tiny(), "chain.pt", vocab="0123457abcd", flags={"data": "chain"})


@pytest.mark.parametrize("program, flags, words", [
    (train, "--dropout 1.5", "not a number from 0 to 1"), (train, "--n_embd 16 --n_head 3", "not divisible"),
    (train, "--gate_bias nan", "not a number"), (train, "--data nosuch --lam inf", "not a number"),
    (train, "--data chain --block_size 60 --max_iters 1 --n_layer 2 --n_embd 8", "length of a puzzle"),
    (train, "--gate nosuch", "invalid choice: 'nosuch'"), (train, "--data t.txt --out_dir t.txt/run", "t.txt"),
    (train, "--model exit --lam 1 --no-halt", "exit: --halt, --lam"), (train, "--n_layer 1", "--n_layer 2"),
    (train, "--resume run/ckpt.pt", "the folder of a run"), (train, "--resume run --lam 1", "--lam cannot be combined"),
    (train, "--resume run --max_iters 5", "more than the 5 steps"), (train, "--resume run", "not the text"),
    (train, "--resume gpu", "cannot use the device nosuch"), (sample, "run --device nosuch", "cannot use the device"),
    (train, "--score run --seed 1 --lam 1", "--lam, --seed cannot be"), (train, "--data latin1.txt", "decode"),
    (train, "--data t.txt --block_size 2000", "has only 1358 tokens"),
    (sample, "flipped.pt", "flipped.pt is damaged"), (sample, "bomb.pt", "bomb.pt is damaged"),
    (sample, "gate.pt", "has no model tsa with gate nosuch"),
    (sample, "chain.pt --prompt 7bc", "'b' at position 2"), (sample, "chain.pt --prompt §", r"vocabulary: '\xa7'"),
    (sample, "chain.pt --prompt=", "at least one character"), (sample, "run --gate everything", "weights do not fit")])
def test_a_mistake_ends_in_one_line(program, flags, words, mistakes, capsys):
    """The message says what is wrong, without a traceback. Nothing is written, and no foreign code runs."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        program.main(flags.split())
    message = capsys.readouterr().err.splitlines()[-1] if stop.value.code == 2 else stop.value.code     # 2: argparse
    assert "error: " in message and words in message and "\n" not in message
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("design, flag", [("soft", "--map"), ("skip", "--map"), ("exit", "--no-sparse"),
                                          ("own", "--map")])        # a reader's design that rounds as soft does
def test_map_shows_the_prediction_after_each_block_and_marks_wrong_answers(design, flag, capsys, monkeypatch):
    """A cell is what the model would predict if it stopped after that block, and blank if the token skipped it."""
    monkeypatch.setitem(GATES, "own", type("Own", (GATES["soft"],), {}))
    model = tiny(**DESIGNS.get(design, {"gate": design}), vocab_size=12)
    prompt, answers = "2301a0bcd", "230120301"          # a and b name positions 1 and 2
    save(model, vocab="\n \t\f0123abcd", flags={"data": "chain"})
    gates, logits = pass_by_hand(model, data.encode(prompt, "\n \t\f0123abcd")[None], sparse=design == "skip")
    rows = [f"token    {' '.join(prompt)}", "name     a b c d e f g h i", "answer  "]
    for l, (predicted, gate) in enumerate(zip(logits, gates)):
        letters = ["⏎␣⇥·0123abcd"[i] for i in predicted[0].argmax(-1)]
        rows.insert(0, f"block {l}  {' '.join(c if is_open else ' ' for c, is_open in zip(letters, gate[0]))}".rstrip())
    rows[-1] += "".join((" " if c == answer else "!") + answer for c, answer in zip(letters, answers))
    sample.main(["x.pt", "--device=cpu", f"--prompt={prompt}", flag])
    assert capsys.readouterr().out.splitlines() == [*rows, ""]
