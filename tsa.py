"""
Token-Selective Attention (TSA) in one file: a character-level transformer in which a router decides, for every token,
how much each block changes it. From scratch, after "Adaptive Computation Depth via Learned Token Routing in
Transformers" (arXiv 2605.05222). Each token has a gate for each block but the first. It scales both updates of the
token's state x:

    x = x + gate * attn(ln1(x))                     (1)
    x = x + gate * ffn(ln2(x))                      (2)

After every block but the last, a router computes from x the "probability" p that the token skips the next block:

    p = sigmoid(W2 relu(W1 x + b1) + b2)            (3)
    gate = 1 - p                                    (4)

Nothing is sampled. A model with gates runs in two ways:

    model(idx)                  full: every block is computed for every token and scaled by its gate, as in training
    model(idx, sparse=True)     sparse: a token whose gate is 0 skips the block and keeps its x

A skip saves only about 80% of a block, because keys, values and attention scores are computed for all tokens.
Shapes: B sequences of T tokens, C = n_embd channels, nh heads of size hs = C / nh, V characters, L blocks. In a sparse
pass, N of the B * T tokens run a block. S tokens per sequence have keys and values: T, or more with a cache.
"""
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass
class Config:
    """The hyperparameters of a model. The defaults are small; `--preset paper` of train.py has the paper's sizes."""
    model: str = "tsa"          # a name in MODELS
    gate: str = "soft"          # tsa: a name in GATES
    gate_bias: float = -1.0     # tsa: initial b2 of equation (3); -1 starts the gates near 0.73
    halt: bool = False          # tsa: multiply each gate by those before it, so that it stays 0 once it is 0
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
    Computes the gate of the next block from the state after this one. A design is a subclass that overrides `gate`,
    `scale` or `sparse_gate`, and may have parameters and buffers of its own. A token's gate must not depend on other
    tokens: when the model generates text, x holds only the newest one.
    """

    def __init__(self, config):
        super().__init__()
        width = max(config.n_embd // 4, 16)
        self.fc = nn.Linear(config.n_embd, width)
        self.out = nn.Linear(width, 1)
        nn.init.constant_(self.out.bias, config.gate_bias)
        self.halt = config.halt

    def forward(self, x, gates, sparse=False):
        """x (B, T, C), gates [(B, T), ...] of blocks 0 (ones), 1, ... so far -> the gate of block len(gates) (B, T)."""
        scale = self.scale(x, gates)
        gate = self.sparse_gate(scale) if sparse else self.gate(scale)
        return gate * gates[-1] if self.halt else gate

    def scale(self, x, gates):
        """1 - p (B, T), see equation (3). It is computed in float32, because bfloat16 would round a p near 1 to 1."""
        return 1 - torch.sigmoid(self.out(F.relu(self.fc(x))).squeeze(-1).float())

    def gate(self, scale):
        """Equation (4). Evaluation calls this, too: a design with noise adds it only `if self.training`."""
        return scale

    def sparse_gate(self, scale):
        """The gate of a sparse pass: that of training, unless a design overrides it."""
        return self.gate(scale)


class Soft(Router):
    """The paper's design: the gate is the scale in training, and is rounded to 0 or 1 in a sparse pass."""
    def sparse_gate(self, scale):
        return (scale >= 0.5).float()


class Skip(Router):
    """The paper's gate, but a sparse pass zeroes only gates below 0.1."""
    def sparse_gate(self, scale):
        return scale * (scale >= 0.1)


class Stretch(Router):
    """A gate that is exactly 0 up to a scale of 1/7, and 1 from 6/7."""
    def gate(self, scale):
        return (1.4 * scale - 0.2).clamp(0, 1)          # hard concrete without noise (Louizos et al. 2018, 1712.01312)


class Straight(Router):
    """0 or 1 in the forward pass, with the scale's gradient in the backward pass (straight-through)."""
    def gate(self, scale):
        return (scale >= 0.5).float() + (scale - scale.detach())        # adds exactly 0, with the scale's gradient


GATES = {"soft": Soft, "skip": Skip, "stretch": Stretch, "straight": Straight}


class Attention(nn.Module):
    """Causal multi-head attention without biases. Queries may come from only some tokens, keys and values from all."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        assert C % config.n_head == 0, f"n_embd {C} is not divisible by n_head {config.n_head}"
        self.n_head, self.dropout = config.n_head, config.dropout
        self.query = nn.Linear(C, C, bias=False)
        self.key_value = nn.Linear(C, 2 * C, bias=False)
        self.proj = nn.Linear(C, C, bias=False)
        self.cache = None       # only in a step of generate(): [kv (B, block_size, 2C), the number of cached tokens]

    def keys_and_values(self, h):
        """h (B, T, C) -> the keys and values of all S tokens (B, S, 2C), including those in the cache."""
        kv = self.key_value(h)
        if self.cache is None:
            return kv
        buffer, start = self.cache
        end = start + kv.size(1)
        buffer[:, start:end] = kv
        self.cache[1] = end
        return buffer[:, :end]

    def forward(self, h, kv, rows=None):
        """h (B, T, C), keys and values kv (B, S, 2C) -> (B, T, C), or (N, C) for the N tokens of `rows` (see Block)."""
        B, T, C = h.shape
        q = self.query(h if rows is None else h[rows])
        if rows is not None:        # is_causal needs T queries, so the scores of tokens that skip are computed, too
            q = q.new_zeros(B, T, C).index_put(rows, q)
        q = q.view(B, T, self.n_head, -1).transpose(1, 2)                       # (B, nh, T, hs)
        k, v = kv.view(B, -1, 2, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, nh, S, hs) each
        assert T in (1, k.size(2)), "with a filled cache, pass one token at a time"      # is_causal assumes S = T
        dropout_p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=T > 1)
        y = y.transpose(1, 2).flatten(2)                                        # (B, T, C)
        return self.proj(y if rows is None else y[rows])


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

    def forward(self, x, gate=None, sparse=False):
        """
        x (B, T, C), gate (B, T) -> (B, T, C). Without a gate, this is the plain block. If sparse, only the N tokens
        whose gate is not 0 are computed: same gate, same result.
        """
        h = self.ln1(x)
        kv = self.attn.keys_and_values(h)       # of all tokens: those that run the block attend to those that skip it
        if gate is None:
            x = x + self.attn(h, kv)
            return x + self.ffn(self.ln2(x))
        if sparse:
            rows = gate.nonzero(as_tuple=True)      # sequences and positions of the N tokens, (N,) each
            if len(rows[0]) == 0:
                return x
            if len(rows[0]) < gate.numel():
                y, gate = x[rows], gate[rows].to(x.dtype).unsqueeze(-1)         # (N, C), (N, 1)
                y = y + gate * self.attn(h, kv, rows)                           # equation (1)
                y = y + gate * self.ffn(self.ln2(y))                            # equation (2)
                return x.index_put(rows, y)
        gate = gate.to(x.dtype).unsqueeze(-1)                                   # (B, T, 1)
        x = x + gate * self.attn(h, kv)                                         # equation (1)
        return x + gate * self.ffn(self.ln2(x))                                 # equation (2)


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
        # As in GPT-2: x is the sum of 2L updates, so each starts with 1 / (2L) of the variance. The other linear layers
        # keep PyTorch's initialization.
        for block in self.blocks:
            for linear in (block.attn.proj, block.ffn.proj):
                nn.init.normal_(linear.weight, std=0.02 / (2 * config.n_layer) ** 0.5)

    def embed(self, idx):
        """idx (B, T) -> x (B, T, C), at the positions after those in the cache."""
        T, cache = idx.size(1), self.blocks[0].attn.cache
        start = cache[1] if cache else 0
        assert 0 < start + T <= self.config.block_size, f"{start + T} tokens: at most {self.config.block_size} fit"
        x = self.wte(idx) + self.wpe.weight[start:start + T]
        return F.dropout(x, self.config.dropout, self.training)

    def head(self, h):
        return F.linear(h, self.wte.weight).float()

    def forward(self, idx, sparse=False):
        """idx (B, T) -> logits (B, T, V) and gates (L, B, T), both float32. In a plain model, all gates are 1."""
        x = self.embed(idx)
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x)), torch.ones(len(self.blocks), *idx.shape, device=idx.device)

    def loss(self, idx, targets):
        """idx, targets (B, T) -> the mean cross-entropy (without the depth loss) and the gates (L, B, T)."""
        logits, gates = self(idx)
        return token_loss(logits, targets).sum() / (targets >= 0).sum(), gates


def token_loss(logits, targets):
    """Cross-entropy of each token: (B, T, V), (B, T) -> (B, T). It is 0 where the target is -1 (not scored)."""
    return F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-1, reduction="none")


class TSA(Transformer):
    """The paper's model: after every block but the last, a router computes the gate of the next block."""

    def __init__(self, config):
        super().__init__(config)
        self.routers = nn.ModuleList(GATES[config.gate](config) for _ in range(config.n_layer - 1))

    def forward(self, idx, sparse=False):
        first, *others = self.blocks
        # Block 0 has no gate, because before it has run, x says nothing about the context.
        x = first(self.embed(idx))                                              # (B, T, C)
        gates = [torch.ones(idx.shape, device=idx.device)]
        for router, block in zip(self.routers, others):
            gates.append(router(x, gates, sparse))                              # (B, T)
            x = block(x, gates[-1], sparse)
        return self.head(self.ln_f(x)), torch.stack(gates)

    def depth_loss(self, gates):
        """The paper's depth loss, which `lam` weighs: gates (L, B, T) -> the mean gate of blocks 1, 2, ..."""
        return gates[1:].mean()


class Exit(Transformer):
    """
    Early exit, the paper's baseline (Elbayad et al. 2020, arXiv 1910.10073). In training, every token runs all blocks,
    and the model predicts after each, with a LayerNorm per block and the tied head. In a sparse pass, a token exits as
    soon as its largest probability exceeds config.confidence, but not after block 0, as in the TSA paper.
    """

    def __init__(self, config):
        super().__init__(config)
        self.exit_norms = nn.ModuleList(nn.LayerNorm(config.n_embd) for _ in range(config.n_layer - 1))

    def forward(self, idx, sparse=False):
        if not sparse:
            return super().forward(idx)
        first, *others = self.blocks
        gate = torch.ones(idx.shape, device=idx.device)         # 1 until the token exits
        x, gates, logits = first(self.embed(idx)), [gate], 0
        # Norm l follows block l. No token exits after block 0, so exit_norms[0] serves only in training.
        for block, norm in zip(others, [*self.exit_norms[1:], self.ln_f]):
            x = block(x, gate, sparse=True)
            gates.append(gate)
            prediction = self.head(norm(x))                                     # (B, T, V)
            logits = torch.where(gate.unsqueeze(-1) != 0, prediction, logits)   # others keep theirs
            gate = gate * (prediction.softmax(-1).amax(-1) <= self.config.confidence)
        return logits, torch.stack(gates)

    def loss(self, idx, targets):
        """Return the mean of the cross-entropies of the L predictions, as in the paper, and gates of 1."""
        x, total, L = self.embed(idx), 0, len(self.blocks)
        for block, norm in zip(self.blocks, [*self.exit_norms, self.ln_f]):
            x = block(x)
            total = total + token_loss(self.head(norm(x)), targets).sum()
        return total / L / (targets >= 0).sum(), torch.ones(L, *idx.shape, device=idx.device)


MODELS = {"plain": Transformer, "tsa": TSA, "exit": Exit}


# ----------------------------------------------------------------------------------------------------------------
# Checkpoints, what skipping saves, and generation. You can skip this part on a first reading.

def load_checkpoint(path, **changes):
    """
    Return the model of a checkpoint (or of the ckpt.pt in a folder), in eval mode on the CPU, and the saved dictionary.
    `changes` replace fields of its Config, such as gate. Raise OSError or ValueError if that fails.
    """
    path = Path(path, "ckpt.pt") if Path(path).is_dir() else path
    with open(path, "rb") as file:
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True)
            config, state = Config(**saved["config"] | changes), saved["model"]
            # A checkpoint is a zip archive, whose checksums torch does not verify.
            if zipfile.ZipFile(file).testzip() or not {"vocab", "prompt", "flags"} <= saved.keys():
                raise ValueError
        except Exception:       # torch raises many kinds, and recommends an unsafe load
            raise ValueError(f"{path} is damaged or from another version of train.py") from None
    if config.model not in MODELS or config.gate not in GATES:
        raise ValueError(f"{path}: there is no model {config.model} with gate {config.gate} in tsa.py")
    model = MODELS[config.model](config)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:       # it lists the weights, on several lines
        raise ValueError(f"{path} does not fit tsa.py: {' '.join(str(error).split())}") from None
    return model.eval(), saved


def multiply_adds(model, ran, T=None):
    """Multiply-adds per token in a pass over T tokens (default: block_size), if a fraction ran[l] runs block l."""
    def size(*modules):         # of their matrices: one multiply-add per weight and token (vectors do not count)
        return sum(weight.numel() for module in modules for weight in module.parameters() if weight.dim() == 2)

    T, head = T or model.config.block_size, size(model.wte)
    total = head + size(*getattr(model, "routers", []))
    for share, block in zip(ran, model.blocks):
        # All tokens: keys and values, and attention to T / 2 keys on average (2C each, for the score and the value)
        key_value = size(block.attn.key_value)
        total += key_value + T * model.config.n_embd + share * (size(block) - key_value)
    if isinstance(model, Exit):
        total += (len(ran) - 2) * head                      # predictions of all tokens after blocks 1 to L - 2
    return total


def saving(model, ran, T=None):
    """The fraction of a plain model's multiply-adds that skipping saves (negative if the routers cost more)."""
    with torch.device("meta"):                              # without memory for its weights
        plain = Transformer(model.config)
    return 1 - multiply_adds(model, ran, T) / multiply_adds(plain, [1] * len(ran), T)


@torch.inference_mode()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, sparse=True):
    """
    Continue idx (B, T). For each step, yield the new tokens (B, 1) and the gates (L, B) of those that predicted them.
    When the text outgrows the context, generation restarts from its last block_size // 2 tokens, at position 0.
    """
    block_size, caches = model.config.block_size, None
    for _ in range(max_new_tokens):
        if idx.size(1) > block_size:
            idx, caches = idx[:, -max(block_size // 2, 1):], None
        if caches is None:          # at the start, and when the context was full
            new, kv = idx, model.wte.weight.new_empty(len(model.blocks), len(idx), block_size, 2 * model.config.n_embd)
            caches = [[buffer, 0] for buffer in kv]
        try:
            for block, cache in zip(model.blocks, caches):
                block.attn.cache = cache
            logits, gates = model(new, sparse)
        finally:
            for block in model.blocks:
                block.attn.cache = None
        logits = logits[:, -1] / max(temperature, 1e-6)                     # (B, V)
        if top_k is not None:
            smallest = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
            logits[logits < smallest] = -torch.inf
        new = torch.multinomial(F.softmax(logits, dim=-1), 1)               # (B, 1)
        idx = torch.cat([idx, new], dim=1)
        yield new, gates[:, :, -1]
