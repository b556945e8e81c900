"""
Token-Selective Attention: a character transformer whose tokens choose how deep they go.

From scratch after "Adaptive Computation Depth via Learned Token Routing in Transformers" (arXiv 2605.05222), beside
the two models to compare it with, the plain transformer and early exit (Elbayad et al. 2020, arXiv 1910.10073), and
one that goes past it: learned halting, whose training sees what inference runs.

The one idea. A *gate* is a number in [0, 1] per token and block that scales both residual updates of the block:

    h = h + gate * attn(ln1(h))                                                                              (1)
    h = h + gate * ffn(ln2(h))                                                                               (2)

Every model here is a rule that makes gates, and every way of running is a way of applying them:

    dense   no gate: every token takes every block
    tsa     a router reads h after each block: p = sigmoid(W2 relu(W1 h + b1) + b2), the halting probability;  (3)
            the gate of the next block is made from p, in the paper gate = 1 - p                               (4)
    exit    gate = 1 until the token is sure of its next character, then 0 for good                            (5)
    halt    ours: gate = 1 until the router says halt, then 0 for good, trained by equation (7)                (6)

A gate of exactly 0 is a skipped token: it keeps its h. It still gives keys and values to the others, so attention
stays exact, and a skipped block is cheap, not free. `run` says how gates are made and applied:

    "trained"    as in training: tsa with the gates that training sees, exit and halt through every block
    "masked"     the gates of inference, applied by multiplying: saves nothing, and is the reference
    "gathered"   the same gates, but only the rows with gate > 0 are computed: the same numbers, less work

Shapes: B sequences, T tokens, C = n_embd channels, nh heads of hs = C / nh, V characters, L blocks, and N the
rows, out of B * T, that a gathered block computes. Left out on purpose: rotary positions, RMSNorm, grouped heads,
mixture of experts. They do not change the question, which is what a skipped token is worth.
"""
from dataclasses import dataclass, replace
from typing import Optional

import torch
import torch.nn as nn
from torch.nn import functional as F


RUNS = ("trained", "masked", "gathered")


class UserError(Exception):
    """A mistake of the user, told in one line that says what to do; the programs print it and exit with status 2."""


@dataclass
class Config:
    """Sizes and gate settings of one model; the defaults are the paper's for Tiny-Shakespeare (section 2)."""
    model: str = "tsa"                  # dense, tsa, exit or halt
    gate: Optional[str] = "soft"        # tsa: a pair of GATES
    lam: Optional[float] = 0.001        # tsa: weight of the depth loss; halt: price of depth, equation (7)
    gate_bias: Optional[float] = -1.0   # tsa, halt: where b2 of equation (3) starts; -1 opens the gates to 0.73
    threshold: Optional[float] = 0.5    # tsa, halt: halt above this p; exit: leave above this confidence
    vocab_size: int = 65
    block_size: int = 128               # context: the longest sequence the positions reach
    n_layer: int = 6
    n_head: int = 8
    n_embd: int = 256
    dropout: float = 0.1

    @property
    def has_routers(self):
        return self.model in ("tsa", "halt")

    @property
    def router_width(self):
        return max(self.n_embd // 4, 16)

    def __post_init__(self):
        if self.model not in MODELS:
            raise UserError(f"model {self.model!r} is unknown: choose one of {', '.join(MODELS)}")
        if self.model == "tsa" and self.gate not in GATES:
            raise UserError(f"gate {self.gate!r} is unknown: choose one of {', '.join(GATES)}")
        if self.n_embd % self.n_head:
            raise UserError(f"n_head {self.n_head} does not divide n_embd {self.n_embd}: choose another n_head")
        if self.model != "dense" and self.n_layer < 2:
            raise UserError(f"{self.model} needs n_layer of 2 or more: block 0 always runs, so there is none to skip")


# ----------------------------------------------------------------------------------------------------------------
# Gate designs: the place to hack. A design is a pair of functions of the halting probability p (B, T), float32: the
# gate that training sees, and the gate that inference runs. Return exactly 0 where the token skips the block.

def soft(p, threshold):
    """The paper's gate in training, equation (4): a scale that in practice reaches neither 0 nor 1."""
    return 1 - p

def binary(p, threshold):
    """The paper's gate at inference: the whole block or nothing."""
    return (p <= threshold).float()

def skip(p, threshold):
    """The soft scale stays as it was trained; only the tokens that had nearly halted go."""
    return (1 - p) * (p <= threshold)

def straight(p, threshold):
    """All or nothing forward, the soft scale's gradient backward: what is trained is what runs."""
    return binary(p, threshold) + ((1 - p) - (1 - p).detach())

GATES = {           # --gate: (training sees, inference runs)
    "soft": (soft, binary),
    "skip": (soft, skip),
    "straight": (straight, binary),
}


class Router(nn.Module):
    """The gate MLP, equation (3): (B, T, C) -> (B, T), each token's probability of halting before the next block."""

    def __init__(self, config):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, config.router_width)
        self.out = nn.Linear(config.router_width, 1)
        nn.init.constant_(self.out.bias, config.gate_bias)

    def forward(self, h):
        # h comes without a LayerNorm: how far the residual stream has grown is itself a sign of depth.
        hidden = F.relu_(self.fc(h)).float()
        # Always float32 from here, written as a sum so that autocast leaves it alone: near p = 1, bf16 would round
        # 1 - p to 0 and skip tokens that should not be.
        logit = (hidden * self.out.weight.float()).sum(-1) + self.out.bias.float()
        return torch.sigmoid(logit)


# ----------------------------------------------------------------------------------------------------------------
# The block, masked and gathered

class KV:
    """One block's keys and values while text is generated: of every token, the skipped ones included."""

    def __init__(self, batch_size, config, like):
        hs = config.n_embd // config.n_head
        self.kv = like.new_empty(2, batch_size, config.n_head, config.block_size, hs)
        self.length = 0

    def append(self, kv):
        """kv (2, B, nh, T, hs), keys and values of T new tokens -> those of all tokens so far."""
        start, self.length = self.length, self.length + kv.size(3)
        self.kv[:, :, :, start:self.length] = kv
        return self.kv[:, :, :, :self.length]


class Dropout(nn.Module):
    """Read it as nn.Dropout: on a CPU a third of the time, since a draw of 64 random bits decides on four elements."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if x.device.type != "cpu" or not self.training or self.p == 0:
            return F.dropout(x, self.p, self.training)
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2**63, None)
        bits = draws.view(torch.int16)[:x.numel()].view_as(x)          # each value from -2^15 on equally likely
        return x * (bits >= round(self.p * 2**16) - 2**15) / (1 - self.p)


class Attention(nn.Module):
    """Causal multi-head self-attention, projections without biases."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.drop = Dropout(config.dropout)
        self.query = nn.Linear(C, C, bias=False)            # apart from keys and values: a skipped token needs none
        self.key_value = nn.Linear(C, 2 * C, bias=False)
        self.proj = nn.Linear(C, C, bias=False)
        causal = torch.full((config.block_size, config.block_size), -torch.inf).triu(1)
        self.register_buffer("causal", causal, persistent=False)    # added to scores: -inf hides what is still to come

    def heads(self, x):
        """x (B, T, C) -> (B, nh, T, hs)"""
        return x.view(*x.shape[:2], self.n_head, -1).transpose(1, 2)

    def keys_values(self, x, cache):
        """x (B, T, C) -> keys and values (2, B, nh, S, hs): of x, or with a cache of all S tokens so far."""
        B, T, C = x.shape
        kv = self.key_value(x).view(B, T, 2, self.n_head, -1).permute(2, 0, 3, 1, 4)
        return kv if cache is None else cache.append(kv)

    def forward(self, x, cache=None, seen=None):
        """
        x (B, T, C) -> (B, T, C). With a KV, T tokens are appended to what it holds (T = 1, or it is empty). seen
        (B, T, C): what keys and values are made from, if not x (training of Halt only).
        """
        B, T, C = x.shape
        k, v = self.keys_values(x if seen is None else seen, cache)
        q = self.heads(self.query(x))
        if self.training and x.device.type == "cpu":
            # Written out: on a CPU three times as fast, forward and back, as the fused kernel in bf16, and no slower
            # in fp32.
            scores = q @ k.transpose(-2, -1) * (C // self.n_head) ** -0.5 + self.causal[:T, :T].to(q.dtype)
            y = self.drop(scores.softmax(-1)) @ v
        else:
            p = self.drop.p if self.training else 0.0
            # A single token is the newest and sees everything: no mask.
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=T > 1)          # (B, nh, T, hs)
        return self.proj(y.transpose(1, 2).flatten(2))

    def gathered(self, x, gate, rows, cache=None):
        """
        x (B, T, C) -> (N, C): attention for the N tokens whose gate (B, T) is not 0, whose places in B * T are
        rows (N,). Keys and values come from all tokens.
        """
        B, T, C = x.shape
        k, v = self.keys_values(x, cache)
        mask, query_rows = None, rows
        if T == 1:          # decoding: the sequences that ask, each with its newest token, which sees everything
            k, v = k.index_select(0, rows), v.index_select(0, rows)
        else:
            if B == 1:
                position = rows         # the general way is right here too, and takes 3% of a block's time
            else:
                # Each sequence keeps its own number of tokens: sort them to the front, in order, and cut at the
                # longest, n. What fills up the shorter ones is computed too, and dropped before the projection.
                keep = gate != 0
                n = int(keep.sum(1).max())
                position = (~keep).argsort(dim=1, stable=True)[:, :n]                      # (B, n), in a sequence
                query_rows = (position + T * torch.arange(B, device=x.device).unsqueeze(1)).flatten()   # in B * T
            mask = self.causal[:T, :T].index_select(0, position.flatten()).view(B, 1, -1, T)        # (B, 1, n, T)
        q = self.query(x.flatten(0, 1).index_select(0, query_rows)).view(len(k), -1, C)        # (B, n, C), or (N, 1, C)
        y = F.scaled_dot_product_attention(self.heads(q), k, v, attn_mask=mask).transpose(1, 2)
        if B > 1 and T > 1:
            y = y[keep.gather(1, position)]
        return self.proj(y.reshape(len(rows), C))


class FeedForward(nn.Module):
    """Two layers of width 4C with exact GELU; works on rows of any shape (..., C) -> (..., C)."""

    def __init__(self, config):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.drop = Dropout(config.dropout)

    def forward(self, x):
        return self.drop(self.proj(self.drop(F.gelu(self.fc(x)))))


class Block(nn.Module):
    """Pre-norm transformer block whose two residual updates are scaled by a gate, equations (1) and (2)."""

    def __init__(self, config):
        super().__init__()
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.ffn = FeedForward(config)

    def forward(self, x, gate=None, cache=None, seen=None):
        """
        x (B, T, C), gate (B, T) or None for the ordinary block -> (B, T, C). Multiplies, so saves nothing. seen
        (B, T, C), without a gate only: what keys and values are made from, if not x.
        """
        assert gate is None or seen is None
        if gate is None:
            x = x + self.attn(self.ln1(x), cache, None if seen is None else self.ln1(seen))
            return x + self.ffn(self.ln2(x))
        gate = gate.to(x.dtype).unsqueeze(-1)                                              # (B, T, 1)
        x = torch.addcmul(x, gate, self.attn(self.ln1(x), cache))      # x + gate * ..., in one pass over memory
        return torch.addcmul(x, gate, self.ffn(self.ln2(x)))

    def gathered(self, x, gate, rows, cache=None):
        """The same numbers, computed for the N rows whose gate is not 0: (B, T, C), (B, T), (N,) -> (B, T, C)."""
        assert not self.training, "a gathered block draws no dropout: use it in evaluation only"
        if len(rows) == 0:
            if cache is not None:
                self.attn.keys_values(self.ln1(x), cache)
            return x
        flat = x.flatten(0, 1)                                                             # (B * T, C)
        h = flat.index_select(0, rows)                                                     # (N, C)
        scale = gate.flatten().index_select(0, rows).to(x.dtype).unsqueeze(-1)             # (N, 1)
        h = torch.addcmul(h, scale, self.attn.gathered(self.ln1(x), gate, rows, cache))
        h = torch.addcmul(h, scale, self.ffn(self.ln2(h)))
        return flat.index_copy(0, rows, h).view_as(x)


# ----------------------------------------------------------------------------------------------------------------
# The four models: one loop over the blocks, and what each does between two blocks

def open_rows(gate):
    """
    Places in B * T of the tokens whose gate (B, T) is not 0, (N,). None where that is all of them: then the plain block
    is the faster one.
    """
    rows = gate.flatten().nonzero().squeeze(1)
    return None if len(rows) == gate.numel() else rows


def cross_entropy(logits, targets):
    """(B, T, V), (B, T) -> (B, T), 0 where the target is -1"""
    return F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-1, reduction="none")


class Transformer(nn.Module):
    """The plain transformer, and the loop that all models share."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)      # also the output head (tied)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        n_exits = config.n_layer if config.model == "exit" else 1
        self.norms = nn.ModuleList(nn.LayerNorm(config.n_embd) for _ in range(n_exits))
        # What is not named here starts as PyTorch starts it, as in the paper.
        for embedding in (self.wte, self.wpe):
            nn.init.normal_(embedding.weight, std=0.02)
        for block in self.blocks:       # 2L updates add up in the residual stream: each starts with 1 / 2L the variance
            for linear in (block.attn.proj, block.ffn.proj):
                nn.init.normal_(linear.weight, std=0.02 / (2 * config.n_layer) ** 0.5)

    def forward(self, idx, targets=None, run="trained", gates=None, cache=None):
        """
        idx (B, T) -> logits (B, T, V) float32, loss (scalar, or None without targets), stats.

        targets (B, T): the next characters, -1 where none is scored. run: see the top of this file. gates (L, B, T):
        replayed instead of the model's own (which are still computed, so that timings stay honest). cache: a list of
        L KV, empty for a prefill of T tokens, then T = 1; whole sequences otherwise.

        stats: gates (L, B, T), block 0's all one, or in Halt's training, where none is applied, the probabilities of
        getting there; exit_logits, a list of (B, T, V) whose last are the logits; with targets also task_loss and, for
        tsa and halt, depth_loss, the two parts of the loss.
        """
        B, T = idx.shape
        start = cache[0].length if cache else 0
        assert start + T <= self.config.block_size, (start, T, self.config.block_size)
        assert start == 0 or T == 1, (start, T)
        assert run in RUNS, run
        x = self.drop(self.wte(idx) + self.wpe.weight[start:start + T])                    # (B, T, C)

        stats = {"exit_logits": [], "seen": None}       # seen: what keys and values are made from, if not x
        gate, used = None, []       # block 0, the stem, always runs: something must read the characters
        for l, block in enumerate(self.blocks):
            if gates is not None and l > 0:
                gate = gates[l]
            kv = cache[l] if cache else None
            rows = open_rows(gate) if run == "gathered" and gate is not None else None
            x = block(x, gate, kv, stats["seen"]) if rows is None else block.gathered(x, gate, rows, kv)
            used.append(torch.ones(B, T, device=idx.device) if gate is None else gate)
            self.read_out(l, x, gate, rows, stats, run)
            if l < self.config.n_layer - 1:
                gate = self.next_gate(l, x, gate, rows, stats, run)

        logits = stats["exit_logits"][-1]
        stats["gates"] = torch.stack(stats.get("survive", used))
        if targets is None:
            return logits, None, stats
        loss = stats["task_loss"] = self.task_loss(stats, targets, run)
        if self.config.has_routers:     # mean over the L-1 routers, batch and position: alpha
            stats["depth_loss"] = stats["gates"][1:].mean()
            loss = loss + self.price() * stats["depth_loss"]
        return logits, loss, stats

    def task_loss(self, stats, targets, run):
        """The part of the loss that lam does not weigh: the mean cross-entropy of the scored characters."""
        return cross_entropy(stats["exit_logits"][-1], targets).sum() / (targets >= 0).sum()

    def read_out(self, l, x, gate, rows, stats, run):
        """
        Append to stats["exit_logits"] where block l has an exit: here, the last. x (B, T, C) is what the block left,
        gate (B, T) and rows (N,) how it ran, None where it ran whole.
        """
        if l == self.config.n_layer - 1:
            stats["exit_logits"].append(self.logits(x))

    def next_gate(self, l, x, gate, rows, stats, run):
        """The gate (B, T) of block l + 1, None where it runs whole, from what block l left and its own gate."""
        return None

    def logits(self, x, exit=-1):
        """(..., C) -> (..., V), float32 whatever the blocks ran in."""
        return F.linear(self.norms[exit](x), self.wte.weight).float()


class TSA(Transformer):
    """A router after every block but the last decides who takes the next one (paper section 1)."""

    def __init__(self, config):
        super().__init__(config)
        self.routers = nn.ModuleList(Router(config) for _ in range(config.n_layer - 1))

    def price(self):
        """What the loss adds for a mean gate of 1."""
        return self.config.lam

    def next_gate(self, l, x, gate, rows, stats, run):
        training_sees, inference_runs = GATES[self.config.gate]
        make_gate = training_sees if run == "trained" else inference_runs
        return make_gate(self.routers[l](x), self.config.threshold)


class Exit(Transformer):
    """
    Early exit: a LayerNorm per block and the tied head can end a token after every block but the stem. Training reads
    every token out after every block, the stem too; at inference a token stops after the first block whose largest
    softmax probability exceeds the threshold: h is carried up unchanged, and its logits stay those of the block it
    left.
    """

    def read_out(self, l, x, gate, rows, stats, run):
        exit_logits = stats["exit_logits"]
        if run == "trained" or l == 1:      # block 1 is the first exit at inference
            exit_logits.append(self.logits(x, l))
        elif l > 1 and rows is None:        # who left keeps the logits of where it left
            exit_logits.append(torch.where(gate.unsqueeze(-1) > 0, self.logits(x, l), exit_logits[-1]))
        elif l > 1:
            logits = self.logits(x.flatten(0, 1).index_select(0, rows), l)                 # (N, V)
            exit_logits.append(exit_logits[-1].flatten(0, 1).index_copy(0, rows, logits).view_as(exit_logits[-1]))

    def next_gate(self, l, x, gate, rows, stats, run):
        if run == "trained" or l == 0:
            return None
        if rows is not None and len(rows) == 0:
            return gate         # all have left
        # Equation (5). A token that left is as sure as it was, since its logits stay: it remains out.
        return (F.softmax(stats["exit_logits"][-1], dim=-1).amax(-1) <= self.config.threshold).float()

    def task_loss(self, stats, targets, run):
        scored = stats["exit_logits"] if run == "trained" else stats["exit_logits"][-1:]
        return sum(cross_entropy(logits, targets).sum() for logits in scored) / len(scored) / (targets >= 0).sum()


class Halt(TSA):
    """
    Ours: a token takes every block until its router says halt, and none after. h is read out by the same head wherever
    it stopped, so this is TSA with another gate and another loss.

    With p_l the probability of halting after block l, a token gets to block l with probability
    survive_l = (1 - p_0) ... (1 - p_{l-1}), survive_0 being 1 and survive_L 0, and training minimises

        a (sum over l of (survive_l - survive_{l+1}) H_l + lam * mean of survive_l over l > 0)                   (7)
        + (1 - a) (CE_{L-1} * 5/6 + mean of CE over l > 0 * 1/6)

    CE_l is the cross-entropy of reading h out after block l, and H_l the same against a target that is half the
    character that came and half what the last block predicts (detached), which says more about what a deeper block is
    worth than a single character can. The first line is the loss expected where the token halts, lam being the price in
    nats of going through all blocks. No gate scales anything, so routers learn where to stop and not how much to add.

    The second line does not ask the routers and keeps every block worth getting to: a deep one that nobody gets to
    would never learn enough for anyone to want it. a is 0.4 for the first half of training, and then rises to 0.8,
    towards what will be executed. lam rises from 0 over the first half: at first no block is worth its price.

    Training takes every token to the top, to learn what each block would have gained it. But keys and values are made
    from what inference will leave there, h where p first exceeded the threshold: up to where it halts, a token sees
    exactly what it will see when it is executed.
    """

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("progress", torch.tensor(1.0), persistent=False)   # of training, from 0 to 1: see train.py

    def share(self):
        """a of equation (7)"""
        return 0.4 + 0.4 * (2 * self.progress - 1).clamp(min=0)

    def price(self):
        """lam of equation (7), as far as it has risen, times a: its factor in the loss."""
        return self.share() * self.config.lam * (2 * self.progress).clamp(max=1)

    def read_out(self, l, x, gate, rows, stats, run):
        if run == "trained" or l == self.config.n_layer - 1:
            stats["exit_logits"].append(self.logits(x))

    def next_gate(self, l, x, gate, rows, stats, run):
        if rows is not None and len(rows) == 0:
            return gate         # all have halted
        p = self.routers[l](x)                                                             # (B, T)
        stays = binary(p, self.config.threshold)
        if run != "trained":
            return stays if gate is None else gate * stays
        if l == 0:
            stats |= {"seen": x, "running": torch.ones_like(p), "survive": [torch.ones_like(p)]}
        # running is 1 where inference would have run block l, so that its h has changed.
        stats["seen"] = torch.where(stats["running"].unsqueeze(-1) > 0, x, stats["seen"])
        stats["running"] = stats["running"] * stays
        stats["survive"].append(stats["survive"][-1] * (1 - p))
        return None         # the next block runs whole

    def task_loss(self, stats, targets, run):
        if run != "trained":
            return super().task_loss(stats, targets, run)
        exits, survive = stats["exit_logits"], torch.stack(stats["survive"])               # survive (L, B, T)
        halts = survive - torch.cat([survive[1:], torch.zeros_like(survive[:1])])          # (L, B, T), sums to 1
        came, foreseen = F.one_hot(targets.clamp(min=0), exits[-1].size(-1)), F.softmax(exits[-1].detach(), dim=-1)
        target = (came + foreseen) / 2                                                     # (B, T, V)
        expected = torch.stack([F.cross_entropy(logits.transpose(1, 2), target.transpose(1, 2), reduction="none")
                                for logits in exits])
        expected = (halts * expected).sum(0) * (targets >= 0)                              # (B, T)
        losses = torch.stack([cross_entropy(logits, targets) for logits in exits[1:]])     # (L-1, B, T)
        a = self.share()
        return (a * expected + (1 - a) * (5 * losses[-1] + losses.mean(0)) / 6).sum() / (targets >= 0).sum()


MODELS = {"dense": Transformer, "tsa": TSA, "exit": Exit, "halt": Halt}


def build(config):
    return MODELS[config.model](config)


def default_run(config):
    """The fastest run that does not hurt. The paper's soft gate hurts: cut to all or nothing, it ruins the text."""
    return "trained" if config.model == "tsa" and config.gate == "soft" else "gathered"


# ----------------------------------------------------------------------------------------------------------------
# Generation

@torch.inference_mode()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, run="gathered", cache=True):
    """
    Continue idx (B, T): yields, a character at a time, idx_next (B, 1) and the gates (L, B) of the token that
    predicted it. temperature 0 takes the likeliest character. When the window is full, the last block_size // 2
    characters are kept and read again from position 0. With `cache` a step computes one token per sequence, not the
    whole window; the text is the same.
    """
    model.eval()
    kv = None
    for _ in range(max_new_tokens):
        if idx.size(1) > model.config.block_size:
            idx, kv = idx[:, -max(model.config.block_size // 2, 1):], None
        new = idx if kv is None else idx[:, -1:]
        if cache and kv is None:
            kv = [KV(len(idx), model.config, model.wte.weight) for _ in model.blocks]
        logits, _, stats = model(new, run=run, cache=kv)
        logits = logits[:, -1]                                                             # (B, V)
        if top_k is not None:
            worst = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
            logits = logits.masked_fill(logits < worst, -torch.inf)
        if temperature == 0:
            idx_next = logits.argmax(-1, keepdim=True)
        else:
            idx_next = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)       # (B, 1)
        idx = torch.cat([idx, idx_next], dim=1)
        yield idx_next, stats["gates"][:, :, -1]


# ----------------------------------------------------------------------------------------------------------------
# What was saved. Only executed shares count: `ran` is the share of tokens, block by block, whose gate was not 0.

def tlops_saved(ran):
    """Token-layer operations saved, 1 - (1 + (L-1) alpha) / L, where alpha is the mean of ran[1:], and ran[0] is 1."""
    return 1 - sum(ran) / len(ran)


def macs_per_token(config, ran):
    """
    Multiply-adds of the matrix products for one token in a full window. A block is 12 C^2 (query, key, value, output,
    and 8 for the feed-forward) and T C for an attention row of T / 2 keys on average. A skipped one is 2 C^2: the
    token's keys and values.
    """
    C, V, L = config.n_embd, config.vocab_size, config.n_layer
    blocks = sum(share * (12 * C * C + config.block_size * C) + (1 - share) * 2 * C * C for share in ran)
    routers = (L - 1) * (C + 1) * config.router_width if config.has_routers else 0
    heads = sum(ran[1:]) if config.model == "exit" else 1       # who took a block asks there whether to leave
    return blocks + routers + heads * C * V


def macs_saved(config, ran):
    """Share of the multiply-adds of the plain transformer of the same size that was not executed."""
    dense = replace(config, model="dense")
    return 1 - macs_per_token(config, ran) / macs_per_token(dense, [1.0] * config.n_layer)
