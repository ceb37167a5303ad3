"""A fence around the unit tests (nothing in them may start Ray or sleep), and a local S3."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

from s2l_ray.core.storage.store import filesystem

# A machine that others use too may take long for an example.
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")


@pytest.fixture(autouse=True)
def no_ray_and_no_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError(
            "unit tests start no Ray and do not sleep; this belongs into tests/integration"
        )

    monkeypatch.setattr(ray, "init", refused)
    # Plans are for this machine.
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setattr(time, "sleep", refused)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For models that are too small for more; the machine may be busy too."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def s3_bucket() -> Iterator[str]:
    """A bucket of a local S3 server, as a URI with place for a path before the query."""
    pytest.importorskip("flask", reason="moto[server] is not installed (pip install moto[server])")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    bucket = (
        f"s3://key:secret@bucket?scheme=http&endpoint_override=127.0.0.1:{port}&region=us-east-1"
    )
    remote, path = filesystem(f"{bucket}&allow_bucket_creation=true")
    remote.create_dir(path)
    yield bucket
    server.stop()
