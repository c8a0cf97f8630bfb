"""Reports a run, as JSON and as text."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict

from benchmarks.chaos.checks import Finding
from benchmarks.chaos.publisher import BASE
from benchmarks.chaos.record import ENGINES, Run
from benchmarks.common.machine import commit, machine
from benchmarks.common.report import Figures

MAX_FINDINGS = 40
"""Findings to list; all are counted."""
MAX_LETTERS = 300
"""Length of each: Ray's messages are long."""


def as_json(done: Run, command: str) -> Figures:
    """Returns all figures of a run."""
    options = done.options
    good = [call for call in done.calls if not call.error]
    recovered = defaultdict(list)
    for event in done.events:
        recovered[event.kind].append(event.recovered_s)
    attempts = done.history.attempts
    result = {
        "command": command,
        "commit": commit(),
        "machine": machine(),
        "engine": options.engine,
        "seed": options.seed,
        "seconds": {phase.name: round(phase.end - phase.begin, 1) for phase in done.phases},
        "events": dict(Counter(event.kind for event in done.events)),
        "recovered_s": {kind: _recovery(times) for kind, times in sorted(recovered.items())},
        "calls": {
            "made": len(done.calls) + done.killed,
            "answered": len(good),
            "failed": dict(Counter(call.error for call in done.calls if call.error)),
            "of those in an outage longer than their deadline": done.excused,
            "killed with their trainer": done.killed,
        },
        "samples": sum(len(response.columns) for call in good for response in call.responses),
        "tokens": sum(call.tokens for call in good),
        "agents": _agents(done),
        "published": {
            "base": sum(attempt.published_at is not None for attempt in attempts[BASE][1:]),
            "adapters": sum(a.published_at is not None for name, made in attempts.items() if name for a in made),
            "failed": dict(Counter(error.split(":", 2)[1].strip() for error in done.history.errors().elements())),
        },
        "samples_of_repeated_calls_compared": done.compared,
        "goodput_tokens_per_s": _goodput(done),
        "findings": dict(Counter(finding.kind for finding in done.findings)),
        "found": [_line(finding) for finding in done.findings[:MAX_FINDINGS]],
    }
    if done.reference is not None:
        result["scored"] = {
            "by": done.reference.name,
            "samples": done.reference.samples,
            "tokens": done.reference.tokens,
            "largest_difference_nats": round(done.reference.largest, 7),
        }
    return result


def _agents(done: Run) -> Figures:
    """Summarizes the sessions of HTTP clients."""
    turns = [turn for session in done.sessions for turn in session.turns]
    requests = [attempt for turn in turns for attempt in turn]
    gaps = [turn[-1].ended_at - turn[0].begun_at for turn in turns]
    kept = [{node["turn"]: node for node in session.nodes or ()} for session in done.sessions]
    return {
        "sessions": len(done.sessions),
        "turns": len(turns),
        "acknowledged": sum(turn[-1].acknowledged for turn in turns),
        "streamed": sum(turn[-1].acknowledged and turn[-1].turn.stream for turn in turns),
        "repeated": len(requests) - len(turns),
        "errors": dict(Counter(attempt.error for attempt in requests if attempt.error)),
        "longest_gap_s": round(max(gaps, default=0.0), 1),
        "kept_turns": sum(map(len, kept)),
        "branches": dict(Counter(node["branch"] for nodes in kept for node in nodes.values() if node["branch"])),
        "samples": sum(len(session.nodes or ()) for session in done.sessions),
        "spans_scored": done.turns_scored,
    }


def _line(finding: Finding) -> str:
    return " ".join(f"{finding.kind}: {finding.where}: {finding.what}".split())[:MAX_LETTERS]


def _recovery(times: list[float | None]) -> Figures:
    """Summarizes seconds to recovery of one kind of event."""
    known = [seconds for seconds in times if seconds is not None]
    if not known:
        return {"events": len(times), "recovered": 0}
    return {
        "events": len(times),
        "recovered": len(known),
        "median": round(statistics.median(known), 1),
        "most": round(max(known), 1),
    }


def _goodput(done: Run) -> dict[str, float]:
    """Goodput in calm phases and with events, and the latter relative to the capacity of the ready engines."""
    calm, events = done.rate("calm before", "calm after"), done.rate("events")
    ready = done.ready_share("events")
    return {
        "calm before": round(done.rate("calm before"), 1),
        "calm after": round(done.rate("calm after"), 1),
        "calm": round(calm, 1),
        "events": round(events, 1),
        "ratio": round(events / calm, 3),
        "engines ready": round(ready, 3),
        "ratio to what ready engines could do": round(events / (calm * ready), 3) if ready else 0.0,
    }


def summary(result: Figures) -> str:
    """Returns the same as text."""
    calls, goodput, published = result["calls"], result["goodput_tokens_per_s"], result["published"]
    agents = result["agents"]
    failed, errors = (
        ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"
        for counts in (calls["failed"], agents["errors"])
    )
    lines = [
        f"{result['engine']} x {ENGINES}, seed {result['seed']}, commit {result['commit']}, {result['machine']}",
        f"calls      {calls['made']:,} made, {calls['answered']:,} answered, "
        f"{calls['killed with their trainer']} killed with their trainer; failed: {failed}",
        f"samples    {result['samples']:,} of {result['tokens']:,} tokens; "
        f"{result['samples_of_repeated_calls_compared']:,} compared with those of the same seed",
        f"agents     {agents['sessions']:,} sessions of {agents['acknowledged']:,} acknowledged turns, "
        f"{agents['streamed']:,} of them streamed, {agents['turns'] - agents['acknowledged']} not acknowledged; "
        f"{agents['repeated']:,} requests repeated, errors: {errors}; longest turn {agents['longest_gap_s']:.1f} s",
        f"           {agents['kept_turns']:,} turns in their trajectories, {agents['branches'] or 'no branches'}; "
        f"{agents['spans_scored']:,} spans scored of {agents['samples']:,} samples",
        f"published  {published['base']} versions of the model, {published['adapters']} of adapters; "
        f"failed: {published['failed'] or 'none'}",
    ]
    if scored := result.get("scored"):
        lines.append(
            f"scored     {scored['samples']:,} spans of {scored['tokens']:,} tokens by {scored['by']}: "
            f"|Δlogprob| at most {scored['largest_difference_nats']:.1e}"
        )
    lines.append(
        f"goodput    {goodput['calm']:,.0f} tokens/s calm ({goodput['calm before']:,.0f} before, "
        f"{goodput['calm after']:,.0f} after), {goodput['events']:,.0f} with events: {goodput['ratio']:.2f} of it; "
        f"engines ready {goodput['engines ready']:.0%} of the time: "
        f"{goodput['ratio to what ready engines could do']:.2f} of what those could do"
    )
    for kind, times in result["recovered_s"].items():
        took = f"median {times['median']:.1f} s, most {times['most']:.1f} s" if times["recovered"] else "-"
        lines.append(f"  {kind:24} {times['events']:3} events, {times['recovered']:3} recovered: {took}")
    lines.append("nothing lost, doubled or mislabelled" if not result["findings"] else f"FOUND {result['findings']}")
    lines += [f"  {line}" for line in result["found"]]
    return "\n".join(lines)
