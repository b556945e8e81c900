"""
Token-Selective Attention (TSA) in one file: a character-level transformer in which a token can skip blocks (layers). It
implements "Adaptive Computation Depth via Learned Token Routing in Transformers" (arXiv 2605.05222).

Before every block but the first, a router gives each token a gate between 0 and 1. The gate scales both updates that
the block makes to the token's state x:

    x = x + gate * attn(ln1(x))                     (1)
    x = x + gate * ffn(ln2(x))                      (2)

From x, the router computes a "probability" p of skipping the block. It is never sampled; 1 - p is just a factor:

    p = sigmoid(W2 relu(W1 x + b1) + b2)            (3)
    gate = 1 - p                                    (4)

A model with gates runs in two ways:

    model(idx)                  full: all tokens run all blocks, and their gates scale the updates, as in training
    model(idx, sparse=True)     sparse: a token whose gate is exactly 0 skips the block and keeps its x

Equation (4) almost never gives exactly 0. The designs in GATES differ in how they get zeros.

Where to start: GATES has the gate designs, TSA.forward calls their routers, and Block.forward scales and skips.
train.py adds lambda times Router.depth_loss to the loss, which pushes gates toward 0.

Shapes: B sequences of T tokens, C = n_embd channels, nh heads of size hs = C / nh, V characters, L blocks. In a sparse
pass, N of the B * T tokens run a block. Attention sees S keys and values per sequence: T, or more with a cache.
"""
import io
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass
class Config:
    """The hyperparameters of a model. A field that you add (bool, int, float or str) becomes a flag of train.py."""
    model: str = "tsa"          # a name in MODELS
    gate: str = "skip"          # tsa: a name in GATES
    gate_bias: float = -1.0     # tsa: initial b2 of equation (3): 1 - p starts near 0.73 at -1, lower at a larger b2
    halt: bool = False          # tsa: multiply each gate by the previous one, so that it stays 0 once it is 0
    confidence: float = 0.9     # exit: a token exits once its top probability exceeds this
    vocab_size: int = 65
    block_size: int = 64        # context length in tokens (nanoGPT's name; not a Block, which is a layer)
    n_layer: int = 6
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0


# ----------------------------------------------------------------------------------------------------------------
# Gates: the place to experiment. Add a design, give it a name in GATES, and train it with --gate NAME.

class Router(nn.Module):
    """
    Gives each token its gate for the next block. To write a design, derive from GateMLP (the paper's router) and
    override `gate`, `sparse_gate`, or `depth_loss`, or derive from Router and define `scale(x, gates)`, which replaces
    1 - p. A token's gate must depend only on its own x and gates: in generation, x may hold only the newest token.
    """

    def __init__(self, config):
        super().__init__()
        self.halt = config.halt

    def forward(self, x, gates):
        """x (B, T, C), all earlier blocks' gates (a list of (B, T), before sparse_gate) -> the next block's (B, T)."""
        gate = self.gate(self.scale(x, gates).float())          # float32 in training with bfloat16, too
        return gate * gates[-1] if self.halt else gate

    def scale(self, x, gates):
        """x and gates as above -> (B, T)."""
        raise NotImplementedError

    def gate(self, scale):
        """
        Turn the scale (B, T) into the gate of a full pass, between 0 and 1 (by default, the scale itself). Add noise
        only `if self.training`. A block whose gates are all clamped to 0 gets no gradient and rarely opens again.
        """
        return scale

    def sparse_gate(self, gate):
        """Turn a gate into that of a sparse pass (by default, itself); exactly 0 skips. Not used to train."""
        return gate

    def depth_loss(self, gates):
        """What lambda multiplies: by default, the mean of the gates (L - 1, B, T). Called on the first router only."""
        return gates.mean()


class GateMLP(Router):
    """The paper's router, a two-layer MLP."""

    def __init__(self, config):
        super().__init__(config)
        width = max(config.n_embd // 4, 16)
        self.fc = nn.Linear(config.n_embd, width)
        self.out = nn.Linear(width, 1)
        nn.init.constant_(self.out.bias, config.gate_bias)

    def scale(self, x, gates):
        """1 - p (B, T), equations (3) and (4). In float32: bfloat16 rounds a p of 0.999 to 1, and the gate to 0."""
        return 1 - torch.sigmoid(self.out(F.relu(self.fc(x))).squeeze(-1).float())


class Soft(GateMLP):
    """The paper's design: trained as 1 - p, but rounded to 0 or 1 in a sparse pass."""
    def sparse_gate(self, gate):
        return (gate >= 0.5).float()


class Skip(GateMLP):
    """Trained like Soft. A sparse pass sets gates below 0.1 to 0 and leaves the others unchanged."""
    def sparse_gate(self, gate):
        return gate * (gate >= 0.1)


class Stretch(GateMLP):
    """The scale, stretched and clamped: exactly 0 up to a scale of 1/7, exactly 1 from 6/7. The same in all passes."""
    def gate(self, scale):
        return (1.4 * scale - 0.2).clamp(0, 1)          # like hard concrete (Louizos et al. 2018, 1712.01312)


class Straight(GateMLP):
    """Always 0 or 1, trained as if its gradient were that of the scale (straight-through). The same in all passes."""
    def gate(self, scale):
        return (scale >= 0.5).float() + (scale - scale.detach())        # the last term is 0, with the scale's gradient


GATES = {"soft": Soft, "skip": Skip, "stretch": Stretch, "straight": Straight}


class Attention(nn.Module):
    """Causal multi-head attention without biases or output dropout. In a sparse pass, only N tokens have queries."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head, self.dropout = config.n_head, config.dropout
        self.query = nn.Linear(C, C, bias=False)
        self.key_value = nn.Linear(C, 2 * C, bias=False)
        self.proj = nn.Linear(C, C, bias=False)

    def forward(self, h, kv, rows=None):
        """
        h (B, T, C), keys and values kv (B, S, 2C) -> (B, T, C). If only N tokens run the block, `rows` (N,) are their
        places among the B * T tokens, and only their outputs are returned: (N, C).
        """
        if rows is None:
            return self.proj(self.attend(self.query(h), kv))
        return self.proj(self.attend_rows(self.query(select(h, rows)), kv, rows, *h.shape[:2]))

    def attend(self, q, kv, mask=None):
        """q (B, n, C), kv (B, S, 2C) -> (B, n, C). Without a mask, query i attends to keys 0 to i (n = 1: to all)."""
        n = q.size(1)
        assert mask is not None or n in (1, kv.size(1)), "with tokens in the cache, pass one at a time"
        k, v = kv.chunk(2, dim=-1)                                      # (B, S, C) each
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in (q, k, v))  # (B, nh, n or S, hs)
        dropout_p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal=mask is None and n > 1)
        return y.transpose(1, 2).flatten(-2)

    def attend_rows(self, q, kv, rows, B, T):
        """
        The same for queries q (N, C) of N of the B * T tokens. The kernel wants equally many in each sequence; which of
        three ways to get them is fastest was measured on a CPU. Skip this on a first reading.
        """
        if T == 1 and 3 * len(rows) < B:        # generation (a row is a sequence), and few run: a batch of these alone
            return self.attend(q.unsqueeze(1), kv[rows]).squeeze(1)
        if T > 1 and B * T >= 256 and 2 * len(rows) < B * T:    # most of many tokens skip: pack the queries
            slots, n, mask = pack(rows, B, T)
        else:                                   # each query at its own position, and zeros at all others
            slots, n, mask = rows, T, None
        q = q.new_zeros(B * n, q.size(1)).index_copy_(0, slots, q).view(B, n, -1)
        return select(self.attend(q, kv, mask), slots)


def select(x, rows):
    """The N of B * T tokens whose places are `rows` (N,): (B, T, ...) -> (N, ...)."""
    return x.flatten(0, 1).index_select(0, rows)


def pack(rows, B, T):
    """
    Move the queries of the N tokens `rows` (ascending) to the front of their sequences: if sequence a has the gates
    0 0 1 0, and b has 0 1 0 1, then rows are 2, 5, 7, and the queries become [a2 -] and [b1 b3]. Return the place of
    each query among these B * n slots (here 0, 2, 3), the largest number n of queries in a sequence (here 2), and the
    causal mask (B, 1, n, T).
    """
    b, t = rows // T, rows % T                                          # (N,), sequences and positions
    count = torch.bincount(b, minlength=B)                              # (B,), queries in each sequence
    first = count.cumsum(0) - count                                     # (B,), where they begin among the N
    n = count.max().item()
    slots = b * n + torch.arange(len(rows), device=rows.device) - first[b]      # (N,)
    # Empty slots keep position 0, so they attend to token 0: the softmax of no scores would be nan.
    position = rows.new_zeros(B * n).index_copy_(0, slots, t)           # (B * n,)
    mask = position.view(B, 1, n, 1) >= torch.arange(T, device=rows.device)
    return slots, n, mask


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
        whose gate is not 0 run the block, though all tokens have keys and values. With the same gates, a full and a
        sparse pass give the same result. A Cache holds the keys and values of earlier tokens.
        """
        rows = gate.flatten().nonzero().squeeze(1) if sparse else None      # (N,), indices into the B * T tokens
        if sparse and len(rows) == 0:           # no token runs the block, but later ones may attend to these
            if cache is not None:
                cache.append(self.attn.key_value(self.ln1(x)))
            return x
        h = self.ln1(x)
        kv = self.attn.key_value(h)     # of all tokens: those that run the block attend to those that skip it
        if cache is not None:
            kv = cache.append(kv)       # with those of earlier tokens, (B, S, 2C)
        if gate is None:
            x = x + self.attn(h, kv)
            return x + self.ffn(self.ln2(x))
        gate = gate.to(x.dtype).unsqueeze(-1)                           # (B, T, 1)
        if rows is None or len(rows) == gate.numel():           # all tokens run the block
            x = x + gate * self.attn(h, kv)                             # equation (1)
            return x + gate * self.ffn(self.ln2(x))                     # equation (2)
        y, gate = select(x, rows), select(gate, rows)                   # (N, C), (N, 1)
        y = y + gate * self.attn(h, kv, rows)                           # the same equations
        y = y + gate * self.ffn(self.ln2(y))
        return x.flatten(0, 1).index_copy(0, rows, y).view_as(x)


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
        """The LayerNorm before the head if the model stops after block 0, 1, ... (for Exit and sample.py)."""
        return [self.ln_f] * len(self.blocks)

    def head(self, h):
        """A normalized state h (..., C) -> logits (..., V), float32."""
        return F.linear(h, self.wte.weight).float()

    def forward(self, idx, sparse=False, caches=None):
        """
        idx (B, T) -> logits (B, T, V) and gates (L, B, T), both float32. `caches`, one per block, hold the keys and
        values of earlier tokens and get those of idx. In a plain model, gates are 1, and `sparse` has no effect.
        """
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
    """The paper's model: before every block but the first, a router computes its gate."""

    def __init__(self, config):
        assert config.n_layer > 1, "block 0 always runs, so skipping needs another block"
        super().__init__(config)
        self.routers = nn.ModuleList(GATES[config.gate](config) for _ in range(config.n_layer - 1))

    def forward(self, idx, sparse=False, caches=None):
        """As in Transformer. The gates returned are those that the blocks got; block 0 has gates of 1."""
        caches = caches or [None] * len(self.blocks)
        first, *others = self.blocks
        # Block 0 always runs: before it, x holds only the token and its position, not its context.
        x = first(self.embed(idx, caches[0]), cache=caches[0])          # (B, T, C)
        ones = torch.ones(idx.shape, device=idx.device)
        gates = [ones]          # what routers see and --halt multiplies: before sparse_gate
        used = [ones]           # what blocks get: after it
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
    once its largest probability exceeds config.confidence, but, as in the TSA paper, never after block 0.
    """

    def __init__(self, config):
        assert config.n_layer > 1, "block 0 always runs, so an exit needs another block"
        super().__init__(config)
        self.exit_norms = nn.ModuleList(nn.LayerNorm(config.n_embd) for _ in range(config.n_layer - 1))

    def forward(self, idx, sparse=False, caches=None):
        """As in Transformer. In a sparse pass, gates are 1 in the blocks that a token runs and 0 after it exits."""
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
            where = running.nonzero(as_tuple=True)                      # the N tokens that ran the block
            prediction = self.head(norm(x[where]))                      # (N, V)
            logits[where] = prediction
            unsure = prediction.softmax(-1).amax(-1) <= self.config.confidence
            running = running.index_put(where, unsure.float())
        return logits, torch.stack(gates)

    def norms(self):
        return [*self.exit_norms, self.ln_f]

    def loss(self, idx, targets):
        """Predict after each block. Return the mean of the L cross-entropies, as in the TSA paper, and gates of 1."""
        x, total, L = self.embed(idx), 0, len(self.blocks)
        for block, norm in zip(self.blocks, self.norms()):
            x = block(x)
            total = total + token_loss(self.head(norm(x)), targets).mean()
        return total / L, torch.ones(L, *idx.shape, device=idx.device)


MODELS = {"plain": Transformer, "tsa": TSA, "exit": Exit}


# ----------------------------------------------------------------------------------------------------------------
# Loading checkpoints, counting multiply-adds, and generating text.

def load_checkpoint(path, **changes):
    """
    Load a checkpoint (a file, or a folder with a ckpt.pt). Return the model, in eval mode on the CPU, and the saved
    dictionary. `changes` override fields of its Config. Raise OSError or ValueError if it cannot be loaded.
    """
    path = Path(path, "ckpt.pt") if Path(path).is_dir() else path
    file = io.BytesIO(Path(path).read_bytes())          # on Windows, train.py cannot replace a file that is open
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        kinds = dict(model=dict, config=dict, flags=dict, vocab=str, prompt=str, checksum=int)
        wrong = [name for name, kind in kinds.items() if not isinstance(saved[name], kind)]
        if wrong or zipfile.ZipFile(file).testzip():            # torch does not verify checksums
            raise ValueError
        config = Config(**saved["config"])
    except Exception:       # of many types; some messages recommend an unsafe load
        raise ValueError(f"{path} is damaged or from another version of tsa.py or train.py") from None
    config = replace(config, **changes)
    if config.model not in MODELS or (config.model == "tsa" and config.gate not in GATES):
        raise ValueError(f"{path}: tsa.py has no model {config.model} with gate {config.gate}")
    model = MODELS[config.model](config)
    try:
        model.load_state_dict(saved["model"])
    except RuntimeError:        # it lists all weights
        raise ValueError(f"{path}: its weights do not fit {config.model} with gate {config.gate} in tsa.py") from None
    return model.eval(), saved


def multiply_adds(model, ran, T=None):
    """
    Return the multiply-adds per token of a sparse pass over T tokens in which a fraction ran[l] runs block l, and those
    of a plain model with as many blocks. Only products with weights, and attention, are counted.
    """
    def size(module):           # weights in matrices: each makes one multiply-add per token
        return sum(weight.numel() for weight in module.parameters() if weight.dim() > 1)

    # A token attends to T / 2 keys on average: C multiply-adds for each score and C for each value.
    attention = (T or model.config.block_size) * model.config.n_embd
    total = plain = size(model.wte)             # the head
    if isinstance(model, Exit):
        total *= sum(ran[1:])                   # it predicts after each block but the first
    elif isinstance(model, TSA):
        total += size(model.routers)
    for share, block in zip(ran, model.blocks):
        # Charged even if the token skips the block: its key and value (others attend to it) and, as an upper bound,
        # its attention. A skip saves the other 10 C^2: query, attn.proj, and ffn.
        key_value = size(block.attn.key_value)
        total += attention + key_value + share * (size(block) - key_value)
        plain += attention + size(block)
    return total, plain


class Cache:
    """The keys and values of the S tokens that a block has seen so far, including those that skipped it."""

    def __init__(self, config, B, like):
        self.buffer, self.length = like.new_empty(B, config.block_size, 2 * config.n_embd), 0       # dtype of `like`

    def append(self, kv):
        """kv (B, T, 2C) of T new tokens -> those of all S tokens (B, S, 2C)."""
        start, self.length = self.length, self.length + kv.size(1)
        self.buffer[:, start:self.length] = kv
        return self.buffer[:, :self.length]


@torch.inference_mode()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, sparse=True):
    """
    Continue idx (B, T) with a model in eval mode. At each step, yield the new tokens (B, 1) and the gates (L, B) of the
    tokens that predicted them. When the text outgrows the context, only its last block_size // 2 tokens are kept.
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
