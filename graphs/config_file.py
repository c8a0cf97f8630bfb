"""Reads a service's YAML and checks every key: Ray Serve ignores unknown ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ValidationError

from twinkle_serve.config import ServiceArgs, describe_errors
from twinkle_serve.engines import check_engine_args
from twinkle_serve.errors import ConfigError, unknown_name
from twinkle_serve.gateway.config import GatewayArgs, require_key_beyond_loopback
from twinkle_serve.gateway.keys import Keys

if TYPE_CHECKING:
    from ray.serve.schema import ServeDeploySchema

BUILDER = "graphs.sampler:build"
GATEWAY_BUILDER = "graphs.gateway:build"


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A config that was checked."""

    schema: ServeDeploySchema
    samplers: dict[str, ServiceArgs]
    """By application; applications that are neither samplers nor gateways are not checked."""
    gateways: dict[str, GatewayArgs]
    """By application."""

    @property
    def applications(self) -> list[str]:
        return [application.name for application in self.schema.applications]


def check_config_file(path: Path) -> ConfigFile:
    """Reads a config and checks all of it.

    Raises:
        ConfigError: no such file, not YAML, an unknown key at any level, arguments that ServiceArgs or GatewayArgs
            refuses, invalid keys of HTTP callers, or none where others can reach the gateway.
        EngineArgsError: engine_args that the engine does not have.
    """
    from ray.serve.schema import ServeDeploySchema

    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}. Name a file, such as serve_config.yaml.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"must be a mapping with the key applications, got {type(document).__name__}.")
    _refuse_unknown_keys(document, ServeDeploySchema, "")
    try:
        config = ServeDeploySchema.model_validate(document)
    except ValidationError as error:
        raise ConfigError(describe_errors(error, ServeDeploySchema)) from None
    if not config.applications:
        raise ConfigError("applications is empty. Name at least one.")
    samplers = {
        application.name: ServiceArgs.model_validate(application.args)
        for application in config.applications
        if application.import_path == BUILDER
    }
    for args in samplers.values():
        check_engine_args(args.engine, args.engine_args)
    gateways = {
        application.name: GatewayArgs.model_validate(application.args)
        for application in config.applications
        if application.import_path == GATEWAY_BUILDER
    }
    for gateway in gateways.values():
        _check_keys(gateway, config)
    return ConfigFile(config, samplers, gateways)


def _check_keys(gateway: GatewayArgs, config: ServeDeploySchema) -> None:
    """Raises ConfigError for invalid keys, and where HTTP listens beyond this machine without one."""
    keys = Keys.read(gateway.keys_file)
    if "host" in config.http_options.model_fields_set:  # else the launcher listens on this machine alone
        require_key_beyond_loopback(str(config.http_options.host), bool(keys))
    if gateway.listen is not None:
        require_key_beyond_loopback(gateway.listen.host, bool(keys), "listen")


def _refuse_unknown_keys(value: Any, model: type[BaseModel], where: str) -> None:
    """Walks the document along Ray Serve's own schema."""
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        if key not in model.model_fields:
            place = f" in {where}" if where else ""
            raise ConfigError(unknown_name(f"key{place}", key, model.model_fields) + ".")
        inner = _model_inside(model.model_fields[key].annotation)
        if inner is None:
            continue
        path = f"{where}.{key}" if where else str(key)
        for i, part in enumerate(item if isinstance(item, list) else [item]):
            _refuse_unknown_keys(part, inner, f"{path}[{i}]" if isinstance(item, list) else path)


def _model_inside(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model in an annotation such as `list[Model]` or `Model | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        if (found := _model_inside(part)) is not None:
            return found
    return None
