"""
Train and evaluate a model:

    python train.py                                             a small model with the paper's gates
    python train.py --model plain                               the same model without gates
    python train.py --resume out/tsa-1                          continue an interrupted run
    python train.py --score out/tsa-1 --gate soft               evaluate a model with another gate
    python train.py --preset chain --gate straight --halt --lam 0.03        a puzzle; takes two minutes

--help lists all flags. Each step's random numbers depend only on (seed, step), so all designs are trained on the same
batches, and a resumed run matches one that was never interrupted (on a CPU, bit for bit).
"""
import argparse
import contextlib
import itertools
import json
import math
import os
import statistics
import sys
import time
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
from tsa import GATES, MODELS, Config, Transformer, load_checkpoint, multiply_adds, token_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRESETS = {     # each replaces some defaults of the flags below
    "laptop": {},
    "deep": dict(data="stdlib", n_layer=12, learning_rate=3e-3, warmup_iters=300),
    "paper": dict(gate="soft", n_head=8, n_embd=256, block_size=128, dropout=0.1, batch_size=64, max_iters=5000,
                  learning_rate=3e-4, warmup_iters=0, eval_interval=250),
    "chain": dict(data="chain", n_embd=64, block_size=30, batch_size=64, max_iters=1500, learning_rate=2e-3,
                  lam_ramp=0.5, eval_interval=100),
}


def seed_step(seed, step):
    """Make a step's batch and dropout depend only on (seed, step). Step 0 is the initialization."""
    # With the sum of the two as the seed, step 2 of seed 0 would have the batch of step 1 of seed 1.
    torch.manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))


def make_optimizer(model):
    """AdamW as in the paper: weight decay on matrices only, not on biases, LayerNorms or embeddings."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() > 1 and name not in ("wte.weight", "wpe.weight")
        (matrices if is_matrix else others).append(parameter)
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def schedule(step, warmup_iters, max_iters):
    """The learning-rate multiplier: linear warm-up times a cosine decay from 1 (first step) to 0.1 (last step)."""
    progress = (step - 1) / max(max_iters - 1, 1)
    return min(step / max(warmup_iters, 1), 1) * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


@contextlib.contextmanager
def precision(device, dtype):
    """The context of a training step. On a CPU in bfloat16, the unfused attention kernel is faster."""
    device = torch.device(device).type
    attention = contextlib.nullcontext()
    if (device, dtype) == ("cpu", "bfloat16"):
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)    # applies to CPUs, too
        attention = sdpa_kernel(SDPBackend.MATH)
    with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"), attention:
        yield


def fit(model, args, corpus, idx, targets, saved):
    """Train, evaluate on idx, targets (n, T), and save the run. `saved` is the checkpoint to resume, or None."""
    optimizer = make_optimizer(model)
    done = saved["step"] if saved else 0
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
    flags = {name: value for name, value in vars(args).items() if name not in ("out_dir", "resume", "score")}
    run = {"config": vars(model.config), "flags": flags, "vocab": corpus.vocab, "checksum": corpus.checksum(),
           "prompt": corpus.prompt[:args.block_size]}
    size = sum(weight.numel() for weight in model.parameters())
    print(f"{size:,} parameters, data {args.data}, device {args.device}, dtype {args.dtype}")

    def score_after(step):      # on all windows at the end, otherwise on a few hundred, spread over the split
        last = step == args.max_iters
        stride = 1 if last else max(len(idx) // 256, 1)
        scores = score(model, idx[::stride], targets[::stride], timed=last)
        if not math.isfinite(scores["val_loss"] + scores["val_loss_sparse"]):
            raise FloatingPointError("the loss is not finite: start again with a lower --learning_rate or another gate")
        return scores

    scores = score_after(done)
    began = time.perf_counter()
    for step in range(done + 1, args.max_iters + 1):
        model.train()           # evaluation leaves it in eval mode
        seed_step(args.seed, step)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * schedule(step, args.warmup_iters, args.max_iters)
        lam = args.lam * min(step / max(args.lam_ramp * args.max_iters, 1), 1)          # without a ramp, at once

        x, y = (part.to(args.device) for part in corpus.batch(args.batch_size, args.block_size))  # (B, T) each
        with precision(args.device, args.dtype):
            task_loss, gates = model.loss(x, y)                                 # gates (L, B, T)
            depth_loss = gates[1:].mean() if args.model == "tsa" else 0
            loss = task_loss + lam * depth_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        if step % 20 == 0:
            seconds = (time.perf_counter() - began) / (step - done)         # per step, including evaluations
            shown = f"  gates {spaced(gates.mean((1, 2)).tolist())}" if args.model == "tsa" else ""
            print(f"step {step}/{args.max_iters}  loss {task_loss.item():.4f}{shown}  {1000 * seconds:.0f} ms/step, "
                  f"{seconds * (args.max_iters - step) / 60:.1f} min left", flush=True)
        if step % args.eval_interval == 0 or step == args.max_iters:
            scores = score_after(step)
            run.update(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step)
            args.out_dir = args.out_dir or new_folder(args.model)
            torch.save(run, args.out_dir / "ckpt.tmp")
            (args.out_dir / "ckpt.tmp").replace(args.out_dir / "ckpt.pt")       # so ckpt.pt is always complete

    (args.out_dir / "result.json").write_text(json.dumps(run["config"] | flags | scores, indent=1))
    print(f"to look inside: python sample.py {args.out_dir} (with or without --map)")


def new_folder(model):
    """Make the first of out/MODEL-1, out/MODEL-2, ... that does not exist."""
    for n in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            folder = Path(f"out/{model}-{n}")
            folder.mkdir(parents=True)
            return folder


@torch.no_grad()
def evaluate(model, idx, targets, sparse):
    """Windows idx, targets (n, T) -> the mean loss, each block's mean gate, and the fraction of tokens that ran it."""
    device = model.wte.weight.device
    loss_sum, gate_sum, ran = 0, 0, 0
    for x, y in zip(idx.split(64), targets.split(64)):
        logits, gates = model(x.to(device), sparse)                             # gates (L, B, T)
        loss_sum += token_loss(logits, y.to(device)).sum().item()               # batches add up in double precision
        gate_sum = gate_sum + gates.sum((1, 2))
        ran = ran + (gates != 0).sum((1, 2))
    return loss_sum / targets.numel(), (gate_sum / idx.numel()).tolist(), (ran / idx.numel()).tolist()


@torch.no_grad()
def speedup(model, idx):
    """How many times as fast a sparse pass is as a plain model with the same blocks, on windows idx (n, T)."""
    x = idx[:64].to(model.wte.weight.device)
    plain, sparse = partial(Transformer.forward, model, x), partial(model, x, sparse=True)
    ratios = [seconds_of(plain) / seconds_of(sparse) for _ in range(16)]        # they take turns, because speeds drift
    return statistics.median(ratios[1:])        # without the warm-up


def seconds_of(run):
    """Seconds until the last tensor that run() returns is ready (a GPU computes in the background)."""
    began = time.perf_counter()
    run()[-1].any().item()
    return time.perf_counter() - began


def spaced(numbers):
    return " ".join(f"{number:.2f}" for number in numbers)


def score(model, idx, targets, timed=False):
    """Evaluate windows idx, targets (n, T). Print and return the scores. If timed, also print the speed-up."""
    model.eval()
    kind = model.config.model
    print(f"evaluation on {len(idx):,} windows", flush=True)
    full = evaluate(model, idx, targets, sparse=False)
    sparse = full if kind == "plain" else evaluate(model, idx, targets, sparse=True)    # nothing to skip
    (val_loss, gates, _), (val_loss_sparse, _, ran) = full, sparse
    total, plain = multiply_adds(model, ran, idx.size(1))
    saved = 1 - total / plain           # negative if the routers cost more
    tlops_saved = 1 - sum(ran if kind == "exit" else gates) / len(ran)      # token-layer operations, the paper's unit
    by_count = f"  {tlops_saved:.1%} saved by the paper's count"
    print(f"full   loss {val_loss:.4f}" + (f"  gates {spaced(gates)}{by_count}" if kind == "tsa" else ""))
    if kind != "plain":
        more_or_fewer = f"{abs(saved):.1%} {'fewer' if saved >= 0 else 'more'} multiply-adds"
        times = f", {speedup(model, idx):.1f}x as fast" if timed else ""
        print(f"sparse loss {val_loss_sparse:.4f}  open  {spaced(ran)}  {more_or_fewer}{times}")
    if kind == "exit":
        print(" " * 6 + by_count)
    return dict(val_loss=val_loss, val_loss_sparse=val_loss_sparse, tlops_saved=tlops_saved, blocks=sum(ran),
                saved=saved, gates=gates, ran=ran)


def bounded(kind, low, high=math.inf):
    """A type for argparse: an int or a float from low to high, but not inf or nan."""
    def number(text):
        value = kind(text)
        if low <= value <= high and abs(value) != math.inf:
            return value
        raise argparse.ArgumentTypeError(f"{text} is not a number from {low} to {high}")
    number.__name__ = kind.__name__         # for argparse's message on a text such as 2.5 for an int
    return number


def usable_device(name):
    """A type for argparse: a device that PyTorch can use here."""
    try:
        torch.zeros(1, device=name).item()
    except (AssertionError, ImportError, RuntimeError):
        raise argparse.ArgumentTypeError(f"PyTorch cannot use the device {name} here; try --device cpu") from None
    return name


def supports_bfloat16(device):
    if device.startswith("cpu"):
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)


def parse_flags(argv):
    """Return the flags, and the model and the checkpoint to resume or to score (or None, None)."""
    parser = argparse.ArgumentParser(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, positive, fraction = parser.add_argument, bounded(int, 1), bounded(float, 0, 1)
    add("--preset", default="laptop", choices=PRESETS, help="replaces some of the defaults below")
    add("--model", default=Config.model, choices=MODELS, help="the plain transformer, the paper's model, or early exit")
    add("--gate", default=Config.gate, choices=GATES, help="tsa: gate design, from GATES in tsa.py")
    add("--gate_bias", default=Config.gate_bias, type=bounded(float, -math.inf), help="tsa: initial b2 of equation (3)")
    add("--halt", default=False, action=argparse.BooleanOptionalAction, help="tsa: multiply each gate by the previous")
    add("--lam", default=0.001, type=bounded(float, 0), help="tsa: weight of the depth loss (the mean gate)")
    add("--lam_ramp", default=0.0, type=fraction, help="tsa: fraction of training in which lam rises from 0")
    add("--confidence", default=Config.confidence, type=fraction, help="exit: exit above this top probability")
    add("--data", default="auto", help="shakespeare, enwik8, stdlib, chain, a file; auto: shakespeare, else stdlib")
    add("--n_layer", default=Config.n_layer, type=positive, help="number of blocks")
    add("--n_head", default=Config.n_head, type=positive, help="number of attention heads")
    add("--n_embd", default=Config.n_embd, type=positive, help="embedding width")
    add("--block_size", default=Config.block_size, type=positive, help="context length in tokens")
    add("--dropout", default=Config.dropout, type=fraction, help="dropout probability")
    add("--batch_size", default=32, type=positive, help="sequences per step")
    add("--max_iters", default=2400, type=positive, help="training steps")
    add("--learning_rate", default=1.5e-3, type=bounded(float, 0), help="peak learning rate; cosine decay to 10%%")
    add("--warmup_iters", default=100, type=bounded(int, 0), help="steps of linear warm-up")
    add("--eval_interval", default=200, type=positive, help="steps between evaluations and checkpoints")
    add("--seed", default=0, type=bounded(int, 0), help="random seed")
    add("--device", default=DEVICE, type=usable_device, help="cpu, cuda, mps ...")
    add("--dtype", choices=("float32", "bfloat16"), help="precision of training; None: bfloat16 where it is fast")
    add("--out_dir", type=Path, help="new folder, for this run only; None: out/MODEL-1, -2, ...")
    add("--resume", type=Path, help="folder of a run to continue (only --device may change)")
    add("--score", type=Path, help="run or checkpoint to evaluate (--gate, --halt, --confidence, --device may change)")

    # What was typed replaces the defaults of a preset, or the flags of a checkpoint.
    typed = {word.partition("=")[0].replace("--no-", "--") for word in argv if word.startswith("--")}
    args, model, saved = parser.parse_args(argv), None, None
    defaults = PRESETS[args.preset]
    if args.resume or args.score:
        task, may_change = ("--resume", set()) if args.resume else ("--score", {"--gate", "--halt", "--confidence"})
        if wrong := typed - may_change - {task, "--device"}:
            parser.error(f"{', '.join(sorted(wrong))} cannot be combined with {task}")
        changes = {flag[2:]: getattr(args, flag[2:]) for flag in typed & may_change}
        model, saved = load_checkpoint(args.resume or args.score, **changes)
        defaults = saved["flags"] | ({"device": DEVICE} if args.score else {})
    if args.resume and not (args.resume.is_dir() and "optimizer" in saved):
        parser.error("--resume needs the folder of a run; to evaluate any checkpoint, use --score")
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    of_gates = {"--gate", "--gate_bias", "--halt", "--lam", "--lam_ramp"}
    unused = {"plain": of_gates | {"--confidence"}, "tsa": {"--confidence"}, "exit": of_gates}
    if wrong := typed & unused.get(args.model, set()):
        parser.error(f"{', '.join(sorted(wrong))} has no effect with --model {args.model}")
    args.dtype = args.dtype or ("bfloat16" if supports_bfloat16(args.device) else "float32")
    if args.out_dir and (args.out_dir / "ckpt.pt").exists():
        parser.error(f"--out_dir {args.out_dir} contains a run; continue it with --resume {args.out_dir}")
    if args.n_embd % args.n_head:
        parser.error(f"--n_embd {args.n_embd} is not divisible by --n_head {args.n_head}")
    if args.n_layer == 1 and args.model != "plain":
        parser.error(f"--model {args.model} needs --n_layer 2 or more")
    return args, model, saved


def main(argv=None):
    try:
        args, model, saved = parse_flags(sys.argv[1:] if argv is None else argv)
        if args.data == "auto":
            args.data = data.shakespeare_or_stdlib()
        corpus = data.load(args.data, saved["vocab"] if args.score else None)
        idx, targets = corpus.windows("val", args.block_size)           # (n, T) each
        if saved and saved["checksum"] != corpus.checksum():
            message = f"--data {args.data} is not the text that this model was trained on"
            if args.resume:
                raise ValueError(message)
            print(f"note: {message}")
        if not saved:
            (args.out_dir or Path("out")).mkdir(parents=True, exist_ok=True)    # a mistake should show before training
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if not saved:
        seed_step(args.seed, 0)
        settings = {field.name: getattr(args, field.name) for field in fields(Config) if field.name in args}
        model = MODELS[args.model](Config(vocab_size=len(corpus.vocab), **settings))
    model.to(args.device)
    if args.score:
        score(model, idx, targets, timed=True)
        return
    args.out_dir = args.resume or args.out_dir
    try:
        fit(model, args, corpus, idx, targets, saved)
    except KeyboardInterrupt:
        has_run = args.out_dir and (args.out_dir / "ckpt.pt").exists()
        sys.exit(f"\ninterrupted. To continue: python train.py --resume {args.out_dir}" if has_run else "\ninterrupted")


def run_program(main):
    """Run main. Ctrl-C, a closed pipe (as in `train.py | head`) or a diverged loss ends it without a traceback."""
    try:
        main()
        sys.stdout.flush()
    except FloatingPointError as error:
        sys.exit(f"error: {error}")
    except (BrokenPipeError, KeyboardInterrupt):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())          # Python flushes it once more at exit
        sys.exit(1)


if __name__ == "__main__":
    run_program(main)
