"""One process that asks Math-Verify about pairs of answers: run as a script, it needs no s2l_ray.

A line with a gold answer and a text comes in as JSON; a line `1` or `0` goes out. Math-Verify
bounds its time by a signal, which works in a main thread alone and silently answers False elsewhere
(huggingface/Math-Verify issues 11, 50, 55). Here it has no limit of its own: whoever asks ends the
process.
"""

import json
import resource
import sys

MOST_MEMORY = 4 << 30
LETTERS = ("A", "B", "C", "D", "E")


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    import logging

    from math_verify import (
        ExprExtractionConfig,
        LatexExtractionConfig,
        StringExtractionConfig,
        parse,
        verify,
    )

    logging.disable(logging.CRITICAL)
    sys.set_int_max_str_digits(0)
    mathematics = [LatexExtractionConfig(), ExprExtractionConfig()]

    def bare(text: str) -> bool:
        return not any(mark in text for mark in ("$", "\\boxed", "\\(", "\\["))

    def right(gold: str, text: str, told: str | None) -> bool:
        if gold in LETTERS:
            configs: list = [StringExtractionConfig(strings=LETTERS)]
        elif gold.isalpha() and len(gold) > 1:
            configs = [StringExtractionConfig(strings=(gold,))]
        else:
            configs = mathematics

        def parsed(own: str) -> list:
            return parse(own, extraction_config=configs, parsing_timeout=None)

        wanted = parsed(f"${gold}$" if configs is mathematics and bare(gold) else gold)
        texts = [text] if told is None or configs is not mathematics else [text, f"${told}$"]
        return any(verify(wanted, parsed(own), timeout_seconds=None) for own in texts)

    say("ready")
    for line in sys.stdin:
        try:
            answer = right(*json.loads(line))
        except Exception:
            answer = False
        say(str(int(answer)))


def say(word: str) -> None:
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
