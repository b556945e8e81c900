"""
Score finished runs once more: python -m report.score out/chain-straight-s0 ...

Write into DIR/scores.json the losses, savings and accuracy on the validation split and on data that chose nothing: the
test split of a text, or 1,000 chains from another random seed. For chains, count the tokens by hops and blocks, too.
"""
import argparse
import json
from pathlib import Path

import torch

import data
from train import evaluate
from tsa import load_checkpoint, savings


def count_hops(text):
    """The number of letters that the chain of each character goes through: "7ab" -> [0, 1, 2]."""
    hops = []
    for c in text:
        hops.append(0 if c in data.DIGITS else 1 + hops[data.LETTERS.index(c)])
    return hops


def blocks_that_suffice(hops):
    """All tokens hop simultaneously: l blocks make 2^l - 1 hops. Every token runs block 0."""
    return max(hops.bit_length(), 1)


@torch.no_grad()
def score(model, idx, targets, vocab=None):
    """Score windows idx, targets (n, T); with the vocabulary of the chain puzzle, count its hops, too."""
    val_loss, _ = evaluate(model, idx, targets, sparse=False)
    val_loss_sparse, ran = evaluate(model, idx, targets, sparse=True)
    tlops_saved, macs_saved = savings(model.config, ran, idx.size(1))
    passes = [model(x, sparse=True) for x in idx.split(64)]
    right = torch.cat([logits.argmax(-1) for logits, _ in passes]) == targets              # (n, T)
    result = dict(val_loss=val_loss, val_loss_sparse=val_loss_sparse, tlops_saved=tlops_saved,
                  macs_saved=macs_saved, ran=ran, accuracy=right[targets >= 0].double().mean().item())
    if vocab:
        blocks = torch.cat([(gates != 0).sum(0) for _, gates in passes])                   # (n, T)
        hops = torch.tensor([count_hops([vocab[i] for i in row]) for row in idx])
        counts = range(data.ROUNDS)                             # a chain makes at most ROUNDS - 1 hops
        needed = torch.tensor([blocks_that_suffice(n) for n in counts])[hops]
        table = [[((hops == n) & (blocks == l)).sum().item() for l in range(1, 1 + len(ran))] for n in counts]
        result |= dict(hops=table, exact=(blocks == needed).double().mean().item(),
                       fewer=(blocks < needed).sum().item(), fewer_right=(right & (blocks < needed)).sum().item())
    return result


def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", type=Path, nargs="+")
    for folder in parser.parse_args(argv).folders:
        model, saved = load_checkpoint(folder / "ckpt.pt")
        corpus, T, vocab, rows = data.load(saved["flags"]["data"]), model.config.block_size, None, []
        unseen = corpus.windows("test", T) if "test" in corpus.splits else None
        if saved["flags"]["data"] == "chain":
            vocab, unseen = corpus.vocab, data.chain(seed=1).windows("val", T)
        for split, windows in (("val", corpus.windows("val", T)), ("test", unseen)):
            if windows:
                rows.append({"split": split} | score(model, *windows, vocab))
                print(folder, rows[-1])
        (folder / "scores.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
