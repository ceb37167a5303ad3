"""The data-parallel workers of one training, as each of them sees them."""

import platform
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


def check_gpu(gpus: float) -> None:
    """Refuse to go on without a GPU that was asked for.

    Raises:
        UserError: torch can use none here.
    """
    if gpus and not torch.cuda.is_available():
        raise UserError(
            f"looking for a GPU on {platform.node()}: scaling asks for {gpus:g} GPUs for this "
            f"process, and torch {torch.__version__} can use none there. Install a torch that is "
            "built for this GPU and its driver, or set gpus of this stage's scaling to 0."
        )


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
