"""Control calls of a sampler whose engines run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Concatenate, ParamSpec, TypeVar

from twinkle_serve import timing
from twinkle_serve.checkpoint import named_tensors, without_wrappers
from twinkle_serve.data_format.status import SamplerStatus
from twinkle_serve.data_format.telemetry import CallInfo, TelemetryReport
from twinkle_serve.data_format.weights import Bucket, PauseMode
from twinkle_serve.errors import RequestError
from twinkle_serve.packing import BUCKET_BYTES, buckets, stay_as_they_are
from twinkle_serve.peft_models import own_weights
from twinkle_serve.routing.api import RouterAPI
from twinkle_serve.sampler.pause import Pause
from twinkle_serve.sampler.router_client import RouterClient
from twinkle_serve.sampler.transports import BucketFiles, UpdateRequest
from twinkle_serve.sampler.weight_upload import WeightUploads
from twinkle_serve.validation import flag, positive

P = ParamSpec("P")
T = TypeVar("T")


class EngineControls:
    """Weights, pauses and the lifecycle of engines. The calls block."""

    def __init__(self, client: RouterClient) -> None:
        """
        Args:
            client: reaches the router of the engines.
        """
        self._client = client
        self._weights = WeightUploads(client)

    def _control(
        self, method: Callable[Concatenate[RouterAPI, P], Awaitable[T]], *args: P.args, **options: P.kwargs
    ) -> T:
        """Calls a method of the router, given as `RouterAPI.name`, and waits for its answer."""
        call = self._client.call(timing.CONTROL_TIMEOUT_S, method, *args, **options)
        return self._client.loop.call(call)

    # -- weights ---------------------------------------------------------------------------------

    def update_weights(
        self,
        weights: object,
        version: str,
        mode: PauseMode = "keep",
        *,
        track: str = "",
        merge_lora: bool = False,
        allow_nonfinite: bool = False,
        bucket_bytes: int = BUCKET_BYTES,
        durable: bool = True,
        delta: bool = False,
        timeout_s: float = timing.CONTROL_TIMEOUT_S,
    ) -> str:
        """Replaces the model's own weights on every engine of a track. Returns `version`, which is stamped on later
        samples.

        The weights are sent first, while the engines sample; then the engines pause, load them and resume. Adapters
        stay loaded. Engines that start later load them too.

        Args:
            weights: every weight of the model by its name in the checkpoint: a `state_dict`, an iterable of pairs of
                name and tensor, a directory with safetensors files on this machine, or a model on a hub,
                `hf://org/name`. What FSDP, torch.compile and the like add to names is left out. A tensor is copied
                before the next one is taken, so its memory may be used again.
            version: label of these weights; unique in the service.
            mode: fate of running samples. keep: they continue, and their `weight_versions` say which tokens come from
                which weights; their KV cache is recomputed. wait: they end first. abort: they end where they are, with
                stop_reason abort; those without a token start anew.
            track: the track whose engines load them, of the config's `tracks`; those of others sample on. "": the
                first one, which is the only one unless the config has others.
            merge_lora: `weights` is a model of peft; what its active adapters learnt is added to copies of its weights,
                one at a time. The model is not changed.
            allow_nonfinite: accept NaN and infinite values.
            bucket_bytes: approximate size of one transfer; at least one weight. In a cluster of one node all buckets
                are in /dev/shm until the call returns, else a few of them here, and two at each engine.
            delta: send only the blocks of 64 KiB that differ from the weights that this sampler has sent last, by
                update_weights with delta=True too, if the service has kept those. Hashes of all blocks are kept here.
            durable: return when the service has written the weights to its state directory. False: when the engines
                have them. If they cannot be written then, or the store is killed, the previous weights come back on all
                engines, which is logged; samples keep the label of those that they are of.
            timeout_s: limit of each step in seconds: sending a bucket, the engines' part, and writing.

        Raises:
            WeightsError: invalid names, shapes, dtypes or values, missing weights, a version that exists, or another
                update under way.
            EngineError: an engine failed.
            StoreError: the store failed.
            DeadlineError: a step was not done within `timeout_s`.
                After each, the previous weights are current on all engines of the track, and none is paused.
            UnsupportedError: a model without safetensors files; with merge_lora, adapters that are not plain LoRA.
            AdapterError: with merge_lora, an adapter of a weight that two modules share.
            RequestError: another invalid argument, an unknown track, or a sampler that is asleep.
        """
        positive("timeout_s", timeout_s)
        flag("allow_nonfinite", allow_nonfinite)
        positive("bucket_bytes", bucket_bytes)
        if flag("merge_lora", merge_lora):
            if not getattr(weights, "peft_config", None):
                raise RequestError(f"merge_lora takes a model of peft, got {type(weights).__name__}. Leave it out.")
            weights = own_weights(weights, merged=True)

        def made(files: BucketFiles) -> Iterator[Bucket]:
            tensors = without_wrappers(named_tensors(weights))
            writers = files.writers if stay_as_they_are(weights) else 1
            return buckets(
                tensors, bucket_bytes, allow_nonfinite=allow_nonfinite, new_file=files.new_file, writers=writers
            )

        update = UpdateRequest(version, mode, track, flag("durable", durable), timeout_s)
        return self._weights.send(update, made, delta=flag("delta", delta))

    def use_weights(
        self,
        version: str,
        *,
        mode: PauseMode = "keep",
        track: str = "",
        timeout_s: float = timing.CONTROL_TIMEOUT_S,
    ) -> str:
        """Makes weights current again that the service has kept, on every engine of a track. Returns `version`.

        Args:
            version: as in `status()["weights_versions"]`; `initial` are those of the model's checkpoint. The config's
                `weights_versions` says how many are kept.
            mode: fate of running samples, as in `update_weights`.
            track: as in `update_weights`; the version may be, or have been, that of another track.
            timeout_s: limit in seconds.

        Raises:
            WeightsError: the version is not kept, or an update is under way.
                Others as `update_weights`.
        """
        limit_s = 3 * positive("timeout_s", timeout_s) + timing.CONTROL_TIMEOUT_S
        call = self._client.call(limit_s, RouterAPI.use_weights, version, mode, timeout_s, track)
        return self._client.loop.call(call)

    def pause(self, mode: PauseMode = "keep", *, lease_s: float = 30.0) -> Pause:
        """Stops all engines until the pause is ended. Calls wait meanwhile, within their deadlines.

        The pause is renewed in the background while this process lives; if it dies, the engines resume within
        `lease_s`.

        Args:
            mode: fate of running samples, as in `update_weights`.

        Returns:
            The pause: `resume()` ends it, or a `with` block around it.

        Raises:
            RequestError: unknown mode or invalid lease.
        """
        return Pause(self._client, mode, lease_s)

    # -- control ---------------------------------------------------------------------------------

    def get_state_keys(self) -> list[str]:
        """Returns the names of the model's weights, as in its checkpoint."""
        return self._control(RouterAPI.state_keys)

    def reset_prefix_cache(self) -> None:
        """Drops the cached keys and values of earlier prompts on every engine."""
        self._control(RouterAPI.reset_prefix_cache)

    def sleep(self, level: int = 1) -> None:
        """Frees the engines' device memory until `wake_up`; calls are refused meanwhile.

        Args:
            level: 1 keeps the weights in host memory; 2 drops them, and `wake_up` loads the current ones.

        Raises:
            UnsupportedError: an engine on CPU, torch, or vllm without engine_args.enable_sleep_mode.
            RequestError: calls are running.
        """
        self._control(RouterAPI.sleep, level)

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Ends `sleep`.

        Args:
            tags: "weights" or "kv_cache" wake only these; None wakes everything.
        """
        self._control(RouterAPI.wake_up, tags)

    def drain_engine(self, name: str, *, timeout_s: float = 600.0) -> None:
        """Gives an engine no new prompts, and returns when it has finished its own. It stays out of use, even if its
        process is replaced, until `undrain_engine` or `restart_engine`, or until the router is restarted.

        Samples that are unfinished after `timeout_s` are sampled by the other engines, with the same seeds; a text
        stream fails. Without another engine in use, calls wait for one, within their deadlines.

        Args:
            name: as in `status()["engines"]`.

        Raises:
            RequestError: no such engine.
            UnsupportedError: an engine in this process.
        """
        client = self._client
        client.loop.call(client.call(_patience_s(timeout_s), RouterAPI.drain_engine, name, timeout_s))

    def undrain_engine(self, name: str) -> None:
        """Uses a drained engine again, as soon as it has the current weights. Idempotent.

        Raises:
            RequestError: no such engine.
            UnsupportedError: an engine in this process.
        """
        self._client.loop.call(self._client.call(timing.ANSWER_TIMEOUT_S, RouterAPI.undrain_engine, name))

    def restart_engine(self, name: str, *, drain_timeout_s: float = 60.0, timeout_s: float = 1800.0) -> None:
        """Drains an engine for at most `drain_timeout_s`, replaces its process, and returns when it is in use.

        Args:
            timeout_s: limit of the whole call in seconds.

        Raises:
            RequestError: no such engine.
            UnsupportedError: an engine in this process.
            DeadlineError: it was not in use again within `timeout_s`; it will be as soon as it can.
        """
        limit_s, client = _patience_s(timeout_s), self._client
        client.loop.call(client.call(limit_s, RouterAPI.restart_engine, name, drain_timeout_s, timeout_s))

    def status(self) -> SamplerStatus:
        """Returns the state of engines, adapters and queues, as plain values."""
        return self._control(RouterAPI.status)

    def telemetry(self, since: float = 0.0) -> TelemetryReport:
        """Returns throughput, queues and latencies of the last hour, a point each 5 s, and events.

        Args:
            since: leaves out what was before, seconds since 1970.
        """
        return self._control(RouterAPI.telemetry, since)

    def calls(self) -> list[CallInfo]:
        """Returns the running calls of all callers, the oldest first."""
        return self._control(RouterAPI.calls)

    def shutdown(self, *, force: bool = False) -> None:
        """Ends the sampler and frees its devices, for every caller of it. Idempotent.

        Args:
            force: end a service that another running job, or `serve`, has deployed, too.

        Raises:
            NotOwnerError: such a service, without `force`.
        """
        self._client.shutdown(force=flag("force", force))


def _patience_s(timeout_s: float) -> float:
    """Returns how long to wait for a router that enforces a deadline, or refuses an invalid one."""
    valid = isinstance(timeout_s, (int, float)) and timeout_s > 0
    return (timeout_s if valid else 0.0) + timing.ANSWER_TIMEOUT_S
