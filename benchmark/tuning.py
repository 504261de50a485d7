"""The settings of each method: a grid of one shape, three rounds of tuning, and the choice.

Every method has three bandwidths, six KL terms and both units of the ratio. Round one compares the KL terms and units,
with the middle bandwidth and old data. Round two tries the best quarter of them with each bandwidth, on fresh and on
old data, at the length that is reported; then, once, what lies beyond where the best one is at an edge. Round three
repeats the best of round two, and the two rounds together make the choice. Where that is at an edge that was not
widened, round two has what lies beyond it as well. Each round has a seed of its own. The tasks are those that are
reported, the seeds are not.

Runs are compared by ranks, because the returns of HalfCheetah differ by so much that one lucky run would decide.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache

import pandas as pd

from benchmark.measurements import measure
from benchmark.methods import run
from benchmark.runner import Missing, Run, state, unfinished

TASKS = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5")
SEEDS = (1001, 1002, 1003)  # of each round
SIZES = (1, 8)  # of the replay buffer
STEPS = (60_000, 150_000)  # of round one and of the others
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


BANDWIDTHS: dict[str, dict[str, list[dict]]] = {
    "gipo": {ratio: [{"sigma": width} for width in widths] for ratio, widths in WIDTHS.items()},
    "clip": both([{"clip_coef": eps} for eps in (0.1, 0.2, 0.4)]),
    "sapo": {ratio: [gate(width) for width in widths] for ratio, widths in WIDTHS.items()},
    "tis": both([{"tis_cap": cap} for cap in (1.0, 2.0, 5.0)]),
    "decoupled": both([{"clip_coef": eps, "tis_cap": 2.0} for eps in (0.1, 0.2, 0.4)]),
    "plain_is": both([{"learning_rate": rate} for rate in (5e-4, 1e-3, 2e-3)]),  # it has no bandwidth
}
METHODS = tuple(BANDWIDTHS)


def setting(ratio: str, band: dict, kl: dict) -> dict:
    return {"learning_rate": RATE, "ratio": ratio, **band, **kl}


# settings beyond the grid, next to the best one of round two or to the choice; round two has them too
WIDER: dict[str, list[dict]] = {}


def grid(method: str) -> list[dict]:
    """The flags of a method, of a grid with one shape for all methods."""
    bands = [(ratio, band) for ratio, known in BANDWIDTHS[method].items() for band in known]
    return [setting(ratio, band, kl) for ratio, band in bands for kl in KL_TERMS]


def settings(method: str) -> list[dict]:
    """All flags that a method is tried with."""
    return grid(method) + WIDER.get(method, [])


def words(flags: dict) -> str:
    """Flags as they stand in a command; the line of a setting."""
    return " ".join(Run("", "", flags).arguments)


def at_an_edge(method: str, flags: dict) -> bool:
    """Whether no setting goes beyond this one in its bandwidth alone, or in its KL weight alone, if that is not 0."""
    dial = next(iter(BANDWIDTHS[method][flags["ratio"]][0]))
    bands = [other[dial] for other in settings(method) if same_term(other, flags)]
    alike = [other for other in settings(method) if other | {"kl_coef": 0} == flags | {"kl_coef": 0}]
    weights = [other["kl_coef"] for other in alike]
    return flags[dial] in (min(bands), max(bands)) or flags["kl_coef"] == max(weights) > 0


def is_middle(method: str, flags: dict) -> bool:
    """Whether a setting has the middle bandwidth."""
    return BANDWIDTHS[method][flags["ratio"]][1].items() <= flags.items()


def same_term(one: dict, other: dict) -> bool:
    """Whether two settings have the same KL term and unit of the ratio."""
    return all(one.get(name) == other.get(name) for name in ("ratio", "kl_coef", "kl_to"))


def trials(method: str, flags: dict, seed: int, steps: int, sizes: Iterable[int]) -> Iterator[Run]:
    for k, env_id in itertools.product(sizes, TASKS):
        yield run(method, env_id, seed, words(flags), total_timesteps=steps, buffer_epochs=k, **flags)


@cache
def round_one() -> tuple[Run, ...]:
    tried = [(method, flags) for method in METHODS for flags in grid(method) if is_middle(method, flags)]
    return tuple(one for method, flags in tried for one in trials(method, flags, SEEDS[0], STEPS[0], SIZES[-1:]))


def round_two() -> list[Run]:
    """Raises `Missing` before round one is complete."""
    known, runs = ranks(round_one()), []
    for method in METHODS:
        terms = ranking(known[known.method == method]).index
        best = terms[: math.ceil(len(terms) / 4)]
        kept = [flags for flags in grid(method) if words(flags) in best]
        tried = [flags for flags in grid(method) if any(same_term(flags, other) for other in kept)]
        tried += WIDER.get(method, [])
        runs += [one for flags in tried for one in trials(method, flags, SEEDS[1], STEPS[1], SIZES)]
    return runs


def finalists() -> dict[str, list[dict]]:
    """By method, the best three settings of round two, and the best one for each K."""
    known, found = ranks(round_two()), {}
    for method in METHODS:
        own = known[known.method == method]
        best = {*ranking(own).index[:3], *(ranking(own[own.buffer_epochs == k]).index[0] for k in SIZES)}
        found[method] = [flags for flags in settings(method) if words(flags) in best]
    return found


def of_finalists(seed: int) -> list[Run]:
    tried = [(method, flags) for method, known in finalists().items() for flags in known]
    return [one for method, flags in tried for one in trials(method, flags, seed, STEPS[1], SIZES)]


def round_three() -> list[Run]:
    return of_finalists(SEEDS[2])


def ranks(plan: Iterable[Run]) -> pd.DataFrame:
    """The value of a run is the share of all runs with its task and K that are no better."""
    plan = list(plan)
    left = len(unfinished(plan))
    if left:
        raise Missing(f"{left} runs of tune are missing; run ./benchmark.sh tune first.")
    table = measure(plan)
    return table.assign(value=table.groupby(["env_id", "buffer_epochs"]).value.rank(pct=True))


def ranking(table: pd.DataFrame) -> pd.Series:
    """Mean values of settings, the best first. Equal ones stand in the order of their names, from the last on."""
    means = table.groupby("line").value.mean().round(9).sort_index(ascending=False)
    return means.sort_values(ascending=False, kind="stable")


def plan() -> list[Run]:
    """The runs of each round, as soon as the one before is complete."""
    runs = list(round_one())
    for later in (round_two, round_three):
        if not unfinished(runs):
            runs += later()
    return runs


def results() -> pd.DataFrame:
    """The ranks of the finalists in rounds two and three together."""
    return results_in(state())


@lru_cache(maxsize=1)
def results_in(state: tuple) -> pd.DataFrame:
    return ranks(of_finalists(SEEDS[1]) + round_three())


def choice(method: str, k: int | None = None, **same) -> dict:
    """The flags that are best for K = 1 and 8 together, or for this K; of those that have `same` flags if given.

    If the last rounds have no setting with these flags, an earlier one decides; round one has K = 8 alone.
    """
    allowed = {words(flags): flags for flags in settings(method) if same.items() <= flags.items()}
    for known in (results(), ranks(round_two()), ranks(round_one())):
        found = known[(known.method == method) & known.line.isin(allowed)]
        if k in found.buffer_epochs.values:
            found = found[found.buffer_epochs == k]
        if len(found):
            break
    return allowed[ranking(found).index[0]]
