"""docs/index.html in headless Chromium: its mathematics against the scripts' losses, its controls, its layout."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import norm

import gipo_continuous
import ppo_baseline
from analysis import common, surrogates

playwright = pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the page's tests need axe-playwright-python")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="the page's tests need chromium or google-chrome on the PATH"
)
pytestmark = [needs_chromium, pytest.mark.slow]

PAGE = Path(__file__).parents[2] / "docs" / "index.html"
SETTINGS = [  # method, flags; no grid point lies on an edge of a band, where rounding decides
    ("none", {}),
    *[("gipo", {"sigma": sigma, "sigma_neg": neg}) for sigma, neg in ((0.5, 0.5), (0.1, 1.0), (3.0, 0.2))],
    *[("clip", {"clip_coef": eps}) for eps in (0.05, 0.2, 0.6)],
    *[("dual-clip", {"clip_coef": eps, "dual_clip": cap}) for eps, cap in ((0.2, 3.0), (0.5, 1.4), (0.6, 6.0))],
    *[("sapo", {"sapo_tau": tau, "sapo_tau_neg": neg}) for tau, neg in ((1.0, 1.05), (0.25, 4.0))],
    *[("tis", {"tis_cap": cap}) for cap in (0.5, 1.0, 5.0)],
    *[("spo", {"spo_eps": eps}) for eps in (0.05, 0.2, 0.6)],
]
METHODS = ["gipo", "clip", "dual-clip", "sapo", "tis", "spo", "none"]
DRIFTING = ["sapo", "tis", "none"]
SEEDS = 100  # of the page's table
MINUS = "\N{MINUS SIGN}"
GRID = [-100.0, -20.5, *np.linspace(-5, 5, 201).tolist(), 19.5, 20.5, 100.0]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def functions(browser):
    """A page of which only window.gipo is used, so that one will do."""
    page = browser.new_page()
    page.goto(PAGE.as_uri())
    return page


@pytest.fixture
def open_page(browser):
    """Opens the page; at the end no page may have complained, nor asked for anything but itself."""
    contexts, complaints, requests = [], [], []

    def open_one(width=1000, scheme="light", motion="reduce"):
        viewport = {"width": width, "height": 900}
        contexts.append(browser.new_context(viewport=viewport, color_scheme=scheme, reduced_motion=motion))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(PAGE.as_uri())
        page.wait_for_function("document.querySelector('#weight polyline') && document.querySelector('#kl polyline')")
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert not complaints
    assert {url for url in requests if not url.startswith("data:")} == {PAGE.as_uri()}


@pytest.fixture
def page(open_page):
    return open_page()


def call(page, function, *args):
    """gipo[function](...args) on the page."""
    return page.evaluate("([name, args]) => gipo[name](...args)", [function, args])


def learn(page, method, seed, **flags):
    """gipo.bandit; as a string, because a list of numbers takes long to leave the browser."""
    script = "([method, seed, p]) => JSON.stringify(gipo.bandit(method, seed, p))"
    return json.loads(page.evaluate(script, [method, seed, defaults(page, **flags)]))


def ends(page, method, noise=3, **flags):
    """Gain, KL, KL a hundred steps before, and silent share at the end of gipo.bandit, each for all seeds."""
    script = """([method, seeds, p, noise]) => Array.from({ length: seeds }, (_, i) => {
      const run = gipo.bandit(method, i + 1, p, noise);
      return [run.gain.at(-1), run.kl.at(-1), run.kl.at(-101), run.dead.at(-1)];
    })"""
    return np.array(page.evaluate(script, [method, SEEDS, defaults(page, **flags), noise])).T


def simulate(page, method, seed, kl_coef, steps=300):
    """The bandit's policies (steps + 1, arms), in numpy but for the batch and the coefficients."""
    batch = page.evaluate("seed => collect(seed, 3)", seed)
    mu, logits = np.array(batch["mu"]), np.log(batch["mu"])
    counts = np.array([[group["count"] for group in signs] for signs in batch["groups"]])
    advantages = np.array([[group["advantages"] for group in signs] for signs in batch["groups"]])
    loss = common.loss(method)
    policies = []
    for _ in range(steps + 1):
        policy = np.exp(logits) / np.exp(logits).sum()
        policies.append(policy)
        logratio = np.log(policy / mu)
        coef = np.stack([common.coefficients(loss, logratio, sign) for sign in (1, -1)], axis=1)
        score = (coef * advantages + kl_coef * counts).sum(1) / counts.sum()
        logits = logits + 0.5 * (score - policy * score.sum())
    return np.array(policies), batch


def drift(policies, batch):
    """KL(mu || pi) of each of these policies (n, arms)."""
    mu = np.array(batch["mu"])
    return (mu * np.log(mu / policies)).sum(1)


def curve(page, function, method, sign, flags):
    script = "([f, m, xs, s, flags]) => xs.map(x => gipo[f](m, x, s, { ...gipo.DEFAULTS, ...flags }))"
    return np.array(page.evaluate(script, [function, method, GRID, sign, flags]), dtype=float)


def defaults(page, **flags):
    return page.evaluate("gipo.DEFAULTS") | flags


def numbers(page, row):
    return page.locator(f"#numbers tbody tr:nth-child({row}) td").all_text_contents()


def percent(share):
    return f"{100 * share:.1f} %".replace("-", MINUS)


def settle(page):
    """Wait for the frame in which the page draws what has changed."""
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


# ------------------------------------------------ the mathematics ---------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
def test_coefficients_weights_and_surrogates_are_policy_loss(functions, sign):
    for method, flags in SETTINGS:
        loss = common.loss(method, **flags)
        expected = common.coefficients(loss, GRID, sign)
        found = curve(functions, "coefficient", method, sign, flags)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12, err_msg=f"{method} {flags}")
        one = torch.tensor([float(sign)], dtype=torch.float64)
        expected = [-loss(torch.tensor([x], dtype=torch.float64), one)[0].item() for x in GRID]
        value = curve(functions, "surrogate", method, sign, flags)
        np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-12, err_msg=f"{method} {flags}")
        weight = curve(functions, "weight", method, sign, flags)
        assert np.isfinite([found, value, weight]).all()
        ratio = np.exp(GRID if method == "gipo" else np.minimum(GRID, 20))
        np.testing.assert_allclose(weight * ratio, found, rtol=1e-9, atol=1e-12, err_msg=f"{method} {flags}")


@pytest.mark.parametrize("kl_coef", [0.0, 0.1, 0.3])
def test_the_coefficient_with_the_pull_is_the_gradient_of_the_whole_loss(functions, kl_coef):
    for sign in (1.0, -1.0):
        for method, flags in SETTINGS:
            logratio = torch.tensor(GRID, dtype=torch.float64, requires_grad=True)
            loss = common.loss(method, **flags)(logratio, torch.full_like(logratio, sign))[0]
            (loss + kl_coef * -logratio.mean()).backward()
            expected = -logratio.grad.numpy() * len(GRID) / sign
            found = curve(functions, "pulled", method, sign, flags | {"kl_coef": kl_coef})
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12, err_msg=f"{method} {flags}")


def test_defaults_are_the_scripts(page):
    found = defaults(page)
    gipo, baseline = (common.loss(method).keywords["args"] for method in ("gipo", "clip"))
    assert found.pop("kl_coef") == gipo_continuous.Args().kl_coef == 0.1
    assert ppo_baseline.Continuous().kl_coef == 0
    assert gipo_continuous.Args().sigma == found["sigma"] and gipo_continuous.Args().sigma_neg is None
    for flag, value in found.items():
        assert value == getattr(gipo if flag.startswith("sigma") else baseline, flag)
    controls = {"eps": "clip_coef", "sigma": "sigma", "sigma_neg": "sigma_neg", "kl_coef": "kl_coef"}
    for control, flag in controls.items():
        assert float(page.input_value(f"#{control}")) == defaults(page)[flag]
    assert page.get_by_role("switch").evaluate_all("switches => switches.every(s => s.checked)")


def test_an_unknown_method_is_an_error(functions):
    with pytest.raises(playwright.Error, match="unknown method"):
        call(functions, "weight", "ppo", 0, 1, defaults(functions))


@pytest.mark.parametrize("s", [0.05, 0.3, 1.0, 2.0])
def test_dead_share_and_effective_sample_size(functions, s):
    logratio, mass = surrogates.drifted(s)
    # SPO's squares live in the upper tail, where differences of norm.cdf are rounding error
    mass = np.concatenate([mass[:10_001], mass[:10_000][::-1]])
    for method, flags in SETTINGS:
        settings = defaults(functions, **flags)
        expected = surrogates.dead_share(method, s, **flags)
        assert call(functions, "deadShare", method, s, settings) == pytest.approx(expected, abs=1e-6), (method, flags)
        coef = np.abs([common.coefficients(common.loss(method, **flags), logratio, sign) for sign in (1, -1)])
        weight = coef / coef.max()
        expected = (weight @ mass).sum() ** 2 / (2 * (weight**2 @ mass).sum())
        assert call(functions, "ess", method, s, settings) == pytest.approx(expected, rel=1e-4), (method, flags)


@pytest.mark.parametrize("kl_coef", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("s", [0.3, 1.0, 2.0])
def test_reversed_share(functions, s, kl_coef):
    logratio, mass = surrogates.drifted(s)
    for method, flags in SETTINGS:
        coef = [sign * kl_coef + common.coefficients(common.loss(method, **flags), logratio, sign) for sign in (1, -1)]
        expected = np.mean([mass @ (c < 0) for c in coef])
        found = call(functions, "reversedShare", method, s, defaults(functions, kl_coef=kl_coef, **flags))
        assert found == pytest.approx(expected, abs=1e-6), (method, flags)
        assert kl_coef or method == "spo" or found == 0
    # c < kl_coef beyond the two roots of x - 2 x^2 = log(kl_coef), where A < 0
    if kl_coef:
        low, high = np.sort(np.roots([-2, 1, -math.log(kl_coef)]))
        outside = norm.cdf((low + s**2 / 2) / s) + norm.sf((high + s**2 / 2) / s)
        found = call(functions, "reversedShare", "gipo", s, defaults(functions, kl_coef=kl_coef))
        assert found == pytest.approx(outside / 2, abs=1e-3)


def test_the_bound_is_the_largest_coefficient(functions):
    logratio = np.linspace(-10, 10, 20_001)
    for method, flags in SETTINGS:
        loss = common.loss(method, **flags)
        largest = max(np.abs(common.coefficients(loss, logratio, sign)).max() for sign in (1, -1))
        bound = call(functions, "bound", method, defaults(functions, **flags))
        if method in ("none", "clip", "spo"):
            assert bound == math.inf and largest > 1e4
        else:
            assert bound == pytest.approx(largest, rel=1e-3), (method, flags)


# ------------------------------------------------ what the text says ------------------------------------------------


def test_the_numbers_in_the_text(page):
    for sigma, bound in ((0.5, "1.13"), (1, "1.65")):
        assert f"{call(page, 'bound', 'gipo', defaults(page, sigma=sigma, sigma_neg=sigma)):.2f}" == bound
    weights = [call(page, "weight", "gipo", k * 0.5, 1, defaults(page)) for k in (1, 2, 3)]
    assert [f"{100 * w:.0f}" for w in weights] == ["61", "14", "1"]
    assert f"{math.log(0.8):.3f}…{math.log(1.2):.3f}".replace("-", MINUS) in page.inner_text("#q2 + p")
    for s, sigma, quieter in ((1.6, 0.5, False), (1.75, 0.5, True), (2, 1.0, False)):
        settings = defaults(page, sigma=sigma, sigma_neg=sigma)
        assert (call(page, "deadShare", "gipo", s, settings) > call(page, "deadShare", "clip", s, settings)) is quieter


def test_what_the_bandit_is_said_to_show(page):
    """Over the hundred seeds of the table: who gains, who drifts, and who falls silent, with the pull and without."""
    found = {method: ends(page, method, kl_coef=0) for method in METHODS}
    gain, kl, earlier, dead = (dict(zip(METHODS, column)) for column in zip(*found.values()))
    mean = {method: gain[method].mean() for method in METHODS}
    assert mean["clip"] < mean["gipo"] < min(mean[method] for method in DRIFTING)
    assert kl["gipo"].mean() > 10 * kl["clip"].mean()
    assert 0.25 < dead["gipo"].mean() < dead["clip"].mean()
    for method in DRIFTING:
        assert gain[method].min() < 2 * gain["gipo"].min() < 0
        assert ends(page, method, noise=6, kl_coef=0)[0].min() < gain[method].min()

    pulled_gain, pulled_kl, pulled_earlier, pulled_dead = pulled = ends(page, "gipo")
    assert (pulled_kl < kl["gipo"]).all()
    assert pulled_kl.mean() > 10 * kl["clip"].mean() and pulled_kl.mean() > 10 * kl["spo"].mean()
    assert pulled_dead.mean() < 0.001
    text = " ".join(page.inner_text("#bandit-title ~ .cards >> nth=1").split())
    for sentence in (
        f"Its mean drift is {kl['gipo'].mean():.2f} after 300 steps.",
        f"The last hundred steps alone add {(kl['gipo'] - earlier['gipo']).mean():.2f}.",
        f"it is {pulled_kl.mean():.2f}, and the last hundred steps add {(pulled_kl - pulled_earlier).mean():.2f}.",
        f"the mean gain falls from {100 * mean['gipo']:.0f} % to {100 * pulled_gain.mean():.0f} %.",
        f"The worst seed loses {-100 * pulled_gain.min():.0f} % instead of {-100 * gain['gipo'].min():.0f} %.",
    ):
        assert sentence in text
    for method in DRIFTING:  # the pull settles them too, further out
        _, all_kl, all_earlier, _ = ends(page, method)
        assert (all_kl - all_earlier).mean() < 0.2 * (kl[method] - earlier[method]).mean()
        assert all_kl.mean() > 2 * pulled_kl.mean()

    found = {"gipo": pulled, "unpulled": found.pop("gipo")} | found
    assert page.locator("#seeds tbody tr").count() == len(found)
    page.wait_for_function("!document.getElementById('seeds').textContent.includes('…')")
    seed = int(page.input_value("#seed"))
    for row, (gain, kl, *_) in enumerate(found.values(), 1):
        cells = page.locator(f"#seeds tbody tr:nth-child({row}) td").all_text_contents()
        assert cells == [percent(gain.mean()), percent(gain.min()), f"{kl.mean():.2f}"]
        for values in (gain, kl):  # the seed that is shown is a typical one
            assert abs(values[seed - 1] - values.mean()) < values.std()


# ------------------------------------------------ the bandit --------------------------------------------------------


def test_the_bandit_depends_on_its_seed_alone(open_page):
    first, second = open_page(), open_page()
    for method in METHODS:
        run = learn(first, method, 7)
        assert run == learn(second, method, 7) != learn(second, method, 8)
        np.testing.assert_allclose(np.sum(run["policy"], axis=1), 1)
    pictures = []
    for page, seed in ((first, "7"), (second, "7"), (second, "8")):
        page.fill("#seed", seed)
        page.fill("#step", "300")
        settle(page)
        pictures.append([page.locator(f"#{id}").inner_html() for id in ("arms", "gain", "kl", "dead")])
    assert pictures[0] == pictures[1] and pictures[0][0] != pictures[2][0]


def test_the_bandit_steps_along_the_policy_gradient(functions):
    """The first step is on-policy, so that it is the same for all; a later one follows the scripts' coefficients."""
    runs = {method: learn(functions, method, 3, kl_coef=0) for method in METHODS}
    for run in runs.values():
        np.testing.assert_allclose(run["policy"][:2], runs["gipo"]["policy"][:2])
        assert run["gain"][0] == 0 and run["kl"][0] == pytest.approx(0)
    for method, run in runs.items():
        policy, mu = np.array(run["policy"]), np.array(run["mu"])
        expected = mu @ np.log(mu / policy[-1])
        assert run["kl"][-1] == pytest.approx(expected)
        groups = functions.evaluate("collect(3, 3).groups")
        for step in (50, 200):
            logratio = np.log(policy[step] / mu)
            coef = {sign: common.coefficients(common.loss(method), logratio, sign) for sign in (1, -1)}
            pull = [sum(coef[g["sign"]][arm] * g["advantages"] for g in signs) / 64 for arm, signs in enumerate(groups)]
            logits = np.log(policy[step]) + 0.5 * (pull - policy[step] * np.sum(pull))
            np.testing.assert_allclose(policy[step + 1], np.exp(logits) / np.exp(logits).sum(), rtol=1e-6)


class Softmax:
    """An agent of one state, as the scripts' minibatch_loss asks for one."""

    def __init__(self, policy):
        self.logits = torch.tensor(np.log(policy), requires_grad=True)

    def get_action_and_value(self, obs, actions):
        logprobs = self.logits.log_softmax(0)[actions]
        return actions, logprobs, torch.zeros(len(actions)), torch.zeros(len(actions))


@pytest.mark.parametrize("kl_coef", [0.0, 0.1, 0.3])
@pytest.mark.parametrize(
    ("method", "script", "args"),
    [("gipo", gipo_continuous, gipo_continuous.Args), ("clip", ppo_baseline, ppo_baseline.Continuous)],
)
def test_the_bandit_steps_down_the_scripts_loss(functions, method, script, args, kl_coef):
    """minibatch_loss on the 64 samples one by one, its KL term included, moves the policy as the page does."""
    args = args(kl_coef=kl_coef, norm_adv=False, ent_coef=0, vf_coef=0)
    run = learn(functions, method, 5, kl_coef=kl_coef)
    batch = functions.evaluate("collect(5, 3)")
    rows = [(arm, group) for arm, signs in enumerate(batch["groups"]) for group in signs if group["count"]]
    counts = torch.tensor([group["count"] for _, group in rows])
    assert counts.sum() == 64
    actions = torch.tensor([arm for arm, _ in rows]).repeat_interleave(counts)
    advantages = torch.tensor([group["advantages"] / group["count"] for _, group in rows], dtype=torch.float64)
    advantages = advantages.repeat_interleave(counts)
    logprobs = torch.tensor(np.log(batch["mu"]))[actions]
    for step in (0, 40, 299):
        agent = Softmax(run["policy"][step])
        zeros = torch.zeros(64, dtype=torch.float64)
        loss, *_ = script.minibatch_loss(agent, None, actions, logprobs, advantages, zeros, args)
        (gradient,) = torch.autograd.grad(loss, agent.logits)
        expected = (agent.logits - 0.5 * gradient).softmax(0).detach()
        np.testing.assert_allclose(run["policy"][step + 1], expected, rtol=1e-9)


@pytest.mark.parametrize("seed", [1, 26])
def test_the_pull_stops_the_runaway(functions, seed):
    """Each run is numpy's; ten times as long, the drift goes on without the pull and has settled with it."""
    last = {}
    for kl_coef in (0.0, 0.1, 0.3):
        policies, batch = simulate(functions, "gipo", seed, kl_coef, 3000)
        run = learn(functions, "gipo", seed, kl_coef=kl_coef)
        np.testing.assert_allclose(run["policy"], policies[:301], rtol=1e-6)
        kl = drift(policies, batch)
        np.testing.assert_allclose(run["kl"], kl[:301], rtol=1e-6, atol=1e-12)
        last[kl_coef] = kl[-1]
        late = kl[-1] - kl[-1001]
        assert late < 0.01 if kl_coef else late > 0.1
    assert last[0.3] < last[0.1] < 0.5 * last[0.0]


def test_play_pause_restart(open_page):
    page = open_page()
    position = page.locator("#step")
    page.locator("#arms").scroll_into_view_if_needed()
    page.wait_for_timeout(300)
    assert position.input_value() == "0"  # reduced motion is asked for
    page.get_by_role("button", name="Play").click()
    page.wait_for_function("document.getElementById('step').value > 5")
    page.get_by_role("button", name="Pause").click()
    paused = position.input_value()
    page.wait_for_timeout(200)
    assert position.input_value() == paused != "300"
    drawn = page.locator("#gain").inner_html()
    page.get_by_role("button", name="Restart").click()
    assert position.input_value() == "0" and page.locator("#gain").inner_html() != drawn
    page.fill("#step", paused)
    settle(page)
    assert page.locator("#gain").inner_html() == drawn
    page.fill("#step", "295")
    page.get_by_role("button", name="Play").click()
    page.wait_for_function("document.getElementById('run-status').textContent.startsWith('Step 300: GIPO')")
    page.get_by_role("button", name="Play").click()
    page.wait_for_function("document.getElementById('step').value < 100")


def test_it_plays_by_itself_once_in_view_unless_motion_is_reduced(open_page):
    page = open_page(motion="no-preference")
    assert page.input_value("#step") == "0"
    page.locator("#arms").scroll_into_view_if_needed()
    page.wait_for_function("document.getElementById('step').value > 3")


# ------------------------------------------------ controls, layout, access ------------------------------------------


def test_every_control_changes_the_page(page):
    def drawn():
        settle(page)
        return page.evaluate("[...document.querySelectorAll('main svg, #numbers, #run')].map(e => e.innerHTML).join()")

    page.fill("#step", "300")  # where every setting has left its mark
    moved = set()
    for method in page.locator("#baseline option").evaluate_all("options => options.map(o => o.value)"):
        page.select_option("#baseline", method)
        page.select_option("#third", "none" if method == "clip" else method)
        for slider in page.locator("input[type=range]:visible").all():
            if slider.get_attribute("id") in moved:
                continue
            moved.add(slider.get_attribute("id"))
            for keys in ("Home", "End", "ArrowLeft"):
                before = drawn()
                slider.press(keys)
                assert drawn() != before, (method, slider.get_attribute("id"), keys)
            value = slider.locator("xpath=..").locator(".value").text_content()
            assert float(value) == float(slider.input_value())
    assert moved == set(page.locator("input[type=range]").evaluate_all("inputs => inputs.map(i => i.id)"))

    for control in ("#pull_all", "#pull_all", "#pull", "#pull_run"):
        before = drawn()
        page.locator(control).click()
        assert drawn() != before, control
    before = drawn()
    page.get_by_role("radio", name="A < 0").check()
    assert drawn() != before
    page.fill("#sigma", "0.8")
    assert page.input_value("#sigma_neg") != "0.8"  # it was moved by itself
    page.get_by_label("follows").check()
    assert page.input_value("#sigma_neg") == "0.8"
    page.fill("#sigma_neg", "0.3")
    assert not page.get_by_label("follows").is_checked()
    before = drawn()
    for bad in ("", "-1", "1.5", "1000000"):
        page.fill("#seed", bad)
        assert drawn() == before
    page.fill("#seed", "123")
    assert drawn() != before


def test_the_table_shows_the_settings(page):
    page.select_option("#baseline", "sapo")
    page.fill("#drift", "1.5")
    page.fill("#sigma", "1")
    page.fill("#sapo_tau", "2")
    settle(page)
    gipo, sapo = surrogates.dead_share("gipo", 1.5, sigma=1), surrogates.dead_share("sapo", 1.5, sapo_tau=2)
    assert numbers(page, 1) == [percent(gipo), percent(sapo)]
    assert numbers(page, 2)[0] == percent(0.408738)
    assert numbers(page, 3)[0] == "1.65"
    page.locator("#drift").press("ArrowRight")
    page.wait_for_function("document.getElementById('lab-status').textContent.startsWith('Drift 1.55')")


@pytest.mark.parametrize("width", [390, 1280])
def test_the_switch_of_the_pull(open_page, width):
    """By keyboard, at a phone's width too: each of the two switches changes what depends on the pull, and no more."""
    page = open_page(width)
    page.fill("#step", "300")
    both = [page.locator("#pull"), page.locator("#pull_run")]
    assert [page.get_by_role("switch", name="KL pull").nth(i).get_attribute("id") for i in range(2)] == [
        "pull",
        "pull_run",
    ]
    kl, share = {}, {}
    for kl_coef in (0.0, 0.1, 0.2):
        policies, batch = simulate(page, "gipo", int(page.input_value("#seed")), kl_coef)
        kl[kl_coef] = f"{drift(policies[-1:], batch)[0]:.2f}"
        share[kl_coef] = percent(call(page, "reversedShare", "gipo", 1, defaults(page, kl_coef=kl_coef)))
    assert len(set(kl.values())) == len(set(share.values())) == 3

    def shows(kl_coef):
        settle(page)
        rows = [page.locator(f"#run tbody tr:nth-child({row}) td").all_text_contents() for row in (1, 2, 3)]
        assert rows[0][1] == kl[kl_coef] and rows[2][1] == kl[0.0]  # GIPO; PPO-clip; GIPO, no pull
        assert numbers(page, 4) == [share[kl_coef], percent(0)]
        assert [switch.is_checked() for switch in both] == 2 * [kl_coef > 0]
        value = page.locator("#kl_coef").locator("xpath=..").locator(".value").text_content()
        assert value == (f"{kl_coef:.2f}" if kl_coef else "off")
        assert page.locator("#coefficient .band").count() == page.locator("#pull-note:visible").count() == (kl_coef > 0)
        for svg in ("weight", "surrogate"):
            page.locator(f"#{svg} .band").wait_for(state="detached")
        return rows[1], [numbers(page, row) for row in (1, 2, 3)], page.locator("#weight").inner_html()

    same = shows(0.1)
    for switch in both:
        assert switch.bounding_box()["x"] >= 0
        switch.focus()
        page.keyboard.press("Space")
        assert shows(0.0) == same
        page.keyboard.press("Space")
        assert shows(0.1) == same
    page.locator("#sigma").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "kl_coef"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "pull"
    page.keyboard.press("Space")
    page.wait_for_function("document.getElementById('lab-status').textContent.includes('KL pull off')")
    page.fill("#kl_coef", "0.2")  # moving it switches it on
    assert shows(0.2) == same
    page.locator("#pull_run").click()
    page.wait_for_function("document.getElementById('run-status').textContent.includes('Step 300')")
    assert shows(0.0) == same


def test_the_pull_of_every_method(page):
    page.fill("#step", "300")
    page.select_option("#third", "tis")
    page.select_option("#baseline", "tis")
    page.get_by_label("for every method").check()
    settle(page)
    cells = page.locator("#run tbody tr td:nth-child(3)").all_text_contents()
    for row, method in enumerate(("gipo", "clip", "tis")):
        policies, batch = simulate(page, method, int(page.input_value("#seed")), 0.1)
        assert cells[row] == f"{drift(policies[-1:], batch)[0]:.2f}", method
    assert numbers(page, 4)[1] == percent(call(page, "reversedShare", "tis", 1, defaults(page))) != percent(0)
    assert page.locator("#coefficient .band").count() == 2
    page.wait_for_function("!document.getElementById('seeds').textContent.includes('…')")
    table = page.locator("#seeds tbody td:nth-child(4)").all_text_contents()
    assert table[1] == f"{ends(page, 'gipo', kl_coef=0)[1].mean():.2f}"  # this row stays without
    assert table[5] == f"{ends(page, 'tis')[1].mean():.2f}"


@pytest.mark.parametrize("width", [360, 1000, 1600])
def test_no_horizontal_scrolling(open_page, width):
    page = open_page(width)
    for method in page.locator("#baseline option").evaluate_all("options => options.map(o => o.value)"):
        page.select_option("#baseline", method)
        page.select_option("#third", "none" if method == "clip" else method)
        settle(page)
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(open_page, scheme):
    page = open_page(scheme=scheme)
    page.select_option("#baseline", "sapo")
    page.fill("#step", "100")
    settle(page)
    violations = axe.Axe().run(page).response["violations"]
    assert not [v["id"] for v in violations if v["impact"] in ("serious", "critical")]
    labels = page.locator("main svg[role=img]").evaluate_all("pictures => pictures.map(p => p.ariaLabel)")
    assert len(labels) == 10 and all(labels)


def test_one_small_file():
    assert PAGE.stat().st_size < 150_000
