"""The batches of the evidence: nothing is run twice, nothing fails unnoticed, a row says what its run's log says."""

import fcntl
import itertools
import subprocess
import sys
from subprocess import CalledProcessError
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
from harness import ROOT, load, load_variant, scalars

from benchmark import experiments, runs

SMALL = "--num-envs 2 --num-steps 16 --num-minibatches 2 --update-epochs 1 --total-timesteps 320 --eval-episodes 0"


def probe(env_id: str, seed: int) -> runs.Run:
    return runs.Run("gipo", "gipo_continuous.py", ("--env-id", env_id, "--seed", str(seed), *SMALL.split()))


@pytest.fixture
def places(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(runs, "WORK", tmp_path / "work")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    return tmp_path


@pytest.mark.slow
def test_a_batch(places, monkeypatch, capsys):
    good, bad = probe("probes:Clock-v0", 1), probe("probes:Clok-v0", 1)
    kept = []
    monkeypatch.setattr(runs.shutil, "rmtree", lambda path, **_: kept.append(path))  # to compare with the log
    assert runs.run_all("probe", [good, bad]) == 1
    error = capsys.readouterr().err
    assert f"failed: {bad.command}" in error and f"failed: {good.command}" not in error
    assert "Did you mean: `Clock`" in (bad.folder / "log.txt").read_text()
    (row,) = runs.rows("probe")
    logged = scalars(good.folder)
    assert good.folder in kept and bad.folder not in kept
    returns = [value for step, value in logged["charts/episodic_return"] if step > 288]
    assert float(row["final_return"]) == pytest.approx(np.mean(returns), rel=1e-5)
    ess = [value for step, value in logged["offpolicy/ess"] if step > 288]
    assert float(row["ess"]) == pytest.approx(np.mean(ess), rel=1e-5)
    assert float(row["final_success"]) == 1
    assert row["command"] == good.command and row["env_id"] == "probes:Clock-v0" and row["sigma"] == "0.5"
    assert row["kl_coef"] == "0.1" and row["advantage_source"] == "vtrace" and row["minibatch_size"] == ""
    assert len(row["curve"].split()) == runs.CURVE_POINTS
    assert float(row["mean_return"]) == pytest.approx(np.mean([float(v) for v in row["curve"].split()]), rel=1e-4)

    tried = []
    monkeypatch.setattr(runs, "execute", lambda run: tried.append(run) or row)
    assert runs.run_all("probe", [good, bad, bad], dry_run=True) == 0 and not tried
    assert capsys.readouterr().out.splitlines() == [bad.command]
    assert runs.run_all("probe", [good, bad]) == 0 and tried == [bad]


@pytest.fixture
def process(places, monkeypatch):
    """Stands in for the process of a run: keeps the commands, writes `output`, exits with `code`."""
    stand_in = SimpleNamespace(commands=[], output="", code=0)

    def start(command, cwd, stdout, **_):
        stand_in.commands.append(command)
        (cwd / "runs" / "one").mkdir(parents=True, exist_ok=True)
        stdout.write(stand_in.output)
        stdout.flush()
        return SimpleNamespace(returncode=stand_in.code)

    monkeypatch.setattr(runs, "subprocess", SimpleNamespace(run=start, CalledProcessError=CalledProcessError))
    monkeypatch.setattr(runs, "revision", lambda *scripts: "abc+")  # with any change that is not committed
    monkeypatch.setattr(runs, "digest", lambda *scripts: stand_in.digest)
    monkeypatch.setattr(runs, "row", lambda run, folder: {"final_return": "7", "diverged": 0})
    stand_in.digest = "1"
    return stand_in


@pytest.mark.parametrize(
    "method, positional",
    [
        ("gipo", []),
        ("clip", ["continuous"]),
        ("sapo", ["sapo", "ppo_baseline.py", "continuous"]),
        ("decoupled", ["decoupled", "ppo_baseline.py", "continuous"]),
    ],
)
def test_an_interrupted_run_goes_on_with_the_same_code_only(method, positional, process):
    run = experiments.run(method, "Hopper-v5", 1)
    assert runs.execute(run)["seconds"] == 0  # and leaves its folder, as an interrupted one would
    saved = run.folder / "runs" / "one"
    (saved / "checkpoint.pt").touch()
    assert runs.execute(run)["seconds"] == ""
    process.digest = "2"
    assert runs.execute(run)["seconds"] == 0 and not (saved / "checkpoint.pt").exists()
    script = [sys.executable, str(ROOT / run.script)]
    fresh = [*script, *run.arguments]
    assert process.commands == [fresh, [*script, *positional, "--resume", str(saved)], fresh]


def test_a_run_that_had_ended_has_a_row(process):
    """As if this process had been stopped between the end of the run and its row."""
    run = probe("probes:Clock-v0", 1)
    runs.execute(run)
    (run.folder / "runs" / "one" / "checkpoint.pt").touch()
    process.code, process.output = 2, "error: --total-timesteps 320: give at least 352.\n"
    assert runs.execute(run)["seconds"] == ""
    process.output = "error: another mistake\n"
    with pytest.raises(CalledProcessError):
        runs.execute(run)


def test_a_run_whose_loss_is_not_finite_has_a_row(process):
    run = probe("probes:Clock-v0", 1)
    process.code, process.output = (
        1,
        "error: ['losses/kl'] not finite in iteration 3; runs/one keeps its last checkpoint.\n",
    )
    assert runs.execute(run) | {"seconds": 0} == {
        "final_return": "",
        "final_success": "",
        "diverged": 1,
        "revision": "abc+",
        "seconds": 0,
    }
    process.output = "Traceback\n"  # the words of the first attempt are not those of this one
    with pytest.raises(CalledProcessError):
        runs.execute(run)


def test_no_two_batches_do_one_run(process):
    run = probe("probes:Clock-v0", 1)
    run.folder.mkdir(parents=True)
    with (run.folder / "log.txt").open("w") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError, match="another batch"):
            runs.execute(run)
    assert not process.commands


def test_curve():
    points = [(10, 1.0), (20, 3.0), (21, 10.0), (70, 5.0), (100, 7.0)]
    assert runs.curve(points, 100, 5).tolist() == [2, 10, 10, 5, 7]
    assert runs.curve([(50, 4.0)], 100, 4).tolist() == [4, 4, 4, 4]


@pytest.mark.slow
def test_a_variant_has_its_flags_in_its_row(places):
    flags = {"num_envs": 2, "num_steps": 16, "num_minibatches": 2, "update_epochs": 1, "total_timesteps": 32}
    run = experiments.run("sapo", "probes:Clock-v0", 1, kl_coef=0, sapo_tau=0.7, **flags)
    assert runs.run_all("probe", [run]) == 0
    (row,) = runs.rows("probe")
    assert (
        row["method"] == "sapo" and row["sapo_tau"] == "0.7" and row["clip_coef"] == "0.2" and row["kl_coef"] == "0.0"
    )


def test_without_a_checkpoint_the_flags_are_in_a_file(tmp_path):
    (tmp_path / "args.json").write_text('{"env_id": "Hopper-v5", "sigma": null}')
    assert runs.settings(tmp_path) == {"env_id": "Hopper-v5", "sigma": None}


def test_what_another_experiment_has_run_is_not_run_again(process, monkeypatch):
    run = probe("probes:Clock-v0", 1)
    monkeypatch.setattr(runs, "row", lambda run, folder: {"command": run.command})
    process.code, process.output = 1, "not finite"
    assert runs.run_all("one", [run]) == runs.run_all("other", [run]) == 0
    assert len(process.commands) == 1 and runs.rows("other") == []


def tuning_rows(finals):
    """Rows of the tuning, in which `finals` gives the return, from 0 to 1, of (method, flags, environment)."""
    units = {"Swimmer-v5": (0.0, 40.0), "Reacher-v5": (-50.0, 40.0), "InvertedDoublePendulum-v5": (0.0, 8000.0)}
    known = []
    for run in experiments.tune():
        env_id = run.value("--env-id")
        low, unit = units[env_id]
        final = low + unit * finals(run, env_id)
        known.append({"command": run.command, "env_id": env_id, "final_return": str(final)})
    return known


def by_command(known):
    return {row["command"]: row for row in known}


def test_tuning_takes_the_best_mean_of_scaled_returns(monkeypatch):
    def finals(run, env_id):
        flags = run.value("--sigma"), run.value("--kl-coef")
        if flags in (("1", "0.1"), ("0.3", "0")):  # the best differ with KL and without
            return 0.8
        # one setting shines in a single environment, whose numbers are the largest
        lucky = flags == ("0.5", "0.1") and env_id == "InvertedDoublePendulum-v5"
        return 1.0 if lucky else 0.1 if run.method == "gipo" else 0.05

    known = tuning_rows(finals)
    monkeypatch.setattr(experiments, "finished", lambda: by_command(known))
    assert experiments.tuned("gipo") == {"learning_rate": 1e-3, "sigma": 1.0, "kl_coef": 0.1}
    assert experiments.tuned("gipo", 0.3) == {"learning_rate": 1e-3, "sigma": 1.0, "kl_coef": 0.3}
    assert experiments.tuned("gipo", 0) == {"learning_rate": 1e-3, "sigma": 0.3, "kl_coef": 0}
    for row, run in zip(known, experiments.tune()):
        if run.value("--sigma") == "1" and run.value("--kl-coef") == "0.1":
            row["final_return"] = ""  # diverged
    assert experiments.tuned("gipo")["sigma"] == 0.5
    monkeypatch.setattr(experiments, "finished", lambda: by_command(known[1:]))
    with pytest.raises(runs.Missing, match="tune first"):
        experiments.tuned("gipo")


def test_plain_importance_sampling_tunes_its_learning_rate(monkeypatch):
    known = tuning_rows(lambda run, env_id: float(run.value("--learning-rate") == "0.002"))
    monkeypatch.setattr(experiments, "finished", lambda: by_command(known))
    assert experiments.tuned("none") == {"learning_rate": 2e-3, "kl_coef": 0.1}


@pytest.fixture
def untuned(monkeypatch):
    """As if the first candidate of each method were the best."""
    monkeypatch.setattr(experiments, "tuned", lambda method, kl=0.1: experiments.candidate(method, 0, kl))
    monkeypatch.setattr(experiments, "group_scores", lambda experiment, groups: dict.fromkeys(groups, 0.0))


def test_tuning_shares_nothing_with_what_is_reported(untuned):
    names = experiments.EXPERIMENTS.keys() - {"tune", "width-tune", "rllib-tune", "llm"}
    reported = {name: list(experiments.EXPERIMENTS[name]()) for name in names}

    def values(batch, flag):
        return {run.value(flag) for run in batch}

    tuning, everything = list(experiments.tune()), list(itertools.chain(*reported.values()))
    for flag, batch in itertools.product(("--env-id", "--seed"), (tuning, list(experiments.width_tune()))):
        assert not values(batch, flag) & values(everything, flag)
    for seeds in (values(experiments.rllib_tune(), "--seed"), {"1001", "1002"}):
        assert not seeds & (values(everything, "--seed") | values(experiments.llm(), "--seed"))
    budgets = {method: sum(run.method == method for run in tuning) for method in experiments.METHODS}
    assert len(set(budgets.values())) == 1
    assert len(tuning) == len(set(tuning))
    assert values(everything, "--env-id") == set(experiments.REPORTED)  # whose random actions are known


def test_a_width_per_dimension_grows_with_the_root_of_their_number(monkeypatch):
    monkeypatch.setattr(experiments, "group_scores", lambda experiment, groups: {0.3: 0, 0.5: 1, 1.0: 0.5})
    widths = {run.value("--env-id"): float(run.value("--sigma")) for run in experiments.width()}
    expected = {"HalfCheetah-v5": 0.5 * 6**0.5, "Hopper-v5": 0.5 * 3**0.5, "Walker2d-v5": 0.5 * 6**0.5}
    assert widths == pytest.approx(expected, abs=1e-3)
    for env_id, dimensions in experiments.DIMENSIONS.items():
        with gymnasium.make(env_id) as env:
            assert env.action_space.shape == (dimensions,)


def test_one_run_has_one_command_in_all_experiments(untuned):
    """GIPO with and without KL, PPO-clip without, no lag: the ablation and the lag take these from the staleness."""
    plans = {name: set(experiments.EXPERIMENTS[name]()) for name in ("staleness", "ablation", "lag")}
    assert len(plans["ablation"] & plans["staleness"]) == 3 * 3 * 3 * 10
    assert len(plans["lag"] & plans["staleness"]) == 6 * 3 * 5


def test_every_run_has_a_folder_of_its_own(untuned):
    plan = {run.command: run for one in experiments.EXPERIMENTS.values() for run in one()}
    names = {run.folder.name for run in plan.values()}
    assert len(names) == len(plan)
    assert max(len(name.encode()) for name in names) <= 255  # the longest name that Linux and macOS take


def test_quick_takes_the_defaults_and_needs_no_tuning(monkeypatch):
    monkeypatch.setattr(experiments, "finished", dict)
    flags = {word for run in experiments.quick() for word in run.arguments if word.startswith("--")}
    assert flags == {"--env-id", "--seed", "--buffer-epochs", "--total-timesteps", "--eval-episodes"}


@pytest.mark.parametrize(
    "name", [name for name in experiments.EXPERIMENTS if name not in ("peers", "rllib", "rllib-tune", "llm")]
)
def test_every_command_is_one_that_its_script_takes(name, untuned, monkeypatch):
    seen = {}
    for run in experiments.EXPERIMENTS[name]():
        flags = tuple(word for word in run.arguments if word.startswith("--"))
        seen.setdefault((run.method, run.script, flags), run)  # one of each kind
    for run in seen.values():
        method, *words = run.arguments if run.script == "benchmark/variants.py" else (None, run.script, *run.arguments)
        script, *words = words
        module = load_variant(method) if method else load(script.removesuffix(".py"))
        monkeypatch.setattr(sys, "argv", [script, *words])
        args, _ = module.read_args()
        assert args.env_id == run.value("--env-id") and args.eval_episodes == 0


def test_versions_of_every_listed_package(tmp_path):
    """Some packages have an underscore in their name, and some environments have no pip."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    (site,) = tmp_path.glob("lib/python*/site-packages")
    for i, name in enumerate(runs.PACKAGES):
        (site / f"{name.replace('-', '_')}-1.{i}.dist-info").mkdir()
        (site / f"{name.replace('-', '_')}-1.{i}.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name.replace('-', '_')}\nVersion: 1.{i}\n"
        )
    found = runs.versions(tmp_path / "bin" / "python")
    assert found == " ".join(f"{name}=1.{i}" for i, name in enumerate(runs.PACKAGES))


def test_a_digest_tells_code_apart(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "b.py").write_text("2")
    first = runs.digest("a.py", "b.py")
    assert runs.digest("a.py", "b.py") == first
    (tmp_path / "b.py").write_text("3")
    assert runs.digest("a.py", "b.py") != first
