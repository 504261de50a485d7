"""Checkpoints, resuming, evaluation: what a checkpoint promised is not lost, and a loaded agent is the saved one."""

import itertools
import os
import random
import resource
import shutil
import signal
import time
import zipfile

import mujoco
import numpy as np
import pytest
import torch
from harness import ENTRIES, flags, load, run, scalars, watch
from short_runs import (
    BAR,
    PROBE,
    ROLLOUT,
    TINY,
    at_iteration,
    backdate_logs,
    checkpoint_of,
    folder_of,
    fork_run,
    iterations,
    kill,
    send,
)
from tqdm import tqdm


def domain_of(name):
    return ["continuous"] if name == "ppo_baseline" else []


def equal(a, b):
    """Whether two nested states hold the same keys and, to the bit, the same tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


# ------------------------------------------------------ resuming ------------------------------------------------------


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("epochs", [1, 8])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name != "gipo_continuous" else name for name in PROBE]
)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(name, epochs, lag, monkeypatch, tmp_path, capsys):
    argv = [*domain_of(name), "--env-id", PROBE[name], *TINY, "--device", "cpu"]
    argv += ["--buffer-epochs", epochs, "--policy-lag", lag, *iterations(6)]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(load(name), monkeypatch, whole, argv)
    module = load(name)
    at_iteration(module, monkeypatch, 3, lambda: send(signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        run(module, monkeypatch, parts, argv)
    assert stop.value.code == 128 + signal.SIGTERM
    assert "--resume" in capsys.readouterr().out
    backdate_logs(parts)
    run(load(name), monkeypatch, parts, [*domain_of(name), "--resume", folder_of(parts)])
    assert f"goes on after step {4 * ROLLOUT}" in capsys.readouterr().out
    first, second = checkpoint_of(whole), checkpoint_of(parts)
    assert first["iteration"] == 6
    assert second["args"].keys() == first["args"].keys() - {"resume"}
    first["args"].pop("resume")
    assert first.keys() == second.keys()
    for key in first:
        assert equal(first[key], second[key]), key
    logs = [scalars(path) for path in (whole, parts)]
    for log in logs:
        del log["charts/SPS"]
    assert logs[0] == logs[1]
    assert [step for step, _ in logs[1]["losses/policy_loss"]] == [ROLLOUT * (i + 1) for i in range(6)]


def test_what_was_logged_after_the_checkpoint_is_logged_once(monkeypatch, tmp_path):
    """Three iterations after a checkpoint the power fails; in the end every step is there once."""
    module = load("gipo_continuous")

    def power_cut():
        module.writer.flush()
        raise RuntimeError("power cut")

    at_iteration(module, monkeypatch, 7, power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        run(module, monkeypatch, tmp_path, [*BAR, *iterations(12), "--checkpoint-interval", 4])
    assert scalars(tmp_path)["charts/SPS"][-1][0] == 7 * ROLLOUT
    backdate_logs(tmp_path)
    run(load("gipo_continuous"), monkeypatch, tmp_path, ["--resume", folder_of(tmp_path)])
    for tag in ("charts/SPS", "losses/value_loss", "charts/episodic_return"):
        assert [step for step, _ in scalars(tmp_path)[tag]] == [ROLLOUT * (i + 1) for i in range(12)]


def test_a_longer_run_grows_out_of_a_finished_one(monkeypatch, tmp_path):
    run(load("gipo_continuous"), monkeypatch, tmp_path, [*BAR, *iterations(2)])
    run(load("gipo_continuous"), monkeypatch, tmp_path, ["--resume", folder_of(tmp_path), *iterations(4)])
    checkpoint = checkpoint_of(tmp_path)
    assert checkpoint["iteration"] == 4 and checkpoint["args"]["num_steps"] == 8


def test_flags_hold_unless_they_are_given_anew(monkeypatch, tmp_path):
    """A flag set back to the script's default holds too, and the next --resume keeps it."""
    argv = [*BAR, *iterations(2), "--seed", 3, "--sigma", 1, "--ent-coef", 0.1, "--no-anneal-lr"]
    run(load("gipo_continuous"), monkeypatch, tmp_path, argv)
    resume = ["--resume", folder_of(tmp_path)]
    changes = ["--sigma", 0.5, "--anneal-lr", "--kl-coef", 0.2]
    first = run(load("gipo_continuous"), monkeypatch, tmp_path, [*resume, *iterations(3), *changes]).args
    again = run(load("gipo_continuous"), monkeypatch, tmp_path, [*resume, *iterations(4)]).args
    for args in (first, again):
        assert (args.seed, args.ent_coef, args.sigma, args.anneal_lr, args.kl_coef) == (3, 0.1, 0.5, True, 0.2)


@pytest.mark.parametrize("flags", ["--num-steps 16", "--num-envs 4", "--buffer-epochs 2", "--policy-lag 1"])
def test_flags_that_do_not_fit_the_checkpoint_are_refused(flags, saved, refused, tmp_path):
    shutil.copytree(saved["gipo_continuous"], tmp_path / "run")
    argv = ["--resume", "run", *iterations(90), *flags.split()]
    assert "does not fit these flags" in refused(load("gipo_continuous"), argv)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint.pt"]


@pytest.mark.slow
def test_five_kills(monkeypatch, tmp_path):
    """kill -9 at random moments, and twice inside the save; each time the run goes on where the checkpoint was."""
    rng = random.Random(5)
    argv = [*BAR, "--total-timesteps", 10**9, "--checkpoint-interval", 3]
    run(load("gipo_continuous"), monkeypatch, tmp_path / "first", [*BAR, *iterations(1)])  # torch loads some parts late
    resume, last = [], 0

    def saved_anew():
        return any(torch.load(path)["iteration"] > last for path in tmp_path.glob("runs/*/checkpoint.pt"))

    def ended(child):
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)

    for inside in (False, True, False, True, False):
        with monkeypatch.context() as patch:
            if inside:
                files = itertools.count(1)
                watch(patch, os, "fsync", lambda _, files=files: next(files) == 3 and send(signal.SIGKILL))
            child = fork_run(load("gipo_continuous"), patch, tmp_path, [*argv, *resume])
        try:
            deadline = time.time() + 60
            while not (ended(child) if inside else saved_anew()):
                assert time.time() < deadline
                time.sleep(rng.uniform(0, 0.2))
        finally:
            kill(child)
        assert (folder_of(tmp_path) / "checkpoint.tmp").exists() or not inside
        iteration = checkpoint_of(tmp_path)["iteration"]
        assert iteration > last and iteration % 3 == 0
        last, resume = iteration, ["--resume", folder_of(tmp_path)]
        backdate_logs(tmp_path)
    steps = [step for step, _ in scalars(tmp_path)["charts/SPS"]]
    assert steps == [ROLLOUT * (i + 1) for i in range(len(steps))]
    assert last <= len(steps)


def test_a_child_that_is_killed_while_it_draws_does_not_block_the_next_run():
    child = os.fork()
    if not child:
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert tqdm.get_lock().acquire(blocking=False)
    tqdm.get_lock().release()


@pytest.mark.parametrize(
    "signals",
    [[signal.SIGINT], [signal.SIGINT, signal.SIGINT], [signal.SIGTERM], [signal.SIGHUP]],
    ids=["Ctrl-C", "Ctrl-C twice", "SIGTERM", "SIGHUP"],
)
def test_a_signal_finishes_the_iteration_and_saves(signals, monkeypatch, tmp_path, capsys):
    module = load("gipo_continuous")
    at_iteration(module, monkeypatch, 2, lambda: send(*signals))
    with pytest.raises(SystemExit) as stop:
        run(module, monkeypatch, tmp_path, [*BAR, *iterations(100)])
    assert stop.value.code == 128 + signals[0]
    assert f"stopped after step {3 * ROLLOUT}" in capsys.readouterr().out
    assert checkpoint_of(tmp_path)["iteration"] == 3
    assert scalars(tmp_path)["charts/SPS"][-1][0] == 3 * ROLLOUT


def test_an_ignored_signal_stays_ignored(monkeypatch, tmp_path):
    """nohup starts a run with SIGHUP ignored."""
    module = load("gipo_continuous")
    at_iteration(module, monkeypatch, 1, lambda: send(signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run(module, monkeypatch, tmp_path, [*BAR, *iterations(4)])
    finally:
        signal.signal(signal.SIGHUP, before)
    assert checkpoint_of(tmp_path)["iteration"] == 4


def test_signals_are_ordinary_again_during_the_evaluation(monkeypatch, tmp_path):
    def handlers(*_):
        return [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    module, before = load("gipo_continuous"), handlers()
    seen = watch(monkeypatch, module, "evaluate", handlers)
    run(module, monkeypatch, tmp_path, [*BAR, *iterations(1), "--eval-episodes", 1])
    assert seen == [before]


# ----------------------------------------------------- bad states -----------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(refused, monkeypatch, tmp_path):
    module = load("gipo_continuous")
    policy_loss, calls = module.policy_loss, []

    def poisoned(*args):
        calls.append(args)
        loss, coef = policy_loss(*args)
        return (loss * float("nan") if len(calls) == 4 * 4 + 2 else loss), coef  # in iteration 4

    module.policy_loss = poisoned
    error = refused(module, [*BAR, *iterations(8), "--checkpoint-interval", 2], code=1)
    assert "losses/policy_loss" in error and "iteration 4" in error and folder_of(tmp_path).name in error
    checkpoint = checkpoint_of(tmp_path)
    assert checkpoint["iteration"] == 4
    assert all(tensor.isfinite().all() for tensor in checkpoint["agent"].values())


def test_a_disk_that_is_full_costs_nothing_that_was_saved(refused, monkeypatch, tmp_path):
    """The limit on the size of files stands in for the disk."""
    run(load("gipo_continuous"), monkeypatch, tmp_path, [*BAR, *iterations(2)])
    path = folder_of(tmp_path) / "checkpoint.pt"
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        error = refused(load("gipo_continuous"), ["--resume", path.parent, *iterations(4)], code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written" in error and path.parent.name in error
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "runs").write_text("a file stands where the folder should be")
    assert "runs" in refused(load("gipo_continuous"), BAR, code=1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a run of each script, of two iterations, without its logs."""
    folders = {}
    for name in PROBE:
        path = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            argv = [*domain_of(name), "--env-id", PROBE[name], *TINY, *iterations(2)]
            run(load(name), patch, path, argv)
        folders[name] = folder_of(path)
        for log in folders[name].glob("events*"):
            log.unlink()
    return folders


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def flip(path, seed):
    """Flips one bit of each of 20 random bytes among the tensors."""
    rng = random.Random(seed)
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(path.read_bytes())
    for _ in range(20):
        content[largest.header_offset + 200 + rng.randrange(largest.file_size - 200)] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def change(*keys_and_value):
    """Sets an entry of a checkpoint, given by its keys, or removes it if the value is None."""
    *keys, last, value = keys_and_value

    def rewrite(path):
        checkpoint = state = torch.load(path)
        for key in keys:
            state = state[key]
        if value is None:
            del state[last]
        else:
            state[last] = value
        torch.save(checkpoint, path)

    return rewrite


MALFORMED = {
    "truncated early": lambda path: truncate(path, 0.1),
    "truncated late": lambda path: truncate(path, 0.99),
    "flipped bits": lambda path: flip(path, 1),
    "other flipped bits": lambda path: flip(path, 2),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("weights"),
    "code": lambda path: torch.save({"args": Bomb()}, path),
    "code in place of the agent": change("agent", Bomb()),
    "a list": lambda path: torch.save([1, 2], path),
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "no agent": change("agent", None),
    "no optimizer": change("optimizer", None),
    "no buffer": change("buffer", None),
    "no ring of policies": change("actors", None),
    "no random state": change("rng", None),
    "no iteration": change("iteration", None),
    "no arguments": change("args", None),
    "an unknown argument": change("args", "speed", 3),
    "a wrong argument": change("args", "gamma", 7.0),
    "a wrong weight": change("agent", "actor_logstd", torch.zeros(1, 5)),
    "a weight too many": change("agent", "extra", torch.zeros(1)),
    "a missing weight": change("agent", "actor_logstd", None),
    "a wrong buffer": change("buffer", "rewards", torch.zeros(1, 9, 5)),
    "a wrong random state": change("rng", [torch.zeros(3, dtype=torch.uint8)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_checkpoint_gets_its_sentence_and_runs_no_code(what, saved, refused, tmp_path):
    folder = shutil.copytree(saved["gipo_continuous"], tmp_path / "run")
    MALFORMED[what](folder / "checkpoint.pt")
    before = (folder / "checkpoint.pt").read_bytes()
    for flag in ("--resume", "--evaluate"):
        refused(load("gipo_continuous"), [flag, folder, *iterations(4), "--eval-episodes", 3])
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "checkpoint.pt"]
    assert (folder / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("script", "other"),
    [
        (["gipo_continuous"], "gipo_atari"),
        (["gipo_continuous"], "gipo_minigrid_vision"),
        (["gipo_continuous"], "ppo_baseline"),
        (["ppo_baseline", "continuous"], "gipo_continuous"),
        (["ppo_baseline", "atari"], "ppo_baseline"),
        (["ppo_baseline", "minigrid"], "ppo_baseline"),
    ],
)
def test_the_checkpoint_of_another_script(script, other, saved, refused, tmp_path):
    name, *domain = script
    shutil.copytree(saved[other], tmp_path / "run")
    for flag in ("--resume", "--evaluate"):
        refused(load(name), [*domain, flag, "run", *iterations(4), "--eval-episodes", 3])


def test_the_checkpoint_of_another_environment(saved, refused, tmp_path):
    folder = shutil.copytree(saved["gipo_continuous"], tmp_path / "run")
    change("args", "env_id", "Hopper-v5")(folder / "checkpoint.pt")
    assert "does not fit" in refused(load("gipo_continuous"), ["--evaluate", folder, "--eval-episodes", 3])


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_no_checkpoint_there(flag, saved, refused, tmp_path):
    (tmp_path / "empty").mkdir()
    for path in ("nowhere", "empty", saved["gipo_continuous"] / "checkpoint.pt"):
        assert f"{path} has no checkpoint" in refused(load("gipo_continuous"), [flag, path])
    assert [*tmp_path.rglob("*")] == [tmp_path / "empty"]


# ------------------------------------------------------ the file ------------------------------------------------------


@pytest.mark.parametrize(("name", "lag"), [*[(name, 0) for name in PROBE], ("gipo_continuous", 3)])
def test_the_size_of_a_checkpoint(name, lag, monkeypatch, tmp_path):
    """Weights, Adam's two moments, the ring of policies that act, and the buffer."""
    argv = [*domain_of(name), "--env-id", PROBE[name], *TINY, *iterations(2), "--policy-lag", lag]
    end = run(load(name), monkeypatch, tmp_path, [*argv, "--buffer-epochs", 4])

    def size(module):
        return sum(tensor.nbytes for tensor in module.state_dict().values())

    limit = 1.1 * (size(end.buffer) + (4 + lag) * size(end.agent)) + 1e5
    assert (folder_of(tmp_path) / "checkpoint.pt").stat().st_size <= limit


def test_the_random_state_comes_back(saved, monkeypatch, tmp_path):
    folder = shutil.copytree(saved["gipo_continuous"], tmp_path / "run")
    module = load("gipo_continuous")
    states = watch(monkeypatch, module, "save_checkpoint", lambda *_: torch.get_rng_state())
    end = run(module, monkeypatch, tmp_path, ["--resume", folder, *iterations(3)])
    assert torch.equal(states[0], torch.load(saved["gipo_continuous"] / "checkpoint.pt")["rng"][0])
    assert not torch.equal(states[0], states[1])
    assert end.args.device is None  # that of the next machine is its own choice


# ----------------------------------------------------- evaluation -----------------------------------------------------

REAL = {
    "atari": "--env-id ALE/Breakout-v5 --num-envs 4 --num-steps 16 --num-minibatches 2 --total-timesteps 64",
    "continuous": "--env-id Hopper-v5 --num-envs 4 --num-steps 16 --num-minibatches 2 --total-timesteps 64",
    "minigrid": "--num-envs 4 --num-steps 16 --num-minibatches 2 --total-timesteps 64",
}
CASES = [(name, argv, list(REAL)[i % 3]) for i, (name, argv) in enumerate(ENTRIES)]


def summary(capsys):
    (line,) = [line for line in capsys.readouterr().out.splitlines() if " episodes ended " in line]
    return line


@pytest.mark.slow
@pytest.mark.parametrize(("name", "argv", "domain"), CASES)
def test_a_loaded_agent_scores_as_it_did_before_it_was_saved(name, argv, domain, monkeypatch, tmp_path, capsys):
    run(load(name), monkeypatch, tmp_path, [*argv, *REAL[domain].split(), "--eval-episodes", 3])
    trained = summary(capsys)
    with pytest.raises(SystemExit) as stop:
        run(load(name), monkeypatch, tmp_path, [*argv, "--evaluate", folder_of(tmp_path), "--eval-episodes", 3])
    assert not stop.value.code
    assert trained == summary(capsys) and trained.startswith("3 of 3 episodes ended within 30000 steps: ")
    logged = {tag: points for tag, points in scalars(tmp_path).items() if tag.startswith("eval/")}
    assert ("eval/success_rate" in logged) == (domain == "minigrid")
    for tag, ((step, mean),) in logged.items():
        assert step == 64 and f"'{tag}': {mean:.4}"[:-1] in trained


def test_short_episodes_are_not_favored(monkeypatch, tmp_path):
    """Episodes of 3 and of 30 steps in turn: to take the first that end would count the short ones more often."""
    argv = ["--env-id", "probes:Uneven-v0", *TINY, *iterations(2), "--eval-episodes", 4]
    run(load("gipo_continuous"), monkeypatch, tmp_path, argv)
    ((_, length),) = scalars(tmp_path)["eval/episodic_length"]
    assert length == (3 + 30) / 2


@pytest.mark.parametrize("episodes", [1, 5])
def test_exactly_so_many_episodes(episodes, monkeypatch, tmp_path, capsys):
    run(load("gipo_continuous"), monkeypatch, tmp_path, [*BAR, *iterations(1), "--eval-episodes", episodes])
    assert summary(capsys).startswith(f"{episodes} of {episodes} episodes ")


@pytest.mark.parametrize(("name", "domain"), [("gipo_continuous", 0), ("ppo_baseline", 1)])
@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5", "Humanoid-v5"])
def test_the_camera_follows_a_robot(name, domain, env_id):
    module = load(name)
    envs = module.make_continuous_envs(flags(module, domain, env_id=env_id), 1, 0, render_mode="rgb_array")
    renderer = envs.unwrapped.envs[0].unwrapped.mujoco_renderer
    mode = renderer.model.cam_mode[renderer.camera_id]
    assert renderer.camera_id >= 0 and mode == mujoco.mjtCamLight.mjCAMLIGHT_TRACKCOM
    envs.close()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "argv", "domain"), CASES[:3])
def test_a_video_can_be_watched(name, argv, domain, monkeypatch, tmp_path):
    from imageio_ffmpeg import count_frames_and_secs
    from moviepy import VideoFileClip

    flags = [*argv, *REAL[domain].split(), "--capture-video", "--seed", 2, "--eval-episodes", 1]
    run(load(name), monkeypatch, tmp_path, flags)
    ((_, length),) = scalars(tmp_path)["eval/episodic_length"]
    frame_count, _ = count_frames_and_secs(str(folder_of(tmp_path) / "64.mp4"))
    assert frame_count == pytest.approx(length, abs=1)  # the encoder may round the last one away
    with VideoFileClip(folder_of(tmp_path) / "64.mp4") as clip:
        frames = list(clip.iter_frames())
        assert clip.fps == {"atari": 15, "continuous": 125, "minigrid": 10}[domain]
    assert all(frame.mean() > 5 for frame in frames)  # not black
    assert frames[0].shape[2] == 3 and frames[0].std(2).max() > 0  # in color
    assert not np.array_equal(frames[0], frames[-1])
