"""The dials of staleness do what they say, and nothing else."""

import math
import time

import numpy as np
import pytest
import torch
from harness import flags, load, run, scalars, watch

SMALL = "--num-envs 2 --num-steps 16 --num-minibatches 2 --update-epochs 2".split()
CLOCK = [*SMALL, "--env-id", "probes:Clock-v0"]
ROLLOUT = 32


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def state(module) -> dict:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


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
    note = lambda self, obs, action=None: state(self) if action is None else None  # noqa: E731
    acted = watch(monkeypatch, module.ContinuousAgent, "get_action_and_value", note)
    # of the learner at the start of each update
    learned = watch(monkeypatch, module, "refresh_advantages", lambda *args: state(args[3]))
    run(module, monkeypatch, tmp_path, [*CLOCK, "--total-timesteps", 7 * ROLLOUT, "--policy-lag", lag])
    acted = [found for found in acted if found]
    assert len(acted) == 7 * 16
    for iteration in range(7):
        for found in acted[iteration * 16 : (iteration + 1) * 16]:
            assert same(found, learned[max(0, iteration - lag)])
    assert not same(learned[0], learned[1])


@pytest.mark.parametrize("advantage_source", ["vtrace", "recompute", "stored"])
def test_a_frozen_buffer_does_not_change(advantage_source, monkeypatch, tmp_path):
    module = load("gipo_continuous")
    contents = watch(monkeypatch, module.ReplayBuffer, "sample", lambda self, n: state(self))
    states = watch(
        monkeypatch,
        module,
        "refresh_advantages",
        lambda *args: {k: v for k, v in state(args[3]).items() if "stats" in k or "return" in k},
    )
    # 3.5 rollouts: the first boundary at or after it is that of iteration 4
    argv = [*CLOCK, "--total-timesteps", 9 * ROLLOUT, "--buffer-epochs", 3, "--freeze-buffer-at", int(3.5 * ROLLOUT)]
    run(module, monkeypatch, tmp_path, [*argv, "--update-epochs", 1, "--advantage-source", advantage_source])
    assert len(contents) == 9
    if advantage_source != "stored":
        for content in contents:
            for name in ("values", "advantages", "returns"):
                del content[name]
    assert all(same(contents[i], contents[3]) for i in range(4, 9))
    assert not same(contents[2], contents[3])
    # statistics of iteration 3 still count, because its rollout was the last to enter
    assert all(same(states[i], states[4]) for i in range(5, 9))
    assert not same(states[3], states[4])
    assert [step for step, _ in scalars(tmp_path)["charts/episodic_return"]][-1] == 9 * ROLLOUT


@pytest.mark.parametrize("epochs", [1, 8])
@pytest.mark.parametrize(
    ("dials", "count", "size"),
    [
        ([], 2, 16),
        (["--minibatch-size", 8], 2, 8),
        (["--minibatch-size", 20, "--num-minibatches", 3], 3, 20),  # 60 of at most 32 valid rows
        (["--minibatch-size", 300, "--num-minibatches", 1], 1, 300),  # more than eight rollouts hold
    ],
)
def test_the_number_and_size_of_gradient_steps_do_not_depend_on_the_buffer(
    epochs, dials, count, size, monkeypatch, tmp_path
):
    module = load("gipo_continuous")
    sizes = watch(monkeypatch, module, "policy_loss", lambda logratio, *_: len(logratio))
    argv = [*CLOCK, "--total-timesteps", 10 * ROLLOUT, "--buffer-epochs", epochs, *dials]
    end = run(module, monkeypatch, tmp_path, argv)
    (steps,) = {moments["step"].item() for moments in end.optimizer.state.values()}
    assert (steps, sizes) == (10 * 2 * count, [size] * 20 * count)


def test_authors_regime(monkeypatch, tmp_path):
    """A stream of short rollouts and a large buffer, from which each update draws few large minibatches."""
    module = load("gipo_continuous")
    sizes = watch(monkeypatch, module, "policy_loss", lambda logratio, *_: len(logratio))
    argv = "--num-envs 1 --num-steps 10 --buffer-epochs 2000 --minibatch-size 512 --num-minibatches 1".split()
    end = run(module, monkeypatch, tmp_path, [*argv, "--total-timesteps", 60])
    assert sizes == [512] * 6 * 10
    for name, field in end.buffer.named_buffers():  # fill it
        if name != "versions":
            field[6:] = field[np.arange(1994) % 6]
    end.buffer.versions.copy_(torch.arange(2000))
    stamps = [time.process_time()]
    for _ in range(5):
        end.refresh_advantages(end.buffer, torch.arange(2000), 1999, end.agent, end.args)
        stamps.append(time.process_time())
    assert min(np.diff(stamps)) < 0.06, np.diff(stamps)  # of one core, whatever else runs
    assert torch.isfinite(end.buffer.advantages).all()


@pytest.mark.parametrize("name", ["gipo_continuous", "ppo_baseline"])
def test_first_minibatch_is_on_policy(name, monkeypatch, tmp_path):
    """Statistics move after the update, not between acting and learning."""
    module = load(name)
    logratios = watch(monkeypatch, module, "policy_loss", lambda logratio, *_: logratio.abs().max().item())
    domain = ["continuous"] if name == "ppo_baseline" else []
    argv = [*domain, "--env-id", "Hopper-v5", *SMALL, "--total-timesteps", 6 * ROLLOUT]
    run(module, monkeypatch, tmp_path, argv)
    assert max(logratios[::4]) < 1e-5
    assert min(logratios[1::4]) > 1e-4


def watch_advantages(monkeypatch, module):
    return watch(
        monkeypatch, module.ReplayBuffer, "sample", lambda self, n: (self.advantages.clone(), self.returns.clone())
    )


def test_stored_advantages_keep_the_scale_of_their_time(monkeypatch, tmp_path):
    module = load("gipo_continuous")
    history = watch_advantages(monkeypatch, module)
    argv = [*CLOCK, "--update-epochs", 1, "--total-timesteps", 4 * ROLLOUT, "--buffer-epochs", 4]
    run(module, monkeypatch, tmp_path / "stored", [*argv, "--advantage-source", "stored"])
    for iteration in range(1, 4):
        for before, after in zip(history[iteration - 1], history[iteration], strict=True):
            assert torch.equal(before[:iteration], after[:iteration])
            assert after[iteration].any()
    for source in ("recompute", "vtrace"):
        module = load("gipo_continuous")
        history = watch_advantages(monkeypatch, module)
        run(module, monkeypatch, tmp_path / source, [*argv, "--advantage-source", source])
        assert not torch.equal(history[1][0][0], history[2][0][0])


def test_running_statistics_are_those_of_all_samples():
    module = load("gipo_continuous")
    rng = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, 3, generator=rng) * 5 + 2 for n in (1, 7, 100, 33)]
    stats = module.RunningMeanStd((3,))
    for batch in batches:
        stats.update(batch)
    together = torch.cat(batches)
    torch.testing.assert_close(stats.mean, together.mean(0))
    torch.testing.assert_close(stats.var, together.var(0, correction=0))
    assert stats.count == len(together)


def test_reward_scale_is_the_spread_of_discounted_returns():
    module = load("gipo_continuous")
    args = flags(module, env_id="Pendulum-v1", num_envs=2, gamma=0.5)
    envs = module.make_continuous_envs(args, 2, seed=0)
    envs.reset(seed=0)
    agent = module.ContinuousAgent(envs, args)
    agent.return_stats = module.RunningMeanStd(())  # without the random steps
    assert not agent.discounted_return.any()
    rewards = torch.tensor([[1.0, 2.0], [3.0, 4.0], [9.0, 5.0]])
    dones = torch.tensor([[False, True], [False, False], [False, False]])
    valid = torch.tensor([[True, True], [True, False], [True, True]])
    rewards[1, 1] = 0  # the autoreset row
    agent.update_statistics(torch.zeros(3, 2, 3), rewards, dones, valid)
    counted = np.array([1.0, 2.0, 3.5, 10.75, 5.0])
    assert agent.return_stats.var.item() == pytest.approx(counted.var())
    assert agent.scale_rewards(torch.tensor(6.0)).item() == pytest.approx(6 / math.sqrt(counted.var()))
    assert agent.scale_rewards(torch.tensor(1e9)).item() == 10


def reference(module, gamma, gae_lambda):
    """Advantages and targets of the whole buffer by the current agent, and its ratios to mu, before and after the cap.

    Row by row, and by the definition: v_s = V_s + sum over t of gamma^(t - s) (c_s ... c_(t-1)) rho_t delta_t with
    c = lambda min(1, ratio) and rho = min(1, ratio); an end of the episode ends the sum.
    """
    buffer, agent, shape = module.buffer, module.agent, module.buffer.values.shape
    ratios, values, advantages, returns = (np.zeros(shape) for _ in range(4))
    for row in np.ndindex(*shape):
        _, logprob, _, value = agent.get_action_and_value(buffer.obs[row][None], buffer.actions[row][None])
        ratios[row], values[row] = np.exp(logprob.item() - buffer.logprobs[row].item()), value.item()
    rho = np.minimum(1, ratios) if module.args.advantage_source == "vtrace" else np.ones(shape)
    for k, first, n in np.ndindex(shape[0], shape[1] - 1, shape[2]):
        product, trace = 1.0, 1.0  # with and without the factor of the first step, which only targets have
        for t in range(first, shape[1] - 1):
            rest = 0 if buffer.terminated[k, t, n] else gamma * values[k, t + 1, n]
            delta = agent.scale_rewards(buffer.rewards[k, t, n]).item() + rest - values[k, t, n]
            if t > first:
                product *= gamma * gae_lambda * rho[k, t - 1, n]
                trace *= gamma * gae_lambda * rho[k, t, n]
            returns[k, first, n] += product * rho[k, t, n] * delta
            advantages[k, first, n] += trace * delta
            if buffer.dones[k, t, n]:
                break
    return advantages, returns + values, ratios, rho


@pytest.mark.parametrize("source", ["vtrace", "recompute"])
@pytest.mark.parametrize("dials", ["--buffer-epochs 3", "--policy-lag 2", "--buffer-epochs 3 --freeze-buffer-at 128"])
def test_advantages_are_those_of_the_current_agent(dials, source, monkeypatch, tmp_path):
    """The values that were noted while acting stand in for its own only where the same weights acted."""
    module = load("gipo_continuous")
    traced = watch(monkeypatch, module, "compute_gae", lambda rewards, values, ratios, *_: ratios.numpy())

    def note(buffer, n):
        with torch.no_grad():
            return reference(module, 0.99, 0.95), buffer.advantages.numpy().copy(), buffer.returns.numpy().copy()

    noted = watch(monkeypatch, module.ReplayBuffer, "sample", note)
    argv = [*CLOCK, *dials.split(), "--total-timesteps", 6 * ROLLOUT, "--update-epochs", 1, "--learning-rate", 0.03]
    buffer = run(module, monkeypatch, tmp_path, [*argv, "--advantage-source", source]).buffer
    assert len(noted) == len(traced) == 6
    (advantages, returns, ratios, rho), found_advantages, found_returns = noted[-1]  # of a full buffer
    valid = buffer.valid.numpy()
    np.testing.assert_allclose(found_advantages[valid], advantages[valid], atol=1e-4)
    np.testing.assert_allclose(found_returns[valid], returns[valid], atol=1e-4)
    np.testing.assert_allclose(traced[-1][valid], rho[valid], atol=1e-4)
    assert (ratios[valid] < 0.8).sum() > 2 and (ratios[valid] > 1.2).sum() > 2  # the policy has moved


def test_vtrace_is_recompute_on_policy(monkeypatch, tmp_path):
    noted = []
    for source in ("vtrace", "recompute"):
        module = load("gipo_continuous")
        noted.append(watch_advantages(monkeypatch, module))
        argv = ["--env-id", "Hopper-v5", *SMALL, "--total-timesteps", 6 * ROLLOUT, "--advantage-source", source]
        run(module, monkeypatch, tmp_path / source, argv)
    assert len(noted[0]) == 12
    torch.testing.assert_close(*noted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dials", ["--buffer-epochs 3", "--policy-lag 2"])
def test_stored_advantages_have_no_trace(dials, monkeypatch, tmp_path):
    """One rollout at a time, with ratios of 1 though the policy has changed since."""
    module = load("gipo_continuous")
    traced = watch(monkeypatch, module, "compute_gae", lambda rewards, values, ratios, *_: ratios.clone())
    argv = [*CLOCK, *dials.split(), "--total-timesteps", 6 * ROLLOUT, "--advantage-source", "stored"]
    run(module, monkeypatch, tmp_path, argv)
    assert len(traced) == 6
    assert all(torch.equal(ratios, torch.ones(1, 17, 2)) for ratios in traced)
