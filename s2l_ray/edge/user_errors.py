"""A UserError comes back as itself, however Ray wrapped it on its way."""

import contextlib
from collections.abc import Iterator

from s2l_ray.errors import UserError


@contextlib.contextmanager
def reraise_user_errors() -> Iterator[None]:
    """Turn whatever Ray wrapped around a UserError back into that UserError."""
    try:
        yield
    except Exception as error:
        found = find_user_error(error)
        if found is not None:
            raise found from None
        raise


def find_user_error(error: BaseException | None, depth: int = 0) -> UserError | None:
    """The UserError that caused an error, however Ray wrapped it."""
    if error is None or depth > 8:
        return None
    if type(error) is UserError:
        return UserError(
            str(error).split("\nFailed to apply UDF")[0]
        )  # Ray Data adds words of its own
    failures = getattr(error, "worker_failures", None)
    nested = list(failures.values()) if isinstance(failures, dict) else []
    for cause in (
        *nested,
        getattr(error, "cause", None),
        getattr(error, "_cause", None),
        error.__cause__,
        error.__context__,
    ):
        if isinstance(cause, BaseException) and cause is not error:
            found = find_user_error(cause, depth + 1)
            if found is not None:
                return found
    return None
