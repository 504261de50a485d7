"""Every script and domain on a real environment, to the end of episodes, around the ring buffer, and read back."""

import math
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from harness import ROOT, TAGS, scalars, watch
from short_runs import ATARI, BASELINES, CONTINUOUS, REAL, ROLLOUT, cases, checkpoint_of, environment, six, three, tiny

CLOCK = "probes:Clock-v0"
SMALL = {"num_minibatches": 1, "minibatch_size": 2, "update_epochs": 1}


@pytest.mark.slow
@six
def test_logs_every_tag(entry, tmp_path):
    values = {"num_steps": 64, "update_epochs": 1, "minibatch_size": 16, "buffer_epochs": 4}
    _, folder = entry.train(REAL[entry.kind], total_timesteps=1280, policy_lag=1, **values)
    checkpoint, logged = checkpoint_of(folder), scalars(tmp_path)
    assert (checkpoint["buffer"]["versions"] >= 0).sum() == 4 and checkpoint["iteration"] == 10  # more than slots
    assert logged.keys() - {"charts/success_rate"} == TAGS
    assert ("charts/success_rate" in logged) == (entry.kind == "Grid")
    for tag, points in logged.items():
        steps, values = zip(*points, strict=True)
        assert all(map(math.isfinite, values)), tag
        assert steps == tuple(sorted(set(steps))), tag
        assert all(step % 128 == 0 for step in steps), tag
    for tag in TAGS - {"charts/episodic_return", "charts/episodic_length"}:
        assert len(logged[tag]) == 10, tag
    assert [value for _, value in logged["offpolicy/age_max"]] == [0, 1, 2, 3, 4, 4, 4, 4, 4, 4]
    rates = [value for _, value in logged["charts/learning_rate"]]
    assert rates == pytest.approx([checkpoint["args"]["learning_rate"] * (1 - i / 10) for i in range(10)])
    for tag in ("losses/clipfrac", "offpolicy/ess", "offpolicy/dead_fraction"):
        assert all(0 <= value <= 1 + 1e-6 for _, value in logged[tag]), tag


@pytest.mark.parametrize("normalized", [True, False])
def test_losses_are_means_and_advantages_are_normalized_by_minibatch(normalized, monkeypatch, tmp_path):
    update, steps = CONTINUOUS.module.update, []

    def spy(*args):
        steps.append(update(*args))
        return steps[-1]

    monkeypatch.setattr(CONTINUOUS.module, "update", spy)
    CONTINUOUS.train(CLOCK, 3, norm_adv=normalized)
    logged = scalars(tmp_path)
    for tag in steps[0][0]:
        means = np.array([losses[tag].item() for losses, *_ in steps]).reshape(3, 4).mean(1)
        assert [value for _, value in logged[tag]] == pytest.approx(means.tolist(), rel=1e-6, abs=1e-6)
    for _, _, advantages in steps:
        mean, std = advantages.mean(), advantages.std()
        assert (abs(mean) < 1e-5, abs(std - 1) < 1e-4) == (normalized, normalized)


def test_train_returns_the_agent_and_the_folder_of_a_run_of_its_own():
    """Runs that start together do not share a folder; every observation of a run is in the agent's statistics."""
    runs = [CONTINUOUS.train(CLOCK, 3) for _ in range(2)]
    assert len({folder for _, folder in runs}) == len([*Path("runs").iterdir()]) == 2
    for agent, folder in runs:
        saved = checkpoint_of(folder)["agent"]
        assert all(torch.equal(value, saved[name]) for name, value in agent.state_dict().items())
        assert agent.obs_stats.count == 3 * ROLLOUT


OWN = """
import gymnasium as gym
from probes import Clock
gym.register("Own-v0", Clock)
"""


def test_an_environment_in_the_working_directory_is_found(monkeypatch):
    """As users call the script by its path."""
    Path("own_module.py").write_text(OWN)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(Path.cwd()))])
    assert CONTINUOUS.main(monkeypatch, *tiny("Plain", 1), "--env-id", "own_module:Own-v0") is None


@pytest.mark.parametrize("entry", cases([CONTINUOUS, BASELINES[0]]), ids=str)
def test_success_at_any_step_counts(entry, tmp_path):
    entry.train(CLOCK, 6, eval_episodes=2)
    logged = scalars(tmp_path)
    for prefix in ("charts", "eval"):
        assert {value for _, value in logged[f"{prefix}/success_rate"]} == {1.0}
        assert {value for _, value in logged[f"{prefix}/episodic_return"]} == {0 + 1 + 2 + 3 + 4}
        assert {value for _, value in logged[f"{prefix}/episodic_length"]} == {5}


@pytest.mark.slow
def test_meta_world(monkeypatch, tmp_path):
    """To the time limit of its episodes; and the goals of the evaluation are not those of training."""
    goals = []

    def note(envs, **_):
        tasks = [env.get_wrapper_attr("tasks") for env in envs.envs]
        goals.append({task.data for copies in tasks for task in copies})

    watch(monkeypatch, gym.vector.SyncVectorEnv, "reset", note)
    places = watch(monkeypatch, CONTINUOUS.module, "ReplayBuffer", lambda _, obs, *__: obs)
    monkeypatch.setattr(CONTINUOUS.module, "EVAL_STEPS", 1)
    values = {"num_steps": 251, "update_epochs": 1, "total_timesteps": 1004, "eval_episodes": 2}
    _, folder = CONTINUOUS.train("Meta-World/reach-v3", **values)
    buffer, logged = checkpoint_of(folder)["buffer"], scalars(tmp_path)
    assert not buffer["terminated"].any() and buffer["dones"].any()
    assert logged["charts/episodic_length"] == [(1004, 500)] and "charts/success_rate" in logged
    assert not torch.equal(*places[0])  # each copy has a goal of its own
    assert len(goals[0]) == len(goals[1]) == 2 * 50 and not goals[0] & goals[1]


@pytest.mark.slow
def test_atari_life_loss_ends_the_return_but_not_the_game_nor_its_score(tmp_path):
    _, folder = ATARI.train(REAL["Frames"], num_envs=4, num_steps=400, total_timesteps=1600, **SMALL)
    buffer = checkpoint_of(folder)["buffer"]
    rewards, terminated, valid = (buffer[name][0, :-1] for name in ("rewards", "terminated", "valid"))
    games = []
    for column, column_valid in zip(rewards.T, valid.T):
        ends = (~column_valid).nonzero().flatten().tolist()
        games += [column[start:end].sum().item() for start, end in zip([0, *ends], ends)]
    assert 4 * len(games) < terminated.sum().item()  # five lives a game, and only the last brings an autoreset
    assert not (terminated & ~valid).any()
    ((_, logged),) = scalars(tmp_path)["charts/episodic_return"]
    assert logged == pytest.approx(np.mean(games)) and logged > 0

    values = {"num_envs": 4, "num_steps": 200, "total_timesteps": 800, "life_loss_terminates": False}
    _, folder = ATARI.train(REAL["Frames"], **values, **SMALL)
    buffer = checkpoint_of(folder)["buffer"]
    ends = (~buffer["valid"][0, :-1]).sum().item()
    assert buffer["terminated"][0, :-1].sum().item() == pytest.approx(ends, abs=4)


@pytest.mark.slow
def test_atari_stores_bytes_and_true_rewards_and_learns_from_clipped_ones():
    """MsPacman's pellets pay 10."""
    agent, folder = ATARI.train("ALE/MsPacman-v5", num_envs=8, num_steps=64, total_timesteps=512, **SMALL)
    buffer = checkpoint_of(folder)["buffer"]
    assert buffer["obs"].dtype == torch.uint8 and buffer["rewards"].max() >= 10
    assert agent.scale_rewards(buffer["rewards"]).max() == 1
    assert agent.scale_rewards(torch.tensor([-7.0, 0.5, 3.0])).tolist() == [-1, 0.5, 1]


@pytest.mark.slow
@three
def test_the_seed_decides(entry):
    def weights(seed):
        agent, _ = entry.train(REAL[entry.kind], 4, seed=seed, buffer_epochs=2)
        return torch.cat([tensor.flatten().double() for tensor in agent.state_dict().values()])

    first = weights(1)
    assert torch.equal(first, weights(1))
    assert not torch.equal(first, weights(2))


@six
def test_weights_and_biases_that_cannot_log_are_found_before_training(entry, refused, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import fails
    _, folder = entry.train("Plain", 1)
    before = [*folder.iterdir()]
    assert "--track" in refused(entry, "--resume", folder, "--track", "--total-timesteps", 99)
    assert [*folder.iterdir()] == before and len([*Path("runs").iterdir()]) == 1


@pytest.mark.slow
def test_wandb_follows_its_environment_variables(tmp_path):
    command = [sys.executable, ROOT / "gipo_continuous.py", *tiny("Plain", 2), "--track"]
    env = environment(WANDB_MODE="offline", WANDB_PROJECT="elsewhere")
    result = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (record,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert b"charts/SPS" in record.read_bytes() and b"elsewhere" in record.read_bytes()
