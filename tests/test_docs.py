"""The documentation says what the files say: links, quoted lines, the three-line change."""

import re
import subprocess
import sys

import pytest
from harness import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
QUOTED = re.compile(r"\[`([^`]+)`\]\(\.\./([\w./]+)#L(\d+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert links and all((page.parent / link).exists() for link in links), links


def test_quoted_lines_stand_where_the_links_say():
    quotes = [quote for page in PAGES for quote in QUOTED.findall(page.read_text())]
    assert len(quotes) > 20
    for text, file, number in quotes:
        lines = (ROOT / file).read_text().splitlines()
        known = [i for i, line in enumerate(lines, start=1) if text in line]
        assert int(number) in known, f"{text} is in {file} at {known}, not at {number}"


def test_logged_metrics_are_those_that_the_scripts_log():
    tags = r'"((?:charts|losses|offpolicy)/\w+)"'
    logged = set(re.findall(tags, (ROOT / "gipo_continuous.py").read_text()))
    named = set(re.findall(r"`((?:charts|losses|offpolicy)/\w+)`", (ROOT / "docs" / "gipo.md").read_text()))
    assert len(logged) > 10 and logged <= named


def last_length(code: str) -> float:
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return float(output.rsplit(maxsplit=1)[-1])


def test_the_three_line_change_turns_a_plain_ppo_into_gipo():
    diff = re.search(r"```diff\n(.*?)```", (ROOT / "docs" / "gipo.md").read_text(), re.DOTALL)[1].splitlines()
    code = (ROOT / "tests" / "plain_ppo.py").read_text()
    indent = " " * 12
    before = "\n".join(indent + line[1:] for line in diff if line[0] in " -")
    after = "\n".join(indent + line[1:] for line in diff if line[0] in " +")
    assert code.count(before) == 1 and len([line for line in diff if line[0] == "+"]) == 3
    assert last_length(code) > 300
    assert last_length(code.replace(before, after)) > 300
