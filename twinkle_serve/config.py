"""The arguments of the service: `args` of an application in serve_config.yaml, parsed once, strictly.

Importing this loads neither torch nor vllm nor ray.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)

from twinkle_serve.data_format.groups import EngineKind
from twinkle_serve.data_format.prompts import TruncationStrategy
from twinkle_serve.errors import ConfigError, MeshError, unknown_name
from twinkle_serve.mesh import DeviceMesh

PolicyName: TypeAlias = Literal["balanced"]


def describe_errors(error: ValidationError, model: type[BaseModel]) -> str:
    """All that pydantic found, one sentence each, in our form."""
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
    """Field names of the model that lies at `loc` inside `model`."""
    current: Any = model
    for part in loc:
        if isinstance(part, int):
            continue
        annotation = current.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        current = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if current is None:
            return []
    return list(current.model_fields)


class Strict(BaseModel):
    """A part of the config: frozen, unknown keys refused, no conversion between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class MeshArgs(Strict):
    """`device_mesh`: the sizes of DeviceMesh.from_sizes. dp_size replicas of tp_size x pp_size devices each."""

    world_size: int = 1
    """1: the product of the others."""
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
    """auto, cpu or cuda. auto: cuda where the cluster has GPUs, else cpu."""

    def mesh(self) -> DeviceMesh:
        return DeviceMesh.from_sizes(**self.model_dump()).require_sampling()


def mesh_args(mesh: DeviceMesh) -> MeshArgs:
    """`device_mesh` of the config for a mesh made in Python.

    Raises:
        MeshError: it is no DeviceMesh.
    """
    if not isinstance(mesh, DeviceMesh):
        raise MeshError(f"device_mesh must be a DeviceMesh, got {mesh!r}. Make one with DeviceMesh.from_sizes.")
    sizes: dict[str, Any] = {f"{name}_size": size for name, size in mesh.sizes}
    other = ("ulysses_size", "ep_size", "etp_size", "ep_fsdp_size", "vpp_size", "sequence_parallel", "device_type")
    return MeshArgs(**sizes, **{name: getattr(mesh, name) for name in other})


class TemplateArgs(Strict):
    """`template`: how messages become tokens. A plain name stands for its `name`."""

    name: str = "Template"
    system: str | None = None
    """System prompt of conversations that have none."""
    max_length: int | None = Field(default=None, gt=0)
    """Most tokens of a prompt."""
    truncation_strategy: TruncationStrategy = "raise"
    """What becomes of a longer prompt: an error, its last or first tokens, or nothing at all."""
    enable_thinking: bool | None = None
    """Handed to the chat template; None leaves it to that."""
    tool_parser: str = "auto"
    """How the model writes calls of tools, by name; auto: as its chat template does."""
    use_chat_template: bool = True
    """False is for base models: the text of an only user message is the prompt."""


class ServiceArgs(Strict):
    """What one sampler is.

    Raises:
        ConfigError: an unknown key or a value that cannot be, named with the keys or values that can.
        MeshError: a device mesh that contradicts itself or that a sampler cannot use.
    """

    model_id: str = Field(min_length=1)
    """demo, a path, ms://org/name or hf://org/name."""
    revision: str | None = Field(default=None, min_length=1)
    """Branch, tag or commit of a model on a hub; None is the hub's default."""
    engine: EngineKind = "vllm"
    device_mesh: MeshArgs = MeshArgs()
    template: Annotated[
        TemplateArgs, BeforeValidator(lambda value: {"name": value} if isinstance(value, str) else value)
    ] = TemplateArgs()
    device_group: str | None = Field(default=None, min_length=1)
    """A DeviceGroup of twinkle_serve.initialize whose devices, and no others, the engines take."""
    adapters: dict[str, str] = {}
    """LoRA adapters to load at start, name to directory."""
    adapter_versions: int = Field(default=1, ge=1)
    """Newest versions of each adapter that a call can name; older ones live only as long as a request uses them."""
    state_dir: str | None = Field(default=None, min_length=1)
    """Directory or fsspec URL where the store keeps every version. None: of this Ray cluster, gone with it."""
    engine_args: dict[str, Any] = {}
    """Handed to the engine as they are."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    policy: PolicyName = "balanced"
    """Which engine a prompt goes to."""
    failover: Literal["restart", "resume"] = "restart"
    """What becomes of a sample whose engine ends: it is sampled again from its start, or goes on from the last tokens
    that the router had received of it, where that can be done honestly."""
    max_queued_requests: int = Field(default=10_000, ge=1)
    """Calls that may run or wait while prompts wait, and, at any time, streams and calls whose prompts are being
    encoded; the next one is refused."""
    max_queued_tokens: int = Field(default=1_000_000_000, ge=1)
    """Tokens that waiting prompts may be expected to take; the next call is refused."""
    request_timeout_s: float = Field(default=3600.0, gt=0, allow_inf_nan=False)
    """Deadline of a call that names none, queueing included."""
    stall_timeout_s: float = Field(default=300.0, gt=0, allow_inf_nan=False)
    """An engine that samples nothing for so long, though it has something to sample, is replaced. Above the longest
    prefill."""
    startup_timeout_s: float = Field(default=1800.0, gt=0, allow_inf_nan=False)
    """Deadline for an engine to load its model."""

    @model_validator(mode="wrap")
    @classmethod
    def _wrap_validation_error(cls, data: Any, parse: ModelWrapValidatorHandler[ServiceArgs]) -> ServiceArgs:
        # ConfigError is no ValueError, so pydantic lets it through as it is, from Ray Serve's own parsing too.
        try:
            args = parse(data)
        except ValidationError as error:
            raise ConfigError(f"args: {describe_errors(error, cls)}") from None
        args.device_mesh.mesh()
        if args.adapters and not args.engine_args.get("enable_lora", args.engine != "vllm"):
            raise ConfigError(
                f"adapters names {', '.join(sorted(args.adapters))}, and LoRA is switched off. "
                "Set engine_args.enable_lora: true."
            )
        return args
