"""
Token-Selective Attention (TSA): a character-level transformer in which a router decides, for every token, how much each
block changes it. From scratch, after "Adaptive Computation Depth via Learned Token Routing in Transformers" (arXiv
2605.05222). Each token has a gate for each block. The gate scales both updates of the token's state x:

    x = x + gate * attn(ln1(x))                                                       (1)
    x = x + gate * ffn(ln2(x))                                                        (2)

After every block but the last, a router computes from x the probability p that the token skips the next block:

    p = sigmoid(W2 relu(W1 x + b1) + b2)                                              (3)
    gate = 1 - p                                                                      (4)

Nothing is sampled: the gate is computed from p. Every model runs in two ways:

    model(idx)                  full: every block is computed for every token, scaled by the training gates, if any
    model(idx, sparse=True)     sparse: a token whose inference gate is 0 skips the block and keeps its x

Training uses a full pass or, on a CPU, a sparse one if its gradients are the same (can_train_sparse). Other tokens
still attend to the keys and values of a token that skips, so a skipped block is cheap, but not free.

Shapes: B sequences of T tokens, C = n_embd channels, nh heads of size hs = C / nh, V characters, L blocks. N tokens of
the batch run a block; S tokens per sequence provide keys and values (T, or more if earlier tokens are in a KV cache).
"""
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass
class Config:
    """The hyperparameters of a model. These defaults are the paper's for Tiny-Shakespeare; train.py's are smaller."""
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


# ----------------------------------------------------------------------------------------------------------------
# Gate designs: the place to experiment. A design is a pair of functions of the router's p (B, T) and the threshold. The
# first returns the gate for training (a full pass), the second the gate for inference (a sparse pass). Both return
# floats; the first must pass a gradient for some p.

def soft(p, threshold):
    """The paper's gate in training, equation (4): a scale."""
    return 1 - p

def binary(p, threshold):
    """The paper's gate at inference: a switch."""
    return (p <= threshold).float()

def skip(p, threshold):
    """Like the soft gate, except that tokens whose p exceeds the threshold skip. Use a threshold near 0.9."""
    return (1 - p) * (p <= threshold)

def stretch(p, threshold):
    """A scale that is exactly 0 for p >= 6/7, so that what is trained is what runs."""
    return ((1 - p) * 1.4 - 0.2).clamp(0, 1)        # hard concrete without noise (Louizos et al. 2018, 1712.01312)

# name: (training gate, inference gate)
GATES = {"soft": (soft, binary), "skip": (soft, skip), "stretch": (stretch, stretch)}

def can_train_sparse(config):
    """
    Whether the model can train with a sparse pass, because its gradients are those of a full pass: both functions of
    the design are the same, and a gate of 0 passes no gradient to p (tested on a grid of p). With dropout, which draws
    other random numbers for fewer tokens, the gradients are equal only on average.
    """
    training_gate, inference_gate = GATES[config.gate]
    if config.model != "tsa" or training_gate is not inference_gate:
        return False
    # 997 is prime, so the grid misses round p such as 0.9: exactly at its bound, torch's clamp passes a gradient.
    p = torch.linspace(0, 1, 998).view(1, -1).requires_grad_()                             # (1, 998)
    gate = training_gate(p, config.threshold)
    if not gate.requires_grad:
        return False
    grad, = torch.autograd.grad(gate[gate == 0].sum(), p)
    return not grad.any().item()


class Router(nn.Module):
    """The router, equation (3): x (..., C) -> p (...), the probability of skipping the next block, or of halting."""

    def __init__(self, config):
        super().__init__()
        width = max(config.n_embd // 4, 16)
        self.fc = nn.Linear(config.n_embd, width)
        self.out = nn.Linear(width, 1)
        nn.init.constant_(self.out.bias, config.gate_bias)

    def logit(self, x):
        # float32 from here on: in bfloat16, a p near 1 would round to 1, and its gate to 0.
        return self.out(F.relu(self.fc(x))).squeeze(-1).float()

    def forward(self, x):
        return torch.sigmoid(self.logit(x))


def gather(x, rows):
    """Pick the tokens with the indices rows (N,) from a batch: x (B, T, ...) -> (N, ...)."""
    return x.flatten(0, 1).index_select(0, rows)

def scatter(x, rows, y):
    """Return x (B, T, C) with the tokens at rows (N,) replaced by y (N, C)."""
    return x.flatten(0, 1).index_copy(0, rows, y).view(x.shape)

def pad_rows(rows, gate):
    """
    Add closed tokens of gate (B, T), which change nothing, to the open ones, rows (N,), until N is a multiple of 64.
    Otherwise, every step would bring new values of N, for each of which the CPU's matrix library builds new bfloat16
    kernels.
    """
    closed = (gate == 0).flatten().nonzero().squeeze(1)
    return torch.cat([rows, closed[:(-len(rows)) % 64]])


class Attention(nn.Module):
    """Causal multi-head attention without biases. Queries may come from only some tokens, keys and values from all."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        assert C % config.n_head == 0, f"n_embd {C} is not divisible by n_head {config.n_head}"
        self.n_head, self.block_size, self.dropout = config.n_head, config.block_size, config.dropout
        self.query = nn.Linear(C, C, bias=False)            # a token that skips the block needs none
        self.key_value = nn.Linear(C, 2 * C, bias=False)
        self.proj = nn.Linear(C, C, bias=False)

    def forward(self, h, kv, rows=None):
        """
        Queries come from h (B, T, C). kv (B, S, 2C) holds the keys and values of S tokens: those of h and, before them,
        those in the KV cache, if there is one. Return (B, T, C). If `rows` (N,) gives the indices of the tokens that
        run the block, only these get an output: (N, C).
        """
        B, T, C = h.shape
        q = self.query(h if rows is None else gather(h, rows))
        if rows is not None:        # the kernel expects T queries: zeros for those that skip, dropped below
            q = scatter(q.new_zeros(B, T, C), rows, q)
        q = q.view(B, T, self.n_head, -1).transpose(1, 2)                                  # (B, nh, T, hs)
        k, v = kv.view(B, -1, 2, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)     # (B, nh, S, hs) each
        dropout_p = self.dropout if self.training else 0.0
        # A single query is that of the newest token, which attends to all S keys; otherwise S = T.
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=T > 1)
        y = y.transpose(1, 2).flatten(2)                                                   # (B, T, C)
        return self.proj(y if rows is None else gather(y, rows))


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
        x (B, T, C), gate (B, T) -> (B, T, C). Without a gate, this is the plain block. If sparse, only the N tokens
        whose gate is not 0 get a query, an output projection and the feed-forward layer, with the same result as
        scaling all. All tokens get keys and values, computed from `source` (B, T, C): x, unless Halt passes another.
        """
        h = self.ln1(x)
        kv = self.attn.key_value(h if source is None else self.ln1(source))                # (B, T, 2C)
        if cache is not None:       # only in generate(); ignore it on a first reading
            kv = cache.append(self.attn, kv)                                               # (B, S, 2C)
        if gate is None:
            x = x + self.attn(h, kv)
            return x + self.ffn(self.ln2(x))

        if sparse:
            # The indices of the open tokens: for gates [[0, 1, 1], [1, 0, 0]], rows = [1, 2, 3].
            rows = gate.flatten().nonzero().squeeze(1)                                     # (N,)
            if self.training:       # continues even with 0 rows: AdamW decays only weights with a gradient
                rows = pad_rows(rows, gate)
            elif len(rows) == 0:
                return x
            if len(rows) < gate.numel():        # otherwise all tokens run, without gathering
                y, gate = gather(x, rows), gather(gate, rows).to(x.dtype).unsqueeze(-1)    # (N, C), (N, 1)
                y = y + gate * self.attn(h, kv, rows)                                      # equation (1)
                y = y + gate * self.ffn(self.ln2(y))                                       # equation (2)
                return scatter(x, rows, y)
        gate = gate.to(x.dtype).unsqueeze(-1)                                              # (B, T, 1)
        x = x + gate * self.attn(h, kv)                                                    # equation (1)
        return x + gate * self.ffn(self.ln2(x))                                            # equation (2)


def token_loss(logits, targets):
    """Cross-entropy of each token: (B, T, V), (B, T) -> (B, T). It is 0 where the target is -1 (not scored)."""
    return F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-1, reduction="none")


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

    def forward(self, idx, sparse=False, cache=None):
        """idx (B, T) -> logits (B, T, V) and gates (L, B, T), both float32. The gate of a plain block counts as 1."""
        x = self.embed(idx, cache)                                                         # (B, T, C)
        for block in self.blocks:
            x = block(x, cache=cache)
        return self.head(self.ln_f(x)), torch.ones(len(self.blocks), *idx.shape, device=idx.device)

    def embed(self, idx, cache=None):
        """Embed idx (B, T) as (B, T, C), at the positions that follow those in the cache."""
        T = idx.size(1)
        start = 0 if cache is None else cache.length
        assert start == 0 or T == 1, "once the cache holds tokens, it accepts one token at a time"
        if not 0 < start + T <= self.config.block_size:
            raise ValueError(f"{start + T} tokens: the model accepts 1 to {self.config.block_size} (block_size)")
        if cache is not None:
            cache.length += T
        x = self.wte(idx) + self.wpe.weight[start:start + T]
        return F.dropout(x, self.config.dropout, self.training)

    def head(self, h):
        return F.linear(h, self.wte.weight).float()

    def loss(self, idx, targets, sparse=False):
        """idx, targets (B, T) -> the task loss (mean over the scored tokens) and the gates (L, B, T)."""
        logits, gates = self(idx, sparse)
        return token_loss(logits, targets).sum() / (targets >= 0).sum(), gates


class TSA(Transformer):
    """The paper's model: after every block but the last, a router computes the gate of the next block."""

    def __init__(self, config):
        super().__init__(config)
        self.routers = nn.ModuleList(Router(config) for _ in range(config.n_layer - 1))

    def forward(self, idx, sparse=False, cache=None):
        training_gate, inference_gate = GATES[self.config.gate]
        make_gate = inference_gate if sparse else training_gate
        first, *others = self.blocks
        # Block 0 has no gate, because before it has run, x says nothing about the context.
        x = first(self.embed(idx, cache), cache=cache)                                     # (B, T, C)
        gates = [torch.ones(idx.shape, device=idx.device)]
        for router, block in zip(self.routers, others):
            gate = make_gate(router(x), self.config.threshold)                             # (B, T)
            x = block(x, gate, sparse, cache)
            gates.append(gate)
        return self.head(self.ln_f(x)), torch.stack(gates)


class Exit(Transformer):
    """
    Early exit, the paper's baseline (Elbayad et al. 2020, arXiv 1910.10073). In training, every token runs all blocks,
    and the model predicts after each, with a LayerNorm per block and the tied head. In a sparse pass, a token exits as
    soon as its largest softmax probability exceeds the threshold.
    """
    FIRST = 1       # the first block after which a token may exit, as in the TSA paper

    def __init__(self, config):
        super().__init__(config)
        self.exit_norms = nn.ModuleList(nn.LayerNorm(config.n_embd) for _ in range(config.n_layer - 1))

    def forward(self, idx, sparse=False, cache=None):
        if not sparse:
            return super().forward(idx, sparse, cache)
        x, gates, logits = self.embed(idx, cache), [], None
        gate = torch.ones(idx.shape, device=idx.device)         # 1 until the token exits
        for l, (block, norm) in enumerate(zip(self.blocks, [*self.exit_norms, self.ln_f])):
            x = block(x, gate, sparse, cache)
            gates.append(gate)
            if l >= self.FIRST:
                prediction = self.head(norm(x))                                            # (B, T, V)
                ran = gate.unsqueeze(-1) != 0                                              # (B, T, 1)
                logits = prediction if logits is None else torch.where(ran, prediction, logits)
                confidence = F.softmax(prediction, dim=-1).amax(-1)                        # (B, T)
                gate = gate * (confidence <= self.config.threshold)
        return logits, torch.stack(gates)

    def loss(self, idx, targets):
        """Return the mean of the cross-entropies of the L predictions (as in the paper), and gates of 1."""
        x, total, L = self.embed(idx), 0, len(self.blocks)
        for block, norm in zip(self.blocks, [*self.exit_norms, self.ln_f]):
            x = block(x)
            total = total + token_loss(self.head(norm(x)), targets).sum()
        return total / L / (targets >= 0).sum(), torch.ones(L, *idx.shape, device=idx.device)


class Halt(TSA):
    """
    A relative of PonderNet (Banino et al. 2021, arXiv 2107.05407): a token runs block after block until a router halts
    it. No update is scaled. p_l is the probability of halting after block l (1 after the last), so a token reaches
    block l with probability survive_l = (1 - p_0)...(1 - p_{l-1}). Let CE_l be the cross-entropy of the prediction from
    x after block l. Training minimizes

        HALT_SHARE  * sum over l of survive_l p_l CE_l      predict well at the block where the token halts
      + EVERY_SHARE * mean of CE_l over l > 0               train every prediction a little
      + LAST_SHARE  * CE_{L-1}                              make the late blocks worth reaching
      - BARRIER     * sum over l < L-1 of log(p_l (1-p_l))  keep p from sticking at 0 or 1
      + lam         * mean of survive_l over l > 0          depth penalty (added in train.py)                   (5)

    The first three terms are averaged over the scored tokens, the last two over all tokens. The first is PonderNet's
    expected loss. In a sparse pass, a token halts at the first p above the threshold.
    """
    HALT_SHARE, EVERY_SHARE, LAST_SHARE, BARRIER = 0.2, 0.05, 0.75, 1e-4

    def forward(self, idx, sparse=False, cache=None):
        """A full pass returns survive (L, B, T), the probability of reaching each block, instead of gates."""
        if not sparse:
            outputs, survive, _ = self.run_all(idx, cache)
            return self.head(self.ln_f(outputs[-1])), survive
        first, *others = self.blocks
        x = first(self.embed(idx, cache), cache=cache)                                     # (B, T, C)
        gates = [torch.ones(idx.shape, device=idx.device)]
        for router, block in zip(self.routers, others):
            gate = gates[-1] * (router(x) <= self.config.threshold)     # (B, T): a token that has halted stays halted
            x = block(x, gate, sparse, cache)
            gates.append(gate)
        return self.head(self.ln_f(x)), torch.stack(gates)

    def run_all(self, idx, cache=None):
        """
        Run every block for every token, so that every depth gets a loss. Return each block's output x (B, T, C),
        survive (L, B, T) and the logit of p (L, B, T). Keys and values come from `kept`, as in a sparse pass: it
        equals x until the token would halt, then no longer changes. Here, token a would halt after block 0, and b
        after block 1 (a0 is token a after block 0):

            block                        0          1          2          3
            running, during the block    1  1  1    0  1  1    0  0  1    0  0  1
            x, after it                  a0 b0 c0   a1 b1 c1   a2 b2 c2   a3 b3 c3      losses, next queries
            kept, after it               a0 b0 c0   a0 b1 c1   a0 b1 c2   a0 b1 c3      next keys and values
        """
        x = kept = self.embed(idx, cache)
        survive = torch.ones(idx.shape, device=idx.device)
        running = torch.ones(idx.shape, device=idx.device, dtype=torch.bool)
        steps = []
        for l, block in enumerate(self.blocks):
            x = block(x, cache=cache, source=kept)
            kept = torch.where(running.unsqueeze(-1), x, kept)
            # The last block has no router: p = sigmoid(inf) = 1.
            logit = self.routers[l].logit(x) if l < len(self.routers) else torch.full_like(survive, torch.inf)
            steps.append((x, survive, logit))
            p = torch.sigmoid(logit)        # of halting before the next block
            survive = survive * (1 - p)
            running = running & (p <= self.config.threshold)
        outputs, survives, logits = zip(*steps)
        return outputs, torch.stack(survives), torch.stack(logits)

    def loss(self, idx, targets):
        """Return the loss of equation (5), except for the depth penalty (train.py adds it), and survive (L, B, T)."""
        outputs, survive, logit = self.run_all(idx)
        losses = torch.stack([token_loss(self.head(self.ln_f(x)), targets) for x in outputs])      # (L, B, T), CE_l
        # With 6 blocks and h_l = 0.2 * survive_l * p_l, the weights of CE_0 to CE_5 are
        #     h0    h1 + 0.01    h2 + 0.01    h3 + 0.01    h4 + 0.01    h5 + 0.01 + 0.75
        weight = self.HALT_SHARE * survive * torch.sigmoid(logit)      # not detached: this trains the routers
        weight[1:] += self.EVERY_SHARE / (len(outputs) - 1)
        weight[-1] += self.LAST_SHARE
        # log(p (1 - p)), from the logit because p may round to 0 or 1
        barrier = (F.logsigmoid(logit[:-1]) + F.logsigmoid(-logit[:-1])).mean((1, 2)).sum()
        return (weight * losses).sum() / (targets >= 0).sum() - self.BARRIER * barrier, survive


MODELS = {"plain": Transformer, "tsa": TSA, "exit": Exit, "halt": Halt}


# ----------------------------------------------------------------------------------------------------------------
# Generation, and what skipping saves. You can skip this part on a first reading.

class KVCache:
    """The keys and values of the tokens so far. The first pass may add any number of tokens, later passes only one."""

    def __init__(self):
        self.length = 0         # tokens so far, counted by Transformer.embed
        self.buffers = {}       # attention layer: keys and values (B, block_size, 2C)

    def append(self, attn, kv):
        """Keys and values kv (B, T, 2C) of the newest tokens -> those of all S tokens (B, S, 2C)."""
        B, T, width = kv.shape
        if attn not in self.buffers:
            self.buffers[attn] = kv.new_empty(B, attn.block_size, width)
        self.buffers[attn][:, self.length - T:self.length] = kv
        return self.buffers[attn][:, :self.length]


@torch.inference_mode()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, sparse=True):
    """
    Continue idx (B, T). For each new token, yield idx_next (B, 1) and the gates (L, B) of the token that predicted it.
    Temperature 0 picks the most likely token. When the text outgrows the context, generation restarts from its last
    block_size // 2 tokens, at position 0. The model is left in eval mode.
    """
    model.eval()
    block_size, cache, new = model.config.block_size, KVCache(), idx
    for _ in range(max_new_tokens):
        if idx.size(1) > block_size:
            new = idx = idx[:, -max(block_size // 2, 1):]
            cache = KVCache()
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


def multiply_adds(config, ran, T=None):
    """
    The multiply-adds per token of all matrix products in a prefill of T tokens (by default a full window), if a share
    ran[l] of them runs block l. (Generation takes a little less: if no token of a step runs a block, the block skips
    its attention, too.)
    """
    C, L, T = config.n_embd, len(ran), T or config.block_size
    head = C * config.vocab_size
    # For all tokens: keys and values, and attention to T / 2 keys on average, at C for the score and C for the value.
    # For those that run a block: query (1 C^2), output projection (1 C^2) and feed-forward (8 C^2).
    total = L * (2 * C * C + T / 2 * 2 * C) + sum(ran) * 10 * C * C + head
    if config.model in ("tsa", "halt"):
        total += (L - 1) * (C + 1) * max(C // 4, 16)        # routers
    if config.model == "exit":
        total += (L - 1 - Exit.FIRST) * head                # predictions before the last block
    return total


def savings(config, ran, T=None):
    """
    The shares saved relative to a plain model with as many layers: of the token-layer operations (one token running one
    block; the paper's unit), and of the multiply-adds (negative if the overhead exceeds the saving).
    """
    plain = multiply_adds(replace(config, model="plain"), [1] * len(ran), T)
    return 1 - sum(ran) / len(ran), 1 - multiply_adds(config, ran, T) / plain
