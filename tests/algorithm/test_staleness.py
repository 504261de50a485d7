"""The dials of staleness do what they say, and nothing else."""

import copy
import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import scalars, watch

import gipo_atari
import gipo_continuous
import gipo_minigrid_vision
from gipo_continuous import Continuous, ReplayBuffer, RunningMeanStd, load_checkpoint, train

SMALL = {"num_envs": 2, "num_steps": 16, "num_minibatches": 2, "update_epochs": 2, "eval_episodes": 0}
ROLLOUT = 32


def clock(iterations, **values):
    return Continuous("probes:Clock-v0", iterations * ROLLOUT, **SMALL | values)


def trained(args):
    """What is in the checkpoint at the end of a run, its buffer with named fields."""
    checkpoint = load_checkpoint(train(args)[1], Continuous)
    return SimpleNamespace(**checkpoint | {"buffer": SimpleNamespace(**checkpoint["buffer"])})


def contents(owner) -> dict:
    return {name: field.clone() for name, field in vars(owner).items()}


def learners(monkeypatch) -> list:
    """The agent at the start of each update."""
    return watch(monkeypatch, gipo_continuous, "refresh_advantages", lambda *args: copy.deepcopy(args[2]))


def logprobs_of(agent, buffer, slot):
    with torch.no_grad():
        found = agent.get_action_and_value(buffer.obs[slot].flatten(0, 1), buffer.actions[slot].flatten(0, 1))[1]
    return found.view_as(buffer.logprobs[slot])


@pytest.mark.parametrize(("epochs", "lag"), [(1, 0), (1, 3), (4, 0), (3, 2)])
def test_ages(epochs, lag, tmp_path):
    end = trained(clock(12, buffer_epochs=epochs, policy_lag=lag))
    assert sorted((11 - end.buffer.versions).tolist()) == list(range(lag, lag + epochs))
    logged = scalars(tmp_path)
    assert logged["offpolicy/age_max"][-1] == (12 * ROLLOUT, lag + epochs - 1)
    assert logged["offpolicy/age_mean"][-1][1] == pytest.approx(lag + (epochs - 1) / 2)


@pytest.mark.parametrize("source", ["vtrace", "stored"])
@pytest.mark.parametrize("lag", [0, 1, 3])
def test_who_acts_and_what_the_kl_term_pulls_to(lag, source, monkeypatch):
    """The policy of L iterations ago acts. The reference of all old rollouts is the policy of the iteration."""
    learned = learners(monkeypatch)
    buffer = trained(clock(7, buffer_epochs=7, policy_lag=lag, advantage_source=source, learning_rate=0.01)).buffer
    assert len(learned) == 7
    for i in range(7):
        found, start = buffer.logprobs[i, :-1], buffer.start_logprobs[i]
        torch.testing.assert_close(found, logprobs_of(learned[max(0, i - lag)], buffer, i)[:-1])
        torch.testing.assert_close(start, logprobs_of(learned[-1], buffer, i))
        on_policy = max(0, i - lag) == 6
        assert ((found - start[:-1]).abs().max() < 1e-5) == on_policy


@pytest.mark.parametrize("source", ["vtrace", "recompute", "stored"])
def test_a_frozen_buffer_does_not_change(source, monkeypatch, tmp_path):
    noted = watch(monkeypatch, ReplayBuffer, "sample", lambda self, n: contents(self))
    learned = learners(monkeypatch)
    # 3.5 rollouts: the first boundary at or after it is that of iteration 4
    dials = {"buffer_epochs": 3, "freeze_buffer_at": int(3.5 * ROLLOUT), "advantage_source": source}
    train(clock(9, update_epochs=1, **dials))
    assert len(noted) == 9
    moving = {"values", "start_logprobs"} | (set() if source == "stored" else {"advantages", "returns"})
    for name in noted[0]:
        assert all(torch.equal(noted[i][name], noted[3][name]) for i in range(4, 9)) == (name not in moving), name
    assert not torch.equal(noted[2]["obs"], noted[3]["obs"])
    # The rollout of iteration 3 was the last to enter, and the last to count: its rewards before the update, its
    # observations after it.
    states = [dict(agent.named_buffers()) for agent in learned]
    for name in states[0]:
        last = 4 if name.startswith("obs_stats") else 3
        final = [torch.equal(state[name], states[8][name]) for state in states]
        assert final[last - 1 :] == [False] + [True] * (9 - last), name
    assert scalars(tmp_path)["charts/episodic_return"][-1][0] == 9 * ROLLOUT


@pytest.mark.parametrize("epochs", [1, 8])
@pytest.mark.parametrize(
    ("count", "size", "dials"),
    [
        (2, 16, {}),
        (2, 8, {"minibatch_size": 8}),
        (3, 20, {"minibatch_size": 20, "num_minibatches": 3}),  # 60 of at most 32 valid rows
        (1, 300, {"minibatch_size": 300, "num_minibatches": 1}),  # more than eight rollouts hold
    ],
)
def test_the_number_and_size_of_gradient_steps_do_not_depend_on_the_buffer(epochs, count, size, dials, monkeypatch):
    sizes = watch(monkeypatch, gipo_continuous, "update", lambda agent, optimizer, obs, *_: len(obs))
    end = trained(clock(10, buffer_epochs=epochs, **dials))
    (steps,) = {moments["step"].item() for moments in end.optimizer["state"].values()}
    assert (steps, sizes) == (10 * 2 * count, [size] * 20 * count)


def test_authors_regime(monkeypatch):
    """A stream of short rollouts and a large buffer, from which each update draws few large minibatches."""
    sizes = watch(monkeypatch, gipo_continuous, "update", lambda agent, optimizer, obs, *_: len(obs))
    buffers = watch(monkeypatch, ReplayBuffer, "sample", lambda self, n: self)
    dials = {"num_envs": 1, "num_steps": 10, "buffer_epochs": 2000, "minibatch_size": 512, "num_minibatches": 1}
    args = Continuous(total_timesteps=60, eval_episodes=0, **dials)
    agent, _ = train(args)
    assert sizes == [512] * 6 * 10
    for name, field in vars(buffers[0]).items():  # fill it
        field[6:] = torch.arange(6, 2000) if name == "versions" else field[np.arange(1994) % 6]
    stamps = [time.process_time()]
    for _ in range(5):
        gipo_continuous.refresh_advantages(buffers[0], torch.arange(2000), agent, args)
        stamps.append(time.process_time())
    assert min(np.diff(stamps)) < 0.06, np.diff(stamps)  # of one core, whatever else runs
    assert torch.isfinite(buffers[0].advantages).all()


@pytest.mark.parametrize(
    ("module", "args"),
    [
        (gipo_continuous, Continuous("Hopper-v5", 6 * ROLLOUT, ratio="action", **SMALL)),
        (gipo_continuous, Continuous("Hopper-v5", 6 * ROLLOUT, ratio="dimension", **SMALL)),
        (gipo_atari, gipo_atari.Atari("probes:BarFrames-v0", 6 * ROLLOUT, **SMALL)),
        (gipo_minigrid_vision, gipo_minigrid_vision.Minigrid("probes:BarGrid-v0", 6 * ROLLOUT, **SMALL)),
    ],
)
def test_first_minibatch_is_on_policy(module, args, monkeypatch):
    """Statistics move after the update, not between acting and learning. So V-trace is GAE there."""
    found = watch(monkeypatch, module, "diagnostics", lambda logratio, *_: logratio.abs().amax(1).split(16))
    traced = watch(monkeypatch, module, "compute_gae", lambda rewards, values, ratios, *_: ratios[:, :-1].min())
    module.train(args)
    assert len(found) == 6
    assert max(first.max() for first, *_ in found) < 1e-5 < 1e-4 < min(second.max() for _, second, *_ in found)
    assert min(traced) > 1 - 1e-4


@pytest.mark.parametrize("source", ["vtrace", "recompute", "stored"])
def test_whose_advantages_are_computed_anew(source, monkeypatch):
    """Those of all rollouts, or of the newest alone; the others keep the numbers of their time."""
    noted = watch(monkeypatch, ReplayBuffer, "sample", lambda self, n: contents(self))
    indices = torch.arange(3)
    slots = watch(monkeypatch, gipo_continuous, "refresh_advantages", lambda _, slots, *rest: indices[slots].tolist())
    train(clock(3, update_epochs=1, buffer_epochs=3, advantage_source=source))
    assert slots == ([[0], [1], [2]] if source == "stored" else [[0], [0, 1], [0, 1, 2]])
    for name in ("advantages", "returns"):
        assert torch.equal(noted[0][name][0], noted[2][name][0]) == (source == "stored")


def test_running_statistics_are_those_of_all_samples():
    rng = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, 3, generator=rng) * 5 + 2 for n in (1, 7, 100, 33)]
    stats = RunningMeanStd((3,))
    for batch in batches:
        stats.update(batch)
    together = torch.cat(batches).double()
    torch.testing.assert_close(stats.mean, together.mean(0))
    torch.testing.assert_close(stats.var, together.var(0, correction=0))
    assert stats.count == len(together)


def test_statistics_of_many_samples_still_move():
    """In float32 neither the mean nor the count of 1e8 samples would."""
    stats = RunningMeanStd(())
    stats.mean.fill_(1000), stats.var.fill_(1), stats.count.fill_(1e8)
    for _ in range(10):
        stats.update(torch.full((100,), 1000.1))
    assert stats.count.item() == 1e8 + 1000
    assert stats.mean.item() - 1000 == pytest.approx(0.1 * 1000 / 1e8, rel=1e-3)
    assert stats.var.item() == pytest.approx(1 - (1 - 0.1**2) * 1000 / 1e8, abs=1e-9)


def test_a_variance_is_never_negative():
    """However far from 0 the mean is, where nothing varies."""
    stats, x = RunningMeanStd((200,)), 1e7 * torch.rand(200, dtype=torch.float64)
    for n in (1, 3, 7, 31):
        stats.update(x.expand(n, -1))
        assert stats.var.min() >= 0 and stats.var.max() < 1e-6


def test_reward_scale_is_the_spread_of_discounted_returns():
    args = Continuous("Pendulum-v1", num_envs=2, gamma=0.5)
    agent = args.Agent(args.make_envs(args, 2, seed=0), args)
    rewards = torch.tensor([[1.0, 2.0], [3.0, 0.0], [9.0, 5.0]])  # 0 in the autoreset row
    dones = torch.tensor([[False, True], [False, False], [False, False]])
    valid = torch.tensor([[True, True], [True, False], [True, True]])
    agent.update_return_stats(rewards, dones, valid)
    counted = np.array([1.0, 2.0, 3.5, 10.75, 5.0])
    assert agent.return_stats.var.item() == pytest.approx(counted.var())
    assert agent.scale_rewards(torch.tensor(6.0)).item() == pytest.approx(6 / math.sqrt(counted.var()))
    assert agent.scale_rewards(torch.tensor(1e9)).item() == 10
    agent.update_return_stats(torch.ones(1, 2), dones[:1], valid[:1])
    counted = np.array([*counted, 6.375, 3.5])  # a return goes on in the next rollout
    assert agent.return_stats.var.item() == pytest.approx(counted.var())


def test_the_unit_of_rewards_does_not_matter(monkeypatch):
    """From the first iteration on; 16 is a power of two, so that rounding does not differ."""
    plain = ReplayBuffer.write
    args = Continuous("Pendulum-v1", 3 * ROLLOUT, **SMALL)
    found = train(args)[0].state_dict()

    def scaled(self, slot, step, **rows):
        rows |= {"rewards": 16 * rows["rewards"]} if "rewards" in rows else {}
        plain(self, slot, step, **rows)

    monkeypatch.setattr(ReplayBuffer, "write", scaled)
    other = train(args)[0].state_dict()
    assert other["return_stats.var"] == pytest.approx(256 * found["return_stats.var"])
    for name in ("actor_mean.0.weight", "critic.0.weight"):
        torch.testing.assert_close(other[name], found[name], rtol=0, atol=1e-5)
