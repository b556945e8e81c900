"""
Load text as characters, and split it into training, validation and test sets. `load(name)` accepts "shakespeare",
"enwik8", "stdlib" (the sources of Python's standard library, which need no download), the path of a UTF-8 text file, or
a synthetic task whose symbols are characters: "copy" and "sort" are the paper's, "chain" is ours.
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
N_VAL = 1_000                                   # validation sequences of a task, as in the paper
DIGITS, ROUNDS, PLACES = "0123456789", 5, 6     # chain: symbols, rounds, places per round
LETTERS = string.ascii_letters[:(ROUNDS - 1) * PLACES]      # a letter for each place, except in the last round


@dataclass
class Data:
    """
    An encoded corpus: token i is the character vocab[i]. `splits` maps "train", "val" and, for texts, "test" to two
    streams of tokens, idx and targets (n,) each. A target of -1 is not scored. The streams of a task are its sequences,
    one after another, of `length` tokens each.
    """
    vocab: str
    splits: dict
    prompt: str                 # what sample.py shows by default
    length: int | None = None

    def batch(self, B, T):
        """Random training windows of T tokens (of a task: sequences) -> idx, targets (B, T)."""
        idx, targets = self.splits["train"]
        T, stride = (self.length, self.length) if self.length else (T, 1)
        start = stride * torch.randint((len(idx) - T) // stride + 1, (B, 1))
        rows = start + torch.arange(T)                                          # (B, T)
        return idx[rows], targets[rows]

    def windows(self, split, T):
        """All non-overlapping windows of T tokens (of a task: sequences) of a split -> idx, targets (n, T)."""
        idx, targets = self.splits[split]
        if self.length and self.length > T:
            raise ValueError(f"--block_size must be at least {self.length}, the length of the sequences")
        if len(idx) < T:
            raise ValueError(f"the {split} split has only {len(idx)} characters: --block_size must be smaller")
        T = self.length or T
        return idx.unfold(0, T, T), targets.unfold(0, T, T)

    def checksum(self):
        crc = zlib.crc32(self.vocab.encode())
        for idx, _ in self.splits.values():
            crc = zlib.crc32(idx.numpy(), crc)
        return crc


def encode(text, vocab):
    """A text -> its tokens (n,)."""
    unknown = sorted(set(text) - set(vocab))
    if unknown:
        raise ValueError(f"not in the model's vocabulary: {ascii(''.join(unknown))}")
    codes, known = (np.frombuffer(part.encode("utf-32-le"), dtype=np.uint32) for part in (text, vocab))
    table = np.zeros(known.max() + 1, dtype=np.int64)           # code point -> token
    table[known] = np.arange(len(vocab))
    return torch.from_numpy(table[codes])


def text_data(text, split=(0.8, 0.9)):
    """A text -> Data with its sorted characters as the vocabulary; `split` says where val and test begin."""
    vocab = "".join(sorted(set(text)))
    if len(vocab) < 2:
        raise ValueError("the text is empty or repeats one character")
    tokens = encode(text, vocab)
    a, b = (int(share * len(tokens)) for share in split)
    splits = {"train": tokens[:a], "val": tokens[a:b], "test": tokens[b:]}
    return Data(vocab, {name: (part[:-1], part[1:]) for name, part in splits.items()}, prompt=text[a:a + 32])


def task_data(vocab, idx, targets, prompt):
    """idx, targets (n, T), prompt: some tokens -> Data, with the last N_VAL sequences for validation."""
    n, length = idx.shape
    idx, targets = torch.from_numpy(idx).flatten(), torch.from_numpy(targets).flatten()
    a = (n - N_VAL) * length
    splits = {"train": (idx[:a], targets[:a]), "val": (idx[a:], targets[a:])}
    return Data(vocab, splits, "".join(vocab[i] for i in prompt), length)


def copy_or_sort(name):
    """The paper's tasks (section 2): `^source|target$`, with the source or the sorted source as target."""
    # The vocabulary (`.` is unused padding) and the length are those of the paper's code.
    vocab, n, length = ".^|$abcdefghijklmnopqrstuvwxyzAB", 10_000 + N_VAL, 20
    source = np.random.default_rng(0).integers(4, len(vocab), size=(n, length))
    target = source if name == "copy" else np.sort(source, axis=1)
    bos, sep, eos = (np.full((n, 1), vocab.index(c)) for c in "^|$")
    targets = np.hstack([np.full((n, length + 1), -1), target, eos])        # what precedes | is not scored
    idx = np.hstack([bos, source, sep, target])
    return task_data(vocab, idx, targets, prompt=idx[-N_VAL, :length + 2])


def chain(seed=0):
    """
    A task that needs depth: 5 rounds of 6 places. In round 0, every place holds a digit. In later rounds, a place holds
    a digit, or a letter that points to a place of the previous round (`a` to place 1, `g` to place 7, ...).
    The target at each place is the digit at the end of its chain of letters, so each hop (following one letter) depends
    on the one before. No digit or letter occurs twice within a round, so chains never merge. A sequence and its
    targets:

        741853 4bfadc lhi0gj nm4o30 uwtx56
        741853 443781 143047 414330 431056
    """
    rng, n = np.random.default_rng(seed), 100_000 + N_VAL
    row = np.arange(n)[:, None]

    def distinct(k):        # for each of the n sequences, PLACES distinct numbers below k
        return rng.random((n, k)).argsort(axis=1)[:, :PLACES]

    idx = targets = distinct(len(DIGITS))                                       # (n, PLACES), round 0
    for previous in range(0, (ROUNDS - 1) * PLACES, PLACES):        # where the previous round begins
        digit, place = distinct(len(DIGITS)), previous + distinct(PLACES)       # (n, PLACES)
        is_digit = rng.random((n, PLACES)) < 0.2                    # otherwise, a letter that points to `place`
        idx = np.hstack([idx, np.where(is_digit, digit, len(DIGITS) + place)])
        targets = np.hstack([targets, np.where(is_digit, digit, targets[row, place])])
    return task_data(DIGITS + LETTERS, idx, targets, prompt=idx[-N_VAL + 666])             # the sequence above


def chain_answers(text):
    """The digit at the end of each chain: "7ab" -> "777"."""
    answers = ""
    for t, c in enumerate(text):
        if c not in DIGITS + LETTERS[:t]:
            raise ValueError(f"{c!r} at place {t + 1} must point to an earlier place (a: 1, b: 2, ...)")
        answers += c if c in DIGITS else answers[LETTERS.index(c)]
    return answers


def fetch(name):
    """Return the path of a corpus, downloaded on first use. Raise OSError if that fails."""
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
        path.with_suffix(".tmp").write_bytes(content)
        path.with_suffix(".tmp").rename(path)       # an interrupted write leaves no partial file
    return path


def shakespeare_or_stdlib():
    """Return "shakespeare" or, without internet access, "stdlib"."""
    try:
        fetch("shakespeare")
        return "shakespeare"
    except OSError as error:
        print(f"{error}. Training on the sources of Python's standard library instead (--data stdlib).")
        return "stdlib"


def load(name):
    """Load a corpus (see the top of this file). Raise OSError or ValueError if that fails."""
    if name in ("copy", "sort", "chain"):
        return chain() if name == "chain" else copy_or_sort(name)
    if name == "enwik8":        # raw XML, split as in the paper
        with zipfile.ZipFile(fetch(name)) as archive:
            return text_data(archive.read("enwik8").decode("utf-8"), split=(0.9, 0.95))
    if name == "stdlib":        # its top-level modules, 4.7 million characters in Python 3.11
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        return text_data("".join(file.read_text(encoding="utf-8") for file in files))
    path = fetch(name) if name == "shakespeare" else Path(name)
    return text_data(path.read_text(encoding="utf-8"))
