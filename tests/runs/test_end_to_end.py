"""Every script and domain on a real environment, to the end of episodes, around the ring buffer, and read back."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from harness import ENTRIES, GIPO, ROOT, TAGS, load, run, scalars, watch

REAL = {
    "atari": "--env-id ALE/Breakout-v5 --num-envs 2 --num-steps 64 --num-minibatches 2 --total-timesteps 1280",
    "continuous": "--env-id Hopper-v5 --num-envs 2 --num-steps 64 --num-minibatches 2 --total-timesteps 1280",
    "minigrid": "--num-envs 4 --num-steps 64 --num-minibatches 2 --total-timesteps 2560",
}
CASES = [(name, argv, list(REAL.values())[i % 3]) for i, (name, argv) in enumerate(ENTRIES)]
CLOCK = "--env-id probes:Clock-v0 --num-envs 2 --num-steps 8 --num-minibatches 2".split()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "domain", "flags"), CASES)
def test_logs_every_tag(name, domain, flags, monkeypatch, tmp_path):
    argv = [*domain, *flags.split(), "--update-epochs", 1, "--minibatch-size", 16]
    argv += ["--buffer-epochs", 4, "--policy-lag", 1]
    end = run(load(name), monkeypatch, tmp_path, argv)
    assert (end.buffer.versions >= 0).sum() == 4 and end.iteration == 9  # more rollouts than slots
    logged = scalars(tmp_path)
    assert logged.keys() - {"charts/success_rate"} == TAGS
    assert ("charts/success_rate" in logged) == end.args.env_id.startswith("MiniGrid")
    for tag, points in logged.items():
        steps, values = zip(*points, strict=True)
        assert all(map(math.isfinite, values)), tag
        assert steps == tuple(sorted(set(steps))), tag
        assert all(step % end.batch_size == 0 for step in steps), tag
    for tag in TAGS - {"charts/episodic_return", "charts/episodic_length"}:
        assert len(logged[tag]) == 10, tag
    assert [value for _, value in logged["offpolicy/age_max"]] == [0, 1, 2, 3, 4, 4, 4, 4, 4, 4]
    rates = [value for _, value in logged["charts/learning_rate"]]
    assert rates == pytest.approx([end.args.learning_rate * (1 - i / 10) for i in range(10)])
    for tag in ("losses/clipfrac", "offpolicy/ess", "offpolicy/dead_fraction"):
        assert all(0 <= value <= 1 + 1e-6 for _, value in logged[tag]), tag


def test_losses_are_means_over_all_minibatches(monkeypatch, tmp_path):
    module = load("gipo_continuous")
    policy_loss, losses = module.policy_loss, []

    def spy(*args):
        losses.append(policy_loss(*args))
        return losses[-1]

    module.policy_loss = spy
    run(module, monkeypatch, tmp_path, [*CLOCK, "--total-timesteps", 48])
    means = np.array([loss.item() for loss, _ in losses]).reshape(3, 20).mean(1)
    assert [value for _, value in scalars(tmp_path)["losses/policy_loss"]] == pytest.approx(means.tolist(), abs=1e-6)


@pytest.mark.parametrize(("flag", "normalized"), [("--norm-adv", True), ("--no-norm-adv", False)])
def test_advantages_are_normalized_by_minibatch(flag, normalized, monkeypatch, tmp_path):
    module = load("gipo_continuous")
    moments = watch(monkeypatch, module, "policy_loss", lambda _, adv, *__: (adv.mean().item(), adv.std().item()))
    run(module, monkeypatch, tmp_path, [*CLOCK, "--total-timesteps", 32, flag])
    for mean, std in moments:
        assert (abs(mean) < 1e-5, std == pytest.approx(1, abs=1e-4)) == (normalized, normalized)


def test_statistics_start_from_random_steps(monkeypatch, tmp_path):
    end = run(load("gipo_continuous"), monkeypatch, tmp_path, [*CLOCK, "--total-timesteps", 48])
    assert end.agent.obs_stats.count == 2 * end.RANDOM_STEPS + 48
    assert end.global_step == 48  # the random steps do not count


def test_runs_that_start_together_do_not_share_a_folder(monkeypatch, tmp_path):
    for _ in range(2):
        run(load("gipo_continuous"), monkeypatch, tmp_path, [*CLOCK, "--total-timesteps", 16])
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_success_at_any_step_counts(monkeypatch, tmp_path):
    run(load("gipo_continuous"), monkeypatch, tmp_path, [*CLOCK, "--total-timesteps", 96])
    logged = scalars(tmp_path)
    assert {value for _, value in logged["charts/success_rate"]} == {1.0}
    assert {value for _, value in logged["charts/episodic_return"]} == {0 + 1 + 2 + 3 + 4}
    assert {value for _, value in logged["charts/episodic_length"]} == {5}


@pytest.mark.slow
def test_meta_world(monkeypatch, tmp_path):
    """To the time limit of its episodes; and the goals of the evaluation are not those of training."""
    module = load("gipo_continuous")
    start_envs, started = module.start_envs, []

    def spy(*args, **kwargs):
        started.append(start_envs(*args, **kwargs))
        return started[-1]

    module.start_envs, module.EVAL_STEPS = spy, 1
    argv = "--env-id Meta-World/reach-v3 --num-envs 2 --num-steps 251 --num-minibatches 2 --update-epochs 1".split()
    end = run(module, monkeypatch, tmp_path, [*argv, "--total-timesteps", 1004, "--eval-episodes", 2])
    assert not end.buffer.terminated.any() and end.buffer.dones.any()
    logged = scalars(tmp_path)
    assert logged["charts/episodic_length"] == [(1004, 500)]
    assert "charts/success_rate" in logged
    (_, obs), _ = started
    assert not np.array_equal(obs[0], obs[1])  # each copy has a goal of its own
    goals = [
        {task.data for env in envs.unwrapped.envs for task in env.get_wrapper_attr("tasks")} for envs, _ in started
    ]
    assert len(goals[0]) == len(goals[1]) == 2 * 50 and not goals[0] & goals[1]


ONE_SMALL_STEP = "--num-minibatches 1 --minibatch-size 2 --update-epochs 1".split()


@pytest.mark.slow
def test_atari_life_loss_ends_the_return_but_not_the_game_nor_its_score(monkeypatch, tmp_path):
    flags = ["--env-id", "ALE/Breakout-v5", "--num-envs", 4, *ONE_SMALL_STEP]
    argv = [*flags, "--num-steps", 400, "--total-timesteps", 1600]
    buffer = run(load("gipo_atari"), monkeypatch, tmp_path / "lives", argv).buffer
    rewards, terminated, valid = buffer.rewards[0, :-1], buffer.terminated[0, :-1], buffer.valid[0, :-1]
    games = []
    for column, column_valid in zip(rewards.T, valid.T):
        ends = (~column_valid).nonzero().flatten().tolist()
        games += [column[start:end].sum().item() for start, end in zip([0, *ends], ends)]
    assert 4 * len(games) < terminated.sum().item()  # five lives a game, and only the last brings an autoreset
    assert not (terminated & ~valid).any()
    ((_, logged),) = scalars(tmp_path / "lives")["charts/episodic_return"]
    assert logged == pytest.approx(np.mean(games)) and logged > 0

    argv = [*flags, "--num-steps", 200, "--total-timesteps", 800, "--no-life-loss-terminates"]
    buffer = run(load("gipo_atari"), monkeypatch, tmp_path / "games", argv).buffer
    assert buffer.terminated[0, :-1].sum().item() == pytest.approx((~buffer.valid[0, :-1]).sum().item(), abs=4)


@pytest.mark.slow
def test_atari_stores_true_rewards(monkeypatch, tmp_path):
    """MsPacman's pellets pay 10."""
    argv = "--env-id ALE/MsPacman-v5 --num-envs 8 --num-steps 64 --total-timesteps 512".split()
    end = run(load("gipo_atari"), monkeypatch, tmp_path, [*argv, *ONE_SMALL_STEP])
    assert end.buffer.rewards.max() >= 10
    assert end.agent.scale_rewards(end.buffer.rewards).max() == 1


def test_atari_learns_from_clipped_rewards_and_stores_bytes(monkeypatch, tmp_path):
    argv = "--env-id probes:Frames-v0 --num-envs 2 --num-steps 8 --num-minibatches 2 --total-timesteps 32".split()
    end = run(load("gipo_atari"), monkeypatch, tmp_path, argv)
    assert end.buffer.obs.dtype == torch.uint8
    assert end.agent.scale_rewards(torch.tensor([-7.0, 0.5, 3.0])).tolist() == [-1, 0.5, 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", GIPO)
def test_the_seed_decides(name, monkeypatch, tmp_path):
    flags = "--num-envs 2 --num-steps 16 --num-minibatches 2 --update-epochs 1 --total-timesteps 64".split()

    def weights(label, seed):
        argv = [*flags, "--device", "cpu", "--buffer-epochs", 2, "--seed", seed]
        agent = run(load(name), monkeypatch, tmp_path / label, argv).agent
        return torch.cat([tensor.flatten().float() for tensor in agent.state_dict().values()])

    first = weights("first", 1)
    assert torch.equal(first, weights("again", 1))
    assert not torch.equal(first, weights("other", 2))


def test_wandb_failure_costs_no_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import fails
    run(load("gipo_continuous"), monkeypatch, tmp_path, [*CLOCK, "--total-timesteps", 32, "--track"])
    assert "warning: the run goes on without Weights and Biases" in capsys.readouterr().err
    assert scalars(tmp_path)["charts/SPS"]


@pytest.mark.slow
def test_wandb_follows_its_environment_variables(tmp_path):
    flags = "--env-id Hopper-v5 --num-envs 2 --num-steps 8 --num-minibatches 2 --total-timesteps 32".split()
    result = subprocess.run(
        [sys.executable, ROOT / "gipo_continuous.py", *flags, "--eval-episodes", "0", "--track"],
        cwd=tmp_path,
        env=os.environ | {"WANDB_MODE": "offline", "WANDB_PROJECT": "elsewhere"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    (record,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert b"charts/SPS" in record.read_bytes() and b"elsewhere" in record.read_bytes()
    assert "warning: the run goes on without" not in result.stderr
