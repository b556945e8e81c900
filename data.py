"""
Load text as characters, and split it into training, validation and test sets.

`load(name)` accepts "shakespeare", "enwik8", "stdlib" (the sources of Python's standard library, which need no
download), the path of a UTF-8 text file, or a synthetic task: "copy" and "sort" are the paper's, "chain" is ours. The
tasks use printable characters as symbols, so they are encoded and displayed like any text.
"""
import hashlib
import string
import sysconfig
import urllib.request
import zipfile
import zlib
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
ENWIK8_SPLIT = 90_000_000, 95_000_000           # the characters where the paper's val and test splits begin
TASK_TRAIN, CHAIN_TRAIN, VAL = 10_000, 100_000, 1_000       # numbers of sequences; TASK_TRAIN and VAL are the paper's
DIGITS, ROUNDS, PLACES = "0123456789", 5, 6     # chain: symbols, rounds, places per round
LETTERS = string.ascii_letters[:(ROUNDS - 1) * PLACES]      # a letter for each place, except in the last round


class UserError(ValueError):
    """A mistake in a flag, a file or a prompt. The programs print it as one line, without a traceback."""


@dataclass
class Data:
    """
    An encoded corpus: token i is the character vocab[i]. `splits` maps "train", "val" and "test" to integer tensors.
    For a text, a split is one stream of tokens (n,). For a task, it holds the idx and targets of n sequences (n, 2, T);
    targets of -1 are not scored, and there is no test split. train.py never uses "test", which is for final results.
    """
    vocab: str
    splits: dict
    prompt: str                 # what sample.py continues by default; empty if there is nothing to generate
    example: str                # what sample.py --map shows by default

    def batch(self, batch_size, block_size):
        """Random training windows, drawn with torch's global generator -> idx, targets (B, T) int64."""
        tokens = self.splits["train"]
        if tokens.dim() == 3:
            pairs = tokens[torch.randint(len(tokens), (batch_size,), device=tokens.device)]           # (B, 2, T)
            return pairs.long().unbind(1)
        start = torch.randint(len(tokens) - block_size, (batch_size, 1), device=tokens.device)
        rows = tokens[start + torch.arange(block_size + 1, device=tokens.device)].long()   # (B, T + 1)
        return rows[:, :-1], rows[:, 1:]

    def windows(self, split, block_size):
        """All non-overlapping windows of a split -> idx, targets (n, T) int64. Raise UserError if none fits."""
        if split not in self.splits:
            raise UserError(f"there is no {split} split")
        tokens = self.splits[split]
        if tokens.dim() == 3:
            if tokens.size(2) > block_size:
                raise UserError(f"--block_size must be at least {tokens.size(2)}, the length of the sequences")
            return tokens.long().unbind(1)
        if len(tokens) <= block_size:
            raise UserError(f"the {split} split has only {len(tokens)} characters: --block_size must be smaller")
        rows = tokens.unfold(0, block_size + 1, block_size).long()                         # (n, T + 1)
        return rows[:, :-1], rows[:, 1:]

    def checksum(self):
        return zlib.crc32(b"".join([self.vocab.encode(), *(tokens.numpy() for tokens in self.splits.values())]))


def encode(text, vocab):
    """Encode a text as a list of tokens. Raise a UserError that names the characters missing from the vocabulary."""
    unknown = sorted(set(text) - set(vocab))
    if unknown:
        raise UserError(f"not in the model's vocabulary: {ascii(''.join(unknown))}")
    return [vocab.index(c) for c in text]


def fetch(name):
    """Return the path of a corpus file, downloaded if needed. Raise OSError or UserError on failure."""
    file_name, url, sha256 = FILES[name]
    path = FOLDER / file_name
    if not path.exists():
        try:
            content = urllib.request.urlopen(url, timeout=10).read()
            if hashlib.sha256(content).hexdigest() != sha256:
                raise OSError("the server sent a different file")
        except Exception as error:
            raise OSError(f"cannot download {url} ({error}); download it yourself and save it as {path}") from None
        FOLDER.mkdir(exist_ok=True)
        path.write_bytes(content)
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:     # for example, if a write was interrupted
        raise UserError(f"{path} is not the expected file: delete it to download it again")
    return path


def shakespeare_or_stdlib():
    """Return the name of the text for --data auto: Python's standard library if there is no internet."""
    try:
        fetch("shakespeare")
        return "shakespeare"
    except OSError as error:
        print(f"{error}. Training on the sources of Python's standard library instead (--data stdlib).")
        return "stdlib"


def text_data(text, split=None):
    """Encode a text, with its sorted characters as the vocabulary, and split it (by default 80%, 10% and 10%)."""
    vocab = "".join(sorted(set(text)))
    if len(vocab) < 2:
        raise UserError("the text is empty or repeats one character")
    tokens = torch.tensor(encode(text, vocab), dtype=torch.int32)
    a, b = split or (int(0.8 * len(tokens)), int(0.9 * len(tokens)))
    splits = {"train": tokens[:a], "val": tokens[a:b], "test": tokens[b:]}
    return Data(vocab, splits, prompt="\n" if "\n" in vocab else vocab[0], example=text[a:a + 64])


def task_data(vocab, idx, targets, prompt_length, example):
    """idx, targets (n, T) -> Data. The last VAL sequences are for validation; `example` picks the one to show."""
    pairs = torch.from_numpy(np.stack([idx, targets], axis=1).astype(np.int32))            # (n, 2, T)
    train, val = pairs[:-VAL], pairs[-VAL:]
    text = "".join(vocab[i] for i in val[example, 0])
    return Data(vocab, {"train": train, "val": val}, text[:prompt_length], text)


def copy_or_sort(name):
    """The paper's tasks (section 2): `^source|target$`, with the source or the sorted source as target."""
    # The vocabulary (`.` is padding, unused here) and the length are those of the paper's code.
    vocab, n, length = ".^|$abcdefghijklmnopqrstuvwxyzAB", TASK_TRAIN + VAL, 20
    source = np.random.default_rng(0).integers(4, len(vocab), size=(n, length))
    target = source if name == "copy" else np.sort(source, axis=1)
    bos, sep, eos = (np.full((n, 1), vocab.index(c)) for c in "^|$")
    targets = np.hstack([np.full((n, length + 1), -1), target, eos])        # what precedes | is not scored
    return task_data(vocab, np.hstack([bos, source, sep, target]), targets, prompt_length=length + 2, example=0)


def chain():
    """
    A task that needs depth: 5 rounds of 6 places. In round 0, every place holds a digit. In later rounds, a place holds
    a digit or a letter, and a letter points to one of the 30 places, always in the previous round (`a` to place 1, `b`
    to place 2, ...). The target at each place is the digit at the end of its chain of letters, so each hop (following
    one letter) depends on the one before. No digit or letter occurs twice within a round, so chains never merge. A
    sequence and its targets:

        741853 4bfadc lhi0gj nm4o30 uwtx56
        741853 443781 143047 414330 431056
    """
    rng, n = np.random.default_rng(0), CHAIN_TRAIN + VAL
    row = np.arange(n)[:, None]

    def distinct(k):        # for each of the n sequences, PLACES distinct numbers below k
        return rng.random((n, k)).argsort(axis=1)[:, :PLACES]

    idx = targets = distinct(len(DIGITS))                                                  # (n, PLACES), round 0
    for previous in range(0, (ROUNDS - 1) * PLACES, PLACES):        # where the previous round begins
        digit, place = distinct(len(DIGITS)), previous + distinct(PLACES)                  # (n, PLACES)
        is_digit = rng.random((n, PLACES)) < 0.2                    # otherwise, a letter that points to `place`
        idx = np.hstack([idx, np.where(is_digit, digit, len(DIGITS) + place)])
        targets = np.hstack([targets, np.where(is_digit, digit, targets[row, place])])
    return task_data(DIGITS + LETTERS, idx, targets, prompt_length=0, example=666)         # the sequence above


def chain_answers(text):
    """Return the digit at the end of each chain: "7ab" -> "777". Raise UserError if a letter does not point back."""
    answers = ""
    for t, c in enumerate(text):
        if c in LETTERS[t:]:
            raise UserError(f"{c!r} at place {t + 1} must point to an earlier place (a: 1, b: 2, ...)")
        answers += c if c in DIGITS else answers[LETTERS.index(c)]
    return answers


def load(name):
    """Load a corpus by name (see the top of this file). Raise OSError or UserError if that fails."""
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
