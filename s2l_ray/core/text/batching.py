"""Encoded examples to padded batches."""

from collections.abc import Sequence

import numpy as np

from s2l_ray.core.text.encoding import Encoded

# Batches are made smaller, down to so many tokens, until at most this share of them is padding.
MOST_PADDING, FEWEST_TOKENS = 0.03, 2_048


def pad(batch: Sequence[Encoded], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded input_ids int64 [B, L] and learned bool [B, L].

    An empty batch gives [1, 2] without a learned token.
    """
    length = max([len(example.input_ids) for example in batch], default=2)
    input_ids_BL = np.full((max(1, len(batch)), length), pad_id, np.int64)
    learned_BL = np.zeros(input_ids_BL.shape, bool)
    for row, example in enumerate(batch):
        input_ids_BL[row, : len(example.input_ids)] = example.input_ids
        learned_BL[row, : len(example.learned)] = example.learned
    return input_ids_BL, learned_BL


def pack(batch: Sequence[Encoded]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The examples behind one another: input_ids, learned and position of each token, all [1, L].

    Positions restart with every example, by which a model keeps it from seeing the others. An
    empty batch gives two tokens, neither of them learned.
    """
    if not batch:
        return np.zeros((1, 2), np.int64), np.zeros((1, 2), bool), np.arange(2)[None]
    parts = (
        [example.input_ids.astype(np.int64) for example in batch],
        [example.learned for example in batch],
        [np.arange(len(example.input_ids)) for example in batch],
    )
    ids, learned, positions = (np.concatenate(part)[None] for part in parts)
    return ids, learned, positions


def packed_batches(examples: Sequence[Encoded], tokens_per_batch: int) -> list[list[Encoded]]:
    """Examples in batches of at most so many tokens; each goes, longest first, where it still fits.

    One that is longer has a batch of its own.
    """
    batches: list[list[Encoded]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda e: (-len(e.input_ids), e.example_id)):
        length = len(example.input_ids)
        fits = next((number for number, left in enumerate(room) if left >= length), None)
        if fits is None:
            fits = len(batches)
            batches.append([])
            room.append(tokens_per_batch)
        batches[fits].append(example)
        room[fits] -= length
    return batches


def token_batches(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Rows by number, cut into batches of at most `tokens_per_batch` padded tokens.

    Rows of similar length share a batch; the longest come first. A row longer than a batch has one
    of its own.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches: list[list[int]] = []
    while order:
        fits = max(1, tokens_per_batch // max(1, lengths[order[0]]))
        batches.append(order[:fits])
        order = order[fits:]
    return batches


def dense_batches(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """`token_batches` of a part with little padding: the limit is halved until it is MOST_PADDING.

    Large batches of a small part hold rows of unlike lengths. The limit stays above FEWEST_TOKENS,
    or where it is from the start.
    """
    while True:
        batches = token_batches(lengths, tokens_per_batch)
        padded = sum(len(batch) * lengths[batch[0]] for batch in batches)
        little = padded <= (1 + MOST_PADDING) * sum(lengths)
        if little or tokens_per_batch // 2 < FEWEST_TOKENS:
            return batches
        tokens_per_batch //= 2
