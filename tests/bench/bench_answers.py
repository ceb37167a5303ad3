"""The gold answers of the six sets of the paper against themselves by every rule; speeds.

    python tests/bench/bench_answers.py DATA

DATA is a folder with gsm8k.jsonl, math.jsonl, numglue.jsonl, svamp.jsonl, mathematics.jsonl and
simuleq.jsonl, whose rows have the field `answer`. A rule that refuses "The answer is " with the
gold answer behind it can give no model more than the share that is left.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from s2l_ray.core.answers import numeric, published
from s2l_ray.core.answers.verified import Verifier


def share(golds: list[str], right: Callable[[str, str], bool]) -> tuple[float, float]:
    """Percent of gold answers that a rule accepts of themselves, and rows a second."""
    started = time.perf_counter()
    hits = sum(right(f"The answer is {gold}.", gold) for gold in golds)
    return 100 * hits / len(golds), len(golds) / (time.perf_counter() - started)


def main(arguments: list[str]) -> None:
    (folder,) = map(Path, arguments)
    print("| set | rows | published | numeric | math_verify | rows/s | | |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    with Verifier() as verifier:
        verifier.correct("1", "1")
        for name in published.SETS:
            lines = (folder / f"{name}.jsonl").read_text().splitlines()
            golds = [json.loads(line)["answer"] for line in lines]
            rules: list[Callable[[str, str], bool]] = [
                lambda text, gold, name=name: published.correct(name, text, gold),  # type: ignore[misc]
                numeric.correct,
                verifier.correct,
            ]
            found = [share(golds, rule) for rule in rules]
            shares = " | ".join(f"{percent:.2f}" for percent, _ in found)
            speeds = " | ".join(f"{speed:,.0f}" for _, speed in found)
            print(f"| {name} | {len(golds):,} | {shares} | {speeds} |", flush=True)
        print(f"pairs that took too long: {verifier.stopped}")


if __name__ == "__main__":
    main(sys.argv[1:])
