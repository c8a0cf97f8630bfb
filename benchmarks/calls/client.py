"""One of several client processes: waits for a line on stdin, samples, and writes its seconds and tokens to stdout.

python -m benchmarks.calls.client (service ADDRESS NAME | endpoint URL MODEL) CALLS AT_A_TIME SEED
"""

from __future__ import annotations

import asyncio
import json
import random
import sys

import aiohttp
import uvloop

from benchmarks.calls.ways import Endpoint, Service, Way
from benchmarks.calls.workloads import single
from twinkle_serve import connect


async def main() -> None:
    kind, first, second, calls, at_a_time, seed = sys.argv[1:]
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3)) as session:
        way: Way
        if kind == "service":
            way = Service(await asyncio.to_thread(connect, second, address=first))
        else:
            way = Endpoint(first, second, session)
        rng = random.Random(int(seed))
        await single(way, rng, calls=int(at_a_time), at_a_time=int(at_a_time))
        while True:
            print("ready", flush=True)
            if not await asyncio.to_thread(sys.stdin.readline):
                return
            work = await single(way, rng, calls=int(calls), at_a_time=int(at_a_time))
            print(json.dumps({"tokens": work.tokens, "samples": work.samples}), flush=True)


if __name__ == "__main__":
    uvloop.run(main())
