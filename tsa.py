"""
Token-Selective Attention (TSA) in one file: a character-level transformer in which routers, one after each block but
the last, decide for every token how strongly the next block updates it. This implements "Adaptive Computation Depth via
Learned Token Routing in Transformers" (arXiv 2605.05222). Each block but the first has a gate for every token. The
gate scales both updates of the token's state x:

    x = x + gate * attn(ln1(x))                     (1)
    x = x + gate * ffn(ln2(x))                      (2)

A router computes from x the "probability" p that the token skips the next block:

    p = sigmoid(W2 relu(W1 x + b1) + b2)            (3)
    gate = 1 - p                                    (4)

Nothing is sampled. A model with gates runs in two ways:

    model(idx)                  full: every block is computed for every token and scaled by its gate, as in training
    model(idx, sparse=True)     sparse: a token whose gate is 0 skips the block and keeps its x

Gates of equation (4) are almost never exactly 0, so a design may set small ones to 0 in a sparse pass.
Shapes: B sequences of T tokens, C = n_embd channels, nh heads of size hs = C / nh, V characters, L blocks. In a sparse
pass, N of the B * T tokens run a block. Attention sees S keys and values per sequence: T, or more with a cache.
"""
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass
class Config:
    """The hyperparameters of a model. train.py has the paper's for Tiny-Shakespeare as `--preset paper`."""
    model: str = "tsa"          # a name in MODELS
    gate: str = "skip"          # tsa: a name in GATES
    gate_bias: float = -1.0     # tsa: initial b2 of equation (3): -1 starts gates near 0.73, a larger b2 lower
    halt: bool = False          # tsa: multiply each gate by the previous one, so that it stays 0 once it is 0
    confidence: float = 0.9     # exit: exit once the largest probability exceeds this
    vocab_size: int = 65
    block_size: int = 64        # maximum sequence length
    n_layer: int = 6
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0


# ----------------------------------------------------------------------------------------------------------------
# Gates: the place to experiment.

class Router(nn.Module):
    """
    Computes the gate of the next block from the state after this one. A design derives from the paper's GateMLP and
    overrides `gate` or `sparse_gate`, or it derives from Router and defines `scale(x, gates)`, which takes the place of
    1 - p. A token's gate may depend on its own x and gates only: in generation, x is just the newest token.
    """

    def __init__(self, config):
        super().__init__()
        self.halt = config.halt

    def forward(self, x, gates):
        """x (B, T, C) and the gates of all earlier blocks, a list of (B, T) -> the gate of the next block (B, T)."""
        gate = self.gate(self.scale(x, gates))
        return gate * gates[-1] if self.halt else gate

    def gate(self, scale):
        """The gate, made from the scale (by default, the same). It may be random only `if self.training`."""
        return scale

    def sparse_gate(self, gate):
        """The gate in a sparse pass, made from the one in training (by default, the same)."""
        return gate


class GateMLP(Router):
    """The paper's router, a two-layer MLP."""

    def __init__(self, config):
        super().__init__(config)
        width = max(config.n_embd // 4, 16)
        self.fc = nn.Linear(config.n_embd, width)
        self.out = nn.Linear(width, 1)
        nn.init.constant_(self.out.bias, config.gate_bias)

    def scale(self, x, gates):
        """1 - p (B, T), equations (3) and (4). In float32, because bfloat16 would round a p near 1 to 1."""
        return 1 - torch.sigmoid(self.out(F.relu(self.fc(x))).squeeze(-1).float())


class Soft(GateMLP):
    """The paper's design: in a sparse pass, the gate is rounded to 0 or 1."""
    def sparse_gate(self, gate):
        return (gate >= 0.5).float()


class Skip(GateMLP):
    """The paper's gate in training. A sparse pass sets gates below 0.1 to 0 and keeps the others."""
    def sparse_gate(self, gate):
        return gate * (gate >= 0.1)


class Stretch(GateMLP):
    """A gate that is exactly 0 up to a scale of 1/7, and 1 from 6/7."""
    def gate(self, scale):
        return (1.4 * scale - 0.2).clamp(0, 1)          # hard concrete without noise (Louizos et al. 2018, 1712.01312)


class Straight(GateMLP):
    """0 or 1 in the forward pass, with the scale's gradient in the backward pass (straight-through)."""
    def gate(self, scale):
        return (scale >= 0.5).float() + (scale - scale.detach())        # adds exactly 0, with the scale's gradient


GATES = {"soft": Soft, "skip": Skip, "stretch": Stretch, "straight": Straight}


class Attention(nn.Module):
    """Causal multi-head attention without biases or output dropout. Queries may come from some tokens only."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head, self.dropout = config.n_head, config.dropout
        self.query = nn.Linear(C, C, bias=False)
        self.key_value = nn.Linear(C, 2 * C, bias=False)
        self.proj = nn.Linear(C, C, bias=False)

    def forward(self, h, kv, rows=None):
        """
        h (B, T, C), keys and values kv (B, S, 2C) -> (B, T, C), or (N, C) if only N tokens run the block: those in
        `rows`, their sequences and positions.
        """
        B, T, C = h.shape
        assert T in (1, kv.size(1)), "with tokens in the cache, pass one at a time"    # is_causal needs S = T
        if rows is not None and T == 1:         # generation: a batch of only the sequences whose token runs
            return self(h[rows[0]], kv[rows[0]]).squeeze(1)             # (N, C)
        q = self.query(h if rows is None else h[rows])                  # (B, T, C) or (N, C)
        mask = None
        if rows is not None:    # the kernel takes n queries of every sequence, padded with 0
            slots, n, mask = pack(rows, B, T)
            q = q.new_zeros(B, n, C).index_put_(slots, q)               # (B, n, C)
        k, v = kv.chunk(2, dim=-1)                                      # (B, S, C) each
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in (q, k, v))  # (B, nh, n or S, hs)
        dropout_p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal=mask is None and T > 1)
        y = y.transpose(1, 2)                                           # (B, n, nh, hs)
        return self.proj((y if rows is None else y[slots]).flatten(-2))


def pack(rows, B, T):
    """
    Place the queries of the N tokens `rows` (sorted sequences, positions) side by side. Return their slots (sequences,
    columns), the number n of columns, and the causal mask (B, 1, n, T), or None if it is not needed. With gates 0 1 0 1
    and 0 0 1 0 of the sequences a and b, the queries are [a1 a3] and [b2 0], their slots (0, 0), (0, 1), and (1, 0).
    """
    b, t = rows
    if 2 * len(b) >= B * T:         # half or more are open: is_causal is faster than a mask
        return rows, T, None        # each query stays in its position
    count = torch.bincount(b, minlength=B)                              # (B,)
    first = count.cumsum(0) - count             # where each sequence begins among the N tokens
    column = torch.arange(len(b), device=b.device) - first[b]           # (N,)
    n = count.max().item()
    position = t.new_zeros(B, n).index_put_((b, column), t)             # (B, n); unused slots attend to token 0
    mask = position.unsqueeze(-1) >= torch.arange(T, device=b.device)   # (B, n, T)
    return (b, column), n, mask.unsqueeze(1)


class FeedForward(nn.Module):
    """One hidden layer of width 4C, exact GELU, dropout after both layers as in the paper: (..., C) -> (..., C)."""

    def __init__(self, config):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = config.dropout

    def forward(self, x):
        h = F.dropout(F.gelu(self.fc(x)), self.dropout, self.training)
        return F.dropout(self.proj(h), self.dropout, self.training)


class Block(nn.Module):
    """A pre-norm transformer block whose two residual updates are scaled by a gate."""

    def __init__(self, config):
        super().__init__()
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.ffn = FeedForward(config)

    def forward(self, x, gate=None, sparse=False, cache=None):
        """
        x (B, T, C), gate (B, T) -> (B, T, C). Without a gate, this is the plain block. If sparse, only the N tokens
        whose gate is not 0 run it (all have keys and values); for the same gates, the result is the same.
        """
        y, rows = x, None
        if sparse:
            rows = gate.nonzero(as_tuple=True)      # sequences and positions of the N tokens (a GPU has to wait here)
            if len(rows[0]) == 0:
                if cache is not None:               # later tokens may attend to these
                    cache.append(self.attn.key_value(self.ln1(x)))
                return x
            if len(rows[0]) == gate.numel():
                rows = None                         # all are open: nothing to gather
            else:
                y, gate = x[rows], gate[rows]                           # (N, C), (N,)
        h = self.ln1(x)
        kv = self.attn.key_value(h)     # of all tokens: those that run the block attend to those that skip it
        if cache is not None:
            kv = cache.append(kv)       # with those of earlier tokens, (B, S, 2C)
        if gate is None:
            x = x + self.attn(h, kv)
            return x + self.ffn(self.ln2(x))
        gate = gate.to(x.dtype).unsqueeze(-1)                           # (N, 1) or (B, T, 1)
        y = y + gate * self.attn(h, kv, rows)                           # equation (1)
        y = y + gate * self.ffn(self.ln2(y))                            # equation (2)
        return x.index_put(rows, y) if rows is not None else y


class Transformer(nn.Module):
    """The plain transformer, and the base class of the other models."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)       # also the output head (tied)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for embedding in (self.wte, self.wpe):
            nn.init.normal_(embedding.weight, std=0.02)
        # As in GPT-2: x is the sum of 2L updates, so each starts with 1 / (2L) of the variance. Unlike in GPT-2, other
        # linear layers keep PyTorch's initialization.
        for block in self.blocks:
            for linear in (block.attn.proj, block.ffn.proj):
                nn.init.normal_(linear.weight, std=0.02 / (2 * config.n_layer) ** 0.5)

    def embed(self, idx, cache=None):
        """idx (B, T) -> x (B, T, C), at the positions after those in the cache."""
        start = 0 if cache is None else cache.length
        end = start + idx.size(1)
        assert 0 < end <= self.config.block_size, f"{end} tokens, but the model takes 1 to {self.config.block_size}"
        x = self.wte(idx) + self.wpe.weight[start:end]
        return F.dropout(x, self.config.dropout, self.training)

    def norms(self):
        """The LayerNorm before the head if the model stopped after block 0, 1, ... (for early exit and sample.py)"""
        return [self.ln_f] * len(self.blocks)

    def head(self, h):
        return F.linear(h, self.wte.weight).float()

    def forward(self, idx, sparse=False, caches=None):
        """idx (B, T) -> logits (B, T, V), gates (L, B, T), float32. Plain: gates are 1, and `sparse` has no effect."""
        caches = caches or [None] * len(self.blocks)
        x = self.embed(idx, caches[0])
        for block, cache in zip(self.blocks, caches):
            x = block(x, cache=cache)
        return self.head(self.ln_f(x)), torch.ones(len(self.blocks), *idx.shape, device=idx.device)

    def loss(self, idx, targets):
        """idx, targets (B, T) -> the mean cross-entropy (train.py adds the depth loss) and the gates (L, B, T)."""
        logits, gates = self(idx)
        return token_loss(logits, targets).mean(), gates


def token_loss(logits, targets):
    """Cross-entropy of each token: (B, T, V), (B, T) -> (B, T)."""
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


class TSA(Transformer):
    """The paper's model: after every block but the last, a router computes the gate of the next block."""

    def __init__(self, config):
        assert config.n_layer > 1, "block 0 always runs, so skipping needs another block"
        super().__init__(config)
        self.routers = nn.ModuleList(GATES[config.gate](config) for _ in range(config.n_layer - 1))

    def forward(self, idx, sparse=False, caches=None):
        caches = caches or [None] * len(self.blocks)
        first, *others = self.blocks
        # No router precedes block 0, because x has no context yet.
        x = first(self.embed(idx, caches[0]), cache=caches[0])          # (B, T, C)
        ones = torch.ones(idx.shape, device=idx.device)
        gates, used = [ones], [ones]            # routers see `gates`, as in training; blocks get `used`
        for router, block, cache in zip(self.routers, others, caches[1:]):
            gate = router(x, gates)                                     # (B, T)
            gates.append(gate)
            used.append(router.sparse_gate(gate) if sparse else gate)
            assert used[-1].shape == idx.shape, f"a gate of shape {tuple(used[-1].shape)} instead of {tuple(idx.shape)}"
            x = block(x, used[-1], sparse, cache)
        return self.head(self.ln_f(x)), torch.stack(used)


class Exit(Transformer):
    """
    Early exit, the paper's baseline (Elbayad et al. 2020, arXiv 1910.10073). In training, every token runs all blocks,
    and the model predicts after each, with a LayerNorm per block and the tied head. In a sparse pass, a token exits
    once its largest probability exceeds config.confidence. As in the TSA paper, it cannot exit after block 0.
    """

    def __init__(self, config):
        assert config.n_layer > 1, "block 0 always runs, so an exit needs another block"
        super().__init__(config)
        self.exit_norms = nn.ModuleList(nn.LayerNorm(config.n_embd) for _ in range(config.n_layer - 1))

    def forward(self, idx, sparse=False, caches=None):
        if not sparse:
            return super().forward(idx, caches=caches)
        caches = caches or [None] * len(self.blocks)
        first, *others = self.blocks
        x = first(self.embed(idx, caches[0]), cache=caches[0])          # (B, T, C)
        running = torch.ones(idx.shape, device=idx.device)      # 1 until the token exits
        gates, logits = [running], torch.zeros(*idx.shape, self.config.vocab_size, device=idx.device)
        for block, norm, cache in zip(others, self.norms()[1:], caches[1:]):
            x = block(x, running, sparse, cache)
            gates.append(running)
            rows = running.nonzero(as_tuple=True)                       # the N tokens that ran the block
            prediction = self.head(norm(x[rows]))                       # (N, V)
            logits = logits.index_put(rows, prediction)
            unsure = prediction.softmax(-1).amax(-1) <= self.config.confidence
            running = running.index_put(rows, unsure.float())
        return logits, torch.stack(gates)

    def norms(self):
        return [*self.exit_norms, self.ln_f]

    def loss(self, idx, targets):
        """Return the mean of the cross-entropies after all L blocks, as in the TSA paper, and gates of 1."""
        x, total, L = self.embed(idx), 0, len(self.blocks)
        for block, norm in zip(self.blocks, self.norms()):
            x = block(x)
            total = total + token_loss(self.head(norm(x)), targets).mean()
        return total / L, torch.ones(L, *idx.shape, device=idx.device)


MODELS = {"plain": Transformer, "tsa": TSA, "exit": Exit}


# ----------------------------------------------------------------------------------------------------------------
# Checkpoints, what skipping saves, and generation.

def load_checkpoint(path, **changes):
    """
    Return the model of a checkpoint (or of the ckpt.pt in a folder), in eval mode on the CPU, and the saved dictionary.
    `changes` replace fields of its Config. Raise OSError or ValueError if it cannot be loaded.
    """
    path = Path(path, "ckpt.pt") if Path(path).is_dir() else path
    with open(path, "rb") as file:
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True)
            unknown = saved["config"].keys() - {field.name for field in fields(Config)}
            missing = {"model", "flags", "vocab", "prompt", "checksum"} - saved.keys()
            if unknown or missing or zipfile.ZipFile(file).testzip():   # torch does not verify checksums
                raise ValueError
        except Exception:       # torch raises many types, and some recommend an unsafe load
            raise ValueError(f"{path} is damaged or from another version of train.py") from None
    config = Config(**saved["config"] | changes)
    if config.model not in MODELS or (config.model == "tsa" and config.gate not in GATES):
        raise ValueError(f"{path}: tsa.py has no model {config.model} with gate {config.gate}")
    model = MODELS[config.model](config)
    try:
        model.load_state_dict(saved["model"])
    except RuntimeError:        # it lists all weights
        raise ValueError(f"{path} has other weights than {config.model} with gate {config.gate} in tsa.py") from None
    return model.eval(), saved


def multiply_adds(model, ran, T=None):
    """Multiply-adds per token if a fraction ran[l] of T tokens runs block l, and those of the plain model."""
    def size(module):           # of its matrices: one multiply-add per weight and token (vectors do not count)
        return sum(weight.numel() for weight in module.parameters() if weight.dim() > 1)

    attention = (T or model.config.block_size) * model.config.n_embd    # T / 2 keys on average, for score and value
    total = plain = size(model.wte)             # the head
    if isinstance(model, Exit):
        total *= sum(ran[1:])                   # it predicts after each block but the first
    elif isinstance(model, TSA):
        total += size(model.routers)
    for share, block in zip(ran, model.blocks):
        always = attention + size(block.attn.key_value)         # charged whether the token runs the block or not
        total += always + share * (size(block) - size(block.attn.key_value))
        plain += attention + size(block)
    return total, plain


class Cache:
    """The keys and values of the S tokens that a block has seen so far, in a buffer (B, block_size, 2C)."""

    def __init__(self, config, B, like):
        self.buffer, self.length = like.new_empty(B, config.block_size, 2 * config.n_embd), 0

    def append(self, kv):
        """kv (B, T, 2C) of T new tokens -> those of all S tokens (B, S, 2C)."""
        start, self.length = self.length, self.length + kv.size(1)
        self.buffer[:, start:self.length] = kv
        return self.buffer[:, :self.length]


@torch.inference_mode()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, sparse=True):
    """
    Continue idx (B, T). At each step, yield the new tokens (B, 1) and the gates (L, B) of those that predicted them.
    When the text outgrows the context, generation restarts from its last block_size // 2 tokens, at position 0.
    """
    block_size, caches = model.config.block_size, None
    for _ in range(max_new_tokens):
        if idx.size(1) > block_size:
            idx, caches = idx[:, -max(block_size // 2, 1):], None
        if caches is None:          # at the start, and when the context was full
            new, caches = idx, [Cache(model.config, len(idx), model.wte.weight) for _ in model.blocks]
        logits, gates = model(new, sparse, caches)
        logits = logits[:, -1] / max(temperature, 1e-6)                     # (B, V)
        if top_k is not None:
            smallest = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
            logits[logits < smallest] = -torch.inf
        new = torch.multinomial(F.softmax(logits, dim=-1), 1)               # (B, 1)
        idx = torch.cat([idx, new], dim=1)
        yield new, gates[:, :, -1]
