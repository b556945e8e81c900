"""
Train a modified model, as for many rows of report/README.md:

    python -m report.variants straight --data chain --lam 0.01      # a gate design; train.py's flags follow
    python -m report.variants exit-heavy                            # another change
    python -m report.variants straight --init_from out/tsa-1/ckpt.pt --max_iters 400 --learning_rate 5e-4

--init_from starts from the weights of a checkpoint. To continue a run, use `python -m report.variants NAME --resume
DIR`. Importing this file only adds the gate designs.
"""
import functools

import torch

import train
from data import UserError
from tsa import GATES, Exit, Halt, Router, binary, skip, soft, token_loss


# ----------------------------------------------------------------------------------------------------------------
# Gate designs for training (README.md, "Your own gate")

def straight(p, threshold):
    """A switch in the forward pass, with the scale's gradient in the backward pass."""
    scale = 1 - p
    return binary(p, threshold) + (scale - scale.detach())      # the difference is 0 in the forward pass

# Inference gates that take thresholding apart: only rounding gates up, only closing gates, or running every block.

def round_up(p, threshold):
    return torch.where(p <= threshold, 1, 1 - p)

def ones(p, threshold):
    return torch.ones_like(p)

GATES |= {"straight": (straight, binary), "round-up": (soft, round_up), "close": (soft, skip), "ones": (soft, ones)}


# ----------------------------------------------------------------------------------------------------------------
# Other changes

def constant():
    """A gate per block that is learned, but the same for all tokens. Its savings still count the router's products."""
    Router.logit = lambda self, x: self.out.bias.float().expand(x.shape[:-1])


def shares(halt, every, last):
    Halt.HALT_SHARE, Halt.EVERY_SHARE, Halt.LAST_SHARE = halt, every, last


def exit_nofloor():
    """A token may exit after block 0. Only inference changes."""
    Exit.FIRST = 0


def exit_heavy():
    """The last block has 75% of the loss weight, as in Halt, instead of 1/L."""
    def loss(self, idx, targets):
        x, total, L = self.embed(idx), 0, len(self.blocks)
        for l, (block, norm) in enumerate(zip(self.blocks, [*self.exit_norms, self.ln_f])):
            x = block(x)
            weight = 0.75 if l == L - 1 else 0.25 / (L - 1)
            total = total + weight * token_loss(self.head(norm(x)), targets).sum()
        return total / (targets >= 0).sum(), torch.ones(L, *idx.shape, device=idx.device)
    Exit.loss = loss


def same():
    """No change, for --init_from with a model that has no gate."""


VARIANTS = {"same": same, "constant": constant, "shares.4": functools.partial(shares, 0.4, 0.1, 0.5),
            "shares.1": functools.partial(shares, 0.1, 0.03, 0.87), "exit-nofloor": exit_nofloor,
            "exit-heavy": exit_heavy}
MODEL_OF = {"shares.4": "halt", "shares.1": "halt", "exit-nofloor": "exit", "exit-heavy": "exit"}      # elsewhere tsa


@train.one_line()
def main(argv=None):
    parser = train.Parser(prog="report.variants", description="Train a modified model.", allow_abbrev=False)
    parser.add_argument("name", choices=[*GATES, *VARIANTS], help="gate design or other change")
    parser.add_argument("--init_from", help="checkpoint whose weights the run starts from")
    args, flags = parser.parse_known_args(argv)
    resumes = any(flag.startswith("--resume") for flag in flags)
    if args.name in VARIANTS:
        VARIANTS[args.name]()
        train.FLAGS["variant"] = args.name, VARIANTS, "the change"         # stored in the checkpoint and in result.json
    elif not resumes:
        flags += ["--gate", args.name]
    if not resumes:
        flags = ["--model", MODEL_OF.get(args.name, "tsa"), *flags]
    if args.init_from and not resumes:
        start, make_optimizer = train.load_checkpoint(args.init_from)[0], train.make_optimizer

        def started(model):
            try:
                model.load_state_dict(start.state_dict())
            except RuntimeError:
                raise UserError(f"--init_from {args.init_from} has other sizes: {start.config}") from None
            return make_optimizer(model)
        train.make_optimizer = started
    train.main(flags)


if __name__ == "__main__":
    main()
