"""The value of arithmetic in text, of what `eval` would take nothing else: no code of others is
run."""

import ast
import math
import operator
import warnings
from collections.abc import Callable, Mapping
from typing import Any

LONGEST = 400
# of a whole number
MOST_BITS = 20_000


def _power(base: Any, exponent: Any) -> Any:
    whole = isinstance(base, int) and isinstance(exponent, int)
    if whole and base.bit_length() * abs(exponent) > MOST_BITS:
        raise OverflowError("too large a power")
    return base**exponent


def _shift(value: int, by: int) -> int:
    if by > MOST_BITS:
        raise OverflowError("too large a shift")
    return value << by


_BINARY: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
    ast.BitXor: operator.xor,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.LShift: _shift,
    ast.RShift: operator.rshift,
}
_UNARY: Mapping[type, Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Invert: operator.invert,
    ast.Not: operator.not_,
}
_COMPARED: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
NUMBER = int | float | complex


def value_of(text: str, names: Mapping[str, Any] | None = None) -> Any:
    """What Python makes of an expression of numbers, tuples and lists; None where it is none.

    Args:
        names: numbers by name, and functions of one number, that the text may use.
    """
    if len(text) > LONGEST:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text.lstrip(" \t"), mode="eval")
        return _value(tree.body, names or {})
    except (ValueError, TypeError, ArithmeticError, SyntaxError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, NUMBER):
        return node.value
    if isinstance(node, ast.Name) and isinstance(names.get(node.id), NUMBER):
        return names[node.id]
    if isinstance(node, ast.UnaryOp):
        return _UNARY[type(node.op)](_number(node.operand, names))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)](_number(node.left, names), _number(node.right, names))
    if isinstance(node, ast.Compare) and all(type(op) in _COMPARED for op in node.ops):
        sides = [_number(side, names) for side in (node.left, *node.comparators)]
        compared = zip(node.ops, sides, sides[1:], strict=False)
        return all(_COMPARED[type(op)](left, right) for op, left, right in compared)
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(element, names) for element in node.elts]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 1:
        function = names.get(node.func.id)
        if callable(function) and not node.keywords:
            return function(_number(node.args[0], names))
    raise ValueError("not arithmetic")


def _number(node: ast.expr, names: Mapping[str, Any]) -> Any:
    found = _value(node, names)
    if not isinstance(found, NUMBER):
        raise ValueError("not a number")
    return found


def finite(value: Any) -> float | None:
    """A real and finite number as a float; None for anything else."""
    try:
        found = float(value)
    except (ValueError, TypeError, OverflowError):
        return None
    return found if math.isfinite(found) else None
