"""A storage that may only be read serves a job whose artifacts are all there."""

import errno
import os
from pathlib import Path

import pytest

from s2l_ray import config, pipeline
from s2l_ray.core.storage.store import Store
from tests import tiny
from tests.committed import commit


def test_everything_there_on_a_read_only_storage_is_a_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan = pipeline.plan(config.load(None, [], tiny.job(tmp_path)))
    for node in plan.nodes:
        commit(node.artifact)

    def refused(store: Store, path: str, data: bytes) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    monkeypatch.setattr(Store, "write", refused)
    assert not any(done.made for done in pipeline.run(plan))
    assert "run.json is not written: a file may not be used" in caplog.text
    os.unlink(tmp_path / "storage" / plan.nodes[-1].artifact.path / "manifest.json")
    with pytest.raises(OSError, match="Read-only"):
        pipeline.run(plan)
