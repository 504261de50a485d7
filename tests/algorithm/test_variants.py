"""The scripts under benchmark/ are the baseline with one change each, and nothing else."""

import subprocess
import sys

import pytest
import torch
from harness import ROOT, load, run
from test_contract import definitions

from benchmark.with_kl import add_kl

SMALL = "--env-id Hopper-v5 --num-envs 2 --num-steps 32 --num-minibatches 2 --update-epochs 2".split()


@pytest.mark.parametrize("name, changed", [("ppo_decoupled", "minibatch_loss"), ("ppo_scaled_rate", "Args")])
def test_the_diff_to_the_baseline(name, changed):
    files = [ROOT / "ppo_baseline.py", ROOT / "benchmark" / f"{name}.py"]
    diff = subprocess.run(["diff", *files], capture_output=True, text=True).stdout
    added = [line for line in diff.splitlines() if line.startswith(">")]
    assert 0 < len(added) <= 20, diff
    own, other = definitions(f"benchmark/{name}"), definitions("ppo_baseline")
    assert {key for key in own.keys() | other.keys() if own.get(key) != other.get(key)} == {changed}


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


def test_the_term_of_the_authors_pulls_every_sample_alike():
    script = load("gipo_continuous")
    args, advantages = script.ContinuousArgs(), torch.tensor([1.0, -2.0, 0.5])
    logratio = torch.tensor([0.3, -100.0, 100.0], requires_grad=True)
    alone = torch.autograd.grad(script.policy_loss(logratio, advantages, args)[0], logratio)[0]
    coef = script.policy_loss(logratio, advantages, args)[1]
    loss, logged = add_kl(script).policy_loss(logratio, advantages, args)
    torch.testing.assert_close(torch.autograd.grad(loss, logratio)[0], alone - 0.1 / 3)
    assert torch.equal(logged, coef) and loss.isfinite()


@pytest.mark.parametrize("argv", [["gipo_continuous.py"], ["ppo_baseline.py", "continuous"]])
def test_a_script_runs_with_that_term_and_resumes(argv, tmp_path):
    start = [sys.executable, str(ROOT / "benchmark" / "with_kl.py"), *argv]
    flags = [*SMALL, "--total-timesteps", "192", "--eval-episodes", "0"]
    subprocess.run([*start, *flags], cwd=tmp_path, check=True, capture_output=True)
    (folder,) = (tmp_path / "runs").iterdir()
    subprocess.run([*start, "--resume", str(folder)], cwd=tmp_path, check=True, capture_output=True)


def test_the_actor_s_rate_is_scaled_by_the_mean_weight_and_the_critic_s_is_not(monkeypatch, tmp_path):
    module = load("benchmark/ppo_scaled_rate")
    weights, rates = [], []
    minibatch_loss, step = module.minibatch_loss, torch.optim.Adam.step

    def spy_loss(*args):
        found = minibatch_loss(*args)
        weights.append(torch.exp(-0.5 * (found[2] / 0.01) ** 2).mean().item())
        return found

    def spy_step(self, *args):
        rates.append([(group["lr"], [p.shape for p in group["params"]]) for group in self.param_groups])
        return step(self, *args)

    module.minibatch_loss = spy_loss
    monkeypatch.setattr(torch.optim.Adam, "step", spy_step)
    argv = ["continuous", *SMALL, "--total-timesteps", 6 * 64, "--buffer-epochs", 3, "--sigma", 0.01]
    end = run(module, monkeypatch, tmp_path, argv)
    assert len(rates) == 6 * 4 and min(weights) < 0.7
    for i, ((critic, shapes), (actor, others)) in enumerate(rates):
        assert critic == pytest.approx(3e-4 * (1 - i // 4 / 6))  # annealing goes on
        assert actor == pytest.approx(critic * weights[i])
        assert shapes == [p.shape for p in end.agent.critic.parameters()]
        assert len(shapes) + len(others) == len(list(end.agent.parameters()))
    assert end.args.surrogate == "none"
