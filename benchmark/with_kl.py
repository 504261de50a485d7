"""A script with the term that the method's authors add to every loss: 0.1 KL(mu || pi), mu the policy that collected.

    python benchmark/with_kl.py gipo_continuous.py --buffer-epochs 8
    python benchmark/with_kl.py ppo_baseline.py continuous --buffer-epochs 8

The divergence is the mean of -log r over samples of mu, joint over action dimensions; its gradient raises the
likelihood of what was done, whatever the advantage. Everything else is the script's own, and so is the coefficient that
is logged.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmark.scripts import load, run_body

KL_COEF = 0.1


def add_kl(script):
    """Replaces `policy_loss` of a loaded script by its sum with the term."""
    policy_loss = script.policy_loss

    def with_kl(logratio, advantages, args):
        loss, coef = policy_loss(logratio, advantages, args)
        return loss - KL_COEF * logratio.mean(), coef

    script.policy_loss = with_kl
    return script


if __name__ == "__main__":
    name = sys.argv.pop(1)
    run_body(add_kl(load(Path(name).stem)))
