"""Decoupled PPO is the baseline with a third policy, and nothing else."""

import subprocess

import pytest
import torch
from harness import ROOT, load, run
from test_contract import definitions

SMALL = "--env-id Hopper-v5 --num-envs 2 --num-steps 32 --num-minibatches 2 --update-epochs 2".split()


def test_the_diff_to_the_baseline():
    files = [ROOT / "ppo_baseline.py", ROOT / "benchmark" / "ppo_decoupled.py"]
    diff = subprocess.run(["diff", *files], capture_output=True, text=True).stdout
    added = [line for line in diff.splitlines() if line.startswith(">")]
    assert 0 < len(added) <= 20, diff
    own, other = definitions("benchmark/ppo_decoupled"), definitions("ppo_baseline")
    assert {key for key in own.keys() | other.keys() if own.get(key) != other.get(key)} == {"minibatch_loss"}


def test_coefficient_is_the_weight_times_the_clip_s():
    module = load("benchmark/ppo_decoupled")
    args = module.ContinuousArgs(norm_adv=False, tis_cap=2.0)
    # log-probabilities under mu, the proximal policy and the learner
    mu = torch.tensor([0.0, 0.0, 0.0, 0.0])
    proximal = torch.tensor([0.5, 3.0, -1.0, 0.5]).log()
    new = torch.tensor([0.55, 3.3, -0.9, 0.75]).log()
    proximal[2], new[2] = -50.0, -50.1
    new.requires_grad_()

    class Agent:
        def get_action_and_value(self, obs, actions):
            return actions, new, torch.zeros(4), torch.zeros(4)

    loss, *_, coef = module.minibatch_loss(Agent(), None, None, mu, torch.ones(4), torch.zeros(4), proximal, args)
    # inside the clip; weight at the cap of 2; far from mu; outside the clip
    expected = torch.tensor([0.5 * 1.1, 2 * 1.1, torch.tensor(-50.1).exp().item(), 0.0])
    torch.testing.assert_close(coef, expected)
    loss.backward()
    torch.testing.assert_close(new.grad, -expected / 4)


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_proximal_policy_is_the_one_that_an_update_starts_from(epochs, monkeypatch, tmp_path):
    module = load("benchmark/ppo_decoupled")
    largest = []
    policy_loss = module.policy_loss

    def spy(logratio, *rest):
        largest.append(logratio.detach().abs().max().item())
        return policy_loss(logratio, *rest)

    module.policy_loss = spy
    argv = ["continuous", *SMALL, "--total-timesteps", 6 * 64, "--buffer-epochs", epochs]
    end = run(module, monkeypatch, tmp_path, argv)
    assert (end.buffer.versions >= 0).sum() == epochs
    assert max(largest[::4]) < 1e-5 and min(largest[1::4]) > 1e-4
