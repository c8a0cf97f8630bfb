"""Remote classes without Ray: plain classes, and errors at decoration."""

from __future__ import annotations

import logging
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from twinkle_serve import DeviceGroup, DeviceMesh
from twinkle_serve.errors import ConfigError, MeshError
from twinkle_serve.remote import LazyResult, initialize, is_initialized, mode, remote_class, remote_function, shutdown


@remote_class(execute="all")
class Adder:
    """Adds."""

    def __init__(self, amount: int, device_mesh: DeviceMesh | None = None) -> None:
        self.amount = amount
        self.mesh = device_mesh

    @remote_function(dispatch="slice_dp", collect="flatten")
    def add(self, batch: list[int]) -> list[int]:
        return [item + self.amount for item in batch]

    @remote_function(lazy_collect=True)
    def later(self, batch: list[int]) -> list[int]:
        return self.add(batch)


@remote_class()
class Bare:
    """Has parameters for neither group nor mesh."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.received = (args, kwargs)


@pytest.fixture(autouse=True)
def session() -> Iterator[None]:
    yield
    shutdown()


def test_class_is_plain_without_a_group() -> None:
    """Before initialize; its methods behave as written."""
    adder = Adder(2)
    assert type(adder) is Adder and isinstance(adder, Adder)
    assert adder.add([1, 2, 3]) == [3, 4, 5]
    assert adder.add([]) == []


def test_class_ignores_its_group_in_mode_local(caplog: pytest.LogCaptureFixture) -> None:
    """The same script runs in one process, and logs that groups reserve nothing."""
    with caplog.at_level(logging.INFO, "twinkle_serve.remote"):
        initialize("local", groups=[DeviceGroup("sampler", 4)])
    assert "sampler reserve nothing" in caplog.text
    assert Adder(2, remote_group="sampler").add([1]) == [3]  # type: ignore[call-arg]
    assert mode() == "local" and is_initialized()


def test_class_refuses_a_group_before_initialize() -> None:
    """No group can exist yet."""
    with pytest.raises(ConfigError, match=r"Adder\(remote_group='sampler'\) before initialize"):
        Adder(2, remote_group="sampler")  # type: ignore[call-arg]


def test_class_gets_its_mesh_only_if_it_has_a_parameter_for_it() -> None:
    """The decorator's arguments are not passed to constructors without these parameters."""
    mesh = DeviceMesh.from_sizes(dp_size=2)
    assert Adder(1, mesh).mesh is mesh
    assert Adder(1, device_mesh=mesh).mesh is mesh
    assert Bare(1, device_mesh=mesh, more=2).received == ((1,), {"more": 2})
    initialize("local", global_device_mesh=mesh)
    assert Adder(1).mesh is mesh


def test_lazy_result_is_the_same_in_mode_local() -> None:
    """It is called for its value, and resolved as an argument."""
    adder = Adder(2)
    lazy: Any = adder.later([1])
    assert lazy() == [3] and isinstance(adder.later([]), LazyResult)
    assert adder.add(lazy) == [5]
    assert pickle.loads(pickle.dumps(lazy))() == [3]


def test_instances_pickle_when_plain() -> None:
    """Despite the decorator's constructor."""
    assert pickle.loads(pickle.dumps(Adder(3))).amount == 3


def test_subclass_of_a_remote_class_is_plain_without_a_group() -> None:
    """Its own constructor defines its arguments."""

    class Twice(Adder):
        def __init__(self) -> None:
            super().__init__(2)

    assert Twice().add([1]) == [3]
    initialize("local")
    assert Twice(remote_group="anywhere").add([1]) == [3]  # type: ignore[call-arg]


def test_subclass_keeps_the_hook_of_its_class() -> None:
    """`__init_subclass__` of the class, or of its bases, sees every subclass."""
    seen: list[tuple[str, int]] = []

    class Base:
        def __init_subclass__(cls, *, rank: int = 0, **kwargs: Any) -> None:
            seen.append((cls.__name__, rank))
            super().__init_subclass__(**kwargs)

    @remote_class()
    class Inherits(Base): ...

    @remote_class()
    class Own:
        def __init_subclass__(cls, *, rank: int = 0) -> None:
            seen.append((cls.__name__, rank))

    class A(Inherits, rank=1): ...

    class B(Own, rank=2): ...

    assert seen == [("Inherits", 0), ("A", 1), ("B", 2)]


def test_initialize_seeds_the_imported_libraries() -> None:
    """They produce the same numbers again."""
    initialize(seed=7)
    first = (random.random(), np.random.rand())
    initialize(seed=7)
    assert (random.random(), np.random.rand()) == first


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mode": "rey"}, ConfigError, "unknown mode 'rey', did you mean 'ray'"),
        ({"full_determinism": True}, ConfigError, "full_determinism is not supported"),
        ({"nproc_per_node": 0}, ConfigError, "nproc_per_node must be at least 1, got 0"),
        ({"groups": [{"name": "a"}]}, ConfigError, "groups must be DeviceGroup"),
        ({"groups": [DeviceGroup("a", 1), DeviceGroup("a", 2)]}, MeshError, "two DeviceGroups have the name 'a'"),
    ],
)
def test_initialize_refuses_invalid_arguments(arguments: dict[str, Any], error: type, message: str) -> None:
    """The process's state is unchanged."""
    with pytest.raises(error, match=message):
        initialize(**arguments)
    assert not is_initialized()


def test_decorators_refuse_unsupported_functions() -> None:
    """At decoration, not at the first call."""
    with pytest.raises(ConfigError, match="unknown execute 'some'"):
        remote_class(execute="some")
    with pytest.raises(ConfigError, match=r"write @remote_class\(\) above Adder"):
        remote_class(Adder)  # type: ignore[arg-type]

    async def asynchronous(self: Any) -> None: ...

    def generator(self: Any) -> Iterator[int]:
        yield 1

    def __iter__(self: Any) -> Any: ...

    for function, message in (
        (asynchronous, "async"),
        (generator, "generator"),
        (__iter__, "__iter__ is not supported"),
    ):
        with pytest.raises(ConfigError, match=message):
            remote_function()(function)
    with pytest.raises(ConfigError, match="plain method"):
        remote_function()(property(generator))  # type: ignore[type-var]


def test_import_loads_neither_ray_nor_torch() -> None:
    """They take seconds, and mode local needs neither."""
    code = "import sys, twinkle_serve.remote as r; r.initialize('local'); print({'ray', 'torch'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.strip() == "set()"


@remote_class()
class Failing:
    """Fails, also by way of another remote function."""

    @remote_function()
    def fail(self, text: str) -> None:
        raise ValueError(text)

    @remote_function()
    def outer(self, text: str) -> None:
        self.fail(text)


def test_notifier_is_told_of_exceptions_of_remote_functions() -> None:
    """Once each, with the run's name, the function and the traceback; the exception is raised all the same."""
    told: list[str] = []
    initialize("local", name="run-7", notifier=told.append)
    for call in (Failing().fail, Failing().outer):
        with pytest.raises(ValueError, match="no such thing"):
            call("no such thing")
    assert len(told) == 2
    assert told[0].startswith("Failing.fail of run 'run-7' failed: ValueError: no such thing")
    assert "Traceback" in told[0] and "test_remote_class_local.py" in told[0]
    shutdown()
    with pytest.raises(ValueError, match="again"):
        Failing().fail("again")
    assert len(told) == 2, "of the run that is over"


def test_failing_notifier_is_logged_and_replaces_no_exception(caplog: pytest.LogCaptureFixture) -> None:
    """The run's own exception is the one that counts."""

    def broken(text: str) -> None:
        raise OSError("no network")

    initialize("local", notifier=broken)
    with pytest.raises(ValueError, match="mine"):
        Failing().fail("mine")
    assert "no network" in caplog.text


@pytest.mark.parametrize("wrong", [{"name": 3}, {"notifier": "url"}])
def test_initialize_refuses_what_it_cannot_call(wrong: dict[str, Any]) -> None:
    """Both are named."""
    with pytest.raises(ConfigError, match="name must be a string and notifier a function"):
        initialize("local", **wrong)
