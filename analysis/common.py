"""What the analyses share: every surrogate under one name, through the `policy_loss` that the scripts ship."""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import gipo_continuous
import ppo_baseline
from benchmark import variants

# Okabe and Ito's palette, which colour-blind readers can tell apart
STYLES = {
    "gipo": ("GIPO", "#0072B2", "-"),
    "clip": ("PPO-clip", "#D55E00", "--"),
    "dual-clip": ("dual-clip", "#E69F00", ":"),
    "sapo": ("SAPO", "#009E73", "-."),
    "tis": ("TIS", "#CC79A7", (0, (6, 2))),
    "spo": ("SPO", "#56B4E9", (0, (3, 1, 1, 1, 1, 1))),
    "none": ("plain IS", "#000000", (0, (1, 1))),
}

DEFAULTS = {"sigma": gipo_continuous.Args.sigma, "clip_coef": ppo_baseline.Continuous.clip_coef}
DEFAULTS |= {flag: default for flag, (default, *_) in variants.FLAGS.items()}
OWN = {"gipo": gipo_continuous.policy_loss, "clip": ppo_baseline.policy_loss}


def loss(method: str, **flags):
    """policy_loss(logratio, advantages) of "gipo", "clip" or one of the variants' losses, its flags bound."""
    args = SimpleNamespace(**DEFAULTS | flags)
    args.sigma_neg = flags.get("sigma_neg") or args.sigma
    return partial(OWN[method] if method in OWN else variants.LOSSES[method][0], args=args)


def coefficients(policy_loss, logratio, advantages) -> np.ndarray:
    """Each sample's c, where autograd finds the gradient of the loss to be -c A grad log pi / n.

    logratio (n,); advantages (n,) or a number, not 0. In float64.
    """
    logratio = torch.as_tensor(logratio, dtype=torch.float64).clone().requires_grad_()
    advantages = torch.as_tensor(advantages, dtype=torch.float64).expand_as(logratio)
    policy_loss(logratio, advantages)[0].backward()
    return (-logratio.grad * len(logratio) / advantages).numpy()


def make_folder(path: Path) -> Path:
    """Create a folder for results; a path that cannot be one ends the program with one sentence and 2."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"error: --out {path}: give a folder that can be written ({error.strerror}).", file=sys.stderr)
        sys.exit(2)
    return path
