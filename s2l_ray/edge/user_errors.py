"""A UserError comes back as itself, however Ray wrapped it on its way."""

import contextlib
from collections.abc import Iterator

from s2l_ray.edge.failures import causes
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


def find_user_error(error: BaseException | None) -> UserError | None:
    """The UserError that caused an error, however Ray wrapped it."""
    for cause in causes(error):
        if type(cause) is UserError:
            # Ray Data adds words of its own.
            return UserError(str(cause).split("\nFailed to apply UDF")[0])
    return None
