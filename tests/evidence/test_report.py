"""Figures, tables and verdicts follow from the rows alone, and from each of them."""

import csv
import itertools
import re

import numpy as np
import pytest

from benchmark import drawing, evidence, experiments, peer_times, quick, report, runs, scores

ENVS = {"HalfCheetah-v5": (-300.0, 1000.0), "Hopper-v5": (20.0, 500.0)}
TUNINGS = {"width-tune", "rllib-tune"}  # without a section
SCORES = {("clip", 1): 1.0, ("clip", 8): 0.3, ("clip", 32): 0.1}
PAGE = "".join(
    f"before\n<!-- {name} -->\nold\n<!-- end of {name} -->\nafter\n"
    for name in (
        "staleness",
        "staleness-verdict",
        "staleness-others",
        "staleness-differences",
        "staleness-details",
        "headline",
        "headline-verdict",
    )
)


def made_up(run: runs.Run, final: float, **more) -> dict:
    row = {"command": run.command, "env_id": run.value("--env-id", "sorting"), "method": run.method}
    curve = " ".join([f"{final}"] * runs.CURVE_POINTS)
    returns = {"final_return": final, "mean_return": final, "final_success": 0.5, "curve": curve, "seconds": 60}
    measures = dict.fromkeys(report.MEASURES, 0.5)
    return dict.fromkeys(runs.COLUMNS) | row | returns | measures | {"diverged": 0} | more


def write(path, known):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, known[0].keys())
        writer.writeheader()
        writer.writerows(known)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(report, "PAGES", [tmp_path / "page.md"])
    monkeypatch.setattr(scores, "RESAMPLES", 400)
    (tmp_path / "page.md").write_text(PAGE)
    return tmp_path


@pytest.fixture
def results(folder, monkeypatch):
    rng = np.random.default_rng(1)
    known = []
    planned = []
    for env_id, seed, k, method, kl in itertools.product(ENVS, (11, 12, 13), (1, 8, 32), ("gipo", "clip"), (0.1, 0)):
        zero, one = ENVS[env_id]
        score = SCORES.get((method, k), 0.9) * (1 if kl else 0.8) + rng.normal(0, 0.02)
        score = 1 if (method, k, kl) == ("clip", 1, 0) else score
        planned.append(experiments.run(method, env_id, seed, buffer_epochs=k, kl_coef=kl))
        known.append(made_up(planned[-1], zero + score * (one - zero)))
    monkeypatch.setitem(experiments.EXPERIMENTS, "staleness", lambda: planned)
    write(folder / "staleness.csv", known)
    write(folder / "random.csv", [{"env_id": env, "final_return": zero} for env, (zero, _) in ENVS.items()])
    return folder


def made(folder) -> tuple[bytes, str]:
    assert report.main() == 0
    return (folder / "figures" / "staleness.png").read_bytes(), (folder / "page.md").read_text()


def cells(page: str, line: str) -> list[str]:
    """The cells of a line of a table."""
    (found,) = (text.strip("| ").split(" | ")[1:] for text in page.splitlines() if text.startswith(f"| {line} |"))
    return found


def test_the_same_rows_make_the_same_bytes_and_fewer_make_others(results, capsys):
    first = made(results)
    assert made(results) == first
    lines = (results / "staleness.csv").read_text().splitlines(keepends=True)
    # rows in another order, and one of a run that does not belong to the experiment any more, change nothing
    (results / "staleness.csv").write_text("".join([lines[0], *lines[:0:-1], lines[2].replace("python", "once")]))
    assert made(results) == first
    assert "left out" not in capsys.readouterr().err
    for missing in (1, len(lines) - 2):  # the first with KL, the last too
        (results / "staleness.csv").write_text("".join(lines[:missing] + lines[missing + 1 :]))
        figure, page = made(results)
        assert figure != first[0] and page != first[1]
        assert "left out" in capsys.readouterr().err


def test_a_row_of_another_experiment_counts(results):
    first = made(results)
    lines = (results / "staleness.csv").read_text().splitlines(keepends=True)
    (results / "staleness.csv").write_text("".join(lines[:-3]))
    (results / "other.csv").write_text("".join([lines[0], *lines[-3:]]))
    assert made(results) == first


def test_a_run_that_diverged_counts_as_random(results):
    _, whole = made(results)
    (row, *_) = known = runs.rows("staleness")
    row["final_return"], row["diverged"] = "", 1  # its measures are not 0.5 either, and left out
    row |= dict.fromkeys(report.MEASURES, 7)
    write(results / "staleness.csv", known)
    _, diverged = made(results)
    worst = ENVS[row["env_id"]][0]
    np.testing.assert_equal(evidence.curves([runs.rows("staleness")[0]], {row["env_id"]: worst}), worst)
    row["final_return"] = row["mean_return"] = worst
    row |= dict.fromkeys(report.MEASURES, 0.5) | {"diverged": 0}
    write(results / "staleness.csv", known)
    assert made(results)[1] == re.sub(r"\b1 \|$", "0 |", diverged, flags=re.MULTILINE) != whole
    assert re.findall(r"\b1 \|$", diverged, re.MULTILINE) == ["1 |"]


def test_a_run_that_diverged_needs_the_return_of_random_actions(results, monkeypatch, capsys):
    (run,) = planned = [experiments.run("gipo", "Ant-v5", 11, buffer_epochs=1, kl_coef=0.1)]
    monkeypatch.setitem(experiments.EXPERIMENTS, "ant", lambda: planned)
    write(results / "ant.csv", [made_up(run, "", diverged=1)])
    assert report.main() == 2
    assert "error: ant: Ant-v5 has no row of random actions; run ./benchmark.sh random" in capsys.readouterr().err
    with pytest.raises(runs.Missing, match="Ant-v5 has no row"):
        evidence.curves(runs.rows("ant"), {})


def test_a_page_without_the_marker_is_noticed(results):
    (results / "page.md").write_text("nothing here")
    with pytest.raises(ValueError, match="staleness"):
        report.main()


def test_table_and_verdict_of_staleness(results):
    _, page = made(results)
    assert page.startswith("before\n<!-- staleness -->\n|")
    assert page.endswith(".\n<!-- end of headline-verdict -->\nafter\n")
    lines = ("GIPO with KL", "PPO-clip with KL", "GIPO without KL", "PPO-clip without KL")
    table = page.split("<!-- end of staleness -->")[0]
    middles = [[float(text.split()[0]) for text in cells(table, line)] for line in lines]
    # the mean of clip at K = 1 without KL is the unit itself
    expected = [[0.9, 0.9, 0.9], [1, 0.3, 0.1], [0.72, 0.72, 0.72], [1, 0.24, 0.08]]
    np.testing.assert_allclose(middles, expected, atol=0.04)
    assert all(" to " in text for line in lines[:3] for text in cells(table, line))
    number = r"-?\d\.\d\d"
    seeds = ", 3 seeds only"
    shown = rf"\({number} against {number}, difference {number} to {number}{seeds}\)"
    verdict = page.split("<!-- staleness-verdict -->\n")[1].split("\n<!--")[0]
    assert re.sub(shown, "()", verdict).splitlines() == [
        "- With KL and K = 1 PPO-clip beats GIPO ().",
        "- With KL and K = 8 or 32 GIPO beats PPO-clip ().",
        "- Without KL and K = 1 PPO-clip beats GIPO ().",
        "- Without KL and K = 8 or 32 GIPO beats PPO-clip ().",
    ]
    differences = page.split("<!-- staleness-differences -->\n")[1]
    for line, expected in {
        "GIPO minus PPO-clip, both with KL": [-0.1, 0.6, 0.8, 0.7],
        "GIPO minus PPO-clip, both without KL, Hopper": [-0.28, 0.48, 0.64, 0.56],
        "GIPO with KL minus PPO-clip without KL": [-0.1, 0.66, 0.82, 0.74],
    }.items():
        found = cells(differences, line)
        np.testing.assert_allclose([float(text.strip("*").split()[0]) for text in found], expected, atol=0.05)
        assert all(text.startswith("**") and text.endswith(")**") for text in found)
    assert report.difference({"a": np.array([1.0, 2.0])}, {"a": np.array([1.0, 2.0])}) == "0.00 (-1.00 to 1.00)"


def test_differences_by_environment():
    samples = {
        "gipo": {"Hopper-v5 0": np.ones(2), "Ant-v5 0": np.full(2, 5.0)},
        "clip": {"Hopper-v5 0": np.zeros(2), "Ant-v5 0": np.zeros(2)},
    }
    known = {(("gipo", 0), 1): "gipo", (("clip", 0), 1): "clip"}
    page = report.differences(lambda method: samples[method], known)
    for env, value in (("Hopper", "1.00"), ("Ant", "5.00")):
        found = cells(page, f"GIPO minus PPO-clip, both without KL, {env}")
        assert found[0] == f"**{value} ({value} to {value})**"


def test_methods_share_the_environments_of_a_pooled_cell(folder):
    """GIPO has one more environment here, in which it would be worse."""
    write(folder / "random.csv", [{"env_id": env, "final_success": x} for env, x in (("a", 0.25), ("b", 0.75))])
    known = {("gipo", "a"): 0.5, ("gipo", "b"): 0.0, ("clip", "a"): 0.25}
    rows = {
        (method, env_id, "K = 1"): [{"env_id": env_id, "diverged": "0", "final_success": x}] * 3
        for (method, env_id), x in known.items()
    }
    for pool, places in ((True, ["K = 1"]), (False, ["a, K = 1", "b, K = 1"])):
        found = report.by_place(rows, "final_success", pool)
        assert list(found) == places
        page = report.raw_table(report.raw_texts(found, "final_success", 2))
        assert cells(page, places[0]) == ["0.50 (0.50 to 0.50)", "0.25 (0.25 to 0.25)", "0.25"]
        assert report.raw_verdict(found, 2).startswith(f"- {places[0]}: GIPO beats PPO-clip (0.50 against 0.25")


@pytest.fixture
def everything(folder, monkeypatch):
    """Rows of every experiment, as if the first candidate of each method were the best, and random actions."""
    for module in (experiments, report):
        monkeypatch.setattr(module, "tuned", lambda method, kl=0.1: experiments.candidate(method, 0, kl))
    monkeypatch.setattr(experiments, "group_scores", lambda experiment, groups: dict.fromkeys(groups, 0.0))
    rng = np.random.default_rng(2)
    for name, plan in experiments.EXPERIMENTS.items():
        good = {"gipo": 120, "clip": 100}
        known = [made_up(run, good.get(run.method, 90) + rng.normal()) for run in plan()]
        for row, run in zip(known, plan()):
            row["final_success"] = good.get(run.method, 90) / 200 + rng.normal() / 100
        write(folder / f"{name}.csv", known)
    random = [{"env_id": env, "final_return": 7, "final_success": 0.25} for env in set(experiments.REPORTED)]
    write(folder / "random.csv", random)
    costs = dict.fromkeys(("play_seconds", "receive_seconds", "batch_seconds", "update_seconds", "message_bytes"), 1)
    costs |= dict.fromkeys(("message_steps", "batch_steps", "reuse"), 1) | {"play_seconds": 10}
    write(folder / "costs.csv", [{"quantity": name, "value": value} for name, value in costs.items()])
    times = [{"method": method, "ratio": 2} for method in peer_times.STEPS]
    write(folder / "peer-times.csv", times)
    sections = [section.__name__ for section in report.SECTIONS]
    assert {name.replace("_", "-") for name in sections} == experiments.EXPERIMENTS.keys() - TUNINGS - {"quick"} | {
        "costs"
    }
    names = [*sections, *(f"{name}-verdict" for name in sections if name not in ("tune", "costs")), "costs-estimate"]
    names += ["headline", "headline-verdict", "tune-details", "staleness-differences", "width-tune"]
    detailed = ("staleness", "ablation", "width", "freeze", "lag", "ant", "metaworld", "minigrid", "rllib")
    names += ["staleness-others", "ablation-others", *(f"{name}-details" for name in detailed)]
    (folder / "page.md").write_text("".join(f"<!-- {name} -->\nold\n<!-- end of {name} -->\n" for name in names))
    return folder


def places(folder) -> dict[str, str]:
    page = (folder / "page.md").read_text()
    return dict(re.findall(r"<!-- ([\w-]+) -->\n(.*?)\n<!-- end of \1 -->", page, re.DOTALL))


@pytest.mark.slow
def test_every_experiment_has_a_figure_a_table_and_a_verdict(everything, capsys):
    assert report.main() == 0
    assert "left out" not in capsys.readouterr().err
    found = places(everything)
    assert "old" not in found.values() and "" not in found.values()
    for name, text in found.items():
        if name.endswith("-verdict"):
            assert re.search(r"\bbeats\b", text) and "nan" not in text, name
        else:
            lines = text.splitlines()
            assert len(lines) > 2 and len({line.count("|") for line in lines}) == 1 and "nan" not in text, name
    pictures = {path.stem for path in (everything / "figures").iterdir()}
    assert pictures == experiments.EXPERIMENTS.keys() - TUNINGS - {"tune", "quick"}
    assert len(found["ablation"].splitlines()) == 2 + 4 + 2
    assert len(found["staleness"].splitlines()) == 2 + 6 + 2 and len(found["staleness-others"].splitlines()) == 2 + 4
    assert len(found["ablation-others"].splitlines()) == 2 + 4 + 4
    assert "With K = 8 or 32 GIPO with KL and recompute beats PPO-clip with neither (" in found["ablation-verdict"]
    assert [line.split(" | ")[0] for line in found["width-tune"].splitlines()[2:]] == ["| 0.3", "| 0.5", "| 1"]
    assert len(found["staleness-differences"].splitlines()) == 2 + 7 + 3 * 3
    assert len(cells(found["ablation"], "GIPO, V-trace, KL 0.03")) == 3
    assert len(cells(found["ablation-others"], "GIPO, V-trace, KL 0.1, sigma 2")) == 2  # the last is empty
    assert found["metaworld"].startswith("|  | GIPO | PPO-clip | SAPO | plain IS | random actions |")
    assert len(found["metaworld"].splitlines()) == 2 + 2 * 2
    assert cells(found["metaworld"], "K = 2000, success")[-1] == "0.25"
    assert len(found["metaworld-details"].splitlines()) == 2 + 7
    assert cells(found["metaworld-details"], "reach, K = 2000")[-1] == "0.25"
    assert "K = 40: GIPO beats PPO-clip (0.60 against 0.50" in found["metaworld-verdict"]
    assert "K = 40: GIPO beats SAPO (0.60 against 0.45" in found["metaworld-verdict"]
    assert "- reach, K = 40: GIPO beats plain IS (" in found["metaworld-verdict"]
    assert "- K = 40, score: GIPO beats PPO-clip (" in found["metaworld-verdict"]
    assert "K = 2000: GIPO" in found["metaworld-verdict"] and "3 seeds only" in found["metaworld-verdict"]
    assert len(found["minigrid"].splitlines()) == 2 + 3 and len(found["minigrid-details"].splitlines()) == 2 + 9
    assert "Pong, K = 8: GIPO beats PPO-clip (" in found["atari-verdict"]
    assert "Pendulum, reuse 8: GIPO beats APPO's clip (" in found["rllib-verdict"]
    peers = found["peers"].splitlines()
    assert peers[0] == "|  | time per step | score | HalfCheetah | Hopper | Walker2d |" and len(peers) == 2 + 4
    assert cells(found["peers"], "SAC of Stable-Baselines3")[0] == "2"
    assert cells(found["peers"], "SAC of Stable-Baselines3")[2].startswith("90 (")
    assert "Hopper: GIPO beats SAC of Stable-Baselines3 (120 against 90, " in found["peers-verdict"]
    assert "On old completions without KL GIPO beats VESPO (" in found["llm-verdict"]
    assert len(found["llm"].splitlines()) == 2 + 8 and len(cells(found["llm"], "TRL's clip with KL")) == 5
    assert found["tune-details"].count(" chosen |") == 12
    assert all(text.startswith("`--sigma 0.3` (") for text in cells(found["tune"], "GIPO"))
    assert len(found["headline"].splitlines()) == 2 + 3 and len(cells(found["headline"], "GIPO with KL")) == 3
    assert cells(found["headline"], "PPO-clip without KL") == cells(found["staleness"], "PPO-clip without KL")
    assert "With K = 8 or 32 GIPO with KL beats PPO-clip without KL (" in found["headline-verdict"]
    for k in (40, 2000):
        assert float(cells(found["metaworld"], f"K = {k}, score")[0].split()[0]) > 0.9
    assert len(found["freeze-details"].splitlines()) == 2 + 8
    assert cells(found["freeze-details"], "GIPO with KL")[3:] == ["0.5"] * 5 + ["0"]
    assert len(found["ant-details"].splitlines()) == 2 + 6
    assert len(found["rllib-details"].splitlines()) == 2 + 6
    assert cells(found["costs-estimate"], "2") == ["0", "the actors", "3"]
    assert cells(found["costs-estimate"], "10") == ["0", "the learner"]  # whose data is of unknown age


def test_a_place_without_gipo_has_the_other_methods(everything, monkeypatch):
    """As while the runs are still going on."""
    monkeypatch.setattr(report, "SECTIONS", (report.metaworld, report.ant))
    for name in ("metaworld", "ant"):
        known = [row for row in runs.rows(name) if row["method"] != "gipo"]
        write(everything / f"{name}.csv", known)
    assert report.main() == 0
    found = places(everything)
    assert found["metaworld"].startswith("|  | PPO-clip | SAPO | plain IS | random actions |")
    assert found["ant"].startswith("|  | PPO-clip | SAPO |") and "beats" not in found["ant-verdict"]


def test_what_has_no_rows_is_left_as_it_is(everything, monkeypatch):
    monkeypatch.setattr(report, "SECTIONS", (report.tune, report.lag, report.ant))
    (everything / "lag.csv").unlink()
    (everything / "page.md").write_text(
        (everything / "page.md").read_text() + "<!-- other -->\nold\n<!-- end of other -->\n"
    )
    assert report.main() == 0
    found = places(everything)
    assert {name for name, text in found.items() if text == "old"} >= {"lag", "lag-verdict", "other"}
    assert "old" not in (found["tune"], found["ant"], found["ant-verdict"])
    assert not (everything / "figures" / "lag.png").exists()


def test_pages_stay_as_they_are_without_rows(folder, monkeypatch):
    page = folder / "results.md"
    page.write_text((report.ROOT / "docs/results.md").read_text())
    before = page.read_text()
    monkeypatch.setattr(report, "PAGES", [page])
    write(folder / "random.csv", [{"env_id": "Hopper-v5", "final_return": 7}])
    assert report.main() == 0
    assert page.read_text() == before and not (folder / "figures").exists()


def test_what_lacks_its_ground_is_an_error(results, capsys):
    (results / "random.csv").unlink()
    assert report.main() == 2
    assert "run ./benchmark.sh random" in capsys.readouterr().err
    assert (results / "page.md").read_text() == PAGE
    (results / "staleness.csv").unlink()
    assert report.main() == 0


def test_rows_of_different_code_are_named(results, capsys):
    report.main()
    assert "different or uncommitted code" not in capsys.readouterr().err
    known = runs.rows("staleness")
    known[0]["revision"] = "abc"
    write(results / "staleness.csv", known)
    report.main()
    assert "different or uncommitted code" in capsys.readouterr().err


def test_the_axis_of_a_panel_is_logarithmic_if_it_says_so(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(drawing.plt, "close", made.append)
    curve = {"gipo": (2.0, np.zeros(runs.CURVE_POINTS))}
    panels = [drawing.Panel("", "", curve, log=log) for log in (False, True)]
    drawing.over_time(panels, {"gipo": drawing.NAMES["gipo"]}, tmp_path / "figure.png", "")
    assert [axes.get_xscale() for axes in made[0].axes] == ["linear", "log"]


def test_verdicts():
    ours, theirs = {"a": np.array([1.0, 1.1, 1.2])}, {"a": np.array([0.0, 0.1, 0.2])}
    assert report.verdict(ours, theirs, "Here") == (
        "Here GIPO beats PPO-clip (1.10 against 0.10, difference 0.87 to 1.13, 3 seeds only)."
    )
    assert report.verdict(theirs, ours, "Here", ("A", "B"), 1) == (
        "Here B beats A (1.1 against 0.1, difference 0.9 to 1.1, 3 seeds only)."
    )
    five = {"a": np.array([0.1, 0.2, 0.3, 0.4, 0.5])}
    assert report.verdict(five, five, "Here").startswith(
        "Here no difference shows between GIPO and PPO-clip (0.30 against"
    )
    assert "seeds" not in report.verdict(five, five, "Here")
    # the same environments, or nothing
    assert report.verdict(ours, theirs | {"b": theirs["a"]}, "Here") == report.verdict({}, {}, "Here") == ""
    # the fewer seeds count, on whichever side they are
    assert report.verdict(five, theirs, "Here").endswith("3 seeds only).")
    assert report.verdict(theirs, five, "Here").endswith("3 seeds only).")
    assert report.verdict(five, {"a": five["a"][:1]}, "Here").startswith("Here one seed decides nothing")
    single = [{"a": sample["a"][:1]} for sample in (ours, theirs)]
    assert report.verdict(*single, "Here", digits=1) == (
        "Here one seed decides nothing between GIPO and PPO-clip (1.0 against 0.0)."
    )


def test_quick_ends_with_a_figure_and_a_verdict_unless_a_run_failed(folder, monkeypatch, capsys):
    """From nothing but random actions, which a clone has."""
    monkeypatch.setattr(quick, "WORK", folder)
    failed = [1]

    def run_all(experiment, plan, dry_run, workers):
        if failed[0]:
            return failed[0]
        rng = np.random.default_rng(4)
        write(folder / "quick.csv", [made_up(run, (run.method == "gipo") * 100 + rng.normal()) for run in plan])
        return 0

    monkeypatch.setattr(experiments, "run_all", run_all)
    (folder / "random.csv").write_bytes((report.ROOT / "benchmark" / "results" / "random.csv").read_bytes())
    assert quick.main() == 1
    assert "GIPO" not in capsys.readouterr().out and not (folder / "quick.png").exists()
    failed[0] = 0
    assert quick.main() == 0
    out = capsys.readouterr().out
    assert out.count("GIPO beats PPO-clip") == 4
    assert "Hopper, K = 1: GIPO beats PPO-clip (99 against 0, " in out and "Empty-5x5, K = 8: GIPO beats" in out
    assert (folder / "quick.png").exists()


def test_random_actions_have_the_same_mean_as_the_methods(monkeypatch):
    monkeypatch.setattr(evidence, "zeros", lambda column: {"a": 0, "b": 0, "c": 0, "d": 1})
    found = {"K = 8": {"gipo": {env_id: np.zeros(3) for env_id in "abcd"}}}
    assert report.raw_texts(found, "final_success", 2)["K = 8", "random"] == "0.00"  # the plain mean is 0.25


def test_many_actors_saturate_the_learner():
    costs = {"play_seconds": 0.1, "receive_seconds": 0.01, "batch_seconds": 0.02, "update_seconds": 0.01}
    costs |= {"message_steps": 200, "batch_steps": 400, "reuse": 4}
    assert evidence.speed(1, costs) == (2000, False)
    # two messages and a batch take 0.01 + 0.01 + 0.02 + 4 x 0.01 seconds and bring 400 steps
    assert evidence.speed(100, costs) == (pytest.approx(5000), True)
    assert evidence.age(2, 4, costs) == 4 * 2 + 1.5
