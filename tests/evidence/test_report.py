"""Figures and tables follow from the rows alone, and from each of them."""

import csv
import itertools
import re

import numpy as np
import pytest

from benchmark import evidence, experiments, quick, report, runs

ENVS = {"HalfCheetah-v5": (-300.0, 1000.0), "Hopper-v5": (20.0, 500.0)}
SCORES = {("clip", 1): 1.0, ("clip", 8): 0.3, ("clip", 32): 0.1}
MARKERS = (
    "staleness",
    "staleness-verdict",
    "staleness-pooled",
    "staleness-returns",
    "staleness-ahead",
    "staleness-drift",
)
PAGE = "".join(f"before\n<!-- {name} -->\nold\n<!-- end of {name} -->\nafter\n" for name in MARKERS)


def made_up(run: runs.Run, final: float, **more) -> dict:
    row = {"command": run.command, "env_id": run.value("--env-id"), "method": run.method}
    drift = {"abs_logratio_p95": 0.5, "ess": 0.9, "dead_fraction": 0.1, "age_mean": 3, "SPS": 99}
    curve = " ".join([f"{final}"] * runs.CURVE_POINTS)
    scores = {"final_return": final, "mean_return": final, "final_success": 0.5, "curve": curve, "seconds": 60}
    return dict.fromkeys(runs.COLUMNS) | row | drift | scores | {"diverged": 0} | more


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
    (tmp_path / "page.md").write_text(PAGE)
    return tmp_path


@pytest.fixture
def results(folder, monkeypatch):
    rng = np.random.default_rng(1)
    known = []
    planned = []
    for env_id, seed, k, method in itertools.product(ENVS, (11, 12, 13), (1, 8, 32), ("gipo", "clip")):
        zero, one = ENVS[env_id]
        score = SCORES.get((method, k), 0.9) + rng.normal(0, 0.05)
        planned.append(experiments.run(method, env_id, seed, "--buffer-epochs", k))
        known.append(made_up(planned[-1], zero + score * (one - zero)))
    monkeypatch.setitem(experiments.EXPERIMENTS, "staleness", lambda: planned)
    write(folder / "staleness.csv", known)
    write(folder / "random.csv", [{"env_id": env, "final_return": zero} for env, (zero, _) in ENVS.items()])
    return folder


def made(folder) -> tuple[bytes, str]:
    report.main()
    return (folder / "figures" / "staleness.png").read_bytes(), (folder / "page.md").read_text()


def cells(page: str, method: str) -> list[list[str]]:
    """The cells of a method's line in each table."""
    return [line.strip("| ").split(" | ")[1:] for line in page.splitlines() if line.startswith(f"| {method} |")]


def test_the_same_rows_make_the_same_bytes_and_fewer_make_others(results, capsys):
    first = made(results)
    assert made(results) == first
    lines = (results / "staleness.csv").read_text().splitlines(keepends=True)
    # rows in another order, and one of a run that does not belong to the experiment any more, change nothing
    (results / "staleness.csv").write_text("".join([lines[0], *lines[:0:-1], lines[2].replace("python", "once")]))
    assert made(results) == first
    for missing in (1, len(lines) - 1):
        (results / "staleness.csv").write_text("".join(lines[:missing] + lines[missing + 1 :]))
        figure, page = made(results)
        assert figure != first[0] and page != first[1]
        assert "left out" in capsys.readouterr().err


def test_a_run_that_diverged_counts_as_random(results):
    _, whole = made(results)
    (row, *_) = known = runs.rows("staleness")
    row["final_return"], row["diverged"] = "", 1
    write(results / "staleness.csv", known)
    _, diverged = made(results)
    worst = ENVS[row["env_id"]][0]
    np.testing.assert_equal(evidence.curves([runs.rows("staleness")[0]], {row["env_id"]: worst}), worst)
    row["final_return"] = row["mean_return"] = worst
    row["diverged"] = 0
    write(results / "staleness.csv", known)
    assert made(results)[1] == diverged != whole


def test_a_page_without_the_marker_is_noticed(results):
    (results / "page.md").write_text("nothing here")
    with pytest.raises(ValueError, match="staleness"):
        report.main()


def test_the_tables_of_staleness(results):
    _, page = made(results)
    assert page.startswith("before\n<!-- staleness -->\n|") and page.endswith(
        "|\n<!-- end of staleness-drift -->\nafter\n"
    )
    (gipo, gipo_pooled, returns, _), (clip, clip_pooled, _, _) = cells(page, "GIPO"), cells(page, "PPO-clip")
    np.testing.assert_allclose([float(text) for text in returns], [870] * 3 + [450] * 3, rtol=0.1)
    middles = [[float(text.split()[0]) for text in line] for line in (gipo, clip)]
    # the mean of clip at K = 1 is the unit itself
    np.testing.assert_allclose(middles, [[0.9, 0.9, 0.9], [1, 0.3, 0.1]], atol=0.06)
    final, _, min_max, gap, chance = (float(text.split()[0]) for text in gipo_pooled)
    assert final == pytest.approx(0.9, abs=0.06) and gap == pytest.approx(0.7, abs=0.06) and chance == 1
    assert min_max > 0.85 and float(clip_pooled[2].split()[0]) < 0.3
    assert page.index("| GIPO | " + gipo_pooled[0]) < page.index("| PPO-clip | " + clip_pooled[0])  # best first
    ahead = {part: [float(text.split()[0]) for text in cells(page, part)[0]] for part in ("HalfCheetah", "Hopper")}
    np.testing.assert_allclose([*ahead.values()], [[-0.1, 0.6, 0.8, 0.7]] * 2, atol=0.1)
    assert ahead["HalfCheetah"] != ahead["Hopper"]
    assert cells(page, "HalfCheetah") == cells(page, "without Hopper")  # there are two
    stale, fresh = re.findall(r"K = [^:]*: GIPO.*?: ([^:.]*)\.", page)
    assert "best first: GIPO, PPO-clip." in page
    few = ", by 3 seeds only"
    assert stale == "GIPO is ahead" + few and fresh in ("PPO-clip is ahead" + few, "no difference is shown" + few)


def test_every_experiment_has_its_place_on_the_real_pages(folder, monkeypatch):
    monkeypatch.setattr(experiments, "tuned", lambda method: experiments.candidates(method)[0])
    best = {key[:2]: key[2] for key in experiments.searching()}
    for module in (experiments, report):
        monkeypatch.setattr(module, "searched", lambda: best)
    pages = [folder / "README.md", folder / "results.md"]
    monkeypatch.setattr(report, "PAGES", pages)
    for page, real in zip(pages, ("README.md", "docs/results.md"), strict=True):
        page.write_text((report.ROOT / real).read_text().replace("Not run yet.", ""))
    rng = np.random.default_rng(2)
    plans = {name: list(plan()) for name, plan in experiments.EXPERIMENTS.items()}
    for name, plan in plans.items():
        write(folder / f"{name}.csv", [made_up(run, 100 + rng.normal()) for run in plan])
    names = {run.value("--env-id") for plan in plans.values() for run in plan}
    write(folder / "random.csv", [{"env_id": env, "final_return": 7, "final_success": 0.25} for env in names])
    costs = dict.fromkeys(("play_seconds", "receive_seconds", "batch_seconds", "update_seconds", "message_bytes"), 1)
    costs |= dict.fromkeys(("message_steps", "batch_steps", "reuse"), 1)
    write(folder / "costs.csv", [{"quantity": name, "value": value} for name, value in costs.items()])
    report.main()
    text = pages[1].read_text()
    for empty in re.findall(r"<!-- ([\w-]+) -->\n\s*<!-- end", text):
        raise AssertionError(empty)
    changed = text[text.index("<!-- remedies -->") : text.index("<!-- end of remedies -->")]
    lines = [line.split(" | ")[0].removeprefix("| ") for line in changed.splitlines() if ": " in line]
    assert lines[:2] == ["GIPO: as tuned", "GIPO: a third of the learning rate"]
    assert lines[lines.index("SAPO: KL") - 1] == "SAPO: as tuned"
    ahead = text[text.index("<!-- remedies-ahead -->") : text.index("<!-- end of remedies-ahead -->")]
    for change in ("as tuned", "KL", "3 epochs"):
        (line,) = cells(ahead, change)
        assert len(line) == 4 and all(" to " in cell for cell in line)
    pictures = {path.name for path in (folder / "figures").iterdir()}
    assert pictures == {f"{name}.png" for name in ("staleness", "freeze", "lag", "sigma", "atari", "peers")}
    linked = set(re.findall(r"\(figures/([\w.]+)\)", text))
    assert linked and linked <= pictures


def test_what_is_gone_is_not_run_yet_and_what_lacks_its_ground_is_an_error(results, capsys):
    _, whole = made(results)
    assert "Not run yet." not in whole
    (results / "random.csv").unlink()
    assert report.main() == 2
    assert "run ./benchmark.sh random" in capsys.readouterr().err
    assert (results / "page.md").read_text().count("Not run yet.") == len(MARKERS)
    (results / "staleness.csv").unlink()
    assert report.main() == 0


def test_rows_of_different_code_are_named(results, capsys):
    report.main()
    assert "different code" not in capsys.readouterr().err
    known = runs.rows("staleness")
    known[0]["revision"] = "abc"
    write(results / "staleness.csv", known)
    report.main()
    assert "different code" in capsys.readouterr().err


def test_a_verdict_needs_the_same_environments_and_names_few_seeds():
    ours, theirs = {"a": np.array([1.0, 1.1, 1.2])}, {"a": np.array([0.0, 0.1, 0.2])}
    assert report.verdicts({"here": {"gipo": ours, "clip": theirs}}).endswith(": GIPO is ahead, by 3 seeds only.")
    assert report.verdicts({"here": {"gipo": ours, "clip": theirs | {"b": theirs["a"]}}}) == ""
    single = {"gipo": {"a": ours["a"][:1]}, "clip": {"a": theirs["a"][:1]}}
    assert report.verdicts({"here": single}, 1) == (
        "here: GIPO 1.0, PPO-clip 0.0, difference 1.0: one seed decides nothing."
    )


def test_drift_and_the_sigma_of_the_largest_effective_sample_size():
    rng = np.random.default_rng(3)
    for s, best in ((0.3, 0.76), (1.0, 0.95), (2.0, 1.10)):
        x = rng.normal(-(s**2) / 2, s, 400_000)
        assert evidence.drift(np.quantile(np.abs(x), 0.95)) == pytest.approx(s, rel=0.01)
        assert evidence.widest_ess(s) == pytest.approx(best, abs=0.01)
        coef = np.exp(x - x**2 / 2)
        assert evidence.ess(1.0, s) == pytest.approx(coef.mean() ** 2 / (coef**2).mean(), rel=0.02)


def test_quick_ends_with_a_figure_and_a_verdict_unless_a_run_failed(folder, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "tuned", lambda method: experiments.candidates(method)[0])
    monkeypatch.setattr(quick, "WORK", folder)
    failed = [1]

    def run_all(experiment, plan, dry_run, workers):
        if failed[0]:
            return failed[0]
        rng = np.random.default_rng(4)
        write(folder / "quick.csv", [made_up(run, (run.method == "gipo") * 100 + rng.normal()) for run in plan])
        return 0

    monkeypatch.setattr(experiments, "run_all", run_all)
    write(folder / "random.csv", [{"env_id": env_id, "final_return": 0} for env_id in quick.STEPS])
    assert quick.main() == 1
    assert "GIPO" not in capsys.readouterr().out and not (folder / "quick.png").exists()
    failed[0] = 0
    assert quick.main() == 0
    out = capsys.readouterr().out
    assert out.count("GIPO is ahead") == 4 and all(f"{env_id}, return: K = 1: GIPO" in out for env_id in quick.STEPS)
    assert (folder / "quick.png").exists()


def test_many_actors_saturate_the_learner():
    costs = {"play_seconds": 0.1, "receive_seconds": 0.01, "batch_seconds": 0.02, "update_seconds": 0.01}
    costs |= {"message_steps": 200, "batch_steps": 400, "reuse": 4}
    assert evidence.speed(1, costs) == (2000, False)
    # two messages and a batch take 0.01 + 0.01 + 0.02 + 4 x 0.01 seconds and bring 400 steps
    assert evidence.speed(100, costs) == (pytest.approx(5000), True)
    assert evidence.age(2, 4, costs) == 4 * 2 + 1.5
