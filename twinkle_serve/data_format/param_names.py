"""Other names of sampling parameters."""

from __future__ import annotations

ALIASES = {"max_new_tokens": "max_tokens", "n": "num_samples"}
"""Other names of parameters, in a dict."""

OTHER_NAMES = {
    "max_completion_tokens": "max_tokens",
    "max_length": "max_tokens",
    "min_new_tokens": "min_tokens",
    "best_of": "num_samples",
    "num_return_sequences": "num_samples",
    "do_sample": "temperature=0 for greedy",
    "stop_strings": "stop",
    "eos_token_id": "stop_token_ids",
    "stop_token_id": "stop_token_ids",
    "bad_words_ids": "bad_words",
    "top_logprobs": "logprobs",
    "return_logprobs": "logprobs",
    "guided_json": "structured_outputs={'json': …}",
    "guided_regex": "structured_outputs={'regex': …}",
    "guided_choice": "structured_outputs={'choice': …}",
    "guided_grammar": "structured_outputs={'grammar': …}",
    "json_schema": "structured_outputs={'json': …}",
    "response_format": "structured_outputs",
    "regex": "structured_outputs={'regex': …}",
    "ebnf": "structured_outputs={'grammar': …}",
    "no_stop_trim": "include_stop_str_in_output",
    "thinking_budget": "thinking_token_budget",
}
"""Names that other servers and libraries have for a parameter, and what to write here."""
