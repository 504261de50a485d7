"""Interquartile means with their intervals (Agarwal et al. 2021).

Values are a Series with the task of each run as its index. Intervals are stratified bootstraps, which draw runs again
within each task. They are too narrow for few runs, and missing for a single one.
"""

import numpy as np
import pandas as pd
from scipy import stats

RESAMPLES = 20_000  # another seed then changes a bound by about 0.001
SEED = 0
EDGE = 0.02  # an interval that ends this close to 0 shows no difference; in two digits, as it is printed
NONE = (np.nan, np.nan)


def samples_by_task(values: pd.Series) -> list[np.ndarray]:
    return [own.to_numpy() for _, own in values.groupby(level=0)]


def iqm(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
    """Interquartile mean of all samples together: the mean without the lowest and the highest quarter, rounded down."""
    return stats.trim_mean(np.concatenate(samples, axis=axis), 0.25, axis=axis)


def bootstrap(statistic, samples: list[np.ndarray]) -> tuple[float, float, float]:
    """The statistic of these samples and the ends of its 95 % interval."""
    value = float(statistic(*samples, axis=-1))
    if min(map(len, samples)) < 2:
        return value, *NONE
    if all(np.ptp(sample) == 0 for sample in samples):
        return value, value, value  # nothing varies
    rng = np.random.default_rng(SEED)
    found = stats.bootstrap(samples, statistic, n_resamples=RESAMPLES, method="percentile", rng=rng)
    return value, float(found.confidence_interval.low), float(found.confidence_interval.high)


def iqm_interval(values: pd.Series) -> tuple[float, float, float]:
    return bootstrap(iqm, samples_by_task(values))


def difference(ours: pd.Series, theirs: pd.Series) -> tuple[float, float, float]:
    """The difference of two interquartile means over the same tasks, and the ends of its interval."""
    own, other = samples_by_task(ours), samples_by_task(theirs)

    def between(*samples, axis=-1):
        return iqm(*samples[: len(own)], axis=axis) - iqm(*samples[len(own) :], axis=axis)

    return bootstrap(between, own + other)


def paired_difference(ours: pd.Series, theirs: pd.Series) -> tuple[float, float, float]:
    """The mean difference of runs with the same index, and the ends of Student's 95 % interval."""
    each = ours - theirs
    return (each.mean(), *stats.t.interval(0.95, len(each) - 1, each.mean(), each.sem()))


def clearly_better(ours: pd.Series, theirs: pd.Series) -> bool:
    """Whether a difference shows: the interval, the mean and every set of tasks but one say the same.

    In a single task Welch's t-test must agree, because a bootstrap of few runs is too sure.
    """
    _, low, _ = difference(ours, theirs)
    if not round(low, 2) > EDGE or ours.groupby(level=0).mean().mean() <= theirs.groupby(level=0).mean().mean():
        return False
    tasks = set(ours.index)
    if len(tasks) == 1:
        return bool(stats.ttest_ind(ours, theirs, equal_var=False).pvalue < 0.05)
    without = [(ours[ours.index != task], theirs[theirs.index != task]) for task in tasks]
    return all(iqm(own) > iqm(other) for own, other in without)
