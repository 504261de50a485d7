"""The settings of each loss in the language models' study: rates, KL weights and bandwidths, in two rounds.

Round one has the middle bandwidth and one seed. Round two tries the best quarter of rates and KL weights with each
bandwidth and another seed; it alone makes the choice. Completions wait 32 steps.
"""

import itertools
import math
from collections.abc import Iterator
from functools import cache

import pandas as pd

from benchmark.measurements import complete
from benchmark.runner import ROOT, Run, unfinished
from benchmark.tuning import ranking, words

TRL = ROOT / ".venv-trl" / "bin" / "python"
SEEDS = (1001, 1002)  # of round one and of round two
STALENESS = 32
RATES = (5e-5, 1e-4, 2e-4, 4e-4)
KL_WEIGHTS = (0.0, 0.1, 0.3)
WIDTHS = (0.25, 0.5, 1.0)

# in order; TRL's loss has no bandwidth in CISPO and VESPO, and "none" does not correct for the age of the data
BANDWIDTHS: dict[str, list[dict]] = {
    "gipo": [{"sigma": width} for width in WIDTHS],
    "clip": [{"epsilon": eps} for eps in (0.1, 0.2, 0.4)],
    "sapo": [{"sapo_tau": round(math.sqrt(2) / width, 3)} for width in WIDTHS],  # as wide near a ratio of 1
    "cispo": [{}],
    "vespo": [{}],
    "none": [{}],
}


def run(loss: str, seed: int, staleness: int, line: str, **flags) -> Run:
    flags = {"seed": seed, "staleness": staleness, **dict(sorted(flags.items()))}
    return Run(loss, f"benchmark/llm_run.py --loss {loss}", flags, line, TRL)


def settings(loss: str) -> list[dict]:
    """All flags that a loss is tried with."""
    every = itertools.product(RATES, KL_WEIGHTS, BANDWIDTHS[loss])
    return [{"learning_rate": rate, "kl_coef": kl, **band} for rate, kl, band in every]


@cache
def round_one() -> tuple[Run, ...]:
    found = []
    for loss, bands in BANDWIDTHS.items():
        middle = bands[len(bands) // 2]
        tried = [flags for flags in settings(loss) if middle.items() <= flags.items()]
        found += [run(loss, SEEDS[0], STALENESS, words(flags), **flags) for flags in tried]
    return tuple(found)


def round_two() -> list[Run]:
    """Raises `Missing` before round one is complete."""
    known, runs = scores(round_one()), []
    for loss in BANDWIDTHS:
        terms = ranking(known[known.method == loss]).index
        best = terms[: math.ceil(len(terms) / 4)]
        kept = [flags for flags in settings(loss) if words(flags) in best]
        pairs = [(flags["learning_rate"], flags["kl_coef"]) for flags in kept]
        tried = [flags for flags in settings(loss) if (flags["learning_rate"], flags["kl_coef"]) in pairs]
        runs += [run(loss, SEEDS[1], STALENESS, words(flags), **flags) for flags in tried]
    return runs


def scores(plan) -> pd.DataFrame:
    """Rewards on held-out prompts, of the policy that has learned."""
    return complete(plan, "llm-tune", "eval_return")


def plan() -> Iterator[Run]:
    """Round one, and once it is complete round two."""
    yield from round_one()
    if not unfinished(round_one()):
        yield from round_two()


def choice(loss: str) -> dict:
    """The flags that are best in round two."""
    known = scores(round_two())
    allowed = {words(flags): flags for flags in settings(loss)}
    return allowed[ranking(known[known.method == loss]).index[0]]
