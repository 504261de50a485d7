"""The settings of each method: a grid of one shape, four rounds of tuning, and the choice.

Every method has three bandwidths, six KL terms and both units of the ratio. Round one tries all of them, early and with
old data. Round two repeats the best quarter of each method and the best three of each unit, with fresh and with old
data, at the length that is reported; then it tries what the grid lacks next to its best setting: two learning rates,
and one step beyond each edge. Round three repeats all of round two. Round four repeats the best of both with two seeds,
and the last three rounds together make the choice. The tasks are those that are reported, the seeds are not.

Runs are compared by ranks, because the returns of HalfCheetah differ by so much that one lucky run would decide.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from functools import cache

import pandas as pd

from benchmark.measurements import complete
from benchmark.methods import run
from benchmark.runner import Run, cached, unfinished

TASKS = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5")
SEEDS = (1001, 1002, 1003, 1004, 1005)  # of each round; the last has two
SIZES = (1, 8)  # of the replay buffer
STEPS = (60_000, 150_000)  # of round one and of the others
RATES = (5e-4, 1e-3, 2e-3)  # the grid has the middle one

# the grid has the middle three of these bandwidths, and all but the last of the KL weights
WIDTHS = {"action": (0.25, 0.5, 1.0, 2.0, 4.0), "dimension": (0.15, 0.3, 0.5, 1.0, 2.0)}  # of GIPO's weight, by unit
KL_WEIGHTS = {"current": (0.03, 0.1, 0.3, 1.0), "behaviour": (0.03, 0.1, 0.3)}
KL_TERMS = [{"kl_coef": 0.0}]
KL_TERMS += [{"kl_coef": weight, "kl_to": to} for to, weights in KL_WEIGHTS.items() for weight in weights[:-1]]


def gate(width: float) -> dict[str, float]:
    """SAPO's gate near a ratio of 1 is a Gaussian of width sqrt(2) / tau; tau_neg / tau is that of its authors."""
    tau = math.sqrt(2) / width
    return {"sapo_tau": round(tau, 3), "sapo_tau_neg": round(1.05 * tau, 3)}


def both(settings: list[dict]) -> dict[str, list[dict]]:
    return dict.fromkeys(WIDTHS, settings)


CLIPS = (0.05, 0.1, 0.2, 0.4, 0.8)
BANDWIDTHS: dict[str, dict[str, list[dict]]] = {
    "gipo": {ratio: [{"sigma": width} for width in widths] for ratio, widths in WIDTHS.items()},
    "clip": both([{"clip_coef": eps} for eps in CLIPS]),
    "sapo": {ratio: [gate(width) for width in widths] for ratio, widths in WIDTHS.items()},
    "tis": both([{"tis_cap": cap} for cap in (0.5, 1.0, 2.0, 5.0, 10.0)]),
    "decoupled": both([{"clip_coef": eps, "tis_cap": 2.0} for eps in CLIPS]),
    "plain_is": both([{"learning_rate": rate} for rate in (2.5e-4, *RATES, 4e-3)]),  # it has no bandwidth
}
METHODS = tuple(BANDWIDTHS)


def grid(method: str) -> list[dict]:
    """The flags of a method, of a grid with one shape for all methods."""
    bands = [(ratio, band) for ratio, known in BANDWIDTHS[method].items() for band in known[1:-1]]
    return [{"learning_rate": RATES[1], "ratio": ratio, **band, **kl} for ratio, band in bands for kl in KL_TERMS]


def beside(method: str, flags: dict) -> list[dict]:
    """What the grid lacks next to one of its settings: other learning rates, and a step beyond each edge."""
    found = [flags | {"learning_rate": rate} for rate in RATES]
    known = BANDWIDTHS[method][flags["ratio"]]
    for edge, beyond in ((1, 0), (-2, -1)):
        if known[edge].items() <= flags.items():
            found.append(flags | known[beyond])
    if flags["kl_coef"]:
        *_, edge, beyond = KL_WEIGHTS[flags["kl_to"]]
        if flags["kl_coef"] == edge:
            found.append(flags | {"kl_coef": beyond})
    return [other for other in found if other not in grid(method)]


def settings(method: str) -> list[dict]:
    """All flags that a method is tried with. Raises `Missing` before round two is complete."""
    return grid(method) + beside(method, best_of_round_two()[method])


def words(flags: dict) -> str:
    """Flags as they stand in a command; the line of a setting."""
    return " ".join(Run("", "", flags).arguments)


def at_an_edge(method: str, flags: dict) -> bool:
    """Whether no setting that was tried goes beyond this one in one of its dials alone. A KL weight ends at 0."""

    def tried(*dial: str) -> list[float]:
        rest = {name: x for name, x in flags.items() if name not in dial}
        return [other[dial[0]] for other in settings(method) if other == rest | {name: other[name] for name in dial}]

    for dial in (tuple(BANDWIDTHS[method][flags["ratio"]][0]), ("learning_rate",)):
        known = tried(*dial)
        if len(known) > 1 and flags[dial[0]] in (min(known), max(known)):
            return True
    known = tried("kl_coef")
    return len(known) > 1 and flags["kl_coef"] == max(known)


def trials(method: str, flags: dict, seed: int, steps: int, sizes: Iterable[int]) -> Iterator[Run]:
    for k, env_id in itertools.product(sizes, TASKS):
        yield run(method, env_id, seed, words(flags), total_timesteps=steps, buffer_epochs=k, **flags)


@cache
def round_one() -> tuple[Run, ...]:
    tried = [(method, flags) for method in METHODS for flags in grid(method)]
    return tuple(one for method, flags in tried for one in trials(method, flags, SEEDS[0], STEPS[0], SIZES[-1:]))


def leaders(table: pd.DataFrame) -> set[str]:
    """The best quarter of the settings of a method, and the best three of each unit of the ratio."""
    quarter = ranking(table).index[: table.line.nunique() // 4]
    return {*quarter, *(line for _, own in table.groupby("ratio") for line in ranking(own).index[:3])}


def round_two() -> list[Run]:
    """Raises `Missing` before round one is complete."""
    known, runs = ranks(round_one()), []
    for method in METHODS:
        best = leaders(known[known.method == method])
        tried = [flags for flags in grid(method) if words(flags) in best]
        runs += [one for flags in tried for one in trials(method, flags, SEEDS[1], STEPS[1], SIZES)]
    return runs


@cached
def best_of_round_two() -> dict[str, dict]:
    """The best flags of each method, within the grid."""
    known, found = ranks(round_two()), {}
    for method in METHODS:
        best = ranking(known[known.method == method]).index[0]
        found[method] = next(flags for flags in grid(method) if words(flags) == best)
    return found


def wider() -> list[Run]:
    """The second part of round two, beside its best settings."""
    tried = [(method, flags) for method, best in best_of_round_two().items() for flags in beside(method, best)]
    return [one for method, flags in tried for one in trials(method, flags, SEEDS[1], STEPS[1], SIZES)]


def round_three() -> list[Run]:
    """All settings of round two again."""
    tried = {(one.method, one.line) for one in round_two() + wider()}
    kept = [(method, flags) for method in METHODS for flags in settings(method) if (method, words(flags)) in tried]
    return [one for method, flags in kept for one in trials(method, flags, SEEDS[2], STEPS[1], SIZES)]


def before_the_last() -> pd.DataFrame:
    """The ranks of rounds two and three together."""
    return ranks(round_two() + wider() + round_three())


def finalists() -> dict[str, list[dict]]:
    """By method, the best three settings of rounds two and three, and the best one for each K."""
    known, found = before_the_last(), {}
    for method in METHODS:
        own = known[known.method == method]
        best = {*ranking(own).index[:3], *(ranking(own[own.buffer_epochs == k]).index[0] for k in SIZES)}
        found[method] = [flags for flags in settings(method) if words(flags) in best]
    return found


def of_finalists(seeds: Iterable[int]) -> list[Run]:
    tried = [(seed, method, flags) for seed in seeds for method, known in finalists().items() for flags in known]
    return [one for seed, method, flags in tried for one in trials(method, flags, seed, STEPS[1], SIZES)]


def round_four() -> list[Run]:
    return of_finalists(SEEDS[3:])


def ranks(plan: Iterable[Run]) -> pd.DataFrame:
    """The value of a run is the share of all runs with its task and K that are no better."""
    table = complete(plan, "tune")
    return table.assign(value=table.groupby(["env_id", "buffer_epochs"]).value.rank(pct=True))


def ranking(table: pd.DataFrame) -> pd.Series:
    """Mean values of settings, the best first. Equal ones stand in the order of their names, from the last on."""
    means = table.groupby("line").value.mean().round(9).sort_index(ascending=False)
    return means.sort_values(ascending=False, kind="stable")


def plan() -> list[Run]:
    """The runs of each round, as soon as the one before is complete."""
    runs = list(round_one())
    for later in (round_two, wider, round_three, round_four):
        if not unfinished(runs):
            runs += later()
    return runs


@cached
def results() -> pd.DataFrame:
    """The ranks of the finalists in rounds two to four together."""
    return ranks(of_finalists(SEEDS[1:]))


def choice(method: str, k: int | None = None, **same) -> dict:
    """The flags that are best for K = 1 and 8 together, or for this K; of those that have `same` flags if given.

    If no finalist has these flags, rounds two and three decide.
    """
    allowed = {words(flags): flags for flags in settings(method) if same.items() <= flags.items()}

    def of_these(table: pd.DataFrame) -> pd.DataFrame:
        found = table[(table.method == method) & table.line.isin(allowed)]
        return found[found.buffer_epochs == k] if k else found

    known = of_these(results())
    if known.empty:
        known = of_these(before_the_last())
    return allowed[ranking(known).index[0]]
