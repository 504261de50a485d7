"""The runs of the evidence: nothing is run twice, nothing fails unnoticed, a row says what its run's log says."""

import contextlib
import json
import subprocess
import sys
from subprocess import CalledProcessError
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from harness import ROOT, scalars
from torch.utils.tensorboard import SummaryWriter

from benchmark import methods, runner

SMALL = {"num_envs": 2, "num_steps": 16, "num_minibatches": 2, "update_epochs": 1, "total_timesteps": 320}


def probe(method: str, env_id: str = "probes:Clock-v0", **flags) -> runner.Run:
    return methods.run(method, env_id, 1, **SMALL | flags)


@pytest.fixture(autouse=True)
def places(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "ROWS", tmp_path / "rows")
    monkeypatch.setattr(runner, "WORK", tmp_path / "work")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    return tmp_path


@pytest.mark.slow
def test_a_batch(monkeypatch, capsys):
    """A good run, one that is evaluated, and one that fails."""
    good, bad = probe("gipo", eval_episodes=3), probe("gipo", "probes:Clok-v0")
    other = probe("sapo", sapo_tau=0.7, kl_coef=0.0)
    kept = []
    monkeypatch.setattr(runner.shutil, "rmtree", lambda path, **_: kept.append(path))  # to compare with the log
    assert runner.run_all("probe", [good, bad, other]) == 1
    error = capsys.readouterr().err
    assert f"failed: {bad.command}" in error and f"failed: {good.command}" not in error
    assert "Did you mean: `Clock`" in (bad.folder / "log.txt").read_text()
    rows = runner.read_rows().set_index("method")
    assert set(rows.index) == {"gipo", "sapo"} and good.folder in kept and bad.folder not in kept
    row, flags = rows.loc["gipo"], json.loads(rows["flags"]["gipo"])
    logged = scalars(good.folder)
    for column, tag in {"final_return": "charts/episodic_return", "ess": "offpolicy/ess"}.items():
        values = [value for step, value in logged[tag] if step > 288]
        assert row[column] == pytest.approx(np.mean(values), rel=1e-5)
    assert row.final_success == 1 and row.eval_return == pytest.approx(logged["eval/episodic_return"][0][1])
    assert (row.command, row.env_id, row.seed, row.diverged) == (good.command, "probes:Clock-v0", 1, 0)
    assert (flags["sigma"], flags["kl_to"], flags["num_envs"]) == (1, "current", 2)
    assert row.mean_return == pytest.approx(np.mean([float(x) for x in row.curve.split()]), rel=1e-4)
    flags = json.loads(rows["flags"]["sapo"])
    assert (flags["method"], flags["sapo_tau"], flags["kl_coef"]) == ("sapo", 0.7, 0)
    assert pd.isna(rows.eval_return["sapo"]) and runner.unfinished([good, bad, other, bad]) == [bad]


@pytest.fixture
def process(places, monkeypatch):
    """Stands in for the process of a run: keeps the commands, writes `output`, exits with `code`."""
    stand_in = SimpleNamespace(commands=[], output="", code=0, digest="1", row={"eval_return": ""})

    def start(command, cwd, stdout, **_):
        stand_in.commands.append(command)
        (cwd / "runs" / "one").mkdir(parents=True, exist_ok=True)
        stdout.write(stand_in.output)
        stdout.flush()
        return SimpleNamespace(returncode=stand_in.code)

    monkeypatch.setattr(runner, "subprocess", SimpleNamespace(run=start, CalledProcessError=CalledProcessError))
    monkeypatch.setattr(runner, "revision", lambda files: "abc+")
    monkeypatch.setattr(runner, "digest", lambda files: stand_in.digest)
    monkeypatch.setattr(runner, "read_log", lambda run, folder: {"command": run.command} | stand_in.row)
    return stand_in


def done(run: runner.Run) -> dict:
    """The row of a run that leaves its folder, as an interrupted one would."""
    with runner.claimed(run) as log:
        return runner.execute(run, log)


@pytest.mark.parametrize(
    "method, words", [("gipo", []), ("clip", ["continuous"]), ("decoupled", ["--method", "decoupled"])]
)
def test_an_interrupted_run_goes_on_with_the_same_code_only(method, words, process):
    run = probe(method)
    assert done(run)["seconds"] == 0
    saved = run.folder / "runs" / "one"
    (saved / "checkpoint.pt").touch()
    assert done(run)["seconds"] == ""
    process.digest = "2"
    assert done(run)["seconds"] == 0 and not (saved / "checkpoint.pt").exists()
    script = [sys.executable, str(ROOT / run.code[0]), *words]
    fresh = [*script, *run.arguments]
    assert process.commands == [fresh, [*script, "--resume", str(saved), "--eval-episodes", "0"], fresh]


def test_a_run_that_had_ended_has_a_row(process):
    """As if this process had been stopped between the end of the run and its row."""
    run = probe("gipo")
    done(run)
    (run.folder / "runs" / "one" / "checkpoint.pt").touch()
    process.code, process.output = 2, "error: --total-timesteps 320: give at least 352.\n"
    assert done(run)["seconds"] == ""
    process.output = "error: another mistake\n"
    with pytest.raises(CalledProcessError):
        done(run)


def test_a_run_that_was_stopped_while_it_evaluated_begins_again(process, monkeypatch):
    run = probe("gipo", eval_episodes=5)
    done(run)
    (run.folder / "runs" / "one" / "checkpoint.pt").touch()
    process.code, process.output = 2, "error: --total-timesteps 320: give at least 352.\n"
    with pytest.raises(CalledProcessError):  # the second start is a fresh one, which may not end like that
        done(run)
    first, resumed, again = process.commands
    assert first == again and resumed[2] == "--resume" and resumed[-2:] == ["--eval-episodes", "5"]


def test_a_run_whose_loss_is_not_finite_has_a_row(process):
    run = probe("gipo")
    process.code, process.output = 1, "error: ['losses/kl'] not finite in iteration 3; runs/one keeps its last ..."
    row = done(run)
    assert (row["diverged"], row["final_return"], row["final_success"], row["revision"]) == (1, "", "", "abc+")
    process.output = "Traceback\n"  # the words of the first attempt are not those of this one
    with pytest.raises(CalledProcessError):
        done(run)


def test_no_two_batches_do_one_run(process, monkeypatch):
    """Also not while a batch keeps the row of a run that has ended."""
    run, held = probe("gipo"), []

    def read_log(run, folder):
        with pytest.raises(BlockingIOError, match="another batch"):
            done(run)
        held.append(run)
        return {"command": run.command}

    monkeypatch.setattr(runner, "read_log", read_log)
    assert runner.run_all("one", [run]) == 0
    assert held == [run] and len(process.commands) == 1 and not run.folder.exists()
    with runner.claimed(run):
        assert runner.run_all("other", [run]) == 1  # it is said, and not done
    assert len(process.commands) == 1


def test_a_run_that_was_done_while_another_batch_waited_is_not_done_again(process, monkeypatch):
    run = probe("gipo")
    claimed = runner.claimed

    @contextlib.contextmanager
    def late(run):
        monkeypatch.setattr(runner, "claimed", claimed)
        assert runner.run_all("one", [run]) == 0
        with claimed(run) as log:
            yield log

    monkeypatch.setattr(runner, "claimed", late)
    assert runner.run_all("other", [run]) == 0
    assert len(process.commands) == 1 and not run.folder.exists()


def test_a_folder_may_have_a_space(process, monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "ROOT", tmp_path / "my code")
    done(probe("clip"))
    assert process.commands[0][1:3] == [str(tmp_path / "my code" / "ppo_baseline.py"), "continuous"]


def test_the_final_return_is_the_last_one_if_no_episode_ended_in_the_last_tenth(monkeypatch, tmp_path):
    (tmp_path / "args.json").write_text('{"env_id": "Hopper-v5", "seed": 1, "total_timesteps": 100}')
    with SummaryWriter(tmp_path) as writer:
        for step, value in ((10, 1.0), (80, 5.0)):
            writer.add_scalar("charts/episodic_return", value, step)
    assert runner.read_log(probe("gipo"), tmp_path)["final_return"] == "5"
    with SummaryWriter(tmp_path) as writer:
        for step, value in ((95, 7.0), (100, 8.0)):
            writer.add_scalar("charts/episodic_return", value, step)
    assert runner.read_log(probe("gipo"), tmp_path)["final_return"] == "7.5"


def test_what_another_experiment_has_run_is_not_run_again(process):
    run = probe("gipo")
    assert runner.run_all("one", [run]) == runner.run_all("other", [run]) == 0
    assert len(process.commands) == 1 and not (runner.ROWS / "other.csv").exists()


def test_ctrl_c_ends_the_batch_and_starts_no_other_run(process, monkeypatch):
    """The runs that have started end by themselves."""
    monkeypatch.setattr(runner, "as_completed", lambda futures: (_ for _ in ()).throw(KeyboardInterrupt))
    many = [probe("gipo", sigma=0.1 * i) for i in range(1, 200)]
    with pytest.raises(KeyboardInterrupt):
        runner.run_all("one", many, workers=1)
    assert len(process.commands) < 199
    done = len(process.commands)
    assert len(runner.read_rows()) == done and len(runner.unfinished(many)) == 199 - done


def test_a_file_with_other_columns_is_left_as_it_is(process):
    runner.ROWS.mkdir()
    (runner.ROWS / "probe.csv").write_text("command,method\na,b\n")
    with pytest.raises(runner.Missing, match="has other columns"):
        runner.run_all("probe", [probe("gipo")])
    assert (runner.ROWS / "probe.csv").read_text() == "command,method\na,b\n" and not process.commands


def test_curve():
    points = pd.Series([1.0, 3.0, 10.0, 5.0, 7.0], index=[10, 20, 21, 70, 100])
    assert runner.curve(points, 100, 5).tolist() == [2, 10, 10, 5, 7]
    assert runner.curve(pd.Series([4.0], index=[50]), 100, 4).tolist() == [4, 4, 4, 4]
    assert runner.curve(pd.Series(dtype=float, index=pd.Index([], dtype=int)), 100, 4).isna().all()


def test_without_a_checkpoint_the_flags_are_in_a_file(tmp_path):
    (tmp_path / "args.json").write_text('{"env_id": "Hopper-v5", "sigma": null}')
    assert runner.saved_flags(tmp_path) == {"env_id": "Hopper-v5", "sigma": None}


def test_a_run_with_no_flags_but_the_environment():
    run = runner.Run("gipo", "gipo_continuous.py", {"env_id": "Hopper-v5"})
    assert run.command == "python gipo_continuous.py --env-id Hopper-v5"


def test_flags_as_words():
    run = runner.Run("gipo", "x.py", {"compile": True, "kl_to": None, "rate": 1e-3, "k": 8})
    assert run.arguments == ["--compile", "--rate", "0.001", "--k", "8"]


def test_versions_of_every_listed_package(tmp_path):
    """Some packages have an underscore in their name, and some environments have no pip."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    (site,) = tmp_path.glob("lib/python*/site-packages")
    for i, package in enumerate(runner.PACKAGES):
        name = package.replace("-", "_")
        (site / f"{name}-1.{i}.dist-info").mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.{i}\n"
        (site / f"{name}-1.{i}.dist-info" / "METADATA").write_text(text)
    found = runner.versions(tmp_path / "bin" / "python")
    assert found == " ".join(f"{name}=1.{i}" for i, name in enumerate(runner.PACKAGES))


def test_code_is_told_apart(monkeypatch, tmp_path):
    """A variant depends on the scripts that it imports."""
    assert probe("sapo").code == ["benchmark/variants.py", "ppo_baseline.py", "gipo_continuous.py"]
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "b.py").write_text("2")
    first = runner.digest(["a.py", "b.py"])
    assert runner.digest(["a.py", "b.py"]) == first
    (tmp_path / "b.py").write_text("3")
    assert runner.digest(["a.py", "b.py"]) != first
