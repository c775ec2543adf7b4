"""The fixtures of the campaign: one server for all cases of a process, and the function that tries cases."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Campaign, try_all

PENDING: set[str] = {path.stem for path in Path(__file__).parent.glob("test_*.py")}  # files that do not hold yet


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in PENDING and "DASS_EXP_CAMPAIGN" not in os.environ:
            item.add_marker(pytest.mark.skip(reason="does not hold yet"))


@pytest.fixture(scope="session")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    made = Campaign(tmp_path_factory.mktemp("campaign"))
    yield made
    made.server.close()


@pytest.fixture
def hold(campaign: Campaign, record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """``hold(kind, cases)`` tries cases and counts them."""
    return functools.partial(try_all, campaign, record_property)
