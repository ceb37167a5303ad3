"""Which tests run in one process where `pytest -n` shares them out to several."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).parents[1]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return Scheduling(config, log)


class Scheduling(LoadScopeScheduling):
    """Keeps tests together that share what is dear to make.

    These are the tests of one module, those on hosts, and those of the finished run. The marks of
    `--dist=loadgroup`, which are for this, do nothing with pytest 9.2 (pytest-xdist 3.8).
    """

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid.partition("::")[0])


@functools.cache
def group_of(module: str) -> str:
    """The group of a test module, by its path from the root."""
    if module.startswith("tests/cluster/"):
        return "hosts"
    if re.search(r"\bfinished: Finished\b", (ROOT / module).read_text()):
        return "finished"
    return module
