"""The settings of each method: a grid of one shape, two rounds of tuning, and the choice.

Every method has three bandwidths, six KL terms and both units of the ratio. Round one has one seed. Round two gives the
best quarter of each method two more seeds. The tasks are those that are reported, but the seeds are not.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache

import pandas as pd

from benchmark.measurements import measure, scale, scored
from benchmark.methods import run
from benchmark.runner import Missing, Run, state, unfinished

TASKS = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5")
SEEDS = (1001, 1002, 1003)
SIZES = (1, 8)  # of the replay buffer
STEPS = 150_000
RATE = 1e-3

WIDTHS = {"action": (0.5, 1.0, 2.0), "dimension": (0.3, 0.5, 1.0)}  # of GIPO's weight, by the ratio's unit
KL_TERMS = [{"kl_coef": 0.0}]
KL_TERMS += [{"kl_coef": weight, "kl_to": "current"} for weight in (0.03, 0.1, 0.3)]
KL_TERMS += [{"kl_coef": weight, "kl_to": "behaviour"} for weight in (0.03, 0.1)]


def gate(width: float) -> dict[str, float]:
    """SAPO's gate near a ratio of 1 is a Gaussian of width sqrt(2) / tau; tau_neg / tau is that of its authors."""
    tau = math.sqrt(2) / width
    return {"sapo_tau": round(tau, 3), "sapo_tau_neg": round(1.05 * tau, 3)}


def both(settings: list[dict]) -> dict[str, list[dict]]:
    return dict.fromkeys(WIDTHS, settings)


# by method and unit of the ratio, in order; if a choice lies at an edge, add one value there
BANDWIDTHS: dict[str, dict[str, list[dict]]] = {
    "gipo": {ratio: [{"sigma": width} for width in widths] for ratio, widths in WIDTHS.items()},
    "clip": both([{"clip_coef": eps} for eps in (0.1, 0.2, 0.4)]),
    "sapo": {ratio: [gate(width) for width in widths] for ratio, widths in WIDTHS.items()},
    "tis": both([{"tis_cap": cap} for cap in (1.0, 2.0, 5.0)]),
    "decoupled": both([{"clip_coef": eps, "tis_cap": 2.0} for eps in (0.1, 0.2, 0.4)]),
    "plain_is": both([{"learning_rate": rate} for rate in (5e-4, 1e-3, 2e-3)]),  # it has no bandwidth
}
METHODS = tuple(BANDWIDTHS)


def settings(method: str) -> list[dict]:
    """All flags that a method is tried with."""
    bands = [(ratio, band) for ratio, known in BANDWIDTHS[method].items() for band in known]
    return [{"learning_rate": RATE, "ratio": ratio, **band, **kl} for ratio, band in bands for kl in KL_TERMS]


def words(flags: dict) -> str:
    """Flags as they stand in a command; the line of a setting."""
    return " ".join(Run("", "", flags).arguments)


def at_an_edge(method: str, flags: dict) -> bool:
    """Whether the bandwidth or the KL weight of a setting is the last of its list. A weight of 0 is no edge."""
    bands = BANDWIDTHS[method][flags["ratio"]]
    own = [i for i, band in enumerate(bands) if band.items() <= flags.items()]
    weights = [term["kl_coef"] for term in KL_TERMS if term.get("kl_to") == flags.get("kl_to")]
    return own[0] in (0, len(bands) - 1) or flags["kl_coef"] == max(weights) > 0


def trials(method: str, flags: dict, seeds: Iterable[int]) -> Iterator[Run]:
    for seed, k, env_id in itertools.product(seeds, SIZES, TASKS):
        yield run(method, env_id, seed, words(flags), total_timesteps=STEPS, buffer_epochs=k, **flags)


@cache
def round_one() -> tuple[Run, ...]:
    every = [(method, flags) for method in METHODS for flags in settings(method)]
    return tuple(one for method, flags in every for one in trials(method, flags, SEEDS[:1]))


def scores(plan: Iterable[Run]) -> pd.DataFrame:
    """Runs of tuning on a scale where random actions have 0 and the mean of round one has 1, by task."""
    return scored(measure(plan), scale(round_one(), "tune"))


def ranking(table: pd.DataFrame) -> pd.Series:
    """Mean scores of the settings with the most seeds, the best first."""
    found = table.groupby("line").agg(score=("value", "mean"), seeds=("seed", "nunique"))
    return found.score[found.seeds == found.seeds.max()].sort_values(ascending=False)


def plan() -> list[Run]:
    """Round one, and once it is complete round two."""
    runs = list(round_one())
    if unfinished(runs):
        return runs
    known = scores(runs)
    for method in METHODS:
        best = ranking(known[known.method == method])
        quarter = best.index[: math.ceil(len(best) / 4)]
        chosen = [flags for flags in settings(method) if words(flags) in quarter]
        runs += [one for flags in chosen for one in trials(method, flags, SEEDS[1:])]
    return runs


def results() -> pd.DataFrame:
    """The scores of both rounds."""
    return results_in(state())


@lru_cache(maxsize=1)
def results_in(state: tuple) -> pd.DataFrame:
    runs = plan()
    left = len(unfinished(runs))
    if left:
        raise Missing(f"{left} runs of tune are missing; run ./benchmark.sh tune first.")
    return scores(runs)


def choice(method: str, k: int | None = None, **same) -> dict:
    """The flags that are best for K = 1 and 8 together, or for this K; of those that have `same` flags if given."""
    allowed = {words(flags): flags for flags in settings(method) if same.items() <= flags.items()}
    known = results()
    known = known[(known.method == method) & known.line.isin(allowed)]
    return allowed[ranking(known if k is None else known[known.buffer_epochs == k]).index[0]]
