"""The processes that vLLM starts: how they begin and end.

Both the process with the engine and vLLM's own use this module; it imports vLLM where it needs it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import multiprocessing
import multiprocessing.process
import os
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinkle_serve.engines.vllm.load import offer_load
from twinkle_serve.engines.vllm.reports import REPORTS, pid_file, report, report_errors
from twinkle_serve.engines.vllm.tmpfs import OWNER
from twinkle_serve.errors import EngineStartError
from twinkle_serve.parent import end_with_holder, end_with_parent

if TYPE_CHECKING:
    from vllm.config import VllmConfig

METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
"""vLLM's environment variable: whether processes are forked or spawned."""

MAY_FORK = "TWINKLE_SERVE_VLLM_MAY_FORK"
"""Environment variable that is set where METHOD is not the user's choice."""

EXTENSION = "twinkle_serve.engines.vllm.worker.WorkerExtension"
"""`worker_extension_cls` of our engines."""

IN_CORE = "twinkle_serve.engines.vllm.executor.WorkerInCore"
"""`distributed_executor_backend` of our engines on CPU with one worker."""

COMPILE_NICENESS = 10
"""Niceness of threads that compile grammars. At 19 a busy core leaves them next to nothing."""

MAIN_GUARD = (
    "vLLM's process imports the script again, and the script makes a sampler when it is imported. Put the script's "
    'statements into a function, and call it below `if __name__ == "__main__":`.'
)

_vllms_own: Any = None
"""EngineCoreProc.run_engine_core, once `use_own_entry` has replaced it."""

_ended_well = False
"""Whether this process is a core that was asked to end."""

_works_itself = False
"""Whether this process is a core that does the work of its only worker."""


class _CoreEntry:
    """`run_engine_core`, for another process: there its arguments, which import vLLM, are unpickled after it, without
    garbage collection."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        run_engine_core(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _begin_core, ()


def _begin_core() -> _CoreEntry:
    gc.disable()
    atexit.register(_leave)
    return _ENTRY


def _leave() -> None:
    """Ends the core without the interpreter's last collection, which takes 3 s."""
    if _ended_well:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


_ENTRY = _CoreEntry()


def use_own_entry() -> None:
    """Makes vLLM start the processes of our engines by `run_engine_core`, and leaves them to this process alone.
    Idempotent."""
    global _vllms_own
    from vllm.v1.engine.core import EngineCoreProc

    leave_to_parent()
    if EngineCoreProc.run_engine_core is not _ENTRY:
        _vllms_own = EngineCoreProc.run_engine_core
        EngineCoreProc.run_engine_core = _ENTRY


@functools.cache
def leave_to_parent() -> None:
    """Makes forks of this process leave vLLM's processes to it. Idempotent.

    A fork would end them as it exits, by the finalizers of vLLM and of multiprocessing: these raise there, and their
    tracebacks are printed.
    """
    os.register_at_fork(after_in_child=_forget_processes)


def _forget_processes() -> None:
    for finalizer, info in list(weakref.finalize._registry.items()):  # type: ignore[attr-defined]
        if str(getattr(info.func, "__module__", "")).partition(".")[0] == "vllm":
            finalizer.detach()
    multiprocessing.process._children.clear()  # type: ignore[attr-defined]  # as in multiprocessing's own forks


def run_engine_core(*args: Any, **kwargs: Any) -> None:
    """Runs vLLM's engine core in a process group of its own, so that a terminal's Ctrl-C, which is for the caller, does
    not reach it, and ends it with its caller. Engines that are not ours run as vLLM starts them.

    Not in a session of its own: Linux shares cores between sessions, and an engine on CPU would starve its caller.
    """
    global _ended_well, _works_itself
    from vllm.v1.engine.core import EngineCoreProc

    gc.enable()
    own = _vllms_own or EngineCoreProc.run_engine_core  # a forked process has inherited our replacement
    config = kwargs["vllm_config"]
    if config.parallel_config.worker_extension_cls != EXTENSION:
        own(*args, **kwargs)
        return
    with contextlib.suppress(PermissionError):  # it leads one already
        os.setpgid(0, 0)
    end_with_owner()
    report_errors("core")
    keep_frozen()
    allow_high_temperatures()
    if config.device_config.device_type == "cpu":
        pass_masks_on()
    compile_below_model()
    offer_load()
    _works_itself = config.parallel_config.distributed_executor_backend in (IN_CORE, "uni")
    fork_workers(config)
    try:
        own(*args, **kwargs)
    except SystemExit as end:
        _ended_well = not end.code
        raise


def pass_masks_on() -> None:
    """Makes vLLM's scheduler pass on the masks of `RequestSampler`, as it does with an engine argument that demands
    top_k of every request, and a model runner for GPUs."""
    from vllm.v1.core.sched.scheduler import Scheduler

    Scheduler.return_sampling_mask = property(lambda scheduler: True, lambda scheduler, value: None)


def allow_high_temperatures() -> None:
    """Makes vLLM's parameters accept temperatures above 2, which its samplers do not mind: here, in the core and in the
    workers, each of which checks them again."""
    from vllm.sampling_params import SamplingParams

    verify = SamplingParams._verify_args
    if getattr(verify, "allows_high_temperatures", False):  # in a fork
        return

    def verify_rest(params: SamplingParams) -> None:
        temperature, params.temperature = params.temperature, min(params.temperature, 2.0)
        verify(params)
        params.temperature = temperature

    verify_rest.allows_high_temperatures = True  # type: ignore[attr-defined]
    SamplingParams._verify_args = verify_rest


def keep_frozen() -> None:
    """Excludes the imported modules of this process, the core, and of its forked workers from garbage collection, also
    at shutdown, where vLLM would unfreeze and collect them: 3 s in the core and in each worker."""
    gc.freeze()
    gc.unfreeze = lambda: None


def compile_below_model() -> None:
    """Lowers the priority of the threads in which this process, the core, compiles grammars.

    xgrammar compiles in 8 threads, without Python's lock. On CPU they would take the cores of the model: tokens of
    other requests then took ten times as long.
    """
    from vllm.v1.structured_output import StructuredOutputManager

    compile_grammar = StructuredOutputManager._create_grammar

    def compile_in_background(manager: Any, request: Any) -> Any:
        os.setpriority(os.PRIO_PROCESS, 0, COMPILE_NICENESS)  # of this thread, and of those that it starts
        return compile_grammar(manager, request)

    StructuredOutputManager._create_grammar = compile_in_background


def prefer_spawn() -> None:
    """Makes vLLM spawn the core, unless the user has chosen: a fork would inherit this process's threads."""
    if METHOD not in os.environ:
        os.environ[METHOD] = "spawn"
        os.environ[MAY_FORK] = "1"


def fork_workers(config: VllmConfig) -> None:
    """Makes this process, the core, fork its workers: they share its imported modules, which take seconds to import
    and hundreds of MB. `use_own_cores` gives them their cores.

    vLLM forks by default, but on CPU and where it must not: there each worker would import all of it again.
    """
    if MAY_FORK in os.environ and not config.parallel_config.numa_bind and not has_intel_openmp():
        os.environ[METHOD] = "fork"


def has_intel_openmp() -> bool:
    """Whether Intel's OpenMP is preloaded. It reads a worker's cores from the environment, when it is loaded."""
    return any(name in os.environ.get("LD_PRELOAD", "") for name in ("libiomp", "libomp"))


def use_own_cores() -> None:
    """Gives this process, a forked worker on CPU, the cores that vLLM has chosen for it. OpenMP reads them from the
    environment when it is loaded, which was in the core."""
    cores = os.environ.get("GOMP_CPU_AFFINITY")
    if cores is not None and os.environ.get(METHOD) == "fork":
        compute_on([int(core) for core in cores.split()])


def compute_on(cores: Sequence[int]) -> None:
    """Gives this process some cores, and torch a thread on each."""
    import torch

    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))


def end_with_owner() -> None:
    """Ends this process, the core, with the one that has the engine, and names it to `Reports.kill_core`. Ends it at
    once where the engine was stopped before it began.

    Unlike a parent's process id, the owner's file tells, too, that the owner has replaced itself by `exec`.
    """
    reports = Path(os.environ[REPORTS])
    try:
        end_with_holder(reports.with_name(OWNER))
        pid_file(reports).write_text(str(os.getpid()))
    except OSError:
        sys.exit(1)


def begin_worker(device_type: str) -> None:
    """Prepares this process, if it is a worker: it has its own cores, reports its errors as a worker's, and ends with
    the core. A core that does the work of its only worker is left as it is."""
    if _works_itself:
        return
    if device_type == "cpu":
        use_own_cores()
    end_with_starter()
    report_errors("worker")


def end_with_starter() -> None:
    """Ends this process, a worker, with the core that started it by `multiprocessing`; Ray ends its own workers."""
    starter = multiprocessing.parent_process()
    if starter is not None and starter.pid is not None:
        end_with_parent(starter.pid)


def refuse_import_of_main() -> None:
    """Refuses to start an engine while this process, which was spawned, imports the main script of its parent, and in a
    script that no other process can import.

    Raises:
        EngineStartError
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        report("main", MAIN_GUARD)
        raise EngineStartError(MAIN_GUARD)
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    if path is not None and getattr(main, "__spec__", None) is None and not Path(path).exists():
        raise EngineStartError(f"vLLM's process imports the script again, and there is no file {path}. Save it in one.")
