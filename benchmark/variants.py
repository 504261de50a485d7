"""The methods that GIPO is compared with, each as the few lines in which it differs from PPO-clip.

    python benchmark/variants.py sapo ppo_baseline.py continuous --sapo-tau 1 --buffer-epochs 8
    python benchmark/variants.py decoupled ppo_baseline.py atari --tis-cap 2

The script is loaded as a module. The variant puts its loss and its flags into that module, and then the script's body
runs. So --help, --resume, --evaluate and bad input work as in the script itself.
"""

import math
import sys
from dataclasses import field, make_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmark.scripts import ROOT, load, run_body


def exp(logratio):
    """The importance ratio. Its value stops at exp(20), because float32 ends at exp(88); its gradient does not stop."""
    return torch.exp(logratio - (logratio - 20).clamp(min=0).detach())


# Policy losses; `policy_loss` of the scripts says what goes in and what comes out.
def plain(logratio, advantages, args):
    """Plain importance sampling."""
    ratio = exp(logratio)
    return -(ratio * advantages).mean(), ratio.detach()


def dual_clip(logratio, advantages, args):
    """PPO-clip without a gradient beyond a ratio of `dual_clip` where A < 0 (Ye et al. 2020)."""
    ratio, low, high = exp(logratio), 1 - args.clip_coef, 1 + args.clip_coef
    objective = torch.min(ratio * advantages, ratio.clamp(low, high) * advantages)
    objective = torch.where(advantages > 0, objective, torch.max(objective, args.dual_clip * advantages))
    inside = torch.where(advantages > 0, ratio <= high, (ratio >= low) & (ratio <= args.dual_clip))
    return -objective.mean(), (ratio * inside).detach()


def sapo(logratio, advantages, args):
    """A sigmoid gate around a ratio of 1 (Gao et al. 2025)."""
    ratio = exp(logratio)
    tau = torch.full_like(ratio, args.sapo_tau_neg).masked_fill(advantages > 0, args.sapo_tau)
    gate = torch.sigmoid(tau * (ratio - 1))
    return -(4 / tau * gate * advantages).mean(), (ratio * 4 * gate * (1 - gate)).detach()


def tis(logratio, advantages, args):
    """Truncated importance sampling: the ratio is cut off at `tis_cap` and detached (Ionides 2008)."""
    coef = exp(logratio).detach().clamp(max=args.tis_cap)
    return -(coef * advantages * logratio).mean(), coef


def spo(logratio, advantages, args):
    """A quadratic penalty on the ratio (Xie et al. 2024)."""
    ratio = exp(logratio)
    objective = ratio * advantages - advantages.abs() * (ratio - 1) ** 2 / (2 * args.spo_eps)
    return -objective.mean(), (ratio * (1 - advantages.sign() * (ratio - 1) / args.spo_eps)).detach()


def decouple(script: ModuleType):
    """Decoupled PPO (Hilton et al. 2022): the clip holds pi near the policy that the update starts from.

    The ratio of that policy to mu, at most `tis_cap`, corrects for the age of the data.
    """
    minibatch_loss, clip = script.minibatch_loss, script.policy_loss

    def decoupled_loss(agent, obs, actions, logprobs, advantages, returns, args):
        proximal = script.actors[script.iteration % len(script.actors)]
        with torch.no_grad():
            drift = proximal.get_action_and_value(obs, actions)[1] - logprobs

        def policy_loss(logratio, advantages, args):
            weight = drift.clamp(max=math.log(args.tis_cap)).exp()
            loss, coef = clip(logratio - drift, weight * advantages, args)
            return loss, weight * coef

        script.policy_loss = policy_loss
        return minibatch_loss(agent, obs, actions, logprobs, advantages, returns, args)

    script.minibatch_loss = decoupled_loss


# default, smallest and largest value, meaning and usual range
FLAGS = {
    "dual_clip": (3.0, 1.001, 1e9, "ratio above which a negative advantage gets no gradient (2 to 5)"),
    "sapo_tau": (1.0, 1e-9, 1e9, "temperature of the gate where the advantage is positive (0.5 to 2)"),
    "sapo_tau_neg": (1.05, 1e-9, 1e9, "temperature of the gate where the advantage is not positive (0.5 to 2)"),
    "tis_cap": (1.0, 1e-9, 1e9, "largest importance weight (1 to 5)"),
    "spo_eps": (0.2, 1e-9, 1e9, "distance of the ratio from 1 at which the gradient turns back (0.1 to 0.3)"),
}
# policy loss and flags
LOSSES = {
    "none": (plain,),
    "dual-clip": (dual_clip, "dual_clip"),
    "sapo": (sapo, "sapo_tau", "sapo_tau_neg"),
    "tis": (tis, "tis_cap"),
    "spo": (spo, "spo_eps"),
}
# function that changes a loaded script, and flags
PATCHES = {"decoupled": (decouple, "tis_cap")}
VARIANTS = LOSSES | PATCHES


def load_variant(name: str, script: str = "ppo_baseline") -> ModuleType:
    """A script as a module, changed to a variant; its body has not run. Raises `KeyError` for an unknown variant."""
    module, (change, *flags) = load(script), VARIANTS[name]
    mark = f"variant_{name.replace('-', '_')}"  # a field that keeps a checkpoint from being resumed as another method
    fields = [(mark, tyro.conf.Suppress[bool], field(default=True))]
    fields.append(("exp_name", str, field(default=f"{script}-{name}")))
    for flag in flags:
        default, low, high, meaning = FLAGS[flag]
        fields.append((flag, Annotated[float, tyro.conf.arg(help=meaning)], field(default=default)))
        module.RANGES += ((low, high, flag),)
    module.DOMAINS = {
        make_dataclass(cls.__name__, fields, bases=(cls,), namespace={"__doc__": cls.__doc__}): parts
        for cls, parts in module.DOMAINS.items()
    }
    module.__doc__ = f"{change.__doc__.splitlines()[0]} It replaces PPO-clip in {script}.py."

    def replace_same(args, **saved):
        if mark not in saved:
            raise TypeError("it is of another method")
        return replace(args, **saved)

    module.replace = replace_same
    if name in PATCHES:
        change(module)
    else:
        module.policy_loss = change
    return module


if __name__ == "__main__":
    known = len(sys.argv) > 2 and sys.argv[1] in VARIANTS and (ROOT / f"{Path(sys.argv[2]).stem}.py").is_file()
    if not known:
        print(f"error: give a variant ({', '.join(VARIANTS)}), a script and its flags.", file=sys.stderr)
        sys.exit(2)
    name, script = sys.argv.pop(1), sys.argv.pop(1)
    run_body(load_variant(name, Path(script).stem))
