"""Checkpoints, resuming, evaluation: what a checkpoint promised is not lost, and a loaded agent is the saved one."""

import contextlib
import functools
import itertools
import os
import random
import shutil
import signal
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import mujoco
import numpy as np
import pytest
import torch
from harness import scalars, watch
from short_runs import (
    ATARI,
    BASELINES,
    CONTINUOUS,
    FOUR,
    MINIGRID,
    REAL,
    ROLLOUT,
    SIX,
    THREE,
    at_iteration,
    backdate_logs,
    cases,
    checkpoint_of,
    fork,
    four,
    kill,
    send,
    six,
    the_folder,
)

BAR = "probes:Bar-v0"
PROBES = {"": BAR, "Frames": "probes:BarFrames-v0", "Grid": "probes:BarGrid-v0"}


def equal(a, b):
    """Whether two nested states hold the same keys and, to the bit, the same tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


# ------------------------------------------------------ resuming -----------------------------------------------------
@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("epochs", [1, 8])
@four
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(entry, epochs, lag, monkeypatch, tmp_path, capsys):
    logs, checkpoints = [], []
    for interrupted in (False, True):
        monkeypatch.chdir(tmp_path)
        (tmp_path / str(interrupted)).mkdir()
        monkeypatch.chdir(tmp_path / str(interrupted))
        with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
            if interrupted:
                at_iteration(entry.module, patch, 3, lambda: send(signal.SIGTERM))
                stop = stack.enter_context(pytest.raises(SystemExit))
            entry.train(PROBES[entry.kind], 6, buffer_epochs=epochs, policy_lag=lag)
        if interrupted:
            assert stop.value.code == 128 + signal.SIGTERM and "--resume" in capsys.readouterr().out
            backdate_logs(the_folder())
            entry.main(monkeypatch, "--resume", the_folder())
            assert f"goes on after step {4 * ROLLOUT}" in capsys.readouterr().out
        checkpoints.append(checkpoint_of(the_folder()))
        logs.append(scalars(tmp_path / str(interrupted)))
        del logs[-1]["charts/SPS"]
    first, second = checkpoints
    assert first["iteration"] == 6
    for part in first:
        assert equal(first[part], second[part]), part
    assert logs[0] == logs[1]
    assert [step for step, _ in logs[1]["losses/policy_loss"]] == [ROLLOUT * (i + 1) for i in range(6)]


def test_what_was_logged_after_the_checkpoint_is_logged_once(monkeypatch, tmp_path):
    """Three iterations after a checkpoint the power fails; in the end every step is there once."""
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        at_iteration(CONTINUOUS.module, patch, 7, lambda: 1 / 0)
        CONTINUOUS.train(BAR, 12, checkpoint_interval=4)
    assert scalars(tmp_path)["charts/SPS"][-1][0] == 7 * ROLLOUT
    assert checkpoint_of(the_folder())["iteration"] == 4
    backdate_logs(the_folder())
    CONTINUOUS.resume(the_folder())
    for tag in ("charts/SPS", "losses/value_loss", "charts/episodic_return"):
        assert [step for step, _ in scalars(tmp_path)[tag]] == [ROLLOUT * (i + 1) for i in range(12)]


@six
def test_flags_hold_unless_they_are_given_anew(entry, monkeypatch):
    """A longer run grows out of a finished one. A flag set back to the script's default holds too."""
    _, folder = entry.train(PROBES[entry.kind], 1, seed=3, kl_coef=1.0, ent_coef=0.1, anneal_lr=False, eval_episodes=7)
    resume = ["--resume", folder, "--total-timesteps"]
    default = type(entry.args(BAR))().kl_coef
    entry.main(monkeypatch, *resume, 2 * ROLLOUT, "--kl-coef", default, "--anneal-lr", "--vf-coef", 0.25)
    first = checkpoint_of(folder)["args"]
    entry.main(monkeypatch, *resume, 3 * ROLLOUT)
    again = checkpoint_of(folder)
    assert again["args"] == first | {"total_timesteps": 3 * ROLLOUT} and again["iteration"] == 3
    flags = [first[name] for name in ("seed", "ent_coef", "kl_coef", "anneal_lr", "vf_coef", "num_steps")]
    assert flags == [3, 0.1, default, True, 0.25, 8]
    assert not {"resume", "evaluate", "eval_episodes", "capture_video"} & again["args"].keys()


FIXED = ["--num-steps 16", "--num-envs 4", "--buffer-epochs 2", "--policy-lag 1", "--env-id CartPole-v1"]
FIXED = [case for flags in FIXED for case in cases(SIX, flags)]
FIXED += [(CONTINUOUS, "--ratio dimension"), (BASELINES[0], "--ratio action")]


@pytest.mark.parametrize(("entry", "flags"), FIXED, ids=str)
def test_flags_that_do_not_fit_the_checkpoint_are_refused(entry, flags, saved, refused, monkeypatch):
    folder = saved(entry)
    error = refused(entry, "--resume", folder, "--total-timesteps", 900, *flags.split())
    assert flags.split()[0] in error and "cannot change" in error
    assert [path.name for path in folder.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("steps", [[], ["--total-timesteps", ROLLOUT], ["--total-timesteps", 2 * ROLLOUT]])
def test_a_resumed_run_without_steps_left(steps, refused):
    _, folder = CONTINUOUS.train(BAR, 2)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    error = refused(CONTINUOUS, "--resume", folder, *steps)
    assert f"at least {3 * ROLLOUT}, because {folder} is finished." in error
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


# ------------------------------------------------------- kills -------------------------------------------------------
@pytest.mark.slow
def test_five_kills(monkeypatch, tmp_path):
    """kill -9 at random moments, and twice inside the save; each time the run goes on where the checkpoint was."""
    rng = random.Random(5)
    flags = {"total_timesteps": 10**9, "checkpoint_interval": 3}
    CONTINUOUS.train(BAR, 1)  # torch loads some parts late
    shutil.rmtree("runs")
    last = 0

    def saved_anew():
        return any(torch.load(path)["iteration"] > last for path in tmp_path.glob("runs/*/checkpoint.pt"))

    def ended(child):
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)

    for inside in (False, True, False, True, False):
        with monkeypatch.context() as patch:
            if inside:
                files = itertools.count(1)
                watch(patch, os, "fsync", lambda _, files=files: next(files) == 3 and send(signal.SIGKILL))
            start = (CONTINUOUS.resume, the_folder()) if last else (CONTINUOUS.train, BAR)
            child = fork(*start, **flags)
        try:
            deadline = time.time() + 60
            while not (ended(child) if inside else saved_anew()):
                assert time.time() < deadline
                time.sleep(rng.uniform(0, 0.2))
        finally:
            kill(child)
        assert (the_folder() / "checkpoint.tmp").exists() or not inside
        iteration = checkpoint_of(the_folder())["iteration"]
        assert iteration > last and iteration % 3 == 0
        last = iteration
        backdate_logs(the_folder())
    steps = [step for step, _ in scalars(tmp_path)["charts/SPS"]]
    assert steps == [ROLLOUT * (i + 1) for i in range(len(steps))]
    assert last <= len(steps)


def test_a_run_killed_before_its_first_iteration_is_over_resumes_as_itself(monkeypatch):
    with monkeypatch.context() as patch:
        at_iteration(CONTINUOUS.module, patch, 0, lambda: send(signal.SIGKILL))
        os.waitpid(fork(CONTINUOUS.train, BAR, 4, seed=7), 0)
    assert CONTINUOUS.main(monkeypatch, "--resume", the_folder()) is None
    checkpoint = checkpoint_of(the_folder())
    assert checkpoint["iteration"] == 4 and checkpoint["args"]["seed"] == 7 and checkpoint["args"]["env_id"] == BAR


@four
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_iteration_and_saves(number, entry, monkeypatch, tmp_path, capsys):

    def unhandled(*_):
        raise AssertionError("nobody catches the signal")

    before = signal.signal(number, unhandled)
    at_iteration(entry.module, monkeypatch, 2, lambda: send(number))
    try:
        with pytest.raises(SystemExit) as stop:
            entry.train("Plain", 100)
        assert stop.value.code == 128 + number and signal.getsignal(number) is unhandled
    finally:
        signal.signal(number, before)
    assert f"stopped after step {3 * ROLLOUT}" in capsys.readouterr().out
    assert checkpoint_of(the_folder())["iteration"] == 3
    assert scalars(tmp_path)["charts/SPS"][-1][0] == 3 * ROLLOUT


@four
def test_a_second_signal_ends_the_run_at_once(entry, monkeypatch):
    """As if nobody had caught it: Ctrl-C interrupts Python, SIGTERM ends the process.

    It may come as soon as the answer to the first is there.
    """
    number = signal.SIGINT

    def answered(*words, **settings):
        print(*words, **settings)
        if "once more" in str(words):
            send(number)

    monkeypatch.setattr(entry.module, "print", answered, raising=False)
    before = signal.default_int_handler
    signal.signal(signal.SIGINT, before)  # a shell starts its background jobs without it
    at_iteration(entry.module, monkeypatch, 2, lambda: send(number))
    with pytest.raises(KeyboardInterrupt):
        entry.train("Plain", 100)
    assert checkpoint_of(the_folder())["iteration"] == 0 and signal.getsignal(signal.SIGINT) is before
    shutil.rmtree("runs")
    number = signal.SIGTERM
    at_iteration(entry.module, monkeypatch, 2, lambda: send(number))
    _, status = os.waitpid(fork(entry.train, "Plain", 100), 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM
    assert checkpoint_of(the_folder())["iteration"] == 0


def test_a_run_in_another_thread():
    """Only the main thread may handle signals; a sweep of wandb trains in another one."""
    with ThreadPoolExecutor() as threads:
        _, folder = threads.submit(CONTINUOUS.train, "Plain").result()
    assert checkpoint_of(folder)["iteration"] == 4


def test_signals_are_ordinary_again_during_the_evaluation(monkeypatch):
    def handlers(*_):
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    seen = watch(monkeypatch, CONTINUOUS.module, "evaluate", handlers)
    CONTINUOUS.train(BAR, 1, eval_episodes=1)
    assert seen == [handlers()]


# ------------------------------------------------------ the file -----------------------------------------------------
@functools.cache
def first_run(entry) -> bytes:
    """The checkpoint of a run of two iterations."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        _, folder = entry.train(PROBES[entry.kind], 2)
        return (folder / "checkpoint.pt").read_bytes()


@pytest.fixture
def saved(tmp_path):
    """Returns the folder of a run of an entry, of two iterations, without its logs."""

    def saved(entry):
        folder = tmp_path / "runs" / "saved"
        folder.mkdir(parents=True)
        (folder / "checkpoint.pt").write_bytes(first_run(entry))
        return folder

    return saved


@pytest.mark.parametrize("fails", ["torch.save", "os.fsync", "Path.replace"])
def test_only_a_rename_replaces_a_checkpoint(fails, saved, monkeypatch, tmp_path):
    """Whatever fails on the way, the last file is whole and no other one stays."""
    folder = saved(CONTINUOUS)
    before = (folder / "checkpoint.pt").read_bytes()
    owner = {"torch": torch, "os": os, "Path": type(tmp_path)}[fails.split(".")[0]]
    failed = watch(monkeypatch, owner, fails.split(".")[1], lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        CONTINUOUS.resume(folder, total_timesteps=99)
    assert (folder / "checkpoint.pt").read_bytes() == before and not failed
    assert [path.name for path in folder.iterdir()] == ["checkpoint.pt"]


def test_a_checkpoint_is_never_ahead_of_the_log(monkeypatch):
    events = watch(monkeypatch, CONTINUOUS.module.SummaryWriter, "flush", lambda _: "log")
    watch(monkeypatch, CONTINUOUS.module, "save_checkpoint", lambda *_: events.append("checkpoint"))
    CONTINUOUS.train(BAR, 4, checkpoint_interval=2)
    assert events[:5] == ["checkpoint", "log", "checkpoint", "log", "checkpoint"]


@pytest.mark.parametrize(("entry", "lag"), [*cases(FOUR, 0), (CONTINUOUS, 3)], ids=str)
def test_the_size_of_a_checkpoint(entry, lag):
    """Weights, Adam's two moments, the policies that act, and the buffer."""
    agent, folder = entry.train(PROBES[entry.kind], 2, policy_lag=lag, buffer_epochs=4)
    weights = sum(tensor.nbytes for tensor in agent.state_dict().values())
    buffer = sum(tensor.nbytes for tensor in checkpoint_of(folder)["buffer"].values())
    assert (folder / "checkpoint.pt").stat().st_size <= 1.1 * (buffer + (4 + lag) * weights) + 1e5


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def truncate(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


DAMAGES = {
    "truncated early": lambda path: truncate(path, 0.1),
    "truncated late": lambda path: truncate(path, 0.99),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("weights"),
    "missing": lambda path: path.unlink(),
    "of another program": lambda path: torch.save({"weights": 1}, path),
    "code": lambda path: torch.save({"args": Bomb()}, path),
    "code in place of the agent": lambda path: torch.save(torch.load(path) | {"agent": Bomb()}, path),
}


@four
@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_checkpoint_gets_its_sentence_and_runs_no_code(what, entry, saved, refused, tmp_path):
    folder = saved(entry)
    DAMAGES[what](folder / "checkpoint.pt")
    left = [*folder.iterdir()]
    for flag in ("--resume", "--evaluate"):
        assert str(folder) in refused(entry, flag, folder, "--total-timesteps", 900, "--eval-episodes", 3)
    assert [*tmp_path.iterdir()] == [tmp_path / "runs"] and [*folder.iterdir()] == left


@four
def test_flipped_bits_are_found(entry, saved):
    """torch.load alone would read them. What is loaded nevertheless, because nothing hangs on the bit, is the same."""
    folder, rng, refusals = saved(entry), random.Random(1), 0
    path = folder / "checkpoint.pt"
    content, checkpoint = path.read_bytes(), checkpoint_of(folder)
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    inside = largest.header_offset + 200, largest.file_size - 200
    for where, size in [inside] * 3 + [(0, len(content))] * 12:
        damaged = bytearray(content)
        damaged[where + rng.randrange(size)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            assert equal(entry.module.load_checkpoint(folder, type(entry.args("Plain"))), checkpoint)
        except entry.module.InputError:
            refusals += 1
        assert refusals or (where, size) != inside
    assert refusals >= 10


OTHERS = [(CONTINUOUS, ATARI), (CONTINUOUS, MINIGRID), (CONTINUOUS, BASELINES[0]), (BASELINES[0], CONTINUOUS)]
OTHERS += [(BASELINES[1], BASELINES[0]), (BASELINES[2], BASELINES[0])]


@pytest.mark.parametrize(("entry", "other"), OTHERS, ids=str)
def test_the_checkpoint_of_another_script(entry, other, saved, refused):
    folder = saved(other)
    for flag in ("--resume", "--evaluate"):
        error = refused(entry, flag, folder, "--total-timesteps", 900, "--eval-episodes", 3)
        assert f"is a run of {other.name}, which has other flags" in error
    with pytest.raises(entry.module.InputError, match=f"is a run of {other.name}"):
        entry.module.load_agent(folder, type(entry.args("Plain")))


@six
def test_an_evaluation_that_does_not_fit_the_run_is_refused(entry, saved, refused):
    """Another environment, and the device of another machine."""
    folder = saved(entry)
    env_id = {"": "Hopper-v5", "Frames": "ALE/Pong-v5", "Grid": "MiniGrid-GoToDoor-5x5-v0"}[entry.kind]
    for flag, value in (("--env-id", env_id), ("--device", "cuda:77")):
        assert f"{flag} {value}" in refused(entry, "--evaluate", folder, "--eval-episodes", 1, flag, value)


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_no_checkpoint_there(flag, saved, refused, tmp_path):
    (tmp_path / "empty").mkdir()
    for path in ("nowhere", "empty", saved(CONTINUOUS) / "checkpoint.pt"):
        assert f"{path} has no checkpoint" in refused(CONTINUOUS, flag, path)
    assert not [*(tmp_path / "empty").iterdir()]


def test_a_run_is_resumed_or_evaluated(saved, refused):
    folder = saved(CONTINUOUS)
    assert "give one of them" in refused(CONTINUOUS, "--resume", folder, "--evaluate", folder, "--eval-episodes", 1)


# ----------------------------------------------------- evaluation ----------------------------------------------------
def train_on_a_real_environment(entry, **values):
    return entry.train(REAL[entry.kind], num_envs=4, num_steps=16, **values)


def summary(capsys):
    (line,) = [line for line in capsys.readouterr().out.splitlines() if " episodes ended " in line]
    return line


@pytest.mark.slow
@six
def test_a_loaded_agent_scores_as_it_did_before_it_was_saved(entry, monkeypatch, tmp_path, capsys):
    _, folder = train_on_a_real_environment(entry, eval_episodes=3)
    trained = summary(capsys)
    assert entry.main(monkeypatch, "--evaluate", folder, "--eval-episodes", 3) is None
    assert trained == summary(capsys) and trained.startswith("3 of 3 episodes ended within 30000 steps: ")
    logged = {tag: points for tag, points in scalars(tmp_path).items() if tag.startswith("eval/")}
    assert ("eval/success_rate" in logged) == (entry.kind == "Grid")
    for tag, ((step, mean),) in logged.items():
        assert step == 64 and f"'{tag}': {mean:.4}"[:-1] in trained


@six
def test_a_trained_agent_is_loaded_to_be_used(entry):
    _, folder = entry.train("Plain", 2)
    agent, args = entry.module.load_agent(folder, type(entry.args("Plain")))
    assert args.env_id == entry.args("Plain").env_id and args.device == "cpu"
    assert equal(agent.state_dict(), checkpoint_of(folder)["agent"])
    with contextlib.closing(args.make_envs(args, 1, 3)) as envs:
        obs = torch.as_tensor(envs.reset(seed=3)[0])
    sure = [agent.get_action_and_value(obs, deterministic=True)[0] for _ in range(5)]
    sampled = [agent.get_action_and_value(obs)[0] for _ in range(50)]
    assert sure[0].numpy().shape == envs.action_space.shape  # without a gradient
    assert all(torch.equal(action, sure[0]) for action in sure)
    assert any(not torch.equal(action, sure[0]) for action in sampled)
    likely = agent.get_action_and_value(obs, sure[0])[1]
    assert all((agent.get_action_and_value(obs, action)[1] <= likely + 1e-6).all() for action in sampled)
    assert entry.kind or agent.get_action_and_value(obs.double())[0].dtype == torch.float32  # as gymnasium gives it


@four
def test_an_evaluation_with_the_most_likely_actions(entry, saved, monkeypatch, capsys):
    folder, agent = saved(entry), type(entry.args("Plain")).Agent
    seen = watch(monkeypatch, agent, "get_action_and_value", lambda *_, **flags: flags.get("deterministic"))
    entry.main(monkeypatch, "--evaluate", folder, "--deterministic", "--eval-episodes", 2)
    assert seen and all(seen)
    seen.clear()
    entry.main(monkeypatch, "--evaluate", folder, "--eval-episodes", 2)
    assert seen and not any(seen)


def test_a_folder_is_named_after_what_differs_from_the_defaults():
    _, folder = CONTINUOUS.train("Plain", 1, sigma=0.7, buffer_epochs=2)
    name = folder.name.split("__")[3]
    assert "buffer_epochs=2" in name and len(name) <= 100 and "seed" not in name and "eval_episodes" not in name
    args = CONTINUOUS.module.Continuous("Hopper-v5", buffer_epochs=8)
    assert CONTINUOUS.module.name_run(args).startswith("Hopper-v5__gipo_continuous__1__buffer_epochs=8__")
    assert len(CONTINUOUS.module.name_run(CONTINUOUS.module.Continuous()).split("__")) == 4


@four
def test_short_episodes_are_not_favored(entry):
    """Every other environment has episodes of 3 steps, and the others of 7; the first to end would be short ones."""
    _, folder = entry.train("Uneven", 1)
    args = entry.args("Uneven", eval_episodes=4)
    found = entry.module.evaluate(args, checkpoint_of(folder)["agent"], None)
    assert found["eval/episodic_length"] == (3 + 7) / 2


@four
@pytest.mark.parametrize("episodes", [1, 5])
def test_exactly_so_many_episodes(episodes, entry, saved, monkeypatch, capsys):
    entry.main(monkeypatch, "--evaluate", saved(entry), "--eval-episodes", episodes)
    assert summary(capsys).startswith(f"{episodes} of {episodes} episodes ")


@pytest.mark.parametrize("entry", cases([CONTINUOUS, BASELINES[0]]), ids=str)
@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5", "Humanoid-v5"])
def test_the_camera_follows_a_robot(env_id, entry):
    make_envs, args = entry.module.make_continuous_envs, entry.args(env_id)
    with contextlib.closing(make_envs(args, 1, 0, render_mode="rgb_array")) as envs:
        renderer = envs.unwrapped.envs[0].unwrapped.mujoco_renderer
        mode = renderer.model.cam_mode[renderer.camera_id]
        assert renderer.camera_id >= 0 and mode == mujoco.mjtCamLight.mjCAMLIGHT_TRACKCOM


@pytest.mark.slow
@pytest.mark.parametrize("entry", THREE, ids=str)
def test_a_video_can_be_watched(entry, tmp_path):
    from imageio_ffmpeg import count_frames_and_secs
    from moviepy import VideoFileClip

    _, folder = train_on_a_real_environment(entry, seed=2, capture_video=True, eval_episodes=1)
    ((_, length),) = scalars(tmp_path)["eval/episodic_length"]
    frame_count, _ = count_frames_and_secs(str(folder / "64.mp4"))
    assert frame_count == pytest.approx(length, abs=1)  # the encoder may round the last one away
    with VideoFileClip(folder / "64.mp4") as clip:
        frames = list(clip.iter_frames())
        assert clip.fps == {"Frames": 15, "": 125, "Grid": 10}[entry.kind]
    assert all(frame.mean() > 5 for frame in frames)  # not black
    assert frames[0].shape[2] == 3 and frames[0].std(2).max() > 0  # in color
    assert not np.array_equal(frames[0], frames[-1])
