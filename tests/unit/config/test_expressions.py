"""The small language of scores: what it computes, and what it lets nobody do."""

import sys

import numpy as np
import pytest

from s2l_ray.config.expressions import COLUMNS, PER_ROW, Columns, ExpressionError, parse

ROWS, STEPS = 7, 4
numbers = np.random.default_rng(0)
DATA = {name: numbers.uniform(0.1, 3, (ROWS, 1 if name in PER_ROW else STEPS)) for name in COLUMNS}
loss, el2n, distance = DATA["loss"], DATA["el2n"], DATA["distance"][:, 0]


def score(text: str, at: int = 1, num_steps: int = STEPS) -> np.ndarray:
    arrays = {name: values[:, :num_steps] for name, values in DATA.items()}
    return parse(text)(Columns(arrays, ROWS, num_steps, at))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("num_tokens", DATA["num_tokens"][:, 0]),
        ("-distance", -distance),
        ("+distance", distance),
        ("at(loss)", loss[:, 1]),
        ("first(loss) - last(loss)", loss[:, 0] - loss[:, 3]),
        ("loss[2]", loss[:, 2]),
        ("loss[-1] / loss[0]", loss[:, -1] / loss[:, 0]),
        ("after(loss)[0]", loss[:, 1]),
        ("mean(after(loss))", loss[:, 1:].mean(axis=1)),
        ("std(loss)", loss.std(axis=1)),
        ("sum(abs(diff(after(loss))))", np.abs(loss[:, 2:] - loss[:, 1:-1]).sum(axis=1)),
        ("max(loss) - min(loss)", np.ptp(loss, axis=1)),
        ("mean(loss - first(loss))", (loss - loss[:, :1]).mean(axis=1)),
        ("mean(loss * distance)", (loss * distance[:, None]).mean(axis=1)),
        ("exp(log(at(el2n)))", el2n[:, 1]),
        ("sqrt(at(loss)) ** 2", loss[:, 1]),
        ("where(at(loss) < 1, 10, -at(loss))", np.where(loss[:, 1] < 1, 10, -loss[:, 1])),
        ("sum(loss >= 1)", (loss >= 1).sum(axis=1)),
        ("(at(loss) > 1) - (distance != distance)", (loss[:, 1] > 1).astype(float)),
        ("2 ** -1 + 0 * distance", np.full(ROWS, 0.5)),
        ("1", np.ones(ROWS)),
        (" hash ", np.zeros(ROWS)),
        ("last(at(loss))", loss[:, 1]),
    ],
)
def test_an_expression_is_what_numpy_says(text: str, expected: np.ndarray) -> None:
    made = score(text)
    assert made.shape == (ROWS,)
    assert made.dtype == np.float64
    np.testing.assert_allclose(made, expected, rtol=1e-12)


def test_an_expression_tells_what_it_reads() -> None:
    assert parse("at(loss) * first(el2n) - distance").names == {"loss", "el2n", "distance"}
    assert parse("at(loss)").uses_at
    assert not parse("last(loss)").uses_at
    assert parse("hash").names == frozenset()


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "loss.tofile('x')",
        "loss.__class__",
        "(lambda: 1)()",
        "[x for x in loss]",
        "{1: 2}",
        "[1, 2]",
        "loss[0:2]",
        "loss[loss]",
        "loss[True]",
        "loss[1.0]",
        "'text'",
        "f'{loss}'",
        "None",
        "True",
        "1j",
        "loss @ loss",
        "loss // 2",
        "loss % 2",
        "1 << 99999",
        "~loss",
        "not loss",
        "last(loss) and 1",
        "1 if last(loss) else 2",
        "0 < last(loss) < 1",
        "last(loss) is 1",
        "1 in loss",
        "(x := 1)",
        "last(*loss)",
        "last(x=loss)",
        "last()",
        "where(1, 2)",
        "at",
        "mean",
        "eval('1')",
        "exp(exp)",
        "await loss",
        "loss; loss",
        "",
        "   ",
        "loss\x00",
        "(" * 400,
        "-" * 499 + "1",
        "9" * 499,
        "1 " * 400,
    ],
)
def test_nothing_else_is_let_in(text: str) -> None:
    with pytest.raises(ExpressionError):
        score(text)


def test_an_expression_longer_than_any_rule_is_not_even_parsed() -> None:
    with pytest.raises(ExpressionError, match="at most 500 characters"):
        parse("1+" * 100_000 + "1")


def test_huge_powers_are_floats_and_take_no_time() -> None:
    assert np.isposinf(score("9**9**9**9")).all()
    assert np.isposinf(score("distance * 1e308 * 1e308")).all()


def test_nothing_outside_the_columns_can_be_reached_by_name() -> None:
    for name in ("np", "columns", "__builtins__", "sys", *dir(sys.modules["builtins"])):
        if name in COLUMNS or not name.isidentifier():
            continue
        with pytest.raises(ExpressionError):
            parse(f"{name} + 1")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("num_tokenz", "no column 'num_tokenz'. Did you mean num_tokens?"),
        ("maen(loss)", "no function 'maen'. Did you mean mean?"),
        ("hash + 1", "hash stands alone"),
        ("-loss", "a value for every step; a score has one a row"),
        ("at(distance)", "a value for every stored step"),
        ("at(after(loss))", "a value for every stored step"),
        ("mean(loss + diff(loss))", "could not be broadcast"),
        ("num_tokens[3]", "of 1 values"),
        ("loss.mean()", "no function 'loss.mean'"),
        ("min(loss, 1)", r"min\(\) takes 1 value"),
        ("1 +", "no expression"),
    ],
)
def test_a_wrong_expression_is_told_in_words(text: str, words: str) -> None:
    with pytest.raises(ExpressionError, match=words):
        parse(text)


def test_steps_that_the_data_lack_are_told_with_their_number() -> None:
    with pytest.raises(ExpressionError, match="on 4 stored steps"):
        score("loss[9]")
    with pytest.raises(ExpressionError, match="on 2 stored steps"):
        score("max(diff(after(loss)))", num_steps=2)


def test_what_has_no_value_is_nan_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    assert np.isnan(score("log(-distance)")).all()
    assert np.isposinf(score("1 / (distance - distance)")).all()
    assert not recwarn.list
