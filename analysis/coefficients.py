"""What the analyses share: every method's gradient coefficient, from the `policy_loss` that is trained with."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmark import variants


def loss(method: str, **flags):
    """The loss of a method with these flags, as a function of logratio (n, 1) and advantages (n, 1)."""
    return partial(variants.LOSSES[method], args=variants.Variant(**flags))


def coefficients(policy_loss, logratio, advantages) -> np.ndarray:
    """Each sample's c, where autograd finds the gradient of the loss to be -c A grad log pi / n.

    logratio (n,); advantages (n,) or a number, not 0. In float64.
    """
    logratio = torch.as_tensor(logratio, dtype=torch.float64).reshape(-1, 1).clone().requires_grad_()
    advantages = torch.as_tensor(advantages, dtype=torch.float64).reshape(-1, 1).expand_as(logratio)
    (gradient,) = torch.autograd.grad(policy_loss(logratio, advantages), logratio)
    return (-gradient * len(logratio) / advantages).squeeze(1).numpy()


def make_folder(path: Path) -> Path:
    """Create a folder for results; a path that cannot be one ends the program with one sentence and 2."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"error: --out {path}: give a folder that can be written ({error.strerror}).", file=sys.stderr)
        sys.exit(2)
    return path
