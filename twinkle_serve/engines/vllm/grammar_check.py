"""One check of a specification of structured outputs, as vLLM's own processes handle it. Runs in the helper process."""

from __future__ import annotations

import functools
import importlib
import random
import re
import time
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from vllm.config import VllmConfig

Problem = Literal["invalid", "empty", "stuck", "tokens"]
"""invalid: vLLM refuses it. empty: no text matches. stuck: the backend fails after some tokens. tokens: each token
takes too long. The helper process adds memory, slow, late and crash, by which it ends a check."""

WALK_TOKENS = 256
"""Length of the sample that a check draws."""
WALK_S = 3.0
"""CPU time after which it draws no more tokens."""
BLOCK_TOKENS = 16
TOKEN_S = 0.1
"""CPU time of a token, on average over a block. It takes a millisecond with most specifications."""
MAX_DETAIL = 300
"""Characters of vLLM's own message that are passed on."""

PLACE = re.compile(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ")

BACKENDS = {
    "xgrammar": ("backend_xgrammar", "XgrammarBackend"),
    "guidance": ("backend_guidance", "GuidanceBackend"),
    "outlines": ("backend_outlines", "OutlinesBackend"),
    "lm-format-enforcer": ("backend_lm_format_enforcer", "LMFormatEnforcerBackend"),
}
"""Modules and classes of vLLM's backends, as in its StructuredOutputManager."""


class Refused(Exception):
    """A specification that the engine does not take; its arguments are the problem and the detail."""

    def __init__(self, problem: Problem, detail: str = "") -> None:
        super().__init__(problem, detail)

    @property
    def problem(self) -> Problem:
        problem: Problem = self.args[0]
        return problem

    @property
    def detail(self) -> str:
        return str(self.args[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class GrammarSettings:
    """The part of vLLM's configuration that decides about specifications, in plain types."""

    tokenizer: str
    tokenizer_mode: str
    tokenizer_revision: str | None
    trust_remote_code: bool
    skip_tokenizer_init: bool
    runner_type: str
    model_type: str
    is_diffusion: bool
    vocab_size: int
    num_speculative_tokens: int
    backend: str
    disable_any_whitespace: bool
    disable_additional_properties: bool

    @classmethod
    def of(cls, config: VllmConfig) -> GrammarSettings:
        model, outputs, speculative = config.model_config, config.structured_outputs_config, config.speculative_config
        return cls(
            tokenizer=str(model.tokenizer),
            tokenizer_mode=str(model.tokenizer_mode),
            tokenizer_revision=model.tokenizer_revision,
            trust_remote_code=model.trust_remote_code,
            skip_tokenizer_init=model.skip_tokenizer_init,
            runner_type=model.runner_type,
            model_type=model.hf_config.model_type,
            is_diffusion=model.is_diffusion,
            vocab_size=model.get_vocab_size(),
            num_speculative_tokens=0 if speculative is None else speculative.num_speculative_tokens,
            backend=outputs.backend,
            disable_any_whitespace=outputs.disable_any_whitespace,
            disable_additional_properties=outputs.disable_additional_properties,
        )

    def as_vllm(self) -> Any:
        """An object with the attributes of a VllmConfig that vLLM's validation and backends read."""
        plain = asdict(self)
        speculative = SimpleNamespace(**plain) if self.num_speculative_tokens else None
        model = SimpleNamespace(**plain, hf_config=SimpleNamespace(model_type=self.model_type))
        return SimpleNamespace(
            model_config=model, structured_outputs_config=SimpleNamespace(**plain), speculative_config=speculative
        )


class GrammarCheck:
    """Validates and compiles specifications with vLLM's code and the model's tokenizer, without limits."""

    def __init__(self, settings: GrammarSettings) -> None:
        from vllm.tokenizers import cached_tokenizer_from_config

        self._config = settings.as_vllm()
        self._vocab_size = settings.vocab_size
        self._tokenizer: Any = cached_tokenizer_from_config(self._config.model_config)
        self._eos_token_id = getattr(self._tokenizer, "eos_token_id", None)  # looked up in many steps
        self._backend = functools.cache(self._make_backend)

    def __call__(self, kind: str, spec: object) -> None:
        """Checks a specification.

        Raises:
            Refused
            MemoryError: also for native code that gets no memory.
        """
        try:
            backend, key = self._validate(kind, spec)
            grammar = self._backend(backend).compile_grammar(*key)
            _require_no_error(grammar, 0)
            self._walk(self._backend(backend), grammar)
        except Refused:
            raise
        except Exception as error:  # of native code, in any type
            if _is_memory(error):
                raise MemoryError from error
            raise Refused("invalid", _text(error)) from error

    def _validate(self, kind: str, spec: object) -> tuple[str, Any]:
        """Returns the backend that vLLM chooses, and the specification as vLLM's core receives it."""
        from vllm.sampling_params import SamplingParams, StructuredOutputsParams
        from vllm.v1.structured_output.request import get_structured_output_key

        # A `choice` of xgrammar becomes a grammar here, so the parameters are read afterwards.
        outputs = StructuredOutputsParams(**{kind: spec})
        params = SamplingParams(structured_outputs=outputs)
        config = self._config
        params._validate_structured_outputs(config.model_config, config.structured_outputs_config, self._tokenizer)
        return outputs._backend, get_structured_output_key(outputs)

    def _make_backend(self, name: str) -> Any:
        module, cls = BACKENDS[name]
        backend = getattr(importlib.import_module(f"vllm.v1.structured_output.{module}"), cls)
        return backend(self._config, tokenizer=self._tokenizer, vocab_size=self._vocab_size)

    def _walk(self, backend: Any, grammar: Any) -> None:
        """Draws a sample of random tokens that match, to measure what a token costs.

        xgrammar compiles nested repetition at once, and pays for it at each token: vLLM's core computes the masks of
        all requests between two steps, so that all of them wait.
        """
        mask = backend.allocate_token_bitmask(1)
        rng = random.Random(0)
        began = block_began = time.thread_time()
        for tokens in range(WALK_TOKENS):
            grammar.fill_bitmask(mask, 0)
            allowed = _allowed(mask, self._vocab_size)
            if not len(allowed):
                raise _nothing_follows(tokens)
            going_on = allowed[allowed != self._eos_token_id]
            if not len(going_on):
                break
            if not grammar.accept_tokens("check", [int(rng.choice(going_on))]):
                _require_no_error(grammar, tokens)
                raise Refused("stuck", f"the backend rejects a token that it allowed, after {tokens} tokens")
            if grammar.is_terminated():
                break
            now = time.thread_time()
            if now - block_began > BLOCK_TOKENS * TOKEN_S:
                raise Refused("tokens", f"{1000 * (now - block_began) / (tokens % BLOCK_TOKENS + 1):.0f} ms")
            if now - began > WALK_S:
                break
            if tokens % BLOCK_TOKENS == BLOCK_TOKENS - 1:
                block_began = now
        _require_no_error(grammar, tokens)


def _allowed(mask: Any, vocab_size: int) -> np.ndarray:
    """Returns the token ids of a bitmask."""
    bits = np.unpackbits(mask[0].numpy().view(np.uint8), bitorder="little")
    return np.flatnonzero(bits[:vocab_size])


def _require_no_error(grammar: Any, tokens: int) -> None:
    """Raises the error of a guidance matcher: vLLM only logs it, and the sample ends there."""
    matcher = getattr(grammar, "ll_matcher", None)
    if matcher is None or not (error := matcher.get_error()):
        return
    if "NoExtension" in error:
        raise _nothing_follows(tokens)
    text = _one_line(error.split("<state>")[0])
    raise Refused("stuck", f"{text} (after {tokens} tokens)") if tokens else Refused("invalid", text)


def _nothing_follows(tokens: int) -> Refused:
    return Refused("stuck", f"no token can follow {tokens} tokens") if tokens else Refused("empty")


def _is_memory(error: BaseException | None) -> bool:
    while error is not None:
        text = str(error)
        if isinstance(error, MemoryError) or "bad_alloc" in text or "Resource temporarily unavailable" in text:
            return True
        error = error.__cause__ or error.__context__
    return False


def _text(error: BaseException) -> str:
    """vLLM's message, with that of its cause, which some of vLLM's leave out."""
    text, cause = str(error), error.__cause__
    if cause is not None and str(cause) not in text:
        text = f"{text.rstrip('. ')}: {cause}"
    return _one_line(text or type(error).__name__)


def _one_line(text: str) -> str:
    """Shortens a message, and drops the time and the place in xgrammar's source that it begins with."""
    text = PLACE.sub("", " ".join(text.split())).rstrip(". ")
    return text if len(text) <= MAX_DETAIL else f"{text[:MAX_DETAIL]}…"
