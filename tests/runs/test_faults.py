"""What has ended or spoiled runs of this and of other projects, and what should happen instead."""

import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import fault_envs
import gymnasium as gym
import numpy as np
import pytest
import torch
from harness import ROOT, scalars, watch
from short_runs import (
    BASELINES,
    CONTINUOUS,
    MINIGRID,
    ROLLOUT,
    SIX,
    THREE,
    at_iteration,
    cases,
    checkpoint_of,
    environment,
    four,
    send,
    six,
    the_folder,
    three,
    tiny,
)
from tensorboard.summary.writer.record_writer import RecordWriter

HERE = Path()


# ----------------------------------------------------- not finite ----------------------------------------------------
def test_humanoid_stays_finite():
    """Some of its dimensions never change."""
    agent, _ = CONTINUOUS.train("gymnasium:Humanoid-v5", 8)
    assert (agent.obs_stats.var >= 0).all()


@pytest.mark.slow
def test_more_samples_than_torch_quantile_takes():
    samples = torch.zeros(2**24 + 1, 1)
    logged = CONTINUOUS.module.diagnostics(samples, samples + 1, CONTINUOUS.args("Plain"))
    assert logged["offpolicy/abs_logratio_p95"] == 0 and logged["offpolicy/ess"] == pytest.approx(1, rel=1e-3)


NOT_FINITE = cases(SIX, "InfiniteReward", "rewards", 9) + cases(SIX, "NanEarly", "rewards", 0)
NOT_FINITE += [(CONTINUOUS, "NanReward", "rewards", 9), (CONTINUOUS, "NanObservation", "observations", 9)]


@pytest.mark.parametrize(("entry", "env", "what", "iteration"), NOT_FINITE, ids=str)
def test_what_is_not_finite_is_named_and_not_saved(entry, env, what, iteration):
    """Atari's rewards are clipped before they are learned from, and are checked all the same."""
    with pytest.raises(FloatingPointError, match=rf"^\['{what}'.* iteration {iteration}; .* keeps its last checkpoint"):
        entry.train(env, 12, checkpoint_interval=1)
    checkpoint = checkpoint_of(the_folder())
    assert checkpoint["iteration"] == iteration
    assert all(tensor.isfinite().all() for tensor in checkpoint["agent"].values())


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(refused, monkeypatch):
    policy_loss, nans = CONTINUOUS.module.policy_loss, []

    def poisoned(*args):
        return policy_loss(*args) * (nans[0] if nans else 1)

    monkeypatch.setattr(CONTINUOUS.module, "policy_loss", poisoned)
    at_iteration(CONTINUOUS.module, monkeypatch, 4, lambda: nans.append(np.nan))
    error = refused(CONTINUOUS, *tiny("Plain", 8), "--checkpoint-interval", 2, code=1)
    assert "losses/policy_loss" in error and "iteration 4" in error and the_folder().name in error
    checkpoint = checkpoint_of(the_folder())
    assert checkpoint["iteration"] == 4
    assert all(tensor.isfinite().all() for tensor in checkpoint["agent"].values())


# -------------------------------------------------- what steps report -------------------------------------------------
SUCCESS = cases(SIX, "NumpySuccess", {1}) + cases(THREE, "OwnSuccess", {0}) + cases(THREE[:2], "SuccessAtEnd", {1})


@pytest.mark.parametrize(("entry", "env", "rates"), SUCCESS, ids=str)
def test_success_of_any_numeric_type(entry, env, rates):
    entry.train(env, eval_episodes=3)
    logged = scalars(HERE)
    for prefix in ("charts", "eval"):
        assert {rate for _, rate in logged[f"{prefix}/success_rate"]} == rates


@pytest.mark.parametrize(("env", "evaluated"), [("SuccessSometimes", 0.5), ("SuccessLate", None)])
def test_a_success_that_is_reported_alone_is_a_rate_among_all_episodes(env, evaluated):
    """One early or late episode of every other environment succeeds, and nothing is said of the others."""
    _, folder = CONTINUOUS.train(env, 12, num_envs=4, num_steps=48)
    args, weights = CONTINUOUS.args(env, eval_episodes=4), checkpoint_of(folder)["agent"]
    ((_, rate),) = scalars(HERE)["charts/success_rate"]
    assert 0.04 < rate < 0.12  # two of some 26 episodes
    assert CONTINUOUS.module.evaluate(args, weights, None).get("eval/success_rate") == evaluated


@three
@pytest.mark.parametrize("env", ["NumpyReward", "Recorded"])
def test_wrapped_environments(env, entry):
    """Rewards of a type of numpy's, and episodes that the environment records itself."""
    entry.train(env, eval_episodes=3)
    assert {"charts/episodic_return", "eval/episodic_return"} <= scalars(HERE).keys()


@six
def test_lives_outside_of_the_emulator_are_ignored(entry):
    """A run where info["life_lost"] is true is the run where it is missing."""
    first, second = (checkpoint_of(entry.train(env, 2)[1]) for env in ("Plain", "LifeLost"))
    assert first["buffer"]["terminated"].any()
    for part in ("buffer", "agent"):
        assert all(torch.equal(tensor, second[part][name]) for name, tensor in first[part].items())


@three
def test_an_evaluation_ends_without_a_time_limit(entry, monkeypatch, capsys):
    assert entry.module.EVAL_STEPS == 30_000
    monkeypatch.setattr(entry.module, "EVAL_STEPS", 20)
    entry.train("Unending", 1, eval_episodes=3)
    assert "0 of 3 episodes ended within 20 steps: {}" in capsys.readouterr().out


# ------------------------------------------------- open environments -------------------------------------------------
@six
def test_environments_are_closed_before_the_evaluation_and_after_it(entry, monkeypatch):
    """Some can exist only once: at each start none is open."""
    started = watch(monkeypatch, entry.module, "start_envs", lambda *_, **__: len(fault_envs.OPEN))
    entry.train("Drawn", 1, capture_video=True, eval_episodes=2)
    assert started == [0, 0, 0] and not fault_envs.OPEN  # a first picture, the training, the evaluation


@six
@pytest.mark.parametrize("when", ["rollout", "update", "evaluation", "signal", "not finite", "device"])
def test_environments_are_closed_when_a_run_fails(when, entry, monkeypatch):
    module = entry.module
    env = {"rollout": "Broken", "not finite": "NanEarly"}.get(when, "Plain")
    if when == "update":
        monkeypatch.setattr(module, "update", None)
    if when == "evaluation":
        monkeypatch.setattr(module, "ended_episodes", lambda _, playing=None: [] if playing is None else 1 / 0)
    if when == "signal":
        at_iteration(module, monkeypatch, 0, lambda: send(signal.SIGTERM))
    failure = ZeroDivisionError, TypeError, SystemExit, FloatingPointError, module.InputError
    with pytest.raises(failure) as error:
        entry.train(env, eval_episodes=1, device="tpu" if when == "device" else "cpu")
    assert not fault_envs.OPEN
    del error


@four
@pytest.mark.parametrize("flag", ["", "evaluate"])
def test_a_fault_in_the_network_keeps_its_traceback(flag, entry, monkeypatch):
    """It is no mistake in the input: whoever edits the script must see its line."""
    args = entry.args("Plain", eval_episodes=1)
    weights = checkpoint_of(entry.train("Plain", 1)[1])["agent"]
    monkeypatch.setattr(args.Agent, "__init__", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        entry.module.evaluate(args, weights, None) if flag else entry.module.train(args)
    assert not fault_envs.OPEN


# ---------------------------------------------------- environments ---------------------------------------------------
@pytest.mark.parametrize("entry", cases([MINIGRID, BASELINES[2]]), ids=str)
def test_only_actions_that_the_grid_has(entry):
    agent, _ = entry.train("Few", 16, eval_episodes=3)
    assert agent.actor.out_features == 3


@pytest.mark.parametrize("entry", cases([CONTINUOUS, BASELINES[0]]), ids=str)
@pytest.mark.parametrize(("env", "bound"), [("Wide", "1000"), ("Tiny", "0.01"), ("Plain", None)])
def test_action_ranges_that_the_policy_does_not_reach_are_named(env, bound, entry, capsys):
    entry.train(env, 1)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == bool(bound) and all(bound in warning for warning in warnings)


# ------------------------------------------------------- streams -----------------------------------------------------
def test_no_two_streams_of_environments_overlap():
    """Of any two seeds, and of the start, the resumed parts and the evaluation of a run."""
    stream = CONTINUOUS.module.seed_everything
    starts = sorted(stream(seed, part) for seed in range(40) for part in (*range(5), 50, 100, 10**9))
    assert min(np.diff(starts)) >= 64
    assert 0 <= starts[0] and starts[-1] + 64 < 2**31


@three
def test_no_two_seeds_share_a_stream(entry):
    first = []
    for seed in (1, 2, 3):
        _, folder = entry.train("Noise", 1, seed=seed)
        first += checkpoint_of(folder)["buffer"]["obs"][0, 0]
    assert len(torch.stack(first).unique(dim=0)) == 3 * 2


@three
def test_no_two_parts_of_a_run_share_a_stream(entry, monkeypatch):
    resets = watch(monkeypatch, gym.vector.SyncVectorEnv, "reset", lambda self, *, seed=None, options=None: seed)
    _, folder = entry.train("Noise", eval_episodes=2)
    entry.resume(folder, total_timesteps=8 * ROLLOUT, eval_episodes=2)
    start, evaluation, resumed = dict.fromkeys(resets)
    assert len(resets) == 4 and min(abs(start - evaluation), abs(start - resumed), abs(evaluation - resumed)) >= 64


@six
def test_the_seed_decides_for_environments_that_draw_from_the_generators_of_the_program(entry):
    """Two starts with one seed are equal, two resumed parts too; and another seed is another run."""

    def weights(start, *args, **values):
        agent, _ = start(*args, **values)
        return torch.cat([tensor.flatten().double() for tensor in agent.state_dict().values()])

    first = weights(entry.train, "GlobalRandom", 2)
    folder = the_folder()
    saved = (folder / "checkpoint.pt").read_bytes()
    assert torch.equal(first, weights(entry.train, "GlobalRandom", 2))
    assert not torch.equal(first, weights(entry.train, "GlobalRandom", 2, seed=2))
    resumed = weights(entry.resume, folder, total_timesteps=4 * ROLLOUT)
    (folder / "checkpoint.pt").write_bytes(saved)
    assert torch.equal(resumed, weights(entry.resume, folder, total_timesteps=4 * ROLLOUT))


# ------------------------------------------------------- video -------------------------------------------------------
@three
def test_frames_are_written_as_they_come(entry, monkeypatch):
    """From an environment that does not say how many frames make a second."""
    from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter

    _, folder = entry.train("Drawn", 1)
    args, weights = entry.args("Drawn", capture_video=True), checkpoint_of(folder)["agent"]
    events = watch(monkeypatch, FFMPEG_VideoWriter, "write_frame", lambda *_: "frame")
    watch(monkeypatch, gym.vector.SyncVectorEnv, "step", lambda *_: events.append("step"))
    found = entry.module.evaluate(args, weights, folder / "video.mp4")
    assert events == ["frame", "step"] * int(found["eval/episodic_length"])
    assert (folder / "video.mp4").stat().st_size > 0


@six
@pytest.mark.parametrize("failure", ["renderer", "encoder"])
def test_a_picture_that_fails_later_costs_no_evaluation(failure, entry, monkeypatch, capsys):
    """The renderer breaks, or the encoder dies."""
    from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter

    if failure == "encoder":
        watch(monkeypatch, FFMPEG_VideoWriter, "write_frame", lambda self, _: self.proc.kill() or self.proc.wait())
    env = {"renderer": "DrawnAtFirst", "encoder": "Drawn"}[failure]
    entry.train(env, 1, capture_video=True, eval_episodes=1)
    assert scalars(HERE)["eval/episodic_length"]
    assert "warning: the video ends early" in capsys.readouterr().out


# ----------------------------------------------------- full disk -----------------------------------------------------
def whole(folder: Path, content: bytes) -> bool:
    return (folder / "checkpoint.pt").read_bytes() == content and not (folder / "checkpoint.tmp").exists()


@six
def test_a_disk_that_is_full_costs_nothing_that_was_saved(entry, refused, monkeypatch):
    """torch.save meets it; the limit on the size of files stands in for the disk."""
    _, folder = entry.train("Plain", 2)
    before, limits = (folder / "checkpoint.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        error = refused(entry, "--resume", folder, "--total-timesteps", 99, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "too large" in error or "checkpoint.tmp cannot be written" in error
    assert whole(folder, before) and not fault_envs.OPEN


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@six
def test_a_disk_that_is_full_when_tensorboard_writes(entry, refused, monkeypatch):
    written = watch(monkeypatch, RecordWriter, "write", lambda *_: full() if len(written) > 50 else None)

    def full():
        raise OSError(28, "No space left on device")

    _, folder = entry.train("Plain", 1)
    assert "No space left" in refused(entry, "--resume", folder, "--total-timesteps", 40 * ROLLOUT, code=1)
    assert checkpoint_of(folder)["iteration"] == 1 and not (folder / "checkpoint.tmp").exists()
    assert not fault_envs.OPEN


@pytest.mark.slow
def test_a_log_that_fills_the_disk_ends_in_one_sentence():
    """A run of its own, because TensorBoard writes in a thread; its log outgrows the checkpoint."""
    flags = [*tiny("Plain", 10**6), "--update-epochs", 1, "--checkpoint-interval", 10**6]
    CONTINUOUS.train("Plain", 1)
    limit = (the_folder() / "checkpoint.pt").stat().st_size // 1024 + 2
    command = ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "-", sys.executable, ROOT / "gipo_continuous.py", *flags]
    result = subprocess.run([*map(str, command)], env=environment(), cwd=HERE, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: "), "TensorBoard's thread may complain, but not last"
    folder = max(Path("runs").iterdir(), key=lambda run: int(run.name.split("__")[-1]))  # the newest
    assert checkpoint_of(folder)["iteration"] == 0 and not (folder / "checkpoint.tmp").exists()


def test_a_folder_that_cannot_be_written(refused):
    Path("runs").write_text("a file stands where the folder should be")
    assert "runs" in refused(CONTINUOUS, *tiny("Plain"), code=1)


def test_the_name_of_an_experiment_is_no_path(tmp_path):
    _, folder = CONTINUOUS.train("Plain", exp_name="../a:b/c")
    assert re.fullmatch(r"fault_envs-Plain-v0__[.-]+a-b-c__1__[\w.,=-]+__\d+", folder.name)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"] and the_folder().name == folder.name


# ------------------------------------------------------ threads ------------------------------------------------------
@six
def test_the_usual_variable_decides_about_threads(entry, monkeypatch):
    chosen = watch(monkeypatch, torch, "set_num_threads", lambda n: n)
    for variable, calls in (("3", 0), (None, 1)):
        monkeypatch.setenv("OMP_NUM_THREADS", variable) if variable else monkeypatch.delenv("OMP_NUM_THREADS")
        _, folder = entry.train("Plain", 1)
        assert len(chosen) == calls  # for those who call `train`, too
        chosen.clear()
        entry.main(monkeypatch, "--evaluate", folder, "--eval-episodes", 1)
        assert len(chosen) == calls
        chosen.clear()


@pytest.mark.slow
def test_the_number_of_threads_is_what_the_variable_says():
    code = "import torch, gipo_continuous as script; script.main(); print(torch.get_num_threads())"
    command = [sys.executable, "-c", code, *map(str, tiny("Plain", 1))]
    out = subprocess.run(command, env=environment(OMP_NUM_THREADS="2"), capture_output=True, text=True).stdout
    assert out.splitlines()[-1] == "2"


@pytest.mark.slow
def test_two_runs_at_once_are_not_slower_than_one():
    """Seconds of CPU, because others may use this machine too; threads that wait for each other burn them."""
    variables = {name: value for name, value in environment().items() if not name.startswith("OMP_")}
    flags = "--env-id Hopper-v5 --total-timesteps 4096 --eval-episodes 0 --seed".split()

    def seconds(*seeds):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        commands = [[sys.executable, ROOT / "gipo_continuous.py", *flags, str(seed)] for seed in seeds]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        runs = [subprocess.Popen(command, env=variables, **quiet) for command in commands]
        try:
            assert [run.wait(timeout=120) for run in runs] == [0] * len(seeds)
        finally:
            for run in runs:
                run.kill()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / len(seeds)

    assert seconds(2, 3) < 1.5 * seconds(1)
