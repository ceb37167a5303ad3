"""Each kind of failure is one line that names it and what helps; none is a traceback."""

import errno
import os
import re
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from s2l_ray import run
from s2l_ray.edge.failures import causes, described, lasting, of_system
from s2l_ray.edge.user_errors import find_user_error
from s2l_ray.errors import UserError

EXPIRED = OSError("When reading key 'a' in bucket 'b': AWS Error UNKNOWN (HTTP status 400): "
                  "ExpiredToken: The provided token has expired.")  # fmt: skip


def os_error(number: int, path: str = "/data/x") -> OSError:
    return OSError(number, os.strerror(number), path)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (os_error(errno.ENOSPC), "no space is left: .*'/data/x'.* Free some"),
        (os_error(errno.EDQUOT), "no space is left"),
        (os_error(errno.EROFS), "a file may not be used: .*Read-only.*'/data/x'. Give this user"),
        (os_error(errno.EACCES, os.path.expanduser("~/.cache/x")), "home folder .* Set HOME"),
        (os_error(errno.EMFILE), "too many files are open.*ulimit -n"),
        (os_error(errno.EIO), "did not answer as it should"),
        (os_error(errno.EISDIR), "the system refused: .*Is a directory"),
        (EXPIRED, "refuses access: .*ExpiredToken.*Renew the credentials"),
        (OSError("AWS Error NETWORK_CONNECTION during HeadObject"), "did not answer"),
        (MemoryError(), "ran out of memory"),
        (OutOfMemoryError("x"), "its host ran out of memory"),
        (ActorDiedError(), "more often than scaling.max_failures"),
        (UserError("the cause"), "^the cause$"),
    ],
)
def test_each_kind_is_named_however_it_was_wrapped(error: Exception, said: str) -> None:
    in_worker = UserExceptionWithTraceback(error, "Traceback: 179 lines")
    task = RayTaskError("f", "Traceback\nlines", error)
    for wrapped in (
        error, task, ControllerError(error), WorkerGroupError("lines\nof it", {0: in_worker}),
    ):  # fmt: skip
        assert error in list(causes(wrapped))
        text = described(wrapped)
        assert re.search(said, text), text
        assert len(text.splitlines()) == 1
        assert "Traceback" not in text


def test_what_nobody_thought_of_is_one_line_and_its_traceback_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def arrow() -> None:
        raise OSError("Verification of flatbuffer-encoded Footer failed.")

    assert run.exit_status(arrow) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: OSError: Verification of flatbuffer-encoded Footer failed. This")
    (file,) = tmp_path.iterdir()
    assert str(file) in said
    assert len(said.splitlines()) == 1
    assert "in arrow" in file.read_text()


def test_only_what_lasts_is_not_tried_again() -> None:
    for error in (os_error(errno.ENOSPC), os_error(errno.EROFS), EXPIRED):
        failed = WorkerGroupError("", {0: ValueError("x"), 1: error})
        assert str(lasting(failed)) == of_system(error)
    for other in (os_error(errno.EIO), ValueError("x"), ActorDiedError()):
        assert lasting(WorkerGroupError("", {0: other})) is None
    assert str(find_user_error(WorkerGroupError("", {0: UserError("mine")}))) == "mine"
