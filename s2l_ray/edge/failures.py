"""What is said of a failure that is not the user's: of the disk, the network, a host, or of us.

Each kind is named, with what helps. Ray is not imported: its exceptions are known by their names.
"""

import errno
import os
import re
import tempfile
import traceback
from collections.abc import Iterator

from s2l_ray.errors import UserError

AGAIN = "Then run the same command again: what is finished is kept."
FULL = {errno.ENOSPC, errno.EDQUOT}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
OF_THE_NETWORK = {
    errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.ECONNREFUSED, errno.ECONNRESET,
    errno.ECONNABORTED, errno.EPIPE, errno.EHOSTUNREACH, errno.ENETUNREACH,
}  # fmt: skip
# In the words of S3, Google Cloud Storage and HDFS.
REFUSED = re.compile(
    r"ACCESS_DENIED|ExpiredToken|InvalidAccessKeyId|InvalidClientTokenId|SignatureDoesNotMatch|"
    r"INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|HTTP response code: 40[013]|"
    r"UNAUTHENTICATED|PERMISSION_DENIED|AccessControlException",
    re.IGNORECASE,
)
REMOTE = re.compile(r"AWS Error|google::cloud|curl|HDFS|Couldn't resolve host", re.IGNORECASE)
# Of Ray's exceptions, by name: what happened, and what helps.
OF_RAY = {
    "OutOfMemoryError": "a process was ended because its host ran out of memory. Lower the batch, "
    "the workers on one host (scaling), or use hosts with more.",
    "ObjectStoreFullError": "Ray's shared memory is full. Raise scaling.local_object_store.",
    "OutOfDiskError": "the disk with Ray's temporary files is full. Free some space there.",
    "NodeDiedError": "a host was lost, and nothing was left to go on with.",
    "OwnerDiedError": "a host was lost, and nothing was left to go on with.",
    "ObjectLostError": "a host was lost, and nothing was left to go on with.",
    "WorkerCrashedError": "a process died without a word, which the system's log may explain "
    "(memory, a driver of a device).",
    "ActorDiedError": "processes died more often than scaling.max_failures allows.",
    "ActorUnavailableError": "a process could not be reached any more.",
    "RaySystemError": "Ray itself failed. Its logs are in /tmp/ray/session_latest/logs.",
    "RpcError": "the Ray cluster could not be reached any more.",
    "WorkerGroupStartupTimeoutError": "training workers did not start in time.",
    "WorkerHealthCheckTimeoutError": "a training worker did not answer any more.",
}


def causes(error: BaseException | None, depth: int = 0) -> Iterator[BaseException]:
    """An error and all that caused it, however Ray wrapped them."""
    if error is None or depth > 8:
        return
    yield error
    failures = getattr(error, "worker_failures", None)
    nested = list(failures.values()) if isinstance(failures, dict) else []
    names = ("cause", "_cause", "_base_exc", "controller_failure", "__cause__", "__context__")
    for cause in (*nested, *(getattr(error, name, None) for name in names)):
        if isinstance(cause, BaseException) and cause is not error:
            yield from causes(cause, depth + 1)


def of_system(error: OSError) -> str | None:
    """What is said of an error of the disk, the network or a permission; None: it is none."""
    number, text = error.errno, _first_line(error)
    if number in FULL:
        return f"no space is left: {text}. Free some, or use another place (run.storage). {AGAIN}"
    if number in FORBIDDEN:
        home = os.path.expanduser("~")
        if str(error.filename or "").startswith(f"{home}/"):
            return (
                f"the home folder {home} may not be used: {text}. Set HOME to a folder that may be "
                f"written, or HF_HOME for what comes from the Hub. {AGAIN}"
            )
        return f"a file may not be used: {text}. Give this user access to it. {AGAIN}"
    if number in (errno.EMFILE, errno.ENFILE):
        return f"too many files are open: {text}. Raise the limit (ulimit -n). {AGAIN}"
    if REFUSED.search(str(error)):
        return (
            f"the storage refuses access: {text}. Renew the credentials (see Credentials in "
            f"the README). {AGAIN}"
        )
    if number in OF_THE_NETWORK or isinstance(error, ConnectionError) or REMOTE.search(str(error)):
        return f"the disk or the storage did not answer as it should: {text}. See to it. {AGAIN}"
    if number is not None:
        return f"the system refused: {text}. {AGAIN}"
    return None


def lasting(error: BaseException) -> UserError | None:
    """The error that another attempt would meet again: a full disk, or no access; else None."""
    for cause in causes(error):
        if isinstance(cause, OSError) and (
            cause.errno in FULL | FORBIDDEN or REFUSED.search(str(cause))
        ):
            return UserError(of_system(cause) or str(cause))
    return None


def described(error: BaseException) -> str:
    """One line on a failure, whatever it is, for people."""
    found = list(causes(error))
    for cause in found:
        if type(cause) is UserError:
            return str(cause)
    for cause in found:
        known = of_system(cause) if isinstance(cause, OSError) else None
        if known is not None:
            return known
    for cause in reversed(found):
        if isinstance(cause, MemoryError):
            return f"this process ran out of memory. Use a host that has more. {AGAIN}"
        for kind in type(cause).__mro__:
            if kind.__name__ in OF_RAY:
                return f"{OF_RAY[kind.__name__]} {AGAIN}"
    return _of_ours(found[-1], error)


def _of_ours(cause: BaseException, error: BaseException) -> str:
    """Of an error that nobody thought of; its traceback goes into a file."""
    with tempfile.NamedTemporaryFile(
        "w", prefix="s2l_ray-", suffix=".txt", delete=False, encoding="utf-8", errors="replace"
    ) as file:
        file.writelines(traceback.format_exception(error))
    return (
        f"{type(cause).__name__}: {_first_line(cause)}. This is a fault of s2l_ray and not yours: "
        f"please report it with {file.name}, which says where. {AGAIN}"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:500]
