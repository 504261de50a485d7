"""docs/index.html in headless Chromium: its mathematics against the scripts' losses, its controls, its layout."""

import json
import math
import shutil
from typing import get_args, get_type_hints

import gipo_continuous
import numpy as np
import ppo_baseline
import pytest
import torch
from harness import ROOT
from scipy.stats import norm

from benchmark import variants

playwright = pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the page's tests need axe-playwright-python")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="the page's tests need chromium or google-chrome")
pytestmark = [needs_chromium, pytest.mark.slow]

PAGE = (ROOT / "docs" / "index.html").as_uri()
SETTINGS = [  # method, flags; no grid point lies on an edge of a band, where rounding decides
    ("plain_is", {}),
    *[("gipo", {"sigma": sigma}) for sigma in (0.1, 0.5, 3.0)],
    *[("clip", {"clip_coef": eps}) for eps in (0.05, 0.2, 0.6)],
    *[("dual_clip", {"clip_coef": eps, "dual_clip": cap}) for eps, cap in ((0.2, 3.0), (0.5, 1.4), (0.6, 6.0))],
    *[("sapo", {"sapo_tau": tau, "sapo_tau_neg": neg}) for tau, neg in ((1.0, 1.05), (0.25, 4.0))],
    *[("tis", {"tis_cap": cap}) for cap in (0.5, 1.0, 5.0)],
    *[("spo", {"spo_eps": eps}) for eps in (0.05, 0.2, 0.6)],
]
METHODS = ["gipo", "clip", "dual_clip", "sapo", "tis", "spo", "plain_is"]
DRIFTING = ["sapo", "tis", "plain_is"]
GRID = [-100.0, -20.5, *np.linspace(-5, 5, 201).tolist(), 19.5, 20.5, 100.0]
MINUS = "\N{MINUS SIGN}"


@pytest.fixture(scope="module", autouse=True)
def scripts_in_float64():
    """ppo_baseline.update takes the loss that --method names, as in benchmark/variants.py."""
    torch.set_default_dtype(torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_baseline, "policy_loss", variants.policy_loss)
        yield
    torch.set_default_dtype(torch.float32)


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
    page.goto(PAGE)
    return page


@pytest.fixture
def open_page(browser):
    """Opens the page; at the end no page may have complained, nor asked for anything but itself."""
    contexts, complaints, requests = [], [], []

    def open_one(width=1000, scheme="light", motion="reduce", compare=False):
        viewport = {"width": width, "height": 900}
        contexts.append(browser.new_context(viewport=viewport, color_scheme=scheme, reduced_motion=motion))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(PAGE)
        page.wait_for_function("document.querySelector('#weight polyline') && document.querySelector('#kl polyline')")
        if not compare:  # 800 bandits after each change of a control
            page.evaluate("compared = ''; compareSeeds = () => {}")
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert not complaints
    assert {url for url in requests if not url.startswith("data:")} == {PAGE}


def call(page, function, *args, **flags):
    """gipo[function](...args, flags) on the page; a list among the arguments gives a list."""
    script = """([name, args, flags]) => {
      const p = { ...gipo.DEFAULTS, ...flags }, many = args.findIndex(Array.isArray);
      return many < 0 ? gipo[name](...args, p) : args[many].map(x => gipo[name](...args.with(many, x), p));
    }"""
    return page.evaluate(script, [function, args, flags])


def learn(page, method, seed, **flags):
    """gipo.bandit; as a string, because a list of numbers takes long to leave the browser."""
    script = "([method, seed, flags]) => JSON.stringify(gipo.bandit(method, seed, { ...gipo.DEFAULTS, ...flags }))"
    return json.loads(page.evaluate(script, [method, seed, flags]))


def ends(page, method, noise=3, **flags):
    """Gain, KL, KL a hundred steps before, and silent share at the end of gipo.bandit, for the table's 100 seeds."""
    script = """([method, noise, flags]) => Array.from({ length: 100 }, (_, i) => {
      const run = gipo.bandit(method, i + 1, { ...gipo.DEFAULTS, ...flags }, noise);
      return [run.gain.at(-1), run.kl.at(-1), run.kl.at(-101), run.dead.at(-1)];
    })"""
    return np.array(page.evaluate(script, [method, noise, flags])).T


class Agent(torch.nn.Module):
    """What `update` of the scripts asks of an agent: log-probabilities (B, 1) of actions, from one parameter."""

    def __init__(self, start, logprobs):
        super().__init__()
        self.parameter, self.logprobs = torch.nn.Parameter(torch.tensor(start)), logprobs

    def get_action_and_value(self, obs, actions):
        zeros = torch.zeros(len(actions))
        return actions, self.logprobs(self.parameter)[actions].unsqueeze(1), zeros, zeros


def descend(agent, actions, logprobs, advantages, steps, method, **flags):
    """Gradient steps of size 0.5 of a script's `update`; the agent's parameter after each."""
    script = gipo_continuous if method == "gipo" else ppo_baseline
    args = variants.Variant(method=method, kl_to="behaviour", norm_adv=False, max_grad_norm=math.inf, **flags)
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.5)
    logprobs, returns = logprobs.unsqueeze(1), torch.zeros(len(actions))
    for _ in range(steps):
        script.update(agent, optimizer, None, actions, logprobs, logprobs, advantages, returns, args)
        yield agent.parameter.detach().numpy().copy()


def coefficients(method, logratio, sign, **flags):
    """c of each log-ratio, where the gradient of the whole loss is -c A / n."""
    n = len(logratio)
    agent = Agent(logratio, lambda parameter: parameter)
    list(descend(agent, torch.arange(n), torch.zeros(n), torch.full((n,), float(sign)), 1, method, **flags))
    return (-agent.parameter.grad * n / sign).numpy()


def simulate(page, method, seed, steps, start=None, **flags):
    """The bandit's policies (steps + 1, arms) by a script's update on its 64 samples, and KL(mu || pi) of each."""
    batch = page.evaluate("seed => collect(seed, 3)", seed)
    mu = np.array(batch["mu"])
    start = np.array(start or mu)
    samples = [(arm, g["advantages"] / g["count"]) for arm, gs in enumerate(batch["groups"]) for g in gs for _ in range(g["count"])]
    actions, advantages = map(torch.tensor, zip(*samples))
    assert len(actions) == 64
    agent = Agent(np.log(start), lambda logits: logits.log_softmax(0))
    logits = descend(agent, actions, torch.tensor(np.log(mu))[actions], advantages, steps, method, **flags)
    policies = np.array([start, *(np.exp(x) / np.exp(x).sum() for x in logits)])
    return policies, (mu * np.log(mu / policies)).sum(1)


def percent(share):
    return f"{100 * share:.1f} %".replace("-", MINUS)


def settle(page):
    """Wait for the frame in which the page draws what has changed."""
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def cells(page, table, row):
    return page.locator(f"#{table} tbody tr:nth-child({row}) td").all_text_contents()


# ------------------------------------------------ the mathematics ---------------------------------------------------
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("method", "flags"), SETTINGS)
def test_coefficients_weights_and_surrogates_are_the_scripts_loss(functions, method, flags, sign):
    def check(found, expected):
        np.testing.assert_allclose(np.array(found, dtype=float), expected, rtol=1e-9, atol=1e-12)

    coef = coefficients(method, GRID, sign, **flags)
    check(call(functions, "coefficient", method, GRID, sign, **flags), coef)
    for kl_coef in (0.0, 0.1, 0.3):
        pulled = coefficients(method, GRID, sign, kl_coef=kl_coef, **flags)
        check(call(functions, "pulled", method, GRID, sign, **flags, kl_coef=kl_coef), pulled)
    ratio = np.exp(GRID if method == "gipo" else np.minimum(GRID, 20))
    check(ratio * call(functions, "weight", method, GRID, sign, **flags), coef)
    args, one = variants.Variant(**flags), torch.tensor([[float(sign)]])
    losses = [variants.LOSSES[method](torch.tensor([[x]]), one, args).item() for x in GRID]
    check(call(functions, "surrogate", method, GRID, sign, **flags), -np.array(losses))

    largest = max(np.abs(coefficients(method, np.linspace(-10, 10, 20_001), s, **flags)).max() for s in (1, -1))
    bound = call(functions, "bound", method, **flags)
    bounded = method not in ("plain_is", "clip", "spo")
    assert bound == pytest.approx(largest, rel=1e-3) if bounded else bound == math.inf and largest > 1e4
    with pytest.raises(playwright.Error, match="unknown method"):
        call(functions, "weight", "ppo", 0, sign)


@pytest.mark.parametrize("s", [0.05, 0.3, 1.0, 2.0])
def test_shares_of_a_stale_batch(functions, s):
    """Silent and reversed samples, and the effective sample size."""
    z = -10 + 20 * (np.arange(20_001) + 0.5) / 20_001
    mass, logratio = norm.pdf(z) * 20 / 20_001, -(s**2) / 2 + s * z
    for method, flags in SETTINGS:
        coef = np.array([coefficients(method, logratio, sign, **flags) for sign in (1, -1)])
        silent = ((np.abs(coef) < 1e-3) @ mass).mean()
        assert call(functions, "deadShare", method, s, **flags) == pytest.approx(silent, abs=1e-6), (method, flags)
        weight = np.abs(coef) / np.abs(coef).max()
        size = (weight @ mass).sum() ** 2 / (2 * (weight**2 @ mass).sum())
        assert call(functions, "ess", method, s, **flags) == pytest.approx(size, rel=1e-4), (method, flags)
        for kl_coef in (0.0, 0.1, 0.3):
            found = call(functions, "reversedShare", method, s, **flags, kl_coef=kl_coef)
            share = ((coef + kl_coef * np.array([[1], [-1]]) < 0) @ mass).mean()
            assert found == pytest.approx(share, abs=1e-6), (method, flags)
            assert kl_coef or method == "spo" or found == 0
    # c < 0.1 beyond the two roots of x - 2 x^2 = log(0.1), where A < 0
    low, high = np.sort(np.roots([-2, 1, -math.log(0.1)]))
    outside = norm.cdf((low + s**2 / 2) / s) + norm.sf((high + s**2 / 2) / s)
    assert call(functions, "reversedShare", "gipo", s) == pytest.approx(outside / 2, abs=1e-3)


# ------------------------------------------------ what the text says ------------------------------------------------
def test_defaults_and_flags_are_the_scripts(open_page):
    page, args = open_page(), gipo_continuous.Continuous()
    defaults = page.evaluate("gipo.DEFAULTS")
    for control in page.locator(".curves-area input[type=range]").all():
        flag = {"eps": "clip_coef"}.get(name := control.get_attribute("id"), name)
        assert float(control.input_value()) == defaults[flag]
    assert page.get_by_role("switch").evaluate_all("switches => switches.every(s => s.checked)")
    assert defaults.pop("kl_coef") == args.kl_coef == 0.1 and ppo_baseline.Continuous().kl_coef == 0
    assert defaults == {flag: getattr(variants.Variant(), flag) for flag in defaults}
    assert (args.sigma, args.kl_to, args.ratio) == (defaults["sigma"], "current", "dimension")
    named = [code.split() for code in page.locator("code").all_text_contents() if code.startswith("--")]
    for flag, *value in named:
        assert {*value} <= {*get_args(get_type_hints(type(args))[flag[2:].replace("-", "_")])}
    assert [*map(" ".join, named)] == ["--ratio action", "--kl-coef", "--kl-to behaviour", "--kl-to current"]


def test_the_numbers_in_the_text(open_page):
    page = open_page()
    weights = call(page, "weight", "gipo", [0.5, 1.0, 1.5], 1)
    numbers = [f"{100 * weight:.0f} %" for weight in weights]
    numbers += [f"{call(page, 'bound', 'gipo', sigma=sigma):.2f}" for sigma in (0.5, 1)]
    numbers += [f"{math.log(0.8):.3f}…{math.log(1.2):.3f}".replace("-", MINUS)]
    text = page.inner_text(".questions").replace("\N{NO-BREAK SPACE}", " ")
    assert all(number in text for number in numbers), numbers
    for s, sigma, quieter in ((1.6, 0.5, False), (1.75, 0.5, True), (2, 1.0, False)):
        assert (call(page, "deadShare", "gipo", s, sigma=sigma) > call(page, "deadShare", "clip", s)) is quieter


def test_what_the_bandit_is_said_to_show(open_page):
    """Over the hundred seeds of the table: who gains, who drifts, and who falls silent, with the pull and without."""
    page = open_page(compare=True)
    found = {method: ends(page, method, kl_coef=0) for method in METHODS}
    gain, kl, earlier, dead = (dict(zip(METHODS, column)) for column in zip(*found.values()))
    mean = {method: gain[method].mean() for method in METHODS}
    assert mean["clip"] < mean["gipo"] < min(mean[method] for method in DRIFTING)
    assert 0.25 < dead["gipo"].mean() < dead["clip"].mean()
    pulled_gain, pulled_kl, pulled_earlier, pulled_dead = pulled = ends(page, "gipo")
    assert (pulled_kl < kl["gipo"]).all() and pulled_dead.mean() < 0.001
    assert pulled_kl.mean() > 10 * max(kl["clip"].mean(), kl["spo"].mean())
    for method in DRIFTING:  # they lose more on their worst seed; the pull settles them too, further out
        assert gain[method].min() < 2 * gain["gipo"].min() < 0
        assert ends(page, method, noise=6, kl_coef=0)[0].min() < gain[method].min()
        _, all_kl, all_earlier, _ = ends(page, method)
        assert (all_kl - all_earlier).mean() < 0.2 * (kl[method] - earlier[method]).mean()
        assert all_kl.mean() > 2 * pulled_kl.mean()
    text = " ".join(page.inner_text("#bandit-title ~ .cards >> nth=1").split())
    for sentence in (
        f"Its mean drift is {kl['gipo'].mean():.2f} after 300 steps.",
        f"The last hundred steps alone add {(kl['gipo'] - earlier['gipo']).mean():.2f}.",
        f"it is {pulled_kl.mean():.2f}, and the last hundred steps add {(pulled_kl - pulled_earlier).mean():.2f}.",
        f"the mean gain falls from {100 * mean['gipo']:.0f} % to {100 * pulled_gain.mean():.0f} %.",
        f"The worst seed loses {-100 * pulled_gain.min():.0f} % instead of {-100 * gain['gipo'].min():.0f} %.",
    ):
        assert sentence in text

    found = {"gipo": pulled, "unpulled": found.pop("gipo")} | found
    page.wait_for_function("!document.getElementById('seeds').textContent.includes('…')")
    assert page.locator("#seeds tbody tr").count() == len(found)
    seed = int(page.input_value("#seed"))
    for row, (gain, kl, *_) in enumerate(found.values(), 1):
        assert cells(page, "seeds", row) == [percent(gain.mean()), percent(gain.min()), f"{kl.mean():.2f}"]
        for values in (gain, kl):  # the seed that is shown is a typical one
            assert abs(values[seed - 1] - values.mean()) < values.std()


# ------------------------------------------------ the bandit --------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_the_bandit_steps_down_the_scripts_loss(functions, method):
    for kl_coef in (0.0, 0.1, 0.3):
        run = learn(functions, method, 5, kl_coef=kl_coef)
        assert run["gain"][0] == 0 and run["kl"][0] == pytest.approx(0)
        for step in (0, 40, 200, 299):
            policies, kl = simulate(functions, method, 5, 1, run["policy"][step], kl_coef=kl_coef)
            np.testing.assert_allclose(run["policy"][step + 1], policies[-1], rtol=1e-9)
            assert run["kl"][step + 1] == pytest.approx(kl[-1])


def test_the_pull_stops_the_runaway(functions):
    """Ten times as long as on the page, the drift goes on without the pull and has settled with it."""
    last = {}
    for kl_coef in (0.0, 0.1, 0.3):
        policies, kl = simulate(functions, "gipo", 26, 3000, kl_coef=kl_coef)
        np.testing.assert_allclose(learn(functions, "gipo", 26, kl_coef=kl_coef)["policy"], policies[:301], rtol=1e-6)
        assert kl[-1] - kl[-1001] < 0.01 if kl_coef else kl[-1] - kl[-1001] > 0.1
        last[kl_coef] = kl[-1]
    assert last[0.3] < last[0.1] < 0.5 * last[0.0]


def test_play_pause_restart(open_page):
    moving = open_page(motion="no-preference")  # plays by itself, once in view
    assert moving.input_value("#step") == "0"
    moving.locator("#arms").scroll_into_view_if_needed()
    moving.wait_for_function("document.getElementById('step').value > 3")

    page = open_page()
    position = page.locator("#step")
    page.locator("#arms").scroll_into_view_if_needed()
    page.wait_for_timeout(300)
    assert position.input_value() == "0"
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


# ------------------------------------------------ controls, layout, access ------------------------------------------
def test_every_control_changes_the_page_and_nothing_else_does(open_page):
    def drawn(page):
        settle(page)
        return page.evaluate("[...document.querySelectorAll('main svg, #numbers, #run')].map(e => e.innerHTML).join()")

    page, twin = open_page(), open_page()
    for one in (page, twin):
        one.fill("#step", "300")  # where every setting has left its mark
    assert drawn(page) == drawn(twin)
    moved = set()
    for method in METHODS[1:]:
        page.select_option("#baseline", method)
        page.select_option("#third", "plain_is" if method == "clip" else method)
        for slider in page.locator("input[type=range]:visible").all():
            if (name := slider.get_attribute("id")) not in moved:
                moved.add(name)
                for key in ("Home", "End"):
                    before = drawn(page)
                    slider.press(key)
                    assert drawn(page) != before, (method, name, key)
                assert float(slider.locator("xpath=..").locator(".value").text_content()) == float(slider.input_value())
    assert moved == set(page.locator("input[type=range]").evaluate_all("inputs => inputs.map(i => i.id)"))
    for control in ("#pull_all", "#pull_all", "#pull", "#pull_run", "[name=sign][value='-1']"):
        before = drawn(page)
        page.locator(control).click()
        assert drawn(page) != before, control
    before = drawn(page)
    for bad in ("", "-1", "1.5", "1000000"):
        page.fill("#seed", bad)
        assert drawn(page) == before
    page.fill("#seed", "123")
    assert drawn(page) != before


def test_the_tables_show_the_settings(open_page):
    page = open_page()
    for menu in ("#baseline", "#third"):
        page.select_option(menu, "tis")
    for control, value in (("step", "300"), ("drift", "1.5"), ("sigma", "1"), ("tis_cap", "2")):
        page.fill(f"#{control}", value)
    page.get_by_label("for every method").check()
    settle(page)
    flags = {"sigma": 1.0, "tis_cap": 2.0}
    for row, name in enumerate(("deadShare", "ess", "reversedShare"), 1):
        shown = [percent(call(page, name, method, 1.5, **flags)) for method in ("gipo", "tis")]
        assert cells(page, "numbers", row if row < 3 else 4) == shown
    assert cells(page, "numbers", 3) == ["1.65", "2.00"] and percent(0) not in cells(page, "numbers", 4)
    for row, method in enumerate(("gipo", "clip", "tis"), 1):
        kl = simulate(page, method, int(page.input_value("#seed")), 300, kl_coef=0.1, **flags)[1]
        assert cells(page, "run", row)[1] == f"{kl[-1]:.2f}", method
    assert page.locator("#coefficient .band").count() == 2
    page.locator("#drift").press("ArrowRight")
    page.wait_for_function("document.getElementById('lab-status').textContent.startsWith('Drift 1.55')")


@pytest.mark.parametrize("width", [390, 1280])
def test_the_switch_of_the_pull(open_page, width):
    """By keyboard, at a phone's width too: each of the two switches changes what depends on the pull, and no more."""
    page = open_page(width)
    page.fill("#step", "300")
    both = page.get_by_role("switch", name="KL pull").all()
    seed = int(page.input_value("#seed"))
    kl = {kl_coef: f"{simulate(page, 'gipo', seed, 300, kl_coef=kl_coef)[1][-1]:.2f}" for kl_coef in (0, 0.1, 0.2)}
    share = {kl_coef: percent(call(page, "reversedShare", "gipo", 1, kl_coef=kl_coef)) for kl_coef in kl}
    assert len(both) == 2 and len(set(kl.values())) == len(set(share.values())) == 3

    def shows(kl_coef):
        settle(page)
        gipo, clip, unpulled = (cells(page, "run", row) for row in (1, 2, 3))
        assert gipo[1] == kl[kl_coef] and unpulled[1] == kl[0]
        assert cells(page, "numbers", 4) == [share[kl_coef], percent(0)]
        assert [switch.is_checked() for switch in both] == 2 * [kl_coef > 0]
        value = page.locator("#kl_coef").locator("xpath=..").locator(".value").text_content()
        assert value == (f"{kl_coef:.2f}" if kl_coef else "off")
        assert page.locator("#coefficient .band").count() == page.locator("#pull-note:visible").count() == (kl_coef > 0)
        return clip, [cells(page, "numbers", row) for row in (1, 2, 3)], page.locator("#weight").inner_html()

    same = shows(0.1)
    for switch in both:
        assert switch.bounding_box()["x"] >= 0
        switch.focus()
        for kl_coef in (0, 0.1):
            page.keyboard.press("Space")
            assert shows(kl_coef) == same
    page.locator("#sigma").focus()
    for control in ("kl_coef", "pull"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == control
    page.keyboard.press("Space")
    page.wait_for_function("document.getElementById('lab-status').textContent.includes('KL pull off')")
    page.fill("#kl_coef", "0.2")  # moving it switches it on
    assert shows(0.2) == same
    page.locator("#pull_run").click()
    page.wait_for_function("document.getElementById('run-status').textContent.includes('Step 300')")
    assert shows(0) == same


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_access_and_layout(open_page, scheme):
    """What a screen reader and a narrow screen need; nothing scrolls sideways, whichever controls are shown."""
    page = open_page(scheme=scheme)
    page.fill("#step", "100")
    for width, method in zip((360, 390, 600, 1000, 1280, 1600), METHODS[1:]):
        page.set_viewport_size({"width": width, "height": 900})
        page.select_option("#baseline", method)
        page.select_option("#third", "plain_is" if method == "clip" else method)
        settle(page)
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), width
        violations = axe.Axe().run(page).response["violations"]
        assert not [v["id"] for v in violations if v["impact"] in ("serious", "critical")], width
    labels = page.locator("main svg[role=img]").evaluate_all("pictures => pictures.map(p => p.ariaLabel)")
    assert labels and all(labels)
