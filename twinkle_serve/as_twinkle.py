"""`import twinkle_serve.as_twinkle` makes `twinkle` an alias of this package in the importing process.

Code written for Twinkle's sampler then runs unchanged: `from twinkle.sampler import vLLMSampler`. Defaults in which
this package differs become Twinkle's, see docs/migrating.md. If Twinkle itself is installed, the import raises
ConfigError unless TWINKLE_SERVE_AS_TWINKLE=override is set: half of one package and half of the other would be worse
than an error.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

import twinkle_serve
from twinkle_serve import conventions
from twinkle_serve.data_format.sample_request import IGNORED_OPTIONS
from twinkle_serve.data_format.tool_calls import read_both_dialects
from twinkle_serve.errors import ConfigError

OVERRIDE = "TWINKLE_SERVE_AS_TWINKLE"

MOVED = {
    "checkpoint_engine": "upstream.checkpoint_engine",
    "checkpoint_engine.checkpoint_engine_manager": "upstream.checkpoint_engine.manager",
    "checkpoint_engine.manager": "upstream.checkpoint_engine.manager",
    "data_format.input_feature": "data_format",
    "data_format.message": "data_format",
    "data_format.sampling": "data_format",
    "data_format.trajectory": "data_format",
    "data_format.types": "data_format",
    "infra": "upstream.infra",
    "sampler.torch_sampler": "sampler",
    "sampler.torch_sampler.torch_sampler": "sampler",
    "sampler.vllm_sampler": "sampler",
    "sampler.vllm_sampler.vllm_sampler": "sampler",
    "template.base": "template",
    "template.qwen": "template",
    "utils": "upstream.utils",
    "utils.device_mesh": "upstream.utils",
    "utils.framework": "upstream.utils.framework",
    "utils.import_utils": "upstream.utils",
    "utils.loader": "upstream.utils",
    "utils.logger": "upstream.utils",
    "utils.network": "upstream.utils",
    "utils.platform": "upstream.utils",
    "utils.platforms": "upstream.utils",
    "utils.platforms.base": "upstream.utils",
    "utils.torch_utils": "upstream.utils",
    "utils.unsafe": "upstream.utils",
    "utils.utils": "upstream.utils",
}
"""Twinkle's modules that are named differently here."""

NAMES = {
    "GPU": "platform",
    "Platform": "platform",
    "check_unsafe": "upstream.utils",
    "exists": "upstream.utils",
    "find_free_port": "upstream.utils",
    "find_node_ip": "upstream.utils",
    "framework_util": "upstream.utils",
    "get_device_placement": "upstream.infra",
    "is_master": "upstream.infra",
    "requires": "upstream.utils",
    "torch_util": "upstream.utils",
    "trust_remote_code": "upstream.utils",
}
"""Names of the package `twinkle` that `twinkle_serve` has not, and their modules here."""


class _AsTwinkle(MetaPathFinder, Loader):
    """Resolves `twinkle.x` to the module `twinkle_serve.x` itself: a second copy would have its own classes."""

    def __init__(self) -> None:
        self._specs: dict[str, ModuleSpec | None] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith("twinkle."):
            return None
        try:
            original = importlib.util.find_spec(_ours(name))
        except ModuleNotFoundError:
            return None
        if original is None:
            return None
        return ModuleSpec(name, self, is_package=original.submodule_search_locations is not None)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(_ours(spec.name))
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None and spec.name in self._specs:  # the import system has just put its own there
            module.__spec__ = self._specs.pop(spec.name)


def _ours(name: str) -> str:
    part = name.removeprefix("twinkle.")
    return f"twinkle_serve.{MOVED.get(part, part)}"


def _install() -> None:
    if sys.modules.get("twinkle") is twinkle_serve:
        return
    if os.environ.get(OVERRIDE) != "override":
        installed = sys.modules.get("twinkle") or importlib.util.find_spec("twinkle")
        if installed is not None:
            where = getattr(installed, "__file__", None) or getattr(installed, "origin", None)
            raise ConfigError(
                f"another package named twinkle is installed, at {where}. Uninstall it, or set {OVERRIDE}=override to "
                "have `import twinkle` mean Twinkle Serve in this process."
            )
    for loaded in [name for name in sys.modules if name == "twinkle" or name.startswith("twinkle.")]:
        del sys.modules[loaded]
    sys.modules["twinkle"] = twinkle_serve
    sys.meta_path.insert(0, _AsTwinkle())
    twinkle_serve._HOMES.update(NAMES)
    conventions.follow_twinkle()
    # Twinkle's option to return the encoded prompt, which `new_input_feature` always has.
    IGNORED_OPTIONS.add("return_encoded")
    read_both_dialects()


_install()
