"""What models cost; imports no torch, because planning a job asks for it."""

from collections.abc import Sequence

ANSWER_LOSS = "answer_loss"
BYTES_OF_DTYPE = {"bf16": 2, "fp32": 4}
# Of a GPU's memory, what CUDA and its libraries take before the first tensor.
CUDA_CONTEXT = 1.5e9
# Bytes of memory, by the names of `ray.util.accelerators`; of several sizes the smallest.
GPU_MEMORY = {
    "L4": 24e9, "A10G": 24e9, "L40S": 48e9, "A100": 40e9, "A100-40G": 40e9, "A100-80G": 80e9,
    "H20": 96e9, "H100": 80e9, "H200": 141e9, "B200": 180e9,
}  # fmt: skip


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
