"""Which training state and which checkpoint counts: the newest, and none that is unfinished."""

import errno
import json
import threading
from collections.abc import Iterator

import pytest
import torch

from s2l_ray.core.model.checkpoint import checkpoint_files
from s2l_ray.core.model.fragments import Fragment
from s2l_ray.core.model.state import complete_states, newest_state
from s2l_ray.core.model.tensor_files import write_file
from s2l_ray.core.model.workers import Worker
from s2l_ray.errors import UserError
from tests import one_worker
from tests.one_worker import Memory

LIST = "part-00000-of-00001.json"


@pytest.fixture(scope="module")
def alone() -> Iterator[Worker]:
    """The only worker of a training."""
    yield from one_worker.group()


def states(*steps: int) -> Memory:
    """Complete states, each with a file of weights."""
    files = Memory({})
    for step in steps:
        folder = f"state/step-{step:09d}"
        record = write_file(files, folder, "weight.safetensors", b"weights")
        state = {"format": 2, "step": step, "files": [record]}
        files.write(f"{folder}/{LIST}", json.dumps(state).encode())
    return files


def test_the_newest_complete_state_is_resumed_from(alone: Worker) -> None:
    files = states(4, 8)
    files.write("state/step-000000012/weight.safetensors", b"its list was not written any more")
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
        (LIST, b"{", "it is not JSON"),
        (LIST, b'{"format": 0, "step": 8, "files": []}', "format 2 was expected, 0 came"),
        (LIST, b'{"format": 2, "step": 8}', "its step or its files are missing"),
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


def test_a_state_counts_once_every_worker_has_written_its_list() -> None:
    def part(rank: int) -> str:
        return f"state/step-000000004/part-{rank:05d}-of-00002.json"

    assert complete_states(Memory({part(0): {}})) == []
    assert complete_states(Memory({part(1): {}})) == []
    assert complete_states(Memory({part(0): {}, part(1): {}})) == ["step-000000004"]


class Slow(Memory):
    """Files of states are written once they may be."""

    def __init__(self) -> None:
        super().__init__()
        self.may = threading.Event()

    def write(self, path: str, data: bytes) -> None:
        if path.startswith("state"):
            assert self.may.wait(60)
        super().write(path, data)


def test_a_training_goes_on_while_its_state_is_written(alone: Worker) -> None:
    files = Slow()
    seen: list[list[str]] = []

    def on_step(entry: dict[str, float]) -> None:
        seen.append(complete_states(files))
        if entry["step"] == 4:
            files.may.set()

    setup = one_worker.setup(state_every=3)
    one_worker.trained(setup, alone, files, on_step=on_step)
    assert seen == [[], [], [], []]
    assert complete_states(files) == ["step-000000003"]


def test_a_state_that_cannot_be_written_stops_the_training(alone: Worker) -> None:
    class Full(Memory):
        def write(self, path: str, data: bytes) -> None:
            if path.startswith("state"):
                raise OSError(errno.ENOSPC, "No space left on device")
            super().write(path, data)

    with pytest.raises(OSError, match="No space left"):
        one_worker.trained(one_worker.setup(state_every=1), alone, Full())


def test_a_notice_saves_a_state_at_once_and_once(
    alone: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("s2l_ray.core.model.training.SECONDS_BETWEEN_NOTICES", 0.0)
    answers = iter([False, True])
    files = Memory()
    made = one_worker.trained(one_worker.setup(), alone, files, preempted=lambda: next(answers))
    assert [entry["state"] for entry in made] == [False, True, False, False]
    assert complete_states(files) == ["step-000000002"]


@pytest.mark.parametrize("before", ["zero1", "zero3"])
@pytest.mark.parametrize("after", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_a_state_is_resumed_from_under_every_stage(alone: Worker, before: str, after: str) -> None:
    files = Memory()
    expected = one_worker.trained(one_worker.setup(deepspeed=before), alone)
    started = one_worker.setup(deepspeed=before, state_every=2)
    one_worker.trained(started, alone, files, stop_after=3)
    found = one_worker.trained(one_worker.setup(deepspeed=after), alone, files)
    assert [entry["step"] for entry in found] == [3, 4]
    losses = [entry["loss"] for entry in found]
    if before == after:
        assert losses == [entry["loss"] for entry in expected[2:]]
    assert losses == pytest.approx([entry["loss"] for entry in expected[2:]], rel=1e-5)


@pytest.mark.parametrize(
    ("start", "size", "filled", "expected"),
    [
        (0, 10, 4, [3, 4, 5, 6]),
        (4, 10, 3, [-1, 4, 5, 6]),
        (2, 3, 2, [3, 4, -1, -1]),
        (5, 1, 1, [-1, -1, 5, -1]),
    ],
)
def test_a_fragment_takes_over_the_elements_that_both_have(
    start: int, size: int, filled: int, expected: list[int]
) -> None:
    own = Fragment("weight", "w", 3, torch.full((4,), -1.0))
    assert own.overlap(start, start + size)
    assert own.fill(start, torch.arange(start, start + size).float()) == filled
    assert own.values.tolist() == expected
    assert not own.overlap(7, 9)
    assert not own.overlap(0, 3)
