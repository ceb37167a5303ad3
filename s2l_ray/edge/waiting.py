"""Waiting for what the cluster must first have room for: said after 30 s, and not for ever."""

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

import ray

from s2l_ray.errors import UserError

log = logging.getLogger("s2l_ray")
SECONDS = 30.0
T = TypeVar("T")


class Patience:
    """What is said while something is waited for, asked every SECONDS.

    Args:
        label: of the artifact that is made.
        what: is waited for, said once; "": nothing unusual as long as there is no shortage.
        shortage: says what the cluster lacks to ever have room, or None.
    """

    def __init__(self, label: str, what: str, shortage: Callable[[], str | None]) -> None:
        self.label, self.what, self.shortage = label, what, shortage
        self._short = False

    def tick(self) -> None:
        """Say what is waited for.

        Raises:
            UserError: the cluster has lacked something twice in succession, so that waiting is
                of no use.
        """
        lacking, before = self.shortage(), self._short
        self._short = lacking is not None
        if lacking is not None:
            if before:
                raise UserError(lacking)
            log.warning("%s: waiting for hosts to come back: %s", self.label, lacking)
        elif self.what:
            log.info("%s: waiting for %s", self.label, self.what)
            self.what = ""


def wait_for(refs: list[Any], patience: Patience) -> None:
    """Wait until all these objects are there, or an error stands in their place."""
    while refs:
        refs = ray.wait(refs, num_returns=len(refs), timeout=SECONDS, fetch_local=False)[1]
        if refs:
            patience.tick()


def patiently(label: str, placed: Callable[[], T]) -> T:
    """What `placed` returns, asked again after SECONDS where the cluster had no room.

    Raises:
        UserError: the cluster had none the second time either.
    """
    try:
        return placed()
    except UserError as error:
        log.warning("%s: waiting for hosts to come back: %s", label, error)
    time.sleep(SECONDS)
    return placed()
