"""The plans: what tuning chooses, which seeds a run has, and that its script takes the command."""

import importlib
import os
import subprocess
import sys
from collections import Counter

import pytest
import synthetic
import tyro
from harness import ROOT

from benchmark import experiments, llm_tuning, runner, tuning
from benchmark.experiments import EXPERIMENTS
from benchmark.runner import Missing

ZERO = {"HalfCheetah-v5": -300.0, "Hopper-v5": 20.0, "Walker2d-v5": 0.0}
UNIT = {"HalfCheetah-v5": 4000.0, "Hopper-v5": 500.0, "Walker2d-v5": 300.0}
BEST = {"learning_rate": 1e-3, "ratio": "dimension", "sigma": 0.5, "kl_coef": 0.1, "kl_to": "current"}
ROUND_ONE = len(tuning.METHODS) * 36 * 3  # runs: methods, settings, tasks
ELSEWHERE = ("peers", "rllib", "rllib-tune", "llm", "llm-tune", "llm-rates")  # in environments of their own


@pytest.fixture(autouse=True)
def rows(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "ROWS", tmp_path / "rows")
    synthetic.write_random(ZERO | {"CartPole-v1": 20, "Pendulum-v1": -1200})


def tuned_rows(score):
    """Rows of all rounds, with the returns of score(run)."""
    for _ in range(5):  # round two has two parts
        rows = [synthetic.row(one, at(one, score(one))) for one in tuning.plan()]
        synthetic.write("tune", rows)


def at(run, score):
    env_id = run.flags["env_id"]
    return ZERO[env_id] + UNIT[env_id] * score


def fits(run, **flags):
    return flags.items() <= run.flags.items()


def test_the_grid_has_one_shape():
    assert {len(tuning.grid(method)) for method in tuning.METHODS} == {36}
    for method in tuning.METHODS:
        found = tuning.grid(method)
        assert len({tuning.words(flags) for flags in found}) == 36
        assert Counter(flags["ratio"] for flags in found) == {"action": 18, "dimension": 18}
        assert Counter((flags["kl_coef"], flags.get("kl_to")) for flags in found) == {
            (0, None): 6, (0.03, "current"): 6, (0.1, "current"): 6, (0.3, "current"): 6,
            (0.03, "behaviour"): 6, (0.1, "behaviour"): 6,
        }  # fmt: skip
    assert tuning.gate(0.5) == {"sapo_tau": 2.828, "sapo_tau_neg": 2.97}
    assert len(tuning.round_one()) == ROUND_ONE


def test_tuning_chooses_one_setting_for_both_sizes_and_the_best_for_each():
    def score(run):
        if run.method != "gipo":
            return 0.3
        if fits(run, **BEST):
            return 0.8
        if fits(run, **BEST | {"sigma": 1.0}):  # good for K = 8 alone
            return 0.9 if run.flags["buffer_epochs"] == 8 else 0.1
        # one width shines in a single task
        if fits(run, ratio="action", sigma=2.0) and run.flags["env_id"] == "HalfCheetah-v5":
            return 90
        return 0.25 if fits(run, ratio="action") else 0.2

    with pytest.raises(Missing, match=f"{ROUND_ONE} runs of tune are missing"):
        tuning.choice("gipo")
    tuned_rows(score)
    assert tuning.choice("gipo") == tuning.choice("gipo", 1) == BEST
    assert tuning.choice("gipo", 8) == BEST | {"sigma": 1.0}
    assert tuning.choice("gipo", ratio="action")["sigma"] == 2.0  # which is no finalist


def test_four_rounds_try_fewer_settings_each_and_the_last_three_choose():
    early, lucky, steady = (BEST | {"kl_coef": weight} for weight in (0.03, 0.3, 0.1))
    # by KL weight, for each seed
    scores = {0.03: (0.9, 0.1, 0.1, 0.9, 0.9), 0.3: (0.7, 0.9, 0.9, 0.2, 0.2), 0.1: (0.6, 0.8, 0.8, 0.8, 0.8)}

    def score(run):
        if run.method == "gipo" and any(fits(run, **known) for known in (early, lucky, steady)):
            return scores[run.flags["kl_coef"]][run.flags["seed"] - 1001]
        return 0.3

    tuned_rows(score)
    second, third, fourth = tuning.round_two(), tuning.round_three(), tuning.round_four()
    counts = Counter(one.method for one in second)
    assert set(counts) == set(tuning.METHODS) and all(9 * 6 <= count <= 12 * 6 for count in counts.values())
    seeds = [{one.flags["seed"] for one in runs} for runs in (second, third, fourth)]
    assert seeds == [{1002}, {1003}, {1004, 1005}]
    assert all({one.flags["buffer_epochs"] for one in runs} == {1, 8} for runs in (second, third, fourth))
    assert len(third) == len(second + tuning.wider())
    assert all(3 <= len(known) <= 5 for known in tuning.finalists().values())
    assert lucky in tuning.finalists()["gipo"] and early not in tuning.finalists()["gipo"]
    assert len(fourth) == 2 * 6 * sum(map(len, tuning.finalists().values()))
    assert len(tuning.plan()) == ROUND_ONE + 2 * len(third) + len(fourth)
    assert tuning.choice("gipo") == steady
    rows = [synthetic.row(one, at(one, score(one))) for one in tuning.plan()]
    for row, one in zip(rows, tuning.plan()):
        if one.method == "gipo" and fits(one, **steady) and one.flags["seed"] >= 1004:
            row |= {"final_return": "", "diverged": 1}  # counts as random actions
    synthetic.write("tune", rows)
    assert tuning.choice("gipo") == lucky


def test_both_units_reach_round_two():
    tuned_rows(lambda run: 0.8 if fits(run, ratio="dimension") else 0.2 + 0.3 * fits(run, kl_coef=0.03))
    counts = Counter((one.method, one.flags["ratio"]) for one in tuning.round_two())
    assert counts == {(m, ratio): n * 6 for m in tuning.METHODS for ratio, n in (("dimension", 9), ("action", 3))}
    found = tuning.choice("gipo", ratio="action")
    assert found["ratio"] == "action" and found["kl_coef"] == 0.03
    assert tuning.choice("gipo", 1, ratio="action")["kl_coef"] == 0.03


def test_what_lies_beside_a_setting():
    assert tuning.beside("gipo", BEST) == [BEST | {"learning_rate": rate} for rate in (5e-4, 2e-3)]
    corner = BEST | {"sigma": 0.3, "kl_coef": 0.3}
    assert tuning.beside("gipo", corner)[2:] == [corner | {"sigma": 0.15}, corner | {"kl_coef": 1.0}]
    assert tuning.beside("gipo", BEST | {"sigma": 1.0})[2:] == [BEST | {"sigma": 2.0}]
    plain = {"learning_rate": 2e-3, "ratio": "action", "kl_coef": 0.1, "kl_to": "behaviour"}
    assert tuning.beside("plain_is", plain) == [plain | {"learning_rate": 4e-3}, plain | {"kl_coef": 0.3}]
    assert tuning.beside("plain_is", plain | {"learning_rate": 1e-3, "kl_coef": 0.03}) == []


def test_each_method_is_widened_beside_its_best_setting():
    edge = BEST | {"sigma": 0.3}
    beyond = edge | {"sigma": 0.15}
    tuned_rows(lambda run: 0.8 if fits(run, **beyond) else 0.6 if fits(run, **edge) else 0.3)
    tried = [one for one in tuning.wider() if one.method == "gipo"]
    assert {one.line for one in tried} == {tuning.words(flags) for flags in tuning.beside("gipo", edge)}
    assert len(tried) == 3 * 6 and {one.flags["seed"] for one in tried} == {1002}
    assert tuning.choice("gipo") == beyond
    assert tuning.at_an_edge("gipo", beyond) and not tuning.at_an_edge("gipo", edge)
    assert tuning.at_an_edge("gipo", edge | {"learning_rate": 5e-4})
    other = BEST | {"kl_coef": 0.03}  # beside which nothing was tried
    assert not tuning.at_an_edge("gipo", other) and tuning.at_an_edge("gipo", other | {"sigma": 0.3})
    assert tuning.at_an_edge("gipo", BEST | {"kl_coef": 0.3}) and not tuning.at_an_edge("gipo", BEST | {"kl_coef": 0.0})
    plain = {"learning_rate": 1e-3, "ratio": "action", "kl_coef": 0.0}
    assert not tuning.at_an_edge("plain_is", plain) and tuning.at_an_edge("plain_is", plain | {"learning_rate": 5e-4})


@pytest.fixture
def untuned(monkeypatch):
    """As if the first setting of each method with a KL term were the best, K = 8 the best size, all rates alike."""

    def choice(method, k=None, **same):
        return next(x for x in tuning.grid(method) if x["kl_coef"] and same.items() <= x.items())

    monkeypatch.setattr(tuning, "choice", choice)
    monkeypatch.setattr(experiments, "by_size", lambda: None)
    monkeypatch.setattr(experiments, "best_size", lambda table, method: 8)
    monkeypatch.setattr(experiments, "best_other", lambda table: "sapo")
    monkeypatch.setattr(llm_tuning, "choice", lambda loss: llm_tuning.settings(loss)[0])
    synthetic.write("rllib-tune", [synthetic.row(one, 1.0) for one in experiments.rllib_tune()])


def test_tuning_and_reporting_share_no_seed(untuned):
    rounds = [name for name in EXPERIMENTS if name.endswith("tune")]
    tuned = {one.flags["seed"] for name in rounds for one in EXPERIMENTS[name]()}
    tuned |= {*tuning.SEEDS, *llm_tuning.SEEDS}
    plans = {name: list(EXPERIMENTS[name]()) for name in EXPERIMENTS if name not in rounds}
    everything = [one for plan in plans.values() for one in plan]
    assert not tuned & {one.flags.get("seed", 1) for one in everything}
    tasks = {one.flags["env_id"] for one in everything if "env_id" in one.flags}
    assert tasks == set(experiments.REPORTED)  # whose random actions are known
    # seeds of each line, dial and task
    seeds = Counter((one.line, one.flags["buffer_epochs"], one.flags["env_id"]) for one in plans["staleness"])
    cells = len(tuning.METHODS) * 3  # methods and tasks
    assert Counter(seeds.values()) == {10: 3 * cells, 5: 2 * cells}
    assert len({one.command for one in plans["updates"]}) == 3 * 3 * 5 * 9
    shared = {one.command for one in plans["updates"]} & {one.command for one in plans["staleness"]}
    assert len(shared) == 3 * 3 * 5 * 3  # those with the default number of epochs
    assert all(one.flags["eval_episodes"] == 20 for name in ("lag", "freeze") for one in plans[name])
    bare = {one.command for one in plans["million"] if len(one.flags) == 1}
    assert "python gipo_continuous.py --env-id Ant-v5" in bare and len(bare) == 4


def test_ablation_changes_one_thing_at_a_time(untuned):
    own = tuning.choice("gipo")
    start = {"gipo": own, "one_sided": own, "clip": tuning.choice("clip")}
    changed = {one.line: set(one.flags.items()) ^ set((start[one.method] | {"total_timesteps": 150_000}).items())
               for one in EXPERIMENTS["ablation"]()}  # fmt: skip
    names = {line: {name for name, _ in pairs} - {"env_id", "seed", "buffer_epochs", "eval_episodes"}
             for line, pairs in changed.items()}  # fmt: skip
    assert names.pop("GIPO") == names.pop("weight only where r > 1") == names.pop("PPO-clip") == set()
    assert names.pop("PPO-clip, no KL") == {"kl_coef", "kl_to"}
    assert names.pop(f"PPO-clip, epsilon {2 * start['clip']['clip_coef']:g}") == {"clip_coef"}
    assert names.pop("PPO-clip, no V-trace") == {"advantage_source"}
    assert names.pop("ratio per dimension") == {"ratio"} and names.pop("no KL") == {"kl_coef", "kl_to"}
    assert names.pop("no V-trace") == {"advantage_source"}
    assert names.pop("ratio per dimension, tuned for it") == {"ratio", "sigma"}
    assert all(found <= {"kl_coef", "kl_to"} for line, found in names.items() if line.startswith("KL"))
    assert sum(line.startswith("KL") for line in names) == 4
    assert {line for line in names if line.startswith("sigma")} == {"sigma 0.25", "sigma 1"}


def test_the_best_size_and_the_best_other_method_are_those_of_the_scores(monkeypatch):
    monkeypatch.setattr(tuning, "choice", lambda method, k=None: tuning.grid(method)[0])

    def score(run):
        return {1: 0.5, 8: 0.9, 32: 0.6}[run.flags["buffer_epochs"]] - 0.1 * (run.method not in ("gipo", "clip", "tis"))

    rows = [synthetic.row(one, at(one, score(one))) for one in experiments.staleness()]
    synthetic.write("staleness", rows)
    table = experiments.by_size()
    assert experiments.best_size(table, "gipo") == 8 and experiments.best_other(table) == "tis"
    lines = Counter(one.line for one in EXPERIMENTS["million"]())
    ours = {"GIPO, K = 1", "GIPO, K = 8", "PPO-clip, K = 1", "PPO-clip, K = 8", "TIS, K = 8", "GIPO, no flags"}
    theirs = ("PPO-clip, CleanRL's flags", "GIPO, CleanRL's flags")
    assert set(lines) == ours | {*theirs, "GIPO, CleanRL's flags, sigma 0.25", "PPO of Stable-Baselines3"}
    clip, gipo = (next(one.flags for one in EXPERIMENTS["million"]() if one.line == line) for line in theirs)
    assert clip["kl_coef"] == 0  # whatever the baseline's default is
    assert {key for key in clip if clip[key] != gipo.get(key)} - {"kl_coef"} == {"clip_coef"}
    assert gipo["sigma"] == tuning.choice("gipo")["sigma"] and gipo["learning_rate"] == clip["learning_rate"] == 3e-4
    without = table[(table.method != "tis") | (table.buffer_epochs < 32)]  # its mean of K = 8 alone would be higher
    assert experiments.best_other(without) != "tis"
    with pytest.raises(Missing, match="staleness first"):
        experiments.best_other(table[table.buffer_epochs == 1])
    synthetic.write("staleness", [row for row in rows if row["seed"] != 11])
    with pytest.raises(Missing, match="staleness first"):
        experiments.by_size()


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name not in ELSEWHERE])
def test_every_command_is_one_that_its_script_takes(name, untuned):
    kinds = {(one.script, *one.flags): one for one in EXPERIMENTS[name]()}
    for one in kinds.values():
        script, *words = one.script.split()
        if script == "benchmark/sb3_agent.py":
            continue
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        domain = module.Variant if script.startswith("benchmark") else module.Domain
        args = tyro.cli(domain, args=[*words, *one.arguments])
        for flag, value in one.flags.items():
            assert getattr(args, flag) == value, one.command


def test_every_run_has_a_folder_of_its_own(untuned):
    plan = {one.command: one for plan in EXPERIMENTS.values() for one in plan()}
    names = {one.folder.name for one in plan.values()}
    assert len(names) == len(plan) and max(len(name.encode()) for name in names) <= 255  # the longest that systems take


def test_quick_takes_the_defaults_and_needs_no_tuning():
    flags = {flag for one in EXPERIMENTS["quick"]() for flag in one.flags}
    assert flags == {"env_id", "seed", "buffer_epochs", "total_timesteps", "eval_episodes"}


def test_a_plan_is_printed_and_what_is_missing_is_said(untuned, capsys):
    assert experiments.main(experiments.Args("lag", dry_run=True)) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 * 3 * 5 * 3 and printed[0].startswith("python gipo_continuous.py --env-id")
    assert experiments.main(experiments.Args("lag", dry_run=True, only="--policy-lag 8")) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4 * 5 * 3
    assert experiments.main(experiments.Args("lag", only="nothing")) == 2
    assert "--only nothing" in capsys.readouterr().err


def test_what_lacks_its_ground_is_one_sentence(capsys):
    for name in ("staleness", "rllib"):
        assert experiments.main(experiments.Args(name, dry_run=True)) == 2
        assert "tune first." in capsys.readouterr().err


def test_tune_goes_on_with_the_later_rounds(monkeypatch):
    done = []

    def run_all(experiment, runs, workers):
        done.append(len(runs))
        synthetic.write(experiment, [synthetic.row(one, at(one, 0.5)) for one in tuning.plan()])
        return 0

    monkeypatch.setattr(experiments, "run_all", run_all)
    assert experiments.main(experiments.Args("tune")) == 0
    assert done[0] == ROUND_ONE and len(done) == 5
    monkeypatch.setattr(experiments, "unfinished", lambda plan: plan)
    monkeypatch.setattr(experiments, "run_all", lambda *_: 1)
    assert experiments.main(experiments.Args("tune")) == 1  # and does not try forever


def test_language_models_are_tuned_in_two_rounds():
    def score(run):
        wide = fits(run, sigma=1.0) and 0.2
        return 0.5 + 0.1 * fits(run, learning_rate=1e-4) + 0.1 * fits(run, kl_coef=0.1) + wide

    with pytest.raises(Missing, match="72 runs of llm-tune are missing"):
        llm_tuning.choice("gipo")
    for _ in range(2):
        rows = [synthetic.row(one, score(one)) for one in llm_tuning.plan()]
        synthetic.write("llm-tune", rows)
    assert len(rows) == 72 + 3 * 9 + 3 * 3
    assert Counter(one.method for one in llm_tuning.round_one()) == dict.fromkeys(llm_tuning.BANDWIDTHS, 12)
    assert llm_tuning.choice("gipo") == {"learning_rate": 1e-4, "kl_coef": 0.1, "sigma": 1.0}
    assert llm_tuning.choice("vespo") == {"learning_rate": 1e-4, "kl_coef": 0.1}
    plan = list(experiments.llm())
    assert len(plan) == 6 * 3 * 5 and plan[0].command.startswith("python benchmark/llm_run.py --loss gipo --seed 11")


@pytest.mark.slow
def test_a_reader_that_has_seen_enough():
    command = f"{sys.executable} -m benchmark.experiments quick --dry-run | head -1"
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout.startswith("python gipo_continuous.py") and result.stderr == ""
