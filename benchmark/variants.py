"""The methods that GIPO is compared with: ppo_baseline.py in continuous control with another policy loss.

    python benchmark/variants.py --method sapo --sapo-tau 1 --buffer-epochs 8

A new method is a function here, its name in METHODS, and a line in `Variant` for each flag that it needs. --help,
--resume and --evaluate work as in the script itself.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import gipo_continuous
import ppo_baseline


# Policy losses; `policy_loss` of the scripts says what goes in and what comes out.
def exp(logratio):
    """The importance ratio, capped because float32 ends at exp(88)."""
    return torch.exp(logratio.clamp(max=20))


def by_sign(advantages, positive, otherwise):
    """`positive` where the advantage is positive, `otherwise` elsewhere; of the advantages' type."""
    return torch.full_like(advantages, otherwise).masked_fill(advantages > 0, positive)


def gipo(logratio, advantages, args):
    """GIPO, as in gipo_continuous.py (Lu et al. 2026)."""
    return gipo_continuous.policy_loss(logratio, advantages, args)


def asymmetric(logratio, advantages, args):
    """GIPO with a width of its own where the advantage is not positive (Lu et al. 2026)."""
    z = (logratio / by_sign(advantages, args.sigma, args.sigma_neg)).detach()
    return -(torch.exp(logratio - 0.5 * z**2) * advantages).sum(1).mean()


def one_sided(logratio, advantages, args):
    """GIPO that fades a sample only where its ratio is above 1."""
    z = (logratio.clamp(min=0) / args.sigma).detach()
    return -(torch.exp(logratio - 0.5 * z**2) * advantages).sum(1).mean()


def clip(logratio, advantages, args):
    """PPO-clip, as in ppo_baseline.py (Schulman et al. 2017)."""
    return OWN_LOSS(logratio, advantages, args)


def dual_clip(logratio, advantages, args):
    """PPO-clip whose objective for a negative advantage is at least --dual-clip times it (Ye et al. 2020)."""
    ratio = exp(logratio)
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    objective = torch.min(ratio * advantages, clipped * advantages)
    bounded = torch.max(objective, args.dual_clip * advantages)
    return -torch.where(advantages > 0, objective, bounded).sum(1).mean()


def decoupled(logratio, advantages, args):
    """Decoupled PPO (Hilton et al. 2022): the clip holds pi near the policy that the iteration starts from.

    The ratio of that policy to mu, at most --tis-cap, corrects for the age of the data.
    """
    drift = DRIFTS[-1] if len(DRIFTS[-1]) == len(logratio) else torch.cat(DRIFTS)  # diagnostics see all minibatches
    weight = drift.clamp(max=math.log(args.tis_cap)).exp()
    return OWN_LOSS(logratio - drift, weight * advantages, args)


def sapo(logratio, advantages, args):
    """A sigmoid gate around a ratio of 1 (Gao et al. 2025)."""
    tau = by_sign(advantages, args.sapo_tau, args.sapo_tau_neg)
    gate = torch.sigmoid(tau * (exp(logratio) - 1))
    return -(4 / tau * gate * advantages).sum(1).mean()


def spo(logratio, advantages, args):
    """A quadratic penalty on the ratio (Xie et al. 2024)."""
    ratio = exp(logratio)
    penalty = advantages.abs() * (ratio - 1) ** 2 / (2 * args.spo_eps)
    return -(ratio * advantages - penalty).sum(1).mean()


def tis(logratio, advantages, args):
    """Truncated importance sampling: the ratio is cut off at --tis-cap and detached (Ionides 2008)."""
    weight = exp(logratio).detach().clamp(max=args.tis_cap)
    return -(weight * advantages * logratio).sum(1).mean()


def plain_is(logratio, advantages, args):
    """Plain importance sampling."""
    return -(exp(logratio) * advantages).sum(1).mean()


METHODS = (gipo, asymmetric, one_sided, clip, dual_clip, decoupled, sapo, spo, tis, plain_is)
LOSSES = {method.__name__: method for method in METHODS}
OWN_LOSS, OWN_UPDATE, OWN_DIAGNOSTICS = ppo_baseline.policy_loss, ppo_baseline.update, ppo_baseline.diagnostics
DRIFTS = []  # of each minibatch of an iteration, for decoupled alone: log pi_start - log mu, (B, D)


@dataclass
class Variant(ppo_baseline.Continuous):
    """Continuous control with the loss of another method."""

    exp_name: str = "variants"
    method: Literal[*LOSSES] = "gipo"
    """policy loss"""
    clip_coef: float = 0.2
    kl_coef: float = 0.0
    sigma: float = 0.5
    """gipo, asymmetric, one_sided: width of the Gaussian weight on the log-ratio (0.2 to 2)"""
    sigma_neg: float = 0.25
    """asymmetric: width where the advantage is not positive (0.1 to 2)"""
    dual_clip: float = 3.0
    """dual_clip: ratio above which a negative advantage gets no gradient (2 to 5)"""
    sapo_tau: float = 1.0
    """sapo: temperature of the gate where the advantage is positive (0.5 to 2)"""
    sapo_tau_neg: float = 1.05
    """sapo: temperature of the gate where the advantage is not positive (0.5 to 2)"""
    spo_eps: float = 0.2
    """spo: distance of the ratio from 1 at which the gradient turns back (0.1 to 0.3)"""
    tis_cap: float = 1.0
    """tis, decoupled: largest importance weight (1 to 5)"""


def policy_loss(logratio, advantages, args):
    return LOSSES[args.method](logratio, advantages, args)


def update(agent, optimizer, obs, actions, logprobs, start_logprobs, advantages, returns, args):
    if args.method == "decoupled":
        DRIFTS.append(start_logprobs - logprobs)
    return OWN_UPDATE(agent, optimizer, obs, actions, logprobs, start_logprobs, advantages, returns, args)


def diagnostics(logratio, advantages, args):
    found = OWN_DIAGNOSTICS(logratio, advantages, args)
    DRIFTS.clear()
    return found


def main():
    """The command line of ppo_baseline.py with these losses; returns the exit code."""
    ppo_baseline.policy_loss, ppo_baseline.update, ppo_baseline.diagnostics = policy_loss, update, diagnostics
    ppo_baseline.Domain = Variant
    return ppo_baseline.main()


if __name__ == "__main__":
    sys.exit(main())
