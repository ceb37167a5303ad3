"""Ray's calls, each done at once and in this process: whole jobs run where no Ray may be started.

What a stage makes is then looked at in seconds. Placement, processes, losses and the order of
arrival are left to tests/integration and tests/cluster.
"""

import contextlib
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import s2l_ray

CPUS = 4.0


@contextlib.contextmanager
def used() -> Iterator[None]:
    """Do everything that is asked of Ray in this process."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        _stand_in(monkeypatch)
        yield


def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    import ray.actor
    import ray.data
    import ray.remote_function
    import ray.train.torch
    import ray.util
    import torch
    from ray._private.state import state

    context = SimpleNamespace(namespace="s2l_ray", gcs_address="", get_node_id=lambda: "f" * 56)
    for module, name, stand_in in (
        (ray, "is_initialized", lambda: True),
        (ray, "get_runtime_context", lambda: context),
        (ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": CPUS}}]),
        (ray, "cluster_resources", lambda: {"CPU": CPUS}),
        (state, "get_max_resources_from_cluster_config", lambda: {}),
        (ray, "put", lambda value: value),
        (ray, "get", lambda value: value),
        (
            ray,
            "wait",
            lambda values, num_returns=1, **_: (values[:num_returns], values[num_returns:]),
        ),
        (ray, "kill", lambda actor: None),
        (ray.remote_function.RemoteFunction, "_remote", _call),
        (ray.actor.ActorClass, "_remote", _actor),
        (ray.data, "from_items", lambda items, **_: _Rows(iter(items))),
        (ray.train.torch, "get_device", lambda: torch.device("cpu")),
        (ray.util, "get_node_ip_address", lambda: "localhost"),
    ):
        monkeypatch.setattr(module, name, stand_in)
    place = SimpleNamespace(ready=lambda: None)
    for module in _own_modules():
        for name, answer in (("placement_group", place), ("remove_placement_group", None)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda *_, answer=answer, **__: answer)
    from s2l_ray.edge import worker_pool

    monkeypatch.setattr(worker_pool, "run", _run_here)


def _own_modules() -> Iterator[Any]:
    for found in pkgutil.walk_packages(s2l_ray.__path__, "s2l_ray."):
        importlib.import_module(found.name)
    return (module for name, module in sys.modules.items() if name.startswith("s2l_ray."))


def _call(function: Any, args: Any = (), kwargs: Any = None, **options: Any) -> Any:
    """A task: its answer stands for the reference to it."""
    answer = function._function(*(args or ()), **(kwargs or {}))
    return list(answer) if (options.get("num_returns") or 1) != 1 else answer


def _actor(of: Any, args: Any = (), kwargs: Any = None, **_: Any) -> "_Actor":
    return _Actor(of.__ray_metadata__.modified_class(*(args or ()), **(kwargs or {})))


class _Actor:
    """An actor: an object of its class, whose methods answer at once."""

    def __init__(self, made: Any) -> None:
        self.made = made

    def __getattr__(self, name: str) -> Any:
        method = (lambda: None) if name == "__ray_ready__" else getattr(self.made, name)
        return SimpleNamespace(remote=method)


class _Rows:
    """As much of a Ray data set as the stages use; `rows` are dictionaries or Arrow tables."""

    def __init__(self, rows: Iterator[Any]) -> None:
        self.rows = rows

    def flat_map(
        self, make: Any, fn_args: Any = (), fn_constructor_args: Any = (), **_: Any
    ) -> "_Rows":
        call = make(*fn_constructor_args) if isinstance(make, type) else make
        return _Rows(made for row in self.rows for made in call(row, *fn_args))

    def map_batches(self, make: Callable[..., Any], fn_args: Any, **_: Any) -> "_Rows":
        import pyarrow as pa

        return _Rows(made for r in self.rows for made in make(pa.Table.from_pylist([r]), *fn_args))

    def iter_rows(self) -> Iterator[Any]:
        return self.rows

    def iter_batches(self, **_: Any) -> Iterator[Any]:
        return self.rows


def _run_here(shape: Any, name: str, task: Callable[[int, int], None], *_: Any) -> None:
    """In place of a group of training workers: this process alone.

    Its process group is kept, as DeepSpeed holds on to the first one it sees.
    """
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    task(0, 1)
