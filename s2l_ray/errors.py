"""Exceptions for users: a whole sentence, on which they can act without a stack trace."""


class UserError(Exception):
    """Bad input, an impossible request or a broken artifact.

    It says what was being done, what was expected, what came, and what to do. It is never retried.
    It crosses process borders: it has one string argument, so pickle rebuilds it.
    """


class UsageError(UserError):
    """The command line itself is wrong: an unknown stage, or an argument that is no override."""
