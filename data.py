"""
The data: text as characters, split into train, validation and test.

`load(name)` accepts "shakespeare", "enwik8", "stdlib" (the sources of Python's standard library, which need no
download), the path of a UTF-8 text file, or a synthetic task: "copy" and "sort" are the paper's, "chain" is ours. The
tasks use printable characters as symbols, so they are encoded and displayed like any text.
"""
import hashlib
import string
import sysconfig
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).resolve().parent / "data"
FILES = {       # name: file in FOLDER, URL, sha256
    "shakespeare": ("tinyshakespeare.txt",
                    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "enwik8": ("enwik8.zip", "http://mattmahoney.net/dc/enwik8.zip",
               "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"),
}
TIMEOUT = 10                                    # seconds that a server may stay silent
ENWIK8_SPLIT = 90_000_000, 95_000_000           # the characters where the paper's val and test splits begin

SYMBOLS = "abcdefghijklmnopqrstuvwxyzAB"        # copy, sort: with the special symbols . ^ | $, a vocabulary of 32
SOURCE_LENGTH = 20                              # as in the paper's code (the paper itself says 10)
TASK_TRAIN, CHAIN_TRAIN, VAL = 10_000, 100_000, 1_000       # numbers of sequences; TASK_TRAIN and VAL are the paper's
DIGITS = "0123456789"
ROUNDS, PLACES, DIGIT_SHARE = 5, 6, 0.2         # chain: rounds, places per round, probability that a place is a digit
LETTERS = string.ascii_letters[:(ROUNDS - 1) * PLACES]      # a letter for each place, except in the last round


@dataclass
class Data:
    """
    An encoded corpus: token i is the character vocab[i]. `splits` maps "train", "val" and "test" to integer tensors.
    For a text, a split is one stream of tokens (n,). For a task, it holds the idx and targets of n sequences (n, 2, T);
    targets of -1 are not scored, and there is no test split. train.py never uses "test", so keep it for final results.
    """
    vocab: str
    splits: dict
    prompt: str                 # what sample.py continues by default; empty if there is nothing to generate
    example: str                # what sample.py --map shows by default

    def batch(self, batch_size, block_size):
        """Random training windows, drawn with torch's global generator -> idx, targets (B, T) int64."""
        tokens = self.splits["train"]
        if tokens.dim() == 3:
            return tokens[torch.randint(len(tokens), (batch_size,), device=tokens.device)].long().unbind(1)
        start = torch.randint(len(tokens) - block_size, (batch_size, 1), device=tokens.device)
        rows = tokens[start + torch.arange(block_size + 1, device=tokens.device)].long()
        return rows[:, :-1], rows[:, 1:]

    def windows(self, split, block_size):
        """All non-overlapping windows of a split -> idx, targets (n, T) int64. Raise ValueError if none fits."""
        tokens = self.splits[split]
        if tokens.dim() == 3:
            if tokens.size(2) > block_size:
                raise ValueError(f"--block_size must be at least {tokens.size(2)}, the length of the sequences")
            return tokens.long().unbind(1)
        if len(tokens) <= block_size:
            raise ValueError(f"the {split} split has only {len(tokens)} characters: use a longer text or a smaller "
                             f"--block_size")
        rows = tokens.unfold(0, block_size + 1, block_size).long()
        return rows[:, :-1], rows[:, 1:]


def encode(text, vocab):
    """Return a text as a list of tokens; raise a ValueError that names the characters not in the vocabulary."""
    unknown = sorted(set(text) - set(vocab))
    if unknown:
        raise ValueError(f"the model does not know the characters {ascii(''.join(unknown))}")
    return [vocab.index(c) for c in text]


def fetch(name):
    """The path of a corpus file, downloaded if needed. Raise OSError if that fails, ValueError if the file is wrong."""
    file_name, url, sha256 = FILES[name]
    path = FOLDER / file_name
    if not path.exists():
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
                content = response.read()
            if hashlib.sha256(content).hexdigest() != sha256:
                raise OSError("the server sent another file")
        except Exception as error:      # no network, a broken response, another file
            raise OSError(f"cannot download {url} ({error}); download it yourself and save it as {path}") from None
        FOLDER.mkdir(exist_ok=True)
        path.with_suffix(".tmp").write_bytes(content)
        path.with_suffix(".tmp").replace(path)
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise ValueError(f"{path} is not the expected file: delete it to download it again")
    return path


def text_data(text, split=None):
    """Encode a text, with its sorted characters as the vocabulary, and split it (by default 80%, 10% and 10%)."""
    vocab = "".join(sorted(set(text)))
    if len(vocab) < 2:
        raise ValueError("the text is empty or repeats one character")
    tokens = torch.tensor(encode(text, vocab), dtype=torch.int32)
    a, b = split or (int(0.8 * len(tokens)), int(0.9 * len(tokens)))
    splits = {"train": tokens[:a], "val": tokens[a:b], "test": tokens[b:]}
    return Data(vocab, splits, prompt="\n" if "\n" in vocab else vocab[0], example=text[a:a + 64])


def task_data(vocab, idx, targets, prompt_length, example=0):
    """idx and targets (n, T) -> Data, with the last VAL sequences for validation, one of them as the example."""
    pairs = torch.from_numpy(np.stack([idx, targets], axis=1).astype(np.int32))
    example = "".join(vocab[i] for i in idx[-VAL:][example])
    return Data(vocab, {"train": pairs[:-VAL], "val": pairs[-VAL:]}, example[:prompt_length], example)


def copy_or_sort(name):
    """
    Paper, section 2: `^source|target$`, where the target is the source (copy) or the sorted source (sort). Only what
    follows `|` is scored.
    """
    vocab, n = ".^|$" + SYMBOLS, TASK_TRAIN + VAL
    source = np.random.default_rng(0).integers(4, len(vocab), size=(n, SOURCE_LENGTH))
    target = source if name == "copy" else np.sort(source, axis=1)
    bos, sep, eos = (np.full((n, 1), vocab.index(c)) for c in "^|$")
    idx = np.hstack([bos, source, sep, target])
    targets = np.hstack([np.full((n, SOURCE_LENGTH + 1), -1), target, eos])
    return task_data(vocab, idx, targets, SOURCE_LENGTH + 2)


def chain():
    """
    A task that needs depth: 5 rounds of 6 places. In round 0 every place holds a digit, in later rounds a digit or a
    letter that points to a place in the previous round (`a` to place 1 of the 30, `b` to place 2, ...). The target at
    each place is the digit at the end of its chain of letters, so each hop (following one letter) depends on the one
    before. No digit or letter occurs twice within a round, so chains never merge. A sequence and its targets:

        741853 4bfadc lhi0gj nm4o30 uwtx56
        741853 443781 143047 414330 431056
    """
    rng = np.random.default_rng(0)
    n = CHAIN_TRAIN + VAL

    def distinct(k):        # PLACES distinct numbers below k in every row
        return rng.random((n, k)).argsort(axis=1)[:, :PLACES]

    idx = targets = distinct(len(DIGITS))                                                  # (n, PLACES), round 0
    for start in range(PLACES, ROUNDS * PLACES, PLACES):
        digits, before = distinct(len(DIGITS)), start - PLACES + distinct(PLACES)
        is_digit = rng.random((n, PLACES)) < DIGIT_SHARE
        reached = np.take_along_axis(targets, before, axis=1)
        idx = np.hstack([idx, np.where(is_digit, digits, len(DIGITS) + before)])
        targets = np.hstack([targets, np.where(is_digit, digits, reached)])
    return task_data(DIGITS + LETTERS, idx, targets, 0, example=666)       # the one above, where `t` makes 4 hops


def chain_answers(text):
    """The digit at the end of each chain: "7ab" -> "777". Raise ValueError if a letter does not point back."""
    answers = ""
    for t, c in enumerate(text):
        if c in LETTERS[t:]:
            raise ValueError(f"{c!r} at place {t + 1} must point to an earlier place (a: 1, b: 2, ...)")
        answers += c if c in DIGITS else answers[LETTERS.index(c)]
    return answers


def load(name):
    """Load the corpus `name` (see the top of this file); raise OSError or ValueError if that fails."""
    if name in ("copy", "sort"):
        return copy_or_sort(name)
    if name == "chain":
        return chain()
    if name == "enwik8":        # raw XML; the loss is per Unicode character
        with zipfile.ZipFile(fetch(name)) as archive:
            return text_data(archive.read("enwik8").decode("utf-8"), ENWIK8_SPLIT)
    if name == "stdlib":        # its top-level modules, 4.7 million characters in Python 3.11
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        return text_data("".join(file.read_text(encoding="utf-8") for file in files))
    path = fetch(name) if name == "shakespeare" else Path(name)
    return text_data(path.read_text(encoding="utf-8"))
