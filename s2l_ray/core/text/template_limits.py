"""Chat templates run within bounds: they are programs of others, on rows of others.

Jinja's sandbox keeps a template from the system, not from loops without end or strings of
gigabytes. Here every turn of a loop or macro and every piece of text is counted while one
conversation is rendered. The count depends on the template and the conversation only, never on the
machine, so that the same rows are refused everywhere.
"""

import contextlib
import contextvars
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

from s2l_ray.errors import UserError

# Of one conversation: a turn of a loop costs one, a call of a macro ten, and so many
# characters or items one.
MOST_COST = 500_000
SIZE_OF_ONE = 256
LONGEST_TEXT = 1 << 26
# A number that makes long texts of short ones: a width, a count.
LARGEST_NUMBER = 1_000_000
# Of a printf format or of str.format: seven digits, or a width that a value gives.
WIDE = re.compile(r"\d{7}|%[-+ #0]*\*|\{[^}]*\{")
REMEDY = "Correct the template, or name another as `template`."

_spent: contextvars.ContextVar[list[int] | None] = contextvars.ContextVar("spent", default=None)


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Count what is rendered in this block; transformers' templates count as of the first block."""
    _install()
    token = _spent.set([0])
    try:
        yield
    finally:
        _spent.reset(token)


def _charge(cost: int) -> None:
    spent = _spent.get()
    if spent is None:
        return
    spent[0] += cost
    if spent[0] > MOST_COST:
        raise UserError(
            "rendering a conversation by the chat template: it takes more than "
            f"{MOST_COST:,} turns of loops, or as much text. {REMEDY}"
        )


def _charge_size(value: Any) -> Any:
    if isinstance(value, str | bytes | list | tuple | dict):
        _check_size(len(value))
        _charge(len(value) // SIZE_OF_ONE)
    return value


def _check_size(size: int) -> None:
    if size > LONGEST_TEXT:
        raise UserError(
            "rendering a conversation by the chat template: it makes a text or list of more than "
            f"{LONGEST_TEXT:,} characters or items. {REMEDY}"
        )


def _check_numbers(values: Sequence[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
            raise UserError(
                f"rendering a conversation by the chat template: it calls a function with {value:,}"
                f", and at most {LARGEST_NUMBER:,} was expected. {REMEDY}"
            )


def _check_format(text: Any) -> None:
    """Refuse a format with a width of millions, or one that is given with the values."""
    if isinstance(text, str) and WIDE.search(text):
        raise UserError(
            "rendering a conversation by the chat template: it formats text with a width that can "
            f"be of any length. {REMEDY}"
        )


def _check_operands(operator: str, left: Any, right: Any) -> None:
    """Refuse what a * b, a ** b or a % b would make before it is made."""
    if operator == "%":
        _check_format(left)
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _check_numbers([right * max(1, abs(left))])
    elif operator == "*":
        for one, other in ((left, right), (right, left)):
            if isinstance(one, str | bytes | list | tuple) and isinstance(other, int):
                _check_size(len(one) * max(0, other))


def _install() -> None:
    """Have transformers compile templates in an environment that counts."""
    from transformers.utils import chat_template_utils

    if not hasattr(chat_template_utils.ImmutableSandboxedEnvironment, "turn_of_loop"):
        chat_template_utils.ImmutableSandboxedEnvironment = _environment()  # type: ignore[misc]
        chat_template_utils._compile_jinja_template.cache_clear()


def _environment() -> Any:
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Counting(ImmutableSandboxedEnvironment):
        """A sandbox that charges what templates do."""

        intercepted_binops = frozenset({"+", "*", "**", "%"})

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.finalize = _charge_size
            for name in ("center", "indent", "format", "round", "truncate", "wordwrap", "batch"):
                self.filters[name] = _with_checked_numbers(self.filters[name])

        def turn_of_loop(self, cost: int) -> None:
            _charge(cost)

        def joined(self, *pieces: Any) -> str:
            texts = [str(piece) for piece in pieces]
            _check_size(sum(map(len, texts)))
            text: str = _charge_size("".join(texts))
            return text

        def wrap_str_format(self, value: Any) -> Any:
            wrapped = super().wrap_str_format(value)
            if wrapped is not None:
                _check_format(value.__self__)
            return wrapped

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operands(operator, left, right)
            return _charge_size(super().call_binop(context, operator, left, right))

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
            if getattr(__obj, "__self__", None) is __self:
                # One of the above.
                return __obj(*args)
            if isinstance(getattr(__obj, "__self__", None), str | bytes):
                _check_numbers([*args, *kwargs.values()])
            return _charge_size(super().call(__context, __obj, *args, **kwargs))

        def _parse(self, source: str, name: Any, filename: Any) -> Any:
            return _counted(super()._parse(source, name, filename), nodes)

    return Counting


def _with_checked_numbers(function: Any) -> Any:
    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if function.__name__ == "do_format":
            _check_format(args[0])
        _check_numbers([*args, *kwargs.values()])
        return _charge_size(function(*args, **kwargs))

    return checked


def _counted(template: Any, nodes: Any) -> Any:
    """A template's tree in which loops and macros count their turns, and `~` its length."""
    for found in template.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
        texts = [text for part in found.body for text in part.find_all(nodes.TemplateData)]
        cost = 1 if isinstance(found, nodes.For) else 10
        cost += sum(len(text.data) for text in texts) // SIZE_OF_ONE
        count = nodes.Call(
            nodes.EnvironmentAttribute("turn_of_loop"), [nodes.Const(cost)], [], None, None
        )
        found.body.insert(0, nodes.ExprStmt(count).set_lineno(found.lineno))
    for parent in [template, *template.find_all(nodes.Node)]:
        for name, value in list(parent.iter_fields()):
            if isinstance(value, nodes.Concat):
                setattr(parent, name, _joined(value, nodes))
            elif isinstance(value, list):
                value[:] = [_joined(v, nodes) if isinstance(v, nodes.Concat) else v for v in value]
    return template.set_environment(template.environment)


def _joined(concat: Any, nodes: Any) -> Any:
    call = nodes.Call(nodes.EnvironmentAttribute("joined"), concat.nodes, [], None, None)
    return call.set_lineno(concat.lineno)
