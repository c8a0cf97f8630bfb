"""The gateway without Ray: routes, forms of errors, and what a client may not do."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.support.gateway_app import GatewayUnderTest, gateway_app


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayUnderTest]:
    with gateway_app() as made:
        yield made


async def test_a_completion_has_the_tokens_that_a_call_from_python_has(gateway: GatewayUnderTest) -> None:
    """HTTP is another way to the same sampler: a seed means the same samples."""
    body = {"prompt": [1, 2, 3], "max_tokens": 8, "seed": 5, "return_token_ids": True}
    async with gateway.http() as http:
        answer = (await http.post("/v1/completions", json=body)).json()
    expected = gateway.sampler.sample({"input_ids": [1, 2, 3]}, {"max_tokens": 8, "seed": 5}).sequences[0]
    assert answer["choices"][0]["token_ids"] == expected.tokens


def test_the_application_answers_over_sockets(gateway: GatewayUnderTest) -> None:
    """Tests with real clients run it behind a real server."""
    with gateway.served() as url:
        assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
        assert httpx.get(f"{url}/readyz").json()["samplers"]["sampler"]["ready"]
