"""Cost of a lost engine: samples that start over against samples that continue, `failover: restart` and `resume`.

    scripts/bench failover [--rounds 5] [--samples 64] [--tokens 150] [--json FILE]

Two vLLM engines and the router in this process, without Ray. When half of the tokens are sampled, one engine is cut
off: its calls raise like those of a dead process until the round is over. So its work is lost without restarting it.
Rounds without a loss show the cost of reporting partial samples.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from twinkle_serve import hub
from twinkle_serve.config import ServiceArgs
from twinkle_serve.data_format.groups import Attempt, EngineInfo, Group, Session, TextDelta
from twinkle_serve.engines import build_engine
from twinkle_serve.engines.group_runner import Finished
from twinkle_serve.engines.server import EngineServer
from twinkle_serve.errors import EngineDeadError
from twinkle_serve.routing.router import Router
from twinkle_serve.weights import LocalStore, WeightStore

ENGINE_ARGS = {"max_model_len": 256, "dtype": "float32", "max_num_seqs": 64, "kv_cache_memory_bytes": 2**28}
POLL_S = 0.01


class Link:
    """A client of an engine that can be cut off."""

    def __init__(self, host: EngineServer) -> None:
        self._host = host
        self.cut = asyncio.Event()

    def _require(self) -> None:
        if self.cut.is_set():
            raise EngineDeadError("cut off")

    async def describe(self, router: str) -> EngineInfo:
        self._require()
        return await self._host.describe(router)

    async def submit(self, session: Session, groups: Sequence[Group], more: bool = False) -> None:
        self._require()
        await self._host.submit(session, groups, more)

    async def results(self, session: Session) -> AsyncGenerator[Finished, None]:
        items = self._host.results(session)
        cut = asyncio.ensure_future(self.cut.wait())
        try:
            while True:
                item = asyncio.ensure_future(anext(items, None))
                await asyncio.wait({item, cut}, return_when=asyncio.FIRST_COMPLETED)
                if self.cut.is_set():
                    item.cancel()
                    await asyncio.wait({item})
                    self._require()
                if (finished := item.result()) is None:
                    return
                yield finished
        finally:
            cut.cancel()
            await items.aclose()

    def stream(self, session: Session, group: Group) -> AsyncGenerator[TextDelta, None]:
        return self._host.stream(session, group)

    async def abort(self, session: Session, attempts: Iterable[Attempt]) -> None:
        self._require()
        await self._host.abort(session, attempts)

    async def control(self, method: str, *args: Any) -> Any:
        self._require()
        return await self._host.control(method, *args)


async def one_round(
    hosts: dict[str, EngineServer], store: LocalStore, failover: str, lose: bool, options: argparse.Namespace
) -> dict[str, float]:
    """Returns the call's wall-clock seconds, this process's CPU seconds, and tokens that were sampled but discarded."""
    links = {name: Link(host) for name, host in hosts.items()}
    args = ServiceArgs.model_validate({"model_id": "demo", "failover": failover})
    router = Router(args, hub.DEMO, links, store)
    await router.start()
    while router._engines.ready < len(links):  # noqa: ASYNC110  # there is no event to wait for
        await asyncio.sleep(POLL_S)
    prompts = [{"input_ids": np.random.randint(20, 200, 8).tolist()} for _ in range(options.samples)]
    before = {name: host._engine.progress() for name, host in hosts.items()}
    gained = dict.fromkeys(hosts, 0)

    def look() -> int:
        for name, host in hosts.items():
            if not links[name].cut.is_set():
                gained[name] = host._engine.progress() - before[name]
        return sum(gained.values())

    cpu_s, started = time.process_time(), time.perf_counter()
    call = asyncio.ensure_future(router.sample(prompts, {"max_tokens": options.tokens, "ignore_eos": True}))
    total = options.samples * options.tokens
    while lose and look() < total / 2:  # noqa: ASYNC110  # there is no event to wait for
        await asyncio.sleep(POLL_S)
    if lose:
        next(iter(links.values())).cut.set()
    response = await call
    found = {"seconds": time.perf_counter() - started, "cpu_s": time.process_time() - cpu_s}
    assert len(response.columns.tokens) == total
    found["twice"] = look() - total
    router.close()
    return found


async def prefill(host: EngineServer, count: int, length: int) -> float:
    """Returns seconds to the first token of `count` new prompts of `length` tokens."""
    from twinkle_serve import SamplingParams

    params, group = SamplingParams(max_tokens=1, ignore_eos=True), np.random.randint
    groups = [Group(id=-2 - i, prompt_ids=group(20, 200, length).astype(np.int32), params=params) for i in range(count)]
    started = time.perf_counter()
    await asyncio.gather(*map(host._engine.sample_group, groups))
    return time.perf_counter() - started


async def run(options: argparse.Namespace) -> dict[str, Any]:
    store = LocalStore(WeightStore("demo"))
    hosts = {}
    for core, name in enumerate(("a", "b")):
        engine = build_engine("vllm", name, str(hub.DEMO), ENGINE_ARGS, cpus=[(core,)], devices_on_node=2)
        hosts[name] = EngineServer(engine, hub.DEMO, store)
    await asyncio.gather(*(host.start(name, 300) for name, host in hosts.items()))
    rounds: dict[str, list[dict[str, float]]] = defaultdict(list)
    for number in range(options.rounds + 1):
        for failover in ("restart", "resume") if number % 2 else ("resume", "restart"):
            for lose in (True, False):
                found = await one_round(hosts, store, failover, lose, options)
                print(f"{number}: {failover}, lost: {lose}: {found}", flush=True)
                if number:  # the first round warms up
                    rounds[f"{failover}, {'one lost' if lose else 'none lost'}"].append(found)
    report: dict[str, Any] = {}
    for what, values in sorted(rounds.items()):
        report[what] = {
            name: {
                "median": round(statistics.median(value[name] for value in values), 3),
                "all": [round(value[name], 3) for value in values],
            }
            for name in ("seconds", "cpu_s", "twice")
        }
        print(what, report[what], flush=True)
    count, length = options.samples // 2, 8 + options.tokens // 2
    times = [await prefill(hosts["b"], count, length) for _ in range(5)]
    report["prefill_s"] = round(statistics.median(times), 3)
    print(f"prefill of {count} prompts of {length} tokens: {report['prefill_s']} s")
    for host in hosts.values():
        await host.stop()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = asyncio.run(run(options))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
