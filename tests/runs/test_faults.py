"""What has ended or spoiled runs of this and of other projects, and what should happen instead."""

import os
import re
import signal
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from harness import ENTRIES, ROOT, SCRIPTS, load, run, scalars, source, watch
from short_runs import (
    BAR,
    ROLLOUT,
    TINY,
    at_iteration,
    checkpoint_of,
    environment,
    folder_of,
    fork_run,
    iterations,
    send,
)

SCRIPT_OF = {"": "gipo_continuous", "Frames": "gipo_atari", "Grid": "gipo_minigrid_vision"}
every_kind = pytest.mark.parametrize("kind", ["", pytest.param("Frames", marks=pytest.mark.slow), "Grid"])


def fault(name, *flags):
    return ["--env-id", f"fault_envs:{name}-v0", *TINY, *iterations(4), *flags]


# ----------------------------------------------------- statistics -----------------------------------------------------


@pytest.mark.parametrize("offset", [0, 4.7, 1013.25, 1e5, 1e6])
@pytest.mark.parametrize("std", [0, 1])
def test_variance_far_from_zero(offset, std):
    stats, random = load("gipo_continuous").RunningMeanStd((1,)), torch.Generator().manual_seed(1)
    samples = (offset + std * torch.randn(40, 8, 1, generator=random, dtype=torch.float64)).float()
    for batch in samples:
        stats.update(batch)
        assert stats.var >= 0
    assert stats.var.item() == pytest.approx(samples.double().var(correction=0).item(), rel=0.03, abs=1e-8)


@pytest.mark.slow
def test_humanoid_stays_finite(monkeypatch, tmp_path):
    """Some of its dimensions never change."""
    argv = "--env-id Humanoid-v5 --num-steps 64 --num-minibatches 4 --update-epochs 1 --total-timesteps 1024".split()
    end = run(load("gipo_continuous"), monkeypatch, tmp_path, argv)
    assert end.iteration == 1
    assert (end.agent.obs_stats.var >= 0).all()


def test_more_samples_than_torch_quantile_takes():
    samples = torch.zeros(2**24 + 1)
    logged = load("gipo_continuous").diagnostics(samples, samples + 1)
    assert logged["offpolicy/abs_logratio_p95"] == 0 and logged["offpolicy/ess"] == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "kind", "what"),
    [
        ("NanObservation", "", "observations"),
        ("NanReward", "", "rewards"),
        *(
            ("InfiniteReward", kind, "rewards") for kind in SCRIPT_OF
        ),  # Atari's are clipped before they are learned from
    ],
)
def test_what_is_not_finite_is_named_and_not_saved(name, kind, what, refused, tmp_path):
    flags = [*iterations(12), "--checkpoint-interval", 1]
    error = refused(load(SCRIPT_OF[kind]), fault(name + kind, *flags), code=1)
    assert f"'{what}'" in error and "iteration 9" in error and "keeps its last checkpoint" in error
    assert checkpoint_of(tmp_path)["iteration"] == 9
    assert all(tensor.isfinite().all() for tensor in checkpoint_of(tmp_path)["agent"].values())


# -------------------------------------------------- what steps report -------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "rates"),
    [
        *(("NumpySuccess", kind, {1}) for kind in SCRIPT_OF),
        ("SuccessAtEnd", "", {1}),
        ("SuccessSometimes", "", {0, 1}),  # and what lies between
        ("TextSuccess", "", set()),
        ("TextSuccess", "Grid", set()),
        ("DictSuccess", "", set()),
    ],
)
def test_success_of_any_type(name, kind, rates, monkeypatch, tmp_path):
    run(load(SCRIPT_OF[kind]), monkeypatch, tmp_path, fault(name + kind, "--eval-episodes", 3))
    logged = scalars(tmp_path)
    for prefix in ("charts", "eval"):
        assert f"{prefix}/episodic_return" in logged
        found = {rate for _, rate in logged.get(f"{prefix}/success_rate", [])}
        assert bool(found) == bool(rates)
        assert all(min(rates) <= rate <= max(rates) for rate in found)


@every_kind
@pytest.mark.parametrize("name", ["NumpyReward", "Recorded"])
def test_wrapped_environments(name, kind, monkeypatch, tmp_path):
    """Rewards of a type of numpy's, and episodes that the environment records itself."""
    run(load(SCRIPT_OF[kind]), monkeypatch, tmp_path, fault(name + kind, "--eval-episodes", 3))
    assert {"charts/episodic_return", "eval/episodic_return"} <= scalars(tmp_path).keys()


@every_kind
def test_the_environment_s_own_success_holds(kind, monkeypatch, tmp_path):
    run(load(SCRIPT_OF[kind]), monkeypatch, tmp_path, fault(f"OwnSuccess{kind}", "--eval-episodes", 3))
    logged = scalars(tmp_path)
    assert {rate for _, rate in logged["charts/success_rate"] + logged["eval/success_rate"]} == {0}


@every_kind
def test_an_evaluation_ends_without_a_time_limit(kind, monkeypatch, tmp_path, capsys):
    module = load(SCRIPT_OF[kind])
    assert module.EVAL_STEPS == 30_000
    module.EVAL_STEPS = 20
    run(module, monkeypatch, tmp_path, fault(f"Unending{kind}", "--eval-episodes", 3, *iterations(1)))
    assert "0 of 3 episodes ended within 20 steps: {}" in capsys.readouterr().out


# ---------------------------------------------------- environments ----------------------------------------------------


@pytest.mark.parametrize(("name", "domain"), ENTRIES)
@pytest.mark.parametrize("env_id", [".fault_envs:Plain-v0", "./fault_envs.py:Plain-v0"])
def test_a_path_is_no_module(env_id, name, domain, refused, tmp_path):
    assert "--env-id" in refused(load(name), [*domain, "--env-id", env_id])
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_a_path_is_no_module_of_a_run_either(flag, refused, monkeypatch, tmp_path):
    run(load("gipo_continuous"), monkeypatch, tmp_path, [*BAR, *iterations(1)])
    argv = [flag, folder_of(tmp_path), *iterations(2), "--env-id", ".fault_envs:Plain-v0", "--eval-episodes", 1]
    assert "--env-id" in refused(load("gipo_continuous"), argv)


def test_only_actions_that_the_grid_has(monkeypatch, tmp_path):
    end = run(
        load("gipo_minigrid_vision"), monkeypatch, tmp_path, fault("FewGrid", *iterations(16), "--eval-episodes", 3)
    )
    assert end.agent.actor.out_features == 3


@pytest.mark.parametrize("kind", ["Frames", "Grid"])
def test_actions_that_do_not_count_from_zero(kind, refused, tmp_path):
    assert "actions that count from 0" in refused(load(SCRIPT_OF[kind]), fault(f"Start5{kind}"))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("name", "word"), [("LateWord", "elephant"), ("Digits", "3"), ("Greek", "πόρτα")])
def test_words_outside_of_the_vocabulary(name, word, refused):
    error = refused(load("gipo_minigrid_vision"), fault(f"{name}Grid", *iterations(90)))
    assert f"'{word}'" in error and "VOCABULARY" in error


def test_a_wide_action_range_is_named(monkeypatch, tmp_path, capsys):
    run(load("gipo_continuous"), monkeypatch, tmp_path / "wide", fault("Wide"))
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert "1000" in warning
    run(load("gipo_continuous"), monkeypatch, tmp_path / "plain", fault("Plain"))
    assert "warning" not in capsys.readouterr().out


# ------------------------------------------------------- streams ------------------------------------------------------


def test_no_two_streams_of_environments_overlap():
    """Of any two seeds, and of the start, the resumed parts and the evaluation of a run."""
    stream_seed = load("gipo_continuous").stream_seed
    starts = sorted(stream_seed(seed, part) for seed in range(40) for part in (*range(5), 50, 100, 10**9))
    assert min(np.diff(starts)) >= 64
    assert 0 <= starts[0] and starts[-1] + 64 < 2**31


@every_kind
def test_no_two_seeds_share_a_stream(kind, monkeypatch, tmp_path):
    first = []
    for seed in (1, 2, 3):
        argv = fault(f"Noise{kind}", *iterations(1), "--seed", seed)
        first += run(load(SCRIPT_OF[kind]), monkeypatch, tmp_path / str(seed), argv).buffer.obs[0, 0]
    assert len(torch.stack(first).unique(dim=0)) == 3 * 2


@every_kind
def test_no_two_parts_of_a_run_share_a_stream(kind, monkeypatch, tmp_path):
    resets = watch(monkeypatch, gym.vector.SyncVectorEnv, "reset", lambda self, *, seed=None, options=None: seed)
    run(load(SCRIPT_OF[kind]), monkeypatch, tmp_path, fault(f"Noise{kind}", "--eval-episodes", 2))
    argv = ["--resume", folder_of(tmp_path), *iterations(8), "--eval-episodes", 2]
    run(load(SCRIPT_OF[kind]), monkeypatch, tmp_path, argv)
    start, evaluation, resumed = dict.fromkeys(resets)
    assert min(abs(start - evaluation), abs(start - resumed), abs(evaluation - resumed)) >= 64


# ---------------------------------------------------- command line ----------------------------------------------------


def test_a_run_killed_before_its_first_iteration_is_over_resumes_as_itself(monkeypatch, tmp_path):
    module = load("gipo_continuous")
    at_iteration(module, monkeypatch, 0, lambda: send(signal.SIGKILL))
    os.waitpid(fork_run(module, monkeypatch, tmp_path, fault("Plain", "--seed", 7)), 0)
    end = run(load("gipo_continuous"), monkeypatch, tmp_path, ["--resume", folder_of(tmp_path)])
    assert end.args.env_id == "fault_envs:Plain-v0" and end.args.seed == 7
    assert checkpoint_of(tmp_path)["iteration"] == 4


@pytest.mark.parametrize("steps", [[], iterations(1), iterations(2)])
def test_a_resumed_run_without_steps_left(steps, refused, monkeypatch, tmp_path):
    run(load("gipo_continuous"), monkeypatch, tmp_path, [*BAR, *iterations(2)])
    before = {path.name: path.read_bytes() for path in folder_of(tmp_path).iterdir()}
    error = refused(load("gipo_continuous"), ["--resume", folder_of(tmp_path), *steps])
    assert "--total-timesteps" in error and f"at least {3 * ROLLOUT}" in error
    assert before == {path.name: path.read_bytes() for path in folder_of(tmp_path).iterdir()}


@every_kind
@pytest.mark.parametrize("name", ["Plain", "Undrawn", "NoPicture"])
def test_a_video_that_cannot_be_drawn_is_refused_before_training(name, kind, refused, monkeypatch, tmp_path):
    """No render mode, no `render`, and no picture from it; in training, and in the evaluation of a run."""
    argv = fault(name + kind)
    video = ["--capture-video", "--eval-episodes", 1]
    assert "--capture-video" in refused(load(SCRIPT_OF[kind]), [*argv, *video])
    assert not [*tmp_path.iterdir()]
    run(load(SCRIPT_OF[kind]), monkeypatch, tmp_path, argv)
    for flags in (["--evaluate"], [*iterations(8), "--resume"]):
        assert "--capture-video" in refused(load(SCRIPT_OF[kind]), [*video, *flags, folder_of(tmp_path)])
    assert checkpoint_of(tmp_path)["iteration"] == 4


@every_kind
def test_frames_are_written_as_they_come(kind, monkeypatch, tmp_path):
    """From an environment that does not say how many frames make a second."""
    from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter

    module, events = load(SCRIPT_OF[kind]), []
    evaluate = module.evaluate

    def watched(*args):
        with monkeypatch.context() as patch:
            watch(patch, FFMPEG_VideoWriter, "write_frame", lambda *_: events.append("frame"))
            watch(patch, gym.vector.SyncVectorEnv, "step", lambda *_: events.append("step"))
            return evaluate(*args)

    module.evaluate = watched
    run(module, monkeypatch, tmp_path, fault(f"Drawn{kind}", "--capture-video", "--eval-episodes", 1))
    ((_, length),) = scalars(tmp_path)["eval/episodic_length"]
    assert events == ["frame", "step"] * int(length)
    assert (folder_of(tmp_path) / f"{4 * ROLLOUT}.mp4").stat().st_size > 0


def test_the_name_of_an_experiment_is_no_path(monkeypatch, tmp_path):
    run(load("gipo_continuous"), monkeypatch, tmp_path, fault("Plain", "--exp-name", "../a:b/c"))
    assert re.fullmatch(r"fault_envs-Plain-v0__[.-]+a-b-c__1__\d+", folder_of(tmp_path).name)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.slow
def test_closed_stderr(tmp_path):
    argv = [sys.executable, ROOT / "gipo_continuous.py", *fault("Plain", "--eval-episodes", 1)]
    shell = ["sh", "-c", '"$@" 2>&-', "sh", *map(str, argv)]
    result = subprocess.run(shell, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0 and "1 of 1 episodes ended" in result.stdout


@pytest.mark.parametrize(("name", "domain"), ENTRIES)
def test_help_warns_that_a_longer_run_raises_the_learning_rate(name, domain, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(load(name), monkeypatch, tmp_path, [*domain, "--help"])
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert re.search("annealed learning rate jumps? up", text)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_writes_whole_numbers_out(name):
    assert not re.search(r": int.*\n +\"{3}.*\de\d", source(name)), "whole numbers are not accepted as 1e6"
