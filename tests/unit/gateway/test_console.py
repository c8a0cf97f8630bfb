"""The console's files and their headers; they load nothing from other hosts."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.support.gateway_app import GatewayUnderTest, gateway_app
from twinkle_serve.gateway.console import DIRECTORY, FILES
from twinkle_serve.gateway.keys import Caller

MAX_BYTES = 200_000
REFERENCE = re.compile(r"""(?:href|src)="(?!#)([^"]+)"|(?:from|import)\s+"([^"]+)"|url\(([^)]+)\)""")
NAMESPACE = "http://www.w3.org/2000/svg"


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayUnderTest]:
    with gateway_app(keys={"a-key-of-the-tests": Caller("tests", "admin")}) as made:
        yield made


async def test_the_page_and_its_files_need_no_key(gateway: GatewayUnderTest) -> None:
    """The page asks for the key; everything that it shows needs one."""
    async with gateway.http() as http:
        for path in FILES:
            answer = await http.get(path)
            assert answer.status_code == 200, path
            assert answer.content == FILES[path].read_bytes()
            assert (await http.head(path)).content == b""
        for path in ("/status", "/telemetry", "/calls", "/sessions", "/console/other.js", "/console/../status"):
            assert (await http.get(path)).status_code == 401, path


async def test_the_page_runs_its_own_scripts_alone(gateway: GatewayUnderTest) -> None:
    """No inline script or style, no other origin, no frame around it."""
    async with gateway.http() as http:
        for path in FILES:
            headers = (await http.get(path)).headers
            policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
            assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
            assert {policy[name] for name in ("script-src", "style-src", "img-src", "connect-src")} == {"'self'"}
            assert headers["x-content-type-options"] == "nosniff"
        assert (await http.get("/")).headers["content-type"].startswith("text/html")
        assert (await http.get("/console/app.js")).headers["content-type"].startswith("text/javascript")
    page = FILES["/"].read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|javascript:", page)


def test_the_files_are_small() -> None:
    """The whole console is below 200 kB, uncompressed."""
    assert sum(file.stat().st_size for file in DIRECTORY.iterdir()) < MAX_BYTES


def test_every_reference_is_a_file_of_the_console() -> None:
    """Nothing is fetched from elsewhere, and nothing is missing."""
    names = {file.name for file in DIRECTORY.iterdir()}
    assert {file.name for file in FILES.values()} == names
    used = set()
    for file in DIRECTORY.iterdir():
        text = file.read_text()
        assert not re.search(r"https?://|//cdn|@import", text.replace(NAMESPACE, "")), file.name
        for found in REFERENCE.finditer(text):
            reference = next(filter(None, found.groups())).removeprefix("./").removeprefix("console/")
            assert reference in names, (file.name, reference)
            used.add(reference)
    assert used == names - {"index.html"}


def test_text_never_becomes_html() -> None:
    """Samples and names are shown by text nodes: no script of the console can parse HTML."""
    for file in DIRECTORY.glob("*.js"):
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", file.read_text()
        )
