"""What keeps four files honest that share their text: equal where they must be, different only in the loss."""

import ast
import io
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
from functools import cache

import pytest
from harness import DOMAIN_OF, ENTRIES, GIPO, MAIN, ROOT, SCRIPTS, load, source
from packaging.requirements import Requirement
from packaging.version import Version

# definitions that may differ between a GIPO script and the baseline
LOSS = {"Args", "policy_loss", "DOMAINS", "parse_args"}
GIPO_FIELDS = ["sigma", "sigma_neg"]
BASELINE_FIELDS = ["surrogate", "clip_coef", "dual_clip", "sapo_tau", "sapo_tau_neg", "tis_cap", "spo_eps"]
# distribution by the name it is imported under, where the two differ; packaging is one that metaworld forgot to declare
DISTRIBUTIONS = {"ale_py": "ale-py"}
UNIMPORTED = {"mujoco", "packaging"}


@cache
def definitions(name: str) -> dict[str, str]:
    """Text of every top-level definition and constant by name, comments inside included."""
    text = source(name)
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = ast.get_source_segment(text, node)
        elif isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = ast.get_source_segment(text, node)
    return found


def sections(name: str) -> dict[str, str]:
    """Text between the banner lines (`# --- Title ---`) of a script, by title; the part below main left out."""
    parts = re.split(r"^# -+ (.+?) -+$", source(name).split(MAIN)[0], flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def imports(name: str) -> list[str]:
    """Modules that a script imports, inside functions too."""
    nodes = list(ast.walk(ast.parse(source(name))))
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return plain + [node.module for node in nodes if isinstance(node, ast.ImportFrom)]


def script_metadata(name: str) -> dict:
    """The PEP 723 block of a script."""
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", source(name), re.MULTILINE)[1]
    return tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))


def lines_of_code(name: str) -> int:
    """Lines that hold anything but blanks, comments and docstrings (those of fields included)."""
    text = source(name)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.string.strip() and token.type != tokenize.COMMENT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def test_bodies_are_identical():
    bodies = [source(name).split(MAIN) for name in SCRIPTS]
    assert all(len(parts) == 2 for parts in bodies)
    assert len({body for _, body in bodies}) == 1


@pytest.mark.parametrize("name", GIPO)
def test_definitions_that_the_baseline_shares_are_identical(name):
    own, baseline = definitions(name), definitions("ppo_baseline")
    assert set(own) <= set(baseline)
    assert {key for key in own if own[key] != baseline[key]} == LOSS


@pytest.mark.parametrize("key", ["policy_loss", "diagnostics", "BadInput", "require"])
def test_the_distributed_script_has_the_same_loss(key):
    assert definitions("gipo_rllib")[key] == definitions("gipo_continuous")[key]


@pytest.mark.parametrize("name", GIPO)
def test_sections_differ_in_the_loss_alone(name):
    own, baseline = sections(name), sections("ppo_baseline")
    assert list(own) == [title for title in baseline if title in own]
    assert len(own) == 5
    for title, text in own.items():
        other = baseline[title]
        for key in LOSS:
            text = text.replace(definitions(name)[key], "")
            other = other.replace(definitions("ppo_baseline")[key], "")
        assert text == other, title


@pytest.mark.parametrize("name", GIPO)
def test_args_differ_in_what_the_loss_reads_alone(name):
    """Without the fields of the loss, their help and their checks, nothing in which Args differ is left."""
    rest = []
    for script, fields in ((name, GIPO_FIELDS), ("ppo_baseline", BASELINE_FIELDS)):
        text = definitions(script)["Args"]
        for field in fields:
            text, count = re.subn(rf'^    {field}: .*\n    """.*"""\n', "", text, flags=re.MULTILINE)
            assert count == 1, field
        rest.append([line for line in text.splitlines() if not any(f"self.{field}" in line for field in fields)])
    assert rest[0] == rest[1]


@pytest.mark.parametrize("name", GIPO)
def test_defaults_equal_the_baseline_s(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name])
    own = vars(load(name).parse_args())
    monkeypatch.setattr(sys, "argv", ["ppo_baseline", DOMAIN_OF[name]])
    baseline = vars(load("ppo_baseline").parse_args())
    differ = {key for key in own.keys() & baseline.keys() if own[key] != baseline[key]}
    assert differ <= {"exp_name"}


def test_length():
    for name in GIPO:
        assert lines_of_code(name) <= 540, name
        assert max(map(len, source(name).splitlines())) <= 120, name


def test_the_diff_fits_on_a_slide():
    files = [ROOT / "ppo_baseline.py", ROOT / "gipo_atari.py"]
    diff = subprocess.run(["diff", *files], capture_output=True, text=True).stdout
    added = [line for line in diff.splitlines() if line.startswith(">")]
    assert 0 < len(added) <= 60


def test_no_script_imports_ours():
    ours = {path.stem for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]}
    for name in SCRIPTS:
        assert not {module.split(".")[0] for module in imports(name)} & ours


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_metadata_agrees_with_the_requirements_and_the_imports(name):
    scripts, _ = (ROOT / "requirements.txt").read_text().split("# the tests and the analysis\n")
    pins = {r.name: r for r in map(Requirement, scripts.split("\n")[1:-2])}
    metadata = script_metadata(name)
    assert metadata["requires-python"] == ">=3.11"
    requirements = {r.name: r for r in map(Requirement, metadata["dependencies"])}
    for key, requirement in requirements.items():
        (pin,) = pins[key].specifier
        assert pin.operator == "=="
        assert Version(pin.version) in requirement.specifier
    if name == "ppo_baseline":
        assert requirements.keys() == pins.keys()
    imported = {module.split(".")[0] for module in imports(name)} - set(sys.stdlib_module_names)
    needed = {DISTRIBUTIONS.get(module, module) for module in imported} | {"tensorboard"}  # through torch.utils
    assert needed == requirements.keys() - UNIMPORTED


@pytest.mark.parametrize(("name", "domain"), ENTRIES)
def test_runs_copied_alone_into_an_empty_folder(name, domain, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    small = "--num-envs 2 --num-steps 8 --num-minibatches 2 --update-epochs 1 --total-timesteps 32".split()
    small += ["--eval-episodes", "0"]
    command = [sys.executable, f"{name}.py", *domain, *small]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_the_readme_shows_the_diff_as_it_is():
    (block,) = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for line in block.splitlines():
        files = {"-": ["ppo_baseline"], "+": ["gipo_atari"], " ": ["ppo_baseline", "gipo_atari"]}[line[0]]
        for name in files:
            assert line[1:] in source(name).splitlines(), line
