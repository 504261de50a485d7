"""Statistics of scores: arrays (seeds,) of one method, by environment (Agarwal et al. 2021).

Intervals are stratified bootstraps, which draw seeds again within each environment.
"""

from collections.abc import Callable

import numpy as np
from scipy import stats

Scores = dict[str, np.ndarray]  # by environment
RESAMPLES = 20_000  # another BOOTSTRAP_SEED then changes a bound by about 0.001
BOOTSTRAP_SEED = 0


def normalize(scores: Scores, zero: dict[str, float], one: dict[str, float]) -> Scores:
    """Scores in units of the distance from `zero` to `one` of their environment."""
    return {env: (values - zero[env]) / (one[env] - zero[env]) for env, values in scores.items()}


def iqm(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
    """Interquartile mean of all samples together: the mean without the lowest and the highest quarter."""
    return stats.trim_mean(np.concatenate(samples, axis=axis), 0.25, axis=axis)


def interval(statistic: Callable, *samples: np.ndarray) -> tuple[float, float]:
    """95 % interval of statistic(*samples, axis=-1). Each sample is drawn again by itself, and needs two seeds."""
    if min(map(len, samples)) < 2:
        return np.nan, np.nan
    if all(np.ptp(sample) == 0 for sample in samples):
        value = float(statistic(*samples, axis=-1))  # nothing varies
        return value, value
    found = stats.bootstrap(
        samples, statistic, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(BOOTSTRAP_SEED)
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def iqm_with_interval(scores: Scores) -> tuple[float, float, float]:
    """Interquartile mean over environments and seeds, and the ends of its interval."""
    samples = [scores[env] for env in sorted(scores)]
    return float(iqm(*samples)), *interval(iqm, *samples)


def difference_with_interval(ours: Scores, theirs: Scores) -> tuple[float, float, float]:
    """Difference of two interquartile means, and the ends of its interval."""
    envs = sorted(ours.keys() & theirs.keys())

    def difference(*samples, axis=-1):
        return iqm(*samples[: len(envs)], axis=axis) - iqm(*samples[len(envs) :], axis=axis)

    samples = [ours[env] for env in envs] + [theirs[env] for env in envs]
    return float(difference(*samples)), *interval(difference, *samples)
