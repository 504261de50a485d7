"""Every script and domain on a real environment, to the end of episodes, around the ring buffer, and read back."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from harness import ENTRIES, ROOT, load, run, scalars

TAGS = {
    "charts/episodic_return",
    "charts/episodic_length",
    "charts/learning_rate",
    "charts/SPS",
    "losses/value_loss",
    "losses/policy_loss",
    "losses/entropy",
    "losses/approx_kl",
    "losses/clipfrac",
    "losses/explained_variance",
    "losses/grad_norm",
    "offpolicy/age_mean",
    "offpolicy/age_max",
    "offpolicy/abs_logratio_p95",
    "offpolicy/ess",
    "offpolicy/dead_fraction",
    "offpolicy/coef_mean",
}
REAL = {
    "atari": "--env-id ALE/Breakout-v5 --num-envs 4 --num-steps 64 --num-minibatches 2 --total-timesteps 2560",
    "continuous": "--env-id Hopper-v5 --num-envs 2 --num-steps 64 --num-minibatches 2 --total-timesteps 1280",
    "minigrid": "--num-envs 4 --num-steps 64 --num-minibatches 2 --total-timesteps 2560",
}
DOMAIN_OF_ENTRY = [("atari", "continuous", "minigrid")[i % 3] for i in range(6)]
CASES = [(name, argv, REAL[domain]) for (name, argv), domain in zip(ENTRIES, DOMAIN_OF_ENTRY, strict=True)]


@pytest.mark.parametrize(("name", "domain", "flags"), CASES)
def test_logs_every_tag(name, domain, flags, monkeypatch, tmp_path):
    argv = [*domain, *flags.split(), "--update-epochs", "1", "--buffer-epochs", "4", "--policy-lag", "1"]
    end = run(load(name), monkeypatch, tmp_path, argv)
    assert (end.buffer.versions >= 0).sum() == 4 and end.iteration == 9  # more rollouts than slots
    logged = scalars(tmp_path)
    assert logged.keys() - {"charts/success_rate"} == TAGS
    assert ("charts/success_rate" in logged) == (end.args.env_id.startswith("MiniGrid"))
    for tag, points in logged.items():
        steps, values = zip(*points, strict=True)
        assert all(map(math.isfinite, values)), tag
        assert steps == tuple(sorted(set(steps))), tag
        assert all(step % end.args.batch_size == 0 for step in steps), tag
    for tag in TAGS - {"charts/episodic_return", "charts/episodic_length"}:
        assert len(logged[tag]) == 10, tag
    assert [value for _, value in logged["offpolicy/age_max"]] == [0, 1, 2, 3, 4, 4, 4, 4, 4, 4]
    rates = [value for _, value in logged["charts/learning_rate"]]
    assert rates == pytest.approx([end.args.learning_rate * (1 - i / 10) for i in range(10)])
    for tag in ("losses/clipfrac", "offpolicy/ess", "offpolicy/dead_fraction"):
        assert all(0 <= value <= 1 + 1e-6 for _, value in logged[tag]), tag


def test_losses_are_means_over_all_minibatches(monkeypatch, tmp_path):
    module = load("gipo_continuous")
    losses = []
    policy_loss = module.policy_loss

    def spy(*args):
        losses.append(policy_loss(*args))
        return losses[-1]

    module.policy_loss = spy
    argv = "--env-id probes:Clock-v0 --num-envs 2 --num-steps 8 --num-minibatches 2 --total-timesteps 48".split()
    run(module, monkeypatch, tmp_path, argv)
    means = np.array([loss.item() for loss, _ in losses]).reshape(3, 20).mean(1)
    assert [value for _, value in scalars(tmp_path)["losses/policy_loss"]] == pytest.approx(means.tolist(), abs=1e-6)


def test_advantages_are_normalized_by_minibatch(monkeypatch, tmp_path):
    for flag, normalized in (("--norm-adv", True), ("--no-norm-adv", False)):
        module = load("gipo_continuous")
        spreads = []
        policy_loss = module.policy_loss

        def spy(logratio, advantages, args, spreads=spreads, policy_loss=policy_loss):
            spreads.append(
                (abs(advantages.mean().item()) < 1e-5, advantages.std().item() == pytest.approx(1, abs=1e-4))
            )
            return policy_loss(logratio, advantages, args)

        module.policy_loss = spy
        folder = tmp_path / flag
        folder.mkdir()
        flags = "--env-id probes:Clock-v0 --num-envs 2 --num-steps 8 --num-minibatches 2 --total-timesteps 32".split()
        run(module, monkeypatch, folder, [*flags, flag])
        assert all(spread == (normalized, normalized) for spread in spreads)


def test_statistics_start_from_random_steps(monkeypatch, tmp_path):
    flags = "--env-id probes:Clock-v0 --num-envs 2 --num-steps 8 --num-minibatches 2 --total-timesteps 48".split()
    end = run(load("gipo_continuous"), monkeypatch, tmp_path, flags)
    assert end.agent.obs_stats.count == 2 * end.RANDOM_STEPS + 48
    assert end.global_step == 48  # the random steps do not count


def test_runs_that_start_together_do_not_share_a_folder(monkeypatch, tmp_path):
    flags = "--env-id probes:Clock-v0 --num-envs 2 --num-steps 8 --num-minibatches 2 --total-timesteps 16".split()
    for _ in range(2):
        run(load("gipo_continuous"), monkeypatch, tmp_path, flags)
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_success_at_any_step_counts(monkeypatch, tmp_path):
    argv = "--env-id probes:Clock-v0 --num-envs 2 --num-steps 16 --num-minibatches 2 --total-timesteps 96".split()
    run(load("gipo_continuous"), monkeypatch, tmp_path, argv)
    logged = scalars(tmp_path)
    assert {value for _, value in logged["charts/success_rate"]} == {1.0}
    assert {value for _, value in logged["charts/episodic_return"]} == {0 + 1 + 2 + 3 + 4}
    assert {value for _, value in logged["charts/episodic_length"]} == {5}


def test_meta_world(monkeypatch, tmp_path):
    argv = "--num-envs 2 --num-steps 251 --num-minibatches 2 --total-timesteps 1004".split()
    argv += ["--env-id", "Meta-World/reach-v3"]
    end = run(load("gipo_continuous"), monkeypatch, tmp_path, argv)
    assert not end.buffer.terminated.any() and end.buffer.dones.any()
    logged = scalars(tmp_path)
    assert logged["charts/episodic_length"] == [(1004, 500)]
    assert "charts/success_rate" in logged
    obs, _ = end.make_continuous_envs(end.args).reset(seed=1)
    assert not np.array_equal(obs[0], obs[1])  # each copy has a goal of its own


def test_atari_life_loss_ends_the_return_but_not_the_game(monkeypatch, tmp_path):
    module = load("gipo_atari")
    flags = "--env-id ALE/Breakout-v5 --num-envs 4 --num-steps 512 --num-minibatches 8 --update-epochs 1".split()
    buffer = run(module, monkeypatch, tmp_path, [*flags, "--total-timesteps", "2048"]).buffer
    terminated, valid = buffer.terminated[0, :-1], buffer.valid[0, :-1]
    lives_lost, games = terminated.sum().item(), (~valid).sum().item()
    assert games >= 1
    assert 4 * games < lives_lost  # five lives a game, and only the last brings an autoreset
    assert not (terminated & ~valid).any()
    (tmp_path / "games").mkdir()
    argv = [*flags, "--total-timesteps", "2048", "--no-life-loss-terminates"]
    buffer = run(load("gipo_atari"), monkeypatch, tmp_path / "games", argv).buffer
    assert buffer.terminated[0, :-1].sum().item() == pytest.approx((~buffer.valid[0, :-1]).sum().item(), abs=4)


def test_atari_stores_true_rewards_and_logs_true_scores(monkeypatch, tmp_path):
    """MsPacman's pellets pay 10; a game of Breakout is scored whole, however many lives it took."""
    flags = "--num-envs 8 --num-minibatches 8 --update-epochs 1".split()
    (tmp_path / "pellets").mkdir()
    argv = [*flags, *"--env-id ALE/MsPacman-v5 --num-steps 64 --total-timesteps 512".split()]
    end = run(load("gipo_atari"), monkeypatch, tmp_path / "pellets", argv)
    assert end.buffer.rewards.max() >= 10
    assert end.agent.scale_rewards(end.buffer.rewards).max() == 1

    (tmp_path / "games").mkdir()
    argv = [*flags, *"--env-id ALE/Breakout-v5 --num-steps 256 --total-timesteps 2048".split()]
    buffer = run(load("gipo_atari"), monkeypatch, tmp_path / "games", argv).buffer
    rewards, valid = buffer.rewards[0, :-1], buffer.valid[0, :-1]
    games = []
    for column, column_valid in zip(rewards.T, valid.T, strict=True):
        ends = (~column_valid).nonzero().flatten().tolist()
        games += [column[start:end].sum().item() for start, end in zip([0, *ends], ends, strict=False)]
    ((_, logged),) = scalars(tmp_path / "games")["charts/episodic_return"]
    assert logged == pytest.approx(np.mean(games))
    assert logged > 0


def test_atari_learns_from_clipped_rewards_and_stores_bytes(monkeypatch, tmp_path):
    argv = "--env-id probes:Frames-v0 --num-envs 2 --num-steps 8 --num-minibatches 2 --total-timesteps 32".split()
    end = run(load("gipo_atari"), monkeypatch, tmp_path, argv)
    assert end.buffer.obs.dtype == torch.uint8
    assert end.agent.scale_rewards(torch.tensor([-7.0, 0.5, 3.0])).tolist() == [-1, 0.5, 1]


@pytest.mark.parametrize("name", ["gipo_atari", "gipo_continuous", "gipo_minigrid_vision"])
def test_the_seed_decides(name, monkeypatch, tmp_path):
    flags = "--num-envs 2 --num-steps 32 --num-minibatches 2 --update-epochs 1 --total-timesteps 192".split()

    def weights(label, seed):
        folder = tmp_path / label
        folder.mkdir()
        argv = [*flags, "--device", "cpu", "--buffer-epochs", 2, "--seed", seed]
        agent = run(load(name), monkeypatch, folder, argv).agent
        return torch.cat([tensor.flatten().float() for tensor in agent.state_dict().values()])

    first = weights("first", 1)
    assert torch.equal(first, weights("again", 1))
    assert not torch.equal(first, weights("other", 2))


def test_wandb_failure_costs_no_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import fails
    argv = "--env-id probes:Clock-v0 --num-envs 2 --num-steps 8 --num-minibatches 2 --total-timesteps 32".split()
    run(load("gipo_continuous"), monkeypatch, tmp_path, [*argv, "--track"])
    assert "warning: the run goes on without Weights and Biases" in capsys.readouterr().err
    assert scalars(tmp_path)["charts/SPS"]


def test_wandb_offline(tmp_path):
    flags = "--env-id Hopper-v5 --num-envs 2 --num-steps 8 --num-minibatches 2 --total-timesteps 32".split()
    command = [sys.executable, ROOT / "gipo_continuous.py", *flags, "--track", "--wandb-mode", "offline"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (record,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert b"charts/SPS" in record.read_bytes()
    assert "warning: the run goes on without" not in result.stderr
