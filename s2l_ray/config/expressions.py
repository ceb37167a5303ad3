"""Scores as text: a small language over the stored columns, computed by numpy.

Python's own parser reads it. Only arithmetic, comparisons, `x[number]` and calls of the functions
below are let in, so a rule in a job file can compute a score and nothing else. A column with one
value a row is [n, 1]; one with a value a step is [n, T], step 0 included. So the two broadcast.
A whole score has to come out as [n, 1].
"""

import ast
import difflib
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

HASH = "hash"
# characters; more is no rule, and deep nesting costs the parser its stack
MAX_LENGTH = 500
STATISTICS = ("mean_probability", "min_probability", "el2n", "grand", "answer_loss")
# what may stand in a score -> the stored column that it reads
COLUMNS = {
    "num_tokens": "num_tokens",
    "distance": "distance",
    "loss": "losses",
    **{s: s for s in STATISTICS},
}
PER_ROW = ("num_tokens", "distance")


class ExpressionError(ValueError):
    """Why a text is no score; the words stand after the name of the field it came from."""


@dataclass(frozen=True)
class Columns:
    """What an expression is computed on: n rows, columns by name, and the step that `at` chooses.

    `arrays` are float64, [n, 1] or [n, T].
    """

    arrays: Mapping[str, np.ndarray]
    num_rows: int
    num_steps: int
    at: int


_Compute = Callable[[Columns], np.ndarray]


@dataclass(frozen=True)
class Expression:
    """A score that was read: the columns it names and how it is computed.

    It also says whether the score looks at one chosen step.
    """

    text: str
    names: frozenset[str]
    uses_at: bool
    compute: _Compute

    def __call__(self, columns: Columns) -> np.ndarray:
        """The score of every row, float64 [n].

        Division by zero and the like give infinities and NaN, as numpy does.

        Raises:
            ExpressionError: a step that is not there, or a result with several values a row.
        """
        try:
            with np.errstate(all="ignore"):
                score = self.compute(columns)
        except ExpressionError:
            raise
        except (ValueError, IndexError) as error:
            # Shapes that do not fit each other, or a step that is not there.
            raise ExpressionError(
                f"{self.text!r} cannot be computed on {columns.num_steps} stored steps "
                f"(step 0 is one): {error}"
            ) from None
        if score.shape[1] != 1:
            raise ExpressionError(
                f"{self.text!r} has a value for every step; a score has one a row. Say which one "
                "or what of them, with at(), first(), last(), mean(), std(), sum(), min() or max()"
            )
        return np.broadcast_to(score[:, 0], columns.num_rows)


@functools.lru_cache(maxsize=256)
def parse(text: str) -> Expression:
    """Read a score and try it on made-up columns.

    Raises:
        ExpressionError: anything but arithmetic over known names, or more than one value a row.
    """
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"expected at most {MAX_LENGTH} characters, got {len(text)}")
    try:
        tree = ast.parse(text.strip(), mode="eval")
        alone = isinstance(tree.body, ast.Name) and tree.body.id == HASH
        compute = _constant(ast.Constant(0)) if alone else _compile(tree.body)
    except ExpressionError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ExpressionError(f"{text!r} is no expression ({_first_line(error)})") from None
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    names = frozenset(node.id for node in used if id(node) not in called and node.id != HASH)
    made = Expression(
        text, names, any(node.id == "at" for node in used if id(node) in called), compute
    )
    # Many steps, so that x[number] finds its step; whether the data have it is for later.
    try_on(made, 2 * MAX_LENGTH)
    return made


def try_on(expression: Expression, num_steps: int) -> None:
    """Compute a score on made-up columns of so many stored steps, step 0 included.

    Raises:
        ExpressionError: it cannot be computed on them.
    """
    trial = {name: np.ones((2, 1 if name in PER_ROW else num_steps)) for name in COLUMNS}
    expression(Columns(trial, num_rows=2, num_steps=num_steps, at=num_steps - 1))


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


# ------------------------------------------------------------------------------ from text to numpy


def _compile(node: ast.expr) -> _Compute:
    for kind, compile_kind in _KINDS.items():
        if isinstance(node, kind):
            return compile_kind(node)
    raise ExpressionError(
        f"{ast.unparse(node)!r} is not allowed in a score: numbers, columns, + - * / **, "
        f"comparisons, x[number] and the functions {', '.join(_FUNCTIONS)} are"
    )


def _constant(node: ast.Constant) -> _Compute:
    if type(node.value) not in (int, float):
        raise ExpressionError(f"{ast.unparse(node)!r}: the only constants in a score are numbers")
    try:
        # never Python's own integers, whose powers know no bound
        value = np.full((1, 1), node.value, np.float64)
    except OverflowError:
        raise ExpressionError("a number is too large for a score") from None
    return lambda columns: value


def _name(node: ast.Name) -> _Compute:
    name = node.id
    if name == HASH:
        raise ExpressionError("hash stands alone or not at all: it breaks every tie anyway")
    if name not in COLUMNS:
        raise ExpressionError(unknown("column", name, [HASH, *COLUMNS]))
    return lambda columns: columns.arrays[name]


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Words for a name that is not there, with the nearest one that is."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"there is no {what} {name!r}.{hint} Known: {', '.join(known)}"


def _operation(node: ast.BinOp) -> _Compute:
    operate = _OPERATIONS.get(type(node.op))
    if operate is None:
        raise ExpressionError(f"{ast.unparse(node)!r}: a score knows only + - * / and **")
    left, right = _compile(node.left), _compile(node.right)
    return lambda columns: operate(left(columns), right(columns))


def _sign(node: ast.UnaryOp) -> _Compute:
    value = _compile(node.operand)
    if isinstance(node.op, ast.USub):
        return lambda columns: -value(columns)
    if isinstance(node.op, ast.UAdd):
        return value
    raise ExpressionError(f"{ast.unparse(node)!r}: the only signs in a score are + and -")


def _comparison(node: ast.Compare) -> _Compute:
    compare = _COMPARISONS.get(type(node.ops[0]))
    if compare is None or len(node.ops) > 1:
        raise ExpressionError(
            f"{ast.unparse(node)!r}: a score compares two values, by < <= > >= == or !="
        )
    left, right = _compile(node.left), _compile(node.comparators[0])
    return lambda columns: compare(left(columns), right(columns)).astype(np.float64)


def _column_of(node: ast.Subscript) -> _Compute:
    matrix = _compile(node.value)
    try:
        number = ast.literal_eval(node.slice)
    except (ValueError, TypeError):
        number = None
    if type(number) is not int:
        raise ExpressionError(
            f"{ast.unparse(node)!r}: between the brackets stands a number, such as x[0] or x[-1]"
        )

    def column(columns: Columns) -> np.ndarray:
        values = matrix(columns)
        if not -values.shape[1] <= number < values.shape[1]:
            raise IndexError(f"{ast.unparse(node)!r} of {values.shape[1]} values")
        return values[:, [number]]

    return column


def _call(node: ast.Call) -> _Compute:
    if not isinstance(node.func, ast.Name) or node.func.id not in _FUNCTIONS:
        called = ast.unparse(node.func)
        raise ExpressionError(unknown("function", called, _FUNCTIONS))
    name = node.func.id
    function, wanted = _FUNCTIONS[name]
    if (
        node.keywords
        or len(node.args) != wanted
        or any(isinstance(arg, ast.Starred) for arg in node.args)
    ):
        raise ExpressionError(f"{ast.unparse(node)!r}: {name}() takes {wanted} value(s)")
    arguments = [_compile(argument) for argument in node.args]
    return lambda columns: function(columns, *(argument(columns) for argument in arguments))


_KINDS: dict[type[ast.expr], Callable[[Any], _Compute]] = {
    ast.Constant: _constant,
    ast.Name: _name,
    ast.BinOp: _operation,
    ast.UnaryOp: _sign,
    ast.Compare: _comparison,
    ast.Subscript: _column_of,
    ast.Call: _call,
}
_OPERATIONS: dict[type[ast.operator], Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    ast.Add: np.add,
    ast.Sub: np.subtract,
    ast.Mult: np.multiply,
    ast.Div: np.divide,
    ast.Pow: np.power,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    ast.Lt: np.less,
    ast.LtE: np.less_equal,
    ast.Gt: np.greater,
    ast.GtE: np.greater_equal,
    ast.Eq: np.equal,
    ast.NotEq: np.not_equal,
}


def _at(columns: Columns, values: np.ndarray) -> np.ndarray:
    if values.shape[1] != columns.num_steps:
        raise ExpressionError(
            "at() takes a column with a value for every stored step, such as loss"
        )
    return values[:, [columns.at]]


def _over_steps(reduce: Callable[..., Any]) -> Callable[[Columns, np.ndarray], np.ndarray]:
    return lambda columns, values: reduce(values, axis=1, keepdims=True)


def _each(
    function: Callable[[np.ndarray], np.ndarray],
) -> Callable[[Columns, np.ndarray], np.ndarray]:
    return lambda columns, values: function(values)


def _where(columns: Columns, condition: np.ndarray, yes: np.ndarray, no: np.ndarray) -> np.ndarray:
    chosen: np.ndarray = np.where(condition != 0, yes, no)
    return chosen


# name -> (what it does, number of values it takes). std divides by the number of the values.
_FUNCTIONS: dict[str, tuple[Callable[..., np.ndarray], int]] = {
    "at": (_at, 1),
    "first": (lambda columns, values: values[:, :1], 1),
    "last": (lambda columns, values: values[:, -1:], 1),
    "after": (lambda columns, values: values[:, 1:], 1),
    "mean": (_over_steps(np.mean), 1),
    "std": (_over_steps(np.std), 1),
    "sum": (_over_steps(np.sum), 1),
    "min": (_over_steps(np.min), 1),
    "max": (_over_steps(np.max), 1),
    "diff": (lambda columns, values: np.diff(values, axis=1), 1),
    "abs": (_each(np.abs), 1),
    "exp": (_each(np.exp), 1),
    "log": (_each(np.log), 1),
    "sqrt": (_each(np.sqrt), 1),
    "where": (_where, 3),
}
