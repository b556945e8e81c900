"""
Train one model and score it: python train.py

Reads top to bottom: flags, helpers, then train, which is one flat run. Each step is a function of (seed, step) alone,
so a resumed run is the undisturbed one, and evaluation or sampling cannot change what is learned.
"""
import argparse
import csv
import ctypes
import io
import json
import math
import signal
import statistics
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.benchmark import Timer

import data
from tsa import (Config, GATES, MODELS, UserError, build, cross_entropy, default_run, generate, macs_per_token,
                 macs_saved, tlops_saved)

PRESETS = {     # minutes on a laptop; the paper's section 2
    "laptop": dict(n_layer=6, n_head=4, n_embd=128, block_size=128, batch_size=16, max_iters=1800, learning_rate=1e-3,
                   dropout=0.0, lam=0.001, eval_interval=150),
    "paper": dict(n_layer=6, n_head=8, n_embd=256, block_size=128, batch_size=64, max_iters=5000, learning_rate=3e-4,
                  dropout=0.1, lam=0.001, eval_interval=250),
}
# The synthetic tasks have the paper's sizes in both presets.
TASK_PRESET = dict(n_head=4, n_embd=128, block_size=64, batch_size=256, max_iters=390, lam=0.01, eval_interval=39)
HALT_LAM = 0.1          # the default lam of learned halting: leaves out a sixth to a third of the blocks
LOG_INTERVAL = 20
LOG_COLUMNS = ("step", "loss", "task_loss", "depth_loss", "alpha_by_block", "tokens_per_s", "train_loss", "val_loss",
               "train_loss_executed", "val_loss_executed", "alpha_executed", "tlops_saved_executed",
               "macs_saved_executed")
TABLE_COLUMNS = ("run", "data", "n_layer", "n_embd", "lam", "seed", "step", "val_loss", "val_loss_executed", "alpha",
                 "alpha_executed", "tlops_saved_executed", "macs_saved_executed", "tokens_per_s")
SETTING_COLUMNS = ("data", "n_embd", "n_head", "block_size", "batch_size", "max_iters", "learning_rate", "dropout")
POINT_COLUMNS = ("n_layer", "lam", "gate_bias", "threshold")       # with these the same, runs differ by seed
EVAL_WINDOWS = 64       # scored while training, always the same; the end scores the whole validation split
THRESHOLDS = (.99, .95, .90, .85, .80, .75, .70, .65, .60, .55, .50, .40, .30)      # the paper's early-exit sweep
MEANINGLESS = {"dense": ("gate", "lam", "gate_bias", "threshold"), "tsa": (), "exit": ("gate", "lam", "gate_bias"),
               "halt": ("gate",)}
MAY_DIFFER = ("device", "eval_interval")        # on --resume; everything else makes another run


# ----------------------------------------------------------------------------------------------------------------
# Flags. They are None when not given, so that a preset or a resumed run can fill them in.

class Parser(argparse.ArgumentParser):
    """One line for a mistake, where argparse would print the usage first."""

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


def parse_args(argv):
    size, share = number(int, 1, 1_000_000), number(float, 0, 1)
    parser = Parser(prog="train.py", description="Train a Token-Selective Attention model, or one to compare it with.")
    group = parser.add_argument_group("model")
    group.add_argument("--model", choices=MODELS, help="dense: plain; tsa: learned routing (default); exit: early exit "
                                                       "by confidence; halt: learned halting")
    group.add_argument("--gate", choices=GATES, help="tsa: the gate design (default soft, the paper's)")
    group.add_argument("--lam", type=number(float, 0, 1000), help="tsa: weight of the depth loss (default 0.001); "
                                                                  "halt: price of depth (default 0.1)")
    group.add_argument("--gate_bias", type=number(float, -50, 50), help="tsa, halt: initial bias of the routers "
                                                                         "(default -1)")
    group.add_argument("--threshold", type=share, help="tsa, halt: halt above this probability (default 0.5); "
                                                       "exit: leave above this confidence (default 0.9)")
    group.add_argument("--n_layer", type=size, help="blocks (default 6)")
    group.add_argument("--n_head", type=size, help="attention heads (laptop 4, paper 8)")
    group.add_argument("--n_embd", type=size, help="channels (laptop 128, paper 256)")
    group.add_argument("--block_size", type=size, help="context in characters (default 128)")
    group.add_argument("--dropout", type=number(float, 0, 0.99), help="dropout (laptop 0, paper 0.1)")
    group = parser.add_argument_group("training")
    group.add_argument("--preset", choices=PRESETS, help="defaults for the flags; laptop, or paper on a GPU")
    group.add_argument("--data", help="shakespeare, enwik8, stdlib, copy, sort, chain, or a text file "
                                       "(default shakespeare, else stdlib)")
    group.add_argument("--batch_size", type=size, help="windows a step (laptop 16, paper 64)")
    group.add_argument("--max_iters", type=size, help="steps (laptop 1800, paper 5000)")
    group.add_argument("--learning_rate", type=number(float, 0, 10), help="at the start; a cosine takes it to a tenth "
                                                                          "(laptop 1e-3, paper 3e-4)")
    group.add_argument("--seed", type=number(int, 0, 2**31), help="of everything random (default 0)")
    group = parser.add_argument_group("running")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps ... (default: the best there is)")
    group.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the blocks in training (default: bfloat16 "
                                                                        "where that multiplies faster)")
    group.add_argument("--compile", action="store_const", const=True, help="torch.compile the model")
    group.add_argument("--eval_interval", type=size, help="steps between evaluations and saves (laptop 150, paper 250)")
    group.add_argument("--out_dir", help="folder of the run (default out/MODEL-GATE)")
    group.add_argument("--table", metavar="DIR", help="print the finished runs below DIR, and write DIR/results.csv")
    group.add_argument("--plot", metavar="CSV", help="draw such a results.csv, loss against multiply-adds, beside it")
    group = group.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint, if any")
    group.add_argument("--fresh", action="store_true", help="start over in a folder that holds a run")
    return parser.parse_args(argv)


def resolve(given, data_name, device):
    """The flags of a new run: what the user gave, else the preset, else the paper's; None where meaningless."""
    flags = dict(model="tsa", gate="soft", gate_bias=-1.0, threshold=None, seed=0, compile=False)
    flags["preset"] = given["preset"] or ("paper" if device.startswith("cuda") else "laptop")
    flags |= PRESETS[flags["preset"]]
    if data_name in data.TASKS:
        flags |= TASK_PRESET
    if data_name == "enwik8" and flags["preset"] == "paper":
        flags["block_size"] = 256
    if given["dtype"] is None:
        flags["dtype"] = "bfloat16" if multiplies_faster_in_bfloat16(device) else "float32"
    if given["model"] == "halt":
        flags["lam"] = HALT_LAM
    flags |= {flag: value for flag, value in given.items() if value is not None}
    flags |= {"data": data_name, "device": device}
    if flags["threshold"] is None:
        flags["threshold"] = {"dense": None, "tsa": 0.5, "exit": 0.9, "halt": 0.5}[flags["model"]]
    for flag in MEANINGLESS[flags["model"]]:
        if given[flag] is not None:
            raise UserError(f"--{flag} means nothing to --model {flags['model']}: leave it out")
        flags[flag] = None
    return flags


def resolve_resumed(given, flags, device, out_dir):
    """The flags of the run that goes on; UserError where the user now asks for another run."""
    for flag, value in given.items():
        if flag not in MAY_DIFFER and value not in (None, flags[flag]):
            raise UserError(f"--{flag} {value} contradicts the run in {out_dir} ({flags[flag]}): leave it out, "
                            f"or choose another --out_dir")
    return flags | {"device": device, "eval_interval": given["eval_interval"] or flags["eval_interval"]}


def pick_device(name):
    """The device of that name, tried; without a name cuda, else mps, else cpu."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:      # torch raises several kinds
        raise UserError(f"--device {name} cannot be used here ({str(error).splitlines()[0]}): leave it out, or cpu")
    return name


def multiplies_faster_in_bfloat16(device):
    """Told by a GPU, tried on a CPU: some take half the time in bfloat16 and some double, by no feature's name."""
    if device != "cpu":
        return device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        matrices = {"a": torch.ones(1024, 256, dtype=dtype), "b": torch.ones(256, 1024, dtype=dtype)}
        timer = Timer("a @ b", globals=matrices, num_threads=torch.get_num_threads())
        seconds.append(min(timer.timeit(1).mean for _ in range(8)))     # the quickest: others may use the machine too
    return 1.5 * seconds[1] < seconds[0]


# ----------------------------------------------------------------------------------------------------------------
# Checkpoints and logs

def load_checkpoint(path, device="cpu"):
    """ckpt.pt -> the model on `device`, in eval mode, and the dictionary that was saved; UserError if it is no good."""
    try:
        with zipfile.ZipFile(path) as archive:      # torch does not check the sums that it writes
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{damaged} is damaged")
        saved = torch.load(path, map_location=device, weights_only=True)
        model = build(Config(**saved["config"]))
        model.load_state_dict(saved["model"])
    except UserError:       # a gate of the user's own, no longer in GATES
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): train first, or give another checkpoint")
    except Exception as error:      # damaged and foreign files fail in many ways
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged or not a checkpoint of train.py ({reason[:100]})")
    return model.to(device).eval(), saved


def load_corpus(saved, path):
    """The text that a model was trained on; UserError where it has changed since."""
    corpus = data.load(saved["flags"]["data"])
    if corpus.vocab != saved["vocab"]:
        raise UserError(f"the text of {path} has changed: its characters are not those of the training")
    return corpus


def save_checkpoint(path, **contents):
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    data.write_atomic(path, buffer.getvalue())


def write_csv(path, rows):
    """A list of dictionaries -> a csv whose columns are the first one's keys."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    data.write_atomic(path, text.getvalue().encode("utf-8"))


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def print_table(folder):
    """The finished runs below `folder`, a line each; everything that is known of them goes to results.csv."""
    paths = sorted(Path(folder).rglob("result.json"))
    if not paths:
        raise UserError(f"--table {folder}: there is no finished run (result.json) below it")
    try:
        rows = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    except ValueError as error:
        raise UserError(f"--table {folder}: a result.json is damaged ({error}): delete it")
    rows = [{"run": path.parent.relative_to(folder).as_posix()} | row for path, row in zip(paths, rows)]
    lines = [TABLE_COLUMNS]
    for row in rows:
        cells = [row[column] for column in TABLE_COLUMNS]
        cells = ["-" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))
    columns = dict.fromkeys(column for row in rows for column in row)       # early exit and the tasks have more
    rows = [dict.fromkeys(columns) | row for row in rows]
    for row in rows:
        for column, value in row.items():
            row[column] = json.dumps(value) if isinstance(value, list) else value
    write_csv(Path(folder) / "results.csv", rows)
    return 0


def plot(path):
    """
    The rows of a results.csv as executed loss against executed multiply-adds, one curve a model and gate: plain models
    by depth, routed ones by lam, early exit by threshold; each point the mean over seeds. Writes an SVG beside it.
    """
    try:
        from matplotlib import pyplot
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib")
    settings = set()
    curves = {}         # label -> what tells its points apart -> [(million multiply-adds, loss) of each seed]
    for row in read_csv(path):
        settings.add(tuple(row[key] for key in SETTING_COLUMNS))
        label = " ".join(filter(None, (row["model"], row["gate"])))
        points = {tuple(row[key] for key in POINT_COLUMNS): (row["macs_executed"], row["val_loss_executed"])}
        if row.get("thresholds"):
            points = {t["threshold"]: (t["macs"], t["val_loss"]) for t in json.loads(row["thresholds"])}
        for key, (macs, loss) in points.items():
            seeds = curves.setdefault(label, {}).setdefault(key, [])
            seeds.append((float(macs) / 1e6, float(loss)))
    if len(settings) > 1:
        raise UserError(f"{path} mixes data, sizes or steps, so that losses do not compare: {sorted(settings)}")
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    means = {label: np.array(sorted(np.mean(seeds, axis=0).tolist() for seeds in points.values()))
             for label, points in curves.items()}
    best = min(points[:, 1].min() for points in means.values())
    top = 1.07 * best       # a model that falls apart when executed would leave no room for the others
    for label, points in means.items():
        axes.plot(*points.T, "o-", label=label if points[:, 1].min() < top else f"{label} (above: from "
                                                                                f"{points[:, 1].min():.2f})")
    axes.set_ylim(0.99 * best, top)
    axes.set(xlabel="million multiply-adds a character, executed", ylabel="validation loss, as executed")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(Path(path).with_suffix(".svg"))
    print(f"written to {Path(path).with_suffix('.svg')}")
    return 0


# ----------------------------------------------------------------------------------------------------------------
# Evaluation

@torch.no_grad()
def evaluate(model, windows, run, batch_size=64):
    """
    Score windows (idx, targets), both (n, T), in float32. Returns a dictionary: loss, a mean over the scored
    characters; alpha, the mean gate of the blocks 1 ... L-1, and alpha_by_block; alpha_executed, the share of those
    token-blocks whose gate is not 0, what that saves, and macs, the multiply-adds of a token; accuracies; right and
    depth (n, T): was the character predicted, and how many blocks did it take, soft ones by their scale.
    """
    model.eval()
    idx, targets = windows
    parts = []
    for x, y in zip(idx.split(batch_size), targets.split(batch_size)):
        logits, _, stats = model(x, run=run)
        parts.append((cross_entropy(logits, y), logits.argmax(-1) == y, stats["gates"]))
    model.train()
    losses, right, gates = (torch.cat(part, dim=-2) for part in zip(*parts))               # (n, T) twice, (L, n, T)
    scored, n_gated = targets >= 0, max(len(gates) - 1, 1)
    alpha_by_block = gates[1:].mean((1, 2)).tolist()
    ran = (gates > 0).float().mean((1, 2)).tolist()
    return {
        "loss": (losses.sum() / scored.sum()).item(),
        "alpha": sum(alpha_by_block) / n_gated,
        "alpha_by_block": alpha_by_block,
        "alpha_executed": sum(ran[1:]) / n_gated,
        "tlops_saved": tlops_saved(ran),
        "macs_saved": macs_saved(model.config, ran),
        "macs": macs_per_token(model.config, ran),
        "token_accuracy": ((right & scored).sum() / scored.sum()).item(),
        "sequence_accuracy": (right | ~scored).all(1).float().mean().item(),
        "right": right, "depth": gates.sum(0),
    }


@torch.no_grad()
def sweep_exits(model, windows, batch_size=64):
    """
    Early exit at each of the paper's THRESHOLDS: executed, and beside it as val_loss_frozen the variant of the
    paper's code, where an exited token keeps its logits but still runs through every block, so that nothing is saved.
    """
    model.eval()
    idx, targets = windows
    frozen = dict.fromkeys(THRESHOLDS, 0)
    for x, y in zip(idx.split(batch_size), targets.split(batch_size)):
        levels = torch.stack(model(x)[2]["exit_logits"])                                        # (L, B, T, V)
        confidence = F.softmax(levels, dim=-1).amax(-1)                                    # (L, B, T)
        for threshold in THRESHOLDS:
            leaves = confidence > threshold
            leaves[0], leaves[-1] = False, True     # the stem ends no token, the last block takes the rest
            block = leaves.float().argmax(0)                                               # (B, T), the first to leave
            logits = levels.gather(0, block[None, :, :, None].expand_as(levels[:1]))[0]
            frozen[threshold] += cross_entropy(logits, y).sum()
    rows, own = [], model.config.threshold
    for threshold in THRESHOLDS:
        model.config.threshold = threshold
        score = evaluate(model, windows, "gathered")
        rows.append({"threshold": threshold, "val_loss": score["loss"], "alpha": score["alpha_executed"],
                     "tlops_saved": score["tlops_saved"], "macs_saved": score["macs_saved"], "macs": score["macs"],
                     "val_loss_frozen": (frozen[threshold] / (targets >= 0).sum()).item()})
        print("threshold {threshold:.2f}: loss {val_loss:.4f}, saving {tlops_saved:.1%} of token-layer operations, "
              "{macs_saved:.1%} of multiply-adds".format(**rows[-1]))
    model.config.threshold = own
    return rows


def score_hops(trained, executed, all_hops, hops):
    """The characters of a chain that are so many hops from their digit: accuracy and depth of both evaluations."""
    members = all_hops == hops
    row = {"hops": hops, "n": members.sum().item()}
    for ending, score in (("", trained), ("_executed", executed)):
        for key, column in (("right", "accuracy"), ("depth", "depth")):
            row[column + ending] = score[key][members].float().mean().item()
    print("{hops} hops: {accuracy:.3f} right at depth {depth:.2f} as trained, {accuracy_executed:.3f} at "
          "{depth_executed:.2f} as executed".format(**row))
    return row


# ----------------------------------------------------------------------------------------------------------------
# Pieces of a run

def keep_freed_memory():
    """
    glibc hands every buffer over 32 MB back to the system and has it again, page by page, for the next layer: on a
    CPU a third of a step. Tell it to keep them (mallopt(3): M_MMAP_MAX is -4, M_TRIM_THRESHOLD is -1).
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)
        libc.mallopt(-1, 2**31 - 1)


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


def cosine(step, max_iters):
    """Share of the learning rate that is left at `step`: from 1 at the first to a tenth at the last, no warm-up."""
    progress = (step - 1) / max(max_iters - 1, 1)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2


def stop_on_signal():
    """From here Ctrl-C and SIGTERM only fill the list returned, which the loop looks at; a second one kills."""
    received = []

    def handle(signum, frame):
        received.append(signum)
        signal.signal(signum, signal.SIG_DFL)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, handle)
    return received


def try_compile(model, step):
    """torch.compile, tried on one `step`; the model itself, and a line that says why, where that fails."""
    compiled = torch.compile(model)
    try:
        step(compiled)
    except Exception as error:      # a missing compiler or Triton, an unsupported Python: each fails in its own way
        print(f"--compile failed ({str(error).splitlines()[0][:100]}); going on without it")
        return model
    return compiled


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def finish(model, corpus, flags, rows, seconds, out_dir):
    """After the last step: score the whole validation split, write result.json, and show some text."""
    config, windows = model.config, corpus.windows("val", model.config.block_size)
    print(f"scoring the whole validation split, {windows[0].numel():,} characters, as trained and as executed")
    trained, executed = evaluate(model, windows, "trained"), evaluate(model, windows, "gathered")
    result = {key: flags[key] for key in ("model", "gate", "lam", "gate_bias", "threshold", "seed", "data")}
    result["n_params"] = count_parameters(model)
    for key in ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "max_iters", "learning_rate", "dropout"):
        result[key] = flags[key]
    result |= {
        "step": flags["max_iters"], "val_loss": trained["loss"], "val_bpc": trained["loss"] / math.log(2),
        "alpha": trained["alpha"] if config.has_routers else None,
        "val_loss_executed": executed["loss"], "alpha_executed": executed["alpha_executed"],
        "alpha_by_block": trained["alpha_by_block"] if config.has_routers else None,
        "tlops_saved_executed": executed["tlops_saved"], "macs_saved_executed": executed["macs_saved"],
        "macs_executed": executed["macs"],
        "tokens_per_s": statistics.median(int(row["tokens_per_s"]) for row in rows if row["tokens_per_s"]),
        "device": flags["device"], "dtype": flags["dtype"], "torch": torch.__version__, "seconds": round(seconds, 1)}
    if corpus.is_task:
        result |= {key: trained[key] for key in ("token_accuracy", "sequence_accuracy")}
    if corpus.hops is not None:
        result["by_hops"] = [score_hops(trained, executed, corpus.hops.to(flags["device"]), hops)
                             for hops in corpus.hops.unique().tolist()]
    if config.model == "exit":
        print(f"sweeping early exit over {len(THRESHOLDS)} thresholds")
        result["thresholds"] = sweep_exits(model, windows)
    data.write_atomic(out_dir / "result.json", json.dumps(result, indent=1).encode("utf-8"))
    print("validation loss {val_loss:.4f} ({val_bpc:.4f} bits per character) as trained, {val_loss_executed:.4f} as "
          "executed, saving {tlops_saved_executed:.1%} of token-layer operations, {macs_saved_executed:.1%} of "
          "multiply-adds; {seconds:.0f} s of training".format(**result))
    print(f"\nA sample (python sample.py --ckpt {out_dir / 'ckpt.pt'} for more):\n{corpus.prompt}", end="")
    idx = torch.tensor([data.encode(corpus.prompt, corpus.vocab)], device=flags["device"])
    for idx_next, _ in generate(model, idx, min(corpus.new_tokens, 200), top_k=20, run=default_run(config)):
        print(corpus.vocab[idx_next.item()], end="", flush=True)
    print()


# ----------------------------------------------------------------------------------------------------------------
# The run

def train(given, out_dir, resume, fresh):
    """One run from the flags `given`, None where the user gave none -> exit status."""
    keep_freed_memory()
    name = given["model"] or "tsa"
    out_dir = Path(out_dir or (f"out/tsa-{given['gate'] or 'soft'}" if name == "tsa" else f"out/{name}"))
    ckpt_path, log_path, result_path = out_dir / "ckpt.pt", out_dir / "log.csv", out_dir / "result.json"
    if ckpt_path.exists() and not resume and not fresh:
        raise UserError(f"{out_dir} holds a run: --resume goes on with it, --fresh starts over, or take "
                        f"another --out_dir")

    # Flags, data, model, optimizer: new, or as the checkpoint has them
    device = pick_device(given["device"])
    resume = resume and ckpt_path.exists()
    if resume:
        model, saved = load_checkpoint(ckpt_path, device)
        flags = resolve_resumed(given, saved["flags"], device, out_dir)
        if result_path.exists():
            print(f"{out_dir} is finished: step {saved['step']} of {flags['max_iters']}")
            return 0
        corpus = load_corpus(saved, ckpt_path)
    else:
        corpus, saved = data.load(given["data"]), {"step": 0, "seconds": 0.0}
        flags = resolve(given, corpus.name, device)
        fields = {field: flags[field] for field in Config.__dataclass_fields__ if field != "vocab_size"}
        seed_step(flags["seed"], 0)
        model = build(Config(vocab_size=len(corpus.vocab), **fields)).to(device)
    config, step, max_iters = model.config, saved["step"], flags["max_iters"]
    corpus.check(config.block_size)
    corpus.to(device)
    optimizer = make_optimizer(model, flags["learning_rate"])
    rows = []
    if resume:
        optimizer.load_state_dict(saved["optimizer"])
        # Rows past the checkpoint were written just before a kill: they will come again.
        rows = [row for row in read_csv(log_path) if int(row["step"]) <= step]
    out_dir.mkdir(parents=True, exist_ok=True)
    result_path.unlink(missing_ok=True)
    print(*(f"{flag}={value}" for flag, value in flags.items() if value is not None))
    print(f"{config.model}: {count_parameters(model):,} parameters on {device}, blocks in {flags['dtype']}; "
          f"{corpus.describe()}; results go to {out_dir}")

    def forward_backward(model):
        idx, targets = corpus.batch("train", flags["batch_size"], config.block_size)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=flags["dtype"] == "bfloat16"):
            _, loss, stats = model(idx, targets)
        loss.backward()
        return loss.detach(), stats

    def evaluate_probes():
        """A few windows, always the same, scored as trained and as executed -> columns of the log."""
        columns = {}
        for split in ("val", "train"):
            windows = corpus.windows(split, config.block_size, EVAL_WINDOWS)
            columns[f"{split}_loss"] = evaluate(model, windows, "trained")["loss"]
            executed = evaluate(model, windows, "gathered")
            columns[f"{split}_loss_executed"] = executed["loss"]
        return columns | {"alpha_executed": executed["alpha_executed"], "tlops_saved_executed": executed["tlops_saved"],
                          "macs_saved_executed": executed["macs_saved"]}

    def check_finite():
        if not finite:
            raise UserError(f"the loss is not finite at step {step}: {ckpt_path} keeps the last good step; "
                            f"start over with a lower --learning_rate")

    def save():
        check_finite()
        write_csv(log_path, rows)
        save_checkpoint(ckpt_path, config=vars(config), vocab=corpus.vocab, prompt=corpus.prompt,
                        new_tokens=corpus.new_tokens, flags=flags, step=step, model=model.state_dict(),
                        optimizer=optimizer.state_dict(), seconds=saved["seconds"] + time.time() - began)

    model.train()
    compiled = try_compile(model, forward_backward) if flags["compile"] else model
    optimizer.zero_grad()
    began, finite = time.time(), torch.tensor(True, device=device)
    if not resume:
        rows.append(dict.fromkeys(LOG_COLUMNS) | {"step": 0} | evaluate_probes())
        print(f"step 0: validation loss {rows[0]['val_loss']:.4f}, where guessing blindly is ln({len(corpus.vocab)}) = "
              f"{math.log(len(corpus.vocab)):.4f}")
        save()
    lap, lap_step, first_step = time.time(), step, step
    stop = stop_on_signal()
    while step < max_iters and not stop:
        step += 1
        seed_step(flags["seed"], step)
        for group in optimizer.param_groups:
            group["lr"] = flags["learning_rate"] * cosine(step, max_iters)
        if config.model == "halt":
            model.progress.fill_(step / max_iters)
        loss, stats = forward_backward(compiled)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        finite &= torch.isfinite(loss + norm)       # looked at only now and then: else a GPU would wait each step
        evaluates = step % flags["eval_interval"] == 0 or step == max_iters
        logs = evaluates or step % LOG_INTERVAL == 0
        if not logs:
            continue
        check_finite()
        row = dict.fromkeys(LOG_COLUMNS) | {"step": step, "loss": loss.item(), "task_loss": stats["task_loss"].item()}
        now = time.time()
        row["tokens_per_s"] = round((step - lap_step) * stats["gates"][0].numel() / (now - lap))
        line = f"step {step}/{max_iters}  loss {row['loss']:.4f}"
        if "depth_loss" in stats:
            by_block = stats["gates"].detach()[1:].mean((1, 2)).tolist()
            row["alpha_by_block"] = " ".join(f"{a:.3f}" for a in by_block)
            row["depth_loss"] = stats["depth_loss"].item()
            line += f" = task {row['task_loss']:.4f} + {model.price():.3g} * depth {row['depth_loss']:.4f}  " \
                    f"alpha by block {row['alpha_by_block']}"
        left = (now - began) / (step - first_step) * (max_iters - step)
        print(f"{line}  {row['tokens_per_s']:,} tokens/s  {clock(left)} left")
        if evaluates:
            row |= evaluate_probes()
            print("evaluation: as trained val loss {val_loss:.4f}, train {train_loss:.4f}; as executed val "
                  "{val_loss_executed:.4f}, train {train_loss_executed:.4f} at alpha {alpha_executed:.3f}, saving "
                  "{tlops_saved_executed:.1%} of token-layer operations, {macs_saved_executed:.1%} of multiply-adds"
                  .format(**row))
        rows.append(row)
        if evaluates:
            save()
        lap, lap_step = time.time(), step
    if stop:
        save()
        print(f"stopped at step {step} of {max_iters} and saved: the same command with --resume goes on")
        return 128 + stop[0]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    finish(model, corpus, flags, rows, saved["seconds"] + time.time() - began, out_dir)
    return 0


def main(argv=None):
    sys.stdout.reconfigure(errors="replace")       # a terminal may lack a character; that must not end a run
    try:
        args = vars(parse_args(argv))
        table, csv_path, out_dir, resume, fresh = map(args.pop, ("table", "plot", "out_dir", "resume", "fresh"))
        if table is not None:
            return print_table(table)
        return train(args, out_dir, resume, fresh) if csv_path is None else plot(csv_path)
    except (UserError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
    except RuntimeError as error:
        if "allocate" not in str(error) and not isinstance(error, torch.OutOfMemoryError):
            raise
        print("train.py: out of memory: choose a smaller --batch_size, --block_size or --n_embd", file=sys.stderr)
    except KeyboardInterrupt:       # while nothing trains: there is nothing to save
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
