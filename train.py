"""
Train and evaluate a model:

    python train.py --data chain --model halt       every flag has a default; --help lists them
    python train.py --resume out/halt-1             continue an interrupted run

Each step's random numbers depend only on (seed, step), so a resumed run equals one that was never interrupted (bit for
bit on a CPU), and evaluation does not affect training.
"""
import argparse
import contextlib
import ctypes
import itertools
import json
import math
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
from tsa import GATES, MODELS, Config, savings, token_loss


# ----------------------------------------------------------------------------------------------------------------
# Flags. A flag on the command line overrides the task's value, which overrides the preset's.

def between(low, high):
    """An argparse type: a number in this range, with the same type as `low`."""
    def convert(text):
        value = type(low)(text)             # argparse reports a ValueError
        if not low <= value <= high:        # also rejects nan
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    convert.__name__ = type(low).__name__   # so that argparse says "invalid int value"
    return convert


COUNT, SHARE = between(1, 10**9), between(0.0, 1.0)
FLAGS = {       # name: (default, or one per preset or model; type or choices; help)
    "model": ("tsa", MODELS, "plain: the plain transformer; tsa: the paper's model; exit: early exit; halt: halting"),
    "preset": ("laptop", ("laptop", "paper"), "model size and training hyperparameters"),
    "data": ("auto", str, "shakespeare, enwik8, stdlib, copy, sort, chain, or a UTF-8 text file; auto: shakespeare, or "
                          "stdlib if Shakespeare cannot be downloaded"),
    "n_layer": (6, COUNT, "number of blocks"),
    "n_head": (dict(laptop=4, paper=8), COUNT, "number of attention heads"),
    "n_embd": (dict(laptop=128, paper=256), COUNT, "embedding width"),
    "block_size": (dict(laptop=64, paper=128), COUNT, "context length in tokens"),
    "dropout": (dict(laptop=0.0, paper=0.1), SHARE, "dropout probability"),
    "batch_size": (dict(laptop=32, paper=64), COUNT, "sequences per step"),
    "max_iters": (dict(laptop=2400, paper=5000), COUNT, "training steps"),
    "learning_rate": (dict(laptop=1.5e-3, paper=3e-4), SHARE, "peak learning rate; cosine decay to 10%%"),
    "warmup_iters": (dict(laptop=100, paper=0), between(0, 10**9), "steps of linear warm-up"),
    "gate": (dict(tsa="soft"), GATES, "gate design"),
    "gate_bias": (dict(tsa=-1.0, halt=-1.0), between(-100.0, 100.0), "initial bias of the routers"),
    "threshold": (dict(tsa=0.5, exit=0.9, halt=0.5), SHARE, "skip or halt above this p; exit above this confidence"),
    "lam": (dict(tsa=0.001, halt=0.03), between(0.0, 1e6), "weight of the depth penalty in the loss"),
    "lam_ramp": (dict(tsa=0.0, halt=0.5), SHARE, "share of training over which lam rises from 0"),
    "seed": (0, between(0, 2**63 - 1), "random seed"),
    "device": ("auto", str, "cpu, cuda, cuda:1, mps ...; auto: the best one available"),
    "dtype": ("auto", ("auto", "float32", "bfloat16"), "precision of the training step; auto: bfloat16 if supported"),
    "compile": (0, between(0, 1), "1: compile the loss with torch.compile"),
    "eval_interval": (dict(laptop=200, paper=250), COUNT, "steps between evaluations, which also save a checkpoint"),
    "out_dir": ("auto", str, "output folder, which must not exist yet; auto: a new one under out/"),
}
COPY = dict(n_head=4, n_embd=128, block_size=64, batch_size=256, max_iters=390, eval_interval=39)
CHAIN = dict(n_head=4, n_embd=64, block_size=30, batch_size=64, max_iters=1500, eval_interval=100, learning_rate=2e-3)
TASKS = {"copy": COPY, "sort": COPY, "chain": CHAIN}        # where a task differs from the preset
LOG_INTERVAL = 20
EVAL_WINDOWS = 64       # validation windows scored during training; the final score uses the whole split


def parse_flags(argv):
    """Return the flags of a new run as a dictionary; with --resume, only those given."""
    parser = argparse.ArgumentParser(prog="train.py", usage=argparse.SUPPRESS, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS, description="Train and evaluate a model.")
    parser.add_argument("--resume", metavar="DIR", help="continue the run in DIR; only --device can be changed")
    for name, (default, kind, text) in FLAGS.items():
        if isinstance(default, dict):
            default = ", ".join(f"{key} {value}" for key, value in default.items())
        options = {"type": kind} if callable(kind) else {"choices": kind}
        parser.add_argument(f"--{name}", help=f"{text} (default: {default})", **options)
    given = vars(parser.parse_args(argv))
    if "resume" in given:
        if given.keys() - {"resume", "device"}:
            parser.error("--resume reuses the run's flags: no other flag than --device is allowed")
        return given

    flags, (model, preset) = {}, (given.get(name, FLAGS[name][0]) for name in ("model", "preset"))
    for name, (default, *_) in FLAGS.items():
        if isinstance(default, dict):
            default = default.get(preset, default.get(model))
        if default is not None:         # otherwise, the flag does not apply to this model
            flags[name] = default
    unused = given.keys() - flags.keys()
    if unused:
        parser.error(f"--{min(unused)} does not apply to --model {model}")
    return flags | TASKS.get(given.get("data"), {}) | given


# ----------------------------------------------------------------------------------------------------------------
# Errors, devices and checkpoints

@contextlib.contextmanager
def user_errors():
    """Print a ValueError, OSError or Ctrl-C as one line. Any other exception is a bug and keeps its traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped")


def pick_device(name):
    """Return the device, or for "auto" the best one available; raise ValueError if it does not work."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.ones(1, device=name).item()
    except Exception as error:      # torch raises many kinds of exceptions
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {name} does not work here ({reason}); try --device cpu") from None
    return name


def supports_bfloat16(device):
    if device == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)


@contextlib.contextmanager
def precision(device, dtype):
    """The context of a training step's forward pass."""
    # On a CPU, fused attention is slow in bfloat16, so use the unfused kernel, and let it accumulate in bfloat16.
    # (Despite its name, the next line applies to CPUs, too.)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    unfused = sdpa_kernel(SDPBackend.MATH) if (device, dtype) == ("cpu", "bfloat16") else contextlib.nullcontext()
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16"), unfused:
        yield


def keep_freed_memory():
    """Let glibc reuse freed memory instead of returning it to the system, which speeds up training on CPUs."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)             # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)     # M_TRIM_THRESHOLD


def load_checkpoint(path):
    """Return the model of a ckpt.pt, in eval mode on the CPU, and the saved dictionary. Raise OSError or ValueError."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        config = Config(**saved["config"])
        model = MODELS[config.model](config)
        model.load_state_dict(saved["model"])
    except (OSError, ValueError):       # these say what is wrong: no such file, an unknown gate design
        raise
    except Exception:       # torch raises many kinds, and its own message recommends an unsafe load
        raise ValueError(f"{path} is damaged or was not written by this version of train.py") from None
    return model.eval(), saved


# ----------------------------------------------------------------------------------------------------------------
# Evaluation and optimization

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
    """Evaluate a full and a sparse pass; print the scores and return them for the checkpoint and result.json."""
    val_loss, gates, _ = evaluate(model, windows, sparse=False)
    val_loss_sparse, _, ran = evaluate(model, windows, sparse=True)
    tlops_saved, macs_saved = savings(model.config, ran, windows[0].size(1))
    print(f"validation loss {val_loss:.4f} full, {val_loss_sparse:.4f} sparse, saving {tlops_saved:.1%} of token-layer "
          f"operations and {macs_saved:.1%} of multiply-adds ({len(windows[0]):,} windows)")
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


# ----------------------------------------------------------------------------------------------------------------
# A whole run

@user_errors()
def main(argv=None):
    keep_freed_memory()

    # Flags: those of a new run, or of the run to resume
    flags, saved = parse_flags(argv), {"step": 0, "rows": [], "seconds": 0.0}
    resumed = "resume" in flags
    if resumed:
        out_dir = Path(flags.pop("resume"))
        model, saved = load_checkpoint(out_dir / "ckpt.pt")
        if "optimizer" not in saved:
            raise ValueError(f"{out_dir / 'ckpt.pt'} cannot be resumed: it holds no optimizer state")
        flags = saved["flags"] | flags
    args = argparse.Namespace(**flags)
    args.device = pick_device(args.device)
    if args.dtype == "auto":
        args.dtype = "bfloat16" if supports_bfloat16(args.device) else "float32"

    # Data
    if args.data == "auto":
        args.data = "shakespeare"
        try:
            data.fetch(args.data)
        except OSError as error:
            print(f"{error}. Training on the sources of Python's standard library instead (--data stdlib).")
            args.data = "stdlib"
    corpus = data.load(args.data)
    checksum = zlib.crc32(corpus.vocab.encode())
    for tokens in corpus.splits.values():
        checksum = zlib.crc32(tokens.numpy(), checksum)
    if saved.get("checksum", checksum) != checksum:
        raise ValueError(f"--data {args.data}: the text has changed since this run started; restore the old one "
                         f"(for stdlib, use the same Python version)")
    windows = [tokens.to(args.device) for tokens in corpus.windows("val", args.block_size)]     # idx, targets (n, T)
    corpus.splits["train"] = corpus.splits["train"].to(args.device)

    # Model, optimizer and output folder
    if not resumed:
        seed_step(args.seed, 0)
        config = Config(vocab_size=len(corpus.vocab), **{k: v for k, v in flags.items() if k in vars(Config())})
        model = MODELS[config.model](config)
        numbered = (Path(f"out/{args.model}-{n}") for n in itertools.count(1))
        out_dir = Path(args.out_dir) if args.out_dir != "auto" else next(p for p in numbered if not p.exists())
        if out_dir.exists():
            raise ValueError(f"{out_dir} exists: continue its run with --resume {out_dir}, or use another --out_dir")
        out_dir.mkdir(parents=True)         # fails if another run has just made it
        del args.out_dir                    # not stored, because the folder may be moved before it is resumed
    optimizer = make_optimizer(model.to(args.device))
    if resumed:
        optimizer.load_state_dict(saved["optimizer"])
    flags = vars(args)
    n_params = sum(parameter.numel() for parameter in model.parameters())
    print(*(f"{name}={value}" for name, value in flags.items()))
    print(f"{n_params:,} parameters; a checkpoint is saved every {args.eval_interval} steps; to continue from it: "
          f"python train.py --resume {out_dir}")

    # The training loop
    loss_of = torch.compile(model.loss) if args.compile else model.loss
    max_lam, lam_ramp = flags.get("lam", 0), flags.get("lam_ramp", 0)
    rows, began = saved["rows"], time.perf_counter() - saved["seconds"]
    for step in range(saved["step"] + 1, args.max_iters + 1):
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
            raise ValueError(f"--gate {args.gate} passes no gradient to the routers: make it differentiable in p")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        evaluates = step % args.eval_interval == 0 or step == args.max_iters
        if evaluates or step % LOG_INTERVAL == 0:
            # A nan stays in the weights, so it is still found here; a check in every step would force a GPU sync.
            if not torch.isfinite(loss + norm):
                raise ValueError(f"the loss or its gradient was not finite at some step up to {step}: start a new "
                                 f"run with a lower --learning_rate")
            by_block = gates.detach().mean((1, 2)).tolist()
            row = {"step": step, "loss": loss.item(), "task_loss": task_loss.item(), "lam": lam}
            per_step = (time.perf_counter() - began) / step                 # seconds, including evaluation
            print(f"step {step}/{args.max_iters}  loss {row['loss']:.4f} (task {row['task_loss']:.4f})  gates",
                  *(f"{gate:.2f}" for gate in by_block[1:]), f" {1000 * per_step:.0f} ms/step, "
                  f"{per_step * (args.max_iters - step) / 60:.1f} min left")
        if evaluates:
            rows.append(row | score(model, [tokens[:EVAL_WINDOWS] for tokens in windows]))
            checkpoint = dict(config=vars(model.config), flags=flags, vocab=corpus.vocab, prompt=corpus.prompt,
                              example=corpus.example[:args.block_size], checksum=checksum, step=step, rows=rows,
                              seconds=time.perf_counter() - began, model=model.state_dict(),
                              optimizer=optimizer.state_dict())
            torch.save(checkpoint, out_dir / "ckpt.tmp")
            (out_dir / "ckpt.tmp").replace(out_dir / "ckpt.pt")     # so that ckpt.pt is always complete

    # The final score, on the whole validation split
    print()
    result = flags | {"vocab_size": len(corpus.vocab), "n_params": n_params, "torch": torch.__version__, "rows": rows}
    result |= score(model, windows) | {"seconds": round(time.perf_counter() - began)}
    (out_dir / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(f"to generate text or show predictions: python sample.py {out_dir / 'ckpt.pt'}")


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):      # notebooks have none
        sys.stdout.reconfigure(errors="replace", line_buffering=True)      # for plain-ASCII terminals and for pipes
    main()
