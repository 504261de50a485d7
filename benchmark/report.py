"""Figures and tables, made only from benchmark/results/*.csv; the same files give the same bytes.

./benchmark.sh report        # rewrites docs/figures and the texts between the markers of the pages

The figure and the texts of an experiment without rows stay as they are. Each cell of a table and each point of a figure
stands for several runs. It appears once all of them are there.
"""

import itertools
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path

import matplotlib
import numpy as np
import tyro

from benchmark import evidence, scores
from benchmark.drawing import NAMES, SCALE, STEPS_AXIS, Panel, against, over_time
from benchmark.evidence import Rows, Scale, complete, kl_of
from benchmark.experiments import (
    FREEZE_AT,
    GRID,
    KL,
    METHODS,
    PAIR,
    STEPS,
    TRL_LOSSES,
    candidate,
    group_scores,
    tuned,
    tuning,
    width_tuning,
    words,
)
from benchmark.runs import Missing, Run, rows
from benchmark.scores import Scores
from benchmark.scripts import ROOT

FIGURES = ROOT / "docs" / "figures"
DOCS = ("results", "protocol", "tables", "gipo", "llm", "rllib")
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in DOCS)]
FEW = 5  # seeds
MEASURES = {
    "abs_logratio_p95": "p95 of abs(log r)",
    "ess": "ESS",
    "dead_fraction": "dead",
    "coef_mean": "mean coefficient",
    "age_mean": "age",
}
LABELS = {method: label for method, (label, *_) in NAMES.items()}
DASHES = ("-", "--", ":", "-.")
PLACES = {(1,): "K = 1", (8, 32): "K = 8 or 32"}
Texts = dict[str, str]  # by marker


# ---------------------------------------------------- Words, tables --------------------------------------------------
def number(found: tuple[float, float, float], digits: int = 2) -> str:
    """A statistic with its interval, if there is one."""
    pattern = "{:z.{d}f}" if np.isnan(found).any() else "{:z.{d}f} ({:z.{d}f} to {:z.{d}f})"
    return pattern.format(*found, d=digits)


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    head = list(head)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def cross(cells: dict[tuple[Hashable, Hashable], str], lines: dict, columns: dict | None = None) -> str:
    """A table in Markdown of cells by (line, column), with the names of both. Lines without a cell are left out."""
    columns = columns or {column: str(column) for _, column in cells}
    shown = [line for line in lines if any((line, column) in cells for column in columns)]
    return table(
        ["", *columns.values()], ([lines[x], *(cells.get((x, column), "") for column in columns)] for x in shown)
    )


def verdict(ours: Scores, theirs: Scores, where: str, names=("GIPO", "PPO-clip"), digits: int = 2) -> str:
    """A sentence that compares two methods by the interval of their difference; empty if their environments differ.

    It says how many seeds there are if they are fewer than FEW, because intervals are too narrow then.
    """
    if not ours or ours.keys() != theirs.keys():
        return ""
    _, low, high = scores.difference_with_interval(ours, theirs)
    if high < 0:
        ours, theirs, names, low, high = theirs, ours, names[::-1], -high, -low
    own, other, low, high = (
        f"{x:z.{digits}f}" for x in (scores.iqm_with_interval(ours)[0], scores.iqm_with_interval(theirs)[0], low, high)
    )
    seeds = min(map(len, [*ours.values(), *theirs.values()]))
    if seeds == 1:
        return f"{where} one seed decides nothing between {names[0]} and {names[1]} ({own} against {other})."
    shown = f"({own} against {other}, difference {low} to {high}{f', {seeds} seeds only' if seeds < FEW else ''})"
    if float(low) > 0:
        return f"{where} {names[0]} beats {names[1]} {shown}."
    return f"{where} no difference shows between {names[0]} and {names[1]} {shown}."


def sentences(found: Iterable[str]) -> str:
    """A list in Markdown, without the empty ones."""
    return "\n".join(f"- {one}" for one in found if one)


def intervals(cells: dict[Hashable, Scores], digits: int = 2) -> dict[Hashable, str]:
    """Interquartile means with their intervals."""
    return {key: number(scores.iqm_with_interval(sample), digits) for key, sample in cells.items()}


def fill(name: str, text: str):
    """Put a text between the markers of that name on each page that has them. Raises `ValueError` if no page has."""
    between, filled = rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", 0
    for page in PAGES:
        old = page.read_text()
        new, count = re.subn(between, lambda match: match[1] + text + "\n" + match[2], old, flags=re.DOTALL)
        if new != old:
            page.write_text(new)
        filled += count
    if not filled:
        raise ValueError(f"no page has the marker <!-- {name} -->")


# ------------------------------------------- Continuous control on one scale -----------------------------------------
def with_kl(line: tuple[str, float]) -> str:
    method, kl = line
    return f"{LABELS[method]} {'with' if kl else 'without'} KL"


LINES = {(method, kl): with_kl((method, kl)) for kl in (KL, 0) for method in METHODS}
STYLES = {line: NAMES[line[0]] for line in LINES}


def by_flag(flag: str, default: str | None = None) -> Callable[[Run], Hashable]:
    """Key of a cell: method and KL coefficient, and the value of a flag."""
    return lambda run: ((run.method, kl_of(run)), int(run.value(flag, default)))


def kl_panels(xlabel: str, lines: dict, kl: Callable = lambda line: line[1]) -> list[Panel]:
    """A panel with KL and one without."""
    titles = {"with KL": KL, "without KL": 0}
    panels = [Panel(title, xlabel, {x: y for x, y in lines.items() if kl(x) == own}) for title, own in titles.items()]
    return [panel for panel in panels if panel.lines]


def pooled(scale: Scale, cells: dict, line: Hashable, sizes: Iterable) -> Scores:
    """The scores of a line in several columns together; empty if a column is missing."""
    own = [cells.get((line, size)) for size in sizes]
    return scale(*own) if all(own) else {}


def difference(ours: Scores, theirs: Scores) -> str:
    """The difference of two interquartile means with its interval, in bold if that lies on one side of 0."""
    found = scores.difference_with_interval(ours, theirs)
    text = number(found)
    return f"**{text}**" if round(found[1], 2) > 0 or round(found[2], 2) < 0 else text


def differences(scale: Scale, cells: dict) -> str:
    """A table in Markdown: GIPO against each method with KL, and against PPO-clip by environment, for each K."""
    pairs = {("gipo", KL, method, KL): f"GIPO minus {LABELS[method]}, both with KL" for method in METHODS[1:]}
    pairs |= {("gipo", 0, "clip", 0): "GIPO minus PPO-clip, both without KL"}
    pairs |= {("gipo", KL, "clip", 0): "GIPO with KL minus PPO-clip without KL"}
    columns = {(1,): "K = 1", (8,): "K = 8", (32,): "K = 32", (8, 32): "K = 8 or 32"}
    found, names = {}, {}
    for (pair, name), sizes in itertools.product(pairs.items(), columns):
        ours, theirs = (pooled(scale, cells, line, sizes) for line in (pair[:2], pair[2:]))
        envs = dict.fromkeys(key.split()[0] for key in ours) if pair[2] == "clip" else {}
        for env_id in ("", *envs):
            own, other = ({key: x for key, x in side.items() if key.startswith(env_id)} for side in (ours, theirs))
            names[pair, env_id] = f"{name}, {short(env_id)}" if env_id else name
            if own and other:
                found[(pair, env_id), sizes] = difference(own, other)
    return cross(found, names, columns)


def details(cells: dict[Hashable, Rows], name: Callable[[Hashable], str]) -> str:
    """A table in Markdown: for each cell the mean final return by environment, and means of MEASURES at the end.

    A run that diverged counts with the return of random actions. It has no other measure.
    """
    zero, lines = evidence.zeros(), []
    envs = list(dict.fromkeys(row["env_id"] for known in cells.values() for row in known))
    for key, known in cells.items():
        returns = evidence.values(known, "final_return", zero)
        left = [row for row in known if row["diverged"] != "1"]
        means = (f"{np.mean([float(row[measure]) for row in left]):.2g}" if left else "" for measure in MEASURES)
        lines.append([name(key), *(f"{returns[env].mean():.0f}" for env in envs), *means, str(len(known) - len(left))])
    return table(["", *map(short, envs), *MEASURES.values(), "diverged"], lines)


def staleness() -> Texts:
    scale, cells = Scale(), complete("staleness", by_flag("--buffer-epochs"))
    found = {key: scale(known) for key, known in cells.items()}
    against(
        kl_panels("rollouts K in the replay buffer", found, lambda key: key[0][1]), STYLES, FIGURES / "staleness.png"
    )
    said = []
    for kl, sizes in itertools.product((KL, 0), PLACES):
        pair = [pooled(scale, cells, (method, kl), sizes) for method in PAIR]
        said.append(verdict(*pair, f"{'With' if kl else 'Without'} KL and {PLACES[sizes]}"))
    for method, sizes in itertools.product(METHODS[2:], PLACES):
        pair = [pooled(scale, cells, (own, KL), sizes) for own in ("gipo", method)]
        said.append(verdict(*pair, f"With KL and {PLACES[sizes]}", ("GIPO", LABELS[method])))
    columns = {k: f"K = {k}" for k in (1, 8, 32)}
    texts = intervals(found)
    shown = {line: name for line, name in LINES.items() if line[1] or line[0] in PAIR}
    tables = {"staleness": cross(texts, shown, columns), "staleness-verdict": sentences(said)}
    tables["staleness-others"] = cross(texts, {x: name for x, name in LINES.items() if x not in shown}, columns)
    tables["staleness-differences"] = differences(scale, cells)
    tables["staleness-details"] = details(cells, lambda key: f"{LINES[key[0]]}, K = {key[1]}")
    return tables | headline(scale, cells, texts, columns)


def ranking(scale: Scale, cells: dict) -> dict[Hashable, float]:
    """Interquartile means on old data of the methods with KL, the best first."""
    old = {line: pooled(scale, cells, line, (8, 32)) for line in LINES if line[1]}
    found = {line: scores.iqm_with_interval(sample)[0] for line, sample in old.items() if sample}
    return dict(sorted(found.items(), key=lambda item: item[1], reverse=True))


def best_other(scale: Scale, cells: dict) -> list[Hashable]:
    """The best method on old data other than GIPO and PPO-clip; none if no such cell is complete."""
    return [line for line in ranking(scale, cells) if line[0] not in PAIR][:1]


def headline(scale: Scale, cells: dict, texts: dict, columns: dict) -> Texts:
    """GIPO with KL, plain PPO-clip, and the best other method on old data with KL."""
    others = best_other(scale, cells)
    ours, plain = ("gipo", KL), ("clip", 0)

    def said(theirs, sizes, name):
        pair = (pooled(scale, cells, line, sizes) for line in (ours, theirs))
        return verdict(*pair, f"With {PLACES[sizes]}", (with_kl(ours), name))

    found = [said(plain, (8, 32), "PPO-clip without KL")]
    found += [said(line, (8, 32), with_kl(line)) for line in others]
    found += [said(plain, (1,), "PPO-clip without KL")]
    return {
        "headline": cross(texts, {line: with_kl(line) for line in (ours, plain, *others)}, columns),
        "headline-verdict": " ".join(filter(None, found)),
    }


def ablation() -> Texts:
    def key(run):
        flags = (run.value("--advantage-source", "vtrace"), kl_of(run), run.value("--sigma"))
        return (run.method, *flags), int(run.value("--buffer-epochs"))

    scale, cells = Scale(), complete("ablation", key)
    widths = {kl: f"{tuned('gipo', kl)['sigma']:g}" for kl in (0, 0.03, KL, 0.3)}
    sources = {"vtrace": "V-trace", "recompute": "recompute"}
    terms = {("gipo", s, kl, widths[kl]): f"GIPO, {sources[s]}, KL {kl:g}" for s in sources for kl in widths}
    sigmas = {("gipo", "vtrace", KL, f"{x:g}"): f"GIPO, V-trace, KL {KL:g}, sigma {x:g}" for x in (0.2, 0.5, 1, 2)}
    corrected, plain = ("clip", "vtrace", 0, None), ("clip", "recompute", 0, None)
    clip = {corrected: "PPO-clip, V-trace, no KL", plain: "PPO-clip, recompute, no KL"}
    default = ("gipo", "vtrace", KL, widths[KL])
    found = {name: scale(known) for name, known in cells.items()}
    colors = {1: "#0072B2", 8: "#D55E00", 32: "#009E73"}
    styles = {
        (s, k): (f"{name}, K = {k}", color, DASHES[s != "vtrace"])
        for (s, name), (k, color) in itertools.product(sources.items(), colors.items())
    }
    tried = {*sigmas, default}
    panels = [
        Panel("", "weight of the KL term", {((x[1], k), x[2]): y for (x, k), y in found.items() if x in terms}),
        Panel("", "sigma", {((x[1], k), float(x[3])): y for (x, k), y in found.items() if x in tried and k < 32}),
    ]
    against([panel for panel in panels if panel.lines], styles, FIGURES / "ablation.png")

    def compare(sizes, ours, theirs, names):
        pair = (pooled(scale, cells, line, sizes) for line in (ours, theirs))
        return verdict(*pair, f"With K = {' or '.join(map(str, sizes))}", names)

    recompute, wide = ("gipo", "recompute", KL, widths[KL]), ("gipo", "vtrace", KL, "0.5")
    names = "GIPO with V-trace", "GIPO with recompute"
    said = [compare(sizes, default, recompute, names) for sizes in ((8,), (32,), (8, 32))]
    said.append(compare((8, 32), corrected, plain, ("PPO-clip with V-trace", "PPO-clip with recompute")))
    for kls, sizes in itertools.product(((KL, 0), (0.03, KL), (0.03, 0)), ((1,), (8,), (32,), (8, 32))):
        pair = [("gipo", "vtrace", kl, widths[kl]) for kl in kls]
        said.append(compare(sizes, *pair, [f"GIPO with KL {kl:g}" for kl in kls]))
    for sizes in ((1,), (8,)):
        said.append(compare(sizes, wide, default, ("GIPO with sigma 0.5", f"GIPO with sigma {widths[KL]}")))
    for sizes in PLACES:
        said.append(compare(sizes, default, plain, ("GIPO with KL and V-trace", "PPO-clip with neither")))
    said.append(compare((8, 32), recompute, plain, ("GIPO with KL and recompute", "PPO-clip with neither")))
    neither, small = ("gipo", "recompute", 0, widths[0]), ("gipo", "vtrace", 0.03, widths[0.03])
    said.append(compare((8, 32), neither, plain, ("GIPO with neither", "PPO-clip with neither")))
    said.append(compare((8, 32), recompute, corrected, ("GIPO with KL and recompute", "PPO-clip with V-trace")))
    others = complete("staleness", by_flag("--buffer-epochs"))
    for line in (("sapo", KL), ("tis", KL)):
        pair = pooled(scale, cells, small, (8, 32)), pooled(scale, others, line, (8, 32))
        said.append(verdict(*pair, "With K = 8 or 32", ("GIPO with KL 0.03", with_kl(line))))
    columns = {k: f"K = {k}" for k in colors}
    lines = terms | sigmas | clip
    own = {key: known for key, known in cells.items() if key[0] in lines}
    shown = {line: name for line, name in terms.items() if line[1] == "vtrace"} | clip
    rest = {line: name for line, name in lines.items() if line not in shown}
    texts = {"ablation": cross(intervals(found), shown, columns), "ablation-verdict": sentences(said)}
    texts |= {"ablation-others": cross(intervals(found), rest, columns)}
    return texts | {"ablation-details": details(own, lambda key: f"{lines[key[0]]}, K = {key[1]}")}


def width() -> Texts:
    """A width per dimension next to one width for all environments, and to the best other method."""
    scale, cells = Scale(), complete("staleness", by_flag("--buffer-epochs"))
    cells |= complete("width", lambda run: ("width", int(run.value("--buffer-epochs"))))
    lines = {("gipo", KL): "GIPO with KL and one width", "width": "GIPO with KL and a width per dimension"}
    lines |= {line: with_kl(line) for line in best_other(scale, cells)}
    lines |= {("clip", 0): with_kl(("clip", 0))}
    found = {key: scale(known) for key, known in cells.items() if key[0] in lines}
    styles = {"width": (lines["width"], NAMES["gipo"][1], "--")}
    styles |= {line: (name, *NAMES[line[0]][1:]) for line, name in lines.items() if line != "width"}
    against([Panel("", "rollouts K in the replay buffer", found)], styles, FIGURES / "width.png")
    said = [
        verdict(*(pooled(scale, cells, x, sizes) for x in ("width", line)), f"With {place}", (lines["width"], name))
        for sizes, place in (PLACES | {(32,): "K = 32"}).items()
        for line, name in lines.items()
        if line != "width"
    ]
    columns = {k: f"K = {k}" for k in (1, 8, 32)}
    tuned_widths = [[f"{x:g}", f"{score:.2f}"] for x, score in group_scores("width-tune", width_tuning()).items()]
    tables = {"width": cross(intervals(found), lines, columns), "width-verdict": sentences(said)}
    own = {key: known for key, known in cells.items() if key[0] == "width"}
    tables["width-details"] = details(own, lambda key: f"{lines['width']}, K = {key[1]}")
    return tables | {"width-tune": table(["width per dimension", "score"], tuned_widths)}


def freeze() -> Texts:
    scale, cells = Scale(), complete("freeze", lambda run: (run.method, kl_of(run)))
    panels = kl_panels(STEPS_AXIS, {line: (STEPS / 1000, scale.curve(known)) for line, known in cells.items()})
    over_time(panels, STYLES, FIGURES / "freeze.png", "return: " + SCALE, mark=FREEZE_AT / 1000)
    found = {line: scale(known) for line, known in cells.items()}
    said = []
    for method, kl in found:
        if method != "gipo" and ("gipo", kl) in found:
            names = ("GIPO", LABELS[method])
            said.append(verdict(found["gipo", kl], found[method, kl], "With KL" if kl else "Without KL", names))
    both = (found.get(("gipo", kl), {}) for kl in (0, KL))
    said.append(verdict(*both, "On the frozen buffer", ("GIPO without KL", "GIPO with KL")))
    columns = {KL: "with KL", 0: "without KL"}
    tables = {"freeze": cross(intervals(found), LABELS, columns), "freeze-verdict": sentences(said)}
    return tables | {"freeze-details": details(cells, LINES.get)}


def lag() -> Texts:
    scale, cells = Scale(), complete("lag", by_flag("--policy-lag", "0"))
    found = {key: scale(known) for key, known in cells.items()}
    against(kl_panels("policy lag L, iterations", found, lambda key: key[0][1]), STYLES, FIGURES / "lag.png")
    columns = {n: f"L = {n}" for n in sorted({n for _, n in found})}
    said = []
    for (n, name), method in itertools.product(columns.items(), METHODS[1:]):
        pair = [found.get(((own, KL), n), {}) for own in ("gipo", method)]
        said.append(verdict(*pair, f"With {name}", ("GIPO", LABELS[method])))
    texts = {"lag": cross(intervals(found), LINES, columns), "lag-verdict": sentences(said)}
    return texts | {"lag-details": details(cells, lambda key: f"{LINES[key[0]]}, L = {key[1]}")}


def peers() -> Texts:
    scale, own = Scale(), complete("staleness", by_flag("--buffer-epochs"))
    cells = {line: own[line, 1] for line in (("gipo", KL), ("clip", 0)) if (line, 1) in own}
    cells |= complete("peers", lambda run: (run.method, None))
    times = {row["method"]: float(row["ratio"]) for row in rows("peer-times")}
    if not times:
        raise Missing("seconds per step are not known; run ./benchmark.sh peers-time first.")
    curves = {line: scale.curve(known) for line, known in cells.items()}
    panels = [
        Panel("by data", STEPS_AXIS, {line: (STEPS / 1000, curve) for line, curve in curves.items()}),
        Panel("by time", "time of a core, in runs of GIPO", {x: (times[x[0]], y) for x, y in curves.items()}, log=True),
    ]
    lines = {line: LABELS[line[0]] if line[1] is None else with_kl(line) for line in cells}
    styles = {line: (label, *NAMES[line[0]][1:]) for line, label in lines.items()}
    over_time(panels, styles, FIGURES / "peers.png", "return: " + SCALE)
    places = {"score": {line: scale(known) for line, known in cells.items()}}
    for line, known in cells.items():
        for env_id, returns in evidence.values(known, "final_return", evidence.zeros()).items():
            places.setdefault(short(env_id), {})[line] = {env_id: returns}
    texts = {(line, "time per step"): f"{times[line[0]]:.2g}" for line in cells}
    said = []
    for place, by in places.items():
        digits = 2 if place == "score" else 0
        texts |= {(line, place): text for line, text in intervals(by, digits).items()}
        for peer in ("sb3-ppo", "sb3-sac"):
            pair = by.get(("gipo", KL), {}), by.get((peer, None), {})
            said.append(verdict(*pair, f"{place}:", ("GIPO", LABELS[peer]), digits))
    return {"peers": cross(texts, lines), "peers-verdict": sentences(said)}


# ----------------------------------------------- The rest as it is measured ------------------------------------------
def variant(run: Run) -> str:
    """What distinguishes runs of one method and environment."""
    if run.value("--buffer-reuse"):
        return f"reuse {run.value('--buffer-reuse')}"
    lag = run.value("--policy-lag")
    return f"K = {run.value('--buffer-epochs')}" + (f", L = {lag}" if lag else "")


def raw_cells(experiment: str) -> dict[tuple[str, str, str], Rows]:
    """Rows by method, environment and variant."""
    return complete(experiment, lambda run: (run.method, run.value("--env-id"), variant(run)))


def short(env_id: str) -> str:
    return re.sub(r"^(ALE|MiniGrid|Meta-World)[/-]|(-N\d)?-v\d$", "", env_id)


def draw_raw(cells: dict[tuple[str, str, str], Rows], path: Path, ylabel: str, labels: dict[str, str] = LABELS):
    """Mean learning curves, a panel for each environment and a line for each method and variant."""
    variants, panels = list(dict.fromkeys(name for *_, name in cells)), {}
    for (method, env_id, name), known in cells.items():
        panel = panels.setdefault(env_id, Panel(short(env_id), "share of the training", {}))
        panel.lines[method, name] = 1, evidence.curves(known, evidence.zeros()).mean(0)
    styles = {
        (m, name): (f"{labels[m]}, {name}", NAMES[m][1], DASHES[variants.index(name) % len(DASHES)])
        for m, _, name in cells
    }
    over_time(list(panels.values()), styles, path, ylabel)


def by_place(cells: dict, column: str, pool: bool) -> dict[str, dict[str, Scores]]:
    """A column by place and method. A place is an environment and a variant.

    With `pool` it is a variant, and a sample has all environments in which every method has its runs.
    """
    random, found = evidence.zeros(column), defaultdict(lambda: defaultdict(dict))
    for (method, env_id, name), known in cells.items():
        place = name if pool else f"{short(env_id)}, {name}"
        found[place][method] |= evidence.values(known, column, random)
    for by in found.values():
        common = set.intersection(*map(set, by.values()))
        for method, sample in by.items():
            by[method] = {env_id: x for env_id, x in sample.items() if env_id in common}
    return {place: dict(by) for place, by in found.items() if all(by.values())}


def raw_texts(found: dict[str, dict[str, Scores]], column: str, digits: int) -> dict[tuple[str, str], str]:
    """The cells of a table by place and method, with random actions as another method."""
    random, texts = evidence.zeros(column), {}
    for place, by in found.items():
        texts |= {(place, method): text for method, text in intervals(by, digits).items()}
        envs = next(iter(by.values()))
        if envs.keys() <= random.keys():
            texts[place, "random"] = f"{scores.iqm(np.array([random[env_id] for env_id in envs])):.{digits}f}"
    return texts


def raw_table(texts: dict[tuple[str, str], str], labels: dict[str, str] = LABELS) -> str:
    """A table in Markdown: a line for each place and a column for each method."""
    columns = {m: label for m, label in labels.items() if any(m == method for _, method in texts)}
    return cross(texts, {place: place for place, _ in texts}, columns)


def raw_verdict(found: dict[str, dict[str, Scores]], digits: int, labels: dict[str, str] = LABELS) -> str:
    """GIPO against each method in each place."""
    return sentences(
        verdict(by.get("gipo", {}), by[method], f"{place}:", (labels["gipo"], labels[method]), digits)
        for place, by in found.items()
        for method in labels
        if method != "gipo" and method in by
    )


def raw(experiment: str, cells: dict, digits: int = 0, labels: dict[str, str] = LABELS) -> Texts:
    """Figure, table and verdict of returns without scaling, next to random actions."""
    draw_raw(cells, FIGURES / f"{experiment}.png", "return", labels)
    found = by_place(cells, "final_return", pool=False)
    table = raw_table(raw_texts(found, "final_return", digits), labels)
    return {experiment: table, f"{experiment}-verdict": raw_verdict(found, digits, labels)}


def successes(experiment: str, cells: dict) -> Texts:
    """Figure of returns; tables and verdict of the share of episodes with success, in all environments and in each."""
    draw_raw(cells, FIGURES / f"{experiment}.png", "return")
    joined, single = (by_place(cells, "final_success", pool) for pool in (True, False))
    return {
        experiment: raw_table(raw_texts(joined, "final_success", 2)),
        f"{experiment}-verdict": raw_verdict(joined | single, 2),
        f"{experiment}-details": raw_table(raw_texts(single, "final_success", 2)),
    }


def ant() -> Texts:
    cells = raw_cells("ant")
    texts, found = raw("ant", cells), by_place(cells, "final_return", pool=False)
    own, other = (found.get(f"Ant, K = {k}", {}).get(method, {}) for method, k in (("gipo", 8), ("clip", 1)))
    across = verdict(own, other, "Ant:", ("GIPO with K = 8", "PPO-clip with K = 1"), digits=0)
    texts["ant-verdict"] = "\n".join(filter(None, (texts["ant-verdict"], sentences([across]))))
    return texts | {"ant-details": details(cells, lambda key: f"{LABELS[key[0]]}, {key[2]}")}


def metaworld() -> Texts:
    """Success, and the score that the paper probably has: 0 is the worst return of all methods and 1 the best."""
    cells, scaled = raw_cells("metaworld"), {}
    texts = successes("metaworld", cells)
    known = raw_texts(by_place(cells, "final_success", pool=True), "final_success", 2)
    shown = {(f"{place}, success", method): text for (place, method), text in known.items()}
    for place, by in by_place(cells, "final_return", pool=True).items():
        envs = next(iter(by.values()))
        every = {env_id: np.concatenate([sample[env_id] for sample in by.values()]) for env_id in envs}
        low, high = ({env_id: pick(x) for env_id, x in every.items()} for pick in (min, max))
        name = f"{place}, score"
        scaled[name] = {method: scores.normalize(sample, low, high) for method, sample in by.items()}
        shown |= {(name, method): text for method, text in intervals(scaled[name]).items()}
    texts["metaworld-verdict"] = "\n".join(filter(None, (texts["metaworld-verdict"], raw_verdict(scaled, 2))))
    return texts | {"metaworld": raw_table(shown)}


def minigrid() -> Texts:
    return successes("minigrid", raw_cells("minigrid"))


def atari() -> Texts:
    return raw("atari", raw_cells("atari"), digits=1)


def rllib() -> Texts:
    labels = LABELS | {"clip": "APPO's clip"}
    texts = raw("rllib", raw_cells("rllib"), labels=labels)
    both = complete("rllib", lambda run: (run.method, variant(run)))
    return texts | {"rllib-details": details(both, lambda key: f"{labels[key[0]]}, {key[1]}")}


def llm() -> Texts:
    """Reward by the size K of the buffer and the policy lag L."""

    def key(run):
        return (run.method, kl_of(run)), (int(run.value("--buffer-epochs")), int(run.value("--policy-lag")))

    found = {
        name: evidence.values(known, "final_return", {"sorting": 0.0}) for name, known in complete("llm", key).items()
    }
    labels = LABELS | {"clip": "TRL's clip"}
    lines = {(m, kl): f"{labels[m]} {'with' if kl else 'without'} KL" for kl in (KL, 0) for m in TRL_LOSSES}
    styles = {(m, kl): (name, NAMES[m][1], "-" if kl else ":") for (m, kl), name in lines.items()}
    panels = [
        Panel("", "generations K in the replay buffer", {(x, k): y for (x, (k, lag)), y in found.items() if lag == 0}),
        Panel("", "policy lag L, generations", {(x, lag): y for (x, (k, lag)), y in found.items() if k == 1}),
    ]
    against(panels, styles, FIGURES / "llm.png", "reward at the end of training")

    old = {
        line: {str(cell): sample["sorting"] for (own, cell), sample in found.items() if own == line and cell != (1, 0)}
        for line in lines
    }
    where = {KL: "On old completions with KL", 0: "On old completions without KL"}
    said = [
        verdict(old["gipo", kl], old[m, kl], where[kl], ("GIPO", labels[m]), digits=3)
        for kl, m in itertools.product(where, TRL_LOSSES[1:])
    ]
    columns = {cell: "K = {}, L = {}".format(*cell) for cell in sorted({cell for _, cell in found})}
    return {"llm": cross(intervals(found, digits=3), lines, columns), "llm-verdict": sentences(said)}


# --------------------------------------------------- Tuning and costs ------------------------------------------------
def tune() -> Texts:
    known = group_scores("tune", tuning())
    lines, chosen = [], {}
    for line in LINES:
        method, kl = line
        best = tuned(method, kl)
        for i in range(len(GRID[method])):
            flags = candidate(method, i, kl)
            texts = [f"`{' '.join(words(flags))}`", f"{known[method, i, kl]:.2f}"]
            lines.append([with_kl(line), *texts, "chosen" if flags == best else ""])
            if flags == best:
                chosen[line] = f"`{' '.join(words(GRID[method][i]))}` ({texts[1]})"
    columns = {kl: "with KL" if kl else "without KL" for kl in (KL, 0)}
    return {
        "tune": cross(chosen, LABELS, columns),
        "tune-details": table(["", "flags", "score", ""], lines),
    }


def costs() -> Texts:
    """Estimates for many actors of RLlib, from the costs that were measured with one."""
    known = {row["quantity"]: float(row["value"]) for row in rows("costs")}
    measured = [f"{1000 * known[f'{name}_seconds']:.3g} ms" for name in ("play", "receive", "batch", "update")]
    measured.append(f"{known['message_bytes'] / 1024:.0f} KiB")
    head = ["an actor plays a message", "it is received", "a batch is prepared", "gradient step", "size of a message"]
    lines = []
    for actors in (1, 2, 10, 100):
        steps, saturated = evidence.speed(actors, known)
        age = "" if saturated else f"{evidence.age(actors, int(known['reuse']), known):.3g}"
        lines.append([str(actors), f"{steps:,.0f}", "the learner" if saturated else "the actors", age])
    estimate = table(["actors", "steps/s", "limited by", "age"], lines)
    return {"costs": table(head, [measured]), "costs-estimate": estimate}


SECTIONS = (tune, staleness, ablation, width, freeze, lag, ant, metaworld, peers, minigrid, atari, rllib, llm, costs)


def main() -> int:
    """Make figure, table and verdict of each experiment that has rows. Returns 2 if one needs missing results."""
    matplotlib.use("Agg")
    code = 0
    for section in SECTIONS:
        try:
            if rows(section.__name__):
                for name, text in section().items():
                    fill(name, text)
        except Missing as error:
            print(f"error: {section.__name__}: {error}", file=sys.stderr)
            code = 2
    return code


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
