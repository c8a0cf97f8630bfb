"""Samples that one engine begins and another one finishes."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np

from tests.support.harness import LOGPROB_TOLERANCE, EngineHarness, Prompts
from twinkle_serve.data_format.samples import PartialSample

TOKENS = 100


async def test_engine_resumes_a_sample(engine: EngineHarness, prompts: Prompts) -> None:
    """Partial outputs are the beginning of the sample, and the resumed sample re-scores as one, before and after the
    break."""
    group = replace(engine.group(prompts[0], max_tokens=TOKENS, ignore_eos=True, logprobs=2), resume=True)
    task = engine.start(group)
    parts: list[PartialSample] = []
    while not task.done() and sum(map(len, parts)) < 10:
        if (part := engine.engine.partial_output(group, sum(map(len, parts)))) is not None:
            parts.append(part)
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert engine.engine.partial_output(group, 0) is None, "it is not running any more"
    beginning = PartialSample.concat(parts)
    again = replace(group, attempts=1, partial=beginning)
    columns = await engine.server._sample_group(again)
    assert (
        columns.lengths.tolist() == [TOKENS] and columns.tokens[: len(beginning)].tolist() == beginning.tokens.tolist()
    )
    assert columns.logprobs is not None and columns.logprobs.shape == (TOKENS, 3)
    assert columns.logprob_tokens is not None and (columns.logprob_tokens[:, 0] == columns.tokens).all()
    assert columns.weight_versions == [(("initial", 0),)]
    assert columns.decoded == [engine.engine.decode(columns.tokens.tolist())]
    whole = np.concatenate([prompts[0], columns.tokens])
    scored = await engine.sample([whole], max_tokens=0, prompt_logprobs=0)
    assert scored.prompt_logprobs is not None
    rescored = np.array(scored.prompt_logprobs[len(prompts[0]) :], np.float32)
    assert np.abs(rescored - columns.logprobs[:, 0]).max() < LOGPROB_TOLERANCE
