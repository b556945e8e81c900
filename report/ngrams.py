"""
Predict Shakespeare from character counts, without a network: python -m report.ngrams

Print the validation losses, in nats per character, of bigrams and of trigrams smoothed toward the bigrams.
"""
import numpy as np

import data
from train import user_errors


def losses(train, val, V):
    """Tokens (n,) and (m,) below V -> the mean losses of bigrams and of trigrams on `val`, counted on `train`."""
    pairs, triples = np.zeros((V, V)), np.zeros((V, V, V))
    np.add.at(pairs, (train[:-1], train[1:]), 1)
    np.add.at(triples, (train[:-2], train[1:-1], train[2:]), 1)
    p2 = (pairs + 0.1) / (pairs + 0.1).sum(1, keepdims=True)                               # (V, V)
    p3 = (triples + 5 * p2) / (triples.sum(2, keepdims=True) + 5)                          # (V, V, V)
    return -np.log(p2[val[:-1], val[1:]]).mean(), -np.log(p3[val[:-2], val[1:-1], val[2:]]).mean()


@user_errors()
def main():
    corpus = data.load("shakespeare")
    train, val = (corpus.splits[split].numpy() for split in ("train", "val"))
    print("bigrams {:.3f}, trigrams {:.3f}".format(*losses(train, val, len(corpus.vocab))))


if __name__ == "__main__":
    main()
