"""The statistics, on samples whose answers are known."""

import numpy as np
import pytest

from benchmark import scores


def test_normalized_scores_have_the_constants_at_0_and_1():
    found = scores.normalize({"a": np.array([10.0, 20.0, 40.0])}, zero={"a": 10.0}, one={"a": 30.0})
    assert found["a"].tolist() == [0, 0.5, 1.5]


def test_the_interquartile_mean_drops_a_quarter_on_either_side():
    a, b = np.array([-1e6, 0.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0, 1e6])
    assert scores.iqm(a, b) == pytest.approx((1 + 1 + 2 + 2) / 4)


def test_the_interval_is_stratified():
    """Two environments without any spread between seeds have none, however far apart they lie."""
    value, low, high = scores.iqm_with_interval({"a": np.zeros(5), "b": np.ones(5)})
    assert value == low == high == 0.5
    spread = scores.iqm_with_interval({"a": np.zeros(5), "b": np.array([0.8, 0.9, 1.0, 1.1, 1.2])})
    assert 0 < spread[1] < spread[0] < spread[2] < 1
    assert spread == scores.iqm_with_interval({"b": np.array([0.8, 0.9, 1.0, 1.1, 1.2]), "a": np.zeros(5)})


def test_the_interval_covers():
    """About 95 % of the intervals hold the mean; with few samples percentile intervals hold it less often."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        _, low, high = scores.iqm_with_interval({env: rng.normal(size=5) for env in "abc"})
        held += low < 0 < high
    assert 170 <= held <= 198


@pytest.mark.parametrize(
    ("envs", "seeds", "share"), [("abc", 10, 0.06), ("abc", 5, 0.08), ("abc", 3, 0.11), ("a", 3, 0.2)]
)
def test_intervals_of_few_seeds_are_too_narrow(envs, seeds, share, monkeypatch):
    """Shares of 95 % intervals of the difference of equal methods that miss 0. docs/protocol.md quotes them."""
    monkeypatch.setattr(scores, "RESAMPLES", 400)
    rng = np.random.default_rng(2)
    missed = 0
    for _ in range(1000):
        ours, theirs = ({env: rng.normal(size=seeds) for env in envs} for _ in range(2))
        _, start, end = scores.difference_with_interval(ours, theirs)
        missed += not start < 0 < end
    assert missed / 1000 == pytest.approx(share, abs=0.02)


def test_one_seed_has_no_interval():
    _, low, high = scores.iqm_with_interval({"a": np.ones(5), "b": np.ones(1)})
    assert np.isnan([low, high]).all()


def test_differences():
    rng = np.random.default_rng(2)
    ours = {env: rng.normal(1, 1, 8) for env in "ab"}
    theirs = {env: rng.normal(0, 1, 8) for env in "ab"}
    value, low, high = scores.difference_with_interval(ours, theirs)
    assert value == pytest.approx(scores.iqm(*ours.values()) - scores.iqm(*theirs.values()))
    assert low < value < high
