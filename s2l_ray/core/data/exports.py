"""A subset as other programs read it: JSON lines, conversations for trainers, and the few lines of
config that name them.

Paths in those lines are relative to the subset's folder, so they stay right wherever the folder is
copied.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import yaml

from s2l_ray.core.data.json_text import members, object_text, texts_of

CHAT_FOLDER = "chat"


def json_lines(added: pa.Table, originals: Iterable[pa.StringScalar]) -> bytes:
    """Every row as one line of JSON: the columns that are added, then all else that the row had.

    Args:
        originals: of each row, the JSON object that it was.
    """
    columns = [texts_of(column.combine_chunks()) for column in added.columns]
    lines = []
    for original, *values in zip(originals, *columns, strict=True):
        own = dict(zip(added.column_names, values, strict=True))
        kept = {key: text for key, text in members(original.as_py()).items() if key not in own}
        lines.append(object_text(own | kept) + "\n")
    return "".join(lines).encode()


def chat_lines(table: pa.Table) -> bytes:
    """Rows of example_id, source, messages, tools as trainers read them.

    One object a line. `messages` is a list of {role, content} and whatever else the turn had
    (tool_calls, name, ...), with `train: false` where it is not to be learned; a separate input
    stands below the instruction. `tools`, where a row has
    any, is the JSON text of their list: as objects, the tools of one row would get the fields of
    all other rows when a library makes one schema of them. A row without tools has no such key,
    because some templates take an empty list for tools.
    """
    rows = []
    for row in table.to_pylist():
        chat = {"messages": [_turn(turn) for turn in row["messages"]]}
        chat |= {"tools": row["tools"]} if row["tools"] is not None else {}
        rows.append(chat | {"example_id": row["example_id"], "source": row["source"]})
    return _lines(rows)


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    text = turn["content"] + ("\n" + turn["input"] if turn["input"] else "")
    said = {"role": turn["role"], "content": text}
    said |= {} if turn["extra"] is None else json.loads(turn["extra"]) | said
    return said | ({"train": False} if turn.get("masked") else {})


def _lines(rows: Iterable[dict[str, Any]]) -> bytes:
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    return "".join(lines).encode()


@dataclass(frozen=True)
class ChatFile:
    """A file of conversations: how many of its rows name tools, how many turns call one, and how
    many answers are not to be learned."""

    name: str
    tools: int
    tool_calls: int
    masked: int = 0


def stanzas(files: Sequence[ChatFile]) -> dict[str, bytes]:
    """Config that trainers take as it is, by file name."""
    # The `datasets` library takes the columns of the first file for those of all: files with
    # columns that others lack come first.
    ordered = sorted(files, key=lambda f: (not f.tool_calls, not f.tools, not f.masked))
    plain = not any(file.tools or file.tool_calls or file.masked for file in files)
    masked = sum(file.masked for file in files)
    data_files = [f"{CHAT_FOLDER}/*.jsonl"] if plain else [file.name for file in ordered]
    return {
        "dataset_info.json": _llama_factory(
            any(file.tools for file in files), any(file.tool_calls for file in files)
        ),
        "axolotl.yaml": _axolotl(data_files, masked > 0),
        "trl.yaml": _trl(data_files, masked),
    }


def _llama_factory(tools: bool, tool_calls: bool) -> bytes:
    """An entry of LLaMA-Factory's list of data sets, for `dataset_dir: <this folder>` and
    `dataset: s2l_ray`.

    Its reader "sharegpt" takes OpenAI's names as tags but drops the field tool_calls. Its reader
    "openai" knows that field, but adds a system turn of its own to rows without tools, so it is
    only named where tools are called.
    """
    columns = {"messages": "messages"} | ({"tools": "tools"} if tools else {})
    tags = {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
        "observation_tag": "tool",
        "function_tag": "function_call",
    }
    entry = {
        "file_name": CHAT_FOLDER,
        "formatting": "openai" if tool_calls else "sharegpt",
        "columns": columns,
        "tags": tags,
    }
    return (json.dumps({"s2l_ray": entry}, indent=2) + "\n").encode()


def _axolotl(data_files: list[str], masked: bool) -> bytes:
    said = (
        "# Copy this into an axolotl config. Run in the folder this file lies in, or write that "
        "folder before all paths.\n"
    )
    stanza = {
        "path": CHAT_FOLDER,
        "data_files": data_files,
        "ds_type": "json",
        "split": "train",
        "type": "chat_template",
        "field_messages": "messages",
        "roles_to_train": ["assistant"],
        "train_on_eos": "turn",
    }
    stanza |= {"message_field_training": "train"} if masked else {}
    return (said + yaml.safe_dump({"datasets": [stanza]}, sort_keys=False)).encode()


def _trl(data_files: list[str], masked: int) -> bytes:
    said = (
        "# trl sft --config trl.yaml --model_name_or_path MODEL --output_dir FOLDER\n"
        "# Run in the folder this file lies in, or write that folder before all paths. With "
        "assistant_only_loss: true and a chat template with\n"
        "# generation marks TRL makes the same tokens and learns the same of them as prompt: chat "
        "with learn: all. What differs:\n"
        "# a template without marks, in whose place TRL puts its own or stops; prompt: alpaca and "
        "plain, whose headings TRL does not write;\n"
        "# rows left out of the trajectories (column reason), and what max_length cuts.\n"
    )
    if masked:
        said += (
            f"# TRL knows no mark of a single turn: it learns {masked:,} answers that have "
            "train: false, which were not scored.\n"
        )
    stanza = {"path": "json", "data_files": data_files, "split": "train"}
    return (said + yaml.safe_dump({"datasets": [stanza]}, sort_keys=False)).encode()
