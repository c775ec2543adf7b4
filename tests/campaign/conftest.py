"""The fixtures of the campaign: one server for all cases of a process, and the function that tries cases."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import WHAT, Campaign, try_all


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark all of it as thorough; of a sample, try each test with the first of its parameters only."""
    seen: set[tuple[str, str]] = set()
    for item in list(items):
        if item.path.parent != Path(__file__).parent:
            continue
        item.add_marker(pytest.mark.thorough)
        test = (item.path.stem, getattr(item, "originalname", item.name))
        if WHAT == "sample" and test in seen:
            items.remove(item)
            config.hook.pytest_deselected(items=[item])
        seen.add(test)


@pytest.fixture(scope="session")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    made = Campaign(tmp_path_factory.mktemp("campaign"))
    yield made
    made.server.close()


@pytest.fixture
def hold(campaign: Campaign, record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """``hold(kind, cases)`` tries cases and counts them."""
    return functools.partial(try_all, campaign, record_property)
