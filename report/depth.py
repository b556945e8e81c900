"""
Score a trained model in more detail than train.py does:

    python -m report.depth out/tsa-1/ckpt.pt --gate skip --threshold 0.9

For each threshold, score a full and a sparse pass over the whole split: losses, savings, accuracy, and the losses with
permuted gates (each token gets the gates of the token at the same position in another sequence). If permuting hardly
changes the loss, it hardly matters which token gets which gates. For halting models, also report the loss after each
block; for chains, accuracy and blocks run by number of hops. The rows are added to scores.json next to the checkpoint.
--histogram draws the gates of a full pass.
"""
import contextlib
import json
import math
from pathlib import Path

import torch

import data
from report.variants import VARIANTS
from train import SHARE, Parser, load_checkpoint, one_line, pick_device
from tsa import GATES, savings, token_loss


@contextlib.contextmanager
def replay(model, gates):
    """
    Let block l run with gates[l] (B, T), if any. They overwrite the model's own gates in place, so that the model sees
    what ran.
    """
    def overwrite(gate):
        def hook(block, args):
            if len(args) > 1:       # a plain block gets only x
                args[1].copy_(gate)
        return hook

    pairs = [] if gates is None else zip(model.blocks, gates)
    hooks = [block.register_forward_pre_hook(overwrite(gate)) for block, gate in pairs]
    yield
    for hook in hooks:
        hook.remove()


def set_gate(model, gate, threshold):
    """Change the gate design and the threshold of a trained model, each unless it is None."""
    config = model.config
    if gate and config.model != "tsa":
        raise data.UserError(f"--gate does not apply to a {config.model} model")
    config.gate = gate or config.gate
    config.threshold = config.threshold if threshold is None else threshold


@torch.inference_mode()
def run(model, windows, sparse, gates=None, batch_size=64):
    """
    Windows idx, targets (n, T) -> the loss of each token (n, T), whether its prediction was correct (n, T), and the
    gates (L, n, T). If gates are given, they replace the model's own.
    """
    parts = []
    for i, (x, y) in enumerate(zip(*(tokens.split(batch_size) for tokens in windows))):
        given = None if gates is None else gates[:, i * batch_size:(i + 1) * batch_size]
        with replay(model, given):
            logits, used = model(x, sparse)
        parts.append((token_loss(logits, y), logits.argmax(-1) == y, used))
    losses, right, used = zip(*parts)
    return torch.cat(losses), torch.cat(right), torch.cat(used, dim=1)


@torch.inference_mode()
def losses_by_block(model, windows):
    """The mean loss of a halting model after each block, if every token runs it (L values)."""
    total = 0
    for x, y in zip(*(tokens.split(64) for tokens in windows)):
        total = total + torch.stack([token_loss(model.head(model.ln_f(h)), y).sum() for h in model.run_all(x)[0]])
    return (total / (windows[1] >= 0).sum()).tolist()


def permute_tokens(gates):
    """Shuffle gates (L, n, T) between sequences at each position; the L gates of a token stay together."""
    order = torch.rand(gates.shape[1:], device=gates.device).argsort(0)                    # (n, T)
    return gates.gather(1, order.expand_as(gates))


def hops_of(idx):
    """Chains idx (n, T) -> the number of hops from each token to its digit (n, T)."""
    hops = torch.zeros_like(idx)
    for t in range(idx.size(1)):
        place = idx[:, t] - len(data.DIGITS)                                               # (n,), negative for a digit
        follows = place >= 0
        hops[follows, t] = hops[follows, place[follows]] + 1
    return hops


def by_hops(idx, right, gates):
    """
    One row per number of hops: the number of tokens, their accuracy, the number of blocks that suffice, and how many
    tokens ran 1, 2, ... L blocks. A token that is attended to has itself made hops, so l blocks can make up to 2^l - 1.
    """
    hops, depth, rows = hops_of(idx), (gates != 0).sum(0), []
    for h in hops.unique().tolist():
        here = hops == h
        rows.append({"hops": h, "n": here.sum().item(), "accuracy": right[here].float().mean().item(),
                     "suffices": max(1, math.ceil(math.log2(h + 1))),
                     "blocks": torch.bincount(depth[here], minlength=len(gates) + 1)[1:].tolist()})
    return rows


def score(model, windows, is_chain):
    """A row of scores.json, without split, gate and threshold."""
    config, n = model.config, (windows[1] >= 0).sum().item()
    torch.manual_seed(0)        # for permute_tokens
    full, _, gates = run(model, windows, sparse=False)
    sparse, right, used = run(model, windows, sparse=True)
    ran = (used != 0).cpu().double().mean((1, 2)).tolist()
    tlops, macs = savings(config, ran, windows[0].size(1))
    row = {"val_loss": full.sum().item() / n, "val_loss_sparse": sparse.sum().item() / n, "tlops_saved": tlops,
           "macs_saved": macs, "ran": ran, "gates": gates.cpu().double().mean((1, 2)).tolist(),
           "accuracy": right[windows[1] >= 0].cpu().double().mean().item()}
    if config.model == "tsa":
        row["permuted"] = run(model, windows, False, permute_tokens(gates))[0].sum().item() / n
    if config.model != "plain":
        row["permuted_sparse"] = run(model, windows, True, permute_tokens(used))[0].sum().item() / n
    if config.model == "halt":
        row["by_block"] = losses_by_block(model, windows)
    if is_chain:
        row["hops"] = by_hops(windows[0], right, used)
    return row


def draw_histogram(gates, threshold, path):
    """Gates (L, n, T) of a full pass -> a histogram of each gated block, with a line at the smallest open gate."""
    from matplotlib.figure import Figure        # only the figures of report/ need matplotlib
    figure = Figure(figsize=(8, 1.8), layout="constrained")
    for l, axes in enumerate(figure.subplots(1, len(gates) - 1, sharey=True, squeeze=False)[0], 1):
        axes.hist(gates[l].flatten().tolist(), bins=50, range=(0, 1), color="#1f5fbf", histtype="stepfilled")
        axes.axvline(threshold, color="red", linewidth=1)
        axes.set_title(f"block {l}", fontsize=10)
        axes.set(xlim=(-0.02, 1.02), xticks=[0, 0.5, 1], xticklabels=["0", "0.5", "1"], yticks=[])
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.supxlabel("gate", fontsize=10)
    figure.supylabel("tokens", fontsize=10)
    figure.savefig(path, format="svg", metadata={"Date": None})


@one_line()
def main(argv=None):
    parser = Parser(prog="report.depth", description="Score a trained model.")
    parser.add_argument("ckpt", type=Path, help="checkpoint from train.py")
    parser.add_argument("--gate", choices=GATES, help="gate design (default: the checkpoint's)")
    parser.add_argument("--threshold", type=SHARE, nargs="+", help="thresholds (default: the checkpoint's)")
    parser.add_argument("--variant", choices=VARIANTS, help="a change by report.variants (default: the checkpoint's)")
    parser.add_argument("--split", choices=("val", "test"), default="val", help="split to score (default: val)")
    parser.add_argument("--histogram", type=Path, help="draw the gates of a full pass into this svg file instead")
    parser.add_argument("--device", default="auto", help="device to use (default: the best one available)")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    model, saved = load_checkpoint(args.ckpt)
    variant = args.variant or saved["flags"].get("variant", "")
    if variant:
        VARIANTS[variant]()
    set_gate(model.to(device), args.gate, None)
    corpus = data.load(saved["flags"]["data"])
    windows = [tokens.to(device) for tokens in corpus.windows(args.split, model.config.block_size)]
    if args.histogram:
        draw_histogram(run(model, windows, sparse=False)[2], 1 - model.config.threshold, args.histogram)
        return
    path = args.ckpt.parent / "scores.json"
    rows = json.loads(path.read_text("utf-8")) if path.exists() else []
    for threshold in args.threshold or [model.config.threshold]:
        set_gate(model, args.gate, threshold)
        key = {"split": args.split, "gate": args.gate or saved["flags"].get("gate"), "threshold": threshold,
               "variant": variant}
        row = key | {"step": saved["step"]} | score(model, windows, saved["flags"]["data"] == "chain")
        rows = [old for old in rows if any(old[name] != key[name] for name in key)] + [row]
        print(*(f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
                if name not in ("step", "ran", "gates", "by_block", "hops")))
        if "by_block" in row:
            print("  loss after each block:", *(f"{loss:.4f}" for loss in row["by_block"]))
        for line in row.get("hops", []):
            print("  {hops} hops: accuracy {accuracy:.4f}, {suffices} suffice, blocks run {blocks}".format(**line))
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
