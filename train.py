"""
Train and evaluate a model: python train.py

This file contains the flags and their defaults, the choice of device, checkpoints, evaluation, and `train`, which does
a whole run. Each step's random numbers depend only on (seed, step), so on the same device a resumed run is
bit-identical to one that was never interrupted, and evaluation does not affect training.
"""
import argparse
import contextlib
import ctypes
import functools
import itertools
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
from tsa import GATES, MODELS, Config, build, generate, macs_saved, tlops_saved, token_loss

PRESETS = {
    "laptop": dict(n_layer=6, n_head=4, n_embd=128, block_size=64, dropout=0.0, batch_size=32, max_iters=2400,
                   learning_rate=1.5e-3, warmup_iters=100, eval_interval=200),
    "paper": dict(n_layer=6, n_head=8, n_embd=256, block_size=128, dropout=0.1, batch_size=64, max_iters=5000,
                  learning_rate=3e-4, warmup_iters=0, eval_interval=250),                  # paper, section 2
}
TASK_DEFAULTS = {       # where a task differs from the preset
    "copy": dict(n_head=4, n_embd=128, block_size=64, batch_size=256, max_iters=390, eval_interval=39),
    "sort": dict(n_head=4, n_embd=128, block_size=64, batch_size=256, max_iters=390, eval_interval=39),
    "chain": dict(n_head=4, n_embd=64, block_size=30, batch_size=64, max_iters=1500, learning_rate=2e-3,
                  eval_interval=100),
}
MODEL_DEFAULTS = {      # flags that apply only to some models
    "dense": dict(),
    "tsa": dict(gate="soft", gate_bias=-1.0, threshold=0.5, lam=0.001, lam_ramp=0.0),
    "exit": dict(threshold=0.9),
    "halt": dict(gate_bias=-1.0, threshold=0.5, lam=0.03, lam_ramp=0.5),
}
LOG_INTERVAL = 20
EVAL_WINDOWS = 64       # fixed validation windows scored during training; the final score uses the whole split


# ----------------------------------------------------------------------------------------------------------------
# Flags and device

def positive_int(text):
    """An argparse type: an integer of 1 or more."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return int(text)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):     # without this, flags without a default end in "(default: None)"
        return action.help if action.default is None else super()._get_help_string(action)


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog="train.py", usage=argparse.SUPPRESS, allow_abbrev=False, description="Train and evaluate a model.",
        formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--model", choices=MODELS, default="tsa",
        help="dense: the plain transformer; tsa: the paper's model; exit: early exit; halt: our halting model")
    add("--preset", choices=PRESETS, default="laptop", help="model size and training hyperparameters")
    add("--data", help="shakespeare, enwik8, stdlib, copy, sort, chain, or a UTF-8 text file; by default shakespeare, "
                       "or stdlib if that cannot be downloaded")
    add("--gate", choices=GATES, help="gate design of tsa")
    add("--gate_bias", type=float, help="tsa, halt: initial bias of the routers")
    add("--threshold", type=float, help="tsa, halt: skip or halt above this p; exit: exit above this confidence")
    add("--lam", type=float, help="tsa, halt: weight of the depth penalty (the mean gate) in the loss")
    add("--lam_ramp", type=float, help="tsa, halt: the weight rises from 0 to lam over this share of training")
    add("--n_layer", type=positive_int, help="number of blocks")
    add("--n_head", type=positive_int, help="number of attention heads")
    add("--n_embd", type=positive_int, help="embedding width")
    add("--block_size", type=positive_int, help="context length in tokens")
    add("--dropout", type=float, help="dropout probability")
    add("--batch_size", type=positive_int, help="sequences per step")
    add("--max_iters", type=positive_int, help="training steps")
    add("--learning_rate", type=float, help="peak learning rate; cosine decay to 10%%")
    add("--warmup_iters", type=int, help="steps of linear warm-up")
    add("--seed", type=int, default=0, help="random seed")
    add("--device", default="auto",
        help="cpu, cuda, cuda:1, mps ...; auto: the best one available, or with --resume the one that the run used")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="dtype of the forward pass in training; auto: bfloat16 if the hardware supports it")
    add("--compile", action="store_true", help="compile the loss with torch.compile")
    add("--eval_interval", type=positive_int, help="steps between evaluations, each of which saves a checkpoint")
    add("--out_dir", type=Path, help="output folder; by default a new one under out/")
    add("--resume", type=Path, metavar="DIR",
        help="continue the run in DIR with its own flags; only --device may be added")

    # The defaults depend on preset, task and model, so parse twice. --help is left to the second pass.
    chosen = parser.parse_known_args([arg for arg in argv if arg not in ("-h", "--help")])[0]
    if chosen.resume:
        if {arg.split("=")[0] for arg in argv if arg.startswith("-")} - {"--resume", "--device"}:
            parser.error("--resume uses the run's own flags: no other flag is allowed, except --device")
        return parser.parse_args(argv)
    defaults = PRESETS[chosen.preset] | TASK_DEFAULTS.get(chosen.data, {}) | MODEL_DEFAULTS[chosen.model]
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    for flag in ("gate", "gate_bias", "threshold", "lam", "lam_ramp"):
        if flag not in defaults and getattr(args, flag) is not None:
            parser.error(f"--{flag} does not apply to --model {args.model}")
    return args


def pick_device(name):
    """Return the named device, or the best one available if the name is "auto"; exit if the device does not work."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.ones(1, device=name).item()
    except Exception as error:      # torch raises many kinds of exceptions
        reason = (str(error) or type(error).__name__).splitlines()[0]
        sys.exit(f"--device {name} does not work here ({reason}); try --device cpu")
    return name


def supports_bfloat16(device):
    if device == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)


def keep_freed_memory():
    """
    Let glibc keep freed buffers instead of returning them to the system after every layer and requesting them again.
    This speeds up training on a CPU. (M_MMAP_MAX is -4, M_TRIM_THRESHOLD is -1.)
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)
        libc.mallopt(-1, 2**31 - 1)


# ----------------------------------------------------------------------------------------------------------------
# Checkpoints and evaluation

def write_json(contents, path):
    path.write_text(json.dumps(contents, indent=1), encoding="utf-8")


def save(path, contents, write):
    """Write to a temporary file and rename it, so that a kill at any moment leaves either the old or the new file."""
    temporary = path.with_name(path.name + ".tmp")
    write(contents, temporary)
    os.replace(temporary, path)


def load_checkpoint(path, device="cpu"):
    """Load ckpt.pt; return the model in eval mode and the saved dictionary. Exit if the file is unusable."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model = build(Config(**saved["config"]))
        model.load_state_dict(saved["model"])
    except OSError as error:
        sys.exit(f"cannot read {path} ({error.strerror}): --resume takes the folder of a run, --ckpt a ckpt.pt")
    except ValueError as error:     # for example, a gate design that is no longer in tsa.py
        sys.exit(f"{path}: {error}")
    except Exception:       # torch raises many kinds, and its own message recommends an unsafe load
        sys.exit(f"{path} is damaged or was not written by this version of train.py")
    return model.to(device).eval(), saved


@torch.no_grad()
def evaluate(model, windows, mode, batch_size=64):
    """
    Score windows (idx, targets), each (n, T), in float32. Return the mean loss over the scored tokens and two lists
    with one value per block: the mean gate, and the share of tokens that ran the block (gate not 0).
    """
    model.eval()
    idx, targets = windows
    loss, gate_sum, ran = 0, 0, 0
    for x, y in zip(idx.split(batch_size), targets.split(batch_size)):
        logits, gates = model(x, mode)                                                     # gates (L, B, T)
        loss += token_loss(logits, y).sum().item()
        gate_sum += gates.sum((1, 2)).cpu().double()        # mps has no float64
        ran += (gates != 0).sum((1, 2)).cpu()
    return loss / (targets >= 0).sum().item(), (gate_sum / idx.numel()).tolist(), (ran / idx.numel()).tolist()


def score(model, windows):
    """Evaluate the model as trained and as executed, for log.json and result.json."""
    val_loss, gates, _ = evaluate(model, windows, "trained")
    val_loss_executed, _, ran = evaluate(model, windows, "executed")
    return {"val_loss": val_loss, "val_loss_executed": val_loss_executed, "tlops_saved": tlops_saved(ran),
            "macs_saved": macs_saved(model.config, ran, windows[0].size(1)), "ran": ran, "gates": gates}


SCORES = ("loss {val_loss:.4f} as trained, {val_loss_executed:.4f} as executed, saving {tlops_saved:.1%} of "
          "token-layer operations and {macs_saved:.1%} of multiply-adds")


# ----------------------------------------------------------------------------------------------------------------
# Training

def seed_step(seed, step):
    """Seed torch so that a step's batch and dropout depend only on (seed, step). Step 0 is the initialization."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))


def make_optimizer(model, learning_rate):
    """AdamW as in the paper: weight decay on matrices only, not on biases, LayerNorms or embeddings."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() == 2 and name not in ("wte.weight", "wpe.weight")
        (matrices if is_matrix else others).append(parameter)
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def schedule(step, warmup_iters, max_iters):
    """Learning-rate factor: linear warm-up times a cosine from 1 at the first step to 0.1 at the last."""
    progress = (step - 1) / max(max_iters - 1, 1)
    return min(step / max(warmup_iters, 1), 1) * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


def new_folder(args):
    """The folder of a new run: --out_dir, or the first of out/tsa-soft, out/tsa-soft-2, ... that does not exist."""
    if args.out_dir:
        if (args.out_dir / "ckpt.pt").exists() or (args.out_dir / "result.json").exists():
            sys.exit(f"{args.out_dir} already contains a run: continue it with --resume {args.out_dir}, or use another "
                     f"--out_dir")
        return args.out_dir
    name = f"out/{args.model}-{args.gate}" if args.gate else f"out/{args.model}"
    folders = (Path(name if n == 1 else f"{name}-{n}") for n in itertools.count(1))
    return next(folder for folder in folders if not folder.exists())


def load_data(args):
    by_default, args.data = args.data is None, args.data or "shakespeare"
    try:
        return data.load(args.data)
    except (OSError, ValueError) as error:
        if not by_default or isinstance(error, ValueError):
            sys.exit(f"--data {args.data}: {error}")
        print(f"{error}. Training on the sources of Python's standard library instead (--data stdlib).")
        args.data = "stdlib"
        return load_data(args)


def train(args):
    keep_freed_memory()

    # Flags, text, model and optimizer, either new or from the checkpoint
    if args.resume:
        model, saved = load_checkpoint(args.resume / "ckpt.pt")
        device = pick_device(saved["flags"]["device"] if args.device == "auto" else args.device)
        vars(args).update(saved["flags"], device=device, out_dir=args.resume)
        corpus = load_data(args)
        if (corpus.vocab, corpus.example) != (saved["vocab"], saved["example"]):
            sys.exit(f"--data {args.data}: the text has changed since this run started; restore the old one")
        optimizer = make_optimizer(model.to(device), args.learning_rate)
        optimizer.load_state_dict(saved["optimizer"])
    else:
        saved = {"step": 0, "seconds": 0.0, "rows": []}
        device = args.device = pick_device(args.device)
        corpus = load_data(args)
        if args.dtype == "auto":
            args.dtype = "bfloat16" if supports_bfloat16(device) else "float32"
        fields = {name: value for name, value in vars(args).items()
                  if name in Config.__dataclass_fields__ and value is not None}
        try:
            corpus.check_block_size(args.block_size)
            seed_step(args.seed, 0)
            model = build(Config(vocab_size=len(corpus.vocab), **fields)).to(device)
            optimizer = make_optimizer(model, args.learning_rate)
        except ValueError as error:
            sys.exit(f"train.py: {error}")
        args.out_dir = new_folder(args)
    out_dir, rows = args.out_dir, saved["rows"]
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"cannot create {out_dir} ({error.strerror}): use another --out_dir")
    flags = {flag: value for flag, value in vars(args).items() if flag not in ("resume", "out_dir")}
    n_params = sum(parameter.numel() for parameter in model.parameters())
    print(*(f"{flag}={value}" for flag, value in flags.items() if value is not None))
    print(f"{n_params:,} parameters; results go to {out_dir}")

    corpus.splits = {split: tokens.to(device) for split, tokens in corpus.splits.items()}
    windows = corpus.windows("val", args.block_size, EVAL_WINDOWS)
    loss_of = torch.compile(model.loss) if args.compile else model.loss
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    attention_kernel = contextlib.nullcontext
    if device == "cpu" and args.dtype == "bfloat16":        # in this case the fused attention kernel is slower
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)       # despite its name, this applies to CPUs too
        attention_kernel = functools.partial(sdpa_kernel, SDPBackend.MATH)
    began = time.perf_counter()

    for step in range(saved["step"] + 1, args.max_iters + 1):
        model.train()       # evaluation leaves it in eval mode
        seed_step(args.seed, step)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * schedule(step, args.warmup_iters, args.max_iters)
        lam = args.lam * min(step / max(args.lam_ramp * args.max_iters, 1), 1) if args.lam else 0
        idx, targets = corpus.batch(args.batch_size, args.block_size)                      # (B, T)
        with autocast, attention_kernel():
            task_loss, gates = loss_of(idx, targets)                                       # gates (L, B, T)
            loss = task_loss + lam * gates[1:].mean() if lam else task_loss                # plus the depth penalty
        loss.backward()
        if any(router.out.bias.grad is None for router in getattr(model, "routers", [])):
            sys.exit(f"--gate {args.gate} passes no gradient to the routers: it must be differentiable in p")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        evaluates = step % args.eval_interval == 0 or step == args.max_iters
        if evaluates or step % LOG_INTERVAL == 0:
            # A nan stays in the weights, so it is still found here; a check in every step would force a GPU sync.
            if not torch.isfinite(loss + norm):
                sys.exit(f"the loss or its gradient was not finite at some step up to {step}: start a new run with a "
                         f"lower --learning_rate")
            per_step = (time.perf_counter() - began) / (step - saved["step"])      # seconds, including evaluation
            left = int(per_step * (args.max_iters - step))
            by_block = gates.detach().mean((1, 2)).tolist()
            row = {"step": step, "loss": loss.item(), "task_loss": task_loss.item(), "lam": lam,
                   "mean_gate": sum(by_block[1:]) / max(len(by_block) - 1, 1)}
            penalty = "= task {task_loss:.4f} + {lam:.3g} * mean gate {mean_gate:.4f}  ".format(**row)
            print(f"step {step}/{args.max_iters}  loss {row['loss']:.4f}", (penalty if lam else "") + "gates",
                  *(f"{gate:.2f}" for gate in by_block[1:]),
                  f" {idx.numel() / per_step / 1000:.0f}k tok/s  {left // 60}:{left % 60:02d} left")
        if evaluates:
            row |= score(model, windows)
            rows.append(row)
            print(f"{len(windows[0])} validation windows:", SCORES.format(**row))
            contents = dict(config=vars(model.config), flags=flags, vocab=corpus.vocab, prompt=corpus.prompt,
                            example=corpus.example, new_tokens=corpus.new_tokens, step=step, rows=rows,
                            seconds=saved["seconds"] + time.perf_counter() - began, model=model.state_dict(),
                            optimizer=optimizer.state_dict())
            save(out_dir / "log.json", rows, write_json)
            save(out_dir / "ckpt.pt", contents, torch.save)

    windows = corpus.windows("val", args.block_size)
    print(f"scoring the whole validation split ({windows[0].numel():,} tokens)")
    result = flags | {"vocab_size": len(corpus.vocab), "n_params": n_params, "torch": torch.__version__}
    result |= score(model, windows)
    result["seconds"] = round(saved["seconds"] + time.perf_counter() - began)
    save(out_dir / "result.json", result, write_json)
    print("validation", SCORES.format(**result) + f"; {result['seconds']} s in total")
    print(f"\nTo generate text or show the gates, run: python sample.py --ckpt {out_dir / 'ckpt.pt'}")
    if not corpus.new_tokens:       # with chains, there is nothing to generate
        return
    print(corpus.prompt, end="")
    idx = torch.tensor([data.encode(corpus.prompt, corpus.vocab)], device=device)
    for idx_next, _ in generate(model, idx, min(corpus.new_tokens, 200), top_k=20):
        print(corpus.vocab[idx_next.item()], end="", flush=True)
    print()


def main(argv=None):
    args = parse_args(sys.argv[1:] if argv is None else argv)
    try:
        train(args)
    except KeyboardInterrupt:
        folder = args.resume or args.out_dir
        if folder and (folder / "ckpt.pt").exists():
            sys.exit(f"\nstopped. To continue from the last checkpoint: python train.py --resume {folder}")
        sys.exit("\nstopped before the first checkpoint")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace", line_buffering=True)      # for terminals without Unicode, and for pipes
    main()
