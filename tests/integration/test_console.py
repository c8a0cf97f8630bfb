"""The console in headless Chromium, against a gateway in this process."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.support.browser import NAMES, browser, find_browser
from tests.support.console_answers import full_hour, many_calls, many_engines
from tests.support.gateway_app import GatewayUnderTest, gateway_app
from tests.support.local_sampler import ENDLESS, QUESTION
from twinkle_serve.errors import TwinkleServeError
from twinkle_serve.gateway.keys import Caller

pytest.importorskip("playwright", reason="Playwright is not installed")
if find_browser() is None:
    pytest.skip(f"no browser is installed; looked for {', '.join(NAMES)}", allow_module_level=True)

from playwright.sync_api import expect

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.nightly

TIMEOUT_MS = 30_000
VIEWS = ("overview", "engines", "calls", "weights", "sessions", "playground")
MARKUP = "<img src=x onerror=\"document.title='broken'\">"
ADMIN, SAMPLE = "an-admin-key-of-the-tests", "a-sample-key-of-the-tests"
EXPECTED = ("Failed to load resource",)  # what Chromium itself logs for a status of 4xx, or no answer


class Opened:
    """A page of the console, and the gateway behind it."""

    def __init__(self, page: Page, gateway: GatewayUnderTest, url: str) -> None:
        self.page, self.gateway, self.url = page, gateway, url
        self.errors: list[str] = []
        page.set_default_timeout(TIMEOUT_MS)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)

    def open(self, view: str = "overview") -> Page:
        """Opens a view, and waits for data."""
        self.page.goto(f"{self.url}/#{view}")
        expect(self.page.locator("#link")).to_have_text("Live")
        return self.page

    def check(self) -> None:
        assert [error for error in self.errors if not error.startswith(EXPECTED)] == []


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    expect.set_options(timeout=TIMEOUT_MS)
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def slow() -> Iterator[tuple[GatewayUnderTest, str]]:
    """A gateway whose samples take a while."""
    with gateway_app(engine_args={"token_latency_s": 0.01}) as gateway, gateway.served() as url:
        yield gateway, url


@pytest.fixture
def opened(chromium: Browser, slow: tuple[GatewayUnderTest, str]) -> Iterator[Opened]:
    """A page on that gateway. Fails the test if a script of the page does."""
    context = chromium.new_context(viewport={"width": 1000, "height": 800})
    made = Opened(context.new_page(), *slow)
    yield made
    made.check()
    context.close()


def overflow(page: Page) -> list[str]:
    """Visible elements that reach beyond the window's right edge, or are wider than it."""
    found: list[str] = page.evaluate(
        """() => [...document.querySelectorAll("body *")]
          .filter((node) => node.checkVisibility() && !node.closest(".hidden, .skip, svg *"))
          .filter((node) => node.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
          .map((node) => `${node.tagName} ${node.id} ${node.className}`)"""
    )
    return found


def fake_answers(page: Page, engines: int) -> dict[str, Any]:
    """Has the page see many engines and an hour of history. The returned status may be changed."""
    status = many_engines(engines)
    page.route("**/status?*", lambda route: route.fulfill(json=status))
    report = full_hour()

    def answer(route: Any) -> None:
        is_first = "since=0" in route.request.url.split("&")[-1]
        route.fulfill(json=report if is_first else {**report, "points": []})

    page.route("**/telemetry?*", answer)
    return status


def test_an_engine_is_drained_and_used_again(opened: Opened) -> None:
    """The card shows each state; what changes the service asks for a confirmation first."""
    status = fake_answers(opened.page, 1)
    engine = status["engines"]["engine-dp0"]
    sent: list[tuple[str, Any]] = []

    def operate(route: Any) -> None:
        operation = route.request.url.rsplit("/", 1)[1]
        sent.append((operation, route.request.post_data_json))
        engine["state"] = {"drain": "drained", "undrain": "ready"}[operation]
        route.fulfill(json={"engine": "engine-dp0", "done": True})

    opened.page.route("**/engines/*", operate)
    page = opened.open("engines")
    card = page.locator(".card")
    expect(card.locator(".badge")).to_contain_text("ready")
    card.get_by_role("button", name="Drain").click()
    page.get_by_role("dialog").get_by_role("button", name="Back").click()
    card.get_by_role("button", name="Drain").click()
    expect(page.locator("#confirm-text")).to_contain_text("No other engine is ready")
    assert sent == []
    page.locator("#confirm-limit").fill("5")
    page.get_by_role("dialog").get_by_role("button", name="Drain").click()
    expect(card.locator(".badge")).to_contain_text("drained")
    assert sent == [("drain", {"engine": "engine-dp0", "timeout_s": 5, "sampler": "sampler"})]
    card.get_by_role("button", name="Undrain").click()
    expect(page.locator("#toast")).to_contain_text("used again")
    expect(card.locator(".badge")).to_contain_text("ready")


def test_an_operation_that_fails_says_why(opened: Opened) -> None:
    """The gateway's message is shown, and the engine can be operated again."""
    page = opened.open("engines")
    drain = page.locator(".card").get_by_role("button", name="Drain")
    drain.click()
    page.get_by_role("dialog").get_by_role("button", name="Drain").click()
    expect(page.locator("#toast")).to_contain_text("the only engine is in this process")
    expect(drain).to_be_enabled()


def test_a_running_call_is_shown_and_cancelled(opened: Opened) -> None:
    """A call has its age, its samples and a button that ends it; its caller gets an error."""
    page = opened.open("calls")
    expect(page.locator("#no-calls")).to_be_visible()
    params = {**ENDLESS, "max_tokens": 1000}
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(opened.gateway.sampler.sample, QUESTION, params, num_samples=3)
        row = page.locator("#call-rows tr")
        expect(row).to_have_count(1)
        expect(row).to_contain_text("0 of 3")
        row.get_by_role("button").click()
        page.get_by_role("dialog").get_by_role("button", name="Cancel the call").click()
        expect(page.locator("#toast")).to_have_text("The call is cancelled.")
        expect(row).to_have_count(0)
        with pytest.raises(TwinkleServeError, match="cancel"):
            call.result(30)


def test_the_playground_shows_the_samples_of_the_seed(opened: Opened) -> None:
    """The tokens on the page are those that a call from Python has, with alternatives for each."""
    page = opened.open("playground")
    page.fill("#play-n", "3")
    page.fill("#play-seed", "7")
    page.fill("#play-max", "12")
    page.click("#play-go")
    samples = page.locator(".sample")
    expect(samples).to_have_count(3)
    expected = opened.gateway.sampler.sample(QUESTION, {"max_tokens": 12, "seed": 7}, num_samples=3).sequences
    for i, sequence in enumerate(expected):
        tokens = samples.nth(i).locator("[role=option]")
        expect(tokens).to_have_count(len(sequence.tokens))
    samples.first.locator(".tokens").focus()
    page.keyboard.press("ArrowRight")
    info = page.locator("#token-info")
    expect(info).to_contain_text(f"token {expected[0].tokens[1]}")
    expect(info.locator("tr")).to_have_count(5)
    page.keyboard.press("Escape")
    expect(info).to_be_hidden()
    samples.first.locator("[role=option]").nth(2).hover()
    expect(info).to_contain_text(f"token {expected[0].tokens[2]}")


def test_the_playground_compares_and_continues(opened: Opened) -> None:
    """Two weights stand side by side, their first difference marked; a conversation goes on with a sample."""
    page = opened.open("playground")
    page.fill("#play-n", "2")
    page.fill("#play-seed", "7")
    page.select_option("#play-b", "")
    page.click("#play-go")
    expect(page.locator(".sample")).to_have_count(4)
    expect(page.locator(".sample").first).to_contain_text("both are equal")
    page.get_by_role("button", name="Continue with A: sample 2").click()
    expect(page.locator("#play-history li")).to_have_count(2)
    expect(page.locator("#play-prompt")).to_be_focused()
    page.fill("#play-prompt", "And then?")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#play-state")).to_contain_text("4 samples in")
    assert len(opened.gateway.client.requests[-1].inputs[0]["messages"]) == 3


def test_the_playground_compares_engines(opened: Opened) -> None:
    """Each side names its weights and its engine."""
    page = opened.open("playground")
    page.fill("#play-seed", "7")
    page.select_option("#play-engine-a", "local")
    expect(page.locator("#play-engine-b")).to_be_disabled()
    page.select_option("#play-b", "")
    expect(page.locator("#play-engine-b")).to_be_enabled()
    page.click("#play-go")
    expect(page.locator(".sample")).to_have_count(4)
    expect(page.locator(".sample").last).to_contain_text("local")
    assert sorted(request.engine for request in opened.gateway.client.requests[-2:]) == ["", "local"]


def test_text_of_the_model_is_never_html(opened: Opened) -> None:
    """Markup in a sample is shown as it is, and does nothing."""
    page = opened.open("playground")

    def decode(route: Any) -> None:
        route.fulfill(json={"text": [MARKUP for _ in route.request.post_data_json["token_ids"]]})

    page.route("**/decode", decode)
    page.fill("#play-max", "2")
    page.click("#play-go")
    expect(page.locator(".sample [role=option]").first).to_have_text(MARKUP)
    assert page.locator("main img").count() == 0 and page.title() == "Playground · Twinkle Serve"


def test_a_trajectory_is_a_tree_with_its_tokens(opened: Opened) -> None:
    """Turns stand in their order, branches further in; sampled tokens are told from given ones."""
    url = f"{opened.url}/session/a tree/v1/chat/completions"
    first: dict[str, Any] = {**QUESTION, "max_tokens": 6, "logprobs": True, "seed": 3}
    reply = httpx.post(url, json=first, timeout=60).json()["choices"][0]["message"]
    later = [
        *QUESTION["messages"],
        {"role": "assistant", "content": reply["content"]},
        {"role": "user", "content": "?"},
    ]
    for seed in (4, 5):
        httpx.post(url, json={**first, "messages": later, "seed": seed}, timeout=60).raise_for_status()
    page = opened.open("sessions")
    page.get_by_role("link", name="a tree").click()
    turns = page.locator("#tree button")
    expect(turns).to_have_count(3)
    levels = page.locator("#tree li").evaluate_all("nodes => nodes.map((node) => node.dataset.level)")
    tree = httpx.get(f"{opened.url}/session/a tree/trajectory").json()
    assert levels == (["0", "1", "1"] if tree["nodes"][1]["parent"] == 0 else ["0", "0", "0"])
    turns.first.focus()
    page.keyboard.press("ArrowDown")
    expect(page.locator("#h-path")).to_have_text("Path to turn 1")
    path = [tree["nodes"][i] for i in (0, 1) if i == 1 or tree["nodes"][1]["parent"] == 0]
    expect(page.locator("#path .token")).to_have_count(sum(len(node["token_ids"]) for node in path))
    sampled = sum(node["sampled"][1] - node["sampled"][0] for node in path)
    expect(page.locator("#path .token.sampled.v0")).to_have_count(sampled)
    page.fill("#session-id", "no such session")
    page.click("#session-form button")
    expect(page.locator("#session-empty")).to_contain_text("there is no session")


def test_the_page_asks_for_a_key(chromium: Browser) -> None:
    """A wrong key is refused with a message, a key of scope sample shows less, and a key ends with its tab."""
    keys = {ADMIN: Caller("ops", "admin"), SAMPLE: Caller("eval", "sample")}
    with gateway_app(keys=keys) as gateway, gateway.served() as url:
        context = chromium.new_context()
        opened = Opened(context.new_page(), gateway, url)
        page = opened.page
        page.goto(f"{url}/#calls")
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("This service asks for a key.")
        page.fill("#key", "a-wrong-key-of-the-tests")
        page.keyboard.press("Enter")
        expect(dialog).to_contain_text("unknown key")
        page.fill("#key", SAMPLE)
        page.keyboard.press("Enter")
        expect(page.locator("#link")).to_have_text("Live")
        expect(page.locator("#calls-problem")).to_contain_text("another scope")
        page.get_by_role("link", name="Engines").click()
        page.locator(".card").get_by_role("button", name="Drain").click()
        page.locator("#confirm-yes").click()
        expect(dialog).to_contain_text("needs admin")
        assert gateway.sampler.status()["engines"]["local"]["state"] == "ready"
        page.fill("#key", ADMIN)
        page.keyboard.press("Enter")
        page.get_by_role("link", name="Calls").click()
        expect(page.locator("#no-calls")).to_be_visible()
        expect(page.locator("#calls-problem")).to_be_empty()
        page.reload()
        expect(page.locator("#link")).to_have_text("Live")
        assert page.evaluate("localStorage.length") == 0 and page.context.cookies() == []
        other = context.new_page()
        other.goto(url)
        expect(other.get_by_role("dialog")).to_be_visible()
        opened.check()
        context.close()


def test_a_lost_connection_comes_back(opened: Opened) -> None:
    """A banner says since when, the figures stay, and nothing has to be reloaded."""
    page = opened.open("engines")
    page.context.set_offline(True)
    banner = page.get_by_role("alert").filter(has_text="Connection lost")
    expect(banner).to_be_visible()
    expect(page.locator(".card .badge")).to_contain_text("ready")
    expect(page.locator("#link")).to_have_text("Lost")
    page.context.set_offline(False)
    expect(page.locator("#banner")).to_have_text("Connected again.")
    expect(page.locator("#link")).to_have_text("Live")
    expect(page.locator("#banner")).to_be_hidden()


def test_a_sampler_that_is_not_there_is_told_from_a_lost_gateway(chromium: Browser) -> None:
    """While the sampler starts, the page says so and goes on asking."""
    with gateway_app(starting=("sampler",)) as gateway, gateway.served() as url:
        page = chromium.new_page()
        page.goto(url)
        expect(page.locator("#banner")).to_contain_text("is starting, or is not deployed")
        assert gateway.is_idle()
        page.close()


def test_a_hundred_engines_stay_where_they_are(opened: Opened) -> None:
    """Polls change the figures of cards, not the cards; filters find one among many."""
    status = fake_answers(opened.page, 100)
    page = opened.open("engines")
    cards = page.locator(".card")
    expect(cards).to_have_count(100)
    page.evaluate("document.querySelectorAll('.card').forEach((card, i) => (card.mark = i))")
    status["engines"]["engine-dp3"] |= {"state": "dead", "last_failure": "it was killed"}
    status["engines"]["engine-dp4"]["tokens_per_s"] = 7654.0
    card = page.locator("[data-engine=engine-dp3]")
    expect(card.locator(".badge")).to_contain_text("dead")
    expect(card).to_contain_text("it was killed")
    expect(page.locator("[data-engine=engine-dp4] .speed")).to_contain_text("7,654")
    expect(page.locator("#live")).to_have_text("engine-dp3 is dead")
    assert page.evaluate("[...document.querySelectorAll('.card')].every((card, i) => card.mark === i)")
    page.fill("#engine-name", "dp9")
    expect(cards).to_have_count(11)
    page.select_option("#engine-filter", "dead")
    expect(cards).to_have_count(0)
    page.fill("#engine-name", "")
    expect(page.locator("[data-engine=engine-dp3]")).to_be_visible()


def test_charts_have_their_figures_as_text(opened: Opened) -> None:
    """Each chart describes itself, has a table, and shows the values of a time that the keyboard chooses."""
    fake_answers(opened.page, 2)
    page = opened.open()
    charts = page.locator(".chart svg")
    expect(charts).to_have_count(6)
    for label in charts.evaluate_all("nodes => nodes.map((node) => node.getAttribute('aria-label'))"):
        assert "60 minutes" in label and "highest" in label
    page.locator("#cursor").focus()
    page.keyboard.press("Home")
    expect(page.locator("#cursor-time")).not_to_have_text("now")
    page.keyboard.press("End")
    expect(page.locator("#cursor-time")).to_have_text("now")
    page.locator(".chart summary").first.click()
    expect(page.locator(".chart table").first.locator("tbody tr")).to_have_count(12)
    page.get_by_role("checkbox", name="Weights").uncheck()
    expect(page.locator("#events li")).to_have_count(2)


def test_a_hidden_tab_does_not_poll(opened: Opened) -> None:
    """No request while nobody looks, and new figures at once when somebody does."""
    page = opened.open()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    hide = "(hidden) => { Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});"
    hide += " document.dispatchEvent(new Event('visibilitychange')); }"
    page.evaluate(hide, True)
    page.evaluate("new Promise((resolve) => setTimeout(resolve, 4000))")  # longer than the time between two polls
    assert asked == []
    with page.expect_response("**/status?*"):
        page.evaluate(hide, False)


@pytest.mark.parametrize("width", [400, 1000, 1800])
def test_nothing_is_cut_off(opened: Opened, width: int) -> None:
    """No view is wider than the window, with many engines and with samples."""
    page = opened.page
    fake_answers(page, 40)
    page.route("**/calls?*", lambda route: route.fulfill(json=many_calls(3)))
    page.set_viewport_size({"width": width, "height": 900})
    for view in VIEWS:
        opened.open(view)
        if view == "calls":
            expect(page.locator("#call-rows tr")).to_have_count(3)
        if view == "playground":
            page.click("#play-go")
            expect(page.locator(".sample")).to_have_count(2)
        assert overflow(page) == [], view


def test_everything_can_be_done_by_keyboard(opened: Opened) -> None:
    """From the top of the page to a sample's tokens without a mouse; the focus is visible on the way."""
    page = opened.open()
    page.keyboard.press("Tab")
    expect(page.locator("#skip")).to_be_focused()
    for _ in range(6):
        page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Playground")).to_be_focused()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    expect(page.locator("#view-playground")).to_be_visible()
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "play-go":
            break
    page.keyboard.press("Enter")
    expect(page.locator(".sample")).to_have_count(2)
    for _ in range(6):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className") == "tokens":
            break
    expect(page.locator("#token-info")).to_be_visible()


def test_every_control_has_a_name(opened: Opened) -> None:
    """Screen readers name each control and landmark."""
    fake_answers(opened.page, 3)
    page = opened.open()
    for view in VIEWS:
        opened.open(view)
        snapshot = page.locator("body").aria_snapshot()
        for role in ("button", "textbox", "combobox", "spinbutton", "searchbox", "slider", "meter", "link", "img"):
            assert not [line for line in snapshot.splitlines() if line.strip() in (f"- {role}", f"- {role}:")], view
        assert page.get_by_role("main").count() == page.get_by_role("navigation").count() == 1
