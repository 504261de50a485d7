"""Checkpoints, resuming, evaluation: what a checkpoint promised is not lost, and a loaded agent is the saved one."""

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from harness import ENTRIES, ROOT, load, run, scalars

PROBE = {
    "gipo_atari": "probes:BarFrames-v0",
    "gipo_continuous": "probes:Bar-v0",
    "gipo_minigrid_vision": "probes:BarGrid-v0",
    "ppo_baseline": "probes:Bar-v0",
}
TINY = "--num-envs 2 --num-steps 8 --num-minibatches 2 --update-epochs 2".split()
ROLLOUT = 16


def folder_of(path):
    (folder,) = (path / "runs").iterdir()
    return folder


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


def stop_after(module, monkeypatch, iterations):
    """Lets the run receive SIGTERM while its `iterations`-th rollout is stored."""
    start, count = module.ReplayBuffer.start, 0

    def spy(self, *args):
        nonlocal count
        count += 1
        if count == iterations:
            os.kill(os.getpid(), signal.SIGTERM)
        return start(self, *args)

    monkeypatch.setattr(module.ReplayBuffer, "start", spy)


# ------------------------------------------------------ resuming ------------------------------------------------------


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("epochs", [1, 8])
@pytest.mark.parametrize("name", PROBE)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(name, epochs, lag, monkeypatch, tmp_path, capsys):
    argv = [*domain_of(name), "--env-id", PROBE[name], *TINY, "--device", "cpu"]
    argv += ["--buffer-epochs", epochs, "--policy-lag", lag, "--total-timesteps", 8 * ROLLOUT]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    run(load(name), monkeypatch, whole, argv)
    module = load(name)
    stop_after(module, monkeypatch, 4)
    with pytest.raises(SystemExit) as stop:
        run(module, monkeypatch, parts, argv)
    assert stop.value.code == 128 + signal.SIGTERM
    assert "--resume" in capsys.readouterr().out
    time.sleep(1.1)  # event files are sorted by the second
    run(load(name), monkeypatch, parts, [*domain_of(name), "--resume", folder_of(parts)])
    assert f"goes on after step {4 * ROLLOUT}" in capsys.readouterr().out
    first, second = (torch.load(folder_of(path) / "checkpoint.pt") for path in (whole, parts))
    assert first.pop("iteration") == second.pop("iteration") == 8
    for key in first:
        assert equal(first[key], second[key]), key
    logs = [scalars(path) for path in (whole, parts)]
    for log in logs:
        del log["charts/SPS"]
    assert logs[0] == logs[1]
    assert [step for step, _ in logs[1]["losses/policy_loss"]] == [ROLLOUT * (i + 1) for i in range(8)]


def test_what_was_logged_after_the_checkpoint_is_logged_once(monkeypatch, tmp_path):
    """Killed three iterations after a checkpoint; in the end every step is there once."""
    argv = ["--env-id", "probes:Bar-v0", *TINY, "--total-timesteps", 12 * ROLLOUT]
    module = load("gipo_continuous")
    start, count = module.ReplayBuffer.start, 0

    def crash(self, *args):
        nonlocal count
        count += 1
        if count == 8:
            module.writer.flush()
            raise RuntimeError("power cut")
        return start(self, *args)

    module.ReplayBuffer.start = crash
    with pytest.raises(RuntimeError, match="power cut"):
        run(module, monkeypatch, tmp_path, [*argv, "--checkpoint-interval", 4])
    assert scalars(tmp_path)["charts/SPS"][-1][0] == 7 * ROLLOUT
    time.sleep(1.1)  # event files are told apart and sorted by the second
    run(load("gipo_continuous"), monkeypatch, tmp_path, ["--resume", folder_of(tmp_path)])
    for tag in ("charts/SPS", "losses/value_loss", "charts/episodic_return"):
        assert [step for step, _ in scalars(tmp_path)[tag]] == [ROLLOUT * (i + 1) for i in range(12)]


def test_a_longer_run_grows_out_of_a_finished_one(monkeypatch, tmp_path):
    argv = ["--env-id", "probes:Bar-v0", *TINY, "--total-timesteps", 2 * ROLLOUT]
    run(load("gipo_continuous"), monkeypatch, tmp_path, argv)
    checkpoint = folder_of(tmp_path) / "checkpoint.pt"
    run(load("gipo_continuous"), monkeypatch, tmp_path, ["--resume", checkpoint, "--total-timesteps", 4 * ROLLOUT])
    assert torch.load(checkpoint)["iteration"] == 4
    assert torch.load(checkpoint)["args"]["num_steps"] == 8


def test_a_run_without_a_checkpoint_starts_afresh(monkeypatch, tmp_path, capsys):
    argv = ["--env-id", "probes:Bar-v0", *TINY, "--total-timesteps", 4 * ROLLOUT]
    run(load("gipo_continuous"), monkeypatch, tmp_path, argv)
    folder = folder_of(tmp_path)
    (folder / "checkpoint.pt").unlink()
    time.sleep(1.1)
    run(load("gipo_continuous"), monkeypatch, tmp_path, [*argv, "--resume", folder])
    assert "starts, with the flags given, after step 0" in capsys.readouterr().out
    assert [step for step, _ in scalars(tmp_path)["charts/SPS"]] == [ROLLOUT * (i + 1) for i in range(4)]


@pytest.mark.parametrize(
    "flags", ["--seed 1", "--num-steps 256", "--sigma 1", "--env-id probes:Clock-v0", "--no-anneal-lr", "--gamma 0.9"]
)
def test_a_flag_that_contradicts_the_checkpoint_is_refused_by_name(flags, monkeypatch, tmp_path, capsys):
    """Also one that gives the default, where the checkpoint has another value."""
    argv = ["--env-id", "probes:Bar-v0", *TINY, "--total-timesteps", 2 * ROLLOUT, "--seed", 3]
    run(load("gipo_continuous"), monkeypatch, tmp_path, argv)
    before = (folder_of(tmp_path) / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        run(load("gipo_continuous"), monkeypatch, tmp_path, ["--resume", folder_of(tmp_path), *flags.split()])
    assert stop.value.code == 2
    assert flags.split()[0].replace("--no-", "--") in capsys.readouterr().err
    assert (folder_of(tmp_path) / "checkpoint.pt").read_bytes() == before


def command(name, *argv):
    return [sys.executable, ROOT / f"{name}.py", *map(str, argv)]


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT / "tests")}


def fork_run(module, monkeypatch, folder, argv):
    """Starts a run in a process of its own, quickly, for all is imported; returns its process id."""
    child = os.fork()
    if child == 0:
        try:
            run(module, monkeypatch, folder, argv)
        finally:
            os._exit(1)
    return child


def wait_for(condition):
    deadline = time.time() + 120
    while not condition():
        assert time.time() < deadline


def test_twenty_kills(monkeypatch, tmp_path):
    """kill -9 at random moments, three of them inside the save; each time the run goes on where the checkpoint was."""
    rng = random.Random(5)
    module = load("gipo_continuous")
    argv = ["--env-id", "probes:Bar-v0", "--num-envs", 2, "--num-steps", 64, "--update-epochs", 1]
    argv += ["--num-minibatches", 2, "--total-timesteps", 10**9, "--checkpoint-interval", 3]
    argv += ["--buffer-epochs", 64]  # a checkpoint that takes a moment
    (tmp_path / "first").mkdir()
    run(module, monkeypatch, tmp_path / "first", [*argv, "--total-timesteps", 128])  # what torch loads late is loaded
    resume, last, inside = [], 0, 0
    for kill in range(20):
        start = time.time()
        child = fork_run(module, monkeypatch, tmp_path, [*argv, *resume])
        name = "checkpoint.tmp" if kill in (5, 10, 15) else "checkpoint.pt"
        try:
            wait_for(lambda: any(f.stat().st_mtime > start for f in tmp_path.glob(f"runs/*/{name}")))  # noqa: B023
            if name == "checkpoint.pt":
                time.sleep(rng.uniform(0, 0.5))
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        inside += (folder_of(tmp_path) / "checkpoint.tmp").exists()
        checkpoint = torch.load(folder_of(tmp_path) / "checkpoint.pt")
        assert checkpoint["iteration"] % 3 == 0
        assert checkpoint["iteration"] > last or name == "checkpoint.tmp"
        last, resume = checkpoint["iteration"], ["--resume", folder_of(tmp_path)]
        time.sleep(max(0, start + 1.1 - time.time()))  # event files are sorted by the second
    assert inside >= 3
    steps = [step for step, _ in scalars(tmp_path)["charts/SPS"]]
    assert steps == [128 * (i + 1) for i in range(len(steps))]
    assert last <= len(steps) <= last + 3


def test_ctrl_c_finishes_the_iteration_and_saves(tmp_path):
    flags = ["--env-id", "probes:Bar-v0", *TINY, "--total-timesteps", 1_000_000 * ROLLOUT, "--checkpoint-interval", 1]
    process = subprocess.Popen(
        command("gipo_continuous", *flags), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True
    )
    while not list(tmp_path.glob("runs/*/checkpoint.pt")):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    step = torch.load(folder_of(tmp_path) / "checkpoint.pt")["iteration"] * ROLLOUT
    assert f"stopped after step {step}" in out
    assert scalars(tmp_path)["charts/SPS"][-1][0] == step


# ----------------------------------------------------- bad states -----------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(monkeypatch, tmp_path, capsys):
    module = load("gipo_continuous")
    policy_loss, calls = module.policy_loss, 0

    def poisoned(*args):
        nonlocal calls
        calls += 1
        loss, coef = policy_loss(*args)
        return (loss * float("nan") if calls == 4 * 4 + 2 else loss), coef  # in iteration 4

    module.policy_loss = poisoned
    argv = ["--env-id", "probes:Bar-v0", *TINY, "--total-timesteps", 8 * ROLLOUT, "--checkpoint-interval", 2]
    with pytest.raises(SystemExit) as stop:
        run(module, monkeypatch, tmp_path, argv)
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert "iteration 4" in error and str(folder_of(tmp_path).name) in error
    checkpoint = torch.load(folder_of(tmp_path) / "checkpoint.pt")
    assert checkpoint["iteration"] == 4
    assert all(tensor.isfinite().all() for tensor in checkpoint["agent"].values())


def test_statistics_that_are_not_finite_are_not_saved(monkeypatch, tmp_path, capsys):
    """An infinite reward is clipped in the loss, but not in the statistics."""
    module = load("gipo_continuous")
    store, calls = module.ReplayBuffer.store, 0

    def poisoned(self, *args, **transition):
        nonlocal calls
        calls += 1
        if calls == 8 * 4 + 2:  # in iteration 4
            transition["rewards"] = np.full(2, np.inf)
        return store(self, *args, **transition)

    module.ReplayBuffer.store = poisoned
    argv = ["--env-id", "probes:Bar-v0", *TINY, "--total-timesteps", 8 * ROLLOUT, "--checkpoint-interval", 1]
    with pytest.raises(SystemExit) as stop:
        run(module, monkeypatch, tmp_path, argv)
    assert stop.value.code == 1
    assert "not finite" in capsys.readouterr().err
    checkpoint = torch.load(folder_of(tmp_path) / "checkpoint.pt")
    assert checkpoint["iteration"] == 4
    assert all(tensor.isfinite().all() for tensor in checkpoint["agent"].values())


def test_signals_are_ordinary_again_during_the_evaluation(monkeypatch, tmp_path):
    module = load("gipo_continuous")
    seen = []
    module.evaluate = lambda *_: seen.append([signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]) or {}
    argv = ["--env-id", "probes:Bar-v0", *TINY, "--total-timesteps", ROLLOUT, "--eval-episodes", 1]
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    run(module, monkeypatch, tmp_path, argv)
    assert seen == [before]


def test_a_disk_that_is_full_costs_nothing_that_was_saved(tmp_path):
    """The limit on the size of files stands in for the disk."""
    argv = ["--env-id", "probes:Bar-v0", *TINY, "--checkpoint-interval", "1"]
    small = subprocess.run(
        command("gipo_continuous", *argv, "--total-timesteps", 2 * ROLLOUT, "--eval-episodes", 0),
        cwd=tmp_path,
        env=environment(),
    )
    assert small.returncode == 0
    folder = folder_of(tmp_path)
    before = (folder / "checkpoint.pt").read_bytes()
    result = subprocess.run(
        command("gipo_continuous", "--resume", folder, "--total-timesteps", 4 * ROLLOUT),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert result.returncode == 1
    assert "cannot be written" in result.stderr and "Traceback" not in result.stderr
    assert (folder / "checkpoint.pt").read_bytes() == before


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path, capsys):
    (tmp_path / "runs").write_text("a file stands where the folder should be")
    with pytest.raises(SystemExit) as stop:
        run(load("gipo_continuous"), monkeypatch, tmp_path, ["--env-id", "probes:Bar-v0", *TINY])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "runs" in error


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of each of two scripts."""
    paths = {}
    for name in ("gipo_continuous", "gipo_atari"):
        path = tmp_path_factory.mktemp(name)
        argv = ["--env-id", PROBE[name], *TINY, "--total-timesteps", 2 * ROLLOUT, "--eval-episodes", 0]
        subprocess.run(command(name, *argv), cwd=path, env=environment(), check=True)
        paths[name] = folder_of(path) / "checkpoint.pt"
    return paths


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def changed(path, change):
    """Rewrites a checkpoint after `change(checkpoint)`."""
    checkpoint = torch.load(path)
    change(checkpoint)
    torch.save(checkpoint, path)


def flip(path, seed):
    """Flips one bit of each of 20 random bytes among the tensors."""
    rng = random.Random(seed)
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(path.read_bytes())
    for _ in range(20):
        content[largest.header_offset + 200 + rng.randrange(largest.file_size - 200)] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(path, seed):
    content = path.read_bytes()
    path.write_bytes(content[: random.Random(seed).randrange(len(content))])


def set_in(key, *more):
    def change(checkpoint):
        *keys, last, value = (key, *more)
        for step in keys:
            checkpoint = checkpoint[step]
        if value is None:
            del checkpoint[last]
        else:
            checkpoint[last] = value

    return change


MALFORMED = {
    **{f"truncated {seed}": lambda path, seed=seed: truncate(path, seed) for seed in range(8)},
    **{f"flipped {seed}": lambda path, seed=seed: flip(path, seed) for seed in range(8)},
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("weights"),
    "code": lambda path: torch.save({"args": Bomb()}, path),
    "code in place of the agent": lambda path: changed(path, set_in("agent", Bomb())),
    "a list": lambda path: torch.save([1, 2], path),
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "no agent": lambda path: changed(path, set_in("agent", None)),
    "no optimizer": lambda path: changed(path, set_in("optimizer", None)),
    "no buffer": lambda path: changed(path, set_in("buffer", None)),
    "no iteration": lambda path: changed(path, set_in("iteration", None)),
    "no arguments": lambda path: changed(path, set_in("args", None)),
    "an unknown argument": lambda path: changed(path, set_in("args", "speed", 3)),
    "a wrong argument": lambda path: changed(path, set_in("args", "gamma", 7.0)),
    "a wrong weight": lambda path: changed(path, set_in("agent", "actor_logstd", torch.zeros(1, 5))),
    "a weight too many": lambda path: changed(path, set_in("agent", "extra", torch.zeros(1))),
    "a missing weight": lambda path: changed(path, set_in("agent", "actor_logstd", None)),
    "a wrong moment": lambda path: changed(path, set_in("optimizer", 0, "exp_avg", torch.zeros(3))),
    "a missing moment": lambda path: changed(path, set_in("optimizer", 0, None)),
    "a wrong buffer": lambda path: changed(path, set_in("buffer", "rewards", torch.zeros(1, 9, 5))),
    "a wrong random state": lambda path: changed(path, set_in("torch", torch.zeros(3, dtype=torch.uint8))),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_checkpoint_gets_its_sentence_and_runs_no_code(what, saved, monkeypatch, tmp_path, capsys):
    folder = tmp_path / "runs" / "copy"
    folder.mkdir(parents=True)
    shutil.copy(saved["gipo_continuous"], folder)
    MALFORMED[what](folder / "checkpoint.pt")
    for flag in ("--resume", "--evaluate"):
        with pytest.raises(SystemExit) as stop:
            run(load("gipo_continuous"), monkeypatch, tmp_path, [flag, folder, "--eval-episodes", 3])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "exploded").exists()
    assert [path.name for path in folder.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize(
    ("name", "domain"), [("gipo_continuous", []), ("ppo_baseline", ["continuous"]), ("ppo_baseline", ["atari"])]
)
def test_the_checkpoint_of_another_script(name, domain, saved, monkeypatch, tmp_path, capsys):
    other = "gipo_atari" if name == "gipo_continuous" else "gipo_continuous"
    with pytest.raises(SystemExit) as stop:
        run(load(name), monkeypatch, tmp_path, [*domain, "--resume", saved[other]])
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_the_checkpoint_of_another_environment(saved, monkeypatch, tmp_path, capsys):
    copy = shutil.copy(saved["gipo_continuous"], tmp_path)
    changed(tmp_path / "checkpoint.pt", set_in("args", "env_id", "Hopper-v5"))
    with pytest.raises(SystemExit) as stop:
        run(load("gipo_continuous"), monkeypatch, tmp_path, ["--evaluate", copy, "--eval-episodes", 3])
    assert stop.value.code == 2
    assert "does not fit" in capsys.readouterr().err


def test_no_checkpoint_there(monkeypatch, tmp_path, capsys):
    for flag in ("--resume", "--evaluate"):
        with pytest.raises(SystemExit) as stop:
            run(load("gipo_continuous"), monkeypatch, tmp_path, [flag, "nowhere"])
        assert stop.value.code == 2
        assert "nowhere" in capsys.readouterr().err


# ------------------------------------------------------ the file ------------------------------------------------------


@pytest.mark.parametrize("lag", [0, 3])
@pytest.mark.parametrize("name", PROBE)
def test_the_size_of_a_checkpoint(name, lag, monkeypatch, tmp_path):
    argv = [*domain_of(name), "--env-id", PROBE[name], *TINY, "--total-timesteps", 5 * ROLLOUT, "--policy-lag", lag]
    end = run(load(name), monkeypatch, tmp_path, [*argv, "--buffer-epochs", 4])

    def size(state):
        return sum(tensor.nbytes for tensor in state.values())

    weights = size(end.agent.state_dict())
    limit = 1.1 * (size(end.buffer.state_dict()) + (3 + lag) * weights) + 1e6
    assert (folder_of(tmp_path) / "checkpoint.pt").stat().st_size <= limit


def test_the_random_states_come_back(saved, monkeypatch, tmp_path):
    shutil.copytree(saved["gipo_continuous"].parent, tmp_path / "run")
    end = run(load("gipo_continuous"), monkeypatch, tmp_path, ["--resume", "run"])
    state = torch.load(saved["gipo_continuous"])
    assert torch.equal(torch.get_rng_state(), state["torch"])
    assert list(random.getstate()[1]) == state["python"].tolist()
    assert [*np.random.get_state()[1], np.random.get_state()[2]] == state["numpy"].tolist()
    assert end.args.device == "auto"


# ----------------------------------------------------- evaluation -----------------------------------------------------

REAL = {
    "atari": "--env-id ALE/Breakout-v5 --num-envs 4 --num-steps 16 --num-minibatches 2 --total-timesteps 128",
    "continuous": "--env-id Hopper-v5 --num-envs 4 --num-steps 16 --num-minibatches 2 --total-timesteps 128",
    "minigrid": "--num-envs 4 --num-steps 16 --num-minibatches 2 --total-timesteps 128",
}
CASES = [(name, argv, list(REAL)[i % 3]) for i, (name, argv) in enumerate(ENTRIES)]


def summary(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if " episodes: " in line]


@pytest.mark.parametrize(("name", "argv", "domain"), CASES)
def test_a_loaded_agent_scores_as_it_did_before_it_was_saved(name, argv, domain, monkeypatch, tmp_path, capsys):
    run(load(name), monkeypatch, tmp_path, [*argv, *REAL[domain].split(), "--eval-episodes", 6])
    (trained,) = summary(capsys)
    run_again = [*argv, "--evaluate", folder_of(tmp_path), "--eval-episodes", 6]
    with pytest.raises(SystemExit) as stop:
        run(load(name), monkeypatch, tmp_path, run_again)
    assert not stop.value.code
    (evaluated,) = summary(capsys)
    assert trained == evaluated and trained.startswith("6 episodes: ")
    assert ("success_rate" in trained) == (domain == "minigrid")
    ((step, mean),) = scalars(tmp_path)["eval/episodic_return"]
    printed = float(re.search(r"mean episodic_return ([-.e0-9]+)", trained)[1])
    assert step == 128 and printed == pytest.approx(mean, rel=1e-5)


def test_short_episodes_are_not_favored(monkeypatch, tmp_path):
    """Episodes of 3 and of 30 steps in turn: to take the first ten that end would count the short ones more often."""
    argv = ["--env-id", "probes:Uneven-v0", *TINY, "--total-timesteps", 2 * ROLLOUT, "--eval-episodes", 4]
    run(load("gipo_continuous"), monkeypatch, tmp_path, argv)
    ((_, length),) = scalars(tmp_path)["eval/episodic_length"]
    assert length == (3 + 30) / 2


@pytest.mark.parametrize("episodes", [1, 2, 5])
def test_exactly_so_many_episodes(episodes, monkeypatch, tmp_path, capsys):
    argv = ["--env-id", "probes:Bar-v0", *TINY, "--total-timesteps", ROLLOUT, "--eval-episodes", episodes]
    run(load("gipo_continuous"), monkeypatch, tmp_path, argv)
    assert summary(capsys)[0].startswith(f"{episodes} episodes: ")


def test_evaluation_leaves_the_random_states_alone(saved, monkeypatch, tmp_path):
    """A run that is evaluated and one that is not end in the same state."""
    states = []
    for episodes in (0, 3):
        folder = tmp_path / str(episodes)
        folder.mkdir()
        argv = ["--env-id", "probes:Bar-v0", *TINY, "--total-timesteps", ROLLOUT, "--eval-episodes", episodes]
        run(load("gipo_continuous"), monkeypatch, folder, argv)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize(("name", "argv", "domain"), CASES[:3])
def test_a_video_can_be_watched(name, argv, domain, monkeypatch, tmp_path):
    from imageio_ffmpeg import count_frames_and_secs
    from moviepy import VideoFileClip

    flags = [*argv, *REAL[domain].split(), "--eval-episodes", 1, "--capture-video"]
    run(load(name), monkeypatch, tmp_path, flags)
    ((_, length),) = scalars(tmp_path)["eval/episodic_length"]
    frame_count, _ = count_frames_and_secs(str(folder_of(tmp_path) / "128.mp4"))
    assert frame_count == pytest.approx(length, abs=1)  # the encoder may round the last one away
    with VideoFileClip(folder_of(tmp_path) / "128.mp4") as clip:
        frames = list(clip.iter_frames())
        assert clip.fps == {"atari": 15, "continuous": 125, "minigrid": 10}[domain]
    assert all(frame.mean() > 5 for frame in frames)  # not black
    assert frames[0].shape[2] == 3 and frames[0].std(2).max() > 0  # in color
    assert not np.array_equal(frames[0], frames[-1])
