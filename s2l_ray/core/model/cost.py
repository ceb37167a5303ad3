"""What models cost; imports no torch, because planning a job asks for it."""

from collections.abc import Sequence
from dataclasses import dataclass

ANSWER_LOSS = "answer_loss"
BYTES_OF_DTYPE = {"bf16": 2, "fp32": 4}
# Share of a GPU's peak that training reaches. Published runs of 7B and 8B reach 0.33 to 0.58.
UTILISATION = 0.4
# Of a GPU's memory, what CUDA and its libraries take before the first tensor.
CUDA_CONTEXT = 1.5e9


@dataclass(frozen=True)
class Gpu:
    """Memory in bytes, and FLOPs a second in bf16 without sparsity, of the makers' data sheets."""

    memory: float
    flops: float

    @property
    def usable(self) -> float:
        """Bytes for tensors."""
        return self.memory - CUDA_CONTEXT


# By the names of `ray.util.accelerators`.
GPUS = {
    "L4": Gpu(24e9, 121e12),
    "A10G": Gpu(24e9, 70e12),
    "L40S": Gpu(48e9, 362e12),
    "A100": Gpu(40e9, 312e12),
    "A100-40G": Gpu(40e9, 312e12),
    "A100-80G": Gpu(80e9, 312e12),
    "H20": Gpu(96e9, 148e12),
    "H100": Gpu(80e9, 989e12),
    "H200": Gpu(141e9, 989e12),
    "B200": Gpu(180e9, 2_250e12),
}


def scoring_flops(
    parameters: int,
    output_shape: tuple[int, int],
    lengths: Sequence[float],
    learned: Sequence[float],
    statistics: Sequence[str],
) -> float:
    """FLOPs of scoring examples with one model.

    A forward pass takes 2 a parameter and token. `answer_loss` takes a second pass over the
    answers, `grand` Gram matrices of n errors and n hidden states, or the gradient where n > H.

    Args:
        output_shape: V and H of the output layer.
        lengths, learned: tokens of each example, and how many of them are learned.
    """
    total = 2.0 * parameters * sum(lengths)
    if ANSWER_LOSS in statistics:
        total += 2.0 * parameters * (sum(learned) + len(learned))
    if "grand" in statistics:
        vocabulary, width = output_shape
        total += sum(2.0 * n * min(n, width) * (vocabulary + width) for n in learned)
    return total
