"""What models cost; imports no torch, because planning a job asks for it."""

from collections.abc import Sequence

ANSWER_LOSS = "answer_loss"
BYTES_OF_DTYPE = {"bf16": 2, "fp32": 4}


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
