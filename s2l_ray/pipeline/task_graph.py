"""What can be made when, and what at the same time. Knows no stages and no Ray."""

import logging
import queue
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any

log = logging.getLogger("s2l_ray")
# by name, what must be there first; names that are no keys are there
Needs = Mapping[str, Collection[str]]


def in_order(needs: Needs, make: Callable[[str], Any], at_once: int) -> None:
    """Call `make` for every name as soon as what it needs is made, in the order given.

    Calls are made in threads that do not keep the process from ending, so that Ctrl-C ends it.
    After an error nothing new is begun, but what is being made is finished: the next run needs it.

    Args:
        at_once: calls at a time.

    Raises:
        What the first call that failed raised.
    """
    ended: queue.SimpleQueue[tuple[str, BaseException | None]] = queue.SimpleQueue()

    def call(name: str) -> None:
        try:
            make(name)
        except BaseException as error:
            ended.put((name, error))
        else:
            ended.put((name, None))

    waiting, running = dict(needs), set[str]()
    failed: BaseException | None = None
    while running or (waiting and failed is None):
        missing = waiting.keys() | running
        ready = [
            name for name, own in waiting.items() if failed is None and missing.isdisjoint(own)
        ]
        for name in ready[: at_once - len(running)]:
            del waiting[name]
            running.add(name)
            threading.Thread(target=call, args=(name,), name=name, daemon=True).start()
        name, error = ended.get()
        running.remove(name)
        failed = failed or error
        if error is not None and running:
            log.error("%s: failed (%s); waiting for %s", name, error, ", ".join(sorted(running)))
    if failed is not None:
        raise failed


def unrelated(name: str, needs: Needs, among: Collection[str]) -> set[str]:
    """Those of `among` that neither need `name` nor are needed for it, directly or not."""

    def before(own: str) -> set[str]:
        direct = {other for other in needs[own] if other in needs}
        return direct.union(*map(before, direct))

    earlier = before(name)
    return {
        other
        for other in among
        if other != name and other not in earlier and name not in before(other)
    }
