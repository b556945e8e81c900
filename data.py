"""
Text to train on, as characters, split into train, validation and test.

`load(name)` takes "shakespeare", "enwik8", "stdlib" (the sources of Python's standard library, which every machine
has), the path of a UTF-8 text file, or a synthetic task: "copy" and "sort" are the paper's, "chain" is ours. The
symbols of a task are printable characters, so that vocabulary, sampling and colouring treat it like any text.
"""
import hashlib
import http.client
import io
import os
import string
import sysconfig
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tsa import UserError

FOLDER = Path(__file__).resolve().parent / "data"
HOMES = {       # file in FOLDER, where to download it, sha256
    "shakespeare": ("tinyshakespeare.txt",
                    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "enwik8": ("enwik8.zip", "http://mattmahoney.net/dc/enwik8.zip",
               "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"),
}
STALL_SECONDS = 10      # without a byte from a server
ENWIK8_CUTS = 90_000_000, 95_000_000            # the paper's split, in characters

TASKS = ("copy", "sort", "chain")
PAD, BOS, SEP, EOS = ".^|$"                     # the 4 special symbols in the paper's vocabulary of 32
SYMBOLS = "abcdefghijklmnopqrstuvwxyzAB"        # the other 28; the task "sort" sorts in this order
LENGTH = 20                                     # of a source, as in the paper's script (its text says 10)
TRAIN_SEQUENCES, CHAIN_TRAIN_SEQUENCES, VAL_SEQUENCES = 10_000, 100_000, 1_000
DIGITS = "0123456789"
CHAIN_ROUNDS, CHAIN_WIDTH, CHAIN_NEW = 7, 8, 0.2       # the last: the chance that a place holds a digit
PLACES = string.ascii_letters[:(CHAIN_ROUNDS - 1) * CHAIN_WIDTH]        # one name for each place but the last round's


@dataclass
class Data:
    """
    An encoded corpus: token i is the character vocab[i]. splits maps "train", "val" and "test" to integer tensors: one
    stream of characters (n,), or for a task one sequence a row with its targets, -1 where none is scored (n, 2, T).
    Nothing here reads "test": keep it for a final number.
    """
    name: str
    vocab: str
    prompt: str                 # what sampling starts from when the user gives no prompt
    splits: dict
    new_tokens: int = 500       # how much sampling writes

    @property
    def is_task(self):
        return self.name in TASKS

    def digest(self):
        """A fingerprint of the whole text, so that a resumed run can tell when it has changed."""
        sha256 = hashlib.sha256(self.vocab.encode("utf-8"))
        for tokens in self.splits.values():
            sha256.update(tokens.numpy())
        return sha256.hexdigest()

    def to(self, device):
        self.splits = {split: tokens.to(device) for split, tokens in self.splits.items()}

    def check_block_size(self, block_size):
        """Raise UserError unless validation, the smallest split, holds block_size characters and one more."""
        if self.is_task:
            length = self.splits["val"].size(2)
            if length > block_size:
                raise UserError(f"--data {self.name} has sequences of {length}: --block_size must not be less")
        elif len(self.splits["val"]) <= block_size:
            n = sum(map(len, self.splits.values()))
            raise UserError(f"--data {self.name} has {n} characters, so its validation split (a tenth) is shorter than "
                            f"block_size {block_size}: give a longer text or a smaller --block_size")

    def batch(self, batch_size, block_size):
        """Random windows to train on, drawn with torch's global generator -> idx, targets (B, T) int64."""
        tokens = self.splits["train"]
        if self.is_task:
            return tokens[torch.randint(len(tokens), (batch_size,), device=tokens.device)].long().unbind(1)
        start = torch.randint(len(tokens) - block_size, (batch_size, 1), device=tokens.device)
        rows = tokens[start + torch.arange(block_size + 1, device=tokens.device)].long()
        return rows[:, :-1], rows[:, 1:]

    def windows(self, split, block_size, n=None):
        """The first n windows, by default the whole split, side by side from its start -> idx, targets (n, T) int64."""
        tokens = self.splits[split]
        if self.is_task:
            return tokens[:n].long().unbind(1)
        rows = tokens.unfold(0, block_size + 1, block_size)[:n].long()
        return rows[:, :-1], rows[:, 1:]


def encode(text, vocab):
    """A prompt -> the list of its tokens; UserError names the characters that the model has never seen."""
    unknown = sorted(set(text) - set(vocab))
    if unknown:
        raise UserError(f"the model does not know the characters {ascii(''.join(unknown))}: it was trained on "
                        f"{len(vocab)} others, {ascii(vocab[:40])} ...")
    return [vocab.index(c) for c in text]


def write_atomic(path, content):
    """Write bytes to a temporary name and rename it: `path` is the old file or the new one, never half of one."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); a file that was there is unchanged")
    finally:
        temporary.unlink(missing_ok=True)       # is there only if something went wrong


def fetch(name):
    """The verified bytes of one of HOMES, from FOLDER or, the first time, from the network."""
    file, url, sha256 = HOMES[name]
    path = FOLDER / file
    source = path.as_uri() if path.exists() else url
    try:
        with urllib.request.urlopen(source, timeout=STALL_SECONDS) as stream:
            content = stream.read()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise OSError("it is damaged or another file: its sha256 differs")
    except (OSError, http.client.HTTPException) as error:       # some messages span lines
        raise UserError(f"{source} cannot be used ({' '.join(str(error).split())}): put {file} into {FOLDER} by hand, "
                        f"or use --data stdlib")
    if source == url:
        FOLDER.mkdir(exist_ok=True)
        write_atomic(path, content)
    return content


def text_data(name, text, cuts=None):
    """Sorted vocabulary; train, validation and test in order, cut at two characters, by default into 80%, 10%, 10%."""
    vocab = "".join(sorted(set(text)))
    if len(vocab) < 2:
        raise UserError(f"--data {name} is empty or repeats one character: there is nothing to learn in it")
    token_of_code = np.zeros(ord(vocab[-1]) + 1, dtype=np.int16 if len(vocab) < 2**15 else np.int32)
    token_of_code[[ord(c) for c in vocab]] = np.arange(len(vocab))
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    tokens = torch.from_numpy(token_of_code[codes])
    a, b = cuts or (int(0.8 * len(tokens)), int(0.9 * len(tokens)))
    splits = {"train": tokens[:a], "val": tokens[a:b], "test": tokens[b:]}
    return Data(name, vocab, "\n" if "\n" in vocab else vocab[0], splits)


def task_data(name, vocab, idx, targets, prompt_length, new_tokens):
    """Sequences idx and targets (n, T), the last VAL_SEQUENCES of them for validation."""
    pairs = torch.from_numpy(np.stack([idx, targets], axis=1).astype(np.int32))
    splits = {"train": pairs[:-VAL_SEQUENCES], "val": pairs[-VAL_SEQUENCES:]}
    prompt = "".join(vocab[i] for i in idx[-1, :prompt_length])
    return Data(name, vocab, prompt, splits, new_tokens)


def copy_or_sort(name):
    """Paper, section 2: BOS source SEP target EOS, where the target is the source again (copy) or in order (sort)."""
    vocab = PAD + BOS + SEP + EOS + SYMBOLS
    n = TRAIN_SEQUENCES + VAL_SEQUENCES
    source = np.random.default_rng(0).integers(vocab.index(SYMBOLS[0]), len(vocab), size=(n, LENGTH))
    target = source if name == "copy" else np.sort(source, axis=1)
    bos, sep, eos = (np.full((n, 1), vocab.index(c)) for c in (BOS, SEP, EOS))
    rows = np.concatenate([bos, source, sep, target, eos], axis=1)
    targets = rows[:, 1:].copy()
    targets[:, :LENGTH + 1] = -1        # only what comes after SEP can be known
    return task_data(name, vocab, rows[:, :-1], targets, LENGTH + 2, LENGTH + 1)


def chain():
    """
    A task that needs depth. There are 7 rounds of 8 places. A place holds a digit, or the letter that names a place in
    the round before. The target at each place is the digit at the end of its chain, and each hop on the way needs what
    another place found out first. The 8 chains of a round never share a letter, so a model that cannot follow them
    guesses.
    """
    vocab = DIGITS + PLACES
    generator = np.random.default_rng(0)
    n, W = CHAIN_TRAIN_SEQUENCES + VAL_SEQUENCES, CHAIN_WIDTH
    row = np.arange(n)[:, None]

    def shuffled(k):        # W different numbers below k in every row
        return generator.permuted(np.tile(np.arange(k), (n, 1)), axis=1)[:, :W]

    idx = targets = shuffled(len(DIGITS))                                                  # (n, W), the first round
    for start in range(W, CHAIN_ROUNDS * W, W):
        digits, before = shuffled(len(DIGITS)), start - W + shuffled(W)
        is_digit = generator.random((n, W)) < CHAIN_NEW
        idx = np.hstack([idx, np.where(is_digit, digits, len(DIGITS) + before)])
        targets = np.hstack([targets, np.where(is_digit, digits, targets[row, before])])
    return task_data("chain", vocab, idx, targets, CHAIN_ROUNDS * W, 1)


def load(name=None):
    """The corpus `name`, see the top of this file. Without a name Shakespeare, else stdlib and a line that says why."""
    if name is None:
        try:
            return load("shakespeare")
        except UserError as error:
            print(f"{error}. Going on with stdlib, the sources of Python's standard library.")
            name = "stdlib"
    if name == "shakespeare":
        return text_data(name, fetch(name).decode("utf-8"))
    if name == "enwik8":        # raw XML; the loss is per unicode character
        with zipfile.ZipFile(io.BytesIO(fetch(name))) as archive:
            return text_data(name, archive.read("enwik8").decode("utf-8"), ENWIK8_CUTS)
    if name == "stdlib":        # its top-level modules, 4.7 million characters in Python 3.11
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        return text_data(name, "".join(file.read_text(encoding="utf-8") for file in files))
    if name in TASKS:
        return chain() if name == "chain" else copy_or_sort(name)
    if not Path(name).is_file():
        raise UserError(f"--data {name} is not a file: give a text file, or shakespeare, enwik8, stdlib, copy, sort, "
                        f"chain")
    try:
        return text_data(name, Path(name).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"--data {name} is not UTF-8 text (byte {error.start}): convert it first")
