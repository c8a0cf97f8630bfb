"""Separates the decorator's arguments, mesh and group, from those of a user's constructor."""

from __future__ import annotations

import inspect
from typing import TypeAlias

from twinkle_serve.errors import MeshError
from twinkle_serve.mesh import DeviceMesh
from twinkle_serve.remote.lazy import Args, Kwargs

Arguments: TypeAlias = tuple[Args, Kwargs]


def signature_of(kind: type) -> inspect.Signature:
    """Signature of `__init__` without self; inspect.signature(kind) would be that of the decorator's `__new__`."""
    signature = inspect.signature(kind.__init__)  # type: ignore[misc]
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def mesh_parameter(kind: type) -> str | None:
    """Name of the parameter for the mesh: device_mesh, or one annotated with DeviceMesh. None if there is none."""
    for parameter in signature_of(kind).parameters.values():
        if parameter.name == "device_mesh" or "DeviceMesh" in str(parameter.annotation):
            return parameter.name
    return None


def without_group(kind: type, kwargs: Kwargs) -> Kwargs:
    """Removes remote_group from the keywords, unless the constructor has that parameter."""
    takes = "remote_group" in signature_of(kind).parameters
    return {name: value for name, value in kwargs.items() if takes or name != "remote_group"}


def take_mesh(kind: type, args: Args, kwargs: Kwargs) -> tuple[DeviceMesh | None, Arguments]:
    """Returns the mesh among the arguments, and the other arguments; positional ones after it become keywords.

    Raises:
        MeshError: the mesh is not a DeviceMesh.
    """
    parameter = mesh_parameter(kind)
    mesh = kwargs.get(parameter or "device_mesh")
    kwargs = {name: value for name, value in kwargs.items() if name != (parameter or "device_mesh")}
    names = list(signature_of(kind).parameters)
    if parameter is not None and names.index(parameter) < len(args):
        place = names.index(parameter)
        mesh = args[place]
        kwargs |= dict(zip(names[place + 1 :], args[place + 1 :], strict=False))
        args = args[:place]
    if mesh is not None and not isinstance(mesh, DeviceMesh):
        raise MeshError(f"device_mesh must be a DeviceMesh, got {mesh!r}.")
    return mesh, (args, kwargs)


def give_mesh(kind: type, arguments: Arguments, mesh: DeviceMesh | None) -> Arguments:
    """Adds the mesh to the arguments if the constructor has a parameter for it."""
    parameter = mesh_parameter(kind)
    args, kwargs = arguments
    return (args, kwargs) if parameter is None or mesh is None else (args, {**kwargs, parameter: mesh})
