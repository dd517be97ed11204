"""The site of a test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.kit.site import Site, new_site


@pytest.fixture
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with new_site(tmp_path_factory) as made:
        yield made
