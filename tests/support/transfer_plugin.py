"""A plugin of vLLM that adds the backend of `tests.support.tcp_transfer`."""

from __future__ import annotations

from pathlib import Path

TCP = "tcp"
"""Name of the backend."""


def write_plugin(directory: Path) -> None:
    """Makes a directory offer the plugin to processes that have it in sys.path."""
    info = directory / "tcp_transfer-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tcp-transfer\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\ntcp = tests.support.tcp_transfer:register\n")
