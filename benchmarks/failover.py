"""Cost of a lost engine: samples that start over against samples that continue, `failover: restart` and `resume`.

    scripts/bench failover [--rounds 5] [--samples 64] [--tokens 150] [--json FILE]

Two vLLM engines and the router in this process, without Ray. When half of the tokens are sampled, one engine is cut
off: its calls raise like those of a dead process until the round is over. So its work is lost without restarting it.
Rounds without a loss show the cost of reporting partial samples.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from benchmarks.common.report import Figures, Report, command
from twinkle_serve import hub
from twinkle_serve.config import ServiceArgs
from twinkle_serve.data_format.groups import Group, Session, TextDelta
from twinkle_serve.data_format.sampling_params import DecodingParams
from twinkle_serve.engines import build_engine
from twinkle_serve.engines.client import EngineClient
from twinkle_serve.engines.group_runner import Finished
from twinkle_serve.engines.protocol import Engine
from twinkle_serve.engines.server import EngineServer
from twinkle_serve.errors import EngineDeadError
from twinkle_serve.routing.router import Router
from twinkle_serve.weights import LocalStore, WeightStore

ENGINE_ARGS = {"max_model_len": 256, "dtype": "float32", "max_num_seqs": 64, "kv_cache_memory_bytes": 2**28}
POLL_S = 0.01
START_S = 300


@dataclass(frozen=True, slots=True)
class Host:
    """An engine in this process, and its server."""

    engine: Engine
    server: EngineServer


class CutOffClient:
    """An engine's server in this process, until it is cut off: then its calls raise."""

    def __init__(self, server: EngineServer) -> None:
        self._server = server
        self.cut = asyncio.Event()

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        """A method of `EngineClient` that answers once."""
        method: Callable[..., Awaitable[Any]] = getattr(self._server, name)

        async def call(*args: Any) -> Any:
            if self.cut.is_set():
                raise EngineDeadError("cut off")
            return await method(*args)

        return call

    async def results(self, session: Session) -> AsyncGenerator[Finished, None]:
        items = self._server.results(session)
        cut = asyncio.ensure_future(self.cut.wait())
        try:
            while True:
                item = asyncio.ensure_future(anext(items, None))
                await asyncio.wait({item, cut}, return_when=asyncio.FIRST_COMPLETED)
                if self.cut.is_set():
                    item.cancel()
                    await asyncio.wait({item})
                    raise EngineDeadError("cut off")
                if (finished := item.result()) is None:
                    return
                yield finished
        finally:
            cut.cancel()
            await items.aclose()

    def stream(self, session: Session, group: Group) -> AsyncGenerator[TextDelta, None]:
        return self._server.stream(session, group)


async def one_round(
    hosts: dict[str, Host], store: LocalStore, failover: str, lose: bool, options: argparse.Namespace
) -> dict[str, float]:
    """Returns the call's wall-clock seconds, this process's CPU seconds, and tokens that were sampled but discarded."""
    clients = {name: CutOffClient(host.server) for name, host in hosts.items()}
    args = ServiceArgs.model_validate({"model_id": "demo", "failover": failover})
    router = Router(args, hub.DEMO, cast(dict[str, EngineClient], clients), store)
    await router.start()
    while not await _all_ready(router):  # noqa: ASYNC110  # there is no event to wait for
        await asyncio.sleep(POLL_S)
    prompts = [{"input_ids": np.random.randint(20, 200, 8).tolist()} for _ in range(options.samples)]
    before = {name: host.engine.progress() for name, host in hosts.items()}
    sampled = dict.fromkeys(hosts, 0)

    def count_sampled() -> int:
        for name, host in hosts.items():
            if not clients[name].cut.is_set():
                sampled[name] = host.engine.progress() - before[name]
        return sum(sampled.values())

    cpu_s, started = time.process_time(), time.perf_counter()
    call = asyncio.ensure_future(router.sample(prompts, {"max_tokens": options.tokens, "ignore_eos": True}))
    total = options.samples * options.tokens
    while lose and count_sampled() < total / 2:  # noqa: ASYNC110  # there is no event to wait for
        await asyncio.sleep(POLL_S)
    if lose:
        next(iter(clients.values())).cut.set()
    response = await call
    figures = {"seconds": time.perf_counter() - started, "cpu_s": time.process_time() - cpu_s}
    assert len(response.columns.tokens) == total
    figures["twice"] = count_sampled() - total
    router.close()
    return figures


async def _all_ready(router: Router) -> bool:
    status = await router.status()
    return all(engine["state"] == "ready" for engine in status["engines"].values())


async def prefill(engine: Engine, count: int, length: int) -> float:
    """Returns seconds to the first token of `count` new prompts of `length` tokens."""
    params, random_ids = DecodingParams(max_tokens=1, ignore_eos=True), np.random.randint
    groups = [
        Group(id=-2 - i, prompt_ids=random_ids(20, 200, length).astype(np.int32), params=params) for i in range(count)
    ]
    started = time.perf_counter()
    await asyncio.gather(*map(engine.sample_group, groups))
    return time.perf_counter() - started


async def run(options: argparse.Namespace, report: Report) -> None:
    store = LocalStore(WeightStore("demo"))
    hosts: dict[str, Host] = {}
    for core, name in enumerate(("a", "b")):
        engine = build_engine("vllm", name, str(hub.DEMO), ENGINE_ARGS, cpus=[(core,)], devices_on_node=2)
        hosts[name] = Host(engine, EngineServer(engine, hub.DEMO, store))
    await asyncio.gather(*(host.server.start(name, START_S) for name, host in hosts.items()))
    rounds: dict[str, list[dict[str, float]]] = defaultdict(list)
    for number in range(options.rounds + 1):
        for failover in ("restart", "resume") if number % 2 else ("resume", "restart"):
            for lose in (True, False):
                figures = await one_round(hosts, store, failover, lose, options)
                print(f"{number}: {failover}, lost: {lose}: {figures}", flush=True)
                if number:  # the first round warms up
                    rounds[f"{failover}, {'one lost' if lose else 'none lost'}"].append(figures)
        report.update(**{case: summary(rounds[case]) for case in sorted(rounds)})
    count, length = options.samples // 2, 8 + options.tokens // 2
    times = [await prefill(hosts["b"].engine, count, length) for _ in range(5)]
    report.update(prefill_s=round(statistics.median(times), 3), prefill=f"{count} prompts of {length} tokens")
    for host in hosts.values():
        await host.server.stop()


def summary(rounds: list[dict[str, float]]) -> Figures:
    return {
        name: {
            "median": round(statistics.median(each[name] for each in rounds), 3),
            "all": [round(each[name], 3) for each in rounds],
        }
        for name in ("seconds", "cpu_s", "twice")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--json", type=Path, help="write the figures here too, after every round")
    options = parser.parse_args()
    report = Report(command("failover", options), options.json)
    asyncio.run(run(options, report))
    report.finish()


if __name__ == "__main__":
    main()
