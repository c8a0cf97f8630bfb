"""Which nightly tests a change may break: paths changed to test files."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

ARCHITECTURES = "tests/conformance/test_architectures.py"
SAMPLERS = (
    "tests/conformance/test_call_params.py",
    "tests/conformance/test_conversations.py",
    "tests/conformance/test_sampler_adapters.py",
    "tests/conformance/test_samplers.py",
    "tests/conformance/test_twinkle_calls.py",
    "tests/conformance/test_updates.py",
    "tests/conformance/test_upstream_defects.py",
    "tests/conformance/test_weight_updates.py",
)
CHAOS = "tests/integration/test_chaos.py"
UNDER_FIRE = "tests/integration/test_weights_under_fire.py"
CLIENT = "tests/integration/test_client_install.py"
DEATHS = "tests/integration/test_state_outlives_deaths.py"
SERVICE = (
    "tests/integration/test_service.py",
    "tests/integration/test_service_calls.py",
    "tests/integration/test_service_deploy.py",
)
SCRIPTS = "tests/integration/test_scripts_serve.py"
VLLM = "tests/integration/test_vllm_service.py"
SPECIFICATION = "tests/integration/test_specification.py"
APPLICATIONS = "tests/integration/test_applications.py"
PROCESSES = "tests/integration/test_engine_processes.py"
GROUPS = "tests/integration/remote/test_device_groups.py"
IN_GROUP = "tests/integration/test_sampler_in_group.py"
TINKER = "tests/integration/test_gateway_tinker.py"
FAULTS = "tests/integration/test_gateway_faults.py"
LISTENER = "tests/integration/test_gateway_listener.py"
HTTP_CLIENTS = "tests/integration/test_gateway_clients.py"
ELASTIC = "tests/integration/test_elastic.py"
COMMANDS = "tests/integration/test_commands.py"
CONSOLE = "tests/integration/test_console.py"
OBSERVED = "tests/integration/test_observability.py"
NODES = "tests/integration/test_several_nodes.py"
TRACKS = "tests/integration/test_tracks.py"
TRANSFERS = "tests/integration/test_service_transfers.py"
DOCUMENT = "tests/unit/gateway/test_document.py"

ALL = frozenset(
    {
        ARCHITECTURES,
        *SAMPLERS,
        APPLICATIONS,
        CHAOS,
        CLIENT,
        COMMANDS,
        CONSOLE,
        DEATHS,
        DOCUMENT,
        ELASTIC,
        FAULTS,
        GROUPS,
        IN_GROUP,
        LISTENER,
        NODES,
        OBSERVED,
        PROCESSES,
        SCRIPTS,
        *SERVICE,
        SPECIFICATION,
        HTTP_CLIENTS,
        TINKER,
        TRACKS,
        TRANSFERS,
        UNDER_FIRE,
        VLLM,
    }
)
"""Every file with a test marked `nightly`; tests/conftest.py compares."""

RULES: tuple[tuple[str, frozenset[str]], ...] = (
    ("tests/gpu/*", frozenset()),
    ("tests/unit/*", frozenset()),
    ("tests/support/affected.py", frozenset()),
    ("tests/support/lora.py", ALL - {APPLICATIONS, CLIENT, PROCESSES, SCRIPTS}),
    ("tests/support/weights.py", ALL - {APPLICATIONS, ARCHITECTURES, CLIENT, PROCESSES, SCRIPTS}),
    ("tests/support/scripts_serve.py", frozenset({APPLICATIONS, ELASTIC, NODES, PROCESSES, SCRIPTS})),
    ("tests/support/specification.py", frozenset({SPECIFICATION})),
    ("tests/support/trainer.py", frozenset({CLIENT})),
    ("tests/support/docs.py", frozenset({COMMANDS, NODES})),
    ("tests/support/nodes.py", frozenset({NODES})),
    ("tests/support/tcp_*.py", frozenset({TRANSFERS})),
    ("tests/support/transfer_plugin.py", frozenset({TRANSFERS})),
    ("tests/support/transfers.py", frozenset()),
    ("tests/support/faulty_updates.py", frozenset()),
    ("tests/support/under_fire.py", frozenset({NODES, UNDER_FIRE})),
    ("tests/support/collector.py", frozenset({OBSERVED})),
    ("tests/support/prometheus.py", frozenset({OBSERVED})),
    ("observability/*", frozenset({OBSERVED})),
    ("tests/support/grammar_stub.py", frozenset()),
    ("tests/support/bad_requests.py", frozenset()),
    ("tests/support/command_line.py", frozenset()),
    ("tests/support/gateway.py", frozenset({CHAOS, COMMANDS, FAULTS, HTTP_CLIENTS, LISTENER, TINKER})),
    ("tests/support/browser.py", frozenset({CONSOLE})),
    ("tests/support/console_answers.py", frozenset({CONSOLE})),
    ("tests/support/screenshots.py", frozenset()),
    ("tests/support/gateway_app.py", frozenset({CONSOLE, DOCUMENT})),
    ("tests/support/tinker_client.py", frozenset({TINKER})),
    ("tests/support/*", ALL),
    ("tests/conftest.py", ALL),
    ("tests/conformance/conftest.py", frozenset({ARCHITECTURES, *SAMPLERS})),
    ("benchmarks/chaos/*", frozenset({CHAOS})),
    ("benchmarks/*", frozenset()),
    ("examples/agent.py", frozenset({SCRIPTS})),
    ("examples/grpo.py", frozenset({SCRIPTS})),
    ("examples/policy.py", frozenset({SCRIPTS})),
    ("examples/sums.py", frozenset({SCRIPTS})),
    ("examples/*", frozenset()),
    ("docs/cli.md", frozenset({COMMANDS})),
    ("docs/how-to.md", frozenset({NODES})),
    ("docs/*", frozenset()),
    ("configs/*", frozenset()),
    ("*.md", frozenset()),
    ("mkdocs.yml", frozenset()),
    (".gitignore", frozenset()),
    ("LICENSE", frozenset()),
    ("serve_config.yaml", frozenset({APPLICATIONS, NODES, SCRIPTS})),
    ("scripts/serve", frozenset({APPLICATIONS, ELASTIC, NODES, SCRIPTS})),
    ("scripts/*", frozenset()),
    (".ci/*", frozenset()),
    ("twinkle_serve/as_twinkle*", frozenset({SPECIFICATION})),
    ("twinkle_serve/upstream/*", frozenset({SPECIFICATION})),
    ("twinkle_serve/cli/commands/up.py", frozenset({APPLICATIONS, ELASTIC, SCRIPTS})),
    ("twinkle_serve/cli/*", frozenset({COMMANDS})),
    ("twinkle_serve/gateway/console/*", frozenset({CONSOLE})),
    ("twinkle_serve/gateway/*", frozenset({CHAOS, CONSOLE, DOCUMENT, FAULTS, HTTP_CLIENTS, LISTENER, TINKER})),
    ("twinkle_serve/hub*", frozenset({SCRIPTS})),
    ("twinkle_serve/remote/*", frozenset({APPLICATIONS, GROUPS, IN_GROUP, SPECIFICATION})),
    ("twinkle_serve/template/*", frozenset({CLIENT, *SAMPLERS})),
    ("twinkle_serve/engines/torch*", frozenset({ARCHITECTURES, *SAMPLERS, VLLM, SCRIPTS})),
    ("twinkle_serve/engines/fake*", frozenset({DEATHS, *SERVICE, TRACKS})),
    ("twinkle_serve/engines/vllm*", ALL - {APPLICATIONS, CLIENT, DEATHS, *SERVICE}),
    ("twinkle_serve/demo/*", ALL - {APPLICATIONS, CLIENT, PROCESSES}),
)
"""Pattern of a path, and the nightly tests that guard it; the first that matches counts. No match: all of them."""


def changed_paths(root: Path, base: str | None) -> list[str]:
    """Paths that differ from a revision in the working tree, new files included.

    Args:
        base: None for where this branch left origin/main; HEAD~ where there is no origin/main, or on it.
    """
    revision = base or _default_base(root)
    changed = _git(root, "diff", "--name-only", "--no-renames", revision)
    return [*changed, *_git(root, "ls-files", "--others", "--exclude-standard")]


def nightly_tests(paths: Iterable[str]) -> frozenset[str]:
    """Test files with the nightly tests that guard these paths."""
    return frozenset().union(*(_guards(path) for path in paths))


def _guards(path: str) -> frozenset[str]:
    if path in ALL:
        return frozenset({path})
    return next((tests for pattern, tests in RULES if fnmatch(path, pattern)), _others(path))


def _others(path: str) -> frozenset[str]:
    """A test file without nightly tests needs none; anything else may break everything."""
    return frozenset() if path.startswith("tests/") and "/test_" in path else ALL


def _default_base(root: Path) -> str:
    try:
        (base,) = _git(root, "merge-base", "HEAD", "origin/main")
    except subprocess.CalledProcessError:
        return "HEAD~"
    return "HEAD~" if _git(root, "rev-parse", "HEAD") == [base] else base


def _git(root: Path, *command: str) -> list[str]:
    return subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
