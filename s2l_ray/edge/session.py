"""Joining a Ray cluster or starting one, and whether all its nodes see the storage."""

import contextlib
import logging
import os
import signal
import sys
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import ray
import ray.data
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from s2l_ray.config import Scaling
from s2l_ray.core.storage.store import Store
from s2l_ray.errors import UserError

log = logging.getLogger("s2l_ray")


# Of the names that jobs give to what they share; without it each job would have one of its own.
NAMESPACE = "s2l_ray"


def connect(scaling: Scaling) -> None:
    """Join the Ray cluster this process belongs to, or start one on this machine. Says which."""
    if not ray.is_initialized():
        with _signals_left_alone():
            _join(scaling)
        _native_lines_to_log()
    elif ray.get_runtime_context().namespace != NAMESPACE:
        log.warning(
            "Ray was joined under another namespace than %s: other jobs do not see which artifacts "
            "this one makes",
            NAMESPACE,
        )
    # Ray's libraries show progress of their own; ours stands in its place.
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.train", "ray.tune"):
        # What fails comes here as an exception.
        logging.getLogger(name).setLevel(logging.CRITICAL)


@contextlib.contextmanager
def _signals_left_alone() -> Iterator[None]:
    """Keep Ray from handling SIGTERM in this process, which is for the command to do.

    Ray would leave by an exception and shut down, while other threads go on and start it again.
    """
    from ray._private import utils

    own = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = own
        handler = signal.getsignal(signal.SIGTERM)
        if handler is not None and threading.current_thread() is threading.main_thread():
            # Once more, before what Ray's own code in C++ has put there: it prints its stack.
            signal.signal(signal.SIGTERM, handler)


def _native_lines_to_log() -> None:
    """Lines of Ray's C++, which go to file 2, go to Ray's log folder.

    Only where the command writes its own lines elsewhere.
    """
    try:
        if sys.stderr.fileno() == 2:
            return
    except (OSError, ValueError, AttributeError):
        return
    node: Any = ray._private.worker._global_node
    folder = node.get_logs_dir_path()
    with contextlib.suppress(OSError), open(f"{folder}/s2l_ray-{os.getpid()}.err", "ab") as file:
        os.dup2(file.fileno(), 2)


# Workers' own lines stay in Ray's log folder: what matters comes back as results or errors.
OPTIONS: dict[str, Any] = {
    "namespace": NAMESPACE,
    "log_to_driver": False,
    "logging_level": logging.ERROR,
}


def join_running() -> bool:
    """Join the Ray cluster this process belongs to; whether there is one.

    Raises:
        UserError: there is none where RAY_ADDRESS says that there is.
    """
    if ray.is_initialized():
        return True
    if os.environ.get("RAY_ADDRESS") == "local":
        return False
    try:
        ray.init(address="auto", **OPTIONS)
    except ConnectionError as error:
        if "RAY_ADDRESS" in os.environ:
            raise UserError(
                "joining the Ray cluster at RAY_ADDRESS = "
                f"{os.environ['RAY_ADDRESS']}: {error}. Is it running, and is RAY_AUTH_TOKEN "
                "its token? Unset RAY_ADDRESS to work on this machine alone."
            ) from None
        log.info("no Ray cluster to join here (%s)", str(error).splitlines()[0].rstrip("."))
        return False
    nodes = [node for node in ray.nodes() if node["Alive"]]
    log.info(
        "joined the Ray cluster at %s: %d node(s), %s",
        ray.get_runtime_context().gcs_address,
        len(nodes),
        _resources(),
    )
    return True


def _join(scaling: Scaling) -> None:
    if not join_running():
        ray.init(
            address="local",
            num_cpus=scaling.local_cpus or os.cpu_count(),
            object_store_memory=scaling.local_object_store,
            include_dashboard=False,
            **OPTIONS,
        )
        log.info("started Ray on this machine: %s", _resources())


def _resources() -> str:
    have = ray.cluster_resources()
    return ", ".join(f"{have.get(kind, 0):g} {kind}s" for kind in ("CPU", "GPU"))


@ray.remote(num_cpus=0)
def _read_token(store_uri: str, name: str) -> str:
    try:
        return Store(store_uri).read(name).decode()
    except OSError as error:
        return f"{type(error).__name__}: {error}"


def check_storage(store: Store) -> None:
    """With more than one node, have every node read a token that the driver wrote.

    Raises:
        UserError: naming the nodes that cannot see it.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    token = uuid.uuid4().hex
    name = f"tokens/{token}/token"
    store.write(name, token.encode())
    answers = {
        f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})": _read_token.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(store.uri, name)
        for node in nodes
    }
    seen = {node: ray.get(answer) for node, answer in answers.items()}
    store.delete(f"tokens/{token}")
    blind = {node: answer for node, answer in seen.items() if answer != token}
    if blind:
        node, answer = next(iter(blind.items()))
        raise UserError(
            f"checking the storage {store.uri}: {len(blind)} of {len(nodes)} nodes do not see what "
            f"the driver wrote there, {node} first ({answer}). Set run.storage to a place that all "
            "nodes share: an object store (s3://, gs://) or a network folder mounted at the same "
            "path everywhere."
        )


def node_name() -> str:
    """The node this process runs on, as people know it."""
    return f"{os.uname().nodename}/{ray.util.get_node_ip_address()}"
