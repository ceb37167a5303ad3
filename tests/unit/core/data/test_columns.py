"""Which column means what."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from s2l_ray.core.data.original import original_rows
from tests.unit.core.data.raw import GOOD, lines, parquet, read, refusal


@pytest.mark.parametrize(
    ("row", "columns", "meanings"),
    [
        ({"instruction": "q", "input": "i", "output": "a"}, {}, ("q", "i", "a", "x")),
        ({"prompt": "q", "completion": "a"}, {}, ("q", None, "a", "x")),
        ({"prompt": "q", "completion": "a", "input": "i"}, {}, ("q", "i", "a", "x")),
        (
            {"question": "q", "answer": "a", "kind": "k"},
            {"instruction": "question", "output": "answer", "source": "kind"},
            ("q", None, "a", "k"),
        ),
        (
            {"instruction": "q", "output": "a", "context": "i", "source": "s"},
            {"input": "context"},
            ("q", "i", "a", "s"),
        ),
        (
            {"instruction": "q", "output": "a", "better": "b"},
            {"output": "better"},
            ("q", None, "b", "x"),
        ),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_columns_are_found_by_name_or_given(
    tmp_path: Path,
    row: dict[str, str],
    columns: dict[str, str],
    meanings: tuple[Any, ...],
    kind: str,
) -> None:
    path = tmp_path / f"x.{kind}"
    if kind == "jsonl":
        lines(path, row)
    else:
        parquet(path, {name: [value] for name, value in row.items()})
    made = read(path, **columns)
    ((user, assistant),) = made.table["messages"].to_pylist()
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    source = made.table["source"][0].as_py()
    assert (user["content"], user["input"], assistant["content"], source) == meanings
    assert original_rows(made.table).to_pylist() == [row]


@pytest.mark.parametrize(
    ("row", "columns", "said"),
    [
        ({**GOOD, "example_id": 1}, {}, "a column is named 'example_id'"),
        ({**GOOD, "cluster": 1}, {}, "a column is named 'cluster'"),
        ({**GOOD, "source": "s", "kind": "k"}, {"source": "kind"}, "a column is named 'source'"),
        (
            {**GOOD, "prompt": "p", "completion": "c"},
            {},
            "they fit several schemas (instruction and output; prompt and completion)",
        ),
        (
            {"instruction": "q", "completion": "c"},
            {},
            "expected columns of a known schema (instruction and output;",
        ),
        (
            {"text": "t"},
            {"instruction": "text"},
            "Name the columns with examples.columns.instruction",
        ),
        (
            {**GOOD},
            {"input": "context"},
            "no column 'context' (examples.columns.input); it has ['instruction', 'output']",
        ),
    ],
)
def test_columns_that_fit_no_schema_or_several_are_refused(
    tmp_path: Path, row: dict[str, Any], columns: dict[str, str], said: str
) -> None:
    assert said in refusal(lines(tmp_path / "x.jsonl", row), **columns)
    assert said in refusal(
        parquet(tmp_path / "y.parquet", {n: [v] for n, v in row.items()}), **columns
    )


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["instruction", "output", "output"])
    pq.write_table(table, tmp_path / "x.parquet")
    assert "two columns have the same name" in refusal(tmp_path / "x.parquet")
