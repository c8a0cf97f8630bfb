"""Native HTTP: the calls of a sampler object, with the same results."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load, save

from tests.support.gateway_app import GatewayUnderTest, gateway_app
from twinkle_serve import hub
from twinkle_serve.data_format import SampleResponse
from twinkle_serve.gateway.native import read_samples

TENSORS = {"accept": "application/octet-stream"}
LINES = {"accept": "application/x-ndjson"}
QUESTIONS = [{"messages": [{"role": "user", "content": f"{a}+{a}="}]} for a in (12, 34, 56)]
PARAMS = {"max_tokens": 6, "seed": 3}


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayUnderTest]:
    with gateway_app() as made:
        yield made


async def post(gateway: GatewayUnderTest, path: str, body: Any, headers: dict[str, str] | None = None) -> Any:
    """The JSON of an answer, or its bytes, as `headers` ask for."""
    async with gateway.http() as http:
        answer = await http.post(path, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json() if headers is None else answer.content


def everything(response: SampleResponse) -> Any:
    """All that a sampler's response says, as plain values."""
    return [
        {
            "prompt": part.prompt_token_ids,
            "index": part.prompt_index,
            "scores": (part.prompt_logprobs, part.topk_prompt_logprobs),
            "sequences": [
                {
                    "tokens": each.tokens,
                    "logprobs": each.logprobs,
                    "decoded": each.decoded,
                    "whole_text": each.whole_text,
                    "stop_reason": each.stop_reason,
                    "seed": each.seed,
                    "engine": each.engine,
                    "adapter": each.adapter,
                    "versions": each.weight_versions,
                    "mask": each.sampling_mask
                    and (each.sampling_mask.counts.tolist(), each.sampling_mask.tokens.tolist()),
                    "feature": each.new_input_feature,
                }
                for each in part.sequences
            ],
        }
        for part in response
    ]


CALLS: dict[str, dict[str, Any]] = {
    "plain": {"inputs": QUESTIONS, "sampling_params": PARAMS, "num_samples": 2},
    "one input": {"inputs": {"input_ids": [1, 2, 3]}, "sampling_params": PARAMS},
    "text": {"inputs": {"text": "12+34="}, "sampling_params": PARAMS},
    "no logprobs": {"inputs": QUESTIONS, "sampling_params": PARAMS, "logprobs": None},
    "no seed": {"inputs": QUESTIONS, "sampling_params": {"max_tokens": 3, "temperature": 0}},
    "parameters of each": {
        "inputs": QUESTIONS,
        "sampling_params": [
            {**PARAMS, "logprobs": 3, "prompt_logprobs": 2, "num_samples": 2},
            {**PARAMS, "logprobs": None},
            {**PARAMS, "prompt_logprobs": 4, "prompt_logprobs_start": 3, "top_k": 5, "return_sampling_mask": True},
        ],
    },
    "special tokens": {
        "inputs": QUESTIONS,
        "sampling_params": {**PARAMS, "max_tokens": 99, "skip_special_tokens": True},
    },
    "named tokens": {"inputs": QUESTIONS, "sampling_params": {**PARAMS, "logprob_token_ids": [5, 6]}},
    "biased": {"inputs": QUESTIONS, "sampling_params": {**PARAMS, "logit_bias": {"7": 99}, "stop_token_ids": [9]}},
    "continued": {
        "inputs": [{"messages": [*QUESTIONS[0]["messages"], {"role": "assistant", "content": "4"}]}],
        "sampling_params": PARAMS,
        "continue_final_message": True,
    },
}


def called(gateway: GatewayUnderTest, body: dict[str, Any]) -> SampleResponse:
    """The response of the same call from Python."""
    params = body.get("sampling_params")
    if isinstance(params, dict) and "logit_bias" in params:
        params = {**params, "logit_bias": {int(key): value for key, value in params["logit_bias"].items()}}
    options = {key: value for key, value in body.items() if key not in ("inputs", "sampling_params")}
    return gateway.sampler.sample(body["inputs"], params, **options)


@pytest.mark.parametrize("name", CALLS)
async def test_a_response_of_tensors_is_that_of_a_call_from_python(gateway: GatewayUnderTest, name: str) -> None:
    """Nothing is rounded, dropped or renamed: the reader returns an equal response, training inputs included."""
    body = CALLS[name]
    expected = called(gateway, body)
    response = read_samples(await post(gateway, "/sample", body, TENSORS), body["inputs"])
    assert everything(response) == everything(expected)
    assert response == expected
    assert response.parser == expected.parser and response.logprobs_mode == expected.logprobs_mode
    batches: list[dict[str, Any]] = [{**each.to_training_batch(tensors="numpy")} for each in (response, expected)]
    assert all(np.array_equal(batches[0][key], batches[1][key]) for key in batches[1])
    for column in ("group", "sample", "lengths", "tokens", "stop_reason", "seed", "logprobs", "logprob_tokens"):
        mine, theirs = getattr(response.columns, column), getattr(expected.columns, column)
        assert np.array_equal(mine, theirs, equal_nan=True) if theirs is not None and column == "logprobs" else True
        assert (mine is None) == (theirs is None) and (mine is None or mine.dtype == theirs.dtype)


@pytest.mark.parametrize("name", CALLS)
async def test_a_response_of_json_says_what_a_call_from_python_says(gateway: GatewayUnderTest, name: str) -> None:
    """Numbers are those of the columns: float32 survives JSON."""
    body = CALLS[name]
    expected = called(gateway, body)
    answer = await post(gateway, "/sample", body)
    assert answer["prompt_indices"] == list(expected.prompt_indices)
    assert answer["logprobs_mode"] == expected.logprobs_mode
    for prompt, part in zip(answer["prompts"], expected, strict=True):
        assert prompt["prompt_token_ids"] == part.prompt_token_ids
        assert rounded(prompt["prompt_logprobs"]) == rounded(part.prompt_logprobs)
        if (top := part.topk_prompt_logprobs) is not None:
            shown = prompt["top_prompt_logprobs"]
            rows = [row for row in top if row is not None]
            assert shown["tokens"] == [[token for token, _ in row] for row in rows]
            assert len(top) - len(rows) == shown["start"]
        for shown, sequence in zip(prompt["sequences"], part.sequences, strict=True):
            assert shown["tokens"] == sequence.tokens
            logprobs = sequence.logprob_array
            assert rounded(shown["logprobs"]) == (None if logprobs is None else rounded(logprobs.tolist()))
            names = ("decoded", "stop_reason", "seed", "engine", "adapter")
            assert all(shown[name] == getattr(sequence, name) for name in names)
            assert [(s["version"], s["start"], s["end"]) for s in shown["weight_versions"]] == sequence.weight_versions
            messages = sequence.new_input_feature.get("messages")
            if messages is not None:
                assert shown["message"] == messages[-1]


def rounded(values: Any) -> Any:
    return values and [None if value is None else np.float32(value) for value in values]


async def test_likeliest_tokens_are_beside_the_sampled_one(gateway: GatewayUnderTest) -> None:
    """The k likeliest at each position, best first, then the named ones."""
    params = {"max_tokens": 4, "logprobs": 2, "logprob_token_ids": [9], "temperature": 0}
    answer = await post(gateway, "/sample", {"inputs": {"input_ids": [1, 2]}, "sampling_params": params})
    sequence = answer["prompts"][0]["sequences"][0]
    top = sequence["top_logprobs"]
    assert [row[0] for row in top["tokens"]] == sequence["tokens"]
    assert {row[2] for row in top["tokens"]} == {9}
    assert [row[0] for row in top["logprobs"]] == sequence["logprobs"]


async def test_prompts_arrive_line_by_line(gateway: GatewayUnderTest) -> None:
    """A line for each prompt, as it finishes, and one that says that all are there."""
    lines = (await post(gateway, "/sample", {"inputs": QUESTIONS, "sampling_params": PARAMS}, LINES)).splitlines()
    parsed = [json.loads(line) for line in lines]
    assert sorted(line["prompt"]["prompt_index"] for line in parsed[:-1]) == [0, 1, 2]
    assert parsed[-1] == {"done": {"prompts": 3}}
    whole = await post(gateway, "/sample", {"inputs": QUESTIONS, "sampling_params": PARAMS})
    by_index = {line["prompt"]["prompt_index"]: line["prompt"] for line in parsed[:-1]}
    assert [by_index[i] for i in range(3)] == whole["prompts"]


async def test_an_error_before_the_first_line_has_its_status(gateway: GatewayUnderTest) -> None:
    async with gateway.http() as http:
        answer = await http.post("/sample", json={"inputs": [{"input_ids": [10**6]}]}, headers=LINES)
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "PromptError"


async def test_a_deadline_leaves_the_complete_prompts() -> None:
    """As the error of a call from Python has them."""
    with gateway_app(engine_args={"token_latency_s": 0.01}) as gateway:
        params = [{"max_tokens": 1, "ignore_eos": True}, {"max_tokens": 1000, "ignore_eos": True}]
        body = {"inputs": [{"input_ids": [1, 2]}] * 2, "sampling_params": params, "timeout_s": 0.5}
        async with gateway.http() as http:
            answer = await http.post("/sample", json=body)
            lines = (await http.post("/sample", json=body, headers=LINES)).text.splitlines()
    assert answer.status_code == 504
    assert answer.json()["error"]["type"] == "DeadlineError"
    assert answer.json()["response"]["prompt_indices"] == [0]
    assert [list(json.loads(line)) for line in lines] == [["prompt"], ["error"]]


async def test_scores_are_those_of_a_call_from_python(gateway: GatewayUnderTest) -> None:
    body = {"inputs": QUESTIONS, "top_logprobs": 2}
    expected = gateway.sampler.score(QUESTIONS, top_logprobs=2)
    assert read_samples(await post(gateway, "/score", body, TENSORS), QUESTIONS) == expected
    answer = await post(gateway, "/score", body)
    for prompt, part in zip(answer["prompts"], expected, strict=True):
        assert rounded(prompt["prompt_logprobs"]) == rounded(part.prompt_logprobs)


async def test_tokens_and_texts_are_those_of_a_call_from_python(gateway: GatewayUnderTest) -> None:
    ids = gateway.sampler.encode(QUESTIONS)
    assert (await post(gateway, "/encode", {"inputs": QUESTIONS}))["token_ids"] == ids
    assert (await post(gateway, "/count_tokens", {"inputs": QUESTIONS}))["counts"] == [len(each) for each in ids]
    bare = {"inputs": QUESTIONS[0], "add_generation_prompt": False}
    assert (await post(gateway, "/encode", bare))["token_ids"] == gateway.sampler.encode(
        QUESTIONS[0], add_generation_prompt=False
    )
    assert (await post(gateway, "/decode", {"token_ids": ids[0]}))["text"] == gateway.sampler.decode(ids[0])
    texts = await post(gateway, "/decode", {"token_ids": ids, "skip_special_tokens": True})
    assert texts["text"] == gateway.sampler.decode(ids, skip_special_tokens=True)


def form(directory: Path) -> dict[str, bytes]:
    files = {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}
    return {part: (directory / name).read_bytes() for part, name in files.items()}


async def test_an_adapter_is_uploaded_used_listed_and_removed(gateway: GatewayUnderTest, adapters: list[Path]) -> None:
    async with gateway.http() as http:
        for version, directory in enumerate(adapters, 1):
            answer = await http.put("/adapters/lora", files=form(directory))
            assert answer.json() == {"adapter": f"lora@{version}"}
        assert (await http.get("/adapters")).json()["adapters"]["lora"]["newest"] == "lora@2"
        body = {"inputs": QUESTIONS[0], "sampling_params": PARAMS, "adapter_name": "lora"}
        sequence = (await http.post("/sample", json=body)).json()["prompts"][0]["sequences"][0]
        expected = gateway.sampler.sample(QUESTIONS[0], PARAMS, "lora").sequences[0]
        assert (sequence["adapter"], sequence["tokens"]) == ("lora@2", expected.tokens)
        assert (await http.delete("/adapters/lora")).json() == {"removed": "lora"}
        assert (await http.get("/adapters")).json() == {"adapters": {}}
        assert (await http.delete("/adapters/lora")).status_code == 404
        assert (await http.post("/sample", json=body)).status_code == 404


async def test_a_bad_adapter_is_refused(gateway: GatewayUnderTest, adapters: list[Path]) -> None:
    """A damaged or incomplete upload, or something else, leaves no adapter, and says why."""
    good = form(adapters[0])
    bad: dict[str, tuple[Any, int]] = {
        "cut off": ({**good, "weights": good["weights"][:-8]}, 400),
        "no safetensors": ({**good, "weights": b"PK\x03\x04pickle"}, 400),
        "no JSON": ({**good, "config": b"{"}, 400),
        "nested": ({**good, "config": b"[" * 10**5}, 400),
        "large configuration": ({**good, "config": b" " * 2**21}, 413),
        "no weights": ({"config": good["config"]}, 400),
        "another part": ({**good, "other": b""}, 400),
    }
    async with gateway.http() as http:
        for name, (files, status) in bad.items():
            answer = await http.put("/adapters/bad", files=files)
            assert answer.status_code == status, (name, answer.text)
            assert "/" not in answer.json()["error"]["message"].replace("multipart/form-data", "")
        assert (await http.put("/adapters/bad", content=good["weights"])).status_code == 415
        headers = {"content-type": "multipart/form-data; boundary=x"}
        assert (await http.put("/adapters/bad", content=b"--x\r\nnothing", headers=headers)).status_code == 400
        assert (await http.put("/adapters/a@b", files=good)).status_code == 400
        assert (await http.put("/adapters/a%2Fb", files=good)).status_code == 404
        assert (await http.get("/adapters")).json() == {"adapters": {}}


async def test_an_upload_has_a_limit(adapters: list[Path]) -> None:
    with gateway_app(limits={"upload_bytes": 1000}) as gateway:
        async with gateway.http() as http:
            answer = await http.put("/adapters/lora", files=form(adapters[0]))
    assert answer.status_code == 413 and "the limit is 1000" in answer.json()["error"]["message"]


def checkpoint() -> dict[str, np.ndarray]:
    weights: dict[str, np.ndarray] = load((hub.DEMO / "model.safetensors").read_bytes())
    return weights


async def weights_of(http: httpx.AsyncClient) -> str:
    return str((await http.get("/weights")).json()["weights"])


async def test_weights_are_replaced(gateway: GatewayUnderTest) -> None:
    """Later samples name them. The body may come in pieces of any size, without its length."""
    data = save(checkpoint())

    async def pieces() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(data), 100_003):
            yield data[start : start + 100_003]

    async with gateway.http() as http:
        query = {"mode": "wait", "track": "main", "timeout_s": "60"}
        answer = await http.put("/weights/step-1", content=data, params=query)
        assert answer.json() == {"weights": "step-1"} and await weights_of(http) == "step-1"
        answer = await http.put("/weights/step-2", content=pieces())
        assert answer.json() == {"weights": "step-2"}, answer.text
        answer = await http.post("/weights/initial/use", params={"mode": "abort", "track": "main", "timeout_s": "60"})
        assert answer.json() == {"weights": "initial"} and await weights_of(http) == "initial"
        assert (await http.get("/weights")).json()["versions"] == ["initial", "step-2"]
        assert (await http.post("/weights/step-2/use")).json() == {"weights": "step-2"}
        answer = await http.post("/weights/step-1/use")
        assert answer.status_code == 400 and "is no longer kept" in answer.text
        body = {"inputs": QUESTIONS[0], "sampling_params": PARAMS, "track": "main"}
        (prompt,) = (await http.post("/sample", json=body)).json()["prompts"]
        answer = await http.post("/score", json={"inputs": QUESTIONS[0], "track": "trial"})
        assert answer.status_code == 400 and "unknown track 'trial'" in answer.text
    assert {span["version"] for span in prompt["sequences"][0]["weight_versions"]} == {"step-2"}


async def test_bad_weights_leave_the_old_ones(gateway: GatewayUnderTest) -> None:
    """A damaged, incomplete or foreign file, or one that goes on; the next update works."""
    weights = checkpoint()
    name = next(iter(weights))
    good, spoilt = save(weights), {**weights, name: np.full_like(weights[name], np.nan)}
    bad: dict[str, tuple[bytes, str]] = {
        "empty": (b"", "cut off"),
        "cut off": (good[:-8], "cut off"),
        "goes on": (good + b"0", "goes on"),
        "no safetensors": (b"PK\x03\x04" * 100, "not a safetensors file"),
        "too few": (save({name: weights[name]}), "lacks"),
        "another model": (save({"other": weights[name]}), "no weight 'other'"),
        "another shape": (save({**weights, name: weights[name][:1]}), "shape"),
        "not finite": (save(spoilt), "not finite"),
    }
    async with gateway.http() as http:
        before = await weights_of(http)
        for kind, (content, words) in bad.items():
            answer = await http.put(f"/weights/{kind}", content=content)
            assert answer.status_code == 400 and words in answer.json()["error"]["message"], (kind, answer.text)
            assert answer.json()["error"]["type"] == "WeightsError"
        for query in (
            {"mode": "now"},
            {"track": "trial"},
            {"allow_nonfinite": "1"},
            {"timeout_s": "0"},
            {"timeout_s": "soon"},
            {"x": "1"},
        ):
            assert (await http.put("/weights/a", content=good, params=query)).status_code == 400, query
        assert (await http.put("/weights/a", content=good, headers={"content-type": "text/csv"})).status_code == 415
        assert (await http.put(f"/weights/{before}", content=good)).status_code == 400
        assert await weights_of(http) == before and not gateway.sampler.status()["paused"]
        answer = await http.put("/weights/infinite", content=save(spoilt), params={"allow_nonfinite": "true"})
        assert answer.status_code == 200, answer.text
        assert (await http.put("/weights/after", content=good)).json() == {"weights": "after"}


async def test_a_weight_has_a_limit() -> None:
    with gateway_app(limits={"upload_bytes": 1000}) as gateway:
        async with gateway.http() as http:
            answer = await http.put("/weights/large", content=save(checkpoint()))
    assert answer.status_code == 400 and "the limit of one is 1000" in answer.json()["error"]["message"]


async def test_a_pause_is_renewed_and_ended(gateway: GatewayUnderTest) -> None:
    pause = await post(gateway, "/pause", {"lease_s": 20})
    assert gateway.sampler.status()["paused"]
    assert await post(gateway, "/pause", {"pause": pause["pause"], "lease_s": 30}) == {**pause, "lease_s": 30.0}
    assert await post(gateway, "/resume", {"pause": pause["pause"]}) == {"resumed": True}
    assert not gateway.sampler.status()["paused"]
    async with gateway.http() as http:
        for path in ("/pause", "/resume"):
            assert (await http.post(path, json={"pause": pause["pause"]})).status_code == 409


async def test_a_pause_that_nobody_renews_ends(gateway: GatewayUnderTest) -> None:
    await post(gateway, "/pause", {"lease_s": 0.05})
    answer = await post(gateway, "/sample", {"inputs": QUESTIONS[0], "sampling_params": PARAMS, "timeout_s": 60})
    assert answer["prompts"][0]["sequences"][0]["tokens"]


async def test_state_and_weights_are_told(gateway: GatewayUnderTest) -> None:
    async with gateway.http() as http:
        status = (await http.get("/status", params={"sampler": "sampler"})).json()
        assert (await http.get("/weights")).json() == {
            "weights": status["weights"],
            "tracks": status["tracks"],
            "versions": status["weights_versions"],
        }
    assert status["tracks"] == {"main": status["weights"]}
    assert set(status["engines"]) == {"local"}


async def test_a_request_says_which_sampler() -> None:
    """`sampler` is a field of bodies, and a parameter of other requests."""
    with gateway_app(samplers={"actor": "one", "critic": "two"}, starting=("two",)) as gateway:
        async with gateway.http() as http:
            body = {"inputs": QUESTIONS[0], "sampling_params": PARAMS}
            for name, status in ({None: 200, "actor": 200, "critic": 503, "judge": 404}).items():
                answer = await http.post("/sample", json={**body, "sampler": name})
                assert answer.status_code == status, answer.text
                query = {} if name is None else {"sampler": name}
                assert (await http.get("/status", params=query)).status_code == status
            assert answer.json()["error"]["type"] == "UnknownModelError"


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"temperature": 1}, 400, "unknown field 'temperature'"),
        ({"sampling_params": {"temprature": 1}}, 400, "did you mean 'temperature'"),
        ({"sampling_params": [{}, {}]}, 400, "sampling_params is a list of 2"),
        ({"sampling_params": {"logit_bias": {"x": 1}}}, 400, "not a token id"),
        ({"num_samples": 0}, 400, "num_samples"),
        ({"num_samples": 2000}, 400, "limits.samples is 1024"),
        ({"sampling_params": {"n": 2000}}, 400, "limits.samples is 1024"),
        ({"inputs": []}, 400, "inputs is empty"),
        ({"inputs": [{"input_ids": [1]}] * 5000}, 400, "limits.prompts is 4096"),
        ({"inputs": "12+34="}, 400, "inputs"),
        ({"adapter_name": "nobody"}, 404, "unknown adapter 'nobody'"),
        ({"adapter_name": "a", "use_base_model": True}, 400, "contradict"),
        ({"template": "None"}, 400, "unknown template"),
        ({"min_groups": 5}, 400, "min_groups"),
        ({"track": "trial"}, 400, "unknown track 'trial'"),
        ({"timeout_s": -1}, 400, "timeout_s"),
        ({"sampling_params": {"structured_outputs": {"regex": "a"}}}, 400, "no grammars"),
    ],
)
async def test_an_invalid_request_is_refused_by_name(
    gateway: GatewayUnderTest, fields: dict[str, Any], status: int, words: str
) -> None:
    async with gateway.http() as http:
        answer = await http.post("/sample", json={"inputs": QUESTIONS[0], **fields})
    assert answer.status_code == status and words in answer.json()["error"]["message"], answer.text


def test_a_reader_says_what_else_it_was_given() -> None:
    with pytest.raises(Exception, match="are no response of 'twinkle-serve-samples-1'"):
        read_samples(b'{"error": {}}')
