"""
Score a trained model in more detail than train.py does:

    python -m report.depth out/tsa-soft/ckpt.pt --gate skip --threshold 0.9

For each threshold, score the whole split as trained and as executed: both losses, both savings, the accuracy, and the
loss with permuted gates (each token gets the gates of the token at the same position in another sequence). If that loss
hardly differs, it hardly matters which token gets which gates. For chains, also report accuracy and mean depth by
number of hops. The rows are added to scores.json next to the checkpoint.
"""
import argparse
import contextlib
import json
import math
import sys
from pathlib import Path

import torch

import data
from train import load_checkpoint, pick_device, save, write_json
from tsa import GATES, macs_saved, tlops_saved, token_loss


@contextlib.contextmanager
def replay(model, gates):
    """Let block l run with gates[l] (B, T). The model's own gates are still computed, so that the cost is the same."""
    own = model.next_gate

    def next_gate(l, x, gate, mode):
        own(l, x, gate, mode)
        return gates[l]

    model.next_gate = next_gate
    yield
    del model.next_gate


@torch.inference_mode()
def run(model, windows, mode, gates=None, batch_size=64):
    """
    Windows idx, targets (n, T) -> the loss of each token (n, T), whether its prediction was correct (n, T), and the
    gates (L, n, T). If gates are given, they replace the model's own.
    """
    parts = []
    for i, (x, y) in enumerate(zip(*(tokens.split(batch_size) for tokens in windows))):
        given = None if gates is None else gates[:, i * batch_size:(i + 1) * batch_size]
        with contextlib.nullcontext() if given is None else replay(model, given):
            logits, used = model(x, mode)
        parts.append((token_loss(logits, y), logits.argmax(-1) == y, used))
    losses, right, used = zip(*parts)
    return torch.cat(losses), torch.cat(right), torch.cat(used, dim=1)


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
    One row per number of hops: the number of tokens, their accuracy, the mean number of blocks they ran, the number
    that suffices, how many tokens ran fewer, and how many of those were correct. A token that is attended to has itself
    made hops, so l blocks can make up to 2^l - 1 hops.
    """
    hops, used, rows = hops_of(idx), gates.sum(0), []
    for h in hops.unique().tolist():
        here, needed = hops == h, max(1, math.ceil(math.log2(h + 1)))
        early = here & (used < needed)
        rows.append({"hops": h, "n": here.sum().item(), "accuracy": right[here].float().mean().item(),
                     "used": used[here].mean().item(), "needed": needed,
                     "early": early.sum().item(), "early_right": right[early].sum().item()})
    return rows


def score(model, windows, is_chain):
    """A row of scores.json, without split, gate and threshold."""
    config, n = model.config, (windows[1] >= 0).sum().item()
    torch.manual_seed(0)        # for permute_tokens
    trained, _, gates = run(model, windows, "trained")
    executed, right, used = run(model, windows, "executed")
    ran = (used != 0).double().mean((1, 2)).tolist()
    row = {"val_loss": trained.sum().item() / n,
           "val_loss_executed": executed.sum().item() / n, "accuracy": right[windows[1] >= 0].double().mean().item(),
           "tlops_saved": tlops_saved(ran), "macs_saved": macs_saved(config, ran, windows[0].size(1)), "ran": ran}
    if config.model == "tsa":
        row["permuted"] = run(model, windows, "trained", permute_tokens(gates))[0].sum().item() / n
        row["histogram"] = [(gate.histc(10, 0, 1) / gate.numel()).tolist() for gate in gates]     # 10 bins per block
    if config.model != "dense":
        shuffled = permute_tokens(used)
        if config.model != "tsa":
            shuffled = shuffled != 0        # exit and halt combine switches, which the model returns as floats
        row["permuted_executed"] = run(model, windows, "executed", shuffled)[0].sum().item() / n
    if is_chain:
        row["hops"] = by_hops(windows[0], right, (used != 0).float())
    return row


def main(argv=None):
    parser = argparse.ArgumentParser(prog="report.depth", description="Score a trained model.")
    parser.add_argument("ckpt", type=Path, help="checkpoint from train.py")
    parser.add_argument("--gate", choices=GATES, help="gate design (default: the checkpoint's)")
    parser.add_argument("--threshold", type=float, nargs="+", help="thresholds (default: the checkpoint's)")
    parser.add_argument("--split", choices=("val", "test"), default="val", help="split to score (default: val)")
    parser.add_argument("--device", default="auto", help="device to use (default: the best one available)")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    model, saved = load_checkpoint(args.ckpt, device)
    if args.gate and model.config.model != "tsa":
        sys.exit(f"--gate does not apply to {args.ckpt}, a {model.config.model} model")
    model.config.gate = args.gate or model.config.gate
    corpus = data.load(saved["flags"]["data"])
    windows = [tokens.to(device) for tokens in corpus.windows(args.split, model.config.block_size)]
    path = args.ckpt.parent / "scores.json"
    rows = json.loads(path.read_text("utf-8")) if path.exists() else []
    for threshold in args.threshold or [saved["flags"]["threshold"]]:
        model.config.threshold = threshold
        row = {"split": args.split, "gate": args.gate or saved["flags"]["gate"], "threshold": threshold}
        row |= score(model, windows, saved["flags"]["data"] == "chain")
        rows = [old for old in rows if any(old[key] != row[key] for key in ("split", "gate", "threshold"))] + [row]
        print(*(f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
                if key not in ("ran", "hops", "histogram")))
        for line in row.get("hops", []):
            print("  {hops} hops: accuracy {accuracy:.4f}, {used:.2f} blocks used, {needed} suffice; {early} of {n} "
                  "used fewer, {early_right} of these correctly".format(**line))
    save(path, rows, write_json)


if __name__ == "__main__":
    main()
