"""Sends new weights of the model to the engines."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from twinkle_serve import timing
from twinkle_serve.data_format.weights import Bucket, PauseMode
from twinkle_serve.errors import TwinkleServeError
from twinkle_serve.routing.api import RouterAPI
from twinkle_serve.sampler.router_client import RouterClient
from twinkle_serve.tensors import TensorFile


def upload_weights(
    client: RouterClient,
    version: str,
    mode: PauseMode,
    track: str,
    make_buckets: Callable[[Callable[[int], TensorFile]], Iterator[Bucket]],
    timeout_s: float,
    durable: bool,
) -> str:
    """Sends buckets of weights and publishes them as a version. Returns its label.

    Buckets are taken in the caller's thread, the next one while the last one is being sent.

    Args:
        make_buckets: yields them, in the files that the function given to it makes; see `BucketSender.new_file`.
        timeout_s: limit of each step: sending a bucket, and publishing.
        durable: return when the version is on the disk.
    """
    loop = client.loop
    upload = loop.call(client.call(timeout_s, RouterAPI.begin_weights, version, mode, track))
    try:
        with client.sending() as sender:
            on_its_way = None
            for index, bucket in enumerate(make_buckets(sender.new_file)):
                argument = sender.send(bucket)
                if on_its_way is not None:
                    loop.wait(on_its_way)
                on_its_way = loop.start(client.call(timeout_s, RouterAPI.append_weights, upload, index, argument))
            if on_its_way is not None:
                loop.wait(on_its_way)
            # If publishing fails at its end, the engines go back within the same time; writing has as long again.
            limit_s = 3 * timeout_s + timing.CONTROL_TIMEOUT_S
            return loop.call(client.call(limit_s, RouterAPI.publish_weights, upload, mode, timeout_s, durable))
    except BaseException:
        with contextlib.suppress(TwinkleServeError):  # an upload without buckets is given up by the router in time
            loop.call(client.call(timing.ANSWER_TIMEOUT_S, RouterAPI.abandon_weights, upload))
        raise
