"""
Token-Selective Attention: a character transformer whose tokens choose how deep they go.

From scratch after "Adaptive Computation Depth via Learned Token Routing in Transformers" (arXiv 2605.05222). The one
idea is a gate per token and block, which scales both residual updates of the block:

    h = h + gate * attn(ln1(h))                                                       (1)
    h = h + gate * ffn(ln2(h))                                                        (2)

After every block but the last, the paper's router reads h and gives the probability p of skipping the next block:

    p = sigmoid(W2 relu(W1 h + b1) + b2)                                              (3)
    gate = 1 - p                                                                      (4)

A gate is a scale (a float tensor) or a switch (a bool tensor). A token whose gate is 0 or False keeps its h and skips
the block. Other tokens still read its keys and values, so a skipped block is cheap, not free. The loop over the blocks
runs in one of three modes:

    "trained"    the gates that training sees
    "masked"     the gates of inference, applied by multiplying: nothing is saved; this is the reference
    "gathered"   the gates of inference, and only tokens with an open gate are computed: the same numbers, less work

Shapes: B sequences of T tokens, C = n_embd channels, nh heads of hs = C / nh, V characters, L blocks, N open gates.
"""
import ctypes
import sys
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F


MODES = ("trained", "masked", "gathered")


class UserError(Exception):
    """A mistake of the user. Its message is one line that says what to do."""


@dataclass
class Config:
    """What a model is. The defaults are the paper's for Tiny-Shakespeare."""
    model: str = "tsa"              # dense, tsa, exit or halt
    gate: str | None = "soft"       # tsa: a name in GATES
    gate_bias: float | None = -1.0  # tsa, halt: where b2 of equation (3) starts; -1 opens the gates to 0.73
    threshold: float | None = 0.5   # tsa, halt: skip above this p; exit: leave above this confidence
    vocab_size: int = 65
    block_size: int = 128           # the longest sequence that the model reads
    n_layer: int = 6
    n_head: int = 8
    n_embd: int = 256
    dropout: float = 0.1

    def __post_init__(self):
        if self.model not in MODELS:
            raise UserError(f"model {self.model!r} is unknown: choose one of {', '.join(MODELS)}")
        if self.n_embd % self.n_head:
            raise UserError(f"n_head {self.n_head} does not divide n_embd {self.n_embd}: choose another n_head")
        least = {"dense": 1, "exit": 3}.get(self.model, 2)
        if self.n_layer < least:
            raise UserError(f"{self.model} needs n_layer of {least} or more: with fewer there is no block to skip")


# ----------------------------------------------------------------------------------------------------------------
# Gate designs: this is the place to hack. A design is two functions of the router's probability p (B, T): the gate that
# training sees and the gate that inference runs. Return floats for a scale and bools for a switch.

def soft(p, threshold):
    """The paper's gate in training, equation (4): a scale."""
    return 1 - p

def binary(p, threshold):
    """The paper's gate at inference: a switch."""
    return p <= threshold

def skip(p, threshold):
    """The scale that was trained, except that a token whose gate is nearly closed skips the block."""
    return (1 - p) * (p <= threshold)

GATES = {"soft": (soft, binary), "skip": (soft, skip)}      # --gate: (training sees, inference runs)


class Router(nn.Module):
    """The gate MLP, equation (3): h (..., C) -> p (...), the probability that a token skips the next block."""

    def __init__(self, config):
        super().__init__()
        width = max(config.n_embd // 4, 16)
        self.fc = nn.Linear(config.n_embd, width)
        self.out = nn.Linear(width, 1)
        nn.init.constant_(self.out.bias, config.gate_bias)

    def forward(self, h):
        # The sigmoid is always float32: in bfloat16, 1 - p would round to 0 where p is near 1.
        return torch.sigmoid(self.out(F.relu(self.fc(h))).squeeze(-1).float())


# ----------------------------------------------------------------------------------------------------------------
# The block, masked and gathered

class KV:
    """The keys and values of one block while text is generated: those of every token, skipped or not."""

    def __init__(self, batch_size, config, like):
        self.kv = like.new_empty(batch_size, config.block_size, 2 * config.n_embd)
        self.length = 0

    def append(self, kv):
        """kv (B, T, 2C) of T new tokens -> those of all S tokens so far (B, S, 2C)."""
        T = kv.size(1)
        self.kv[:, self.length:self.length + T] = kv
        self.length += T
        return self.kv[:, :self.length]


class Attention(nn.Module):
    """Causal multi-head attention in which some tokens ask and all are read; projections without biases."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.drop = Dropout(config.dropout)                 # nn.Dropout, but quicker on a CPU: see the appendix
        self.query = nn.Linear(C, C, bias=False)            # separate, because a skipped token needs no query
        self.key_value = nn.Linear(C, 2 * C, bias=False)
        self.proj = nn.Linear(C, C, bias=False)
        causal = torch.full((config.block_size, config.block_size), -torch.inf).triu(1)
        self.register_buffer("causal", causal, persistent=False)    # added to scores: -inf hides the future

    def keys_values(self, source, cache=None):
        """source (B, T, C) -> its keys and values (B, T, 2C), or with a cache those of all S tokens so far."""
        kv = self.key_value(source)
        return kv if cache is None else cache.append(kv)

    def forward(self, x, source=None, at=None, cache=None):
        """
        x (B, n, C) asks and source (B, T, C) is read -> (B, n, C). By default x itself is read. at (B, n) holds the
        position of each token that asks; by default all tokens ask, in order.
        """
        B, n, C = x.shape
        kv = self.keys_values(x if source is None else source, cache)                      # (B, S, 2C)
        k, v = kv.view(B, -1, 2, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)     # (B, nh, S, hs)
        q = self.query(x).view(B, n, self.n_head, -1).transpose(1, 2)                      # (B, nh, n, hs)
        mask = None if at is None else self.causal[at, :k.size(2)].unsqueeze(1)            # (B, 1, n, S)
        y = attend(q, k, v, self.causal, mask, self.drop)                                  # (B, nh, n, hs)
        return self.proj(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two layers of width 4C with exact GELU: (..., C) -> (..., C)."""

    def __init__(self, config):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.drop = Dropout(config.dropout)

    def forward(self, x):
        return self.drop(self.proj(self.drop(F.gelu(self.fc(x)))))


class Block(nn.Module):
    """A pre-norm transformer block whose two residual updates are scaled by a gate."""

    def __init__(self, config):
        super().__init__()
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.ffn = FeedForward(config)

    def forward(self, x, gate=None, cache=None, source=None):
        """
        x (B, T, C), gate (B, T) -> (B, T, C). Without a gate this is the plain block, and source (B, T, C) may then say
        what keys and values are made from (only Halt needs it).
        """
        if gate is None:
            x = x + self.attn(self.ln1(x), None if source is None else self.ln1(source), cache=cache)
            return x + self.ffn(self.ln2(x))
        gate = gate.to(x.dtype).unsqueeze(-1)                                              # (B, T, 1)
        x = x + gate * self.attn(self.ln1(x), cache=cache)                                 # equation (1)
        return x + gate * self.ffn(self.ln2(x))                                            # equation (2)

    def gathered(self, x, gate, cache=None):
        """The same numbers, but computed only for the tokens whose gate is open: (B, T, C), (B, T) -> (B, T, C)."""
        assert not self.training, "dropout is not drawn for each open token: gather in evaluation only"
        B, T = gate.shape
        n_open = gate.count_nonzero().item()
        if n_open == B * T:
            return self(x, None if gate.dtype == torch.bool else gate, cache)      # an open switch is the plain block
        source = self.ln1(x)
        if n_open == 0:
            if cache is not None:
                self.attn.keys_values(source, cache)            # what later tokens will read
            return x
        # Attention takes the same number of tokens, n, from every sequence: the open ones first, in order, then closed
        # ones as filling where a sequence has fewer. Gates 0110 and 1000, say, give at = [[1, 2], [0, 1]].
        is_open = gate != 0
        n = int(is_open.sum(1).max())
        at = is_open.int().argsort(dim=1, descending=True, stable=True)[:, :n]             # (B, n)
        asks = source[torch.arange(B, device=x.device).unsqueeze(1), at]                   # (B, n, C)
        # While decoding (T = 1) a token is the newest and reads all that is cached: no position is needed.
        update = self.attn(asks, source, at if T > 1 else None, cache)                     # (B, n, C)
        update = update[is_open.gather(1, at)]                  # drops the filling          (N, C)
        rows = is_open.flatten().nonzero().squeeze(1)           # (N,): where in B * T the gates are open
        flat = x.flatten(0, 1)                                                             # (B * T, C)
        scale = gate.flatten()[rows].to(x.dtype).unsqueeze(-1)                             # (N, 1)
        h = flat[rows] + scale * update                                                    # equation (1)
        h = h + scale * self.ffn(self.ln2(h))                                              # equation (2)
        return flat.index_copy(0, rows, h).view_as(x)


# ----------------------------------------------------------------------------------------------------------------
# The plain transformer and the paper's model

def stack(gates, like):
    """A list of L gates, None where a block ran whole -> (L, B, T) float32. like (B, T) gives the shape of None."""
    whole = torch.ones(like.shape, device=like.device)
    return torch.stack([whole if gate is None else gate.float() for gate in gates])


def cross_entropy(logits, targets):
    """(B, T, V), (B, T) -> (B, T), 0 where the target is -1, which means that nothing is scored there."""
    return F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-1, reduction="none")


class Transformer(nn.Module):
    """The plain transformer, and the loop over the blocks that all models share."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)       # also the output head (tied)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norms = nn.ModuleList([nn.LayerNorm(config.n_embd)])       # before the head; Exit has one per block
        for embedding in (self.wte, self.wpe):
            nn.init.normal_(embedding.weight, std=0.02)
        for block in self.blocks:       # 2L updates add up in h: each starts with 1 / (2L) of the variance
            for linear in (block.attn.proj, block.ffn.proj):
                nn.init.normal_(linear.weight, std=0.02 / (2 * config.n_layer) ** 0.5)

    def forward(self, idx, mode="trained", gates=None, cache=None):
        """
        idx (B, T) -> logits (B, T, V) float32, and a list of the L gates (B, T) that ran, None where a block ran whole.

        gates (L, B, T), bools for switches, are replayed in place of the model's own, as tests and report/ do. Its own
        are computed all the same, so that a replay costs what a run costs. cache is a list of L KV: the first call may
        bring any T, later ones T = 1.
        """
        assert mode in MODES, mode
        x, gate, used = self.embed(idx, cache), None, []
        for l, block in enumerate(self.blocks):
            if l > 0:       # block 0, the stem, always runs: something must read the tokens
                own = self.next_gate(l, x, gate, mode)
                gate = own if gates is None else gates[l]
            kv = None if cache is None else cache[l]
            x = block.gathered(x, gate, kv) if mode == "gathered" and gate is not None else block(x, gate, kv)
            used.append(gate)
        return self.read_out(x, used), used

    def embed(self, idx, cache=None):
        """(B, T) -> (B, T, C)"""
        start, T = cache[0].length if cache else 0, idx.size(1)
        assert start == 0 or T == 1, "a cache takes one token at a time once it holds any"
        return self.drop(self.wte(idx) + self.wpe.weight[start:start + T])

    def next_gate(self, l, x, gate, mode):
        """The gate (B, T) of block l, from what block l - 1 left, x, and that block's gate. None runs it whole."""
        return None

    def read_out(self, x, used):
        return self.logits(self.norms[0](x))

    def logits(self, x):
        return F.linear(x, self.wte.weight).float()

    def loss(self, idx, targets):
        """idx, targets (B, T) -> the task's loss, a mean over the scored tokens, and gates (L, B, T)."""
        logits, gates = self(idx)
        return cross_entropy(logits, targets).sum() / (targets >= 0).sum(), stack(gates, idx)


class TSA(Transformer):
    """The paper's model (section 1): a router after every block but the last decides who takes the next block."""

    def __init__(self, config):
        if config.gate not in GATES:
            raise UserError(f"gate {config.gate!r} is unknown: choose one of {', '.join(GATES)}")
        with torch.enable_grad():
            seen = GATES[config.gate][0](torch.full((1, 1), 0.4, requires_grad=True), config.threshold)
        if not seen.requires_grad:
            raise UserError(f"gate {config.gate!r} passes no gradient to p: train on a float that depends on it")
        super().__init__(config)
        self.routers = nn.ModuleList(Router(config) for _ in range(config.n_layer - 1))

    def next_gate(self, l, x, gate, mode):
        training_sees, inference_runs = GATES[self.config.gate]
        make_gate = training_sees if mode == "trained" else inference_runs
        return make_gate(self.routers[l - 1](x), self.config.threshold)


# ----------------------------------------------------------------------------------------------------------------
# The baseline, Exit, and our own model, Halt: here a token that has left stays out

class Exit(Transformer):
    """
    Early exit (Elbayad et al. 2020, arXiv 1910.10073). Training reads every token out after every block, with a
    LayerNorm per block and the tied head. At inference a token leaves once its largest softmax probability exceeds the
    threshold, though not after the stem, and is read out with the LayerNorm of the last block that it took.
    """

    def __init__(self, config):
        super().__init__(config)
        self.norms = nn.ModuleList(nn.LayerNorm(config.n_embd) for _ in range(config.n_layer))

    def next_gate(self, l, x, gate, mode):
        if mode == "trained" or l == 1:
            return None
        if gate is None:
            return self.is_unsure(l - 1, x)
        # Only tokens that are still in are asked: where the vocabulary is large, a head costs more than a block.
        return gate.masked_scatter(gate, self.is_unsure(l - 1, x[gate]))

    def is_unsure(self, l, x):
        """h after block l (..., C) -> (...) bool"""
        return F.softmax(self.logits(self.norms[l](x)), dim=-1).amax(-1) <= self.config.threshold

    def read_out(self, x, used):
        # One head for all: each token with the weights of the LayerNorm of the last block that it took.
        last = stack(used, x[..., 0]).sum(0).long() - 1                                    # (B, T): the last block run
        weight = torch.stack([norm.weight for norm in self.norms])[last]                   # (B, T, C)
        bias = torch.stack([norm.bias for norm in self.norms])[last]
        return self.logits(F.layer_norm(x, x.shape[-1:]) * weight + bias)

    def loss(self, idx, targets):
        """The mean of the cross-entropies after each of the L blocks (paper, section 1)."""
        x, losses = self.embed(idx), []
        for block, norm in zip(self.blocks, self.norms):
            x = block(x)
            losses.append(cross_entropy(self.logits(norm(x)), targets).sum())
        return sum(losses) / len(losses) / (targets >= 0).sum(), stack([None] * len(losses), idx)


class Halt(Transformer):
    """
    Ours: a token takes every block until its router says halt, and none after that. With p_l the probability of halting
    after block l (1 for the last), a token reaches block l with probability survive_l = (1 - p_0) ... (1 - p_{l-1}).
    With CE_l the cross-entropy of reading h out after block l, training minimises

        0.4 * sum over l of survive_l p_l CE_l      where a token halts, it should predict well
      + 0.1 * mean of CE_l over l > 0               a block that few reach must still learn
      + 0.5 * CE_{L-1}                              without this share every token halts at once
      + lam * mean of survive_l over l > 0          the price of depth                                   (5)

    No gate scales anything: routers learn where to stop, not how much to add. train.py raises lam from 0 over its first
    lam_iters steps, since early on no block is worth its price. What each part is worth was measured: see "What must
    stay" in report/README.md.
    """

    def __init__(self, config):
        super().__init__(config)
        self.routers = nn.ModuleList(Router(config) for _ in range(config.n_layer - 1))

    def next_gate(self, l, x, gate, mode):
        if gate is not None and not gate.any():
            return gate         # all have halted: nothing more is asked
        stays = self.routers[l - 1](x) <= self.config.threshold
        return stays if gate is None else gate & stays

    def levels(self, idx, cache=None):
        """idx (B, T) -> for each block logits (B, T, V), survive (B, T) and p (B, T), as training sees them."""
        x, L = self.embed(idx, cache), self.config.n_layer
        # Every token goes to the top, so that training knows what each block gains. But keys and values are made from
        # `left`, the h that inference will leave there: up to where it halts, a token reads what it will read when the
        # model is executed. (Without that, 1.540 as trained becomes 1.576 as executed.)
        left, runs = x, torch.ones(idx.shape, dtype=torch.bool, device=idx.device)
        survive = torch.ones(idx.shape, device=idx.device)
        for l, block in enumerate(self.blocks):
            x = block(x, None, None if cache is None else cache[l], source=left)
            left = torch.where(runs.unsqueeze(-1), x, left)
            p = self.routers[l](x) if l < L - 1 else torch.ones_like(survive)
            yield self.logits(self.norms[0](x)), survive, p
            survive, runs = survive * (1 - p), runs & (p <= self.config.threshold)

    def forward(self, idx, mode="trained", gates=None, cache=None):
        """As trained, no gate is applied: the last block's logits and, in place of gates, survive (B, T) by block."""
        if mode != "trained":
            return super().forward(idx, mode, gates, cache)
        assert gates is None, "halting applies no gates in training, so none can be replayed"
        survives = []
        for logits, survive, _ in self.levels(idx, cache):
            survives.append(survive)
        return logits, survives

    def loss(self, idx, targets):
        """Equation (5) without its last line, and survive (L, B, T) in place of gates."""
        L, total, survives = self.config.n_layer, 0, []
        for l, (logits, survive, p) in enumerate(self.levels(idx)):
            weight = 0.4 * survive * p + 0.1 / (L - 1) * (l > 0) + 0.5 * (l == L - 1)
            total = total + (weight * cross_entropy(logits, targets)).sum()
            survives.append(survive)
        return total / (targets >= 0).sum(), torch.stack(survives)


MODELS = {"dense": Transformer, "tsa": TSA, "exit": Exit, "halt": Halt}


def build(config):
    return MODELS[config.model](config)


# ----------------------------------------------------------------------------------------------------------------
# Generation and counts

def default_mode(config):
    """Skip what can be skipped, except with the paper's soft gate: cut to a switch, it is not what was trained."""
    return "trained" if config.model == "tsa" and config.gate == "soft" else "gathered"


@torch.inference_mode()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, mode=None, use_cache=True):
    """
    Continue idx (B, T). For each new token, yields idx_next (B, 1) and the gates (L, B) of the token that predicted it.
    Temperature 0 takes the likeliest token. Once the text is longer than the context, its last block_size // 2 tokens
    are read again from position 0. With the cache a step computes one token per sequence, without it the whole context:
    the text is the same.
    """
    model.eval()
    block_size, cache = model.config.block_size, None
    mode = mode or default_mode(model.config)
    for _ in range(max_new_tokens):
        if idx.size(1) > block_size:
            idx, cache = idx[:, -max(block_size // 2, 1):], None
        new = idx if cache is None else idx[:, -1:]
        if use_cache and cache is None:
            cache = [KV(len(idx), model.config, model.wte.weight) for _ in model.blocks]
        logits, gates = model(new, mode, cache=cache)
        logits = logits[:, -1]                                                             # (B, V)
        if top_k is not None:
            least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if temperature < 1e-4:      # 0, or too little to divide by
            idx_next = logits.argmax(-1, keepdim=True)
        else:
            idx_next = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)       # (B, 1)
        idx = torch.cat([idx, idx_next], dim=1)
        yield idx_next, stack(gates, new)[:, :, -1]


def tlops_saved(ran):
    """
    Token-layer operations saved. ran holds the share of tokens that took each block, ran[0] = 1. With alpha the mean of
    ran[1:], this is the paper's 1 - (1 + (L-1) alpha) / L (section 1).
    """
    return 1 - sum(ran) / len(ran)


# ----------------------------------------------------------------------------------------------------------------
# Appendix: what makes it fast on a CPU. PyTorch's own functions make the same model, but slower.

class Dropout(nn.Module):
    """
    Read it as nn.Dropout. On a CPU it draws 64 random bits for four elements, which saves a third of a step of the
    paper preset (1.13 s in place of 1.71 s).
    """

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if x.device.type != "cpu" or not self.training or self.p == 0:
            return F.dropout(x, self.p, self.training)
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2**63, None)
        bits = draws.view(torch.int16)[:x.numel()].view_as(x)       # each value from -2^15 on is equally likely
        keep = (bits >= round(self.p * 2**16) - 2**15).view(torch.uint8)        # torch multiplies slowly by bools
        return x * keep / (1 - self.p)


def attend(q, k, v, causal, mask, drop):
    """
    softmax(q k^T / sqrt(hs) + mask) v: q (B, nh, n, hs), k, v (B, nh, S, hs) -> (B, nh, n, hs). Without a mask all
    tokens ask, in order, or the newest alone. Training on a CPU writes it out, since the fused kernel is slow there in
    bfloat16 (written out, a step of the laptop preset takes 64 ms in place of 100) and with dropout.
    """
    n, hs = q.shape[-2:]
    fused_is_slow = q.device.type == "cpu" and (q.dtype == torch.bfloat16 or drop.p > 0)
    if drop.training and mask is None and fused_is_slow:
        scores = q @ k.transpose(-2, -1) * hs ** -0.5 + causal[:n, :n].to(q.dtype)
        return drop(scores.softmax(-1)) @ v
    dropout_p = drop.p if drop.training else 0.0
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal=mask is None and n > 1)


def keep_freed_memory():
    """
    glibc returns large buffers to the system and fetches them again, page by page, for the next layer. Telling it to
    keep them (mallopt(3): M_MMAP_MAX is -4, M_TRIM_THRESHOLD is -1) saves a quarter of a step of the paper preset.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)
        libc.mallopt(-1, 2**31 - 1)
