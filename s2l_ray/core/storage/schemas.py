"""The declared schemas of the row-wise artifacts, and the columns of vectors that they have."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from s2l_ray.errors import UserError

# A conversation: turns by system, user, assistant or tool. `content` is never null; it is "" where
# a turn only calls tools. `input` is a user turn's separate input text (Alpaca's field), or null.
# `extra` is null, or JSON of whatever else a chat template may want of the turn. `masked` is true
# where the data say that an assistant turn is not to be learned.
MESSAGES = pa.list_(
    pa.struct(
        [
            ("role", pa.string()),
            ("content", pa.string()),
            ("input", pa.string()),
            ("extra", pa.string()),
            ("masked", pa.bool_()),
        ]
    )
)
# The columns of `examples` that all files share. The struct `original` follows, with each file's
# own columns as they were. `tools` is null, or JSON text of a list of tool schemas.
EXAMPLES_FIXED = pa.schema(
    [
        ("example_id", pa.int64()),
        ("source", pa.string()),
        ("messages", MESSAGES),
        ("tools", pa.string()),
    ]
)
# Scores of an answer that are numbers from 0 to 1; the others are right or wrong.
SHARES = ("rouge_l", "bleu", "bert_score")
CLUSTERS = pa.schema(
    [("example_id", pa.int64()), ("cluster", pa.int32()), ("distance", pa.float32())]
)


def trajectories_schema(num_columns: int, statistics: Sequence[str] = ()) -> pa.Schema:
    """Schema of `trajectories`: losses at every step of every member, step 0 included.

    As many values of each statistic follow.

    Rows that could not be scored have nulls and a reason.
    """
    vector = pa.list_(pa.float32(), num_columns)
    return pa.schema(
        [
            ("example_id", pa.int64()),
            ("source", pa.string()),
            ("num_tokens", pa.int32()),
            ("losses", vector),
            *((name, vector) for name in statistics),
            ("reason", pa.string()),
        ]
    )


def evaluation_schema(scores: Sequence[str]) -> pa.Schema:
    """Schema of `evaluation`: one row a held-out example.

    `generated` is what the model wrote, and `first_generated` what it wrote before it was `asked`
    (chain or program) again. `program` says how a program ended: well, error, time or output.
    `answer` is what was scored against `gold`. Where nothing was generated, these are null.
    """
    return pa.schema(
        [
            ("example_id", pa.int64()),
            ("source", pa.string()),
            ("num_tokens", pa.int32()),
            ("loss", pa.float32()),
            ("generated", pa.string()),
            ("cut", pa.bool_()),
            ("asked", pa.string()),
            ("first_generated", pa.string()),
            ("program", pa.string()),
            ("answer", pa.string()),
            ("gold", pa.string()),
            *((name, pa.float32() if name in SHARES else pa.bool_()) for name in scores),
        ]
    )


def vectors(column: pa.ChunkedArray, what: str) -> tuple[np.ndarray, np.ndarray]:
    """A fixed_size_list<float32>[T] column as (valid bool [N], values float32 [n, T]).

    n is the number of valid rows.
    """
    if not pa.types.is_fixed_size_list(column.type) or column.type.value_type != pa.float32():
        raise UserError(
            f"reading {what}: expected a column of fixed_size_list<float>, got {column.type}. The "
            "file was not written by this version of s2l_ray: remove the artifact's folder and "
            "run again."
        )
    valid_N = column.is_valid().to_numpy()
    present = column.drop_null().combine_chunks()
    return valid_N, present.flatten().to_numpy(zero_copy_only=False).reshape(
        -1, column.type.list_size
    )


def vector_column(valid_N: np.ndarray, values_NT: np.ndarray) -> pa.FixedSizeListArray:
    """The inverse of `vectors`, but with a row of values for all N; those not valid are ignored."""
    flat = pa.array(
        np.ascontiguousarray(values_NT, dtype=np.float32).reshape(-1), type=pa.float32()
    )
    return pa.FixedSizeListArray.from_arrays(flat, values_NT.shape[1], mask=pa.array(~valid_N))
