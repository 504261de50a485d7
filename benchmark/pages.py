"""Figures and tables, made only from benchmark/rows/*.csv; the same files give the same bytes.

./benchmark.sh report        # rewrites docs/figures and the texts between the markers of the pages

What belongs to an experiment without rows stays as it is. Intervals are 95 %, and n is the number of runs of a cell in
each task. A difference is bold if it shows: `intervals.clearly_better`.
"""

import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import tyro

from benchmark import llm_tuning, measurements, runner, tuning
from benchmark.drawing import against, forest, over_time, runs_per_task
from benchmark.experiments import (
    EXPERIMENTS,
    FIVE,
    FREEZE_AT,
    LARGE,
    STEPS,
    best_other,
    chosen,
    crossed,
    evaluated_clip,
    fresh_clip,
    sizes,
)
from benchmark.intervals import clearly_better, difference, iqm_interval, paired_difference
from benchmark.measurements import measure, random_actions, scale, scored, whole
from benchmark.methods import name
from benchmark.runner import DIAGNOSTICS, ROOT, Missing

FIGURES = ROOT / "docs" / "figures"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# what an experiment decides for others
CHOICES = {
    "tune": "the settings of all methods, the defaults of continuous control",
    "staleness": "the best K and the best other method, for updates and million",
    "rllib-tune": "the learning rates of rllib",
    "llm-tune": "the settings of llm and llm-rates",
}
SCORE = "score: 0 random, 1 mean of PPO-clip, fresh data"
HELD_OUT = "reward on held-out prompts"
GIPO, CLIP = name("gipo"), name("clip")
ONE_SETTING = [name(method) for method in tuning.METHODS]
Texts = dict[str, str]  # by marker


# ----------------------------------------------------- Words, tables -------------------------------------------------
def number(found: tuple[float, float, float], digits: int = 2) -> str:
    """A statistic with its interval, if there is one."""
    pattern = "{:z.{d}f}" if np.isnan(found).any() else "{:z.{d}f} ({:z.{d}f} to {:z.{d}f})"
    return pattern.format(*found, d=digits)


def values(table: pd.DataFrame) -> pd.Series:
    return table.set_index("env_id").value


def markdown(cells: pd.DataFrame) -> str:
    """A table in Markdown whose numbers are already texts. A missing cell is empty."""
    return cells.fillna("").to_markdown(disable_numparse=True)


def in_cells(table: pd.DataFrame, text: Callable[[pd.DataFrame], str]) -> pd.DataFrame:
    """text(rows) of each line and `x`, with n at the end."""
    found = {(line, x): text(own) for (line, x), own in table.groupby(["line", "x"], sort=False)}
    cells = pd.Series(found).unstack()[list(dict.fromkeys(table.x))].reindex(dict.fromkeys(table.line))
    cells.index.name = None
    return cells.assign(n=[runs_per_task(table[table.line == line]) for line in cells.index])


def score_table(table: pd.DataFrame, digits: int = 2) -> str:
    """Interquartile means with their intervals by line and `x`."""
    return markdown(in_cells(table, lambda own: number(iqm_interval(values(own)), digits)))


def bold_difference(ours: pd.DataFrame, theirs: pd.DataFrame, digits: int = 2) -> str:
    """Ours minus theirs, bold if it shows; empty if their tasks differ."""
    if ours.empty or set(ours.env_id) != set(theirs.env_id):
        return ""
    pair = values(ours), values(theirs)
    text = number(difference(*pair), digits)
    return f"**{text}**" if clearly_better(*pair) or clearly_better(*pair[::-1]) else text


def difference_cells(table: pd.DataFrame, line: str = GIPO, digits: int = 2) -> pd.DataFrame:
    """This line minus each other line, by `x`; empty without this line or another one."""
    ours = table[table.line == line]
    if ours.empty or table.line.nunique() == 1:
        return pd.DataFrame()
    others = table[table.line != line].assign(line=f"{line} minus " + table.line)
    return in_cells(others, lambda own: bold_difference(ours[ours.x == own.x.iloc[0]], own, digits))


def difference_table(table: pd.DataFrame, line: str = GIPO, digits: int = 2) -> str:
    """`difference_cells` in Markdown."""
    cells = difference_cells(table, line, digits)
    return "" if cells.empty else markdown(cells)


def detail_table(table: pd.DataFrame) -> str:
    """Mean returns by task, means of the diagnostics at the end, and the number of runs that diverged."""
    cells = table.groupby(["line", "x"], sort=False)
    returns = table.pivot_table("value", ["line", "x"], "env_id", sort=False)
    means = cells[[one for one in DIAGNOSTICS if table[one].notna().any()]].mean()
    texts = returns.map("{:.4g}".format).join(means.map("{:.2g}".format)).replace("nan", "")
    texts["diverged"] = cells.diverged.sum().map("{:.0f}".format)
    texts.index = [f"{line}, {x}" for line, x in texts.index]
    return markdown(texts.rename(columns=short))


def verdict(ours: pd.DataFrame, theirs: pd.DataFrame, where: str, digits: int = 2) -> str:
    """A sentence that compares two lines; empty if their tasks differ."""
    if ours.empty or set(ours.env_id) != set(theirs.env_id):
        return ""
    if difference(values(ours), values(theirs))[0] < 0:
        ours, theirs = theirs, ours
    pair = values(ours), values(theirs)
    _, low, high = difference(*pair)
    own, other = (f"{iqm_interval(one)[0]:z.{digits}f}" for one in pair)
    shown = f"({own} against {other}, difference {low:z.{digits}f} to {high:z.{digits}f}, n = {runs_per_task(ours)})"
    names = ours.line.iloc[0], theirs.line.iloc[0]
    if clearly_better(*pair):
        return f"{where}: {names[0]} beats {names[1]} {shown}."
    return f"{where}: no difference shows between {names[0]} and {names[1]} {shown}."


def short(env_id: str) -> str:
    return re.sub(r"^(ALE|MiniGrid|Meta-World)[/-]|(-N\d)?-v\d$", "", env_id)


def fill(marker: str, text: str) -> bool:
    """Put a text between the markers of that name on each page that has them; false if no page has."""
    between, filled = rf"(<!-- {marker} -->\n).*?(<!-- end of {marker} -->)", 0
    for page in PAGES:
        old = page.read_text()
        new, count = re.subn(between, lambda match: match[1] + text + "\n" + match[2], old, flags=re.DOTALL)
        if new != old:
            page.write_text(new)
        filled += count
    return filled > 0


# ----------------------------------------------- Experiments with one scale ------------------------------------------
def on_one_scale(experiment: str, dial: str, column: str = "final_return") -> tuple[pd.DataFrame, pd.DataFrame]:
    """The complete cells of an experiment, as scores and as returns; `x` is the value of a flag."""
    table = measure(EXPERIMENTS[experiment](), column)
    table["x"] = table[dial].fillna(0).astype(int)
    returns = whole(table, ["line", "x"], experiment)
    if column == "final_return":
        unit = scale(fresh_clip(), "staleness")
    else:
        unit = scale(evaluated_clip(), "lag", column)
    return scored(returns, unit), returns


def all_and_each(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Panels: all tasks together, and each task."""
    return {"all tasks": table} | {short(env_id): own for env_id, own in table.groupby("env_id", sort=False)}


def by_place(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of these panels, one after another; `x` heads them."""
    return pd.concat([own.assign(x=place) for place, own in all_and_each(table).items()], ignore_index=True)


def headed(table: pd.DataFrame, pattern: str) -> pd.DataFrame:
    """The same with a text for each `x`, which heads its column."""
    return table.assign(x=table.x.map(pattern.format))


def dial_texts(experiment: str, table: pd.DataFrame, returns: pd.DataFrame, xlabel: str, pattern: str) -> Texts:
    """Figure and tables of scores against the values of a flag."""
    against(all_and_each(table), FIGURES / f"{experiment}.png", xlabel, SCORE)
    return tables(experiment, headed(table, pattern), headed(returns, pattern))


def tables(experiment: str, table: pd.DataFrame, returns: pd.DataFrame) -> Texts:
    """Scores, differences, and returns with the measures of the log."""
    texts = {experiment: score_table(table), f"{experiment}-differences": difference_table(table)}
    return texts | {f"{experiment}-details": detail_table(returns)}


def staleness() -> Texts:
    """The methods with one setting for all K; and with one for each K, where that is another one."""
    table, returns = on_one_scale("staleness", "buffer_epochs")
    again = ~table.line.isin(ONE_SETTING) & table.duplicated(["method", "command"])
    table, returns = table[~again], returns[~again]
    one = table[table.line.isin(ONE_SETTING)]
    texts = dial_texts("staleness", one, returns, "rollouts K in the replay buffer", "K = {}")
    same_seeds = one[(one.line == GIPO) & one.seed.isin(FIVE) & one.x.isin(tuning.SIZES)]
    best = headed(pd.concat([same_seeds, table[~table.line.isin(ONE_SETTING)]]), "K = {}")
    texts |= {"staleness-best": score_table(best), "staleness-best-differences": difference_table(best)}
    return texts | headline(one, returns)


def headline(table: pd.DataFrame, returns: pd.DataFrame) -> Texts:
    """GIPO next to PPO-clip and to the best other method on old data: scores, differences, and returns of each task.

    The figure has GIPO, PPO-clip and plain IS.
    """
    rivals = [CLIP, name(best_other(table))]
    simple = table[table.line.isin([GIPO, CLIP, name("plain_is")])]
    against(all_and_each(simple), FIGURES / "headline.png", "rollouts K in the replay buffer", SCORE)
    cells = {}
    for line, k in itertools.product(rivals, LARGE):
        found = cells[f"GIPO minus {line}, K = {k}"] = {}
        for task, part in all_and_each(table[table.x == k]).items():
            found[task] = bold_difference(part[part.line == GIPO], part[part.line == line])
    n = runs_per_task(table[table.line == GIPO])
    texts = {"headline": markdown(pd.DataFrame(cells).T.assign(n=n))}
    shown = [GIPO, *rivals]
    texts["headline-scores"] = score_table(headed(table[table.line.isin(shown)], "K = {}"))
    each = returns[returns.line.isin(shown)]
    each = each.assign(line=each.line + ", K = " + each.x.astype(str), x=each.env_id.map(short))
    unit = scale(fresh_clip(), "staleness").iterrows()
    ends = ", ".join(f"{own.zero:.0f} and {own.one:,.0f} in {short(env_id)}" for env_id, own in unit)
    return texts | {"headline-returns": return_table(each), "headline-scale": f"The returns of 0 and 1 are {ends}."}


def return_table(table: pd.DataFrame, column: str = "final_return", digits: int = 0) -> str:
    """Interquartile means of a column with their intervals by line and `x`, which tells tasks apart; random actions."""
    cells = in_cells(table, lambda own: number(iqm_interval(values(own)), digits))
    tasks = table.groupby("x").env_id.first()
    cells.loc["random actions"] = tasks.map(random_actions(column)).dropna().map(f"{{:.{digits}f}}".format)
    return markdown(cells)


def updates() -> Texts:
    """The figure has a panel for each method. A buffer is compared with fresh data, and GIPO with the others."""
    table, returns = (one.assign(x=one.x.replace(0, 10)) for one in on_one_scale("updates", "update_epochs"))
    table, returns = (one.sort_values(["x", "line", "buffer_epochs"], kind="stable") for one in (table, returns))
    by_method = {line: own for line, own in table.groupby("line")}
    texts = {"updates-tasks": buffer_minus_fresh(all_and_each(by_method[GIPO]))}
    texts["updates-differences"] = buffer_minus_fresh(by_method)
    table, returns = (one.assign(line=one.line + ", K = " + one.buffer_epochs.astype(str)) for one in (table, returns))
    panels = {name(method): own for method, own in table.groupby("method", sort=False)}
    against(panels, FIGURES / "updates.png", "update epochs per iteration", SCORE)
    table, returns = (headed(one, "{} epochs") for one in (table, returns))
    by_size = [difference_cells(own, f"{GIPO}, K = {k}") for k, own in table.groupby("buffer_epochs")]
    texts["updates-methods"] = markdown(pd.concat(by_size))
    return tables("updates", table, returns) | texts


def buffer_minus_fresh(columns: dict[str, pd.DataFrame]) -> str:
    """Each K above 1 minus K = 1 in each of these tables; with as many update epochs, and with the fewest."""
    known = pd.concat(columns.values())
    ticks, cells = sorted(set(known.x)), {}
    for k, x in itertools.product(LARGE[1:], ticks):
        for fresh_x in sorted({ticks[0], x}):
            found = cells[f"K = {k}, {x} epochs minus K = 1, {fresh_x} epochs"] = {}
            for column, own in columns.items():
                ours = own[(own.buffer_epochs == k) & (own.x == x)]
                fresh = own[(own.buffer_epochs == 1) & (own.x == fresh_x)]
                found[column] = bold_difference(ours, fresh)
    first = next(iter(columns.values()))
    return markdown(pd.DataFrame(cells).T.assign(n=runs_per_task(first[first.buffer_epochs == 1])))


def ablation() -> Texts:
    table, returns = on_one_scale("ablation", "buffer_epochs")
    forest({f"K = {k}": own for k, own in table.groupby("x")}, FIGURES / "ablation.png", SCORE)
    return tables("ablation", headed(table, "K = {}"), headed(returns, "K = {}"))


def lag() -> Texts:
    """The third table has what each method loses by a lag."""
    table, returns = on_one_scale("lag", "policy_lag", "eval_return")
    texts, cells = dial_texts("lag", table, returns, "policy lag L, iterations", "L = {}"), {}
    for line, x in itertools.product(table.line.unique(), sorted(set(table.x) - {0})):
        found = cells[f"{line}, L = {x} minus L = 0"] = {}
        for task, own in all_and_each(table[table.line == line]).items():
            found[task] = bold_difference(own[own.x == x], own[own.x == 0])
    n = runs_per_task(table[table.line == GIPO])
    return texts | {"lag-losses": markdown(pd.DataFrame(cells).T.assign(n=n))}


def freeze() -> Texts:
    table, returns = on_one_scale("freeze", "buffer_epochs", "eval_return")
    panels = {short(env_id): own.assign(end=STEPS / 1000) for env_id, own in table.groupby("env_id", sort=False)}
    over_time(panels, FIGURES / "freeze.png", "thousand steps", SCORE, sharey=True, mark=FREEZE_AT / 1000)
    return tables("freeze", by_place(table), headed(returns, "K = {}"))


def peers() -> Texts:
    """The choices at K = 1 next to Stable-Baselines3, by data and by time."""
    own = crossed(chosen(("gipo", "clip")), FIVE, tuning.TASKS, sizes(1))
    table = scored(whole(measure([*own, *EXPERIMENTS["peers"]()]), ["line"], "peers"), scale(fresh_clip(), "staleness"))
    path = runner.ROWS / "peer-times.csv"
    if not path.exists():
        raise Missing("the times of a step are not known; run ./benchmark.sh peers-time first.")
    times = pd.read_csv(path, index_col="method").ratio
    by_time = table.assign(end=table.method.map(times))
    panels = {"by data, in runs": table.assign(end=1.0), "by time of a core, in runs of GIPO": by_time}
    over_time(panels, FIGURES / "peers.png", "", SCORE, sharey=True)
    cells = by_place(table)
    return {"peers": score_table(cells), "peers-differences": difference_table(cells)}


# ------------------------------------------------- Experiments by task -----------------------------------------------
def of_each_task(experiment: str, column: str = "final_return", dial: dict[str, str] | None = None) -> pd.DataFrame:
    """The runs that have a row; `x` is the task, with the value of a flag behind it if `dial` names the flag."""
    table = measure(EXPERIMENTS[experiment](), column).dropna(subset="value")
    if table.empty:
        raise Missing("no run has a row yet.")
    measurements.name_different_code(table, experiment)
    x = table.env_id.map(short)
    for flag, label in (dial or {}).items():
        x += f", {label} " + table[flag].astype(int).astype(str)
    return table.assign(x=x, end=1.0)


def draw_each_task(table: pd.DataFrame, path: Path):
    panels = {x: own for x, own in table.groupby("x", sort=False)}
    over_time(panels, path, "share of the training", "return")


def by_task(experiment: str, column: str = "final_return", digits: int = 0, dial: dict | None = None) -> Texts:
    """Figure of returns, and tables of a column next to random actions."""
    table = of_each_task(experiment, column, dial)
    draw_each_task(table, FIGURES / f"{experiment}.png")
    gipo = table.line[table.method == "gipo"]
    differences = difference_table(table, gipo.iloc[0], digits) if len(gipo) else ""
    return {experiment: return_table(table, column, digits), f"{experiment}-differences": differences}


def million() -> Texts:
    return by_task("million")


def metaworld() -> Texts:
    return by_task("metaworld", "final_success", 2)


def minigrid() -> Texts:
    return by_task("minigrid", digits=2, dial={"buffer_epochs": "K ="})


def pong() -> Texts:
    return by_task("pong", digits=1)


def rllib() -> Texts:
    return by_task("rllib", dial={"buffer_reuse": "reuse"})


def sorting(experiment: str, dial: str) -> pd.DataFrame:
    """Rewards on held-out prompts of an experiment with language models; `x` is the value of a flag."""
    table = measure(EXPERIMENTS[experiment](), "eval_return").assign(env_id="sorting")
    table["x"] = table[dial]
    return whole(table, ["line", "x"], experiment)


def llm() -> Texts:
    """By the steps that completions wait; their true age stands beside."""
    table = sorting("llm", "staleness")
    against({"sorting 6 to 9 digits": table}, FIGURES / "llm.png", "steps that completions wait", HELD_OUT)
    names = {"abs_logratio_p95": "p95", "ess": "ESS"}
    age = table.pivot_table(list(names), "line", "x", sort=False)[list(names)].rename_axis(None)
    age.columns = [f"{names[column]}, {x}" for column, x in age.columns]
    texts = {"llm": score_table(table, 3), "llm-differences": differences_by_seed(table)}
    return texts | {"llm-details": markdown(age.map("{:.3g}".format))}


def differences_by_seed(table: pd.DataFrame) -> str:
    """GIPO minus each other line, bold if the interval leaves 0 out; runs of one seed start with the same model."""
    values = table.pivot_table("value", ["x", "seed"], "line", sort=False)
    if GIPO not in values:
        return ""

    def text(x: int, line: str) -> str:
        if values.loc[x, [GIPO, line]].isna().any(axis=None):
            return ""
        found = paired_difference(values.loc[x, GIPO], values.loc[x, line])
        return f"**{number(found, 3)}**" if found[1] * found[2] > 0 else number(found, 3)

    ticks, others = sorted(set(table.x)), [line for line in values if line != GIPO]
    return markdown(pd.DataFrame({x: {f"GIPO minus {line}": text(x, line) for line in others} for x in ticks}))


def llm_rates() -> Texts:
    """By the learning rate, and the tried rates at which a model is no worse than before the training."""
    table = sorting("llm-rates", "learning_rate")
    panel = {f"completions wait {llm_tuning.STALENESS} steps": table}
    against(panel, FIGURES / "llm-rates.png", "learning rate", HELD_OUT)
    means = table.groupby(["line", "x"], sort=False)[["value", "eval_start"]].mean().reset_index()
    kept = means[means.value >= means.eval_start].sort_values("x").groupby("line").x
    rates = kept.apply(lambda own: ", ".join(map("{:g}".format, own))).reindex(table.line.unique(), fill_value="none")
    return {"llm-rates": markdown(rates.rename_axis(None).to_frame("rates"))}


# -------------------------------------------------------- Tuning -----------------------------------------------------
def shorter(flags: str) -> str:
    """Without the learning rate of the grid."""
    return flags.removeprefix(f"--learning-rate {tuning.RATES[1]:g} ")


def agreement() -> str:
    """A sentence on how much of a setting's mean rank another seed, or another round, confirms."""
    known = tuning.before_the_last()
    by_seed = known.pivot_table("value", ["method", "line"], "seed")
    first, second = by_seed.columns
    within = by_seed - by_seed.groupby("method").transform("mean")
    early = tuning.ranks(tuning.round_one()).groupby(["method", "line"]).value.mean()
    seeds = by_seed[first].corr(by_seed[second], "spearman"), within[first].corr(within[second], "spearman")
    rounds = early.corr(by_seed.mean(axis=1), "spearman")
    error = tuning.results().groupby(["method", "line"]).value.sem().mean()
    return (
        f"The mean ranks of the {len(by_seed)} settings on seed {first} and on seed {second} have a rank correlation "
        f"(Spearman) of {seeds[0]:.2f}, or {seeds[1]:.2f} around the mean of each method. Those of round one have "
        f"{rounds:.2f} with those of rounds two and three. The standard error of a finalist's mean rank is {error:.2f}."
    )


def tune() -> Texts:
    """The choice of each method for both K and for each, with its mean rank; and all settings of the last rounds.

    *lead* is how far the choice for both K is ahead of the method's next best setting.
    """
    table = tuning.results().assign(x=lambda own: "K = " + own.buffer_epochs.astype(str))
    measurements.name_different_code(table, "tune")
    cells, details = {}, []
    for method in tuning.METHODS:
        own = table[table.method == method]
        for k in (None, *tuning.SIZES):
            known = own[own.buffer_epochs == k] if k else own
            flags = tuning.choice(method, k)
            rank = tuning.ranking(known)[tuning.words(flags)]
            edge = ", at an edge" if tuning.at_an_edge(method, flags) else ""
            text = f"`{shorter(tuning.words(flags))}` ({rank:.2f}{edge})"
            cells.setdefault(f"K = {k}" if k else "K = 1 and 8", {})[name(method)] = text
        best, following = tuning.ranking(own).iloc[:2]
        cells.setdefault("lead", {})[name(method)] = f"{best - following:.2f}"
        known = own.pivot_table("value", "line", "x").assign(both=own.groupby("line").value.mean())
        known.index = name(method) + " `" + known.index.map(shorter) + "`"
        details.append(known.sort_values("both", ascending=False).rename_axis(None))
    texts = {"tune": markdown(pd.DataFrame(cells)), "tune-agreement": agreement()}
    return texts | {"tune-details": markdown(pd.concat(details).map("{:.2f}".format))}


def provenance() -> Texts:
    """Which tasks and seeds each experiment has, how many of its runs have a row, and what it chooses."""
    lines = {}
    for experiment, plan in EXPERIMENTS.items():
        try:
            table = measure(plan()).drop_duplicates("command")
        except Missing:
            continue
        seeds = sorted(table.seed.dropna().astype(int).unique()) if "seed" in table else []
        tasks = ", ".join(map(short, table.env_id.unique())) if "env_id" in table else ""
        rows = f"{table.revision.notna().sum()} of {len(table)}"
        lines[experiment] = {"tasks": tasks, "seeds": " ".join(map(str, seeds))}
        lines[experiment] |= {"runs with a row": rows, "chooses": CHOICES.get(experiment, "")}
    return {"provenance": markdown(pd.DataFrame(lines).T)}


SECTIONS = (tune, staleness, updates, million, ablation, lag, freeze, metaworld, minigrid, pong, peers, rllib)
SECTIONS += (llm, llm_rates)


def main() -> int:
    """Make what has rows. Returns 2 if rows are missing that a section needs, or if no page has a marker."""
    matplotlib.use("Agg")
    code, texts = 0, {}
    for section in SECTIONS:
        experiment = section.__name__.replace("_", "-")
        try:
            if (runner.ROWS / f"{experiment}.csv").exists():
                texts |= section()
        except Missing as error:
            print(f"error: {experiment}: {error}", file=sys.stderr)
            code = 2
    texts |= provenance() if texts else {}
    lost = [marker for marker, text in texts.items() if not fill(marker, text) and text]
    if lost:
        print(f"error: no page has the markers of {', '.join(lost)}; see `fill`.", file=sys.stderr)
    return 2 if lost else code


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
