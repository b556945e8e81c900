"""
Token-Selective Attention (TSA): a character-level transformer in which a router decides, for every token, how much each
block changes it.

A from-scratch implementation of "Adaptive Computation Depth via Learned Token Routing in Transformers" (arXiv
2605.05222). Each token has a gate for each block. The gate scales both updates of the token's state x:

    x = x + gate * attn(ln1(x))                                                       (1)
    x = x + gate * ffn(ln2(x))                                                        (2)

After every block but the last, a router computes from x the probability p that the token skips the next block:

    p = sigmoid(W2 relu(W1 x + b1) + b2)                                              (3)
    gate = 1 - p                                                                      (4)

Nothing is sampled: the gate is computed from p. Every model runs in two ways:

    model(idx)                  full: every block is computed for every token, scaled by the training gates, if any
    model(idx, sparse=True)     sparse: a token whose inference gate is 0 skips the block and keeps its x

Other tokens still attend to the keys and values of a token that skips, so a skipped block is cheap, but not free.

Shapes: B sequences of T tokens, C = n_embd channels, nh heads of size hs = C / nh, V characters, L blocks; S tokens in
the KV cache, n tokens that run a block.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass
class Config:
    """The hyperparameters of a model. The defaults are the paper's for Tiny-Shakespeare."""
    model: str = "tsa"          # a name in MODELS
    gate: str = "soft"          # tsa: a name in GATES
    gate_bias: float = -1.0     # tsa, halt: initial b2 of equation (3); at -1 the gates start near 0.73
    threshold: float = 0.5      # tsa, halt: skip or halt above this p; exit: exit above this confidence
    vocab_size: int = 65
    block_size: int = 128       # maximum sequence length
    n_layer: int = 6
    n_head: int = 8
    n_embd: int = 256
    dropout: float = 0.1

    def __post_init__(self):
        if self.gate not in GATES:
            raise ValueError(f"unknown gate {self.gate!r}: choose one of {', '.join(GATES)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        # One block must be skippable, except in the plain model.
        min_layers = {"plain": 1, "exit": Exit.FIRST + 2}.get(self.model, 2)
        if self.n_layer < min_layers:
            raise ValueError(f"model {self.model!r} needs n_layer {min_layers} or more")


# ----------------------------------------------------------------------------------------------------------------
# Gate designs: the place to experiment. A design is a pair of functions of the router's p (B, T) and the threshold. The
# first returns the gate for training, the second the gate for inference. Both return floats; a gradient must flow
# through the first.

def soft(p, threshold):
    """The paper's gate in training, equation (4): a scale."""
    return 1 - p

def binary(p, threshold):
    """The paper's gate at inference: a switch."""
    return (p <= threshold).float()

def skip(p, threshold):
    """Like the soft gate, except that tokens whose p exceeds the threshold skip. Use a threshold near 0.9."""
    return (1 - p) * (p <= threshold)

GATES = {"soft": (soft, binary), "skip": (soft, skip)}      # name: (training gate, inference gate)


class Router(nn.Module):
    """The router, equation (3): x (..., C) -> p (...), the probability of skipping the next block, or of halting."""

    def __init__(self, config):
        super().__init__()
        width = max(config.n_embd // 4, 16)
        self.fc = nn.Linear(config.n_embd, width)
        self.out = nn.Linear(width, 1)
        nn.init.constant_(self.out.bias, config.gate_bias)

    def logit(self, x):
        # float32 from here on, because 1 - p would round to 0 in bfloat16 when p is near 1.
        return self.out(F.relu(self.fc(x))).squeeze(-1).float()

    def forward(self, x):
        return torch.sigmoid(self.logit(x))


# ----------------------------------------------------------------------------------------------------------------
# The block

class Attention(nn.Module):
    """Causal multi-head attention without biases. Queries may come from only some tokens, keys and values from all."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head, self.block_size, self.dropout = config.n_head, config.block_size, config.dropout
        self.query = nn.Linear(C, C, bias=False)            # a token that skips the block needs none
        self.key_value = nn.Linear(C, 2 * C, bias=False)
        self.proj = nn.Linear(C, C, bias=False)

    def keys_values(self, h, cache=None):
        """
        h (B, T, C) -> keys and values (B, T, 2C); with a cache, those of all S tokens so far (B, S, 2C). The cache maps
        an attention layer to a buffer (B, block_size, 2C) and the number of tokens in it.
        """
        kv = self.key_value(h)
        if cache is None:
            return kv
        B, T, _ = kv.shape
        buffer, start = cache[self] if self in cache else (kv.new_empty(B, self.block_size, kv.size(-1)), 0)
        buffer[:, start:start + T] = kv
        cache[self] = buffer, start + T
        return buffer[:, :start + T]

    def forward(self, h, kv, at=None):
        """
        Queries from h (B, n, C), keys and values kv (B, S, 2C) -> (B, n, C). `at` (B, n) gives the positions of the
        queries. Without it, h must hold all S tokens in order, or only the newest one.
        """
        B, n, C = h.shape
        q = self.query(h).view(B, n, self.n_head, -1).transpose(1, 2)                      # (B, nh, n, hs)
        k, v = kv.view(B, -1, 2, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)     # (B, nh, S, hs) each
        # A query at position i attends to the keys at positions 0 to i.
        mask = None if at is None else at[:, None, :, None] >= torch.arange(k.size(2), device=at.device)
        dropout_p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal=at is None and n > 1)
        return self.proj(y.transpose(1, 2).flatten(2))


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

    def forward(self, x, gate=None, sparse=False, cache=None, source=None):
        """
        x (B, T, C), gate (B, T) -> (B, T, C). Without a gate, this is the plain block. If sparse, gather the tokens
        whose gate is not 0, compute only those, and scatter them back, which gives the same result as scaling. Keys and
        values are computed from `source` (B, T, C), which defaults to x; only Halt passes another.
        """
        h = self.ln1(x)
        # Keys and values of all tokens, because others attend to those that skip.
        kv = self.attn.keys_values(h if source is None else self.ln1(source), cache)
        if gate is None:
            x = x + self.attn(h, kv)
            return x + self.ffn(self.ln2(x))

        at, x_all = None, x
        if sparse:
            assert not self.training, "call eval() first: skipping would change the dropout"
            n = max(gate.count_nonzero(1).tolist())     # the largest number of open gates in any sequence
            if n == 0:
                return x        # keys and values are already in the cache, if there is one
            if n < x.size(1):
                # Gather n tokens from each sequence: a sort puts the positions of open gates first, and the rest of
                # the row is padding. Padding comes back unchanged, because its gate is 0.
                #
                #     gate  0 1 1 0    at  1 2    gate.gather(1, at)  1 1
                #           1 0 0 0        0 1                        1 0    <- position 1 is padding
                at = (gate != 0).int().argsort(dim=1, descending=True, stable=True)[:, :n]     # (B, n)
                pick = at.unsqueeze(-1).expand(-1, -1, x.size(-1))                             # (B, n, C)
                x, h, gate = x.gather(1, pick), h.gather(1, pick), gate.gather(1, at)
        gate = gate.to(x.dtype).unsqueeze(-1)           # (B, T, 1), or (B, n, 1) if tokens were gathered
        x = x + gate * self.attn(h, kv, at)                                                # equation (1)
        x = x + gate * self.ffn(self.ln2(x))                                               # equation (2)
        return x if at is None else x_all.scatter(1, pick, x)


# ----------------------------------------------------------------------------------------------------------------
# The plain transformer and the paper's model

def token_loss(logits, targets):
    """Cross-entropy of each token: (B, T, V), (B, T) -> (B, T). It is 0 where the target is -1 (not scored)."""
    return F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-1, reduction="none")


class Transformer(nn.Module):
    """The plain transformer. The other models share its loop over the blocks."""

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

    def forward(self, idx, sparse=False, cache=None):
        """
        idx (B, T) -> logits (B, T, V) and gates (L, B, T), both float32; the gate of a plain block counts as 1. `cache`
        is a dictionary, empty at first. The first call may pass any number of tokens, later calls only one.
        """
        x, gate, gates = self.embed(idx, cache), None, []
        for l, block in enumerate(self.blocks):
            if l > 0:       # block 0 has no gate, because before it has run, x says nothing about the context
                gate = self.next_gate(l, x, gates[-1], sparse)
            x = block(x, gate, sparse, cache)
            gates.append(torch.ones(idx.shape, device=idx.device) if gate is None else gate)
        gates = torch.stack(gates)
        return self.predict(x, gates), gates

    def embed(self, idx, cache=None):
        """Embed idx (B, T) as (B, T, C), at the positions that follow those in the cache."""
        start, T = cache[self.blocks[0].attn][1] if cache else 0, idx.size(1)
        assert start == 0 or T == 1, "once the cache holds tokens, it accepts one token at a time"
        if not 0 < start + T <= self.config.block_size:
            raise ValueError(f"{start + T} tokens: the model accepts 1 to {self.config.block_size} (block_size)")
        x = self.wte(idx) + self.wpe.weight[start:start + T]
        return F.dropout(x, self.config.dropout, self.training)

    def next_gate(self, l, x, gate, sparse):
        """
        The gate (B, T) of block l, from the output x (B, T, C) and the gate (B, T) of block l - 1. None means a plain
        block.
        """
        return None

    def predict(self, x, gates):
        """The output x (B, T, C) of the last block, and the gates (L, B, T) that led to it -> logits (B, T, V)."""
        return self.head(self.ln_f(x))

    def head(self, h):
        return F.linear(h, self.wte.weight).float()

    def loss(self, idx, targets):
        """idx, targets (B, T) -> the task loss (mean over the scored tokens) and the gates (L, B, T)."""
        logits, gates = self(idx)
        return token_loss(logits, targets).sum() / (targets >= 0).sum(), gates


class TSA(Transformer):
    """The paper's model: after every block but the last, a router computes the gate of the next block."""

    def __init__(self, config):
        super().__init__(config)
        self.routers = nn.ModuleList(Router(config) for _ in range(config.n_layer - 1))

    def next_gate(self, l, x, gate, sparse):
        training_gate, inference_gate = GATES[self.config.gate]
        make_gate = inference_gate if sparse else training_gate
        return make_gate(self.routers[l - 1](x), self.config.threshold)


# ----------------------------------------------------------------------------------------------------------------
# Early exit (the baseline) and halting (our own model). In both, a token that has stopped runs no more blocks.

class Exit(Transformer):
    """
    Early exit (Elbayad et al. 2020, arXiv 1910.10073), the paper's baseline. In training, every token runs all blocks,
    and the model predicts after each, with a LayerNorm per block and the tied head. In a sparse pass, a token exits as
    soon as its largest softmax probability exceeds the threshold, and the LayerNorm of that block gives its logits.
    """
    FIRST = 1       # the first block after which a token may exit, as in the TSA paper

    def __init__(self, config):
        super().__init__(config)
        # One LayerNorm per block but the last, which has ln_f
        self.exit_norms = nn.ModuleList(nn.LayerNorm(config.n_embd) for _ in range(config.n_layer - 1))

    def next_gate(self, l, x, gate, sparse):
        if not sparse or l <= self.FIRST:       # the exit after block FIRST closes the gate of block FIRST + 1
            return None
        confidence = F.softmax(self.head(self.exit_norms[l - 1](x)), dim=-1).amax(-1)      # (B, T)
        return gate * (confidence <= self.config.threshold)     # a token that has exited has a gate of 0 already

    def predict(self, x, gates):
        h = self.ln_f(x)
        last = gates.sum(0) - 1         # (B, T): a token's gates are 1s, then 0s, so this is the last block that it ran
        for l, norm in enumerate(self.exit_norms):
            h = torch.where((last == l).unsqueeze(-1), norm(x), h)
        return self.head(h)

    def loss(self, idx, targets):
        """Return the mean of the cross-entropies after each of the L blocks (as in the TSA paper) and gates of 1."""
        x, total, L = self.embed(idx), 0, len(self.blocks)
        for block, norm in zip(self.blocks, [*self.exit_norms, self.ln_f]):
            x = block(x)
            total = total + token_loss(self.head(norm(x)), targets).sum()
        return total / L / (targets >= 0).sum(), torch.ones(L, *idx.shape, device=idx.device)


class Halt(TSA):
    """
    Our own model: a token runs block after block until one of TSA's routers halts it. p_l is the probability of halting
    after block l (1 after the last), so a token reaches block l with probability survive_l = (1 - p_0)...(1 - p_{l-1}).
    Let CE_l be the cross-entropy of the prediction from x after block l. Training minimizes

        HALT_SHARE  * sum over l of survive_l p_l CE_l      predict well at the block where the token halts
      + EVERY_SHARE * mean of CE_l over l > 0               train the blocks that few tokens reach
      + LAST_SHARE  * CE_{L-1}                              make the late blocks worth reaching
      - BARRIER     * sum over l < L-1 of log(p_l (1-p_l))  keep p from sticking at 0 or 1
      + lam         * mean of survive_l over l > 0          depth penalty (added in train.py)                   (5)

    The first three terms are means over the scored tokens, the last two over all tokens. The first is the expected loss
    of PonderNet (Banino et al. 2021, arXiv 2107.05407). In a sparse pass, a token halts at the first p above the
    threshold. One LayerNorm, ln_f, serves all blocks; a LayerNorm per block, as in Exit, gains almost nothing.
    """
    HALT_SHARE, EVERY_SHARE, LAST_SHARE, BARRIER = 0.2, 0.05, 0.75, 1e-4

    def next_gate(self, l, x, gate, sparse):        # called only in a sparse pass
        return gate * (self.routers[l - 1](x) <= self.config.threshold)

    def run_all(self, idx, cache=None):
        """
        Run every block for every token, even after it would have halted, so that every depth gets a loss. Yield each
        block's output x (B, T, C), survive (B, T) and the logit of p (B, T). Keys and values are computed from `kept`,
        as in a sparse pass: x until the token would halt, unchanged from then on. Here, token a would halt after
        block 0 and token b after block 1 (a1 is x of token a after block 1):

            after block 0          1          2          3
            x           a0 b0 c0   a1 b1 c1   a2 b2 c2   a3 b3 c3      the next block's queries, and the losses
            kept        a0 b0 c0   a0 b1 c1   a0 b1 c2   a0 b1 c3      the next block's keys and values
            running     0  1  1    0  0  1    0  0  1    0  0  0
        """
        x = kept = self.embed(idx, cache)
        survive = torch.ones(idx.shape, device=idx.device)
        running = torch.ones(idx.shape, device=idx.device, dtype=torch.bool)
        for l, block in enumerate(self.blocks):
            x = block(x, cache=cache, source=kept)
            kept = torch.where(running.unsqueeze(-1), x, kept)
            # The last block has no router: p = sigmoid(inf) = 1.
            logit = self.routers[l].logit(x) if l < len(self.routers) else torch.full_like(survive, torch.inf)
            yield x, survive, logit
            p = torch.sigmoid(logit)
            survive, running = survive * (1 - p), running & (p <= self.config.threshold)

    def forward(self, idx, sparse=False, cache=None):
        """In a full pass, the gates returned are survive (L, B, T), the probability of reaching each block."""
        if sparse:
            return super().forward(idx, sparse, cache)
        outputs, survives, _ = zip(*self.run_all(idx, cache))
        return self.head(self.ln_f(outputs[-1])), torch.stack(survives)

    def loss(self, idx, targets):
        """Return equation (5) without its last line, which train.py adds, and survive (L, B, T)."""
        outputs, survives, logits = zip(*self.run_all(idx))
        survive, logits, L = torch.stack(survives), torch.stack(logits), len(outputs)      # (L, B, T)
        l = torch.arange(L, device=idx.device).view(L, 1, 1)
        # The first term and the depth penalty train the routers, because survive and p are not detached.
        weight = self.HALT_SHARE * survive * torch.sigmoid(logits)                         # (L, B, T), first term
        weight = weight + self.EVERY_SHARE / (L - 1) * (l > 0) + self.LAST_SHARE * (l == L - 1)
        losses = torch.stack([token_loss(self.head(self.ln_f(x)), targets) for x in outputs])
        # log(p (1 - p)), from the logit because p may round to 0 or 1
        barrier = (F.logsigmoid(logits[:-1]) + F.logsigmoid(-logits[:-1])).mean((1, 2)).sum()
        return (weight * losses).sum() / (targets >= 0).sum() - self.BARRIER * barrier, survive


MODELS = {"plain": Transformer, "tsa": TSA, "exit": Exit, "halt": Halt}


# ----------------------------------------------------------------------------------------------------------------
# Generation, and what skipping saves

@torch.inference_mode()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, sparse=True):
    """
    Continue idx (B, T). For each new token, yield idx_next (B, 1) and the gates (L, B) of the token that predicted it.
    Temperature 0 picks the most likely token. After the prompt, each step processes one token per sequence. When the
    text (or already the prompt) outgrows the context, its last block_size // 2 tokens are processed again, from
    position 0. The model stays in eval mode.
    """
    model.eval()
    block_size, cache, new = model.config.block_size, {}, idx
    for _ in range(max_new_tokens):
        if idx.size(1) > block_size:
            new = idx = idx[:, -max(block_size // 2, 1):]
            cache = {}
        logits, gates = model(new, sparse, cache)
        logits = logits[:, -1]                                                             # (B, V)
        if top_k is not None:
            values, best = logits.topk(min(top_k, logits.size(-1)))                        # (B, top_k)
            logits = torch.full_like(logits, -torch.inf).scatter(1, best, values)
        if temperature < 1e-4:      # 0, or too small to divide by
            idx_next = logits.argmax(-1, keepdim=True)
        else:
            idx_next = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)       # (B, 1)
        new, idx = idx_next, torch.cat([idx, idx_next], dim=1)
        yield idx_next, gates[:, :, -1]


def savings(config, ran, T=None, decode=False):
    """
    The shares of token-layer operations (one token running one block; the paper's unit) and of multiply-adds that are
    saved relative to the plain model with as many layers, if a share ran[l] of the tokens runs block l: in a prefill of
    T tokens (by default a full window) or, with decode=True, in generating T tokens one by one. All matrix products are
    counted, but not the padding of gathered tokens. The second share is negative if the overhead exceeds the saving.
    """
    C, L, T = config.n_embd, len(ran), T or config.block_size
    head = C * config.vocab_size
    plain = used = 0
    for share in ran:
        # The attention's matrices have 4 C^2 elements, those of the feed-forward layer 8 C^2. A query costs 2C for each
        # key: C for the score and C for the value. The causal kernel, and a cache that grows to T, leave T / 2 keys on
        # average. The masked kernel of gathered tokens multiplies all T.
        keys = T / 2 if share == 1 or decode else T
        plain += 12 * C * C + T / 2 * 2 * C
        used += 2 * C * C                                   # keys and values, for all tokens
        used += share * (10 * C * C + keys * 2 * C)         # query, output projection, feed-forward; attention
    if config.model in ("tsa", "halt"):
        used += (L - 1) * (C + 1) * max(C // 4, 16)         # routers
    predictions = L - Exit.FIRST if config.model == "exit" else 1       # exit predicts after every block from FIRST on
    return 1 - sum(ran) / L, 1 - (used + predictions * head) / (plain + head)
