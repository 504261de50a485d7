"""compute_gae by hand, time limits bootstrapped, and rows that are no transitions never learned from."""

import types

import numpy as np
import pytest
import torch
from harness import load, run
from hypothesis import given
from hypothesis import strategies as st

script = load("gipo_continuous")


def test_gae_by_hand():
    # one environment: a step, a death, the autoreset row, a truncation, the autoreset row, a step
    rewards = torch.tensor([[1.0], [2.0], [0.0], [3.0], [0.0], [4.0]])
    values = torch.tensor([[10.0], [20.0], [30.0], [40.0], [50.0], [60.0], [70.0]])
    terminated = torch.tensor([[False], [True], [False], [False], [False], [False]])
    dones = torch.tensor([[False], [True], [False], [True], [False], [False]])
    ratios = torch.ones_like(values)
    advantages, returns = script.compute_gae(rewards, values, ratios, terminated, dones, gamma=0.9, gae_lambda=0.5)
    last = 4 + 0.9 * 70 - 60
    truncation = 3 + 0.9 * 50 - 40  # bootstraps from the final observation, one row below
    death = 2 - 20  # worth its reward alone
    first = 1 + 0.9 * 20 - 10 + 0.45 * death
    found = advantages.squeeze(1)
    assert found[[0, 1, 3, 5]].tolist() == pytest.approx([first, death, truncation, last])
    torch.testing.assert_close(returns, advantages + values[:-1])


@pytest.mark.parametrize(
    ("end", "expected", "targets"),
    [
        ("none", [1.300496, 1.2236, 1.88], [1.800496, 1.0118, 2.18]),
        ("terminated", [0.716, -0.4, 1.88], [1.216, 0.2, 2.18]),
        ("truncated", [0.8132, -0.13, 1.88], [1.3132, 0.335, 2.18]),
    ],
)
def test_vtrace_by_hand(end, expected, targets):
    rewards, values = torch.tensor([[1.0], [0.0], [2.0]]), torch.tensor([[0.5], [0.4], [0.3], [0.2]])
    ratios = torch.tensor([[2.0], [0.5], [1.5], [0.7]]).clamp(max=1)  # that of the last row plays no part
    ended = torch.tensor([[False], [True], [False]])
    terminated, dones = ended & (end == "terminated"), ended & (end != "none")
    advantages, returns = script.compute_gae(rewards, values, ratios, terminated, dones, gamma=0.9, gae_lambda=0.8)
    assert advantages.flatten().tolist() == pytest.approx(expected, abs=1e-6)
    assert returns.flatten().tolist() == pytest.approx(targets, abs=1e-6)


@given(st.integers(0, 2**32 - 1))
def test_gae_of_a_stack_of_rollouts_is_that_of_each(seed):
    rng = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(3, 7, 2, generator=rng), torch.randn(3, 8, 2, generator=rng)
    ratios = torch.rand(3, 8, 2, generator=rng)
    dones = torch.rand(3, 7, 2, generator=rng) < 0.3
    terminated = dones & (torch.rand(3, 7, 2, generator=rng) < 0.5)
    stacked = script.compute_gae(rewards, values, ratios, terminated, dones, 0.99, 0.95)
    for k in range(3):
        single = script.compute_gae(rewards[k], values[k], ratios[k], terminated[k], dones[k], 0.99, 0.95)
        torch.testing.assert_close((stacked[0][k], stacked[1][k]), single)


def test_lambda_one_is_the_discounted_sum():
    rewards, values = torch.ones(50, 1), torch.zeros(51, 1)
    no = torch.zeros(50, 1, dtype=torch.bool)
    _, returns = script.compute_gae(rewards, values, torch.ones(51, 1), no, no, gamma=0.9, gae_lambda=1.0)
    assert returns[0].item() == pytest.approx((1 - 0.9**50) / 0.1)


def test_value_of_an_endless_reward(monkeypatch, tmp_path):
    """Without a bootstrap at the time limit of 20 steps the value would be about half."""
    argv = "--env-id probes:Endless-v0 --gamma 0.9 --num-steps 64 --num-minibatches 2 --total-timesteps 15360".split()
    end = run(load("gipo_continuous"), monkeypatch, tmp_path, [*argv, "--learning-rate", "1e-2"])
    value = end.agent.get_action_and_value(torch.zeros(1, 1))[3].item()
    reward = end.agent.scale_rewards(torch.ones(1)).item()
    assert value / reward == pytest.approx(1 / (1 - 0.9), rel=0.01)


def test_rows_are_transitions_of_one_episode(monkeypatch, tmp_path):
    """Clock observes (episode, step) and pays the step, so that each valid row can be checked against its next."""
    argv = "--env-id probes:Clock-v0 --num-envs 3 --num-steps 16 --num-minibatches 4 --total-timesteps 240".split()
    buffer = run(load("gipo_continuous"), monkeypatch, tmp_path, [*argv, "--buffer-epochs", 2]).buffer
    obs, next_obs = buffer.obs[:, :-1], buffer.obs[:, 1:]
    valid, dones, terminated = (t[:, :-1] for t in (buffer.valid, buffer.dones, buffer.terminated))
    assert torch.equal(next_obs[valid][:, 0], obs[valid][:, 0])  # same episode
    assert torch.equal(next_obs[valid][:, 1], obs[valid][:, 1] + 1)  # next step
    assert torch.equal(buffer.rewards[:, :-1][valid], obs[valid][:, 1])
    assert torch.equal(dones, next_obs[..., 1] == 5)  # five steps long, final observation included
    assert torch.equal(terminated, dones & (next_obs[..., 0] % 2 == 1))  # every other one is a time limit
    assert torch.equal(valid, obs[..., 1] < 5)  # the row that starts with a final observation is no transition
    assert (~valid).sum() > 10
    assert not buffer.valid[:, -1].any()


@given(st.data())
def test_samples_are_valid_and_even(data):
    shape = (data.draw(st.integers(1, 4)), data.draw(st.integers(3, 6)), data.draw(st.integers(1, 3)))
    mask = data.draw(st.lists(st.booleans(), min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
    valid = torch.tensor(mask).view(shape)
    valid[0, 0, 0] = True
    n = data.draw(st.integers(1, 40))
    inds = script.ReplayBuffer.sample(types.SimpleNamespace(valid=valid), n)
    assert len(inds) == n
    assert valid.flatten()[inds].all()
    counts = torch.bincount(inds, minlength=valid.numel())[valid.flatten()]
    assert counts.max() - counts.min() <= 1


def test_sampling_is_uniform():
    valid = torch.rand(4, 11, 10, generator=torch.Generator().manual_seed(0)) < 0.8
    torch.manual_seed(0)
    counts = torch.zeros(valid.numel())
    for _ in range(2000):
        counts[script.ReplayBuffer.sample(types.SimpleNamespace(valid=valid), 50)] += 1
    expected = 2000 * 50 / valid.sum()
    assert (counts[~valid.flatten()] == 0).all()
    chi_square = ((counts[valid.flatten()] - expected) ** 2 / expected).sum() / valid.sum()
    assert 0.6 < chi_square < 1.2  # drawn without replacement, so a little below 1
