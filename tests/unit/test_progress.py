"""Progress bars: how far a call is, its tokens per second, and the time that is left."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.support.local_sampler import make
from twinkle_serve.data_format import SamplingParams
from twinkle_serve.errors import DeadlineError
from twinkle_serve.sampler import RunningSampler, progress

PROMPTS = [{"input_ids": [20 + i]} for i in range(4)]
LONG = SamplingParams(max_tokens=100, ignore_eos=True)


@pytest.fixture(scope="module")
def sampler() -> Iterator[RunningSampler]:
    made, _ = make(token_latency_s=0.02)
    yield made
    made.shutdown()


def test_sample_shows_its_samples(
    sampler: RunningSampler, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "POLL_S", 0.05)
    shown: list[tuple[int, int, int | None]] = []
    show = progress._Bar.show

    def recorded(bar: progress._Bar, done: int, tokens: int, total: int | None = None) -> None:
        shown.append((done, tokens, total))
        show(bar, done, tokens, total)

    monkeypatch.setattr(progress._Bar, "show", recorded)
    response = sampler.sample(PROMPTS, LONG, num_samples=2, progress=True)
    assert len(response.sequences) == 8
    assert shown and {total for _, _, total in shown} == {8}
    assert "samples" in capsys.readouterr().out


def test_sample_iter_counts_prompts_to_the_end(sampler: RunningSampler, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(list(sampler.sample_iter(PROMPTS, SamplingParams(max_tokens=2), progress=True))) == 4
    out = capsys.readouterr().out
    assert "4/4" in out and "tokens/s" in out


def test_bar_ends_with_a_call_that_fails(sampler: RunningSampler) -> None:
    with pytest.raises(DeadlineError):
        sampler.sample(PROMPTS, LONG, timeout_s=0.1, progress=True)
    assert asyncio.run(sampler.sample_async(PROMPTS, SamplingParams(max_tokens=1))).sequences
