"""The data-parallel workers of one training, as each of them sees them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from s2l_ray.errors import UserError


@dataclass(frozen=True)
class Worker:
    """This process's rank among the workers, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device


def from_worker(source: int, worker: Worker, make: Callable[[], Any]) -> Any:
    """The result of `make()` on worker `source`, broadcast to all; all workers call it together.

    Raises:
        UserError: on every worker, where `make` raised it on worker `source`.
        RuntimeError: where it raised anything else; worker `source` raises that exception itself.
    """
    box: list[Any] = [None]
    failure: Exception | None = None
    if worker.rank == source:
        try:
            box = [(None, make())]
        except Exception as error:
            failure = error
            box = [(isinstance(error, UserError), str(error))]
    distributed.broadcast_object_list(box, src=source, device=worker.device)
    if failure is not None:
        raise failure
    # None: no error; else whether the error is the user's.
    user_error, result = box[0]
    if user_error is None:
        return result
    raise UserError(result) if user_error else RuntimeError(f"worker {source} failed: {result}")
