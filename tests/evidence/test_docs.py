"""The documentation says what the files say: links, names of functions, the diff, the three-line change."""

import ast
import dataclasses
import json
import re
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import gymnasium as gym
import pytest
import torch
from harness import ROOT, TAGS
from matplotlib import pyplot

import gipo_continuous
from benchmark import variants

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:|../../actions/)([^)#]+)", page.read_text())  # GitHub has the actions
    assert all((page.parent / link).exists() for link in links), links


def test_anchors_of_links_are_headings():
    for page in PAGES:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text()):
            headings = re.findall(r"^#+ (.*)", (page.parent / target if target else page).read_text(), re.MULTILINE)
            known = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
            assert anchor in known, f"{page.name}: {target}#{anchor}"


def test_functions_that_the_details_name_are_in_the_script():
    text = (ROOT / "docs" / "gipo.md").read_text()
    details = text[text.index("## Implementation details") : text.index("## The loss in your own PPO")]
    named = set(re.findall(r"\(`([\w.]+)`\)", details))
    tree = ast.parse((ROOT / "gipo_continuous.py").read_text())
    known = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert named and {part for name in named for part in name.split(".")} <= known


def test_the_hunk_of_the_loss_is_what_diff_prints():
    shown = re.search(r"```diff\n(@@.*?)```", README.read_text(), re.DOTALL)[1]
    command = ["diff", "-U0", ROOT / "ppo_baseline.py", ROOT / "gipo_atari.py"]
    assert "torch.min" in shown and shown in subprocess.run(command, capture_output=True, text=True).stdout


def test_logged_metrics_are_those_that_the_scripts_log():
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", (ROOT / "docs" / "gipo.md").read_text(), re.MULTILINE)
    shared = [tags for tags, meaning in rows if "`gipo_rllib.py` only" not in meaning]
    named = set(re.findall(r"`(\w+/\w+)`", " ".join(shared)))
    assert named == TAGS | {"charts/success_rate"}


def last_length(code: str) -> float:
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return float(output.rsplit(maxsplit=1)[-1])


def three_lines() -> list[str]:
    return re.search(r"## Three lines.*?```python\n(.*?)```", README.read_text(), re.DOTALL)[1].splitlines()


def test_the_three_lines_are_the_loss_of_continuous_control_on_fresh_data():
    args = gipo_continuous.Continuous()
    assert (args.ratio, args.kl_to) == ("action", "current")
    torch.manual_seed(1)
    logratio, advantages = torch.randn(64, requires_grad=True), torch.randn(64)
    space = {"torch": torch, "logratio": logratio, "mb_advantages": advantages}
    exec("\n".join(three_lines()), space)
    own_loss = gipo_continuous.policy_loss(logratio.unsqueeze(1), advantages.unsqueeze(1), args)
    own_loss = own_loss + args.kl_coef * (0.5 * logratio**2).mean()
    found, own = (torch.autograd.grad(loss, logratio)[0] for loss in (space["pg_loss"], own_loss))
    torch.testing.assert_close(found, own)


@pytest.mark.slow
def test_the_three_line_change_turns_a_plain_ppo_into_gipo():
    lines = three_lines()
    code = (ROOT / "tests" / "plain_ppo.py").read_text()
    own = re.search(r"# Policy loss\n(.*?)\n *# Value loss", code, re.DOTALL)[1]
    assert len(lines) == 3 and "clipped" in own
    assert last_length(code) > 300
    assert last_length(code.replace(own, "\n".join(" " * 12 + line for line in lines) + "\n")) > 300


def test_a_trained_agent_acts_as_the_readme_says(monkeypatch, tmp_path):
    code = re.search(r"```python\n(import torch\nfrom gipo_continuous import .*?)```", README.read_text(), re.DOTALL)[1]
    args = gipo_continuous.Continuous("HalfCheetah-v5", 2048, num_envs=2, num_steps=16, eval_episodes=0)
    monkeypatch.chdir(tmp_path)
    _, folder = gipo_continuous.train(dataclasses.replace(args, total_timesteps=32))
    env = gym.make("HalfCheetah-v5")
    obs, _ = env.reset(seed=1)
    space = {"env": env, "obs": obs}
    exec(re.sub('"runs/.*?"', repr(str(folder)), code), space)
    assert space["action"].shape == (1, 6) and space["action"].isfinite().all()
    assert (space["obs"] != obs).any()


@pytest.mark.slow
def test_the_notebook_runs_in_a_minute(monkeypatch, tmp_path, capsys):
    cells = json.loads((ROOT / "docs" / "gipo.ipynb").read_text())["cells"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    pyplot.switch_backend("Agg")
    pyplot.close("all")
    space = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), space)
    assert len(pyplot.gca().lines) == 2 and all(len(line.get_xdata()) > 10 for line in pyplot.gca().lines)
    pyplot.close("all")
    assert float(re.search(r"return of one episode: (\d+)", capsys.readouterr().out)[1]) > 30


def test_the_loss_for_verl_is_gipo_s(monkeypatch):
    """Run with stand-ins for verl's three functions, which is all that it imports."""
    text = (ROOT / "docs" / "engines.md").read_text()
    code = next(
        block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "register_policy_loss" in block
    )
    found = {}
    algos, functional = ModuleType("core_algos"), ModuleType("torch_functional")
    algos.register_policy_loss = lambda name: lambda function: found.setdefault(name, function)
    algos.agg_loss = lambda losses, mask, mode, **_: (losses * mask).sum() / mask.sum()
    functional.masked_mean = lambda x, mask: (x * mask).sum() / mask.sum()
    for name, module in (("verl.trainer.ppo.core_algos", algos), ("verl.utils.torch_functional", functional)):
        monkeypatch.setitem(sys.modules, name, module)
    exec(code, {})

    torch.manual_seed(1)
    old, advantages, mask = torch.randn(4, 7), torch.randn(4, 7), torch.rand(4, 7) < 0.7
    new = (old + torch.randn(4, 7)).requires_grad_()
    loss, logged = found["gipo"](old, new, advantages, mask, "token-mean", SimpleNamespace(global_batch_info={}))
    (gradient,) = torch.autograd.grad(loss, new)

    logratio, advantages = (new - old)[mask].unsqueeze(1), advantages[mask].unsqueeze(1)
    own_loss = variants.gipo(logratio, advantages, variants.Variant(sigma=0.5))
    (slope,) = torch.autograd.grad(own_loss, logratio, retain_graph=True)
    pull = logratio.detach().clamp(max=2).exp() - 1  # the gradient of r - 1 - log r, as in gipo_trl.py
    (expected,) = torch.autograd.grad(own_loss + 0.1 * (pull * logratio).mean(), new)
    torch.testing.assert_close(gradient, expected)
    coef = -slope * len(slope) / advantages
    assert logged["actor/gipo_coef_mean"] == pytest.approx(coef.mean().item())
