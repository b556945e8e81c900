"""
Train and evaluate a model:

    python train.py                                             a small model with gates
    python train.py --resume out/tsa-1                          continue an interrupted run
    python train.py --score out/tsa-1 --gate soft               evaluate a model with another gate
    python train.py --preset chain --gate straight --halt --lam 0.03        a puzzle; takes two minutes

--help lists all flags, such as --model plain. Random numbers depend only on (seed, step), so all designs see the same
batches, and a run resumed with the same --max_iters matches an uninterrupted one (on the same CPU, bit for bit).
"""
import argparse
import contextlib
import itertools
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections import namedtuple
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
from tsa import GATES, MODELS, TSA, Config, Transformer, load_checkpoint, multiply_adds, token_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRESETS = {     # each replaces some defaults of the flags below
    "laptop": {},
    "deep": dict(data="stdlib", n_layer=12, learning_rate=3e-3, warmup_iters=300),
    "paper": dict(gate="soft", n_head=8, n_embd=256, block_size=128, dropout=0.1, batch_size=64, max_iters=5000,
                  learning_rate=3e-4, warmup_iters=0, eval_interval=250),
    "chain": dict(data="chain", n_embd=64, block_size=30, batch_size=64, max_iters=1500, learning_rate=2e-3,
                  lam_ramp=0.5, eval_interval=100),
}


def bounded(kind, low, high=math.inf):
    """A type for argparse: an int or a float from low to high, but not inf or nan."""
    def number(text):
        value = kind(text)
        if low <= value <= high and abs(value) != math.inf:
            return value
        raise argparse.ArgumentTypeError(f"{text} is not a number from {low} to {high}")
    return number


def usable_device(name):
    """A type for argparse: a device that PyTorch can use here."""
    try:
        torch.zeros(1, device=name).item()
    except (AssertionError, ImportError, RuntimeError):
        raise argparse.ArgumentTypeError(f"PyTorch cannot use the device {name} here; try --device cpu") from None
    return name


Flag = namedtuple("Flag", "default kind help")         # kind: argparse's type, or the names to choose from
FLAGS = {
    "preset": Flag("laptop", PRESETS, "replaces some of the defaults below"),
    "model": Flag(Config.model, MODELS, "the plain transformer, the paper's model, or early exit"),
    "gate": Flag(Config.gate, GATES, "tsa: gate design, from GATES in tsa.py"),
    "gate_bias": Flag(Config.gate_bias, bounded(float, -math.inf), "tsa: initial b2 of equation (3)"),
    "halt": Flag(Config.halt, bool, "tsa: multiply each gate by the previous"),
    "lam": Flag(0.001, bounded(float, 0), "tsa: weight of the depth loss"),
    "lam_ramp": Flag(0.0, bounded(float, 0, 1), "tsa: fraction of training in which lam rises from 0"),
    "confidence": Flag(Config.confidence, bounded(float, 0, 1), "exit: exit above this top probability"),
    "data": Flag("auto", str, "shakespeare, enwik8, stdlib, chain, a file; auto: shakespeare, else stdlib"),
    "n_layer": Flag(Config.n_layer, bounded(int, 1), "number of blocks"),
    "n_head": Flag(Config.n_head, bounded(int, 1), "number of attention heads"),
    "n_embd": Flag(Config.n_embd, bounded(int, 1), "embedding width"),
    "block_size": Flag(Config.block_size, bounded(int, 1), "context length in tokens"),
    "dropout": Flag(Config.dropout, bounded(float, 0, 1), "dropout probability"),
    "batch_size": Flag(32, bounded(int, 1), "sequences per step"),
    "max_iters": Flag(2400, bounded(int, 1), "training steps; with --resume, a new length, which the schedule follows"),
    "learning_rate": Flag(1.5e-3, bounded(float, 0), "peak learning rate; cosine decay to 10%%"),
    "warmup_iters": Flag(100, bounded(int, 0), "steps of linear warm-up"),
    "eval_interval": Flag(200, bounded(int, 1), "steps between evaluations and checkpoints"),
    "seed": Flag(0, bounded(int, 0), "random seed"),
    "device": Flag(DEVICE, usable_device, "cpu, cuda, mps ... (tested on cpu only)"),
    "dtype": Flag(None, ("float32", "bfloat16"), "precision of training; None: bfloat16 where it is fast"),
    "out_dir": Flag(None, Path, "new folder, for this run only; None: out/MODEL-1, -2, ..."),
    "resume": Flag(None, Path, "folder of a run to continue (only --device and --max_iters may change)"),
    "score": Flag(None, Path, "run or checkpoint to evaluate (--gate, --halt, --confidence, --device may change)"),
}
FLAGS |= {field.name: Flag(field.default, field.type, "see Config in tsa.py") for field in fields(Config)
          if field.name not in (*FLAGS, "vocab_size")}          # what you add to Config becomes a flag, too


def seed_step(seed, step):
    """Make a step's batch and dropout depend only on (seed, step). Step 0 is the initialization."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))   # seed + step would overlap


def make_optimizer(model):
    """AdamW as in the paper: weight decay on matrices only, not on biases, LayerNorms or embeddings."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (others if parameter.dim() < 2 or name in ("wte.weight", "wpe.weight") else matrices).append(parameter)
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def schedule(step, warmup_iters, max_iters):
    """The learning-rate multiplier: linear warm-up times a cosine decay from 1 (first step) to 0.1 (last step)."""
    progress = (step - 1) / max(max_iters - 1, 1)
    return min(step / max(warmup_iters, 1), 1) * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


def fit(model, args, corpus, idx, targets, saved):
    """Train, evaluate on idx, targets (n, T), and save the run. `saved` is the checkpoint to resume, or None."""
    optimizer, done = make_optimizer(model), 0
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["step"]
    flags = {name: value for name, value in vars(args).items() if name not in ("out_dir", "resume", "score")}
    run = {"config": vars(model.config), "flags": flags, "vocab": corpus.vocab, "checksum": corpus.checksum(),
           "prompt": corpus.prompt[:args.block_size]}
    size = sum(weight.numel() for weight in model.parameters())
    routers = sum(weight.numel() for name, weight in model.named_parameters() if name.startswith("routers."))
    print(f"{size:,} parameters ({routers / size:.1%} of them in routers), data {args.data}, device {args.device}, "
          f"dtype {args.dtype}")
    unfused = args.device.startswith("cpu") and args.dtype == "bfloat16"        # there, unfused attention is faster
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(unfused)             # if it may sum in bfloat16, too

    def score_after(step):      # on all windows at the end, otherwise on a few hundred, spread over the split
        last = step == args.max_iters
        stride = 1 if last else max(len(idx) // 256, 1)
        return score(model, idx[::stride], targets[::stride], timed=last)

    scores = score_after(done)
    began = time.perf_counter()
    for step in range(done + 1, args.max_iters + 1):
        model.train()           # evaluation leaves it in eval mode
        seed_step(args.seed, step)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * schedule(step, args.warmup_iters, args.max_iters)
        lam = args.lam * min(step / max(args.lam_ramp * args.max_iters, 1), 1)          # without a ramp, at once
        x, y = (part.to(args.device) for part in corpus.batch(args.batch_size, args.block_size))  # (B, T) each
        attention = sdpa_kernel(SDPBackend.MATH) if unfused else contextlib.nullcontext()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"), attention:
            task_loss, gates = model.loss(x, y)                                 # gates (L, B, T)
            depth_loss = model.routers[0].depth_loss(gates[1:]) if isinstance(model, TSA) else 0
            loss = task_loss + lam * depth_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            seconds = (time.perf_counter() - began) / (step - done)         # per step, including evaluations
            shown = "  gates" + "".join(f" {gate:.2f}" for gate in gates.mean((1, 2))) if isinstance(model, TSA) else ""
            print(f"step {step}/{args.max_iters}  loss {task_loss.item():.4f}{shown}  {1000 * seconds:.0f} ms/step, "
                  f"{seconds * (args.max_iters - step) / 60:.1f} min left", flush=True)
        if step % args.eval_interval == 0 or step == args.max_iters:
            scores = score_after(step)
            run.update(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step)
            with tempfile.TemporaryDirectory(dir=args.out_dir) as own:          # two processes may resume one run
                torch.save(run, Path(own, "ckpt.pt"))
                Path(own, "ckpt.pt").replace(args.out_dir / "ckpt.pt")          # so ckpt.pt is always complete
            (args.out_dir / "result.json").unlink(missing_ok=True)              # from before --max_iters was raised
    (args.out_dir / "result.json").write_text(json.dumps(run["config"] | flags | scores, indent=1))
    print(f"to look inside: python sample.py {args.out_dir} (with or without --map)")


def new_folder(path, model):
    """Make path or, if that is None, the first of out/MODEL-1, out/MODEL-2, ... that does not exist. Return it."""
    for n in itertools.count(1):
        folder = path or Path(f"out/{model}-{n}")
        folder.parent.mkdir(parents=True, exist_ok=True)        # not suppressed: fails if it is a file
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
        if path:
            raise FileExistsError(f"--out_dir {path} exists; choose another or, if it has a ckpt.pt, --resume {path}")


@torch.no_grad()
def evaluate(model, idx, targets, sparse):
    """Windows idx, targets (n, T) -> the mean loss, each block's mean gate, and the fraction of nonzero gates."""
    loss_sum, gate_sum, ran = 0, 0, 0
    for x, y in zip(idx.split(64), targets.split(64)):
        logits, gates = model(x, sparse)                                        # gates (L, B, T)
        assert not ((gates < 0) | (gates > 1)).any(), f"gates from {gates.min():.3g} to {gates.max():.3g}, not 0 to 1"
        loss_sum += token_loss(logits, y).sum().item()                          # batches add up in double precision
        gate_sum = gate_sum + gates.sum((1, 2))
        ran = ran + (gates != 0).sum((1, 2))
    return loss_sum / targets.numel(), (gate_sum / idx.numel()).tolist(), (ran / idx.numel()).tolist()


@torch.no_grad()
def speedup(model, idx):
    """How many times as fast a sparse pass is as a plain model with the same blocks, on windows idx (n, T)."""
    ratios = [seconds_of(lambda: Transformer.forward(model, idx)) / seconds_of(lambda: model(idx, sparse=True))
              for _ in range(16)]               # they take turns, because speeds drift
    return np.median(ratios[1:])                # without the warm-up


def seconds_of(run):
    """Seconds that run() takes. Reading its last result waits for a GPU, which computes in order."""
    began = time.perf_counter()
    run()[-1].any().item()
    return time.perf_counter() - began


def score(model, idx, targets, timed=False):
    """Evaluate windows idx, targets (n, T). Print and return the scores. If timed, also print the speed-up."""
    model.eval()
    kind, gated = model.config.model, isinstance(model, TSA)
    print(f"evaluation on {len(idx):,} windows", flush=True)
    val_loss, gates, ran = evaluate(model, idx, targets, sparse=False)
    val_loss_sparse = val_loss          # a plain model has nothing to skip
    if kind != "plain":
        val_loss_sparse, _, ran = evaluate(model, idx, targets, sparse=True)
    total, plain = multiply_adds(model, ran, idx.size(1))
    saved = 1 - total / plain           # negative if skipping costs more
    tlops_saved = 1 - sum(ran if kind == "exit" else gates) / len(ran)      # token-layer operations, the paper's unit
    by_count = f"  {tlops_saved:.1%} saved by the paper's count"
    gates_shown, ran_shown = ("".join(f" {share:.2f}" for share in shares) for shares in (gates, ran))
    print(f"full   loss {val_loss:.4f}" + (f"  gates{gates_shown}{by_count}" if gated else ""))
    if kind != "plain":
        more_or_fewer = f"{abs(saved):.1%} {'fewer' if saved >= 0 else 'more'} multiply-adds"
        times = f", {speedup(model, idx[:64]):.1f}x as fast" if timed else ""
        print(f"sparse loss {val_loss_sparse:.4f}  open {ran_shown}  {more_or_fewer}{times}")
    if kind == "exit":
        print(" " * 6 + by_count)
    if not math.isfinite(val_loss + val_loss_sparse):
        raise FloatingPointError("the loss is not finite: start again with a lower --learning_rate or another gate")
    return dict(val_loss=val_loss, val_loss_sparse=val_loss_sparse, tlops_saved=tlops_saved, blocks=sum(ran),
                saved=saved, gates=gates, ran=ran)


def supports_bfloat16(device):
    if device.startswith("cpu"):
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)


def parse_flags(argv):
    """Return the flags (typed > checkpoint > preset > default), and a loaded model and its checkpoint or None, None."""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for name, flag in FLAGS.items():
        how = ({"action": argparse.BooleanOptionalAction} if flag.kind is bool else
               {"type": flag.kind} if callable(flag.kind) else {"choices": flag.kind})
        parser.add_argument(f"--{name}", **how, help=f"{flag.help} (default: {flag.default})")
    typed = vars(parser.parse_args(argv))           # the flags that were typed, and no others
    model, saved, trained = None, None, {}          # `trained`: the flags that the checkpoint was trained with
    if "resume" in typed:
        if others := typed.keys() - {"resume", "max_iters", "device"}:
            parser.error(f"--{', --'.join(sorted(others))} cannot be combined with --resume")
        model, saved = load_checkpoint(typed["resume"])
        if not (typed["resume"].is_dir() and "optimizer" in saved):
            parser.error("--resume needs the folder of a run (--score takes any checkpoint)")
        trained = saved["flags"] | {"out_dir": typed["resume"]}
    elif "score" in typed:
        changes = {name: typed[name] for name in ("gate", "halt", "confidence") if name in typed}
        if others := typed.keys() - changes.keys() - {"score", "device"}:
            parser.error(f"--{', --'.join(sorted(others))} cannot be combined with --score")
        model, saved = load_checkpoint(typed["score"], **changes)
        trained = saved["flags"] | {"device": DEVICE}           # it may be from another machine
    defaults, preset = {name: flag.default for name, flag in FLAGS.items()}, PRESETS[typed.get("preset", "laptop")]
    args = argparse.Namespace(**defaults | preset | trained | typed)        # the one further right wins
    of_gates = {"gate", "gate_bias", "halt", "lam", "lam_ramp"}
    unused = {"plain": of_gates | {"confidence"}, "tsa": {"confidence"}, "exit": of_gates}
    if others := typed.keys() & unused.get(args.model, set()):
        parser.error(f"no effect with --model {args.model}: --{', --'.join(sorted(others))}")
    if args.n_embd % args.n_head:
        parser.error(f"--n_embd {args.n_embd} is not divisible by --n_head {args.n_head}")
    if args.n_layer == 1 and args.model != "plain":
        parser.error(f"--model {args.model} needs --n_layer 2 or more")
    if args.resume and typed.get("max_iters", math.inf) <= saved["step"]:
        parser.error(f"--max_iters {args.max_iters} is not more than the {saved['step']} steps already trained")
    usable_device(args.device)                      # a resumed run may be from another machine
    args.dtype = args.dtype or ("bfloat16" if supports_bfloat16(args.device) else "float32")
    return args, model, saved


def main(argv=None):
    try:
        args, model, saved = parse_flags(argv)
        args.data = data.shakespeare_or_stdlib() if args.data == "auto" else args.data
        corpus = data.load(args.data, saved["vocab"] if args.score else None)      # --score: the text may have changed
        idx, targets = (part.to(args.device) for part in corpus.windows("val", args.block_size))       # (n, T) each
        if saved and saved["checksum"] != corpus.checksum():
            message = f"--data {args.data} is not the text that this model was trained on"
            if args.resume:
                raise ValueError(message)
            print(f"note: {message}")
        if not saved:           # make the folder now: a mistake shows before training, and no other run takes it
            args.out_dir = new_folder(args.out_dir, args.model)
    except (OSError, ValueError, argparse.ArgumentTypeError) as error:
        sys.exit(f"error: {error}")
    try:
        if not saved:
            seed_step(args.seed, 0)
            settings = {field.name: getattr(args, field.name) for field in fields(Config) if field.name in args}
            model = MODELS[args.model](Config(vocab_size=len(corpus.vocab), **settings))
        model.to(args.device)
        if args.score:
            score(model, idx, targets, timed=True)
        else:
            fit(model, args, corpus, idx, targets, saved)
    except KeyboardInterrupt:
        how = f". To continue: python train.py --resume {args.out_dir} --max_iters {args.max_iters}"
        sys.exit("\ninterrupted" + (how if args.out_dir and (args.out_dir / "ckpt.pt").exists() else ""))
    finally:
        if not saved:
            with contextlib.suppress(OSError):          # it is not empty after the first checkpoint
                args.out_dir.rmdir()


def run_program(main):
    """Run main. Ctrl-C, a closed pipe (as in `train.py | head`) or a diverged loss ends it without a traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # `kill` stops it in the same way as Ctrl-C
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
