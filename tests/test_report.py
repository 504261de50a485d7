"""Figures and tables follow from the rows alone, and from each of them."""

import csv
import itertools

import numpy as np
import pytest

from benchmark import experiments, report, runs

ENVS = {"HalfCheetah-v5": (-300.0, 1000.0), "Hopper-v5": (20.0, 500.0)}
PAGE = "before\n<!-- staleness -->\nold\n<!-- end of staleness -->\nafter\n"


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(report, "PAGES", [tmp_path / "page.md"])
    (tmp_path / "page.md").write_text(PAGE)
    rng = np.random.default_rng(1)
    known = []
    planned = []
    for env_id, seed, k, method in itertools.product(ENVS, (11, 12, 13), (1, 8), ("gipo", "clip")):
        zero, one = ENVS[env_id]
        score = {("clip", 1): 1.0, ("clip", 8): 0.3}.get((method, k), 0.9) + rng.normal(0, 0.05)
        planned.append(experiments.run(method, env_id, seed, "--buffer-epochs", k))
        row = {"command": planned[-1].command, "env_id": env_id, "seed": seed, "buffer_epochs": k, "method": method}
        known.append(dict.fromkeys(runs.COLUMNS) | row | {"final_return": zero + score * (one - zero)})
    monkeypatch.setitem(experiments.EXPERIMENTS, "staleness", lambda: planned)
    write(tmp_path / "staleness.csv", known)
    write(tmp_path / "random.csv", [{"env_id": env, "final_return": zero} for env, (zero, _) in ENVS.items()])
    return tmp_path


def write(path, known):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, known[0].keys())
        writer.writeheader()
        writer.writerows(known)


def made(folder) -> tuple[bytes, str]:
    report.main()
    return (folder / "figures" / "staleness.png").read_bytes(), (folder / "page.md").read_text()


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
    row["final_return"] = ENVS[row["env_id"]][0]
    write(results / "staleness.csv", known)
    assert made(results)[1] == diverged != whole


def test_a_page_without_the_marker_is_noticed(results):
    (results / "page.md").write_text("nothing here")
    with pytest.raises(ValueError, match="staleness"):
        report.main()


def test_the_table(results):
    _, page = made(results)
    assert page.startswith("before\n<!-- staleness -->\n|") and page.endswith("|\n<!-- end of staleness -->\nafter\n")
    lines = [line.split(" | ") for line in page.splitlines() if "PPO-clip" in line or "GIPO" in line]
    gipo, clip = (dict(zip(("K = 1", "K = 8"), line[1:], strict=True)) for line in lines)
    middle = {key: float(text.split()[0]) for key, text in clip.items()}
    # the mean of clip at K = 1 is the unit itself
    assert middle["K = 1"] == pytest.approx(1, abs=0.06) and middle["K = 8"] == pytest.approx(0.3, abs=0.06)
    assert float(gipo["K = 8"].split()[0]) == pytest.approx(0.9, abs=0.06)
