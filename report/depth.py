"""
What a model's gates are about: python -m report.depth --ckpt out/halt/ckpt.pt --plain out/dense/ckpt.pt

On the whole validation split, as trained and as executed: loss, gates by block, and the loss when each token gets the
gates of the same position in another sequence (if it hardly moves, the gates knew the position and no more). Then mean
depth by kind of character and, with a plain model of the same text, by that model's entropy, which is what a causal
gate could know of difficulty. For a model of copy, sort or chain: accuracies instead, for chain also by hops.

Gates as trained are scales for tsa and, for halt, survive: the probability of reaching the block. As executed, a gate
counts as 1 where the block ran. Depth is the sum of a token's gates.
"""
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional as F

import data
from report.counts import macs_saved
from report.plot import new_figure, save_figure
from sample import load_model
from train import Parser, load_checkpoint, load_corpus, mean, number, pick_device, run_program
from tsa import GATES, UserError, cross_entropy, stack, tlops_saved

BATCH = 64


@torch.inference_mode()
def read(model, windows, mode, gates=None):
    """
    Windows idx, targets (n, T), with gates (L, n, T) replayed where given -> the mean loss; whether the target was the
    likeliest token (n, T); the entropy of the prediction (n, T); and the gates that ran (L, n, T).
    """
    parts = []
    for i, (x, y) in enumerate(zip(*(tokens.split(BATCH) for tokens in windows))):
        logits, used = model(x, mode, None if gates is None else gates[:, i * BATCH:(i + 1) * BATCH])
        log_p = F.log_softmax(logits, dim=-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        parts.append((cross_entropy(logits, y), logits.argmax(-1) == y, entropy, stack(used, x)))
    losses, right, entropy, gates = (torch.cat(part, dim=-2) for part in zip(*parts))
    return losses.cpu().sum(dtype=torch.float64).item() / (windows[1] >= 0).sum().item(), right, entropy, gates


def permuted_loss(model, windows, mode, gates):
    """The loss when each token gets all gates of another token, one at its position in another sequence."""
    torch.manual_seed(0)
    order = torch.rand(windows[0].shape, device=gates.device).argsort(0)                   # (n, T)
    gates = gates.gather(1, order.expand_as(gates))
    if model.config.model != "tsa":     # the other models have switches
        gates = gates != 0
    return read(model, windows, mode, gates)[0]


def ranks(x):
    """The place of each element in order, (n,) -> (n,); equal ones share the mean of their places."""
    _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[inverse]


def rank_correlation(x, y):
    """Spearman's, with ties, of x and y (n,); None where either is constant."""
    value = torch.corrcoef(torch.stack([ranks(x), ranks(y)]).double())[0, 1].item()
    return None if value != value else value


def kinds_of(text):
    """The kind of each character of a text."""
    kinds = []
    for before, c in zip(" " + text, text):
        if c.isspace():
            kinds.append("newline" if c == "\n" else "space")
        elif not c.isalpha():
            kinds.append("punctuation")
        elif c.isupper():
            kinds.append("capital")
        else:
            kinds.append("inside a word" if before.isalpha() else "first letter")
    return kinds


def group_tokens(windows, vocab, entropy):
    """Windows (n, T) -> {group: where in n * T its tokens are}: by kind and, where given, by decile of entropy."""
    groups = {}
    for verb, tokens in zip(("reads", "predicts"), windows):
        kinds = kinds_of("".join(vocab[i] for i in tokens.flatten().tolist()))
        for kind in sorted(set(kinds)):
            groups[f"{verb} {kind}"] = torch.tensor([k == kind for k in kinds]).nonzero().squeeze(1)
    if entropy is not None:
        groups |= {f"entropy decile {i}": at for i, at in enumerate(entropy.argsort().tensor_split(10), 1)}
    return groups


def hops_of(idx):
    """Chains idx (n, T) -> how many letters lead from each token to its digit (n, T)."""
    hops = torch.zeros_like(idx)
    for t in range(idx.size(1)):
        place = idx[:, t] - len(data.DIGITS)                                               # (n,), below 0 for a digit
        follows = place >= 0
        hops[follows, t] = hops[follows, place[follows]] + 1
    return hops


def score_task(right, targets, taken, hops):
    """right, targets and hops (n, T), gates taken (L, n, T) -> what is known of a task."""
    scored = targets >= 0
    row = {"token_accuracy": right[scored].cpu().double().mean().item(),
           "sequence_accuracy": (right | ~scored).all(1).cpu().double().mean().item(),
           "alpha_scored": mean(taken[1:, scored].cpu().double().mean(1).tolist())}
    if hops is not None:
        for n in hops.unique().tolist():
            row[f"hops {n}"] = {"n": (hops == n).sum().item(), "accuracy": right[hops == n].cpu().double().mean().item(),
                                "depth": taken.sum(0)[hops == n].mean().item()}
    return row


def tell(name, value):
    """Print what a result holds, a line for each number or list."""
    if isinstance(value, dict):
        for key in value:
            tell(f"{name} {key}", value[key])
    else:
        values = value if isinstance(value, list) else [value]
        print(f"{name:40}", *(f"{v:.4f}" if isinstance(v, float) else v for v in values))


def draw_histogram(figure, gates):
    """gates (L, n, T) -> a small histogram for each block that can be skipped."""
    figure.get_layout_engine().set(wspace=0.08)
    for l, axes in enumerate(figure.subplots(1, len(gates) - 1, sharey=True, squeeze=False)[0], 1):
        axes.hist(gates[l].flatten().tolist(), bins=50, range=(0, 1), color="#1f5fbf", histtype="stepfilled")
        axes.set_title(f"block {l}", fontsize=10)
        axes.set(xlim=(-0.02, 1.02), xticks=[0, 0.5, 1], xticklabels=["0", "0.5", "1"], yticks=[])
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.supxlabel("gate", fontsize=10)


def main(argv):
    parser = Parser(prog="report.depth", description="Set depth against difficulty on the validation split.")
    parser.add_argument("--ckpt", type=Path, required=True, help="the model to look at")
    parser.add_argument("--plain", type=Path, help="a plain model of the same text, to say what is difficult")
    parser.add_argument("--gate", choices=GATES, help="run a tsa model with another design's gates")
    parser.add_argument("--threshold", type=number(float, 0, 1), help="run with another threshold than in training")
    parser.add_argument("--device", help="cpu, cuda, mps ... (default: the best that works)")
    parser.add_argument("--out", type=Path, default=Path("depth.json"), help="where numbers go (default depth.json)")
    parser.add_argument("--histogram", type=Path, metavar="SVG", help="draw the gates as trained, block by block")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    model, saved = load_model(args.ckpt, device, gate=args.gate, threshold=args.threshold)
    config, corpus = model.config, load_corpus(saved, args.ckpt)
    if args.histogram and config.model not in ("tsa", "halt"):
        raise UserError(f"{args.ckpt} ({config.model}) has no gates in training: leave --histogram out")
    figure = new_figure(8, 1.8) if args.histogram else None
    windows = [tokens.to(device) for tokens in corpus.windows("val", config.block_size)]           # (n, T) each
    hops = hops_of(windows[0]) if corpus.name == "chain" else None
    entropy, groups = None, {}
    if args.plain:
        plain, of_plain = load_checkpoint(args.plain, device)
        if of_plain["digest"] != saved["digest"] or plain.config.block_size < config.block_size:
            raise UserError(f"{args.plain} has another text or a shorter block_size than {args.ckpt}")
        entropy = read(plain, windows, "trained")[2].flatten().cpu()
    if not corpus.is_task:
        groups = group_tokens(windows, saved["vocab"], entropy)
    result = {"ckpt": str(args.ckpt), "config": vars(config), "n": {group: len(at) for group, at in groups.items()}}
    for name, mode in (("trained", "trained"), ("executed", "gathered")):
        loss, right, _, gates = read(model, windows, mode)
        taken = gates if mode == "trained" else (gates != 0).float()                        # (L, n, T)
        by_block = taken.cpu().double().mean((1, 2)).tolist()
        row = result[name] = {"loss": loss, "alpha": mean(by_block[1:]), "gate by block": by_block}
        if mode == "trained":
            for l in range(1, config.n_layer):
                row[f"block {l} in tenths"] = (gates[l].cpu().histc(10, 0, 1) / gates[l].numel()).tolist()
            if figure:
                draw_histogram(figure, gates)
                save_figure(figure, args.histogram)
        else:
            window = replace(config, block_size=windows[0].size(1))         # tasks are shorter than the context
            row |= {"tlops_saved": tlops_saved(by_block), "macs_saved": macs_saved(window, by_block)}
        if config.model == "tsa" or config.model != "dense" and mode == "gathered":        # who has gates to replay
            row["loss, gates permuted"] = permuted_loss(model, windows, mode, gates)
        if corpus.is_task:
            row |= score_task(right, windows[1], taken, hops)
        depth = taken.sum(0).flatten().cpu()                                               # (n * T,)
        if entropy is not None:
            row["rank correlation with entropy"] = rank_correlation(depth, entropy)
        row["depth"] = {group: depth[at].mean().item() for group, at in groups.items()}
        tell(name, row)
    data.write_atomic(args.out, json.dumps(result, indent=1).encode("utf-8"))
    print(f"written to {args.out}")


if __name__ == "__main__":
    sys.exit(run_program("report.depth", main))
