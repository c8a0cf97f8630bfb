"""Makes the console's pictures in the docs: loads a running service through its gateway, and looks at it.

    scripts/screenshots http://127.0.0.1:8000 [--key KEY] [--out DIR] [--load-s S] [--kill PID] [--all]

`--kill` ends that process, an engine's, with SIGKILL once the service is busy, and takes a picture of what the console
shows then. `--all` takes every view at 400, 1000 and 1800 pixels, light and dark, to look through.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from tests.support.browser import browser
from tests.support.lora import save_adapter

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ROOT = Path(__file__).parents[2]
TIMEOUT_MS = 60_000
COLOURS = 256
"""Of a picture's palette: a third of the bytes, and no difference to see."""
SESSION = f"sums-{time.strftime('%H%M%S')}"
"""A new one each time: the id of a session that has ended is not used again."""
ADAPTERS = ("policy", "policy", "critic")
CALLERS = 3
REST = 3.0
"""Pause of a caller after each call while pictures are taken, in times of the call: the browser needs a core, too."""
VIEWS = ("overview", "engines", "calls", "weights", "sessions", "playground")


@dataclass(frozen=True)
class Shot:
    """One picture of the docs."""

    name: str
    view: str
    width: int
    height: int
    scheme: str = "light"


SHOTS = (
    Shot("overview", "overview", 1400, 1250),
    Shot("engines", "engines", 1000, 560, "dark"),
    Shot("calls", "calls", 1000, 420),
    Shot("session", f"sessions/{SESSION}", 1400, 720),
    Shot("playground", "playground", 1400, 760),
    Shot("phone", "overview", 400, 900, "dark"),
)


class Service:
    """A gateway, and what the pictures need from it."""

    def __init__(self, url: str, key: str) -> None:
        self.url, self.key = url, key
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._rest = 0.0
        self._ended = threading.Event()

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=self._headers, timeout=600.0)

    def add_adapters(self) -> None:
        """Adds random adapters for the demo model, one of them in two versions."""
        with self.http() as http, tempfile.TemporaryDirectory() as directory:
            for i, name in enumerate(ADAPTERS):
                files = save_adapter(Path(directory) / str(i), seed=i, scale=0.2 * (i + 1))
                parts = {
                    "config": (files / "adapter_config.json").read_bytes(),
                    "weights": (files / "adapter_model.safetensors").read_bytes(),
                }
                http.put(f"/adapters/{name}", files=parts).raise_for_status()

    def newest(self, adapter: str) -> str:
        """Label of the newest version of an adapter."""
        with self.http() as http:
            return str(http.get("/adapters").raise_for_status().json()["adapters"][adapter]["newest"])

    def add_session(self) -> None:
        """Adds a session with turns that branch."""
        with self.http() as http:
            messages: list[dict[str, Any]] = [{"role": "user", "content": "12+34="}]
            for turn, text in enumerate(("And 112+7=", "440+51=", "700-93=")):
                replies = [self._turn(http, messages, seed=10 * turn + i) for i in range(2 if turn == 1 else 1)]
                messages += [{"role": "assistant", "content": replies[-1]}, {"role": "user", "content": text}]
            self._turn(http, messages, seed=99, model="policy")

    def _turn(self, http: httpx.Client, messages: Sequence[Any], *, seed: int, model: str | None = None) -> str:
        body = {"messages": messages, "model": model, "max_tokens": 12, "logprobs": True, "seed": seed}
        answer = http.post(f"/session/{SESSION}/v1/chat/completions", json=body).raise_for_status().json()
        return str(answer["choices"][0]["message"]["content"])

    @contextlib.contextmanager
    def loaded(self) -> Iterator[None]:
        """Keeps the service busy meanwhile."""
        threads = [threading.Thread(target=self._call, args=(i,), daemon=True) for i in range(CALLERS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._ended.set()
            for thread in threads:
                thread.join(60)

    def rest(self) -> None:
        """Has the callers pause between their calls from now on."""
        self._rest = REST

    def _call(self, number: int) -> None:
        body: dict[str, Any] = {
            "num_samples": 8,
            "adapter_name": ("", "policy", "critic")[number % 3],
            "sampling_params": {"max_tokens": 60 + 60 * number, "ignore_eos": True},
        }
        with self.http() as http:
            for turn in range(1_000_000):
                if self._ended.is_set():
                    return
                prompts = [f"{100 + i}+{turn % 900}=" for i in range(2 * (1 + number))]
                inputs = [{"messages": [{"role": "user", "content": prompt}]} for prompt in prompts]
                began = time.monotonic()
                with contextlib.suppress(httpx.HTTPError):
                    http.post("/sample", json={**body, "inputs": inputs})
                self._ended.wait(self._rest * (time.monotonic() - began))


class Camera:
    """Takes pictures of the console, all with one page: a new one takes seconds while the engines use every core."""

    def __init__(self, started: Browser, service: Service, directory: Path) -> None:
        self._service, self._directory = service, directory
        self._page = started.new_context(locale="en-GB").new_page()
        self._page.set_default_timeout(TIMEOUT_MS)
        if service.key:
            self._page.add_init_script(f"sessionStorage.setItem('twinkle-serve-key', {service.key!r})")
        self._view = ""
        self._show("overview")

    def take(self, shot: Shot, *, whole: bool = False) -> None:
        """Takes one picture, of the window or of the whole page."""
        scheme: Any = shot.scheme
        self._page.set_viewport_size({"width": shot.width, "height": shot.height})
        self._page.emulate_media(color_scheme=scheme)
        if shot.view != self._view:
            self._show(shot.view)
            self._prepare(self._page, shot.view)
        self._page.wait_for_timeout(500)  # an animation frame or two, on a busy machine
        path = self._directory / f"console-{shot.name}.png"
        self._page.screenshot(path=path, full_page=whole)
        shrink(path)
        say(f"{path}  {path.stat().st_size / 1024:.0f} kB")

    def wait_for_loss(self) -> None:
        """Returns once a card shows that its engine is not ready."""
        self._show("engines")
        self._page.locator(".card:not([data-state=ready])").first.wait_for()

    def _show(self, view: str) -> None:
        """Opens a view, and waits for data."""
        from playwright.sync_api import expect

        self._page.goto(f"{self._service.url}/#{view}")
        expect(self._page.locator("#link")).to_have_text("Live", timeout=TIMEOUT_MS)
        self._view = view

    def _prepare(self, page: Page, view: str) -> None:
        """Waits for a view's own data, and fills the playground."""
        if view == "calls":
            page.locator("#call-rows tr").first.wait_for()
        elif view.startswith("sessions/"):
            page.locator("#path .token").first.wait_for()
        elif view == "playground":
            page.fill("#play-prompt", "440+51=")
            page.fill("#play-seed", "7")
            page.fill("#play-temperature", "2")
            page.select_option("#play-b", self._service.newest("critic"))
            page.click("#play-go")
            page.locator(".sample").nth(3).wait_for()
            page.locator(".sample .tokens").first.focus()


def shrink(path: Path) -> None:
    """Writes a picture again, with a palette."""
    from PIL import Image

    with Image.open(path) as picture:
        picture.convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)


def say(text: str) -> None:
    """Prints a step, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def all_shots() -> list[Shot]:
    """Every view in every width and both schemes."""
    return [
        Shot(f"{view}-{width}-{scheme}", f"sessions/{SESSION}" if view == "sessions" else view, width, 900, scheme)
        for view in VIEWS
        for width in (400, 1000, 1800)
        for scheme in ("light", "dark")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/screenshots", description="Makes the console's pictures.")
    parser.add_argument("url", help="of a running gateway on the demo model")
    parser.add_argument("--key", default=os.environ.get("TWINKLE_SERVE_KEY", ""), help="of scope admin, if it has keys")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--load-s", type=float, default=120.0, help="load before the first picture, seconds")
    parser.add_argument("--kill", type=int, metavar="PID", help="an engine's process, to be killed under load")
    parser.add_argument("--all", action="store_true", help="every view, width and scheme")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    service = Service(args.url.rstrip("/"), args.key)
    say("adds adapters")
    service.add_adapters()
    say(f"adds the session {SESSION}")
    service.add_session()
    say("starts Chromium")
    with browser() as started, contextlib.ExitStack() as stack:
        camera = Camera(started, service, args.out)  # before the load: on busy cores it takes minutes
        stack.enter_context(service.loaded())
        say(f"loads the service for {args.load_s:.0f} s, for the charts; --load-s changes that")
        time.sleep(args.load_s)
        service.rest()
        for shot in all_shots() if args.all else SHOTS:
            camera.take(shot, whole=args.all)
        if args.kill is not None:
            say(f"kills the process {args.kill}")
            os.kill(args.kill, signal.SIGKILL)
            camera.wait_for_loss()
            camera.take(Shot("killed", "engines", 1000, 560))


if __name__ == "__main__":
    main()
