"""Garbage collection while modules are imported."""

from __future__ import annotations

import gc

import pytest

from twinkle_serve.collection import no_collection


@pytest.mark.parametrize("enabled", [True, False])
def test_collection_is_as_it_was_after_an_import_that_failed(enabled: bool) -> None:
    was = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(ImportError), no_collection():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was else gc.disable)()
