"""Keeps every test of this folder away from the user's own cache."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Merge rules derived by a test are cached in a temporary folder."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("twostroke.text.merges._get_cache_folder", lambda: folder)
        patch.setattr("twostroke.text.merges.LEAST_CACHED", 1)
        yield
