"""Checks responses: every sample once, in its place, labelled with the versions that sampled it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from benchmarks.chaos.calls import TIMEOUT_S, Call
from benchmarks.chaos.publisher import BASE, Attempt, History
from twinkle_serve import SampledSequence, SampleResponse

LATE_S = 15.0
"""A call that takes this much longer than its deadline hangs."""
IMPROBABLE = -30.0
"""Log p of a whole sample, nats, below which equal samples mean equal random streams. A number of tokens would not do:
a model whose weights are noise may repeat itself for ever."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A violation of the service's guarantees."""

    kind: str
    """lost, doubled, mislabelled, wrong, failed, hang, left behind or not recovered."""
    where: str
    """Name of the call or process."""
    what: str


@dataclass(frozen=True, slots=True)
class Answered:
    """A call and its outcome."""

    name: str
    """For example "trainer-0 call 12"."""
    call: Call
    begun_at: float
    ended_at: float
    responses: list[SampleResponse]
    error: str
    message: str

    @property
    def sequences(self) -> list[SampledSequence]:
        return [sequence for response in self.responses for sequence in response.sequences]

    @property
    def tokens(self) -> int:
        return sum(len(response.columns.tokens) for response in self.responses)

    def finding(self, kind: str, what: str) -> Finding:
        return Finding(kind, self.name, what)


def check(answered: Answered, history: History) -> Iterator[Finding]:
    """Checks one call by itself."""
    if answered.ended_at - answered.begun_at > TIMEOUT_S + LATE_S:
        yield answered.finding("hang", f"took {answered.ended_at - answered.begun_at:.1f} s")
    yield from check_samples(answered, history)


def check_samples(answered: Answered, history: History) -> Iterator[Finding]:
    """Checks what a call returned."""
    yield from _prompts(answered)
    yield from _streams(answered)
    for sequence in answered.sequences:
        for kind, what in (*_sample(answered.call, sequence), *_labels(answered, sequence, history)):
            yield answered.finding(kind, f"prompt {sequence.prompt_index}: {what}")


def _prompts(answered: Answered) -> Iterator[Finding]:
    """Checks that each prompt came once, with its own tokens and num_samples samples; in order, unless iterated."""
    call = answered.call
    indices = [index for response in answered.responses for index in response.prompt_indices]
    for index, times in Counter(indices).items():
        if times > 1:
            yield answered.finding("doubled", f"prompt {index} came {times} times")
    if not answered.error and (missing := set(range(len(call.prompts))) - set(indices)):
        yield answered.finding("lost", f"prompts {sorted(missing)} of {len(call.prompts)} did not come")
    if not call.iterated and indices != sorted(indices):
        yield answered.finding("mislabelled", f"prompts came in the order {indices}")
    for response in answered.responses:
        for prompt in response:
            index = prompt.prompt_index
            if not 0 <= index < len(call.prompts) or tuple(prompt.prompt_token_ids) != call.prompts[index]:
                yield answered.finding("mislabelled", f"prompt {index} is another prompt")
            samples = prompt.columns.sample.tolist()
            if samples != list(range(call.num_samples)):
                kind = "lost" if len(samples) < call.num_samples else "doubled"
                yield answered.finding(kind, f"prompt {index} has samples {samples}, not {call.num_samples} in order")


def _streams(answered: Answered) -> Iterator[Finding]:
    """Checks that no two samples share a random stream: no equal seeds, no equal improbable samples of a prompt."""
    seeds = [sequence.seed for sequence in answered.sequences]
    if (answered.call.seed is None) != (seeds.count(None) > 0) and seeds:
        yield answered.finding("mislabelled", f"seed {answered.call.seed} was requested, samples have {set(seeds)}")
    for seed, times in Counter(seed for seed in seeds if seed is not None).items():
        if times > 1:
            yield answered.finding("doubled", f"{times} samples have the seed {seed}")
    same: dict[tuple[int, ...], list[SampledSequence]] = defaultdict(list)
    for sequence in answered.sequences:
        if sequence.logprob_array is not None and sequence.logprob_array.sum() < IMPROBABLE:
            same[sequence.prompt_index, *sequence.tokens].append(sequence)
    for (index, *tokens), sequences in same.items():
        if len(sequences) > 1:
            of = [(int(s.response.columns.sample[s.row]), s.seed, s.engine, s.adapter) for s in sequences]
            logprob = sequences[0].logprob_array.sum()  # type: ignore[union-attr]  # not None, see above
            yield answered.finding(
                "doubled", f"prompt {index} has the same {len(tokens)} tokens, of log p {logprob:.1f}, as samples {of}"
            )


def _sample(call: Call, sequence: SampledSequence) -> Iterator[tuple[str, str]]:
    """Checks the number of tokens, the stop reason and the logprobs."""
    tokens, reason = len(sequence.tokens), sequence.stop_reason
    if reason not in ("length", "stop") or (reason == "stop" and call.ignore_eos):
        yield "wrong", f"ended by {reason}"
    if not 1 <= tokens <= call.max_tokens or (reason == "length" and tokens != call.max_tokens):
        kind = "lost" if tokens < call.max_tokens else "doubled"
        yield kind, f"{tokens} tokens of {call.max_tokens}, ended by {reason}"
    logprobs = sequence.logprob_array
    if logprobs is None or len(logprobs) != tokens or not (logprobs <= 0).all():
        yield "wrong", f"logprobs {logprobs} of {tokens} tokens"


def _labels(answered: Answered, sequence: SampledSequence, history: History) -> Iterator[tuple[str, str]]:
    """Checks that all versions were published, belong to the requested name, and were not outdated at the call."""
    name, label = answered.call.adapter, sequence.adapter
    if label.rpartition("@")[0] != name:
        yield "mislabelled", f"adapter {label!r}, but {name!r} was requested"
    elif name:
        attempts = [attempt for attempt in history.adapter(label) if attempt.begun_at < answered.ended_at]
        current = history.current(name, answered.begun_at)
        if not attempts:
            yield "mislabelled", f"adapter {label!r}, which was never published"
        elif current is not None and int(label.rpartition("@")[2]) < (old := history.attempts[name][current]).number:
            yield "mislabelled", f"adapter {label!r} is older than {old.label!r}, which was current at the call"
    spans = sequence.weight_versions
    ends = [0, *(span.end for span in spans)]
    if [span.start for span in spans] != ends[:-1] or ends[-1] != len(sequence.tokens):
        yield "mislabelled", f"spans {spans} of {len(sequence.tokens)} tokens"
    found = [history.base(span.version) for span in spans]
    order = [index for index in found if index is not None]
    if len(order) < len(found) or any(history.attempts[BASE][index].begun_at > answered.ended_at for index in order):
        yield "mislabelled", f"spans {spans} name a version that was never published"
    elif order != sorted(set(order)):
        yield "mislabelled", f"spans {spans} go back to an older version"
    elif order and (current := history.current(BASE, answered.begun_at)) is not None and order[0] < current:
        newest: Attempt = history.attempts[BASE][current]
        yield "mislabelled", f"spans {spans} begin before {newest.label!r}, which was current at the call"


def check_references(calls: Iterable[Answered]) -> tuple[list[Finding], int]:
    """Checks that repeated calls have equal tokens for as long as their versions are equal. Returns the findings, and
    how many samples were compared with another call's."""
    first: dict[tuple[object, ...], tuple[Answered, list[int]]] = {}
    findings: list[Finding] = []
    compared = 0
    for answered in calls:
        if answered.call.reference is None or answered.error:
            continue
        for sequence in answered.sequences:
            span = sequence.weight_versions[0]
            number = int(sequence.response.columns.sample[sequence.row])
            key = (answered.call.reference, sequence.prompt_index, number, sequence.adapter, span.version)
            tokens = sequence.tokens[: span.end]
            if key not in first:
                first[key] = (answered, tokens)
                continue
            other, before = first[key]
            both = min(len(tokens), len(before))
            compared += 1
            if tokens[:both] != before[:both]:
                at = next(i for i in range(both) if tokens[i] != before[i])
                findings.append(answered.finding("wrong", f"{key} differs from {other.name} at token {at} of {both}"))
            elif len(tokens) > len(before):
                first[key] = (answered, tokens)
    return findings, compared


def by_versions(calls: Iterable[Answered]) -> dict[tuple[str, str], list[tuple[Answered, SampledSequence]]]:
    """Groups samples by (version of the model's weights, adapter version), once for each span's version."""
    found: dict[tuple[str, str], list[tuple[Answered, SampledSequence]]] = defaultdict(list)
    for answered in calls:
        for sequence in answered.sequences:
            for version in dict.fromkeys(span.version for span in sequence.weight_versions):
                found[version, sequence.adapter].append((answered, sequence))
    return found
