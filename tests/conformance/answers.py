"""Math-Verify's own table of cases against our use of it, and against our rule `numeric`.

    python tests/conformance/answers.py CHECKOUT

CHECKOUT is a checkout of huggingface/Math-Verify, whose test modules are loaded. Each case of
(gold, pred, expected) goes through the process that evaluation asks, off the main thread, and
through `numeric`. Counted are cases that both judge alike, and for those that differ whether a
right answer was refused or a wrong one accepted. `numeric` knows no algebra: it refuses much of
what it cannot compare. Exit status 1 where Math-Verify in our process differs from the table in
more than MOST_DIFFERENT of a hundred cases.
"""

import importlib
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from s2l_ray.core.answers import numeric
from s2l_ray.core.answers.verified import Verifier

MODULES = ("test_all", "test_boxed", "test_numina_cases", "test_open_thoughts")
MOST_DIFFERENT = 5


def cases(checkout: Path) -> Iterator[tuple[str, str, bool]]:
    """The parametrised cases of the checkout's tests, but those with settings of their own."""
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    sys.path.insert(0, str(checkout))
    for module in MODULES:
        for test in vars(importlib.import_module(f"tests.{module}")).values():
            for mark in getattr(test, "pytestmark", ()):
                names, rows = mark.args[:2]
                if [name.strip() for name in names.split(",")] == ["gold", "pred", "expected"]:
                    yield from ((gold, pred, bool(right)) for gold, pred, right in rows)


def count(table: list[tuple[str, str, bool]], judge: Callable[[str, str], bool]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for gold, pred, right in table:
        found = judge(pred, gold)
        word = "alike" if found == right else "refused" if right else "accepted"
        counts[word] += 1
        if found != right and judge is not numeric.correct:
            print(f"{word}: {gold!r} against {pred!r}")
    return counts


def main(arguments: list[str]) -> int:
    (checkout,) = arguments
    table = list(cases(Path(checkout)))
    found: dict[str, Counter[str]] = {"numeric": count(table, numeric.correct)}
    with Verifier(seconds=60) as verifier:
        thread = threading.Thread(
            target=lambda: found.update(math_verify=count(table, verifier.correct))
        )
        thread.start()
        thread.join()
    for name, counts in found.items():
        print(
            f"{name}: {len(table)} cases, {counts['alike']} alike, {counts['refused']} right "
            f"answers refused, {counts['accepted']} wrong ones accepted"
        )
    different = len(table) - found["math_verify"]["alike"]
    return int(not table or 100 * different > MOST_DIFFERENT * len(table))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
