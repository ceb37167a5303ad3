"""The demo's mixture against an answer key written apart from its generator, and its job against
its rows."""

import hashlib
import json
from collections import Counter

import pytest

from s2l_ray import config, demo

# To change on purpose only: users compare their table of the demo with the README's.
TRAINING_SHA256 = "55c74272091615da0dbea01244d627b2e7379dd10f7804a7ac2af66055cc81d0"
HELDOUT_SHA256 = "75aa0f9798aa01e1591ef712635bee42448322ad369cff26eb4c2c3043777990"

ROWS = {
    "add": 2800,
    "parity": 1100,
    "last": 900,
    "less": 800,
    "upper": 650,
    "next": 500,
    "sub": 400,
    "reverse": 280,
    "max": 200,
    "count": 130,
    "sort": 120,
    "mul": 120,
}
MISLABELLED = {"parity": 55, "less": 80, "max": 20, "count": 26}
NEAR_DUPLICATES = {"add": 560, "upper": 260}
MAY_OVERLAP = {"mul"}


@pytest.fixture(scope="module")
def training() -> list[demo.Row]:
    return demo.training_rows()


@pytest.fixture(scope="module")
def heldout() -> list[demo.Row]:
    return demo.heldout_rows()


def question(row: demo.Row) -> tuple[str, str]:
    """What a row asks, whatever its wording."""
    return row["instruction"].lower().rstrip("?."), row["input"]


def answer(row: demo.Row) -> str:
    instruction, text = question(row)
    name, *words = instruction.split()
    assert name == row["source"]
    if name == "count":
        return str(len(text) - len(text.replace(words[0], "")))
    if name in ("last", "upper", "next", "reverse", "sort"):
        assert not words
        following = dict(
            zip("abcdefghijklmnopqrstuvwxyz", "bcdefghijklmnopqrstuvwxyza", strict=True)
        )
        by_name = {
            "last": text[len(text) - 1 :],
            "upper": "".join(chr(ord(letter) - 32) for letter in text),
            "next": "".join(following[letter] for letter in text),
            "reverse": "".join(reversed(text)),
            "sort": "".join(letter * text.count(letter) for letter in following),
        }
        return by_name[name]
    assert not text
    numbers = [int(word) for word in words]
    if name == "parity":
        return "odd" if str(numbers[0])[-1] in "13579" else "even"
    a, b = numbers
    by_name = {
        "add": str(a + b),
        "sub": str(a - b),
        "mul": str(sum([a] * b)),
        "less": "no" if a >= b else "yes",
        "max": str(sorted(numbers)[1]),
    }
    return by_name[name]


def sha256(rows: list[demo.Row]) -> str:
    return hashlib.sha256("".join(json.dumps(row) + "\n" for row in rows).encode()).hexdigest()


def test_rows_are_the_kept_ones(training: list[demo.Row], heldout: list[demo.Row]) -> None:
    assert (sha256(training), sha256(heldout)) == (TRAINING_SHA256, HELDOUT_SHA256)
    assert demo.training_rows() == training


def test_the_mixture_is_the_stated_one(training: list[demo.Row], heldout: list[demo.Row]) -> None:
    assert Counter(row["source"] for row in training) == ROWS
    assert Counter(row["source"] for row in training if row["mislabelled"]) == MISLABELLED
    assert Counter(row["source"] for row in training if row["near_duplicate"]) == NEAR_DUPLICATES
    assert Counter(row["source"] for row in heldout) == dict.fromkeys(ROWS, demo.HELDOUT_PER_SKILL)
    assert {tuple(row) for row in training + heldout} == {
        ("source", "instruction", "input", "output", "mislabelled", "near_duplicate")
    }


def test_sources_are_mixed(training: list[demo.Row]) -> None:
    first_part = {row["source"] for row in training[: demo.CONFIG["examples"]["rows_per_part"]]}
    assert first_part == set(ROWS)


def test_exactly_the_mislabelled_rows_are_wrong(training: list[demo.Row]) -> None:
    assert [row for row in training if (row["output"] != answer(row)) != row["mislabelled"]] == []


def test_heldout_rows_are_clean_and_distinct(heldout: list[demo.Row]) -> None:
    assert [row for row in heldout if row["output"] != answer(row)] == []
    assert not any(row["mislabelled"] or row["near_duplicate"] for row in heldout)
    assert len({question(row) for row in heldout}) == len(heldout)


def test_heldout_questions_are_not_in_training_in_any_wording(
    training: list[demo.Row], heldout: list[demo.Row]
) -> None:
    asked = {question(row) for row in training}
    assert {row["source"] for row in heldout if question(row) in asked} == MAY_OVERLAP


def test_near_duplicates_reword_a_row_of_their_source(training: list[demo.Row]) -> None:
    plain = {
        (*question(row), row["output"])
        for row in training
        if not row["near_duplicate"] and not row["mislabelled"]
    }
    copies = [row for row in training if row["near_duplicate"]]
    assert all((*question(row), row["output"]) in plain for row in copies)
    assert all(row["instruction"] != question(row)[0] for row in copies)


def test_the_job_is_valid_and_trains_all_variants_equally_long() -> None:
    files = {"examples": {"files": ["train.jsonl"]}, "evaluation": {"files": ["heldout.jsonl"]}}
    variants = config.load(None, [], config.merge(demo.CONFIG, files)).variants
    assert list(variants) == ["full", "random", "s2l"]
    assert [(v.subset.rule, v.subset.budget) for v in variants.values()] == [
        ("random", 1.0),
        ("random", 0.2),
        ("s2l", 0.2),
    ]
    targets = {v.target.model_dump_json() for v in variants.values() if v.target is not None}
    assert len(targets) == 1
    assert all(v.target is not None and v.target.steps for v in variants.values())


def test_no_row_is_cut(training: list[demo.Row], heldout: list[demo.Row]) -> None:
    longest = max(
        len(f"{r['instruction']}\n{r['input']}\n{r['output']}") + 1 for r in training + heldout
    )
    assert longest <= min(demo.CONFIG["proxy"]["max_length"], demo.CONFIG["target"]["max_length"])
    assert max(len(row["output"]) for row in heldout) < demo.CONFIG["evaluation"]["max_new_tokens"]
