"""What goes through the model at once: a worker's examples of a step, cut and made into tensors."""

from collections.abc import Sequence

import torch
from torch import distributed

from s2l_ray.core.model.schedule import TrainingSetup, accumulation
from s2l_ray.core.model.workers import Worker
from s2l_ray.core.text.batching import pack, packed_batches, pad
from s2l_ray.core.text.encoding import Encoded


def cut(share: Sequence[Encoded], setup: TrainingSetup, worker: Worker) -> list[list[Encoded]]:
    """The micro-batches of a share; equally many on every worker, since ZeRO talks in each."""
    if not setup.scaling.packing:
        passes = accumulation(setup, worker.world_size)
        return micro_batches(share, setup.micro_batch, passes)
    useful = [example for example in share if example.learned.any()]
    packed = packed_batches(useful, setup.micro_batch * setup.section.max_length)
    most = max(1, len(packed))
    if worker.world_size > 1:
        counts = torch.tensor(most, device=worker.device)
        distributed.all_reduce(counts, distributed.ReduceOp.MAX)
        most = int(counts)
    return packed + [[] for _ in range(most - len(packed))]


def micro_batches(share: Sequence[Encoded], size: int, passes: int) -> list[list[Encoded]]:
    """Cut a share into `passes` micro-batches of examples of similar length, to pad little.

    Some are empty when examples are few.
    """
    useful = sorted(
        (e for e in share if e.learned.any()), key=lambda e: (len(e.input_ids), e.example_id)
    )
    return [useful[i * size : (i + 1) * size] for i in range(passes)]


def tensors(
    micro_batch: Sequence[Encoded], setup: TrainingSetup, device: torch.device
) -> list[torch.Tensor]:
    """What `token_losses` takes: rows that are right-padded, or packed with their positions.

    An empty micro-batch gives two tokens, one of them learned, whose loss is multiplied by zero.
    """
    arrays = pack(micro_batch) if setup.scaling.packing else pad(micro_batch, 0)
    if not micro_batch:
        arrays[1][0, 1] = True
    return [torch.from_numpy(array).to(device) for array in arrays]
