"""Which training state and which checkpoint counts: the newest, and none that is unfinished."""

import json

import pytest

from s2l_ray.core.model.checkpoint import checkpoint_files
from s2l_ray.core.model.state import newest_state
from s2l_ray.errors import UserError


class Memory:
    """Files by path."""

    def __init__(self, files: dict[str, object]) -> None:
        self.files = {path: json.dumps(value).encode() for path, value in files.items()}

    def read(self, path: str) -> bytes:
        return self.files[path]

    def write(self, path: str, data: bytes) -> None:
        self.files[path] = data

    def list(self, folder: str) -> list[str]:
        below = [path for path in self.files if path.startswith(f"{folder}/")]
        return sorted({path[len(folder) + 1 :].split("/")[0] for path in below})

    def delete(self, folder: str) -> None:
        raise AssertionError("nothing is to be deleted")


def test_the_newest_complete_state_is_resumed_from() -> None:
    files = Memory(
        {
            "state/step-000000004/state.json": {"format": 1, "step": 4},
            "state/step-000000008/state.json": {"format": 1, "step": 8},
            "state/step-000000012/weight-00000.safetensors": "state.json was not written any more",
        }
    )
    state = newest_state(files)
    assert state is not None
    assert state["step"] == 8


def test_without_a_complete_state_there_is_none() -> None:
    assert newest_state(Memory({})) is None
    assert newest_state(Memory({"state/step-000000004/weight-00000.safetensors": ""})) is None


def test_a_state_of_another_format_is_refused() -> None:
    files = Memory({"state/step-000000004/state.json": {"format": 0, "step": 4}})
    with pytest.raises(UserError, match="format 1 was expected, 0 came"):
        newest_state(files)


def test_a_checkpoint_counts_once_its_list_of_files_is_written() -> None:
    record = {"name": "model.safetensors", "bytes": 3, "sha256": "ab"}
    begun = {"checkpoint/step-000003/model.safetensors": "abc"}
    assert checkpoint_files(Memory(begun), 3) is None
    done = {**begun, "checkpoint/step-000003/files.json": {"files": [record]}}
    assert checkpoint_files(Memory(done), 3) == [record]
    assert checkpoint_files(Memory(done), 2) is None
