"""Many calls of one Ray task, a bounded number at a time."""

from collections.abc import Iterator
from typing import Any

import ray

from s2l_ray.edge.placement import TASK_CPUS
from s2l_ray.edge.user_errors import reraise_user_errors


def bounded(task: Any, calls: list[tuple[Any, ...]], in_flight: int = 64) -> Iterator[Any]:
    """Run a Ray task once per tuple of arguments, a bounded number at a time.

    Answers come in any order.

    Raises:
        UserError: one that a task raised, unwrapped.
    """
    waiting = list(reversed(calls))
    running: list[Any] = []
    with reraise_user_errors():
        while waiting or running:
            while waiting and len(running) < in_flight:
                # Spread, because a trial's own placement has no room for tasks.
                running.append(
                    task.options(num_cpus=TASK_CPUS, scheduling_strategy="SPREAD").remote(
                        *waiting.pop()
                    )
                )
            ready, running = ray.wait(running)
            yield from ray.get(ready)
