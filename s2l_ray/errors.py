"""The one exception that is meant for users: it carries a whole sentence and no stack trace is needed to act on it."""


class UserError(Exception):
    """Bad input, an impossible request or a broken artifact: says what was being done, what was expected, what came, what to do.

    It is never retried, and it crosses process borders (one string argument, so pickle rebuilds it).
    """
