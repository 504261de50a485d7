"""The statistics, on samples whose answers are known."""

import numpy as np
import pandas as pd
import pytest

from benchmark import intervals


def runs(**tasks) -> pd.Series:
    """Values of runs by task."""
    return pd.concat([pd.Series(values, [task] * len(values), dtype=float) for task, values in tasks.items()])


def test_the_interquartile_mean_drops_a_quarter_on_either_side():
    a, b = np.array([-1e6, 0.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0, 1e6])
    assert intervals.iqm(a, b) == pytest.approx((1 + 1 + 2 + 2) / 4)


def test_the_interval_is_stratified():
    """Two tasks without any spread between seeds have none, however far apart they lie."""
    assert intervals.iqm_interval(runs(a=[0] * 5, b=[1] * 5)) == (0.5, 0.5, 0.5)
    value, low, high = spread = intervals.iqm_interval(runs(a=[0] * 5, b=[0.8, 0.9, 1, 1.1, 1.2]))
    assert 0 < low < value < high < 1
    assert spread == intervals.iqm_interval(runs(b=[0.8, 0.9, 1, 1.1, 1.2], a=[0] * 5))


def test_one_seed_has_no_interval():
    value, low, high = intervals.iqm_interval(runs(a=[1] * 5, b=[1]))
    assert value == 1 and np.isnan([low, high]).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tasks", "seeds", "share"), [("abc", 10, 0.06), ("abc", 5, 0.08), ("abc", 3, 0.11), ("a", 3, 0.2)]
)
def test_intervals_of_few_seeds_are_too_narrow(tasks, seeds, share, monkeypatch):
    """Shares of 95 % intervals of the difference of equal methods that miss 0. docs/protocol.md quotes them."""
    monkeypatch.setattr(intervals, "RESAMPLES", 400)
    rng = np.random.default_rng(2)
    missed = 0
    for _ in range(500):
        ours, theirs = (runs(**{task: rng.normal(size=seeds) for task in tasks}) for _ in range(2))
        _, low, high = intervals.difference(ours, theirs)
        missed += not low < 0 < high
    assert missed / 500 == pytest.approx(share, abs=0.025)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
def test_in_one_task_few_differences_of_equal_methods_show(seeds, monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 400)
    rng = np.random.default_rng(3)
    pairs = [(runs(a=rng.normal(size=seeds)), runs(a=rng.normal(size=seeds))) for _ in range(500)]
    shown = sum(intervals.clearly_better(*pair) or intervals.clearly_better(*pair[::-1]) for pair in pairs)
    assert 0 < shown / 500 < 0.06


def test_a_paired_difference():
    """By hand: differences 1, 2 and 3, with a standard error of 1 / sqrt(3) and Student's 4.303."""
    ours, theirs = pd.Series([2.0, 7, 4], [11, 31, 51]), pd.Series([1.0, 5, 1], [11, 31, 51])
    mean, low, high = intervals.paired_difference(ours, theirs)
    assert mean == 2 and (low, high) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5), abs=1e-3)
    assert intervals.paired_difference(ours, theirs.sample(frac=1, random_state=1)) == (mean, low, high)


def test_a_difference():
    rng = np.random.default_rng(2)
    ours, theirs = (runs(a=rng.normal(mean, 1, 8), b=rng.normal(mean, 1, 8)) for mean in (1, 0))
    value, low, high = intervals.difference(ours, theirs)
    assert value == pytest.approx(intervals.iqm(ours.to_numpy()) - intervals.iqm(theirs.to_numpy()))
    assert low < value < high


STEP = np.array([-0.02, -0.01, 0, 0.01, 0.02])


@pytest.mark.parametrize(
    ("own", "other", "shows"),
    [
        ({"a": 1 + STEP, "b": 1 + STEP}, {"a": STEP, "b": STEP}, True),
        ({"a": STEP, "b": STEP}, {"a": 1 + STEP, "b": 1 + STEP}, False),
        # an interval that ends within 0.02 of 0
        ({"a": 0.03 + STEP, "b": 0.03 + STEP}, {"a": STEP, "b": STEP}, False),
        # and one whose end is 0.02 when it is printed
        ({"a": 0.04 + STEP, "b": 0.04 + STEP}, {"a": STEP, "b": STEP}, False),
        # one task carries the result
        ({"a": 3 + STEP, "b": STEP, "c": STEP - 0.1}, {"a": STEP, "b": STEP, "c": STEP}, False),
        # the mean disagrees
        ({"a": [1, 1.01, 1.02, 1.01, -9]}, {"a": STEP}, False),
    ],
)
def test_what_shows(own, other, shows):
    assert intervals.clearly_better(runs(**own), runs(**other)) == shows
