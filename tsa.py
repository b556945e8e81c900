"""
Token-Selective Attention: a character-level transformer in which a router decides for each token which blocks it runs.

A from-scratch implementation of "Adaptive Computation Depth via Learned Token Routing in Transformers" (arXiv
2605.05222). The idea is to give each token a gate for each block. The gate scales both updates of the token's state x:

    x = x + gate * attn(ln1(x))                                                       (1)
    x = x + gate * ffn(ln2(x))                                                        (2)

After every block but the last, a router computes from x the probability p that the token skips the next block:

    p = sigmoid(W2 relu(W1 x + b1) + b2)                                              (3)
    gate = 1 - p                                                                      (4)

A gate is either a scale (a float tensor) or a switch (a bool tensor). A token's gate is closed if it is 0 or False;
then the token skips the block and keeps its x. Otherwise the gate is open. Other tokens still attend to the token's
keys and values, so a skipped block is cheap, but not free.

A model runs in one of two modes:

    "trained"     applies the training gates (early exit and halting have none) and computes every block for every token
    "executed"    applies the inference gates and computes a block only for the tokens whose gate is open

Shapes: B sequences of T tokens, C = n_embd channels, nh heads of size hs = C / nh, V characters, L blocks; S tokens in
the KV cache, n tokens that run a block.
"""
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
from torch.nn import functional as F


MODES = ("trained", "executed")


@dataclass
class Config:
    """The hyperparameters of a model. The defaults are the paper's for Tiny-Shakespeare."""
    model: str = "tsa"          # dense, tsa, exit or halt
    gate: str = "soft"          # tsa: a name in GATES
    gate_bias: float = -1.0     # tsa, halt: initial b2 of equation (3); at -1 the gates start near 0.73
    threshold: float = 0.5      # tsa, halt: skip or halt above this p; exit: exit above this confidence
    vocab_size: int = 65
    block_size: int = 128       # the longest sequence that the model accepts
    n_layer: int = 6
    n_head: int = 8
    n_embd: int = 256
    dropout: float = 0.1

    def __post_init__(self):
        if self.model not in MODELS:
            raise ValueError(f"unknown model {self.model!r}: choose one of {', '.join(MODELS)}")
        if self.model == "tsa" and self.gate not in GATES:
            raise ValueError(f"unknown gate {self.gate!r}: choose one of {', '.join(GATES)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        # Every model except dense needs a block that it can skip. Early exit always runs the first two.
        min_layers = {"dense": 1, "exit": 3}.get(self.model, 2)
        if self.n_layer < min_layers:
            raise ValueError(f"model {self.model!r} needs n_layer {min_layers} or more")


# ----------------------------------------------------------------------------------------------------------------
# Gate designs: the place to experiment. A design is a pair of functions of the router's probability p (B, T) and the
# threshold. The first returns the gate for training, the second the gate for inference. For a scale, return floats. For
# a switch, return bools at inference, and in training floats through which a gradient flows.

def soft(p, threshold):
    """The paper's gate in training, equation (4): a scale."""
    return 1 - p

def binary(p, threshold):
    """The paper's gate at inference: a switch."""
    return p <= threshold

def skip(p, threshold):
    """Like the soft scale, except that tokens whose p exceeds the threshold skip. Use a threshold near 0.9."""
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
# The block, computed for all tokens or only for those whose gate is open

class KV:
    """The KV cache of one block. It holds the keys and values of all tokens, including those that skipped the block."""

    def __init__(self, batch_size, config, like):       # like: a tensor with the device and dtype of the cache
        self.kv = like.new_empty(batch_size, config.block_size, 2 * config.n_embd)
        self.length = 0

    def append(self, kv):
        """Append kv (B, T, 2C) of T new tokens; return the keys and values of all S tokens so far (B, S, 2C)."""
        T = kv.size(1)
        self.kv[:, self.length:self.length + T] = kv
        self.length += T
        return self.kv[:, :self.length]


class Attention(nn.Module):
    """Causal multi-head attention without biases. Queries may come from only some tokens, keys and values from all."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head, self.dropout = config.n_head, config.dropout
        self.query = nn.Linear(C, C, bias=False)            # a token that skips the block needs none
        self.key_value = nn.Linear(C, 2 * C, bias=False)
        self.proj = nn.Linear(C, C, bias=False)
        causal = torch.ones(config.block_size, config.block_size, dtype=torch.bool).tril()
        self.register_buffer("causal", causal, persistent=False)       # causal[i, j]: may token i attend to token j?

    def keys_values(self, h, cache=None):
        """h (B, T, C) -> keys and values (B, T, 2C); with a cache, those of all S tokens so far (B, S, 2C)."""
        kv = self.key_value(h)
        return kv if cache is None else cache.append(kv)

    def forward(self, h, kv, at=None):
        """
        Queries from the tokens h (B, n, C), keys and values kv (B, S, 2C) -> (B, n, C). `at` (B, n) gives the position
        of each query. Without it, h must hold all S tokens in order, or only the newest one.
        """
        B, n, C = h.shape
        q = self.query(h).view(B, n, self.n_head, -1).transpose(1, 2)                      # (B, nh, n, hs)
        k, v = kv.view(B, -1, 2, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)     # (B, nh, S, hs)
        mask = None if at is None else self.causal[at, :k.size(2)].unsqueeze(1)            # (B, 1, n, S)
        dropout_p = self.dropout if self.training else 0.0
        is_causal = at is None and n > 1        # a single query comes from the newest token, so it needs no mask
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)
        return self.proj(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """One hidden layer of width 4C, exact GELU, dropout after both layers as in the paper: (..., C) -> (..., C)."""

    def __init__(self, config):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.drop = nn.Dropout(config.dropout)

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
        x (B, T, C), gate (B, T) -> (B, T, C). Without a gate, this is the plain block. Keys and values are computed
        from `source` (B, T, C), which defaults to x; only Halt passes a different one.
        """
        h = self.ln1(x)
        kv = self.attn.keys_values(h if source is None else self.ln1(source), cache)
        if gate is None:
            x = x + self.attn(h, kv)
            return x + self.ffn(self.ln2(x))
        gate = gate.to(x.dtype).unsqueeze(-1)                                              # (B, T, 1)
        x = x + gate * self.attn(h, kv)                                                    # equation (1)
        return x + gate * self.ffn(self.ln2(x))                                            # equation (2)

    def gathered(self, x, gate, cache=None):
        """The result of forward, computed only for tokens whose gate is open: (B, T, C), (B, T) -> (B, T, C)."""
        assert not self.training, "dropout would differ from forward's, so use gathered only in eval mode"
        is_open = gate != 0
        if is_open.all():       # no token skips, so run the plain block, scaled if the gate is a scale
            return self(x, None if gate.dtype == torch.bool else gate, cache)
        h = self.ln1(x)
        kv = self.attn.keys_values(h, cache)        # for all tokens, because others attend to those that skip
        n = is_open.sum(1).max().item()     # the largest number of open gates in any sequence
        if n == 0:
            return x
        # Gather n tokens from each sequence. Each row of `at` lists the positions of open gates from left to right,
        # then positions of closed gates as padding. Padding comes back unchanged, because its gate is 0.
        #
        #     gate  0 1 1 0    at  1 2    gate.gather(1, at)  1 1
        #           1 0 0 0        0 1                        1 0    <- position 1 is padding
        at = is_open.int().argsort(dim=1, descending=True, stable=True)[:, :n]             # (B, n) distinct positions
        pick = at.unsqueeze(-1).expand(-1, -1, x.size(-1))                                 # (B, n, C)
        y = x.gather(1, pick)                                                              # (B, n, C)
        g = gate.gather(1, at).to(x.dtype).unsqueeze(-1)                                   # (B, n, 1)
        # `at` selects rows of the causal mask. A single token (T = 1) is the newest one and needs no mask.
        y = y + g * self.attn(h.gather(1, pick), kv, at if x.size(1) > 1 else None)        # equation (1)
        y = y + g * self.ffn(self.ln2(y))                                                  # equation (2)
        return x.scatter(1, pick, y)


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
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for embedding in (self.wte, self.wpe):
            nn.init.normal_(embedding.weight, std=0.02)
        # As in GPT-2: x receives 2L updates, so each starts with 1 / (2L) of the variance. The other linear layers keep
        # PyTorch's initialization.
        for block in self.blocks:
            for linear in (block.attn.proj, block.ffn.proj):
                nn.init.normal_(linear.weight, std=0.02 / (2 * config.n_layer) ** 0.5)

    def forward(self, idx, mode="trained", cache=None):
        """
        idx (B, T) -> logits (B, T, V) and gates (L, B, T), both float32; the gate of a plain block counts as 1. `cache`
        is a list of KV objects, one per block. The first call may pass any number of tokens, later calls only one.
        """
        assert mode in MODES, mode
        x, gate, gates = self.embed(idx, cache), None, []
        for l, block in enumerate(self.blocks):
            if l > 0:       # block 0 has no gate, because a token knows nothing about its context until it runs
                gate = self.next_gate(l, x, gate, mode)
            run = block.gathered if mode == "executed" and gate is not None else block
            x = run(x, gate, None if cache is None else cache[l])
            gates.append(torch.ones(idx.shape, device=idx.device) if gate is None else gate.float())
        gates = torch.stack(gates)
        return self.predict(x, gates), gates

    def embed(self, idx, cache=None):
        """Embed idx (B, T) as (B, T, C), at the positions that follow those in the cache."""
        start, T = cache[0].length if cache else 0, idx.size(1)
        assert start == 0 or T == 1, "once the cache holds tokens, it accepts one token at a time"
        return self.drop(self.wte(idx) + self.wpe.weight[start:start + T])

    def next_gate(self, l, x, gate, mode):
        """Compute the gate (B, T) of block l from the output and the gate of block l - 1; None means a plain block."""
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

    def next_gate(self, l, x, gate, mode):
        in_training, at_inference = GATES[self.config.gate]
        make_gate = in_training if mode == "trained" else at_inference
        return make_gate(self.routers[l - 1](x), self.config.threshold)


# ----------------------------------------------------------------------------------------------------------------
# Early exit (the baseline) and halting (our own model). In both, a token that has stopped runs no more blocks.

class Exit(Transformer):
    """
    Early exit (Elbayad et al. 2020, arXiv 1910.10073), the paper's baseline. In training, every token runs all blocks,
    and the model predicts after each, with a LayerNorm per block and the tied head. At inference a token exits as soon
    as its largest softmax probability exceeds the threshold, but, as in the paper, never before block 1 has run. Its
    prediction uses the LayerNorm of the block after which it exits.
    """

    def __init__(self, config):
        super().__init__(config)
        # One LayerNorm per block but the last, which has ln_f; that of block 0 is used only in training.
        self.exit_norms = nn.ModuleList(nn.LayerNorm(config.n_embd) for _ in range(config.n_layer - 1))

    def next_gate(self, l, x, gate, mode):
        if mode == "trained" or l == 1:
            return None
        confidence = F.softmax(self.head(self.exit_norms[l - 1](x)), dim=-1).amax(-1)      # (B, T)
        unsure = confidence <= self.config.threshold
        return unsure if gate is None else gate & unsure

    def predict(self, x, gates):
        h, last = self.ln_f(x), gates.sum(0) - 1        # the last block that each token ran (B, T)
        for l, norm in enumerate(self.exit_norms):
            h = torch.where((last == l).unsqueeze(-1), norm(x), h)
        return self.head(h)

    def loss(self, idx, targets):
        """Return the mean of the cross-entropies after each of the L blocks (paper, section 1) and gates of 1."""
        x, total = self.embed(idx), 0
        for block, norm in zip(self.blocks, [*self.exit_norms, self.ln_f]):
            x = block(x)
            total = total + token_loss(self.head(norm(x)), targets).sum()
        gates = torch.ones(len(self.blocks), *idx.shape, device=idx.device)
        return total / len(self.blocks) / (targets >= 0).sum(), gates


class Halt(Transformer):
    """
    Our own model: a token runs block after block until a router halts it. p_l is the probability of halting after
    block l (1 after the last), so a token reaches block l with probability survive_l = (1 - p_0) ... (1 - p_{l-1}).
    Let CE_l be the cross-entropy of the prediction from x after block l. Training minimizes

        HALT_SHARE  * sum over l of survive_l p_l CE_l      predict well at the block where the token halts
      + EVERY_SHARE * mean of CE_l over l > 0               train the blocks that few tokens reach
      + LAST_SHARE  * CE_{L-1}                              make the late blocks worth reaching
      - BARRIER     * sum over l < L-1 of log(p_l (1-p_l))  keep p from sticking at 0 or 1
      + lam         * mean of survive_l over l > 0          depth penalty (added in train.py)                   (5)

    The first three terms are means over the scored tokens, the last two are means over all tokens.
    The first term is the expected loss of PonderNet (Banino et al. 2021, arXiv 2107.05407).
    """
    HALT_SHARE, EVERY_SHARE, LAST_SHARE, BARRIER = 0.2, 0.05, 0.75, 1e-4

    def __init__(self, config):
        super().__init__(config)
        self.routers = nn.ModuleList(Router(config) for _ in range(config.n_layer - 1))

    def next_gate(self, l, x, gate, mode):
        if gate is not None and not gate.any():
            return gate         # all tokens have halted, so the router need not run
        continues = self.routers[l - 1](x) <= self.config.threshold
        return continues if gate is None else gate & continues

    def all_depths(self, idx, cache=None):
        """Run as in training and yield, for each block, its output x (B, T, C), survive and the logit of p (B, T)."""
        x = self.embed(idx, cache)
        # In training every token runs all blocks, even past the point where it would halt, so that every depth gets a
        # loss. As at inference, keys and values are computed from `frozen`: the token's current x until it would halt,
        # and from then on the x with which it would halt.
        frozen, running = x, torch.ones(idx.shape, dtype=torch.bool, device=idx.device)
        survive = torch.ones(idx.shape, device=idx.device)
        for l, block in enumerate(self.blocks):
            x = block(x, None, None if cache is None else cache[l], source=frozen)
            frozen = torch.where(running.unsqueeze(-1), x, frozen)      # a token that halts now keeps this x
            is_last = l == len(self.routers)        # the last block has no router: p = sigmoid(inf) = 1
            logit = torch.full_like(survive, torch.inf) if is_last else self.routers[l].logit(x)
            yield x, survive, logit
            p = torch.sigmoid(logit)
            survive = survive * (1 - p)
            running = running & (p <= self.config.threshold)

    def forward(self, idx, mode="trained", cache=None):
        """In mode "trained", logits come from the last block for every token, and survive (L, B, T) serves as gates."""
        if mode == "executed":
            return super().forward(idx, mode, cache)
        outputs, survives, _ = zip(*self.all_depths(idx, cache))
        return self.head(self.ln_f(outputs[-1])), torch.stack(survives)

    def loss(self, idx, targets):
        """Equation (5) without its last line, which train.py adds; survive (L, B, T) serves as gates."""
        L, total, barrier, survives = self.config.n_layer, 0, 0, []
        for l, (x, survive, logit) in enumerate(self.all_depths(idx)):
            weight = self.HALT_SHARE * survive * torch.sigmoid(logit)
            if l > 0:
                weight = weight + self.EVERY_SHARE / (L - 1)
            if l == L - 1:
                weight = weight + self.LAST_SHARE
            else:       # log(p (1 - p)), computed from the logit because p may round to 0 or 1
                barrier = barrier + (F.logsigmoid(logit) + F.logsigmoid(-logit)).mean()
            total = total + (weight * token_loss(self.head(self.ln_f(x)), targets)).sum()
            survives.append(survive)
        return total / (targets >= 0).sum() - self.BARRIER * barrier, torch.stack(survives)


MODELS = {"dense": Transformer, "tsa": TSA, "exit": Exit, "halt": Halt}


def build(config):
    return MODELS[config.model](config)


# ----------------------------------------------------------------------------------------------------------------
# Generation

def default_mode(config):
    """Return "executed", or "trained" for the soft gate, because training never thresholds it."""
    return "trained" if config.model == "tsa" and config.gate == "soft" else "executed"


@torch.inference_mode()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, mode=None):
    """
    Continue idx (B, T). For each new token, yield idx_next (B, 1) and the gates (L, B) of the token that predicted it.
    Temperature 0 picks the most likely token. After the prompt, each step processes one token per sequence. When the
    text outgrows the context, its last block_size // 2 tokens are processed again, from position 0.
    """
    model.eval()
    block_size, cache, new = model.config.block_size, None, idx
    mode = mode or default_mode(model.config)
    for _ in range(max_new_tokens):
        if idx.size(1) > block_size:
            new = idx = idx[:, -max(block_size // 2, 1):]
            cache = None
        cache = cache or [KV(len(idx), model.config, model.wte.weight) for _ in model.blocks]
        logits, gates = model(new, mode, cache)
        logits = logits[:, -1]                                                             # (B, V)
        if top_k is not None:
            least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if temperature < 1e-4:      # 0, or too small to divide by
            idx_next = logits.argmax(-1, keepdim=True)
        else:
            idx_next = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)       # (B, 1)
        new, idx = idx_next, torch.cat([idx, idx_next], dim=1)
        yield idx_next, gates[:, :, -1]


# ----------------------------------------------------------------------------------------------------------------
# What skipping saves. In these functions, ran[l] is the share of tokens that ran block l.

def tlops_saved(ran):
    """
    The share of token-layer operations (one token running one block) that was saved. If ran[0] = 1 and alpha is the
    mean of ran[1:], this is 1 - (1 + (L-1) alpha) / L (paper, section 1).
    """
    return 1 - sum(ran) / len(ran)


def multiply_adds(config, ran, T=None, decode=False):
    """
    Multiply-adds per token in all matrix products: for a prefill of T tokens (by default a full window) or, with
    decode=True, for generating one sequence token by token. A block that ran for every token counts as a plain block.
    The padding of the gathered block is not counted.
    """
    C, T, total = config.n_embd, T or config.block_size, 0
    for share in ran:
        # Each key that a query attends to costs 2 C: C for the score and C for the value. The plain block's causal
        # kernel skips future keys, which leaves T / 2 on average. Decoding also averages T / 2, as its cache grows to
        # T. The gathered block's masked kernel multiplies all T keys.
        attention = (T / 2 if share == 1 or decode else T) * 2 * C
        total += 2 * C * C                              # keys and values, for all tokens
        total += share * (10 * C * C + attention)       # query, output projection, feed-forward (2 + 8 C^2), attention
    routers = len(ran) - 1 if config.model in ("tsa", "halt") else 0
    if config.model == "halt" and decode:
        routers = sum(ran[:-1])     # in decoding, router l runs only if the token ran block l
    heads = len(ran) - 1 if config.model == "exit" else 1       # early exit predicts after each block but the first
    return total + routers * (C + 1) * max(C // 4, 16) + heads * C * config.vocab_size


def macs_saved(config, ran, T=None, decode=False):
    """The share of the plain model's multiply-adds that was saved; negative if the overhead exceeds the saving."""
    plain = multiply_adds(replace(config, model="dense"), [1] * len(ran), T, decode)
    return 1 - multiply_adds(config, ran, T, decode) / plain
