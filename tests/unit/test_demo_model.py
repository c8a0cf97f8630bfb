"""The embedded demo model has the documented accuracy and parts."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from types import ModuleType

import pytest

from twinkle_serve import hub

ROOT = Path(__file__).parents[2]


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Imports examples/train_demo_model.py as a module, with those beside it."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    spec = importlib.util.spec_from_file_location("train_demo_model", ROOT / "examples" / "train_demo_model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_demo_model_has_the_reported_accuracy(training: ModuleType) -> None:
    """On held-out problems, within three standard errors; and between 40% and 70%."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reported = json.loads((hub.DEMO / "accuracy.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(hub.DEMO)
    encoder = training.Encoder(AutoTokenizer.from_pretrained(hub.DEMO))
    problems = training.problems(random.Random(2), 500, held_out=True)
    accuracy = training.greedy_accuracy(model, encoder, problems)
    p = reported["greedy_accuracy"]
    assert abs(accuracy - p) < 3 * (p * (1 - p) * (1 / 500 + 1 / 1000)) ** 0.5
    assert 0.4 < p < 0.7
    assert model.num_parameters() == reported["parameters"] and 0.5e6 <= reported["parameters"] <= 2e6
    assert (hub.DEMO / "model.safetensors").stat().st_size <= 4 * 2**20


def test_demo_model_accepts_a_lora_adapter() -> None:
    """peft finds its layers as in any checkpoint."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hub.DEMO)
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    trainable, total = adapted.get_nb_trainable_parameters()
    assert 0 < trainable < total


def test_demo_tokenizer_round_trips_any_text() -> None:
    """One token per byte, except for special tokens and role names."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hub.DEMO)
    for text in ("12+34=", "grüß Gott, 世界 🙂\n\ttabs", "the user and the assistant", " leading  spaces "):
        assert tokenizer.decode(tokenizer.encode(text)) == text
