"""docs/index.html in headless Chromium: its mathematics against the scripts' losses, its controls, its layout."""

import math
import shutil
from types import SimpleNamespace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from harness import ROOT
from scipy.stats import norm

import gipo_continuous
import gipo_minigrid_vision
import ppo_baseline
from benchmark import variants

playwright = pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the page's tests need axe-playwright-python")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="the page's tests need chromium or google-chrome")
pytestmark = [needs_chromium, pytest.mark.slow]

PAGE = (ROOT / "docs" / "index.html").as_uri()
METHODS = ["gipo", "clip", "dual_clip", "sapo", "tis", "spo", "plain_is"]
SETTINGS = [  # method, flags; no grid point lies on an edge of a band, where rounding decides
    ("plain_is", {}),
    *[("gipo", {"sigma": sigma}) for sigma in (0.1, 0.5, 3.0)],
    *[("clip", {"clip_coef": eps}) for eps in (0.05, 0.2, 0.6)],
    *[("dual_clip", {"clip_coef": eps, "dual_clip": cap}) for eps, cap in ((0.2, 3.0), (0.5, 1.4), (0.6, 6.0))],
    *[("sapo", {"sapo_tau": tau, "sapo_tau_neg": neg}) for tau, neg in ((1.0, 1.05), (0.25, 4.0))],
    *[("tis", {"tis_cap": cap}) for cap in (0.5, 1.0, 5.0)],
    *[("spo", {"spo_eps": eps}) for eps in (0.05, 0.2, 0.6)],
]
MINUS = "\N{MINUS SIGN}"
GRID = [-100.0, -20.5, *np.linspace(-5, 5, 201).tolist(), 19.5, 20.5, 100.0]


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
        if not compare:  # the table of a hundred seeds, which takes long after each change of a control
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


def ends(page, method, noise=3, **flags):
    """Gain, KL, KL a hundred steps before, and silent share at the end of gipo.bandit, for the table's 100 seeds."""
    script = """([method, noise, flags]) => Array.from({ length: 100 }, (_, i) => {
      const run = gipo.bandit(method, i + 1, { ...gipo.DEFAULTS, ...flags }, noise);
      return [run.gain.at(-1), run.kl.at(-1), run.kl.at(-101), run.dead.at(-1)];
    })"""
    return np.array(page.evaluate(script, [method, noise, flags])).T


def gradient(start, logprobs, actions, mu, advantages, method, **flags):
    """Of the whole loss in a script's `update`; logprobs(start)[actions] and mu are log-probabilities of samples."""
    parameter, zeros = torch.tensor(start, requires_grad=True), torch.zeros(len(actions))
    agent = SimpleNamespace(
        get_action_and_value=lambda obs, actions: (None, logprobs(parameter)[actions].unsqueeze(1), zeros, zeros),
        parameters=lambda: [parameter],
    )
    args = variants.Variant(method=method, kl_to="behaviour", norm_adv=False, max_grad_norm=math.inf, **flags)
    script, mu = gipo_continuous if method == "gipo" else ppo_baseline, mu.unsqueeze(1)
    optimizer = torch.optim.SGD([parameter])
    found = []
    optimizer.register_step_pre_hook(lambda *_: found.append(parameter.grad.numpy().copy()))
    script.update(agent, optimizer, None, actions, mu, mu, advantages, zeros, args)
    return found[0]


def coefficients(method, logratio, sign, **flags):
    """c of each log-ratio, where the gradient is -c A / n."""
    n = len(logratio)
    samples = torch.arange(n), torch.zeros(n), torch.full((n,), float(sign))
    return -gradient(logratio, lambda parameter: parameter, *samples, method, **flags) * n / sign


def percent(share):
    return f"{100 * share:.1f} %".replace("-", MINUS)


def settle(page):
    """Wait for the frame in which the page draws what has changed."""
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def cells(page, table, row):
    return page.locator(f"#{table} tbody tr:nth-child({row}) td").all_text_contents()


def says(page, status, text):
    page.wait_for_function("([id, text]) => document.getElementById(id).textContent.includes(text)", arg=[status, text])


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


# ------------------------------------------------ what the text says ------------------------------------------------
def test_defaults_flags_and_numbers_in_the_text(open_page):
    page, args, continuous = open_page(), gipo_minigrid_vision.Minigrid(), gipo_continuous.Continuous()
    defaults = page.evaluate("gipo.DEFAULTS")
    for control in page.locator(".curves-area input[type=range]").all():
        name = control.get_attribute("id")
        assert float(control.input_value()) == defaults["clip_coef" if name == "eps" else name]
    assert page.get_by_role("switch").evaluate_all("switches => switches.every(s => s.checked)")
    assert defaults.pop("kl_coef") == args.kl_coef == 0.1
    text, clip = " ".join(page.inner_text("main").split()), ppo_baseline.Continuous()
    assert f"0.1, or {continuous.kl_coef} in continuous control" in text and ppo_baseline.Minigrid().kl_coef == 0
    assert f"For PPO-clip it is 0, or {clip.kl_coef} in continuous control" in text
    assert defaults == {flag: getattr(variants.Variant(), flag) for flag in defaults}
    assert (args.sigma, args.kl_to) == (defaults["sigma"], "current")
    flags = [code.split() for code in page.locator("code").all_text_contents() if code.startswith("--")]
    assert flags == [["--ratio", "dimension"], ["--kl-coef"], ["--kl-to", "behaviour"], ["--kl-to", "current"]]
    for flag, *value in flags:
        assert {*value} <= {*get_args(get_type_hints(type(continuous))[flag[2:].replace("-", "_")])}

    numbers = [f"{100 * weight:.0f} %" for weight in call(page, "weight", "gipo", [0.5, 1.0, 1.5], 1)]
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
    pulled_gain, pulled_kl, pulled_earlier, pulled_dead = pulled = ends(page, "gipo")
    assert gain["clip"].mean() < gain["gipo"].mean()
    assert 0.25 < dead["gipo"].mean() < dead["clip"].mean()
    assert (pulled_kl < kl["gipo"]).all() and pulled_dead.mean() < 0.001
    assert pulled_kl.mean() > 10 * max(kl["clip"].mean(), kl["spo"].mean())
    for method in ("sapo", "tis", "plain_is"):  # the pull settles them too, further out
        assert gain["gipo"].mean() < gain[method].mean() and gain[method].min() < 2 * gain["gipo"].min() < 0
        assert ends(page, method, noise=6, kl_coef=0)[0].min() < gain[method].min()
        _, all_kl, all_earlier, _ = ends(page, method)
        assert (all_kl - all_earlier).mean() < 0.2 * (kl[method] - earlier[method]).mean()
        assert all_kl.mean() > 2 * pulled_kl.mean()
    text = " ".join(page.inner_text("#bandit-title ~ .cards >> nth=1").split())
    for sentence in (
        f"Its mean drift is {kl['gipo'].mean():.2f} after 300 steps.",
        f"The last hundred steps alone add {(kl['gipo'] - earlier['gipo']).mean():.2f}.",
        f"it is {pulled_kl.mean():.2f}, and the last hundred steps add {(pulled_kl - pulled_earlier).mean():.2f}.",
        f"the mean gain falls from {100 * gain['gipo'].mean():.0f} % to {100 * pulled_gain.mean():.0f} %.",
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
    """By gradient steps of size 0.5 on the 64 samples, whose advantages matter as sums over an arm and a sign."""
    batch = functions.evaluate("collect(5, 3)")
    groups = [(arm, group) for arm, signs in enumerate(batch["groups"]) for group in signs]
    samples = [(arm, group["advantages"] / group["count"]) for arm, group in groups for _ in range(group["count"])]
    actions, advantages = map(torch.tensor, zip(*samples))
    mu, values = torch.tensor(batch["mu"]).log(), np.array(batch["values"])
    start = values @ batch["mu"]
    assert len(actions) == 64
    for kl_coef in (0.0, 0.1, 0.3):
        run = call(functions, "bandit", method, 5, kl_coef=kl_coef)
        assert run["gain"][0] == 0 and run["kl"][0] == pytest.approx(0)
        for step in (0, 40, 200, 299):
            logits, after = np.log(run["policy"][step]), np.array(run["policy"][step + 1])
            samples = actions, mu[actions], advantages
            logits -= 0.5 * gradient(logits, lambda x: x.log_softmax(0), *samples, method, kl_coef=kl_coef)
            np.testing.assert_allclose(after, np.exp(logits) / np.exp(logits).sum(), rtol=1e-9)
            assert run["kl"][step + 1] == pytest.approx((mu.exp() @ (mu - torch.tensor(after).log())).item())
            assert run["gain"][step + 1] == pytest.approx((values @ after - start) / (values[-1] - start))


def test_play_pause_restart(open_page):
    moving, page = open_page(motion="no-preference"), open_page()
    for one in (moving, page):
        assert one.input_value("#step") == "0"
        one.locator("#arms").scroll_into_view_if_needed()
    moving.wait_for_function("document.getElementById('step').value > 3")  # plays by itself, once in view
    page.wait_for_timeout(300)
    assert page.input_value("#step") == "0"
    page.get_by_role("button", name="Play").click()
    page.wait_for_function("document.getElementById('step').value > 5")
    page.get_by_role("button", name="Pause").click()
    paused, drawn = page.input_value("#step"), page.locator("#gain").inner_html()
    page.wait_for_timeout(200)
    assert page.input_value("#step") == paused != "300"
    page.get_by_role("button", name="Restart").click()
    assert page.input_value("#step") == "0" and page.locator("#gain").inner_html() != drawn
    page.fill("#step", "295")
    page.get_by_role("button", name="Play").click()
    says(page, "run-status", "Step 300: GIPO")


# ------------------------------------------------ controls, layout, access ------------------------------------------
def choose(page, method):
    page.select_option("#baseline", method)
    page.select_option("#third", "plain_is" if method == "clip" else method)


def test_every_control_changes_the_page(open_page):
    page = open_page()
    page.fill("#step", "300")  # where every setting has left its mark

    def changes(act, *args):
        script = "[...document.querySelectorAll('main svg, #numbers, #run')].map(e => e.innerHTML).join()"
        settle(page)
        before = page.evaluate(script)
        act(*args)
        settle(page)
        return page.evaluate(script) != before

    moved = set()
    for method in METHODS[1:]:
        choose(page, method)
        for slider in page.locator("input[type=range]:visible").all():
            if (name := slider.get_attribute("id")) not in moved:
                moved.add(name)
                assert changes(slider.press, "Home") and changes(slider.press, "End"), name
                assert float(slider.locator("xpath=..").locator(".value").text_content()) == float(slider.input_value())
    assert moved == set(page.locator("input[type=range]").evaluate_all("inputs => inputs.map(i => i.id)"))
    for control in ("#pull_all", "#pull_all", "#pull", "#pull_run", "[name=sign][value='-1']"):
        assert changes(page.click, control), control
    assert not any(changes(page.fill, "#seed", bad) for bad in ("", "-1", "1.5", "1000000"))
    assert changes(page.fill, "#seed", "123")


def test_the_tables_show_the_settings(open_page):
    page, flags = open_page(), {"sigma": 1.0, "tis_cap": 2.0}
    choose(page, "tis")
    for control, value in (("step", 300), ("drift", 1.5), *flags.items()):
        page.fill(f"#{control}", f"{value:g}")
    page.get_by_label("for every method").check()
    settle(page)
    for row, name in ((1, "deadShare"), (2, "ess"), (4, "reversedShare")):
        assert cells(page, "numbers", row) == [percent(call(page, name, m, 1.5, **flags)) for m in ("gipo", "tis")]
    assert cells(page, "numbers", 3) == ["1.65", "2.00"]
    for row, method in enumerate(("gipo", "clip", "tis"), 1):
        run = call(page, "bandit", method, int(page.input_value("#seed")), **flags)
        ends = [percent(run["gain"][-1]), f"{run['kl'][-1]:.2f}", percent(run["dead"][-1])]
        assert cells(page, "run", row) == ends, method
    assert page.locator("#coefficient .band").count() == 2


@pytest.mark.parametrize("width", [390, 1280])
def test_the_switch_of_the_pull(open_page, width):
    """By keyboard, at a phone's width too: each of the two switches changes what depends on the pull, and no more."""
    page = open_page(width)
    page.fill("#step", "300")
    seed, both = int(page.input_value("#seed")), page.get_by_role("switch", name="KL pull").all()
    assert len(both) == 2

    def shows(kl_coef):
        settle(page)
        gipo, *others = (cells(page, "run", row) for row in (1, 2, 3))
        assert gipo[1] == f"{call(page, 'bandit', 'gipo', seed, kl_coef=kl_coef)['kl'][-1]:.2f}"
        *rest, reversed_share = (cells(page, "numbers", row) for row in (1, 2, 3, 4))
        assert reversed_share == [percent(call(page, "reversedShare", "gipo", 1, kl_coef=kl_coef)), percent(0)]
        assert [switch.is_checked() for switch in both] == 2 * [kl_coef > 0]
        value = page.locator("#kl_coef").locator("xpath=..").locator(".value").text_content()
        assert value == (f"{kl_coef:.2f}" if kl_coef else "off")
        assert page.locator("#coefficient .band").count() == page.locator("#pull-note:visible").count() == (kl_coef > 0)
        return gipo[1], (others, rest, page.locator("#weight").inner_html())

    pulled, same = shows(0.1)
    for switch in both:
        switch.focus()
        page.keyboard.press("Space")
        unpulled = shows(0)
        assert unpulled[0] != pulled and unpulled[1] == same
        page.keyboard.press("Space")
        assert shows(0.1) == (pulled, same)
    page.locator("#sigma").focus()
    for control in ("kl_coef", "pull"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == control
    page.keyboard.press("Space")
    says(page, "lab-status", "KL pull off")
    page.fill("#kl_coef", "0.2")  # moving it switches it on
    assert shows(0.2)[1] == same


@pytest.mark.parametrize(("scheme", "width"), [("light", 390), ("dark", 1280)])
def test_access_and_layout(open_page, scheme, width):
    """A screen reader finds its labels; nothing scrolls sideways, whichever controls are shown."""
    page = open_page(width, scheme)
    choose(page, "sapo")
    page.fill("#step", "100")
    settle(page)
    violations = axe.Axe().run(page).response["violations"]
    assert not [v["id"] for v in violations if v["impact"] in ("serious", "critical")]
    labels = page.locator("main svg[role=img]").evaluate_all("pictures => pictures.map(p => p.ariaLabel)")
    assert labels and all(labels)
    for method, narrow in zip(METHODS[1:], (360, 390, 600, 800, 1000, 1600)):
        page.set_viewport_size({"width": narrow, "height": 900})
        choose(page, method)
        settle(page)
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), narrow
