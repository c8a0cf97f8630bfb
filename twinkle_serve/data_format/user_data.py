"""`user_data` of a trajectory as Twinkle's data sets write it: pairs of a key and the JSON of its value."""

from __future__ import annotations

import json
from typing import Any

from twinkle_serve.data_format.plain import as_items


def pack_value(value: object) -> str:
    """Encodes one value as JSON. What JSON has no form for becomes its text."""
    return json.dumps(value, ensure_ascii=False, default=str)


def user_data_get(items: object, key: str, default: Any = None) -> Any:
    """Returns the first value of a key, decoded; a value that is not JSON as it is, `default` if there is none."""
    for item in as_items(items) or []:
        pair = as_items(item)
        if pair is not None and len(pair) == 2 and pair[0] == key:
            try:
                return json.loads(pair[1]) if isinstance(pair[1], str) else pair[1]
            except ValueError:
                return pair[1]
    return default
