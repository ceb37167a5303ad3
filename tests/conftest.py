"""Which tests run in one process where `pytest -n` shares them out to several."""

from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group_of(item)))


def group_of(item: pytest.Item) -> str:
    """Tests of one group share what is dear to make: the hosts, the finished run, a module's
    fixtures.
    """
    place = item.path.relative_to(TESTS)
    if place.parts[0] == "cluster":
        return "hosts"
    if "finished" in getattr(item, "fixturenames", ()):
        return "finished"
    return str(place)
