"""Advantages by number and by definition, time limits bootstrapped, rows that are no transitions never learned from."""

import types

import numpy as np
import pytest
import torch
from harness import watch
from hypothesis import given, settings
from hypothesis import strategies as st

import gipo_continuous
from gipo_continuous import Continuous, ReplayBuffer, compute_gae, load_checkpoint, refresh_advantages, train


@pytest.mark.parametrize(
    ("end", "expected", "targets"),
    [
        ("none", [1.300496, 1.2236, 1.88], [1.800496, 1.0118, 2.18]),
        ("terminated", [0.716, -0.4, 1.88], [1.216, 0.2, 2.18]),
        ("truncated", [0.8132, -0.13, 1.88], [1.3132, 0.335, 2.18]),
    ],
)
def test_vtrace_by_number(end, expected, targets):
    rewards, values = torch.tensor([[1.0], [0.0], [2.0]]), torch.tensor([[0.5], [0.4], [0.3], [0.2]])
    ratios = torch.tensor([[2.0], [0.5], [1.5], [0.7]]).clamp(max=1)  # that of the last row plays no part
    ended = torch.tensor([[False], [True], [False]])
    terminated, dones = ended & (end == "terminated"), ended & (end != "none")
    advantages, returns = compute_gae(rewards, values, ratios, terminated, dones, gamma=0.9, gae_lambda=0.8)
    assert advantages.flatten().tolist() == pytest.approx(expected, abs=1e-6)
    assert returns.flatten().tolist() == pytest.approx(targets, abs=1e-6)


@given(seed=st.integers(0, 2**32 - 1), gae_lambda=st.sampled_from([0.0, 0.8, 1.0]))
@settings(max_examples=30)
def test_returns_by_definition(seed, gae_lambda):
    """v_s = V_s + sum of gamma^(t - s) (c_s ... c_(t-1)) rho_t delta_t with c = lambda rho, in each of three rollouts.

    The advantage has the factors of one step later.
    """
    rng, gamma = torch.Generator().manual_seed(seed), 0.9
    rewards, values = torch.randn(3, 6, 2, generator=rng), torch.randn(3, 7, 2, generator=rng)
    ratios = torch.rand(3, 7, 2, generator=rng)
    dones = torch.rand(3, 6, 2, generator=rng) < 0.3
    terminated = dones & (torch.rand(3, 6, 2, generator=rng) < 0.5)
    advantages, returns = torch.zeros(3, 6, 2), values[:, :-1].clone()
    for k, first, n in np.ndindex(3, 6, 2):
        product = trace = 1.0
        for t in range(first, 6):
            rest = 0 if terminated[k, t, n] else gamma * values[k, t + 1, n]
            delta = rewards[k, t, n] + rest - values[k, t, n]
            if t > first:
                product *= gamma * gae_lambda * ratios[k, t - 1, n]
                trace *= gamma * gae_lambda * ratios[k, t, n]
            returns[k, first, n] += product * ratios[k, t, n] * delta
            advantages[k, first, n] += trace * delta
            if dones[k, t, n]:
                break
    found = compute_gae(rewards, values, ratios, terminated, dones, gamma, gae_lambda)
    torch.testing.assert_close(found, (advantages, returns), atol=1e-5, rtol=1e-4)


def random_buffer(args):
    """An agent, and a buffer with two rollouts of random numbers in three slots."""
    torch.manual_seed(0)
    agent, obs = args.Agent(args.make_envs(args, 2, seed=0), args), torch.zeros(2, 2)
    action, logprob, *_ = agent.get_action_and_value(obs)
    buffer = ReplayBuffer(args, obs, action, logprob)
    for name, field in vars(buffer).items():
        if name != "versions":
            field.copy_(torch.randn(field.shape) < 0.5 if field.dtype == torch.bool else torch.randn(field.shape))
    buffer.logprobs -= 1.5
    buffer.versions[:2] = torch.arange(2)
    return agent, buffer


@pytest.mark.parametrize("slots", [[0, 1], [1], []])
@pytest.mark.parametrize("source", ["vtrace", "recompute", "stored"])
@pytest.mark.parametrize("ratio", ["action", "dimension"])
def test_refresh(ratio, source, slots, monkeypatch):
    """Of the whole buffer: values and log-probabilities. Of these slots: advantages, by V-trace of the joint ratio."""
    args = Continuous("probes:Clock-v0", num_envs=2, num_steps=600, buffer_epochs=3, ratio=ratio)
    args.advantage_source = source
    agent, buffer = random_buffer(args)
    before = {name: field.clone() for name, field in vars(buffer).items()}
    traced = watch(monkeypatch, gipo_continuous, "compute_gae", lambda rewards, values, ratios, *_: ratios)
    refresh_advantages(buffer, slots, agent, args)
    after = vars(buffer)
    with torch.no_grad():
        outputs = agent.get_action_and_value(buffer.obs[:2].flatten(0, 2), buffer.actions[:2].flatten(0, 2))
    _, logprobs, _, values = (output.view(2, 601, 2, *output.shape[1:]) for output in outputs)
    assert logprobs.shape[3:] == ((1,) if ratio == "action" else (2,))
    torch.testing.assert_close((after["start_logprobs"][:2], after["values"][:2]), (logprobs, values))
    ratios = (logprobs - before["logprobs"][:2]).sum(3).exp().clamp(max=1)[slots]
    assert not slots or 0.1 < (ratios == 1).float().mean() < 0.9
    if source != "vtrace":
        ratios[:] = 1
    torch.testing.assert_close(traced, [ratios])
    rewards = agent.scale_rewards(before["rewards"])
    ends = before["terminated"], before["dones"]
    rows = [field[slots, :-1] for field in (rewards, *ends)]
    expected = compute_gae(rows[0], values[slots], ratios, *rows[1:], args.gamma, args.gae_lambda)
    before["advantages"][slots, :-1], before["returns"][slots, :-1] = expected
    for name, field in before.items():
        if name in ("values", "start_logprobs"):
            assert torch.equal(field[2], after[name][2])
        else:
            torch.testing.assert_close(field, after[name], msg=name)


def test_value_of_an_endless_reward():
    """Without a bootstrap at the time limit of 20 steps the value would be about half."""
    rates = {"gamma": 0.9, "learning_rate": 1e-2}
    args = Continuous("probes:Endless-v0", 8192, num_steps=64, num_minibatches=2, eval_episodes=0, **rates)
    agent, _ = train(args)
    value = agent.get_action_and_value(torch.zeros(1, 1), torch.zeros(1, 1))[3].item()
    reward = agent.scale_rewards(torch.ones(1)).item()
    assert value / reward == pytest.approx(1 / (1 - 0.9), rel=0.01)


def test_rows_are_transitions_of_one_episode():
    """Clock observes (episode, step) and pays the step, so that each valid row can be checked against its next."""
    sizes = {"num_envs": 3, "num_steps": 16, "num_minibatches": 4, "buffer_epochs": 2}
    args = Continuous("probes:Clock-v0", 240, eval_episodes=0, **sizes)
    buffer = types.SimpleNamespace(**load_checkpoint(train(args)[1], Continuous)["buffer"])
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


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 100))
def test_samples_are_valid_and_even(seed, n):
    valid = torch.rand(3, 5, 2, generator=torch.Generator().manual_seed(seed)) < 0.5
    valid[0, 0, 0] = True
    inds = ReplayBuffer.sample(types.SimpleNamespace(valid=valid), n)
    assert len(inds) == n and valid.flatten()[inds].all()
    counts = torch.bincount(inds, minlength=30)[valid.flatten()]
    assert counts.max() - counts.min() <= 1


def test_sampling_is_uniform():
    valid = torch.rand(4, 11, 10, generator=torch.Generator().manual_seed(0)) < 0.8
    torch.manual_seed(0)
    counts = torch.zeros(valid.numel())
    for _ in range(2000):
        counts[ReplayBuffer.sample(types.SimpleNamespace(valid=valid), 50)] += 1
    expected = 2000 * 50 / valid.sum()
    assert (counts[~valid.flatten()] == 0).all()
    chi_square = ((counts[valid.flatten()] - expected) ** 2 / expected).sum() / valid.sum()
    assert 0.6 < chi_square < 1.2  # drawn without replacement, so a little below 1
