"""Conversations that end with an assistant's message: continued if the caller says so, refused else."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.chat_templates import LLAMA3, OPENED, QWEN3, kinds_of_templates, model_with
from tests.support.turns import Made, after, feature_of, prompt_of
from twinkle_serve import hub
from twinkle_serve.config import ServiceArgs
from twinkle_serve.errors import PromptError, RequestError, TemplateError
from twinkle_serve.routing.router import Router
from twinkle_serve.sampler import RunningSampler
from twinkle_serve.sampler.local import LocalClient
from twinkle_serve.template import Template
from twinkle_serve.template.prompts import encode_inputs

USER = {"role": "user", "content": "1+1="}
BEGUN = {"role": "assistant", "content": "The sum"}
CALL = {"id": "x", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
RESULT = {"role": "tool", "content": "2"}
NEXT = "<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Template]:
    """One per kind of chat template."""
    return kinds_of_templates(tmp_path_factory.mktemp("templates"))


def continued(item: Any, template: Template, choice: bool | None = True) -> Made:
    (prompt,) = encode_inputs(item, template, True, choice)
    return Made(prompt.ids, turn=prompt.turn, item=item)


# -- rendering -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["demo", "llama3", "qwen3", "opened"])
def test_continued_message_is_rendered_as_transformers_does(name: str, templates: dict[str, Template]) -> None:
    """Up to the end of its text, without the end of its turn and without another turn."""
    template = templates[name]
    messages = [{"role": "system", "content": "s"}, USER, {"role": "assistant", "content": "2"}, USER, BEGUN]
    expected = template.tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    text = template.decode(continued({"messages": messages}, template).ids)
    assert text == expected and text.endswith("The sum")


@pytest.mark.parametrize("content", ["The sum is ", " The", "", "\n", "a\n\n", "</tool_call>"])
def test_continued_text_is_not_changed_at_its_end(content: str, templates: dict[str, Template]) -> None:
    """Though the template would trim it: the sample follows the caller's very text."""
    for template in templates.values():
        prompt = continued({"messages": [USER, {"role": "assistant", "content": content}]}, template)
        assert template.decode(prompt.ids).endswith(content.lstrip())
        feature = feature_of(prompt, template, "x")
        assert feature["messages"] == [USER, {"role": "assistant", "content": content + "x"}]


def test_message_that_cannot_be_continued_is_refused(templates: dict[str, Template]) -> None:
    """The text at the end of the prompt would not be the message's."""
    thought = {**BEGUN, "reasoning_content": "Hm."}
    for name, message, error in (
        ("demo", {**BEGUN, "tool_calls": [CALL]}, r"messages\[1\] has tool_calls, and cannot be continued"),
        ("qwen3", {**thought, "content": ""}, r"messages\[1\] has reasoning_content and no content"),
        ("opened", thought, r"messages\[1\] cannot be continued: the chat template writes it in other words"),
        ("opened", {**BEGUN, "content": "Hm.</think>2"}, "writes it in other words"),
        ("demo", {"role": "assistant", "content": None}, r"messages\[1\].content of a message with role 'assistant'"),
    ):
        with pytest.raises(PromptError, match=rf"inputs\[0\].*{error}"):
            continued({"messages": [USER, message]}, templates[name])


@pytest.mark.parametrize("thought", ["<think>\nHm", "<think>", "<think>\nHm.\n</think>\n\n2", "\n<think>Hm</think>2"])
def test_reasoning_is_continued_as_it_is_written(thought: str, templates: dict[str, Template], tmp_path: Path) -> None:
    """It follows the beginning of the turn, even if the chat template writes an empty block of reasoning there."""
    closing = QWEN3.replace("{{- m.content or '' }}", "{{- '<think>\n\n</think>\n\n' + (m.content or '') }}")
    earlier = [USER, {"role": "assistant", "content": "2"}, USER]
    for template in (templates["qwen3"], Template(model_with(tmp_path, closing))):
        prompt = continued({"messages": [*earlier, {"role": "assistant", "content": thought}]}, template)
        before = prompt_of({"messages": earlier}, template)
        assert template.decode(prompt.ids) == template.decode(before.ids) + thought
        feature = feature_of(prompt, template, "!<|im_end|>")
        assert feature["messages"][3] == template.message_parser().message(f"{thought}!")
        assert prompt_of(feature, template).ids.tolist() == feature["input_ids"]
        assert prompt_of(after(feature, USER), template).ids.tolist()[: feature["length"]] == feature["input_ids"]
    turn = feature_of(prompt_of({"messages": [USER]}, templates["qwen3"]), templates["qwen3"], "2<|im_end|>")
    following = continued(after(turn, USER, {"role": "assistant", "content": thought}), templates["qwen3"])
    assert templates["qwen3"].decode(following.ids).endswith(f"assistant\n2<|im_end|>\n{NEXT}{thought}")


def test_reasoning_is_continued_where_the_prompt_opens_it(tmp_path: Path) -> None:
    """The generation prompt has the tag already, so it is written once."""
    rewritten = OPENED.replace("+ said +", "+ ('<think>\n\n</think>' if m.role == 'assistant' else '') + said +")
    template = Template(model_with(tmp_path, rewritten))
    prompt = continued({"messages": [USER, {"role": "assistant", "content": "<think>\nHm"}]}, template)
    assert template.decode(prompt.ids).endswith("<|im_start|>assistant\n<think>\nHm")


def test_reasoning_is_refused_after_one_that_the_prompt_has_ended(templates: dict[str, Template]) -> None:
    """The model would see two blocks of reasoning."""
    quiet = Template(templates["qwen3"].model, enable_thinking=False)
    with pytest.raises(PromptError, match="writes it in other words"):
        continued({"messages": [USER, {"role": "assistant", "content": "<think>\nHm"}]}, quiet)


# -- who says it ---------------------------------------------------------------------------------


def test_conversation_that_ends_with_the_assistant_is_refused_unless_it_is_to_be_continued(
    templates: dict[str, Template],
) -> None:
    """A second turn is never opened in silence. The call decides, then the template."""
    item = {"messages": [USER, BEGUN]}
    always = Template(hub.DEMO, continue_final_message=True)
    for template, choice in ((templates["demo"], None), (templates["demo"], False), (always, False)):
        with pytest.raises(PromptError, match=r"inputs\[0\].messages ends with an assistant's message. Set continue_"):
            continued(item, template, choice)
    expected = continued(item, templates["demo"]).ids.tolist()
    assert continued(item, always, None).ids.tolist() == continued(item, always).ids.tolist() == expected


def test_other_conversations_open_a_turn_unless_the_call_asks_to_continue_them(templates: dict[str, Template]) -> None:
    """A template's setting is for those that can be continued; a call's is for all of its inputs."""
    always = Template(hub.DEMO, continue_final_message=True)
    for messages in ([USER], [USER, BEGUN, USER], [USER, {**BEGUN, "tool_calls": [CALL]}, RESULT]):
        assert always.decode(continued({"messages": messages}, always, None).ids).endswith("assistant\n")
        with pytest.raises(PromptError, match=r"ends with a message of role '(user|tool)', and continue_"):
            continued({"messages": messages}, always, True)
    for choice in (1, "yes", np.True_):
        with pytest.raises(RequestError, match="continue_final_message must be true, false or None"):
            continued({"messages": [USER]}, always, choice)  # type: ignore[arg-type]
        with pytest.raises(TemplateError, match="continue_final_message must be true or false"):
            Template(hub.DEMO, continue_final_message=choice)  # type: ignore[arg-type]


def test_scored_conversation_ends_as_it_stands(templates: dict[str, Template]) -> None:
    """With the end of its turn, unless the call asks for it without."""
    for template in (templates["demo"], Template(hub.DEMO, continue_final_message=True)):
        for choice, end in ((None, "The sum<|im_end|>\n"), (False, "The sum<|im_end|>\n"), (True, "The sum")):
            (prompt,) = encode_inputs({"messages": [USER, BEGUN]}, template, False, choice)
            assert template.decode(prompt.ids).endswith("assistant\n" + end)


# -- the message that results, and the next turns ---------------------------------------------------


@pytest.mark.parametrize("name", ["demo", "llama3", "qwen3", "opened"])
def test_sample_is_joined_with_the_message_that_it_continues(name: str, templates: dict[str, Template]) -> None:
    """Through several samples; keys of the caller stay, only sampled tokens are labels, and a turn can follow."""
    template, end = templates[name], "<|eot_id|>" if name == "llama3" else "<|im_end|>"
    item: dict[str, Any] = {"messages": [USER, {**BEGUN, "reward": 1}]}
    prompt = continued(item, template)
    start = len(prompt.ids)
    for text, content in ((" is", "The sum is"), ("", "The sum is"), (" 2", "The sum is 2"), (end, "The sum is 2")):
        feature = feature_of(prompt, template, text)
        assert feature["messages"] == [USER, {"role": "assistant", "content": content, "reward": 1}]
        assert feature["input_ids"][: len(prompt.ids)] == prompt.ids.tolist()
        assert [label for label in feature["labels"] if label != -100] == feature["input_ids"][start:]
        prompt = continued(feature, template, None)
        assert prompt.ids.tolist() == feature["input_ids"]
    following = continued(after(feature, USER), template, None).ids
    assert following.tolist()[: len(feature["input_ids"])] == feature["input_ids"]
    assert template.decode(following).count(f"The sum is 2{end}") == 1


def test_message_of_which_nothing_was_sampled_stays_continued(templates: dict[str, Template]) -> None:
    """After max_tokens=0, for example."""
    template = templates["demo"]
    feature = feature_of(continued({"messages": [USER, BEGUN]}, template), template, "")
    assert feature["messages"] == [USER, BEGUN]
    feature = feature_of(continued(feature, template, None), template, " is")
    assert feature["messages"] == [USER, {"role": "assistant", "content": "The sum is"}]


def test_reasoning_and_calls_of_a_continued_message_are_parsed(templates: dict[str, Template]) -> None:
    """From its whole text, what the caller wrote included."""
    template = templates["qwen3"]
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    thought = {**BEGUN, "reasoning_content": "Hm."}
    feature = feature_of(continued({"messages": [USER, thought]}, template), template, f":\n{call}<|im_end|>")
    assert feature["messages"][1]["reasoning_content"] == "Hm." and feature["messages"][1]["content"] == "The sum:"
    assert [c["function"]["name"] for c in feature["messages"][1]["tool_calls"]] == ["add"]
    begun = {"role": "assistant", "content": f"{call[:30]}"}
    feature = feature_of(continued({"messages": [USER, begun]}, templates["demo"]), templates["demo"], call[30:])
    assert feature["messages"][1]["tool_calls"] and feature["messages"][1]["content"] == ""
    begun = {"role": "assistant", "content": "<think>\nH"}
    feature = feature_of(continued({"messages": [USER, begun]}, templates["demo"]), templates["demo"], "m.</think>2")
    assert feature["messages"][1] == {"role": "assistant", "content": "2", "reasoning_content": "Hm."}


def test_appended_message_is_continued_after_sampled_ones(templates: dict[str, Template]) -> None:
    """It is encoded anew, so the call or the template must say so; an unchanged feature resumes without."""
    template = templates["demo"]
    (first,) = encode_inputs({"messages": [USER]}, template)
    feature = feature_of(Made(first.ids, turn=first.turn, item={"messages": [USER]}), template, "2<|im_end|>")
    begun = after(feature, USER, BEGUN)
    for lost in ({}, {"encoded": None}):
        with pytest.raises(PromptError, match=r"ends with an assistant's message\. Set continue_final_message=True"):
            continued({**begun, **lost}, template, None)
        prompt = continued({**begun, **lost}, template)
        assert template.decode(prompt.ids).endswith(
            "2<|im_end|>\n<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\nThe sum"
        )
        made = feature_of(Made(prompt.ids, turn=prompt.turn, item=begun), template, " is")
        assert made["messages"][2:] == [USER, {"role": "assistant", "content": "The sum is"}]
    assert continued(feature, template, None).ids.tolist() == feature["input_ids"]
    assert continued(feature, template, True).ids.tolist() == feature["input_ids"]
    with pytest.raises(PromptError, match="ends with a message of role 'user'"):
        continued(after(feature, USER), template)


def test_continued_message_is_not_cut_on_the_right() -> None:
    """Its text would be another; on the left, only its tokens are fewer."""
    item = {"messages": [USER, BEGUN]}
    length = len(continued(item, Template(hub.DEMO)).ids)
    with pytest.raises(PromptError, match="a message that is continued cannot be cut on the right"):
        continued(item, Template(hub.DEMO, max_length=length - 1, truncation_strategy="right"))
    left = Template(hub.DEMO, max_length=length - 1, truncation_strategy="left")
    feature = feature_of(continued(item, left), left, "!")
    assert feature["messages"] == [USER, {"role": "assistant", "content": "The sum!"}]


def test_model_without_chat_template_has_no_message_to_continue(tmp_path: Path) -> None:
    """Its prompt is the text of a user's message, which is continued anyway."""
    template = Template(hub.DEMO, use_chat_template=False)
    with pytest.raises(PromptError, match="the messages must be one user message"):
        continued({"messages": [BEGUN]}, template)
    assert LLAMA3.startswith("{{- bos_token")
    with pytest.raises(PromptError, match="ends with a message of role 'user'"):
        continued({"messages": [USER]}, template)


# -- every way in --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampler() -> Iterator[RunningSampler]:
    made = RunningSampler(LocalClient(ServiceArgs.model_validate({"model_id": "demo", "engine": "fake"})))
    yield made
    made.shutdown()


ITEM = {"messages": [USER, BEGUN]}
PARAMS = {"max_tokens": 4, "seed": 3}


def test_every_call_takes_the_option(sampler: RunningSampler) -> None:
    """And says without it that the conversation ends with the assistant."""
    expected = continued(ITEM, Template(hub.DEMO)).ids.tolist()
    whole = sampler.sample(ITEM, PARAMS, continue_final_message=True)
    text = whole.sequences[0].decoded

    async def parts(**options: Any) -> tuple[Any, Any, str]:
        made = await sampler.sample_async(ITEM, PARAMS, **options)
        several = [part async for part in sampler.sample_iter_async(ITEM, PARAMS, **options)]
        return (
            made,
            several[0],
            "".join([delta async for delta, _ in sampler.sample_stream_async(ITEM, PARAMS, **options)]),
        )

    responses = [whole, *sampler.sample_iter(ITEM, PARAMS, continue_final_message=True)]
    made, several, streamed = asyncio.run(parts(continue_final_message=True))
    for response in (*responses, made, several):
        assert response.prompt_token_ids == expected and response.sequences[0].decoded == text
    deltas = sampler.sample_stream(ITEM, PARAMS, continue_final_message=True)
    assert "".join(delta for delta, _ in deltas) == streamed == text
    for call in (
        lambda: sampler.sample(ITEM, PARAMS),
        lambda: list(sampler.sample_iter(ITEM, PARAMS)),
        lambda: list(sampler.sample_stream(ITEM, PARAMS)),
        lambda: asyncio.run(parts()),
    ):
        with pytest.raises(PromptError, match="Set continue_final_message=True to continue it"):
            call()
    assert whole.sequences[0].new_input_feature["messages"][-1]["content"].startswith("The sum")


def test_template_and_config_take_the_option(sampler: RunningSampler) -> None:
    """As the default of calls."""
    args = {"model_id": "demo", "engine": "fake", "template": {"name": "Template", "continue_final_message": True}}
    configured = RunningSampler(LocalClient(ServiceArgs.model_validate(args)))
    expected = sampler.sample(ITEM, PARAMS, continue_final_message=True).prompt_token_ids
    assert configured.sample(ITEM, PARAMS).prompt_token_ids == expected
    with pytest.raises(PromptError, match="ends with an assistant's message"):
        configured.sample(ITEM, PARAMS, continue_final_message=False)
    configured.shutdown()
    sampler.set_template("Template", continue_final_message=True)
    assert sampler.sample(ITEM, PARAMS).prompt_token_ids == expected
    sampler.set_template("Template")


async def test_call_by_handle_takes_the_option() -> None:
    """In each of the router's methods; here without Ray."""
    client = LocalClient(ServiceArgs.model_validate({"model_id": "demo", "engine": "fake"}))
    sampler = RunningSampler(client)

    async def by_handle(router: Router) -> list[list[int]]:
        whole = await router.sample(ITEM, PARAMS, continue_final_message=True)
        parts = [part async for part in router.sample_iter(ITEM, PARAMS, continue_final_message=True)]
        return [whole.prompt_token_ids, *(part.prompt_token_ids for part in parts)]

    expected = sampler.sample(ITEM, PARAMS, continue_final_message=True).prompt_token_ids
    assert client.loop.call(by_handle(client._router)) == [expected] * 2
    sampler.shutdown()
