"""
Train one model and score it: python train.py

Reads top to bottom: flags, checkpoints, evaluation, and then `train`, which is one flat run. All randomness of a step
follows from (seed, step), so a resumed run equals an undisturbed one, and evaluation cannot change what is learned.
"""
import argparse
import csv
import io
import json
import math
import os
import signal
import statistics
import sys
import time
import timeit
from pathlib import Path

import numpy as np
import torch

import data
from tsa import (Config, GATES, MODELS, UserError, build, cross_entropy, generate, keep_freed_memory, stack,
                 tlops_saved)

PRESETS = {
    "laptop": dict(n_head=4, n_embd=128, block_size=64, batch_size=32, max_iters=1100, learning_rate=3e-3,
                   warmup_iters=100, dropout=0.0, eval_interval=100),
    "paper": dict(n_head=8, n_embd=256, block_size=128, batch_size=64, max_iters=5000, learning_rate=3e-4,
                  warmup_iters=0, dropout=0.1, eval_interval=250),                         # section 2
}
TASK_PRESET = dict(n_head=4, n_embd=128, block_size=64, batch_size=256, max_iters=390, eval_interval=39)     # 10 epochs
OWN_FLAGS = {           # the flags that only some models have, with their defaults
    "dense": {},
    "tsa": dict(gate="soft", lam=0.001, lam_iters=1, gate_bias=-1.0, threshold=0.5),
    "exit": dict(threshold=0.9),
    "halt": dict(lam=0.01, lam_iters=None, gate_bias=-1.0, threshold=0.5),     # lam_iters: half of max_iters
}
CONTROLS = ("out_dir", "resume", "fresh", "compile")       # flags that say what to do, not what the run is
MAY_DIFFER = ("device", "eval_interval")                # on --resume; any other difference makes another run
LOG_INTERVAL = 20
EVAL_WINDOWS = 64       # scored while training, always the same; the end scores the whole validation split
TABLE_COLUMNS = ("run", "model", "gate", "n_layer", "lam", "seed", "max_iters", "val_loss", "val_loss_executed",
                 "alpha", "alpha_executed", "tlops_saved_executed", "tokens_per_s")
SCORES = ("validation loss {val_loss:.4f} as trained, {val_loss_executed:.4f} as executed, saving "
          "{tlops_saved_executed:.1%} of token-layer operations")
THRESHOLDS = (.99, .95, .90, .85, .80, .75, .70, .65, .60, .55, .50, .40, .30)      # the paper's early-exit sweep


# ----------------------------------------------------------------------------------------------------------------
# Flags and devices

class Parser(argparse.ArgumentParser):
    """argparse, with one line for a mistake."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def number(kind, low, high):
    """An argparse type: an int or float in [low, high]."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    parse.__name__ = kind.__name__      # argparse names the type when the text is no number at all
    return parse


def make_parser():
    """The parser of the flags. One that is not given is absent from what it returns, so that presets can fill it in."""
    size, laptop = number(int, 1, 1_000_000), PRESETS["laptop"]
    parser = Parser(prog="train.py", description="Train a Token-Selective Attention model, or one to compare it with. "
                    "In brackets: what is taken where a flag is not given (tasks have sizes of their own).",
                    argument_default=argparse.SUPPRESS)
    group = parser.add_argument_group("model")
    group.add_argument("--model", choices=MODELS,
                       help="dense: plain; tsa: the paper's; exit: early exit; halt: learned halting (tsa)")
    group.add_argument("--gate", choices=GATES, help="tsa: the gate design (soft)")
    group.add_argument("--lam", type=number(float, 0, 1000),
                       help="price of depth (tsa: 0.001; halt: 0.01, with the paper preset 0.03)")
    group.add_argument("--lam_iters", type=size, help="steps in which the price rises to lam (tsa: 1; halt: half of "
                                                      "max_iters, with the paper preset 200)")
    group.add_argument("--gate_bias", type=number(float, -50, 50), help="tsa, halt: initial bias of the routers (-1)")
    group.add_argument("--threshold", type=number(float, 0, 1),
                       help="tsa, halt: skip above this probability (0.5); exit: leave above this confidence (0.9)")
    group.add_argument("--n_layer", type=size, help="blocks (6)")
    group.add_argument("--n_head", type=size, help=f"attention heads ({laptop['n_head']})")
    group.add_argument("--n_embd", type=size, help=f"channels ({laptop['n_embd']})")
    group.add_argument("--block_size", type=size, help=f"context in tokens ({laptop['block_size']})")
    group.add_argument("--dropout", type=number(float, 0, 0.99),
                       help=f"share of activations dropped ({laptop['dropout']})")
    group = parser.add_argument_group("training")
    group.add_argument("--preset", choices=PRESETS,
                       help="laptop: the values in brackets; paper: the paper's setting (laptop; on a GPU paper)")
    group.add_argument("--data", help="shakespeare, enwik8, stdlib, copy, sort, chain, or a text file (shakespeare, or "
                                      "stdlib where it cannot be downloaded)")
    group.add_argument("--batch_size", type=size, help=f"windows in a step ({laptop['batch_size']})")
    group.add_argument("--max_iters", type=size, help=f"steps ({laptop['max_iters']})")
    group.add_argument("--learning_rate", type=number(float, 0, 10),
                       help=f"a cosine takes it to a tenth ({laptop['learning_rate']})")
    group.add_argument("--warmup_iters", type=number(int, 0, 1_000_000),
                       help=f"steps of linear warm-up ({laptop['warmup_iters']})")
    group.add_argument("--seed", type=number(int, 0, 2**31), help="of everything random (0)")
    group = parser.add_argument_group("running")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps ... (the best that works)")
    group.add_argument("--dtype", choices=("float32", "bfloat16"),
                       help="of the blocks in training (bfloat16 where that multiplies faster)")
    group.add_argument("--compile", action="store_true", help="torch.compile the loss")
    group.add_argument("--eval_interval", type=size,
                       help=f"steps between evaluations and saves ({laptop['eval_interval']})")
    group.add_argument("--out_dir", help="folder of the run (out/MODEL-GATE)")
    group.add_argument("--table", metavar="DIR", help="print the finished runs below DIR instead; write results.csv")
    group = group.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint, if any")
    group.add_argument("--fresh", action="store_true", help="start over in a folder that holds a run")
    return parser


def new_flags(given, data_name, device):
    """The flags of a new run: those given, else as the task, the preset and the model want them."""
    model = given.get("model", "tsa")
    preset = given.get("preset", "paper" if device.startswith("cuda") else "laptop")
    own = OWN_FLAGS[model]
    for flag in OWN_FLAGS["tsa"]:       # tsa has all of them
        if flag in given and flag not in own:
            raise UserError(f"--{flag} means nothing to --model {model}: leave it out")
    flags = {"model": model} | dict.fromkeys(OWN_FLAGS["tsa"]) | own
    flags |= {"n_layer": 6} | PRESETS[preset] | {"preset": preset, "seed": 0}
    if data_name in data.TASKS:
        flags |= TASK_PRESET
        if model == "tsa":
            flags["lam"] = 0.01
    elif model == "halt" and preset == "paper":
        flags |= dict(lam=0.03, lam_iters=200)      # over half of training it rises too late: routers open for good
    if data_name == "enwik8" and preset == "paper":
        flags["block_size"] = 256
    if "dtype" not in given:
        flags["dtype"] = "bfloat16" if multiplies_faster_in_bfloat16(device) else "float32"
    flags |= given | {"data": data_name, "device": device}
    if model == "halt" and flags["lam_iters"] is None:
        flags["lam_iters"] = max(flags["max_iters"] // 2, 1)
    return flags


def resumed_flags(given, saved, device, out_dir):
    """The flags of the run that goes on; UserError where the user now asks for another run."""
    for flag, value in given.items():
        if flag not in MAY_DIFFER and value != saved.get(flag, value):
            raise UserError(f"--{flag} {value} contradicts the run in {out_dir} ({saved[flag]}): leave it out, or take "
                            f"another --out_dir")
    return saved | given | {"device": device}


def reason(error):
    """The first line of an exception, which may be long, or empty."""
    return (str(error).splitlines() or [type(error).__name__])[0][:100]


def pick_device(name=None):
    """The device of that name, by default the best that torch finds; UserError where it cannot be used."""
    name = name or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.ones(8, device=name).sum().item()
    except Exception as error:      # torch raises many kinds
        raise UserError(f"--device {name} cannot be used here ({reason(error)}): take another, or cpu")
    return name


def multiplies_faster_in_bfloat16(device):
    """A GPU tells; a CPU is tried, because some take half the time in bfloat16 and some double, whatever their name."""
    if device != "cpu":
        return device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(1024, 256, dtype=dtype), torch.ones(256, 1024, dtype=dtype)
        seconds.append(min(timeit.repeat(lambda: a @ b, number=1, repeat=8)))   # others may use the machine too
    return 1.5 * seconds[1] < seconds[0]


# ----------------------------------------------------------------------------------------------------------------
# Checkpoints and csv files

def save_checkpoint(path, **contents):
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    data.write_atomic(path, buffer.getvalue())


def load_checkpoint(path, device="cpu"):
    """ckpt.pt -> the model on `device`, in eval mode, and the dictionary that was saved; UserError if it is no good."""
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        model = build(Config(**saved["config"]))
        model.load_state_dict(saved["model"])
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): train first, or give another checkpoint")
    except Exception as error:      # damaged and foreign files fail in many ways
        raise UserError(f"{path} cannot be used: it is damaged or not of this train.py ({reason(error)})")
    return model.to(device).eval(), saved


def load_corpus(saved, path):
    """The text that a model was trained on; UserError where it has changed since."""
    corpus = data.load(saved["flags"]["data"])
    if corpus.digest() != saved["digest"]:
        raise UserError(f"the text of {path} has changed since: bring {saved['flags']['data']} back as it was")
    return corpus


def write_csv(path, rows):
    """A list of dictionaries -> a csv with a column for each key of any of them."""
    text = io.StringIO()
    columns = dict.fromkeys(column for row in rows for column in row)
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    data.write_atomic(path, text.getvalue().encode("utf-8"))


# ----------------------------------------------------------------------------------------------------------------
# Evaluation

@torch.no_grad()
def evaluate(model, windows, mode, batch_size=64):
    """
    Score windows (idx, targets), both (n, T), in float32 -> a dictionary of loss, a mean over the scored tokens;
    alpha_by_block, the mean gates of blocks 1 ... L-1; and ran, the share of tokens that took each of the L blocks.
    """
    model.eval()
    idx, targets = windows
    loss, gate_sum, ran = 0, 0, 0
    for x, y in zip(idx.split(batch_size), targets.split(batch_size)):
        logits, used = model(x, mode)
        gates = stack(used, x)                                                             # (L, B, T)
        loss += cross_entropy(logits, y).sum().item()
        gate_sum += gates.sum((1, 2)).cpu().double()        # mps has no float64
        ran += (gates != 0).sum((1, 2)).cpu()
    return {"loss": loss / (targets >= 0).sum().item(), "alpha_by_block": (gate_sum[1:] / idx.numel()).tolist(),
            "ran": (ran / idx.numel()).tolist()}


def mean(numbers):
    return sum(numbers) / max(len(numbers), 1)      # 0 over the gates of a model of one block


def score(model, windows):
    """As trained and as executed: what log.csv and result.json say of a model."""
    trained, executed = evaluate(model, windows, "trained"), evaluate(model, windows, "gathered")
    return {"val_loss": trained["loss"], "alpha": mean(trained["alpha_by_block"]),
            "alpha_by_block": trained["alpha_by_block"], "val_loss_executed": executed["loss"],
            "alpha_executed": mean(executed["ran"][1:]), "ran": executed["ran"],
            "tlops_saved_executed": tlops_saved(executed["ran"])}


def sweep_exits(model, windows):
    """Early exit, executed at each of the paper's THRESHOLDS."""
    rows, own = [], model.config.threshold
    for threshold in THRESHOLDS:
        model.config.threshold = threshold
        executed = evaluate(model, windows, "gathered")
        rows.append({"threshold": threshold, "val_loss": executed["loss"], "ran": executed["ran"],
                     "tlops_saved": tlops_saved(executed["ran"])})
        print("threshold {threshold:.2f}: loss {val_loss:.4f}, saving {tlops_saved:.1%} of token-layer operations"
              .format(**rows[-1]))
    model.config.threshold = own
    return rows


# ----------------------------------------------------------------------------------------------------------------
# Training

def seed_step(seed, step):
    """All randomness of a step (batch, dropout) follows from these two; step 0 is the initialisation."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))


def make_optimizer(model, learning_rate):
    """AdamW as in the paper: weight decay on matrices only, none on biases, LayerNorms and embeddings."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() == 2 and name not in ("wte.weight", "wpe.weight")
        (matrices if is_matrix else others).append(parameter)
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def schedule(step, warmup_iters, max_iters):
    """Share of the learning rate at `step`: a linear warm-up times a cosine from 1 at the first to 0.1 at the last."""
    progress = (step - 1) / max(max_iters - 1, 1)
    return min(step / max(warmup_iters, 1), 1) * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


def train(given):
    """One run, from the flags that were given -> exit status."""
    keep_freed_memory()
    controls = {flag: given.pop(flag, None) for flag in CONTROLS}
    folder = given.get("model", "tsa")
    if folder == "tsa":
        folder += f"-{given.get('gate', 'soft')}"
    out_dir = Path(controls["out_dir"] or f"out/{folder}")
    ckpt_path, log_path, result_path = out_dir / "ckpt.pt", out_dir / "log.csv", out_dir / "result.json"
    resumes = controls["resume"] and ckpt_path.exists()
    if (ckpt_path.exists() or result_path.exists()) and not resumes and not controls["fresh"]:
        raise UserError(f"{out_dir} holds a run: --resume goes on from its checkpoint, if that is still there, --fresh "
                        f"starts over, or take another --out_dir")

    # Flags, data, model, optimizer: new, or as the checkpoint has them
    device = pick_device(given.get("device"))
    if resumes:
        model, saved = load_checkpoint(ckpt_path, device)
        flags = resumed_flags(given, saved["flags"], device, out_dir)
        if result_path.exists():
            print(f"{out_dir} is finished: step {saved['step']} of {flags['max_iters']}")
            return 0
        corpus = load_corpus(saved, ckpt_path)
    else:
        corpus = data.load(given.get("data"))
        flags = new_flags(given, corpus.name, device)
        corpus.check_block_size(flags["block_size"])
        fields = {field: flags[field] for field in Config.__dataclass_fields__ if field != "vocab_size"}
        seed_step(flags["seed"], 0)
        model = build(Config(vocab_size=len(corpus.vocab), **fields)).to(device)
        saved = {"step": 0, "seconds": 0.0, "rows": [], "digest": corpus.digest()}
    config, step, rows, max_iters = model.config, saved["step"], saved["rows"], flags["max_iters"]
    corpus.to(device)
    optimizer = make_optimizer(model, flags["learning_rate"])
    if resumes:
        optimizer.load_state_dict(saved["optimizer"])
    out_dir.mkdir(parents=True, exist_ok=True)
    result_path.unlink(missing_ok=True)
    print(*(f"{flag}={value}" for flag, value in flags.items() if value is not None))
    n_params = sum(parameter.numel() for parameter in model.parameters())
    print(f"{n_params:,} parameters; results go to {out_dir}")
    began, finite = time.perf_counter(), torch.tensor(True, device=device)

    def save():
        if not finite:
            raise UserError(f"the loss is not finite at step {step}: {ckpt_path} keeps the last good step; start over "
                            f"with a lower --learning_rate")
        write_csv(log_path, rows)
        save_checkpoint(ckpt_path, config=vars(config), vocab=corpus.vocab, prompt=corpus.prompt,
                        new_tokens=corpus.new_tokens, digest=saved["digest"], flags=flags, step=step, rows=rows,
                        model=model.state_dict(), optimizer=optimizer.state_dict(),
                        seconds=saved["seconds"] + time.perf_counter() - began)

    probe = corpus.windows("val", config.block_size, EVAL_WINDOWS)
    if not resumes:
        rows.append({"step": 0} | score(model, probe))
        print(f"step 0: validation loss {rows[0]['val_loss']:.4f}, where guessing blindly is ln({len(corpus.vocab)}) = "
              f"{math.log(len(corpus.vocab)):.4f}")
        save()
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=flags["dtype"] == "bfloat16")
    loss_of = torch.compile(model.loss) if controls["compile"] else model.loss
    lap, lap_step = time.perf_counter(), step
    stop = []       # from here on Ctrl-C and SIGTERM only fill it: the loop ends after its step, and saves
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda received, frame: stop.append(received))
    while step < max_iters and not stop:
        step += 1
        model.train()       # scoring leaves it in eval mode
        seed_step(flags["seed"], step)
        for group in optimizer.param_groups:
            group["lr"] = flags["learning_rate"] * schedule(step, flags["warmup_iters"], max_iters)
        lam = 0 if flags["lam"] is None else flags["lam"] * min(step / flags["lam_iters"], 1)   # it rises: see Halt
        idx, targets = corpus.batch(flags["batch_size"], config.block_size)                # (B, T)
        with autocast:
            task, gates = loss_of(idx, targets)                                            # gates (L, B, T)
            loss = (task + lam * gates[1:].mean()) if lam else task                        # the paper's total
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        finite &= torch.isfinite(loss + norm)       # looked at only now and then: else a GPU would wait each step

        evaluates = step % flags["eval_interval"] == 0 or step == max_iters
        if not evaluates and step % LOG_INTERVAL:
            continue
        row = {"step": step, "loss": loss.item(), "task_loss": task.item()}     # a GPU is waited for here
        now = time.perf_counter()
        row["tokens_per_s"] = round((step - lap_step) * idx.numel() / max(now - lap, 1e-9))
        line = f"step {step}/{max_iters}  loss {row['loss']:.4f}"
        if flags["lam"] is not None:
            by_block = gates.detach()[1:].mean((1, 2)).tolist()
            row |= {"depth_loss": mean(by_block), "depth_by_block": " ".join(f"{alpha:.3f}" for alpha in by_block)}
            line += (f" = task {row['task_loss']:.4f} + {lam:.3g} * depth {row['depth_loss']:.4f}  by block "
                     f"{row['depth_by_block']}")
        left = int((now - began) / (step - saved["step"]) * (max_iters - step))
        print(f"{line}  {row['tokens_per_s']:,} tokens/s  {left // 60}:{left % 60:02d} left")
        rows.append(row)
        if evaluates:
            row |= score(model, probe)
            print(SCORES.format(**row))
            save()
        lap, lap_step = time.perf_counter(), step
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if stop:
        save()
        print(f"stopped at step {step} of {max_iters} and saved: --resume goes on")
        return 128 + stop[0]

    windows = corpus.windows("val", config.block_size)
    print(f"scoring the whole validation split, {windows[0].numel():,} tokens, as trained and as executed")
    result = flags | {"n_params": n_params} | score(model, windows) | {
        "tokens_per_s": round(statistics.median(row["tokens_per_s"] for row in rows[1:])),
        "seconds": round(saved["seconds"] + time.perf_counter() - began, 1), "torch": torch.__version__}
    if config.model == "exit":
        print(f"sweeping early exit over {len(THRESHOLDS)} thresholds")
        result["thresholds"] = sweep_exits(model, windows)
    data.write_atomic(result_path, json.dumps(result, indent=1).encode("utf-8"))
    print((SCORES + "; {seconds:.0f} s").format(**result))
    print(f"\nA sample (python sample.py --ckpt {ckpt_path} for more):\n{corpus.prompt}", end="")
    idx = torch.tensor([data.encode(corpus.prompt, corpus.vocab)], device=device)
    for idx_next, _ in generate(model, idx, min(corpus.new_tokens, 200), top_k=20):
        print(corpus.vocab[idx_next.item()], end="", flush=True)
    print()
    return 0


# ----------------------------------------------------------------------------------------------------------------
# Tables and the command line

def print_table(folder):
    """Print the finished runs below `folder`, a line each, and write all that is known of them to results.csv."""
    rows, lines = [], [TABLE_COLUMNS]
    for path in sorted(Path(folder).rglob("result.json")):
        rows.append({"run": path.parent.relative_to(folder).as_posix()} | json.loads(path.read_text("utf-8")))
        cells = [rows[-1].get(column) for column in TABLE_COLUMNS]
        lines.append(["-" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)
                      for cell in cells])
    if not rows:
        raise UserError(f"--table {folder}: there is no finished run (result.json) below it")
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))
    write_csv(Path(folder) / "results.csv", rows)


def run_program(name, main, argv=None):
    """main(argv) -> exit status, 0 where it returns none. A user's mistake is one line on stderr and status 2."""
    if hasattr(sys.stdout, "reconfigure"):      # a notebook's has not
        # A terminal may lack a character, which must not end a run; and a pipe shall show each line at once.
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        return main(argv) or 0
    except BrokenPipeError:     # | head has seen enough; what is left to flush must not complain either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
    except RuntimeError as error:
        if type(error).__module__.startswith("torch._"):        # dynamo's and inductor's errors
            print(f"{name}: --compile failed ({reason(error)}): leave it out", file=sys.stderr)
            return 2
        if "allocate" not in str(error) and not isinstance(error, torch.OutOfMemoryError):
            raise
        print(f"{name}: out of memory: choose a smaller --batch_size, --block_size or --n_embd", file=sys.stderr)
    except KeyboardInterrupt:       # while nothing trains: there is nothing to save
        return 130
    return 2


def main(argv):
    given = vars(make_parser().parse_args(argv))
    return print_table(given["table"]) if "table" in given else train(given)


if __name__ == "__main__":
    sys.exit(run_program("train.py", main))
