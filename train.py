"""
Train and evaluate a model:

    python train.py --data chain --model halt       every flag has a default; --help lists them
    python train.py --resume out/halt-1             continue an interrupted run

Each step's random numbers depend only on (seed, step), so a resumed run matches one that was never interrupted (bit for
bit on a CPU), and evaluation does not affect training.
"""
import argparse
import contextlib
import ctypes
import functools
import itertools
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
from data import UserError
from tsa import GATES, MODELS, Config, Halt, can_train_sparse, savings, token_loss

LOG_INTERVAL = 20
EVAL_WINDOWS = 64       # validation windows scored during training; the final score uses the whole split


@torch.no_grad()
def evaluate(model, windows, sparse):
    """
    Score windows (idx, targets), each (n, T), in float32. Return the mean loss over the scored tokens and two lists
    with one value per block: the mean gate, and the share of tokens that ran the block (gate not 0).
    """
    model.eval()
    idx, targets = windows
    loss, gate_sum, ran = 0, 0, 0
    for x, y in zip(idx.split(64), targets.split(64)):
        logits, gates = model(x, sparse)                                                   # gates (L, B, T)
        loss += token_loss(logits, y).sum().item()
        gate_sum += gates.sum((1, 2)).cpu().double()        # mps has no float64
        ran += (gates != 0).sum((1, 2)).cpu()
    return loss / (targets >= 0).sum().item(), (gate_sum / idx.numel()).tolist(), (ran / idx.numel()).tolist()


def score(model, windows):
    """Evaluate a full and a sparse pass. Print the scores, and return them for the checkpoint and result.json."""
    val_loss, gates, _ = evaluate(model, windows, sparse=False)
    val_loss_sparse, _, ran = evaluate(model, windows, sparse=True)
    tlops_saved, macs_saved = savings(model.config, ran, windows[0].size(1))
    print(f"validation loss {val_loss:.4f} full, {val_loss_sparse:.4f} sparse, saving {tlops_saved:.1%} of token-layer "
          f"operations and {macs_saved:.1%} of multiply-adds ({len(windows[0]):,} windows)")
    if model.config.model != "plain":
        # The penalty lowers the mean gate, but only gates of exactly 0 save anything: a gate of 0.03 is open.
        print("  open gates", *(f"{share:.2f}" for share in ran[1:]), " (share of the tokens that ran each block)")
    return {"val_loss": val_loss, "val_loss_sparse": val_loss_sparse, "tlops_saved": tlops_saved,
            "macs_saved": macs_saved, "ran": ran, "gates": gates}


def seed_step(seed, step):
    """Seed torch so that a step's batch and dropout depend only on (seed, step). Step 0 is the initialization."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))


def make_optimizer(model):
    """AdamW as in the paper: weight decay on matrices only, not on biases, LayerNorms or embeddings."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() == 2 and name not in ("wte.weight", "wpe.weight")
        (matrices if is_matrix else others).append(parameter)
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def schedule(step, warmup_iters, max_iters):
    """The learning-rate multiplier: linear warm-up times a cosine decay from 1 (first step) to 0.1 (last step)."""
    progress = (step - 1) / max(max_iters - 1, 1)
    return min(step / max(warmup_iters, 1), 1) * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


def train(model, optimizer, corpus, windows, args, run, out_dir):
    """
    Train from the step after run["step"] on. `run` is the contents of the checkpoint; every evaluation (on the first
    EVAL_WINDOWS of the windows idx, targets (n, T)) updates and saves it.
    """
    # Training is full with torch.compile, which would recompile for every number of open tokens, and on a GPU, where
    # every block would wait for that number.
    sparse = args.device == "cpu" and not args.compile and can_train_sparse(model.config)
    print("training:", "sparse" if sparse else "full")
    loss_of = functools.partial(model.loss, sparse=True) if sparse else model.loss
    if args.compile:
        loss_of = torch.compile(loss_of)
    max_lam, lam_ramp = getattr(args, "lam", 0), getattr(args, "lam_ramp", 0)      # plain and exit have no penalty
    name = "reach" if isinstance(model, Halt) else "gates"      # Halt returns probabilities of reaching each block
    began = time.perf_counter() - run["seconds"]
    for step in range(run["step"] + 1, args.max_iters + 1):
        model.train()       # evaluation leaves it in eval mode
        seed_step(args.seed, step)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * schedule(step, args.warmup_iters, args.max_iters)
        lam = max_lam * min(step / max(lam_ramp * args.max_iters, 1), 1)

        idx, targets = corpus.batch(args.batch_size, args.block_size)                      # (B, T)
        with precision(args.device, args.dtype):
            task_loss, gates = loss_of(idx, targets)                                       # gates (L, B, T)
            loss = task_loss + lam * gates[1:].mean() if lam else task_loss                # plus the depth penalty
        loss.backward()
        if any(router.out.bias.grad is None for router in getattr(model, "routers", [])):
            raise UserError(f"--gate {args.gate} passes no gradient to the routers: make it differentiable in p")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        evaluates = step % args.eval_interval == 0 or step == args.max_iters
        if evaluates or step % LOG_INTERVAL == 0:
            # A nan persists in the weights, so this finds it later, too; checking every step would force a GPU sync.
            if not torch.isfinite(loss + norm):
                raise UserError(f"the loss or its gradient was not finite (step {step} or shortly before): start a new "
                                f"run with a lower --learning_rate")
            seconds = (time.perf_counter() - began) / step              # per step, including evaluation
            print(f"step {step}/{args.max_iters}  loss {loss.item():.4f} (task {task_loss.item():.4f})  {name}",
                  *(f"{gate:.2f}" for gate in gates[1:].mean((1, 2)).tolist()), f" {1000 * seconds:.0f} ms/step, "
                  f"{seconds * (args.max_iters - step) / 60:.1f} min left")
        if evaluates:
            row = {"step": step, "loss": loss.item(), "task_loss": task_loss.item(), "lam": lam}
            run["history"].append(row | score(model, [tokens[:EVAL_WINDOWS] for tokens in windows]))
            run |= {"step": step, "seconds": time.perf_counter() - began}
            save_checkpoint(run, model, optimizer, out_dir)


def save_checkpoint(run, model, optimizer, out_dir):
    run |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(run, out_dir / "ckpt.tmp")
    (out_dir / "ckpt.tmp").replace(out_dir / "ckpt.pt")     # renamed, so that ckpt.pt is always complete


# ----------------------------------------------------------------------------------------------------------------
# Flags

class Parser(argparse.ArgumentParser):
    """Raises UserError for a mistake, so that it is printed as one line, like all other mistakes."""

    def error(self, message):
        raise UserError(message)


def between(low, high):
    """An argparse type: a number from low to high, of the same type as `low`."""
    def number(text):
        value = type(low)(text)             # argparse reports a ValueError
        if not low <= value <= high:        # also rejects nan
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    return number


COUNT, SHARE = between(1, 10**9), between(0.0, 1.0)
FLAGS = {       # name: (default, type or choices, help)
    "model": ("tsa", MODELS, "the plain transformer, the paper's model, early exit, or halting"),
    "preset": ("laptop", ("laptop", "deep", "paper"), "model size and training flags; deep: 12 layers on stdlib"),
    "data": ("auto", str, "shakespeare, enwik8, stdlib, copy, sort, chain, or the path of a UTF-8 text file; auto: "
                          "shakespeare, or stdlib if that cannot be downloaded"),
    "n_layer": (6, COUNT, "number of blocks"),
    "n_head": (4, COUNT, "number of attention heads"),
    "n_embd": (128, COUNT, "embedding width"),
    "block_size": (64, COUNT, "context length in tokens"),
    "dropout": (0.0, SHARE, "dropout probability"),
    "batch_size": (32, COUNT, "sequences per step"),
    "max_iters": (2400, COUNT, "training steps"),
    "learning_rate": (1.5e-3, SHARE, "peak learning rate; cosine decay to 10%%"),
    "warmup_iters": (100, between(0, 10**9), "steps of linear warm-up"),
    "gate": (None, GATES, "gate design, from GATES in tsa.py"),
    "gate_bias": (None, between(-100.0, 100.0), "initial bias of the routers"),
    "threshold": (None, SHARE, "skip or halt above this probability, or exit above this confidence"),
    "lam": (None, between(0.0, 1e6), "weight of the depth penalty in the loss"),
    "lam_ramp": (None, SHARE, "share of training over which lam rises from 0"),
    "seed": (0, between(0, 2**63 - 1), "random seed"),
    "device": ("auto", str, "cpu, cuda, cuda:1, mps ...; auto: the best one available"),
    "dtype": ("auto", ("auto", "float32", "bfloat16"), "precision of the training step; auto: bfloat16 if supported"),
    "compile": (0, between(0, 1), "1: compile the loss with torch.compile"),
    "eval_interval": (200, COUNT, "steps between evaluations, which also save a checkpoint"),
    "out_dir": ("auto", str, "output folder, which must not exist yet; auto: a new one under out/"),
}
PRESETS = {     # what replaces these defaults
    "laptop": {},
    "deep": dict(data="stdlib", n_layer=12, learning_rate=3e-3, warmup_iters=300),
    "paper": dict(n_head=8, n_embd=256, block_size=128, dropout=0.1, batch_size=64, max_iters=5000, learning_rate=3e-4,
                  warmup_iters=0, eval_interval=250)}
OF_MODEL = {    # flags that not all models have
    "tsa": dict(gate="soft", gate_bias=-1.0, threshold=0.5, lam=0.001, lam_ramp=0.0), "exit": dict(threshold=0.9),
    "halt": dict(gate_bias=-1.0, threshold=0.5, lam=0.03, lam_ramp=0.5)}
COPY = dict(n_head=4, n_embd=128, block_size=64, batch_size=256, max_iters=390, eval_interval=39)
CHAIN = dict(n_head=4, n_embd=64, block_size=30, batch_size=64, max_iters=1500, eval_interval=100, learning_rate=2e-3)
TASKS = {"copy": COPY, "sort": COPY, "chain": CHAIN}        # what replaces the preset's values


def parse_flags(argv):
    """Return the flags of a new run as a dictionary; with --resume, only those given."""
    parser = Parser(prog="train.py", usage=argparse.SUPPRESS, argument_default=argparse.SUPPRESS, allow_abbrev=False,
                    description="Train and evaluate a model. Savings are relative to a plain model of the same depth.")
    parser.add_argument("--resume", metavar="DIR", help="continue the run in DIR; only --device can be changed")
    for name, (default, kind, text) in FLAGS.items():
        values = [] if default is None else [str(default)]
        values += [f"{key} {own[name]}" for key, own in (PRESETS | OF_MODEL | TASKS).items() if name in own]
        options = {"type": kind} if callable(kind) else {"choices": kind}
        parser.add_argument(f"--{name}", help=f"{text} (default: {', '.join(values)})", **options)
    given = vars(parser.parse_args(argv))
    if "resume" in given:
        if given.keys() - {"resume", "device"}:
            parser.error("--resume reuses the run's flags: no other flag is allowed, except --device")
        return given

    flags = {name: default for name, (default, *_) in FLAGS.items() if default is not None}
    model = given.get("model", flags["model"])
    flags |= PRESETS[given.get("preset", "laptop")] | OF_MODEL.get(model, {}) | TASKS.get(given.get("data"), {})
    unused = given.keys() - flags.keys()
    if unused:
        parser.error(f"--{min(unused)} does not apply to --model {model}")
    flags |= given
    if flags["n_embd"] % flags["n_head"]:
        raise UserError(f"--n_embd {flags['n_embd']} is not divisible by --n_head {flags['n_head']}")
    if flags["n_layer"] == 1 and model != "plain":
        raise UserError(f"--model {model} needs --n_layer 2 or more")
    return flags


# ----------------------------------------------------------------------------------------------------------------
# Set-up

@contextlib.contextmanager
def one_line():
    """End with one line after Ctrl-C or a mistake in a flag or file. All other exceptions keep their traceback."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit("\nstopped")
    except (UserError, OSError, UnicodeDecodeError) as error:
        sys.exit(f"error: {error}")


def pick_device(name):
    """Return the device (for "auto", the best one available). Raise UserError if it does not work."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.ones(1, device=name).item()
    except Exception as error:      # torch raises many kinds of exceptions
        reason = str(error).partition("\n")[0]
        raise UserError(f"--device {name} does not work here ({reason}); try --device cpu") from None
    return name


def supports_bfloat16(device):
    if device == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)


@contextlib.contextmanager
def precision(device, dtype):
    """
    The context of a training step's forward pass. On a CPU in bfloat16, it uses the unfused attention kernel and lets
    it accumulate in bfloat16 (the setting is named after CUDA, but applies to CPUs as well): 90 ms a step instead of
    129, with the laptop preset on two cores of an AMD EPYC.
    """
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    unfused = sdpa_kernel(SDPBackend.MATH) if (device, dtype) == ("cpu", "bfloat16") else contextlib.nullcontext()
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16"), unfused:
        yield


def keep_freed_memory():
    """Let glibc keep freed memory for reuse: 90 ms a step instead of 101 to 114, measured as above."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)             # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)     # M_TRIM_THRESHOLD


def load_checkpoint(path):
    """Return the model of a ckpt.pt, in eval mode on the CPU, and the saved dictionary. Raise OSError or UserError."""
    with open(path, "rb") as file:
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True)
            config, state = Config(**saved["config"]), saved["model"]
        except Exception:       # torch raises many kinds, and its own message recommends an unsafe load
            raise UserError(f"{path} is damaged or was not written by this version of train.py") from None
    if config.model not in MODELS or config.gate not in GATES:
        raise UserError(f"{path}: there is no model {config.model!r} with gate {config.gate!r} in tsa.py")
    model = MODELS[config.model](config)
    try:
        model.load_state_dict(state)
    except RuntimeError:
        raise UserError(f"{path} does not fit the {config.model} model in tsa.py") from None
    return model.eval(), saved


def new_folder(out_dir, model):
    """Make the output folder of a new run ("auto": the first of out/MODEL-1, out/MODEL-2, ... that is free)."""
    numbered = (Path(f"out/{model}-{n}") for n in itertools.count(1))
    path = Path(out_dir) if out_dir != "auto" else next(path for path in numbered if not path.exists())
    if path.exists():
        raise UserError(f"{path} exists: continue its run with --resume {path}, or choose another --out_dir")
    path.mkdir(parents=True)        # fails if another run has just made it
    return path


@one_line()
def main(argv=None):
    # The flags, and the checkpoint of a run to resume
    keep_freed_memory()
    given, run = parse_flags(argv), None
    if "resume" in given:
        out_dir = Path(given.pop("resume"))
        model, run = load_checkpoint(out_dir / "ckpt.pt")
        if not {"optimizer", "history"} <= run.keys():
            raise UserError(f"{out_dir / 'ckpt.pt'} cannot be resumed: it holds no optimizer state, or an older version"
                            f" of train.py wrote it")
        if "variant" in run["flags"] and "variant" not in FLAGS:        # report.variants adds this flag
            raise UserError(f"use python -m report.variants {run['flags']['variant']} --resume {out_dir}")
        given = run["flags"] | given
    args = argparse.Namespace(**given)
    args.device = pick_device(args.device)
    if args.dtype == "auto":
        args.dtype = "bfloat16" if supports_bfloat16(args.device) else "float32"

    # The data
    if args.data == "auto":
        args.data = data.shakespeare_or_stdlib()
    corpus = data.load(args.data)
    windows = [part.to(args.device) for part in corpus.windows("val", args.block_size)]    # idx, targets (n, T)
    checksum = corpus.checksum()
    if run and run["checksum"] != checksum:
        raise UserError(f"--data {args.data}: the text has changed since this run started; restore the old one (for "
                        f"stdlib, use the same Python version)")

    # The model, the optimizer, and the folder of a new run
    if not run:
        seed_step(args.seed, 0)
        config = Config(vocab_size=len(corpus.vocab), **{k: v for k, v in given.items() if hasattr(Config, k)})
        model = MODELS[config.model](config)
        run = {"config": vars(config), "vocab": corpus.vocab, "prompt": corpus.prompt, "checksum": checksum,
               "example": corpus.example[:args.block_size], "step": 0, "history": [], "seconds": 0.0}
    optimizer = make_optimizer(model.to(args.device))
    if "optimizer" in run:
        optimizer.load_state_dict(run["optimizer"])
    else:
        out_dir = new_folder(args.out_dir, args.model)
        del args.out_dir        # not stored, because the folder may be moved before it is resumed
    run["flags"] = vars(args)
    save_checkpoint(run, model, optimizer, out_dir)         # so that even a run that is killed at once can be resumed
    corpus.splits["train"] = corpus.splits["train"].to(args.device)

    n_params = sum(parameter.numel() for parameter in model.parameters())
    print(*(f"{name}={value}" for name, value in vars(args).items()))
    print(f"{n_params:,} parameters; a checkpoint is saved every {args.eval_interval} steps; to resume from it: "
          f"python train.py --resume {out_dir}")
    train(model, optimizer, corpus, windows, args, run, out_dir)

    print()
    result = vars(args) | {"vocab_size": len(corpus.vocab), "n_params": n_params, "torch": torch.__version__,
                           "history": run["history"], "seconds": round(run["seconds"])}
    result |= score(model, windows)         # on the whole validation split
    (out_dir / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(f"to generate text or show predictions: python sample.py {out_dir / 'ckpt.pt'}")


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):      # notebooks have none
        sys.stdout.reconfigure(errors="replace", line_buffering=True)      # for plain-ASCII terminals and for pipes
    main()
