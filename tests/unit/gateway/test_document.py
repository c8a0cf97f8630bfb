"""The OpenAPI document: what it says of each route is so, whatever is sent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks

from tests.support.gateway_app import GatewayUnderTest, gateway_app
from twinkle_serve.gateway.app import build_app
from twinkle_serve.gateway.config import GatewayArgs
from twinkle_serve.gateway.context import GatewayContext
from twinkle_serve.gateway.keys import Keys
from twinkle_serve.gateway.samplers import Samplers
from twinkle_serve.routing.api import RouterAPI

CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
]
LATE = 504
"""Status of a request whose own deadline passed: some of those that are made up have a very short one."""
SETTINGS = settings(
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayUnderTest]:
    with gateway_app() as made:
        yield made


@pytest.fixture(scope="module")
def document(gateway: GatewayUnderTest) -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", gateway.app)


def operations() -> list[tuple[str, str]]:
    """Path and method of each route."""
    app = build_app(GatewayContext(GatewayArgs(), Keys({}), Samplers({"sampler": "sampler"}, Mock())))
    return [(path, method) for path, methods in app.openapi()["paths"].items() for method in methods]


def takes_input(document: Any, path: str, method: str) -> bool:
    """Whether a request can be invalid: of a path alone, every value is valid."""
    described = document.raw_schema["paths"][path][method]
    return "requestBody" in described or any(each["in"] == "query" for each in described.get("parameters", ()))


@pytest.mark.parametrize("examples", [5, pytest.param(200, marks=pytest.mark.nightly)])
@pytest.mark.parametrize(("path", "method"), operations())
def test_every_answer_is_as_the_document_says(
    gateway: GatewayUnderTest, document: Any, path: str, method: str, examples: int
) -> None:
    """Valid and invalid requests: no 5xx; statuses, media types and schemas as documented; nothing invalid is taken."""
    operation = document[path][method.upper()]
    modes = list(GenerationMode) if takes_input(document, path, method) else [GenerationMode.POSITIVE]
    for mode in modes:

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(SETTINGS, max_examples=examples)
        def answers(case: Any) -> None:
            response = case.call()
            assert response.status_code < 500 or response.status_code == LATE, response.text
            case.validate_response(response, checks=CHECKS)
            if path == "/pause" and response.status_code == 200:
                resume(gateway, response.json()["pause"])

        answers()


def resume(gateway: GatewayUnderTest, pause: int) -> None:
    client = gateway.sampler._client
    client.loop.call(client.call(10.0, RouterAPI.resume, pause))


def test_the_document_describes_every_answer(gateway: GatewayUnderTest) -> None:
    """Each route has a schema of its answer, and that of its protocol's errors."""
    for path, methods in gateway.app.openapi()["paths"].items():
        for method, operation in methods.items():
            statuses = set(operation["responses"])
            assert {"4XX", "5XX"} <= statuses and "422" not in statuses, (method, path)
            assert operation["summary"] and operation["tags"], (method, path)
