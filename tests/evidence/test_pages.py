"""Figures, tables and verdicts follow from the rows alone, and from each of them."""

import re
import shutil
import zlib

import numpy as np
import pandas as pd
import pytest
import synthetic
from harness import ROOT
from matplotlib.axes import Axes

from benchmark import drawing, experiments, intervals, measurements, pages, quick, runner, tuning
from benchmark.experiments import EXPERIMENTS
from benchmark.methods import run

TASKS = {"HalfCheetah-v5": (-300.0, 1000.0), "Hopper-v5": (20.0, 500.0), "Walker2d-v5": (0.0, 300.0)}
SCORES = {("clip", 1): 1.0, ("clip", 8): 0.3, ("clip", 32): 0.1, ("sapo", 1): 0.8, ("sapo", 8): 0.7, ("sapo", 32): 0.5}
NUMBER = r"-?\d\.\d\d"


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "ROWS", tmp_path / "rows")
    monkeypatch.setattr(pages, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(pages, "PAGES", [tmp_path / "page.md"])
    monkeypatch.setattr(intervals, "RESAMPLES", 200)
    monkeypatch.setattr(tuning, "choice", lambda method, k=None, **same: tuning.grid(method)[2 if k == 8 else 1])
    monkeypatch.setattr(experiments, "TEN", experiments.FIVE)
    (tmp_path / "page.md").write_text("".join(f"before\n{between(name)}after\n" for name in marked("staleness")))
    return tmp_path


def between(name):
    return f"<!-- {name} -->\nold\n<!-- end of {name} -->\n"


def marked(*names):
    ends = ("", "-differences", "-details", "-best", "-best-differences", "-agreement", "-tasks", "-methods", "-losses")
    headline = ["headline" + end for end in ("", "-scores", "-returns", "-scale")]
    return [name + end for name in names for end in ends] + headline + ["provenance"]


def score(one):
    return SCORES.get((one.method, one.flags["buffer_epochs"]), 0.9)


@pytest.fixture
def results(folder, monkeypatch):
    """Rows of staleness with three methods and five seeds."""
    monkeypatch.setattr(experiments, "METHODS", ("gipo", "clip", "sapo"))
    rng = np.random.default_rng(1)
    rows = []
    for one in {one.command: one for one in experiments.staleness()}.values():
        zero, top = TASKS[one.flags["env_id"]]
        is_one = (one.method, one.flags["buffer_epochs"]) == ("clip", 1)  # whose mean is the scale's 1
        noise = (one.flags["seed"] - 51) / 2000 if is_one else rng.normal(0, 0.02)
        rows.append(synthetic.row(one, zero + (score(one) + noise) * (top - zero)))
    synthetic.write("staleness", rows)
    synthetic.write_random({env_id: zero for env_id, (zero, _) in TASKS.items()})
    return rows


def made(folder) -> tuple[bytes, str]:
    assert pages.main() == 0
    return (folder / "figures" / "staleness.png").read_bytes(), (folder / "page.md").read_text()


def text(page: str, name: str) -> str:
    return re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end of", page, re.DOTALL)[1]


def cells(table: str, line: str) -> list[str]:
    """The cells of a line of a table."""
    found = {row.strip("| ").split("|")[0].strip(): row for row in table.splitlines()}
    return [cell.strip() for cell in found[line].strip("|").split("|")[1:]]


def middles(table: str, line: str) -> list[float]:
    return [float(cell.strip("*").split()[0]) for cell in cells(table, line)[:-1]]


def test_tables_of_staleness(results, folder, monkeypatch):
    monkeypatch.setattr(pages, "FIVE", experiments.FIVE[:4])
    _, page = made(folder)
    table = text(page, "staleness")
    assert [cell.strip() for cell in table.splitlines()[0].split("|")[2:5]] == ["K = 1", "K = 8", "K = 32"]
    for line, expected in {"GIPO": [0.9] * 3, "PPO-clip": [1, 0.3, 0.1], "SAPO": [0.8, 0.7, 0.5]}.items():
        np.testing.assert_allclose(middles(table, line), expected, atol=0.04)
        assert cells(table, line)[-1] == "5"
        assert all(re.fullmatch(rf"{NUMBER} \({NUMBER} to {NUMBER}\)", cell) for cell in cells(table, line)[:-1])
    differences = text(page, "staleness-differences")
    np.testing.assert_allclose(middles(differences, "GIPO minus PPO-clip"), [-0.1, 0.6, 0.8], atol=0.04)
    assert all(cell.startswith("**") for cell in cells(differences, "GIPO minus PPO-clip")[:-1])
    assert "Hopper" in text(page, "staleness-details").splitlines()[0]
    assert cells(text(page, "staleness-details"), "GIPO, K = 8")[3:] == ["0.5"] * 5 + ["0"]
    best = text(page, "staleness-best")  # settings that differ from the one for all K, on the same seeds
    assert len(best.splitlines()) == 2 + 4 and cells(best, "GIPO")[-1] == "4"
    assert cells(best, "SAPO, best for its K")[0] == "" and cells(best, "SAPO, best for its K")[1]
    headline = text(page, "headline")
    lines = [row.split("|")[1].strip() for row in headline.splitlines()[2:]]
    assert lines == [f"GIPO minus {rival}, K = {k}" for rival in ("PPO-clip", "SAPO") for k in (1, 8, 32)]
    columns = [cell.strip() for cell in headline.splitlines()[0].strip("|").split("|")[1:]]
    assert columns == ["all tasks", "HalfCheetah", "Hopper", "Walker2d", "n"]
    hopper = [middles(headline, line)[2] for line in lines]
    np.testing.assert_allclose(hopper, [-0.1, 0.6, 0.8, 0.1, 0.2, 0.4], atol=0.06)
    scores, returns = text(page, "headline-scores"), text(page, "headline-returns")
    assert middles(scores, "GIPO") == middles(table, "GIPO") and len(scores.splitlines()) == 2 + 3
    np.testing.assert_allclose(middles(returns, "GIPO, K = 8"), [870, 452, 270], rtol=0.04)  # 0.9 of the scale
    assert cells(returns, "random actions") == ["-300", "20", "0", ""] and len(returns.splitlines()) == 2 + 9 + 1
    ends = "-300 and 1,000 in HalfCheetah, 20 and 500 in Hopper, 0 and 300 in Walker2d"
    assert text(page, "headline-scale") == f"The returns of 0 and 1 are {ends}."
    assert (folder / "figures" / "headline.png").exists()
    assert page.startswith("before\n") and page.endswith("after\n")


@pytest.mark.slow
def test_the_same_rows_make_the_same_bytes_and_fewer_make_others(results, folder, capsys):
    first = made(folder)
    synthetic.write("staleness", results[::-1])
    assert made(folder) == first
    assert "left out" not in capsys.readouterr().err
    moved = [row for row in results if row["method"] == "gipo"][:4]
    synthetic.write("staleness", [row for row in results if row not in moved])
    synthetic.write("other", moved)  # a row of another experiment counts
    assert made(folder) == first
    (runner.ROWS / "other.csv").unlink()
    figure, page = made(folder)
    assert figure != first[0] and page != first[1]
    assert "left out, because 1 of its runs are missing" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_diverged_counts_as_random_actions(results, folder, capsys):
    (row,) = [row for row in results if "gipo_con" in row["command"] and row["seed"] == 11 and
              row["env_id"] == "Hopper-v5" and "epochs 32" in row["command"]]  # fmt: skip
    row |= {"final_return": "", "diverged": 1, "curve": ""} | dict.fromkeys(runner.DIAGNOSTICS, "")
    synthetic.write("staleness", results)
    _, page = made(folder)
    assert cells(text(page, "staleness-details"), "GIPO, K = 32")[-1] == "1"
    plan = [one for one in experiments.staleness() if one.command == row["command"]]
    table = measurements.measure(plan[:1])
    assert table.value[0] == 20 and (table.curve[0] == 20).all() and len(table.curve[0]) == runner.CURVE_POINTS
    synthetic.write_random({"HalfCheetah-v5": -300.0, "Walker2d-v5": 0.0})
    assert pages.main() == 2
    assert "Hopper-v5 has no row of random actions" in capsys.readouterr().err


def test_what_lacks_its_ground_is_an_error(results, folder, capsys):
    before = (folder / "page.md").read_text()
    (runner.ROWS / "random.csv").unlink()
    assert pages.main() == 2
    assert "run ./benchmark.sh random" in capsys.readouterr().err
    assert (folder / "page.md").read_text() == before


def test_pages_without_rows_stay_as_they_are(folder):
    before = (folder / "page.md").read_text()
    synthetic.write_random({"Hopper-v5": 7.0})
    assert pages.main() == 0
    assert (folder / "page.md").read_text() == before and not (folder / "figures").exists()


@pytest.mark.slow
def test_a_page_without_the_marker_is_noticed(results, folder, capsys):
    (folder / "page.md").write_text("nothing here")
    assert pages.main() == 2 and "staleness-details" in capsys.readouterr().err


def test_a_text_that_cannot_be_made_any_more_goes_from_the_page(folder, monkeypatch):
    def staleness():
        return {"staleness": "new", "staleness-details": "", "on no page": ""}

    synthetic.write("staleness", [])
    monkeypatch.setattr(pages, "SECTIONS", [staleness])
    monkeypatch.setattr(pages, "provenance", dict)
    assert pages.main() == 0
    page = (folder / "page.md").read_text()
    assert text(page, "staleness") == "new" and "<!-- staleness-details -->\n\n<!-- end" in page


@pytest.mark.slow
def test_rows_of_different_code_are_named(results, folder, capsys):
    made(folder)
    assert "different or uncommitted code" not in capsys.readouterr().err
    results[0]["revision"] = "abd"
    synthetic.write("staleness", results)
    made(folder)
    assert "rows of gipo_continuous.py have different or uncommitted code" in capsys.readouterr().err


@pytest.fixture
def everything(folder, monkeypatch):
    """Rows of every experiment: GIPO is good, PPO-clip is less so, the others still less."""
    monkeypatch.undo()
    monkeypatch.setattr(runner, "ROWS", folder / "rows")
    monkeypatch.setattr(pages, "FIGURES", folder / "figures")
    monkeypatch.setattr(pages, "PAGES", [folder / "page.md"])
    monkeypatch.setattr(intervals, "RESAMPLES", 100)
    synthetic.write_random(dict.fromkeys(experiments.REPORTED, 7.0))

    def final(one):
        noise = zlib.crc32(one.command.encode()) / 2**32  # of a run, whenever it is asked for
        best_size = 2 * (one.flags.get("buffer_epochs") == 8)
        return {"gipo": 120, "clip": 100}.get(one.method, 90) + best_size + noise

    def write(name):
        plan = {one.command: one for one in EXPERIMENTS[name]()}.values()
        synthetic.write(name, [synthetic.row(one, final(one), final_success=final(one) / 200) for one in plan])

    rounds = ["tune"] * 5 + ["llm-tune"] * 2
    for name in (*rounds, "staleness", "rllib-tune", *EXPERIMENTS):  # those that others build on come first
        write(name)
    (runner.ROWS / "peer-times.csv").write_text("method,ratio\ngipo,1\nclip,1\nsb3-ppo,3\nsb3-sac,60\n")
    names = marked(*(section.__name__.replace("_", "-") for section in pages.SECTIONS))
    (folder / "page.md").write_text("".join(map(between, names)))
    return folder


@pytest.mark.slow
def test_every_experiment_has_a_figure_and_tables(everything, capsys):
    assert pages.main() == 0
    assert "left out" not in (printed := capsys.readouterr().err) and "error" not in printed
    page = (everything / "page.md").read_text()
    found = {name: text(page, name) for name in re.findall(r"<!-- end of (.*?) -->", page)}
    for section in pages.SECTIONS:
        name = section.__name__.replace("_", "-")
        assert name == "tune" or (everything / "figures" / f"{name}.png").stat().st_size > 5000, name
        ends = {"tune": ("", "-details"), "llm-rates": ("",)}.get(name, ("", "-differences"))
        for end in ends:
            lines = found[name + end].splitlines()
            assert len(lines) > 2 and len({line.count("|") for line in lines}) == 1, name + end
            assert not re.search(r"\bnan\b|None", found[name + end]), name + end
    drawn = {section.__name__.replace("_", "-") for section in pages.SECTIONS} - {"tune"} | {"headline"}
    assert {path.stem for path in (everything / "figures").iterdir()} == drawn
    assert len(found["tune"].splitlines()) == 2 + 6
    assert len(found["tune-details"].splitlines()) == 2 + sum(map(len, tuning.finalists().values()))
    assert cells(found["tune"], "GIPO")[0].startswith("`--ratio ") and float(cells(found["tune"], "GIPO")[-1]) > 0
    assert f"of the {len(tuning.round_three()) // 6} settings on seed 1002" in found["tune-agreement"]
    assert len(found["updates"].splitlines()) == 2 + 9 and "K = 8, 40 epochs minus K = 1, 10 epochs" in page
    assert len(found["ablation"].splitlines()) == 2 + 15
    assert "| all tasks" in found["freeze"] and "| Walker2d" in found["freeze-differences"]
    assert len(found["million"].splitlines()) == 2 + 10 + 1  # nine lines of methods, no flags, random actions
    assert cells(found["million"], "GIPO, no flags")[-1] == "1"
    assert found["metaworld"].count("ratio per dimension") == 2 and cells(found["metaworld"], "random actions")[0]
    assert cells(found["pong"], "GIPO")[0].startswith("122.") and cells(found["pong"], "random actions")[0] == "7.0"
    assert "CartPole, reuse 8" in found["rllib"] and cells(found["llm"], "no correction")[-1] == "5"
    assert cells(found["llm-rates"], "GIPO") == ["5e-05, 0.0001, 0.0002, 0.0004, 0.0008"]
    assert cells(found["peers"], "SAC of Stable-Baselines3")[-1] == "5"
    assert cells(found["provenance"], "million")[2] == "169 of 169"
    runs = len({one.command for one in experiments.staleness()})  # some belong to two lines
    assert cells(found["provenance"], "staleness")[2] == f"{runs} of {runs}"
    chooses = {name for name in EXPERIMENTS if cells(found["provenance"], name)[-1]}
    assert chooses == set(pages.CHOICES) and "Walker2d" in cells(found["provenance"], "tune")[0]


def test_how_far_the_rounds_of_tuning_agree(monkeypatch):
    """By hand: method a keeps its order and b turns it around, but b is always ahead of a."""
    first = {("a", "x"): 0.125, ("a", "y"): 0.25, ("b", "x"): 0.75, ("b", "y"): 0.875}
    second = {("a", "x"): 0.125, ("a", "y"): 0.375, ("b", "x"): 0.875, ("b", "y"): 0.75}
    rows = [(*line, seed, x) for seed, ranks in ((1, first), (2, second)) for line, x in ranks.items()]
    both = pd.DataFrame(rows, columns=["method", "line", "seed", "value"])
    monkeypatch.setattr(tuning, "before_the_last", lambda: both)
    monkeypatch.setattr(tuning, "results", lambda: both)
    monkeypatch.setattr(tuning, "round_one", list)
    monkeypatch.setattr(tuning, "ranks", lambda plan: both.assign(value=-both.value))
    said = pages.agreement()
    assert "of the 4 settings on seed 1 and on seed 2 have a rank correlation (Spearman) of 0.80, or 0.45" in said
    assert "have -1.00 with" in said and said.endswith("mean rank is 0.05.")


def test_a_lag_is_scored_by_evaluations(folder, monkeypatch):
    """The returns of the policy that acts do not count, and no run of staleness makes the scale."""
    monkeypatch.setattr(experiments, "four", lambda: experiments.METHODS[:4])
    synthetic.write_random(dict.fromkeys(TASKS, 7.0))
    synthetic.write("lag", [synthetic.row(one, 50.0, eval_return=307.0) for one in experiments.lag()])
    table, returns = pages.on_one_scale("lag", "policy_lag", "eval_return")
    assert set(table.value) == {1.0} and set(returns.value) == {307.0}


def test_what_a_lag_costs(folder, monkeypatch):
    monkeypatch.setattr(experiments, "four", lambda: experiments.METHODS[:4])
    synthetic.write_random(dict.fromkeys(TASKS, 7.0))
    lags = [(one, one.flags.get("policy_lag") or 0) for one in experiments.lag()]
    synthetic.write("lag", [synthetic.row(one, 50.0, eval_return=307 - 15 * lag) for one, lag in lags])
    table = pages.lag()["lag-losses"]
    assert len(table.splitlines()) == 2 + 4 * 2
    assert middles(table, "GIPO, L = 2 minus L = 0") == [-0.1] * 4
    assert middles(table, "PPO-clip, L = 8 minus L = 0") == [-0.4] * 4
    assert cells(table, "GIPO, L = 2 minus L = 0")[-1] == "5"


def test_one_run_of_a_cell_is_shown(folder, monkeypatch):
    """Breadth is shown with the runs that are there."""
    (folder / "page.md").write_text("".join(map(between, marked("pong"))))
    one, *_ = experiments.pong()
    synthetic.write("pong", [synthetic.row(one, 3.0)])
    synthetic.write_random({"ALE/Pong-v5": -20.0})
    assert pages.main() == 0
    assert cells(text((folder / "page.md").read_text(), "pong"), "GIPO") == ["3.0", "1"]


def table_of(*lines):
    """Measurements of (line, values) in one task."""
    plan, rows = [], []
    for line, values in lines:
        for seed, value in enumerate(values):
            plan.append(run("gipo", "Hopper-v5", seed, line, tag=line))
            rows.append(synthetic.row(plan[-1], value))
    synthetic.write("any", rows)
    found = measurements.measure(plan)
    return [found[found.line == line] for line, _ in lines]


def test_a_figure_has_the_start_of_the_first_line_of_the_clip_as_a_reference(folder, monkeypatch):
    drawn = []
    monkeypatch.setattr(Axes, "axhline", lambda self, y, **_: drawn.append(y))
    tables = []
    for k, x, value in ((1, 10, 3.0), (8, 10, 5.0), (1, 20, 7.0)):
        plan = [run("clip", "Hopper-v5", seed, f"PPO-clip, K = {k}", tag=f"{k} {x}") for seed in (1, 2)]
        synthetic.write(f"any-{k}-{x}", [synthetic.row(one, value) for one in plan])
        tables.append(measurements.measure(plan).assign(x=x))
    without = pd.concat(tables).assign(method="gipo", line="GIPO")
    drawing.against({"clip": pd.concat(tables), "gipo": without}, folder / "any.png", "", "")
    assert drawn == [3.0, 3.0]


def test_a_buffer_is_compared_with_fresh_data_and_as_many_or_the_fewest_epochs():
    means = {(1, 10): 1.0, (1, 20): 2.0, (8, 10): 4.0, (8, 20): 8.0}
    rows = [
        {"command": f"{k} {x} {seed}", "env_id": "Hopper-v5", "buffer_epochs": k, "x": x, "value": mean + seed / 10}
        for (k, x), mean in means.items()
        for seed in (1, 2, 3)
    ]
    found = pages.buffer_minus_fresh({"all tasks": pd.DataFrame(rows)})
    ends = ("10 epochs minus K = 1, 10", "20 epochs minus K = 1, 10", "20 epochs minus K = 1, 20")
    shown = [cells(found, f"K = 8, {end} epochs") for end in ends]
    assert [float(all_tasks.strip("*").split()[0]) for all_tasks, _ in shown] == [3.0, 7.0, 6.0]
    assert {n for _, n in shown} == {"3"} and cells(found, f"K = 32, {ends[0]} epochs")[0] == ""


def test_language_models_are_compared_where_both_have_a_run(folder):
    own = {("GIPO", 0): 3.0, ("GIPO", 32): 4.0, ("CISPO", 0): 1.0}
    rows = [
        {"line": line, "x": x, "seed": seed, "value": value + seed / 10 * (line == "GIPO")}
        for (line, x), value in own.items()
        for seed in (1, 2)
    ]
    table = pd.DataFrame(rows)
    first, second = cells(pages.differences_by_seed(table), "GIPO minus CISPO")
    assert first.startswith("**2.150 (") and second == ""
    assert pages.differences_by_seed(table[table.line != "GIPO"]) == ""


def test_the_curve_of_a_run_that_diverged_is_a_return(folder):
    """Also where the value is another column."""
    synthetic.write_random({"Meta-World/door-open-v3": 290.0}, success=0.0)
    one = run("gipo", "Meta-World/door-open-v3", 1)
    synthetic.write("any", [synthetic.row(one, 1.0, diverged=1, final_success="")])
    table = measurements.measure([one], "final_success")
    assert table.value[0] == 0 and (table.curve[0] == 290).all()


def test_verdicts():
    ours, theirs, one = table_of(("A", [1.0, 1.1, 1.2]), ("B", [0.0, 0.1, 0.2]), ("C", [1.15]))
    for pair in ((ours, theirs), (theirs, ours)):
        found = pages.verdict(*pair, "Here")
        shown = r"Here: A beats B \(1.10 against 0.10, difference (0.8\d|0.9\d) to 1.1\d, n = 3\)."
        assert re.fullmatch(shown, found), found
    assert pages.verdict(ours, ours, "Here").startswith("Here: no difference shows between A and A (1.10 against 1.10")
    assert pages.verdict(ours, one, "Here").startswith("Here: no difference shows between C and A")
    assert pages.verdict(ours, theirs.assign(env_id="x"), "Here") == pages.verdict(ours, theirs[:0], "Here") == ""


def test_quick_ends_with_a_figure_and_a_verdict_unless_a_run_failed(folder, monkeypatch, capsys):
    """From nothing but random actions, which a clone has."""
    monkeypatch.setattr(runner, "WORK", folder)
    failed = [1]

    def run_all(experiment, plan, workers):
        rng = np.random.default_rng(4)
        if not failed[0]:
            rows = [synthetic.row(one, (one.method == "gipo") * 100 + rng.normal()) for one in plan]
            synthetic.write("quick", rows)
        return failed[0]

    monkeypatch.setattr(experiments, "run_all", run_all)
    assert quick.main() == 1
    assert "GIPO" not in capsys.readouterr().out and not (folder / "quick.png").exists()
    failed[0] = 0
    assert quick.main() == 0
    out = capsys.readouterr().out
    assert out.count("GIPO beats PPO-clip (") == 4 and "Hopper, K = 1: GIPO" in out and "Empty-5x5, K = 8: GIPO" in out
    assert (folder / "quick.png").exists()


def test_the_random_actions_of_a_clone_are_complete(folder):
    shutil.copytree(ROOT / "benchmark" / "rows", runner.ROWS)
    assert set(measurements.random_actions().index) >= set(experiments.REPORTED)
