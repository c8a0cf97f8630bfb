"""`initialize` and `shutdown`: the mode of this process and the device groups of its run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar, get_args

from twinkle_serve.errors import ConfigError, MeshError, TwinkleServeError, unknown_name
from twinkle_serve.mesh import DeviceGroup, DeviceMesh
from twinkle_serve.placement import Device, GroupDevices
from twinkle_serve.remote.session import Mode, reset, seed_everything, session
from twinkle_serve.validation import whole_number

if TYPE_CHECKING:
    from twinkle_serve.remote.ledger import Ledger

Params = ParamSpec("Params")
Result = TypeVar("Result")

logger = logging.getLogger(__name__)

MODES: tuple[Mode, ...] = get_args(Mode)


def initialize(
    mode: Mode = "local",
    *,
    nproc_per_node: int | None = None,
    ncpu_proc_per_node: int | None = None,
    seed: int | None = 42,
    full_determinism: bool = False,
    groups: Sequence[DeviceGroup] | None = None,
    global_device_mesh: DeviceMesh | None = None,
    lazy_collect: bool = False,
    name: str | None = None,
    notifier: Callable[[str], object] | None = None,
) -> None:
    """Sets how remote classes run in this process, and reserves the device groups of the run.

    `local`: everything runs in this process. Remote classes are plain classes, `remote_group` is ignored, and groups
    reserve nothing.

    `ray`: joins the Ray cluster of this process, of RAY_ADDRESS or of this machine, or starts one here. Then reserves
    the devices of all groups, or of none, until `shutdown`. If this process dies, the next run takes over a group of
    the same name and shape, with the samplers in it; a group of another shape is replaced, and its samplers end. Groups
    of other names are freed then, except those in which a sampler runs. While GPUs are being chosen, all free ones are
    reserved for a moment.

    Args:
        mode: `local` or `ray`.
        nproc_per_node: number of GPUs to use per node, its first ones; nodes with fewer are not used. None: all.
        ncpu_proc_per_node: the same for cores, for groups of device_type cpu.
        seed: seed of random, numpy and (if imported) torch, here and in the workers. None: do not seed.
        full_determinism: must be False; a class that needs deterministic kernels sets them itself.
        groups: groups to reserve. None: reserve nothing; groups reserved by others can be used.
        global_device_mesh: mesh of remote classes that get none.
        lazy_collect: whether remote functions return a LazyResult by default.
        name: name of the run, for the notifier.
        notifier: called with a text for each exception of a remote function that is called from this process. Its own
            exceptions are logged.

    Raises:
        MeshError: a group cannot be reserved; or mode is `local` and this process still has groups reserved.
        ConfigError: an unknown mode, or an invalid argument.
    """
    _check_arguments(mode, nproc_per_node, ncpu_proc_per_node, full_determinism, groups)
    if not (name is None or isinstance(name, str)) or not (notifier is None or callable(notifier)):
        raise ConfigError(f"initialize: name must be a string and notifier a function, got {name!r} and {notifier!r}.")
    if mode == "local":
        if session.owned_groups:
            raise MeshError(
                f"this process holds the groups {', '.join(sorted(session.owned_groups))}. Call shutdown() before "
                "initialize('local')."
            )
        if groups:
            logger.info("mode local: the groups %s reserve nothing", ", ".join(group.name for group in groups))
    else:
        per_node = {"cuda": nproc_per_node, "cpu": ncpu_proc_per_node}
        join_or_start(log_to_driver=True)
        if groups:
            _reserve(list(groups), per_node)
    session.mode, session.mesh, session.lazy_collect, session.seed = mode, global_device_mesh, lazy_collect, seed
    session.name, session.notifier, session.groups = name, notifier, tuple(groups or ())
    if seed is not None:
        seed_everything(seed)


def shutdown() -> None:
    """Ends the remote instances and samplers that this process has in groups, and frees the groups that it reserved.

    Also ends a cluster that `initialize` started. A group that is shared with another running job is left to that job.
    If a step fails, the other steps are still taken.
    """
    with contextlib.ExitStack() as last_first:
        if session.started_cluster:
            last_first.callback(_end_cluster)
        last_first.callback(reset)
        if owned := sorted(session.owned_groups):
            last_first.callback(_release, owned, session.token)
        for instance in list(session.instances):
            last_first.callback(instance._kill)
        for sampler in list(session.samplers):
            last_first.callback(sampler.shutdown)


def _end_cluster() -> None:
    import ray

    ray.shutdown()


def _release(groups: list[str], token: str) -> None:
    if _in_cluster():
        from twinkle_serve.remote.ledger import Ledger

        _call_ledger(Ledger.release, groups, token)


def is_initialized() -> bool:
    """Whether `initialize` was called, without a later `shutdown`."""
    return session.mode is not None


def mode() -> Mode | None:
    """Returns `local` or `ray`; None before `initialize`."""
    return session.mode


def known_groups() -> list[str]:
    """Returns the names of all groups reserved in the cluster of this process, by any run.

    Raises:
        ConfigError: this process is not in a Ray cluster.
        MeshError: the cluster's ledger did not answer.
    """
    from twinkle_serve.remote.ledger import Ledger

    return sorted(_call_ledger(Ledger.names) or [])


def group_devices(name: str) -> GroupDevices:
    """Returns the devices of a group, in any process of the cluster.

    Raises:
        MeshError: no such group, or the cluster's ledger did not answer.
        ConfigError: this process is not in a Ray cluster.
    """
    from twinkle_serve.remote.ledger import Ledger

    devices = _call_ledger(Ledger.group, name)
    if devices is None:
        unknown = unknown_name("device group", name, known_groups())
        raise MeshError(f"{unknown}. Reserve it with initialize('ray', groups=…).")
    return devices


def enter_group(name: str, devices: Sequence[Device], application: str) -> None:
    """Records that an engine of a Serve application is about to use devices of a group; see `Ledger.enter`.

    Raises:
        MeshError: the group does not have these devices, or no longer has them.
    """
    from twinkle_serve.remote.ledger import Ledger

    if _call_ledger(Ledger.enter, name, devices, application) is None:
        raise MeshError(f"DeviceGroup {name!r} is gone. Reserve it with initialize('ray', groups=…).")


def _check_arguments(
    mode: object,
    nproc_per_node: object,
    ncpu_proc_per_node: object,
    full_determinism: object,
    groups: Sequence[DeviceGroup] | None,
) -> None:
    if mode not in MODES:
        raise ConfigError(f"initialize: {unknown_name('mode', mode, MODES)}.")
    for name, value in (("nproc_per_node", nproc_per_node), ("ncpu_proc_per_node", ncpu_proc_per_node)):
        if value is not None:
            whole_number(f"initialize: {name}", value, 1, error=ConfigError)
    if full_determinism:
        raise ConfigError(
            "initialize: full_determinism is not supported. Call torch.use_deterministic_algorithms(True) in the class "
            "that needs it."
        )
    wrong = [group for group in groups or [] if not isinstance(group, DeviceGroup)]
    if wrong:
        raise ConfigError(f"initialize: groups must be DeviceGroup(name, ranks, …), got {wrong[0]!r}.")
    names = [group.name for group in groups or []]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise MeshError(f"two DeviceGroups have the name {twice!r}. Give each a unique name.")


def join_or_start(*, log_to_driver: bool) -> None:
    """Joins a Ray cluster: the current one, that of RAY_ADDRESS, that of RAY_TMPDIR or of this machine, or a new one.

    Args:
        log_to_driver: whether the output of workers is printed here.

    Raises:
        ServiceNotReadyError: the cluster cannot be joined, or several run here and none is named.
    """
    import ray

    from twinkle_serve.remote.clusters import LOCAL, find_cluster, join_cluster, start_cluster

    if ray.is_initialized():
        return
    found = find_cluster()
    if found is None or found.address == LOCAL:
        start_cluster(log_to_driver=log_to_driver, logging_level="warning")
        session.started_cluster = True
        logger.info("started a Ray cluster at %s", ray.get_runtime_context().gcs_address)
    else:
        join_cluster(found, log_to_driver=log_to_driver)


def _in_cluster() -> bool:
    import ray

    if not ray.is_initialized():
        logger.warning("this process left the Ray cluster; its reservations stay until a run replaces them")
        return False
    return True


def _reserve(groups: list[DeviceGroup], per_node: dict[str, int | None]) -> None:
    import ray

    from twinkle_serve.remote.ledger import Ledger

    job = ray.get_runtime_context().get_job_id()
    occupied = {instance.remote_group for instance in session.instances}
    try:
        owned = _call_ledger(Ledger.reserve, groups, job, session.token, per_node, occupied)
        session.owned_groups |= set(owned or ())
    except _LedgerSilentError:  # it may still reserve them: `shutdown` frees those of this process
        session.owned_groups |= {group.name for group in groups}
        raise


def _call_ledger(
    method: Callable[Concatenate[Ledger, Params], Result], *args: Params.args, **kwargs: Params.kwargs
) -> Result | None:
    """Calls a method of the ledger, with a deadline. None if the cluster has no ledger; only `reserve` starts one."""
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

    from twinkle_serve.remote.ledger import LEDGER_ANSWERS_S, Ledger, ledger

    if not ray.is_initialized():
        raise ConfigError("this process is not in a Ray cluster. Call initialize('ray', …) first.")
    name = method.__name__
    actor = ledger(create=name == Ledger.reserve.__name__)
    if actor is None:
        return None
    try:
        answer: Result = ray.get(getattr(actor, name).remote(*args, **kwargs), timeout=LEDGER_ANSWERS_S)
        return answer
    except RayTaskError as error:
        if isinstance(error.cause, TwinkleServeError):
            raise error.cause from None
        raise
    except (GetTimeoutError, RayActorError) as error:
        raise _LedgerSilentError(
            f"the cluster's ledger of device groups did not answer within {LEDGER_ANSWERS_S:g} s: {error}"
        ) from error


class _LedgerSilentError(MeshError):
    """The ledger did not answer; the call may or may not have taken effect."""
