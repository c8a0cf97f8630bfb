"""Configuration of the service: `args` of an application in serve_config.yaml, parsed once, strictly.

Importing this module loads neither torch nor vllm nor ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)

from twinkle_serve import traces
from twinkle_serve.data_format.groups import EngineKind
from twinkle_serve.data_format.prompts import TruncationStrategy
from twinkle_serve.data_format.sampling_params import SamplingParams
from twinkle_serve.data_format.weights import MAIN_TRACK
from twinkle_serve.errors import ConfigError, MeshError, SamplingParamsError, unknown_name
from twinkle_serve.mesh import TRAINING_SIZES, DeviceMesh

PolicyName: TypeAlias = Literal["balanced"]


def describe_errors(error: ValidationError, model: type[BaseModel]) -> str:
    """Formats pydantic's errors, one sentence each."""
    sentences = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            fields = set(_fields_at(model, item["loc"][:-1]))
            where = ".".join(str(part) for part in item["loc"][:-1])
            sentences.append(unknown_name(f"key{f' in {where}' if where else ''}", item["loc"][-1], fields) + ".")
        elif item["type"] == "missing":
            sentences.append(f"{path} is missing.")
        else:
            sentences.append(f"{path}: {item['msg']}, got {item['input']!r}.")
    return " ".join(sentences)


def _fields_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Field names of the model at `loc` inside `model`."""
    current = model
    for part in loc:
        if isinstance(part, int):
            continue
        annotation = current.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        inner = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if inner is None:
            return []
        current = inner
    return list(current.model_fields)


class Strict(BaseModel):
    """Base of the config models: frozen, no unknown keys, no conversion between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class MeshArgs(Strict):
    """`device_mesh`: the arguments of DeviceMesh.from_sizes. dp_size replicas of tp_size x pp_size devices each."""

    world_size: int = 1
    """Number of devices; 1 stands for the product of the other sizes."""
    dp_size: int = 1
    tp_size: int | None = None
    pp_size: int | None = None
    fsdp_size: int | None = None
    ulysses_size: int | None = None
    cp_size: int | None = None
    ep_size: int | None = None
    etp_size: int | None = None
    ep_fsdp_size: int | None = None
    vpp_size: int | None = None
    sequence_parallel: bool = False
    device_type: str = "auto"
    """auto, cpu or cuda. auto: cuda if the cluster has GPUs, else cpu."""

    def mesh(self) -> DeviceMesh:
        return DeviceMesh.from_sizes(**self.model_dump()).require_sampling()


def mesh_args(mesh: DeviceMesh) -> MeshArgs:
    """Converts a mesh made in Python to `device_mesh` of the config.

    Raises:
        MeshError: `mesh` is not a DeviceMesh.
    """
    if not isinstance(mesh, DeviceMesh):
        raise MeshError(f"device_mesh must be a DeviceMesh, got {mesh!r}. Make one with DeviceMesh.from_sizes.")
    sizes = {f"{name}_size": size for name, size in mesh.sizes}
    other = {name: getattr(mesh, name) for name in (*TRAINING_SIZES, "sequence_parallel", "device_type")}
    return MeshArgs.model_validate({**sizes, **other})


class TemplateArgs(Strict):
    """`template`: how messages are rendered and tokenised. A string is short for `{name: …}`."""

    name: str = "Template"
    system: str | None = None
    """System prompt for conversations without one."""
    max_length: int | None = Field(default=None, gt=0)
    """Maximum length of a prompt, tokens."""
    truncation_strategy: TruncationStrategy = "raise"
    """Treatment of a longer prompt: raise an error, cut it on the left or right, or leave it out of the call."""
    enable_thinking: bool | None = None
    """Passed to the chat template; None keeps the template's default."""
    tool_parser: str = "auto"
    """Name of the format of the model's tool calls, vllm:NAME for a parser of vLLM; auto: detected from its chat
    template."""
    reasoning_parser: str | None = "auto"
    """auto: reasoning in the tags <think> and </think>. vllm:NAME: a parser of vLLM. None: reasoning is content."""
    use_chat_template: bool = True
    """False for base models: the prompt is the text of a single user message."""
    continue_final_message: bool = False
    """Continue the assistant's message that ends a conversation; False: PromptError. Calls can say otherwise."""


class SessionArgs(Strict):
    """`sessions`: limits of the conversations that the store keeps for clients of the gateway."""

    max_sessions: int = Field(default=10_000, ge=1)
    """Maximum number of sessions; one more evicts the least recently used one."""
    memory_bytes: int = Field(default=256 * 2**20, ge=1)
    """Maximum memory for sessions, bytes; the others are read from disk when they are used. A larger session is in
    memory alone."""
    disk_bytes: int = Field(default=8 * 2**30, ge=1)
    """Maximum size of all sessions on disk, bytes; more evicts the least recently used ones."""
    lease_s: float = Field(default=3600.0, gt=0, allow_inf_nan=False)
    """A session ends when it has not been used for this long, seconds. A running turn counts as use."""


class FutureArgs(Strict):
    """`futures`: results of calls that their callers collect later, as Tinker's do."""

    keep_s: float = Field(default=300.0, gt=0, allow_inf_nan=False)
    """How long a result is kept after its call's end, seconds."""
    max_bytes: int = Field(default=256 * 2**20, ge=1)
    """Size of all results that are kept. The oldest go first, of those that were collected if there are any; calls are
    refused while results that nobody has collected exceed it."""


class TraceArgs(Strict):
    """`traces`: where the spans of calls are sent, by OpenTelemetry."""

    endpoint: str = Field(min_length=1)
    """Collector of OTLP: http://host:4317 by grpc, http://host:4318/v1/traces by http/protobuf."""
    protocol: traces.Protocol = "grpc"
    """grpc or http/protobuf."""
    sample_ratio: float = Field(default=1.0, ge=0, le=1)
    """Part of the traces that is recorded, of those that begin here; others are recorded if their caller's span is."""

    def check(self) -> Self:
        """Raises ConfigError if a package is missing that exports spans."""
        traces.check_exporter(self.protocol)
        return self


def traces_of(args: TraceArgs | None, part: str) -> traces.Traces | None:
    """Returns the recorder of spans of one part of a service; None where there is none.

    Args:
        part: gateway, router or engine.
    """
    if args is None:
        return None
    return traces.Traces(part, traces.make_exporter(args.endpoint, args.protocol), args.sample_ratio)


class ServiceArgs(Strict):
    """Configuration of one sampler service.

    Raises:
        ConfigError: an unknown key or an invalid value; the message lists the valid ones.
        MeshError: a device mesh that is inconsistent or has training-only dimensions.
    """

    model_id: str = Field(min_length=1)
    """demo, a path, ms://org/name or hf://org/name."""
    revision: str | None = Field(default=None, min_length=1)
    """Branch, tag or commit of a model on a hub; None: the hub's default."""
    engine: EngineKind = "vllm"
    """Engine that runs the model. fake: a deterministic toy model, for tests."""
    device_mesh: MeshArgs = MeshArgs()
    """Number of engines and devices of each."""
    tracks: dict[Annotated[str, Field(min_length=1)], Annotated[int, Field(ge=1)]] | None = Field(
        default=None, min_length=1
    )
    """Number of engines of each track, by name; together dp_size. Engines are assigned in the order of their numbers.
    The weights of each track are updated by themselves, and a call is sampled by one track, by default the first.
    None: one track, main."""
    template: Annotated[
        TemplateArgs, BeforeValidator(lambda value: {"name": value} if isinstance(value, str) else value)
    ] = TemplateArgs()
    """Default template of calls."""
    device_group: str | None = Field(default=None, min_length=1)
    """Name of a DeviceGroup of twinkle_serve.initialize; the engines use its devices only. None: any device."""
    adapters: dict[str, str] = {}
    """LoRA adapters to load at start, name to directory."""
    adapter_versions: int = Field(default=1, ge=1)
    """Number of newest versions of each adapter that calls can name; older ones live only while a request uses them."""
    weights_versions: int = Field(default=1, ge=1)
    """Number of newest versions of the model's own weights that the store keeps, so that they can be used again."""
    state_dir: str | None = Field(default=None, min_length=1)
    """Directory or fsspec URL where the store keeps every version. None: a directory that ends with the Ray cluster."""
    sessions: SessionArgs = SessionArgs()
    """Limits of sessions."""
    engine_args: dict[str, Any] = {}
    """Arguments passed to the engine unchanged."""
    sampling_params: dict[str, Any] = {}
    """Sampling parameters of calls that give none, and those that a call's dict leaves out. A SamplingParams object is
    complete: nothing is added to it."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    policy: PolicyName = "balanced"
    """How an engine is chosen for each prompt."""
    failover: Literal["restart", "resume"] = "restart"
    """Treatment of samples whose engine dies. restart: sample again from the beginning. resume: continue after the last
    tokens that the router received, if that does not change the distribution of the samples; else restart."""
    max_queued_requests: int = Field(default=10_000, ge=1)
    """Maximum number of calls, running or queued, while prompts are queued; also, at any time, of streams plus calls
    whose prompts are being encoded. Further calls are refused."""
    max_queued_tokens: int = Field(default=1_000_000_000, ge=1)
    """Maximum number of tokens that queued prompts are expected to take; further calls are refused."""
    request_timeout_s: float = Field(default=3600.0, gt=0, allow_inf_nan=False)
    """Deadline of calls without `timeout_s`, time in the queue included, seconds."""
    stall_timeout_s: float = Field(default=300.0, gt=0, allow_inf_nan=False)
    """An engine that has work and produces no token for this long is replaced, seconds. Set it above the longest
    prefill."""
    startup_timeout_s: float = Field(default=1800.0, gt=0, allow_inf_nan=False)
    """Deadline for an engine to load its model, seconds."""
    futures: FutureArgs = FutureArgs()
    """Results that callers collect later."""
    traces: TraceArgs | None = None
    """Where the spans of calls are sent. None: nowhere, and none are recorded."""

    @property
    def track_names(self) -> list[str]:
        """The tracks; the first one is that of calls that name none."""
        return list(self.tracks or [MAIN_TRACK])

    def tracks_of(self, engines: Sequence[str]) -> dict[str, str]:
        """Returns the track of each engine, by name.

        Args:
            engines: all of them, in the order of their numbers.
        """
        sizes = self.tracks or {MAIN_TRACK: len(engines)}
        return dict(zip(engines, [track for track, size in sizes.items() for _ in range(size)], strict=True))

    @model_validator(mode="wrap")
    @classmethod
    def _wrap_validation_error(cls, data: object, parse: ModelWrapValidatorHandler[ServiceArgs]) -> ServiceArgs:
        # ConfigError is not a ValueError, so pydantic does not wrap it, not even in Ray Serve's own parsing.
        try:
            args = parse(data)
        except ValidationError as error:
            raise ConfigError(f"args: {describe_errors(error, cls)}") from None
        engines = args.device_mesh.mesh().dp_size
        if args.tracks is not None and (size := sum(args.tracks.values())) != engines:
            raise ConfigError(
                f"args: tracks has {size} engines, and device_mesh.dp_size is {engines}. Give each engine to one track."
            )
        try:
            SamplingParams.of(args.sampling_params)
        except SamplingParamsError as error:
            raise ConfigError(f"args: sampling_params: {error}") from None
        if args.adapters and not args.engine_args.get("enable_lora", args.engine != "vllm"):
            raise ConfigError(
                f"adapters names {', '.join(sorted(args.adapters))}, and LoRA is switched off. "
                "Set engine_args.enable_lora: true."
            )
        return args
