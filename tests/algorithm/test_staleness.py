"""The dials of staleness do what they say, and nothing else."""

import copy
import math

import numpy as np
import pytest
import torch
from harness import load, run, scalars

SMALL = "--num-envs 2 --num-steps 16 --num-minibatches 2 --update-epochs 2".split()
CLOCK = [*SMALL, "--env-id", "probes:Clock-v0"]
ROLLOUT = 32


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize(("epochs", "lag"), [(1, 0), (1, 3), (4, 0), (3, 2)])
def test_ages(epochs, lag, monkeypatch, tmp_path):
    argv = [*CLOCK, "--total-timesteps", 12 * ROLLOUT, "--buffer-epochs", epochs, "--policy-lag", lag]
    end = run(load("gipo_continuous"), monkeypatch, tmp_path, argv)
    assert sorted((end.iteration - end.buffer.versions).tolist()) == list(range(lag, lag + epochs))
    logged = scalars(tmp_path)
    assert logged["offpolicy/age_max"][-1] == (12 * ROLLOUT, lag + epochs - 1)
    assert logged["offpolicy/age_mean"][-1][1] == pytest.approx(lag + (epochs - 1) / 2)


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_lag_acts_with_the_weights_of_lag_iterations_ago(lag, monkeypatch, tmp_path):
    module = load("gipo_continuous")
    Agent = module.ContinuousAgent
    learned, acted = [], []  # states at the start of each iteration, of the learner and of the actor
    act, update = Agent.get_action_and_value, Agent.update_statistics

    def spy_act(self, obs, action=None):
        if action is None:
            acted.append(copy.deepcopy(self.state_dict()))
        return act(self, obs, action)

    def spy_update(self, *args):
        update(self, *args)
        learned.append(copy.deepcopy(self.state_dict()))

    monkeypatch.setattr(Agent, "get_action_and_value", spy_act)
    monkeypatch.setattr(Agent, "update_statistics", spy_update)
    run(module, monkeypatch, tmp_path, [*CLOCK, "--total-timesteps", 7 * ROLLOUT, "--policy-lag", lag])
    learned = learned[-8:]  # the random steps at the beginning update statistics as well
    assert len(acted) == 7 * 16
    for iteration in range(7):
        for state in acted[iteration * 16 : (iteration + 1) * 16]:
            assert same(state, learned[max(0, iteration - lag)])
    assert not same(learned[0], learned[1])


@pytest.mark.parametrize("advantage_source", ["recompute", "stored"])
def test_a_frozen_buffer_does_not_change(advantage_source, monkeypatch, tmp_path):
    module = load("gipo_continuous")
    sample = module.ReplayBuffer.sample
    contents, states = [], []

    def spy(self, n):
        contents.append({name: tensor.clone() for name, tensor in self.state_dict().items()})
        states.append({k: v.clone() for k, v in module.agent.state_dict().items() if "stats" in k or "return" in k})
        return sample(self, n)

    monkeypatch.setattr(module.ReplayBuffer, "sample", spy)
    # 3.5 rollouts: the first boundary at or after it is that of iteration 4
    argv = [*CLOCK, "--total-timesteps", 9 * ROLLOUT, "--buffer-epochs", 3, "--freeze-buffer-at", int(3.5 * ROLLOUT)]
    run(module, monkeypatch, tmp_path, [*argv, "--update-epochs", 1, "--advantage-source", advantage_source])
    assert len(contents) == 9
    if advantage_source == "recompute":
        for content in contents:
            for name in ("values", "advantages", "returns"):
                del content[name]
    assert all(same(contents[i], contents[3]) for i in range(4, 9))
    assert not same(contents[2], contents[3])
    # statistics of iteration 3 still count, for its rollout was the last to enter
    assert all(same(states[i], states[4]) for i in range(5, 9))
    assert not same(states[3], states[4])
    assert [step for step, _ in scalars(tmp_path)["charts/episodic_return"]][-1] == 9 * ROLLOUT


def test_the_number_and_size_of_gradient_steps_do_not_depend_on_the_buffer(monkeypatch, tmp_path):
    found = {}
    for epochs in (1, 8):
        module = load("gipo_continuous")
        sizes = []
        policy_loss = module.policy_loss

        def spy(logratio, advantages, args, sizes=sizes, policy_loss=policy_loss):
            sizes.append(len(logratio))
            return policy_loss(logratio, advantages, args)

        module.policy_loss = spy
        argv = [*CLOCK, "--total-timesteps", 10 * ROLLOUT, "--buffer-epochs", epochs]
        folder = tmp_path / str(epochs)
        folder.mkdir()
        end = run(module, monkeypatch, folder, argv)
        (steps,) = {state["step"].item() for state in end.optimizer.state.values()}
        found[epochs] = (steps, sizes)
    assert found[1] == found[8] == (10 * 2 * 2, [16] * 40)


@pytest.mark.parametrize("name", ["gipo_continuous", "ppo_baseline"])
def test_first_minibatch_is_on_policy(name, monkeypatch, tmp_path):
    """Statistics move after the update, not between acting and learning."""
    module = load(name)
    logratios = []
    policy_loss = module.policy_loss

    def spy(logratio, advantages, args):
        logratios.append(logratio.detach().abs().max().item())
        return policy_loss(logratio, advantages, args)

    module.policy_loss = spy
    domain = ["continuous"] if name == "ppo_baseline" else []
    argv = [*domain, "--env-id", "Hopper-v5", *SMALL, "--total-timesteps", 6 * ROLLOUT]
    run(module, monkeypatch, tmp_path, argv)
    assert max(logratios[::4]) < 1e-5
    assert min(logratios[1::4]) > 1e-4


def test_stored_advantages_keep_the_scale_of_their_time(monkeypatch, tmp_path):
    module = load("gipo_continuous")
    sample = module.ReplayBuffer.sample
    history = []

    def spy(self, n):
        history.append((self.advantages.clone(), self.returns.clone()))
        return sample(self, n)

    monkeypatch.setattr(module.ReplayBuffer, "sample", spy)
    argv = [*CLOCK, "--update-epochs", 1, "--total-timesteps", 4 * ROLLOUT, "--buffer-epochs", 4]
    run(module, monkeypatch, tmp_path, [*argv, "--advantage-source", "stored"])
    for iteration in range(1, 4):
        for before, after in zip(history[iteration - 1], history[iteration], strict=True):
            assert torch.equal(before[:iteration], after[:iteration])
    (tmp_path / "recompute").mkdir()
    history.clear()
    module = load("gipo_continuous")
    sample = module.ReplayBuffer.sample
    monkeypatch.setattr(module.ReplayBuffer, "sample", spy)
    run(module, monkeypatch, tmp_path / "recompute", argv)
    assert not torch.equal(history[1][0][0], history[2][0][0])


def test_running_statistics_are_those_of_all_samples():
    module = load("gipo_continuous")
    rng = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, 3, generator=rng) * 5 + 2 for n in (1, 7, 100, 0, 33)]
    stats = module.RunningMeanStd((3,))
    for batch in batches:
        stats.update(batch)
    together = torch.cat(batches)
    torch.testing.assert_close(stats.mean, together.mean(0))
    torch.testing.assert_close(stats.var, together.var(0, correction=0))
    assert stats.count == len(together)


def test_reward_scale_is_the_spread_of_discounted_returns(monkeypatch, tmp_path):
    module = load("gipo_continuous")
    args = module.ContinuousArgs(env_id="Pendulum-v1", num_envs=2, gamma=0.5)
    agent = module.ContinuousAgent(module.make_continuous_envs(args), args)
    rewards = torch.tensor([[1.0, 2.0], [3.0, 4.0], [9.0, 5.0]])
    dones = torch.tensor([[False, True], [False, False], [False, False]])
    valid = torch.tensor([[True, True], [True, False], [True, True]])
    rewards[1, 1] = 0  # the autoreset row
    agent.update_statistics(torch.zeros(3, 2, 3), rewards, dones, valid)
    counted = np.array([1.0, 2.0, 3.5, 10.75, 5.0])
    assert agent.return_stats.var.item() == pytest.approx(counted.var())
    assert agent.scale_rewards(torch.tensor(6.0)).item() == pytest.approx(6 / math.sqrt(counted.var()))
    assert agent.scale_rewards(torch.tensor(1e9)).item() == 10


@pytest.mark.parametrize("flags", ["", "--policy-lag 2", "--freeze-buffer-at 128"])
def test_advantages_are_taken_with_the_current_critic(flags, monkeypatch, tmp_path):
    """The values that were noted while acting stand in for it only where the same weights acted."""
    module = load("gipo_continuous")
    compute_gae, rollouts = module.compute_gae, []

    def spy(rewards, values, *rest):
        slots = (module.buffer.versions >= 0).nonzero().flatten()
        current = module.agent.get_value(module.buffer.obs[slots].flatten(0, 2)).view(values.shape)
        assert torch.allclose(values, current, atol=1e-5)
        rollouts.append(len(slots))
        return compute_gae(rewards, values, *rest)

    module.compute_gae = spy
    argv = ["--env-id", "Hopper-v5", *SMALL, "--total-timesteps", 6 * ROLLOUT, "--buffer-epochs", 3, *flags.split()]
    run(module, monkeypatch, tmp_path, argv)
    assert rollouts[-1] >= 2 and len(rollouts) == 6
