"""
Train and evaluate a model:

    python train.py                                     a small version of the paper's model
    python train.py --model plain                       the same without gates
    python train.py --resume out/tsa-1                  continue an interrupted run
    python train.py --resume out/tsa-1 --gate skip      score a finished one with another gate
    python train.py --preset chain --gate straight --halt --lam 0.03        a puzzle, in two minutes

--help lists all flags. Each step's random numbers depend only on (seed, step), so that all designs are trained on the
same batches, and a resumed run matches one that was never interrupted (on a CPU, bit for bit).
"""
import argparse
import contextlib
import itertools
import json
import math
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
from tsa import GATES, MODELS, Config, load_checkpoint, saving, token_loss

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


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def parse_flags(argv):
    """Return the flags and the checkpoint of the run to --resume (otherwise None)."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="laptop", help="overrides the defaults below")
    add("--model", choices=MODELS, default=Config.model, help="the plain transformer, the paper's model, or early exit")
    add("--gate", choices=GATES, default=Config.gate, help="tsa: gate design, from GATES in tsa.py")
    add("--gate_bias", type=float, default=Config.gate_bias, help="tsa: initial bias of the routers")
    add("--halt", action="store_true", help="tsa: a token that skips one block skips all later ones")
    add("--lam", type=float, default=0.001, help="tsa: weight of the depth loss, the mean gate of blocks 1, 2, ...")
    add("--lam_ramp", type=float, default=0.0, help="tsa: share of training over which lam rises from 0")
    add("--confidence", type=float, default=Config.confidence, help="exit: a token exits above this probability")
    add("--data", default="auto", help="shakespeare, enwik8, stdlib, copy, sort, chain, or the path of a text file; "
                                       "auto: shakespeare, or stdlib without internet access")
    add("--n_layer", type=positive, default=Config.n_layer, help="number of blocks")
    add("--n_head", type=positive, default=Config.n_head, help="number of attention heads")
    add("--n_embd", type=positive, default=Config.n_embd, help="embedding width")
    add("--block_size", type=positive, default=Config.block_size, help="context length in tokens")
    add("--dropout", type=float, default=Config.dropout, help="dropout probability")
    add("--batch_size", type=positive, default=32, help="sequences per step")
    add("--max_iters", type=positive, default=2400, help="training steps")
    add("--learning_rate", type=float, default=1.5e-3, help="peak learning rate; cosine decay to 10%%")
    add("--warmup_iters", type=int, default=100, help="steps of linear warm-up")
    add("--eval_interval", type=positive, default=200, help="steps between evaluations, which also save a checkpoint")
    add("--seed", type=int, default=0, help="random seed")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, mps ...")
    add("--dtype", choices=("float32", "bfloat16"), help="precision of the training step")
    add("--compile", action="store_true", help="compile the loss with torch.compile")
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument("--out_dir", type=Path, help="new output folder; None: out/MODEL-1, -2, ...")
    folder.add_argument("--resume", type=Path, help="folder of a run to continue: its flags become the defaults")

    # Defaults, each replacing those before: the flags' own, the preset's, the resumed run's. A flag that is given wins.
    argv = sys.argv[1:] if argv is None else argv
    given, _ = parser.parse_known_args([flag for flag in argv if flag not in ("-h", "--help")])
    parser.set_defaults(dtype="bfloat16" if supports_bfloat16(given.device) else "float32", **PRESETS[given.preset])
    saved = load_checkpoint(given.resume / "ckpt.pt")[1] if given.resume else None
    if saved:
        parser.set_defaults(**{name: value for name, value in saved["flags"].items() if name != "device"})
    args = parser.parse_args(argv)
    for name in ("preset", "model", "data", "n_layer", "n_head", "n_embd", "block_size"):
        if saved and getattr(args, name) != saved["flags"][name]:
            parser.error(f"--{name} cannot change in a resumed run")
    if args.out_dir and args.out_dir.exists():
        parser.error(f"--out_dir {args.out_dir} exists: to continue its run, use --resume {args.out_dir}")
    if args.n_embd % args.n_head:
        parser.error(f"--n_embd {args.n_embd} is not divisible by --n_head {args.n_head}")
    if args.n_layer == 1 and args.model != "plain":
        parser.error(f"--model {args.model} needs --n_layer 2 or more")
    return args, saved


def supports_bfloat16(device):
    if device == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)


@contextlib.contextmanager
def precision(device, dtype):
    """The context of a training step's forward pass. On a CPU in bfloat16, the unfused attention kernel is faster."""
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)    # lets it sum in bfloat16 (on CPUs, too)
    unfused = sdpa_kernel(SDPBackend.MATH) if (device, dtype) == ("cpu", "bfloat16") else contextlib.nullcontext()
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16"), unfused:
        yield


@torch.no_grad()
def evaluate(model, idx, targets, sparse):
    """Windows idx, targets (n, T) -> the mean loss, and the share of the tokens that ran each block."""
    model.eval()
    device, loss, ran = model.wte.weight.device, 0, 0
    for x, y in zip(idx.split(64), targets.split(64)):
        logits, gates = model(x.to(device), sparse)                             # gates (L, B, T)
        loss += token_loss(logits, y.to(device)).sum().item()
        ran += (gates != 0).sum((1, 2)).cpu()
    return loss / (targets >= 0).sum().item(), (ran / idx.numel()).tolist()


def score(model, idx, targets):
    """Evaluate a full and a sparse pass (identical for plain models). Print and return the scores."""
    val_loss, ran = evaluate(model, idx, targets, sparse=False)
    val_loss_sparse = val_loss
    if model.config.model != "plain":
        val_loss_sparse, ran = evaluate(model, idx, targets, sparse=True)
    blocks, saved = sum(ran), saving(model.config, ran, idx.size(1))
    print(f"validation loss {val_loss:.4f} full, {val_loss_sparse:.4f} sparse: a token runs {blocks:.2f} of {len(ran)} "
          f"blocks, saving {saved:.1%} of the multiply-adds ({len(idx):,} windows)")
    # The depth loss lowers the mean gate, but only gates of 0 save anything: a gate of 0.03 is open.
    print("  open gates", *(f"{share:.2f}" for share in ran), " (share of the tokens that ran each block)")
    return dict(val_loss=val_loss, val_loss_sparse=val_loss_sparse, blocks=blocks, saved=saved, ran=ran)


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


def main(argv=None):
    try:
        args, saved = parse_flags(argv)
        torch.ones(1, device=args.device)           # fails at once if there is no such device
        if args.data == "auto":
            args.data = data.shakespeare_or_stdlib()
        corpus = data.load(args.data)
        idx, targets = corpus.windows("val", args.block_size)                   # (n, T) each
        if saved and saved["checksum"] != corpus.checksum():
            raise ValueError(f"--data {args.data}: the text has changed since this run started")
        numbered = (Path(f"out/{args.model}-{n}") for n in itertools.count(1))
        out_dir = args.resume or args.out_dir or next(path for path in numbered if not path.exists())
        out_dir.mkdir(parents=True, exist_ok=bool(args.resume))
    except (OSError, ValueError, RuntimeError, AssertionError) as error:    # the last two: torch's, for the device
        sys.exit(f"error: {error}")

    seed_step(args.seed, 0)
    sizes = {field.name: getattr(args, field.name) for field in fields(Config) if field.name in args}
    config = Config(vocab_size=len(corpus.vocab), **sizes)
    model = MODELS[args.model](config).to(args.device)
    routers = getattr(model, "routers", [])
    optimizer = make_optimizer(model)
    run = {"config": vars(config), "flags": {k: v for k, v in vars(args).items() if k not in ("resume", "out_dir")},
           "vocab": corpus.vocab, "prompt": corpus.prompt[:args.block_size], "checksum": corpus.checksum(),
           "step": 0}
    if saved:
        model.load_state_dict(saved["model"])
        run["step"] = saved["step"]
        if run["step"] < args.max_iters:        # otherwise, the model is only scored
            optimizer.load_state_dict(saved["optimizer"])
    loss_of = torch.compile(model.loss) if args.compile else model.loss
    print(*(f"{name}={value}" for name, value in run["flags"].items()))
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, checkpoints in {out_dir}")

    first, began = run["step"], time.perf_counter()
    for step in range(first + 1, args.max_iters + 1):
        model.train()       # evaluation leaves it in eval mode
        seed_step(args.seed, step)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * schedule(step, args.warmup_iters, args.max_iters)
        lam = args.lam * min(step / max(args.lam_ramp * args.max_iters, 1), 1)

        x, y = (part.to(args.device) for part in corpus.batch(args.batch_size, args.block_size))  # (B, T) each
        with precision(args.device, args.dtype):
            task_loss, gates = loss_of(x, y)                                    # gates (L, B, T)
            loss = task_loss + (lam * model.depth_loss(gates) if routers else 0)
        loss.backward()
        if routers and step == 1 and not any(p.grad is not None and p.grad.any() for p in model.routers.parameters()):
            sys.exit(f"error: --gate {args.gate} passes no gradient to the routers at their initial scales")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        evaluates = step % args.eval_interval == 0 or step == args.max_iters
        if step % 20 == 0 or evaluates:
            if not torch.isfinite(norm):
                raise FloatingPointError("the gradient is not finite: lower --learning_rate")
            seconds = (time.perf_counter() - began) / (step - first)    # per step, including evaluations
            print(f"step {step}/{args.max_iters}  loss {task_loss.item():.4f}  gates",
                  *(f"{gate:.2f}" for gate in gates.mean((1, 2)).tolist()), f" {1000 * seconds:.0f} ms/step, "
                  f"{seconds * (args.max_iters - step) / 60:.1f} min left", flush=True)
        if evaluates:
            score(model, idx[:64], targets[:64])
            run |= {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(run, out_dir / "ckpt.tmp")
            (out_dir / "ckpt.tmp").replace(out_dir / "ckpt.pt")     # so ckpt.pt is always complete

    print(f"scoring the whole validation split ({len(idx):,} windows)")
    result = run["config"] | run["flags"] | score(model, idx, targets)
    if first < args.max_iters or not (out_dir / "result.json").exists():
        (out_dir / "result.tmp").write_text(json.dumps(result, indent=1))
        (out_dir / "result.tmp").replace(out_dir / "result.json")
        print(f"to look inside: python sample.py {out_dir}/ckpt.pt (with or without --map)")


if __name__ == "__main__":
    main()
