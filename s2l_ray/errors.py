"""Exceptions for users: a whole sentence, on which they can act without a stack trace."""

import re

# `KEY:SECRET@` of a URI, in any text. A secret may hold a slash that should have been quoted; a
# port before a path with an @ is no secret.
USER_AND_SECRET = re.compile(r"(?<=://)[^\s/@:\"'<>]*:(?!\d+/)[^\s\"'<>]*@")
SECRET_OPTION = re.compile(
    r"([?&;][^=&\s\"'<>]*(?:secret|token|password|signature|access_key)[^=&\s\"'<>]*=)"
    r"[^&\s\"'<>]+",
    re.IGNORECASE,
)


def without_credentials(text: str) -> str:
    """A text for people or for records: credentials of the URIs in it are left out."""
    return SECRET_OPTION.sub(r"\1***", USER_AND_SECRET.sub("", text))


class UserError(Exception):
    """Bad input, an impossible request or a broken artifact.

    It says what was being done, what was expected, what came, and what to do. It is never retried.
    It crosses process borders: it has one string argument, so pickle rebuilds it. Credentials are
    left out of it.
    """

    def __init__(self, text: str) -> None:
        super().__init__(without_credentials(text))


class UsageError(UserError):
    """The command line itself is wrong: an unknown stage, or an argument that is no override."""
