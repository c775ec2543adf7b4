"""The fixtures of the campaign: one server for all cases of a process, and the function that tries cases."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
from harness import Campaign, try_all


@pytest.fixture(scope="session")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    made = Campaign(tmp_path_factory.mktemp("campaign"))
    yield made
    made.server.close()


@pytest.fixture
def hold(campaign: Campaign, record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """``hold(kind, cases)`` tries cases and counts them."""
    return functools.partial(try_all, campaign, record_property)
