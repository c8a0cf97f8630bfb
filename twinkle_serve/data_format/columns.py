"""Columns of an InputFeature: which of them a sample makes longer, and which hold images, videos or audio."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from twinkle_serve.data_format.plain import is_absent

IGNORED_LABEL = -100
"""Label of a position without a loss, as in torch's cross entropy."""

TYPE_COLUMNS = ("token_type_ids", "mm_token_type_ids")
"""Columns with the type of each token, which is 0 for text."""
SAMPLED_COLUMNS = ("logprobs", "weight_versions")
"""Columns about sampled tokens, which Twinkle's features do not have."""
OWN_COLUMNS = frozenset(
    {
        *("input_ids", "labels", "attention_mask", "position_ids", "length", "encoded"),
        *TYPE_COLUMNS,
        *SAMPLED_COLUMNS,
    }
)
"""Keys that `new_input_feature` makes anew."""

_MEDIA = re.compile(
    r"(images?|videos?|audios?|pixel|speech)(_|$)|input_(images?|videos?|audios?|features|values)(_|$)|multi_?modal"
    r"|mm_(?!token_type_ids$)|(second_per_grid|feature_attention|cross_attention|aspect_ratio)_|num_(crops|tiles)$"
)


def is_media(key: object) -> bool:
    """Whether a key of an input, a message or a part is named as those for images, videos and audio are."""
    return isinstance(key, str) and _MEDIA.match(key) is not None


def grown_columns(source: Mapping[str, Any], length: int) -> dict[str, Any]:
    """The columns of a feature besides its ids and labels, for `length` tokens; shapes as in `source`."""
    columns: dict[str, Any] = {
        "attention_mask": [1] * length,
        "position_ids": in_rows(list(range(length)), source.get("position_ids")),
        "length": length,
    }
    for name in TYPE_COLUMNS:
        if not is_absent(source.get(name)):
            columns[name] = in_rows([0] * length, source[name])
    return columns


def in_rows(row: list[int], like: Any) -> list[Any]:
    """Repeats a row in the leading dimensions of `like`: position ids of Qwen's vision models have three."""
    if is_absent(like) or (type(like) is list and type(like[0]) is int):
        return row
    rows: list[Any] = np.broadcast_to(np.array(row), (*np.shape(like)[:-1], len(row))).tolist()
    return rows
