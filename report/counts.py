"""
Multiply-adds of the matrix products, as the programs really execute them.

Token-layer operations count blocks. They leave out what skipping costs: keys and values of the skipped tokens, routers,
the heads of early exit, and for the tokens that run a masked attention kernel, which is dearer than the causal one.
"""
from dataclasses import replace


def macs_per_token(config, ran, decode=False):
    """
    Multiply-adds of a token in a full window of T = block_size; ran holds the share of tokens that took each block.

    A plain block is 12 C^2 (query, key, value and output 4, feed-forward 8) and T C (scores and values, of the T / 2
    keys that the causal kernel reads on average). A gathered block makes keys and values, 2 C^2, for all tokens. The
    rest is for those that run, and in a prefill each is multiplied with all T keys: 2 T C. decode is batch 1, token by
    token, where T C holds for both. What filling up adds in larger batches is left out: report.clock measures it. Keys
    and values count even where a block is closed for all tokens, since a prefill that fills a cache makes them.
    """
    C, T = config.n_embd, config.block_size
    macs = 0
    for share in ran:
        keys = T if decode or share == 1 else 2 * T         # of scores and values together
        macs += 2 * C * C + share * (10 * C * C + keys * C)
    routers = len(ran) - 1 if config.model in ("tsa", "halt") else 0
    if config.model == "halt" and decode:
        routers = sum(ran[:-1])         # a token that has halted is asked no more
    heads = 1 + sum(ran[1:-1]) if config.model == "exit" else 1
    return macs + routers * (C + 1) * max(C // 4, 16) + heads * C * config.vocab_size


def macs_saved(config, ran, decode=False):
    """The share of the plain model's multiply-adds that is saved; below 0 where routers cost more than that."""
    plain = replace(config, model="dense")
    return 1 - macs_per_token(config, ran, decode) / macs_per_token(plain, [1.0] * len(ran))


def macs_of_old_row(config, tlops_saved):
    """
    macs_per_token at most, for a csv row without `ran`: its sum, L (1 - tlops_saved), is shared evenly among the blocks
    1 ... L-1. (For early exit a head may be missing, but block 1, which runs whole, counts as gathered. That is more if
    T > V.)
    """
    L = config.n_layer
    share = (L * (1 - tlops_saved) - 1) / max(L - 1, 1)
    return macs_per_token(config, [1.0] + [share] * (L - 1))
