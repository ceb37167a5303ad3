"""Which training state and which checkpoint counts: the newest, and none that is unfinished."""

import json
from collections.abc import Iterator

import pytest
import torch
from torch import distributed

from s2l_ray.core.model.checkpoint import checkpoint_files
from s2l_ray.core.model.state import newest_state
from s2l_ray.core.model.tensor_files import write_file
from s2l_ray.core.model.workers import Worker
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


@pytest.fixture(scope="module")
def alone() -> Iterator[Worker]:
    """The only worker of a training."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield Worker(0, 1, torch.device("cpu"))
    distributed.destroy_process_group()


def states(*steps: int) -> Memory:
    """Complete states, each with a file of weights."""
    files = Memory({})
    for step in steps:
        folder = f"state/step-{step:09d}"
        record = write_file(files, folder, "weight.safetensors", b"weights")
        state = {"format": 1, "step": step, "files": [record]}
        files.write(f"{folder}/state.json", json.dumps(state).encode())
    return files


def test_the_newest_complete_state_is_resumed_from(alone: Worker) -> None:
    files = states(4, 8)
    files.write("state/step-000000012/weight.safetensors", b"state.json was not written any more")
    state = newest_state(files, alone)
    assert state is not None
    assert state["step"] == 8


def test_without_a_complete_state_there_is_none(alone: Worker) -> None:
    assert newest_state(Memory({}), alone) is None
    begun = Memory({"state/step-000000004/weight-00000.safetensors": ""})
    assert newest_state(begun, alone) is None


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("weight.safetensors", b"weighty", "its content changed"),
        ("weight.safetensors", b"weigh", "7 bytes were written, 5 came"),
        ("weight.safetensors", None, "it is missing"),
        ("state.json", b"{", "it is not JSON"),
        ("state.json", b'{"format": 0, "step": 8, "files": []}', "format 1 was expected, 0 came"),
        ("state.json", b'{"format": 1, "step": 8}', "its step or its files are missing"),
    ],
)
def test_a_damaged_state_falls_back_to_the_one_before(
    alone: Worker, name: str, data: bytes | None, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    for files, before in ((states(4, 8), 4), (states(8), None)):
        if data is None:
            del files.files[f"state/step-000000008/{name}"]
        else:
            files.write(f"state/step-000000008/{name}", data)
        if before is None:
            with pytest.raises(UserError, match=f"step-000000008.*{said}"):
                newest_state(files, alone)
            continue
        state = newest_state(files, alone)
        assert state is not None
        assert state["step"] == before
        assert said in caplog.records[-1].getMessage()


def test_a_checkpoint_counts_once_its_list_of_files_is_written() -> None:
    record = {"name": "model.safetensors", "bytes": 3, "sha256": "ab"}
    begun = {"checkpoint/step-000003/model.safetensors": "abc"}
    assert checkpoint_files(Memory(begun), 3) is None
    done = {**begun, "checkpoint/step-000003/files.json": {"files": [record]}}
    assert checkpoint_files(Memory(done), 3) == [record]
    assert checkpoint_files(Memory(done), 2) is None
