"""The router's process has tokenizers without torch."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import importlib.util
import sys
from deployments.light_imports import import_transformers_without_torch
import_transformers_without_torch()
from twinkle_serve import hub
from twinkle_serve.template import Template
ids = Template(hub.DEMO).encode([{"role": "user", "content": "1+1="}], None, "inputs[0]")
print("torch" in sys.modules, ids.tolist())
print(importlib.util.find_spec("torch") is not None)
"""


def test_templates_encode_without_torch_and_torch_can_still_be_imported() -> None:
    """The same ids as with it; transformers does not complain."""
    from twinkle_serve import hub
    from twinkle_serve.template import Template

    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, check=True)
    ids = Template(hub.DEMO).encode([{"role": "user", "content": "1+1="}], None, "inputs[0]").tolist()
    assert done.stdout.splitlines() == [f"False {ids}", "True"]
    assert "PyTorch was not found" not in done.stderr
