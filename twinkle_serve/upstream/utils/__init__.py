"""`twinkle.utils`: helpers that scripts around a sampler use."""

from __future__ import annotations

import importlib.metadata
import os
import socket
from collections.abc import Mapping
from types import ModuleType
from typing import Any, TypeVar

from twinkle_serve import get_logger
from twinkle_serve.errors import ConfigError, unknown_name
from twinkle_serve.mesh import DeviceGroup, DeviceMesh
from twinkle_serve.platform import CPU, GPU, Platform
from twinkle_serve.upstream.utils.framework import Torch

__all__ = [
    "CPU",
    "GPU",
    "DeviceGroup",
    "DeviceMesh",
    "Platform",
    "Torch",
    "check_unsafe",
    "construct_class",
    "deep_getattr",
    "exists",
    "find_free_port",
    "find_node_ip",
    "framework_util",
    "get_logger",
    "is_last_rank",
    "is_master",
    "is_valid_ipv6_address",
    "requires",
    "to_device",
    "torch_util",
    "trust_remote_code",
]

T = TypeVar("T")

framework_util = torch_util = Torch
is_master = Platform.is_master
is_last_rank = Platform.is_last_rank


def requires(package: str) -> None:
    """Checks that a package is installed, in a version that fits: `requires("vllm>=0.8")`.

    Raises:
        ImportError: it is not.
    """
    from packaging.requirements import Requirement

    requirement = Requirement(package)
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"{requirement.name} is not installed. It is required: {package}.") from None
    if not requirement.specifier.contains(version, prereleases=True):
        raise ImportError(f"{requirement.name} {version} is installed. Required: {package}.")


def exists(package: str) -> bool:
    """Whether a package is installed, in a version that fits."""
    try:
        requires(package)
    except ImportError:
        return False
    return True


def is_valid_ipv6_address(ip: str) -> bool:
    """Whether a text is an IPv6 address."""
    try:
        socket.inet_pton(socket.AF_INET6, ip)
    except OSError:
        return False
    return True


def find_node_ip() -> str | None:
    """Returns the address by which this node reaches others; None if it reaches none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address for documentation: nothing is sent
        except OSError:
            return None
        return str(probe.getsockname()[0])


def find_free_port(address: str = "", start_port: int | None = None, retry: int = 100) -> int:
    """Returns a port on which nobody listens.

    Args:
        address: address to listen on.
        start_port: the first one to try. None: the system chooses.
        retry: number of ports to try.

    Raises:
        OSError: none of them is free.
    """
    family = socket.AF_INET6 if is_valid_ipv6_address(address) else socket.AF_INET
    first = start_port or 0
    for port in range(first, first + retry):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((address, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise OSError(f"no port from {first} to {first + retry - 1} is free at {address or 'any address'}.")


def deep_getattr(obj: object, attr: str, default: Any = None) -> Any:
    """Returns an attribute by a dotted path; keys of dicts count as attributes. `default` if there is none."""
    for name in attr.split("."):
        obj = obj.get(name, default) if isinstance(obj, Mapping) else getattr(obj, name, default)
        if obj is default:
            return default
    return obj


def to_device(data: Any, device: Any, non_blocking: bool = False) -> Any:
    """Moves the tensors in dicts, lists and tuples to a device; other values stay as they are."""
    if isinstance(data, Mapping):
        return {key: to_device(value, device, non_blocking) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return type(data)(to_device(value, device, non_blocking) for value in data)
    return data.to(device, non_blocking=non_blocking) if hasattr(data, "to") else data


def construct_class(func: Any, class_t: type[T], module_t: ModuleType | list[ModuleType], **init_args: Any) -> Any:
    """Makes an object of its class or the name of its class; returns an object unchanged.

    Args:
        func: an object, a class, or the name of one.
        class_t: class that it must be of.
        module_t: modules in which the name is looked up.

    Raises:
        ConfigError: no such class.
    """
    if isinstance(func, str):
        modules = module_t if isinstance(module_t, list) else [module_t]
        found = next((getattr(module, func) for module in modules if hasattr(module, func)), None)
        if found is None:
            names = [name for module in modules for name in getattr(module, "__all__", ())]
            raise ConfigError(f"{unknown_name(class_t.__name__, func, names)}.")
        func = found
    return func(**init_args) if isinstance(func, type) and issubclass(func, class_t) else func


def trust_remote_code() -> bool:
    """Whether TWINKLE_TRUST_REMOTE_CODE allows functions and classes as arguments; anything but 0 does."""
    return os.environ.get("TWINKLE_TRUST_REMOTE_CODE", "1") != "0"


def check_unsafe(*args: object, **kwargs: object) -> None:
    """Refuses functions and classes among arguments unless `trust_remote_code`.

    Raises:
        ValueError: there is one.
    """
    if not trust_remote_code() and _has_callable((args, kwargs)):
        raise ValueError("TWINKLE_TRUST_REMOTE_CODE is 0: functions and classes are not accepted as arguments.")


def _has_callable(value: object) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    return any(map(_has_callable, value)) if isinstance(value, (list, tuple, set)) else callable(value)
