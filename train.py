"""
Train and evaluate a model:

    python train.py                                             a small version of the paper's model
    python train.py --model plain                               the same without gates
    python train.py --resume out/tsa-1                          continue an interrupted run
    python train.py --score out/tsa-1 --gate skip               evaluate a model with another gate
    python train.py --preset chain --gate straight --halt --lam 0.03        a puzzle, in two minutes

--help lists all flags. Each step's random numbers depend only on (seed, step), so that all designs are trained on the
same batches, and a resumed run matches one that was never interrupted (on a CPU, bit for bit).
"""
import argparse
import contextlib
import itertools
import json
import math
import shutil
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
from tsa import GATES, MODELS, Config, load_checkpoint, saving, token_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRESETS = {     # override the defaults of the flags below
    "laptop": {},
    "deep": dict(data="stdlib", n_layer=12, learning_rate=3e-3, warmup_iters=300),
    "paper": dict(n_head=8, n_embd=256, block_size=128, dropout=0.1, batch_size=64, max_iters=5000, learning_rate=3e-4,
                  warmup_iters=0, eval_interval=250),
    "chain": dict(data="chain", n_embd=64, block_size=30, batch_size=64, max_iters=1500, learning_rate=2e-3,
                  lam_ramp=0.5, eval_interval=100),
    "copy": dict(data="copy", batch_size=256, max_iters=390, eval_interval=39),
    "sort": dict(data="sort", batch_size=256, max_iters=390, eval_interval=39),
}


def bounded(kind, low, high=math.inf):
    """A type for argparse: an int or a float from low to high."""
    def number(text):
        value = kind(text)
        if low <= value <= high and math.isfinite(value):
            return value
        raise argparse.ArgumentTypeError(f"{text} is not a number from {low} to {high}")
    return number


def existing_device(text):
    """A type for argparse: the name of a device that exists."""
    try:
        torch.ones(1, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from None
    return text


def parse_flags(argv):
    """
    Return the flags, and the folder or checkpoint to resume or to score (otherwise None). You can skip this function on
    a first reading.
    """
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    add, positive = parser.add_argument, bounded(int, 1)
    add("--preset", choices=PRESETS, default="laptop", help="overrides the defaults below; explicit flags win")
    add("--model", choices=MODELS, default=Config.model, help="the plain transformer, the paper's model, or early exit")
    add("--gate", choices=GATES, default=Config.gate, help="tsa: gate design, from GATES in tsa.py")
    add("--gate_bias", type=bounded(float, -100, 100), default=Config.gate_bias, help="tsa: initial bias of a router")
    add("--halt", action=argparse.BooleanOptionalAction, default=False, help="tsa: skip all blocks after a skipped one")
    add("--lam", type=bounded(float, 0), default=0.001, help="tsa: weight of the depth loss (the mean gate)")
    add("--lam_ramp", type=bounded(float, 0, 1), default=0.0, help="tsa: fraction of training over which lam rises")
    add("--confidence", type=bounded(float, 0, 1), default=Config.confidence, help="exit: exit above this probability")
    add("--data", default="auto", help="shakespeare, enwik8, stdlib, copy, sort, chain, or the path of a text file; "
                                       "auto: shakespeare, or stdlib if it cannot be downloaded")
    add("--n_layer", type=positive, default=Config.n_layer, help="number of blocks")
    add("--n_head", type=positive, default=Config.n_head, help="number of attention heads")
    add("--n_embd", type=positive, default=Config.n_embd, help="embedding width")
    add("--block_size", type=positive, default=Config.block_size, help="context length in tokens")
    add("--dropout", type=bounded(float, 0, 1), default=Config.dropout, help="dropout probability")
    add("--batch_size", type=positive, default=32, help="sequences per step")
    add("--max_iters", type=positive, default=2400, help="training steps")
    add("--learning_rate", type=bounded(float, 0), default=1.5e-3, help="peak learning rate; cosine decay to 10%%")
    add("--warmup_iters", type=bounded(int, 0), default=100, help="steps of linear warm-up")
    add("--eval_interval", type=positive, default=200, help="steps between checkpoints and evaluations")
    add("--seed", type=bounded(int, 0), default=0, help="random seed")
    add("--device", type=existing_device, default=DEVICE, help="cpu, cuda, mps ...")
    add("--dtype", choices=("float32", "bfloat16"), help="precision of the training step")
    add("--compile", action="store_true", help="compile the loss with torch.compile")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out_dir", type=Path, help="new output folder; None: out/MODEL-1, -2, ...")
    where.add_argument("--resume", type=Path, help="run to continue (only --max_iters and --device may change)")
    where.add_argument("--score", type=Path, help="run to evaluate (--gate, --halt, --confidence may change)")

    # Later defaults override earlier ones: the flags' own, the preset's, the checkpoint's. Explicit flags win.
    argv = sys.argv[1:] if argv is None else argv
    # A first parse, for --preset, --device, --resume and --score; the second one has the right defaults.
    given, _ = parser.parse_known_args([flag for flag in argv if flag not in ("-h", "--help")])
    parser.set_defaults(dtype="bfloat16" if supports_bfloat16(given.device) else "float32", **PRESETS[given.preset])
    path = given.resume or given.score
    saved = load_checkpoint(path)[1] if path else {"flags": {}}
    parser.set_defaults(**saved["flags"] | {"device": given.device})
    args = parser.parse_args(argv)
    may_change = ("device", "score", "gate", "halt", "confidence") if args.score else ("device", "resume", "max_iters")
    for name, value in vars(args).items():
        if name not in may_change and value != saved["flags"].get(name, value):
            parser.error(f"--{name} cannot change: it is {saved['flags'][name]} in {path}")
    if args.resume and "optimizer" not in saved:
        parser.error(f"{path} has no optimizer state: use --score {path}")
    if args.resume and args.max_iters < saved["step"]:
        parser.error(f"--max_iters {args.max_iters}: this run has reached step {saved['step']}")
    if args.out_dir and args.out_dir.exists():
        parser.error(f"--out_dir {args.out_dir} exists: to continue its run, use --resume {args.out_dir}")
    if args.n_embd % args.n_head:
        parser.error(f"--n_embd {args.n_embd} is not divisible by --n_head {args.n_head}")
    if args.n_layer == 1 and args.model != "plain":
        parser.error(f"--model {args.model} needs --n_layer 2 or more")
    return args, path


def supports_bfloat16(device):
    if device.startswith("cpu"):
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)


@contextlib.contextmanager
def precision(device, dtype):
    """The context of a training step's forward pass. On a CPU in bfloat16, the unfused attention kernel is faster."""
    device = torch.device(device).type
    unfused = sdpa_kernel(SDPBackend.MATH) if (device, dtype) == ("cpu", "bfloat16") else contextlib.nullcontext()
    with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"), unfused:
        yield


@torch.no_grad()
def evaluate(model, idx, targets, sparse):
    """Windows idx, targets (n, T) -> the mean loss, each block's mean gate, and the fraction of tokens that ran it."""
    model.eval()
    device = model.wte.weight.device
    loss = gate_sum = ran = 0
    for x, y in zip(idx.split(64), targets.split(64)):
        logits, gates = model(x.to(device), sparse)                             # gates (L, B, T)
        loss += token_loss(logits, y.to(device)).sum().item()
        gate_sum += gates.sum((1, 2)).cpu()
        ran += (gates != 0).sum((1, 2)).cpu()
    return loss / (targets >= 0).sum().item(), (gate_sum / idx.numel()).tolist(), (ran / idx.numel()).tolist()


def score(model, idx, targets):
    """Evaluate a full pass and a sparse one (the same for a plain model). Print and return the scores."""
    val_loss, gates, ran = evaluate(model, idx, targets, sparse=False)
    val_loss_sparse = val_loss
    if model.config.model != "plain":
        val_loss_sparse, _, ran = evaluate(model, idx, targets, sparse=True)
    tlops_saved = 1 - sum(gates) / len(gates)           # of the paper's token-layer operations
    saved = saving(model, ran, idx.size(1))
    print(f"validation ({len(idx):,} windows)\nfull    loss {val_loss:.4f}  mean gates", *(f"{g:.2f}" for g in gates),
          f" {tlops_saved:.1%} saved by the paper's count")
    print(f"sparse  loss {val_loss_sparse:.4f}  open gates", *(f"{share:.2f}" for share in ran),
          f" {saved:.1%} of the multiply-adds saved")
    return dict(val_loss=val_loss, val_loss_sparse=val_loss_sparse, tlops_saved=tlops_saved, blocks=sum(ran),
                saved=saved, gates=gates, ran=ran)


def seed_step(seed, step):
    """Make a step's batch and dropout depend only on (seed, step). Step 0 is the initialization."""
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


def fit(model, args, corpus, saved, out_dir):
    """Train the model, and save checkpoints and the result in out_dir. `saved` is the checkpoint to resume, or None."""
    idx, targets = corpus.windows("val", args.block_size)                       # (n, T) each
    stride = max(len(idx) // 256, 1)    # evaluations during training use about 256 windows, spread over the split
    optimizer, routers = make_optimizer(model), getattr(model, "routers", None)
    step = first = saved["step"] if saved else 0
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
    flags = {name: value for name, value in vars(args).items() if name not in ("out_dir", "resume", "score")}
    run = {"config": vars(model.config), "flags": flags, "vocab": corpus.vocab, "checksum": corpus.checksum(),
           "prompt": corpus.prompt[:args.block_size]}
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, checkpoints in {out_dir}")
    loss_of = torch.compile(model.loss) if args.compile else model.loss
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)    # despite its name, faster on CPUs (see precision)
    began = time.perf_counter()
    saves = True        # also before the first step
    while True:
        if saves:
            run |= {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(run, out_dir / "ckpt.tmp")
            (out_dir / "ckpt.tmp").replace(out_dir / "ckpt.pt")     # so ckpt.pt is always complete
            score(model, idx[::stride], targets[::stride])
        if step == args.max_iters:
            break

        step += 1
        saves = step % args.eval_interval == 0 or step == args.max_iters
        model.train()           # evaluation leaves it in eval mode
        seed_step(args.seed, step)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * schedule(step, args.warmup_iters, args.max_iters)
        lam = args.lam * min(step / max(args.lam_ramp * args.max_iters, 1), 1)

        x, y = (part.to(args.device) for part in corpus.batch(args.batch_size, args.block_size))  # (B, T) each
        with precision(args.device, args.dtype):
            task_loss, gates = loss_of(x, y)                                    # gates (L, B, T)
            loss = task_loss + (lam * model.depth_loss(gates) if routers else 0)
        loss.backward()
        if routers and step == 1 and not any(p.grad is not None and p.grad.any() for p in routers.parameters()):
            if not saved:
                shutil.rmtree(out_dir)      # so that the same command works once the gate is fixed
            sys.exit(f"error: --gate {args.gate} passes no gradient to the routers at their initial scales")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if saves or step % 20 == 0:
            if not torch.isfinite(norm):
                raise FloatingPointError("the gradient is not finite: start again with a lower --learning_rate")
            seconds = (time.perf_counter() - began) / (step - first)      # per step, including evaluations
            print(f"step {step}/{args.max_iters}  loss {task_loss.item():.4f}  gates",
                  *(f"{gate:.2f}" for gate in gates.mean((1, 2)).tolist()), f" {1000 * seconds:.0f} ms/step, "
                  f"{seconds * (args.max_iters - step) / 60:.1f} min left", flush=True)

    result = run["config"] | flags | score(model, idx, targets)         # now on all windows
    (out_dir / "result.json").write_text(json.dumps(result, indent=1))
    print(f"to look inside: python sample.py {out_dir} (with or without --map)")


def main(argv=None):
    try:
        args, path = parse_flags(argv)
        if args.data == "auto":
            args.data = data.shakespeare_or_stdlib()
        corpus = data.load(args.data)
        idx, targets = corpus.windows("val", args.block_size)
        if path:
            model, saved = load_checkpoint(path, gate=args.gate, halt=args.halt, confidence=args.confidence)
            if saved["vocab"] != corpus.vocab or args.resume and saved["checksum"] != corpus.checksum():
                raise ValueError(f"--data {args.data}: the text has changed since this model was trained")
        else:
            saved = None
            seed_step(args.seed, 0)
            settings = {field.name: getattr(args, field.name) for field in fields(Config) if field.name in args}
            model = MODELS[args.model](Config(vocab_size=len(corpus.vocab), **settings))
        model.to(args.device)
        numbered = (Path(f"out/{args.model}-{n}") for n in itertools.count(1))
        out_dir = args.out_dir or next(folder for folder in numbered if not folder.exists())
        if args.resume:
            out_dir = path if path.is_dir() else path.parent
        if not args.score:
            out_dir.mkdir(parents=True, exist_ok=bool(args.resume))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(*(f"{name}={value}" for name, value in vars(args).items() if value is not None))
    if args.score:
        score(model, idx, targets)
        return
    try:
        fit(model, args, corpus, saved, out_dir)
    except KeyboardInterrupt:
        if (out_dir / "ckpt.pt").exists():
            step = load_checkpoint(out_dir)[1]["step"]
            raise KeyboardInterrupt(f"To continue from step {step}: python train.py --resume {out_dir}") from None
        shutil.rmtree(out_dir)
        raise


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt as stop:
        sys.exit(f"\ninterrupted. {stop}")
