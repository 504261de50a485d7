"""Figures and tables from benchmark/results/*.csv and nothing else; the same files give the same bytes.

./benchmark.sh report        # rewrites docs/figures and what stands between the markers of the pages

A cell of a table and a point of a figure stand for several runs, and appear once all of these are there.
"""

import itertools
import re
import sys
from collections import defaultdict
from collections.abc import Hashable, Iterable
from pathlib import Path

import matplotlib
import numpy as np
import tyro

from benchmark import evidence, scores
from benchmark.drawing import NAMES, SCALE, STEPS_AXIS, Panel, against, over_time
from benchmark.evidence import Rows, Scale, by_flag, complete, pooled
from benchmark.experiments import (
    ATARI_STEPS,
    FREEZE_AT,
    METHODS,
    STEPS,
    candidates,
    searched,
    tuned,
    tuning_scores,
)
from benchmark.runs import Missing, Run, rows
from benchmark.scores import Scores
from benchmark.scripts import ROOT

FIGURES = ROOT / "docs" / "figures"
PAGES = [ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "gipo.md"]
FEW = 5  # seeds
NOTHING = "Not run yet."
LABELS = {method: label for method, (label, *_) in NAMES.items()}
DRIFT = ("abs_logratio_p95", "ess", "dead_fraction")
SIZES = {(1,): "K = 1", (8,): "K = 8", (32,): "K = 32", (8, 32): "K = 8 and 32"}


def number(found: tuple[float, float, float], digits: int = 2) -> str:
    """A statistic with its interval, if there is one."""
    pattern = "{:z.{d}f}" if np.isnan(found).any() else "{:z.{d}f} ({:z.{d}f} to {:z.{d}f})"
    return pattern.format(*found, d=digits)


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """Markdown."""
    head = list(head)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def by_method(cells: dict[tuple[str, Hashable], str], columns: dict[Hashable, str], labels=LABELS) -> str:
    """Markdown: a line for each method that has a cell, and columns with their names."""
    methods = [method for method in labels if any((method, x) in cells for x in columns)]
    lines = ([labels[method], *(cells.get((method, x), "") for x in columns)] for method in methods)
    return table(["", *columns.values()], lines)


def verdicts(samples: dict[str, dict[str, Scores]], digits: int = 2) -> str:
    """A sentence for each place that has GIPO and PPO-clip on the same environments, by the interval of the difference.

    Fewer than FEW seeds are named, for intervals are too narrow then.
    """
    sentences = []
    for place, by in samples.items():
        if "gipo" in by and by["gipo"].keys() == by.get("clip", {}).keys():
            difference = scores.difference_with_interval(by["gipo"], by["clip"])
            _, low, high = difference
            outcome = "GIPO is ahead" if low > 0 else "PPO-clip is ahead" if high < 0 else "no difference is shown"
            seeds = min(map(len, by["gipo"].values()))
            outcome += f", by {seeds} seeds only" if seeds < FEW else ""
            outcome = "one seed decides nothing" if seeds == 1 else outcome
            found = (scores.iqm_with_interval(by["gipo"]), scores.iqm_with_interval(by["clip"]), difference)
            own, other, gap = (number(statistic, digits) for statistic in found)
            sentences.append(f"{place}: GIPO {own}, PPO-clip {other}, difference {gap}: {outcome}.")
    return " ".join(sentences)


def by_place(found: dict[tuple[str, Hashable], Scores], names: dict[Hashable, str]) -> dict[str, dict[str, Scores]]:
    """Scores by (method, place) as scores of methods by the name of the place."""
    return {name: {method: own for (method, at), own in found.items() if at == place} for place, name in names.items()}


def fill(name: str, text: str):
    """Put a text between the markers of that name, wherever a page has them; `ValueError` if none has."""
    between, filled = rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", 0
    for page in PAGES:
        old = page.read_text()
        new, count = re.subn(between, lambda match: match[1] + text + "\n" + match[2], old, flags=re.DOTALL)
        page.write_text(new)
        filled += count
    if not filled:
        raise ValueError(f"no page has the marker <!-- {name} -->")


def intervals(cells: dict[Hashable, Scores], digits: int = 2) -> dict[Hashable, str]:
    """Interquartile means with their intervals."""
    return {key: number(scores.iqm_with_interval(sample), digits) for key, sample in cells.items()}


def means(cells: dict[Hashable, Rows], *columns: str, pattern: str = "{:.2g}") -> dict[Hashable, str]:
    """Means of columns over the runs of a cell that did not diverge."""

    def mean(known, column):
        left = [float(row[column]) for row in known if row["diverged"] != "1"]
        return pattern.format(np.mean(left)) if left else "-"

    return {key: " / ".join(mean(known, column) for column in columns) for key, known in cells.items()}


def env_and_k(run: Run) -> tuple[str, tuple[str, int]]:
    """Key of a cell."""
    return run.method, (run.value("--env-id"), int(run.value("--buffer-epochs")))


# ---------------------------------------------------- Experiments ----------------------------------------------------
def tune():
    known, lines = tuning_scores(), []
    for method in METHODS:
        chosen = tuned(method)
        others = [known[method, flags] for flags in candidates(method) if flags != chosen]
        spread = f"{min(others):.2f} to {max(others):.2f}"
        lines.append([LABELS[method], f"`{' '.join(chosen)}`", f"{known[method, chosen]:.2f}", spread])
    fill("tune", table(["", "chosen", "its score", "the other five"], lines))
    own = {flags[1::2]: known["gipo", flags] for flags in candidates("gipo")}
    widths, rates = (list(dict.fromkeys(column)) for column in zip(*own, strict=True))
    lines = [[rate, *(f"{own[width, rate]:.2f}" for width in widths)] for rate in rates]
    fill("tune-gipo", table(["learning rate", *(f"sigma = {width}" for width in widths)], lines))


def staleness():
    scale, cells = Scale(), complete("staleness", by_flag("--buffer-epochs"))
    found = {key: scale(known) for key, known in cells.items()}
    columns = {k: f"K = {k}" for k in sorted({k for _, k in cells})}
    against(found, NAMES, FIGURES / "staleness.png", "rollouts K in the replay buffer")
    fill("staleness", by_method(intervals(found), columns))
    fill("staleness-drift", by_method(means(cells, *DRIFT), columns))
    single = complete("staleness", env_and_k)
    places = {place: f"{place[0].removesuffix('-v5')}, K = {place[1]}" for place in sorted({p for _, p in single})}
    returns = {cell: evidence.values(known, "final_return", scale.zero) for cell, known in single.items()}
    texts = {cell: f"{next(iter(by_env.values())).mean():.0f}" for cell, by_env in returns.items()}
    fill("staleness-returns", by_method(texts, places))
    envs = dict.fromkeys(env_id for _, (env_id, _) in single)
    parts = {env_id: {env_id} for env_id in envs} | {f"without {env_id}": envs.keys() - {env_id} for env_id in envs}
    lines = []
    for part, kept in parts.items():
        own = {name: [row for row in known if row["env_id"] in kept] for name, known in cells.items()}
        lines.append([part.removesuffix("-v5"), *ahead(scale, own, "gipo", "clip")])
    fill("staleness-ahead", table(["", *SIZES.values()], lines))
    stale = {m: (cells[m, 8], cells[m, 32]) for m in NAMES if (m, 8) in cells and (m, 32) in cells}
    pairs = {"K = 8 and 32 together": {m: pooled(scale, *stale[m]) for m in stale}}
    pairs["K = 1"] = {m: sample for (m, k), sample in found.items() if k == 1}
    fill("staleness-pooled", ranking(stale, scale))
    order = best_first(pairs["K = 8 and 32 together"])
    rank = f" At K = 8 and 32, best first: {', '.join(LABELS[m] for m in order)}." if order else ""
    fill("staleness-verdict", verdicts(pairs) + rank)


def best_first(samples: dict[str, Scores]) -> list[str]:
    """Methods by their interquartile mean."""
    return sorted(samples, key=lambda method: -scores.iqm_with_interval(samples[method])[0])


def ranking(cells: dict[str, tuple[Rows, ...]], scale: Scale) -> str:
    """Markdown: methods by the interquartile mean of their cells together, best first."""
    final = {method: pooled(scale, *own) for method, own in cells.items()}
    paper = evidence.min_max(known for own in cells.values() for known in own)
    area, lines = Scale("mean_return"), []
    for method in best_first(final):
        other = (pooled(column, *cells[method]) for column in (area, paper))
        line = [LABELS[method], *(number(scores.iqm_with_interval(sample)) for sample in (final[method], *other))]
        if "clip" in final and method != "clip":
            compare = (scores.difference_with_interval, scores.probability_of_improvement)
            line += [number(statistic(final[method], final["clip"])) for statistic in compare]
        lines.append(line + [""] * (6 - len(line)))
    return table(
        ["", "final return", "mean return", "min-max", "ahead of PPO-clip by", "chance to beat PPO-clip"], lines
    )


def ahead(scale: Scale, cells: dict[tuple[str, int], Rows], ours: str, theirs: str) -> list[str]:
    """How far one method is ahead of another at each of `SIZES`; empty where one of them has no runs."""
    line = []
    for sizes in SIZES:
        pair = [[cells.get((method, k)) for k in sizes] for method in (ours, theirs)]
        whole = all(itertools.chain(*pair))
        line.append(number(scores.difference_with_interval(*(pooled(scale, *own) for own in pair))) if whole else "")
    return line


def remedies():
    scale, key, columns = Scale(), by_flag("--buffer-epochs"), {k: f"K = {k}" for k in (1, 8, 32)}
    changed = complete("remedies", key)
    bases = {method.partition(": ")[0] for method, _ in changed}
    seeds = {row["seed"] for row in itertools.chain(*changed.values())}  # as tuned on the same seeds
    as_tuned = {
        name: [row for row in known if row["seed"] in seeds] for name, known in complete("staleness", key).items()
    }
    cells = {name: known for name, known in as_tuned.items() if name[0] in bases} | changed
    labels = {}
    for method in sorted(dict.fromkeys(m for m, _ in cells), key=lambda name: METHODS.index(name.partition(": ")[0])):
        base, _, change = method.partition(": ")
        labels[method] = f"{LABELS[base]}: {change or 'as tuned'}"
    fill("remedies", by_method(intervals({name: scale(known) for name, known in cells.items()}), columns, labels))
    fill("remedies-drift", by_method(means(cells, *DRIFT), columns, labels))
    changes = {ours.partition(": ")[2]: (ours, ours.replace("gipo", "clip")) for ours in labels if ours[:4] == "gipo"}
    lines = ([change or "as tuned", *ahead(scale, cells, *pair)] for change, pair in changes.items())
    fill("remedies-ahead", table(["", *SIZES.values()], (line for line in lines if any(line[1:]))))


def efficiency():
    scale, chosen = Scale(), searched()
    cells = complete("efficiency", lambda run: (run.method, int(run.value("--total-timesteps"))))
    found = {key: scale(known) for key, known in cells.items()}
    texts = intervals(found)
    head = ["", "steps", "chosen", "final return"]
    lines = ([LABELS[m], f"{n:,}", f"`{' '.join(map(str, chosen[m, n]))}`", texts[m, n]] for m, n in texts)
    fill("efficiency", table(head, lines))
    ours = found.get(("gipo", STEPS // 2), {})
    others = {n: {"gipo": ours, "clip": found[m, n]} for m, n in found if m == "clip"}
    fill("efficiency-verdict", verdicts({f"Against PPO-clip after {n:,} steps": pair for n, pair in others.items()}))


def ant():
    cells, scale = complete("ant", by_flag("--buffer-epochs")), Scale(experiment="ant")
    found = {key: scale(known) for key, known in cells.items()}
    columns = {k: f"K = {k}" for k in (1, 8, 32)}
    fill("ant", by_method(intervals(found), columns))
    fill("ant-drift", by_method(means(cells, *DRIFT), columns))
    fill("ant-verdict", verdicts(by_place(found, columns)))


def freeze():
    scale, cells = Scale(), complete("freeze", by_flag("--buffer-epochs"))
    sizes = {k: f"K = {k}" for k in (8, 24)}

    def lines(k):
        return {method: (STEPS / 1000, scale.curve(known)) for (method, own), known in cells.items() if own == k}

    panels = [Panel(title, STEPS_AXIS, lines(k)) for k, title in sizes.items()]
    over_time(panels, NAMES, FIGURES / "freeze.png", "return: " + SCALE, mark=FREEZE_AT / 1000)
    found = {key: scale(known) for key, known in cells.items()}
    fill("freeze", by_method(intervals(found), sizes))
    fill("freeze-drift", by_method(means(cells, *DRIFT), sizes))
    fill("freeze-verdict", verdicts(by_place(found, sizes)))


def lag():
    scale, cells = Scale(), complete("lag", by_flag("--policy-lag"))
    found = {key: scale(known) for key, known in cells.items()}
    against(found, NAMES, FIGURES / "lag.png", "policy lag L, iterations")
    columns = {n: f"L = {n}" for n in (0, 2, 8, 16)}
    fill("lag", by_method(intervals(found), columns))
    fill("lag-drift", by_method(means(cells, *DRIFT), columns))
    fill("lag-verdict", verdicts(by_place(found, columns)))


def sigma():
    def key(run):
        width, k = float(run.value("--sigma")), int(run.value("--buffer-epochs"))
        return (k, float(run.value("--sigma-neg")) / width), width

    scale, cells = Scale(), complete("sigma", key)
    found = {key: scale(known) for key, known in cells.items()}
    lines = {(k, share): f"K = {k}, sigma_neg / sigma = {share:g}" for k in (1, 8) for share in (1, 0.5)}
    looks = zip(("#0072B2", "#56B4E9", "#D55E00", "#E69F00"), ("-", "--", "-", "--"), strict=True)
    styles = {line: (label, *look) for (line, label), look in zip(lines.items(), looks, strict=True)}
    against(found, styles, FIGURES / "sigma.png", "sigma, in units of the joint log-ratio")
    widths = sorted({width for _, width in cells})

    def together(k, shares, own_widths):
        wanted = [((k, share), width) for share in shares for width in own_widths]
        whole = wanted and all(name in cells for name in wanted)
        return number(scores.iqm_with_interval(pooled(scale, *map(cells.get, wanted)))) if whole else ""

    columns = {(width,): f"{width:g}" for width in widths} | {tuple(widths): "all widths"}
    by_width = [[lines[k, share], *(together(k, (share,), own) for own in columns)] for k, share in lines]
    by_width += [[f"K = {k}, both", *(together(k, (1, 0.5), own) for own in columns)] for k in (1, 8)]
    fill("sigma", table(["", *columns.values()], by_width))
    drifts = means(cells, *DRIFT)
    by_width = ([label, *(drifts.get((line, width), "") for width in widths)] for line, label in lines.items())
    fill("sigma-drift", table(["", *(f"{width:g}" for width in widths)], by_width))
    ess = []
    for k in sorted({k for (k, share), _ in cells if share == 1}):
        own = {width: scores.iqm_with_interval(found[(k, 1), width])[0] for width in widths if ((k, 1), width) in found}
        best = max(own, key=own.get)
        p95 = np.mean([float(row["abs_logratio_p95"]) for row in cells[(k, 1), best] if row["diverged"] != "1"])
        s = evidence.drift(p95)
        ess.append([f"K = {k}", f"{best:g}", f"{p95:.2g}", f"{s:.2g}", f"{evidence.widest_ess(s):.2f}"])
    fill("sigma-ess", table(["", "best sigma", "its p95 of abs(log r)", "drift s", "sigma of the largest ESS"], ess))


def unscaled(experiment: str, *columns: str) -> dict[tuple[str, tuple[str, int]], Rows]:
    """Tables of columns as they are, beside random actions, and of the drift; returns the cells by method, (env, K)."""
    cells = complete(experiment, env_and_k)
    places = {place: f"{re.sub('^(ALE|MiniGrid|Meta-World)[/-]', '', place[0])}, K = {place[1]}" for _, place in cells}
    for column in columns:
        random = evidence.zeros(column)
        texts = intervals({key: evidence.values(known, column, random) for key, known in cells.items()})
        texts |= {("random", place): f"{random[place[0]]:.2f}" for place in places if place[0] in random}
        fill(f"{experiment}-{column}", by_method(texts, places))
    fill(f"{experiment}-drift", by_method(means(cells, *DRIFT), places))
    return cells


def compared(cells: dict[tuple[str, tuple[str, int]], Rows], column: str, digits: int = 2) -> str:
    """Verdicts for each K, all its environments together."""
    random, found = evidence.zeros(column), defaultdict(lambda: defaultdict(dict))
    for (method, (_, k)), known in cells.items():
        found[f"K = {k}"][method] |= evidence.values(known, column, random)
    return verdicts(found, digits)


def minigrid():
    fill("minigrid-verdict", compared(unscaled("minigrid", "final_success"), "final_success"))


def metaworld():
    cells = unscaled("metaworld", "final_success", "final_return")
    fill("metaworld-verdict", compared(cells, "final_success"))


def atari():
    cells = unscaled("atari", "final_return")
    games = dict.fromkeys(env_id for _, (env_id, _) in cells)
    draw_lines(cells, dict.fromkeys(games, ATARI_STEPS), FIGURES / "atari.png", "game score")
    found, random = defaultdict(dict), evidence.zeros()
    for (method, (env_id, k)), known in cells.items():
        found[f"{env_id.split('/')[1]}, K = {k}"][method] = evidence.values(known, "final_return", random)
    fill("atari-verdict", verdicts(found, 1))


def peers():
    scale, own = Scale(), complete("staleness", by_flag("--buffer-epochs"))
    cells = {method: own[method, 1] for method in ("gipo", "clip") if (method, 1) in own}
    cells |= complete("peers", lambda run: run.method)
    minutes = {
        m: np.median([float(row["seconds"]) for row in known if row["seconds"]]) / 60 for m, known in cells.items()
    }
    curves = {method: scale.curve(known) for method, known in cells.items()}
    panels = [
        Panel("by data", STEPS_AXIS, {method: (STEPS / 1000, curve) for method, curve in curves.items()}),
        Panel("by time", "minutes of a core", {method: (minutes[method], curve) for method, curve in curves.items()}),
    ]
    over_time(panels, NAMES, FIGURES / "peers.png", "return: " + SCALE)
    finals = intervals({method: scale(known) for method, known in cells.items()})
    lines = ([LABELS[m], finals[m], f"{minutes[m]:.1f}"] for m in NAMES if m in cells)
    fill("peers", table(["", "final return", "minutes"], lines))


def rllib():
    def key(run):
        return run.method, *(
            int(run.value(f"--{flag}")) for flag in ("buffer-batches", "buffer-reuse", "num-env-runners")
        )

    cells, zero = complete("rllib", key), defaultdict(float)
    ages, drifts = means(cells, "age_mean"), means(cells, "abs_logratio_p95", "ess")
    speeds = means(cells, "SPS", pattern="{:,.0f}")
    returns = intervals({name: evidence.values(own, "final_return", zero) for name, own in cells.items()}, 0)
    label = {"gipo": "GIPO", "clip": "APPO's clip"}
    lines = []
    for name in cells:
        method, batches, reuse, actors = name
        rule = f"{evidence.age(actors, reuse, measured_costs()):.2g}" if rows("costs") else ""
        settings = [label[method], str(batches), str(reuse), str(actors)]
        lines.append([*settings, returns[name], ages[name], rule, *drifts[name].split(" / "), speeds[name]])
    head = ["", "batches", "reuse", "actors", "return", "age", "by the rule", "p95 of abs(log r)", "ESS", "steps/s"]
    fill("rllib", table(head, lines))


def measured_costs() -> dict[str, float]:
    return {row["quantity"]: float(row["value"]) for row in rows("costs")}


def costs():
    """What many actors can be expected to do, from the costs that were measured with one."""
    known = measured_costs()
    milliseconds = ("play", "receive", "batch", "update")
    measured = [f"{1000 * known[f'{name}_seconds']:.3g} ms" for name in milliseconds]
    measured.append(f"{known['message_bytes'] / 1024:.0f} KiB")
    head = ["an actor plays a message", "it is received", "a batch is prepared", "gradient step", "size of a message"]
    fill("costs", table(head, [measured]))
    lines = []
    for actors in (1, 2, 10, 100):
        steps, saturated = evidence.speed(actors, known)
        age = evidence.age(actors, int(known["reuse"]), known)
        lines.append([str(actors), f"{steps:,.0f}", "the learner" if saturated else "the actors", f"{age:.3g}"])
    fill("costs-estimate", table(["actors", "steps/s", "limited by", "age"], lines))


def draw_lines(cells: dict[tuple[str, tuple[str, int]], Rows], steps: dict[str, int], path: Path, ylabel: str):
    """Mean learning curves, a panel for each environment of `steps` and a line for each method and K."""
    panels = [Panel(env_id, STEPS_AXIS, {}) for env_id in steps]
    for (method, (env_id, k)), known in cells.items():
        end = steps[env_id] / 1000
        panels[list(steps).index(env_id)].lines[method, k] = end, evidence.curves(known, evidence.zeros()).mean(0)
    lines = dict.fromkeys(line for panel in panels for line in panel.lines)
    styles = {(m, k): (f"{LABELS[m]}, K = {k}", NAMES[m][1], "-" if k == 1 else "--") for m, k in lines}
    over_time(panels, styles, path, ylabel)


def main() -> int:
    """Rewrite every figure and table; what has no rows is not run yet. Returns 2 if a section lacks its ground."""
    matplotlib.use("Agg")
    for page in PAGES:
        emptied = re.sub(
            r"(<!-- ([\w-]+) -->\n).*?(<!-- end of \2 -->)", rf"\1{NOTHING}\n\3", page.read_text(), flags=re.DOTALL
        )
        page.write_text(emptied)
    code = 0
    continuous = (tune, staleness, remedies, efficiency, ant, freeze, lag, sigma)
    for section in (*continuous, minigrid, metaworld, atari, peers, rllib, costs):
        try:
            if rows(section.__name__):
                section()
        except Missing as error:
            print(f"error: {section.__name__}: {error}", file=sys.stderr)
            code = 2
    return code


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
