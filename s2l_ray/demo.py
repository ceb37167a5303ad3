"""The built-in demo: from nothing but a seed, an imbalanced mixture of small skills, and the job
that selects from it.

The mixture was fixed by two things only. It looks like an instruction mixture: a few sources hold
most rows, some rows are wrong, some are reworded copies, the rarest skills are among the hardest.
And a target trained on all of it answers at least half of the clean held-out questions. No
selection rule was run on it before it was fixed, so a rule may win here or lose. Held-out questions
never occur in training, in any wording, except for `mul`: it has only 100 questions, and is about
recall.
"""

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SEED = 20240311
HELDOUT_PER_SKILL = 50

Row = dict[str, str | bool]


@dataclass(frozen=True)
class Question:
    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class Skill:
    """One source of the mixture.

    Args:
        mislabelled: share of the rows that are answered wrongly.
        near_duplicates: share of the rows that reword an earlier one.
        heldout_overlaps: held-out questions may occur in training.
    """

    name: str
    rows: int
    ask: Callable[[random.Random], Question]
    mislabelled: float = 0.0
    near_duplicates: float = 0.0
    heldout_overlaps: bool = False


def _below(rng: random.Random, n: int) -> int:
    """Uniform integer in [0, n).

    Python promises the sequence of random() over all versions, but not that of randrange().
    """
    return int(rng.random() * n)


def _word(rng: random.Random, length: int, letters: str = LETTERS) -> str:
    return "".join(letters[_below(rng, len(letters))] for _ in range(length))


def _add(rng: random.Random) -> Question:
    a, b = _below(rng, 100), _below(rng, 10)
    return Question(f"add {a} {b}", "", str(a + b))


def _sub(rng: random.Random) -> Question:
    b = _below(rng, 10)
    a = b + _below(rng, 100 - b)
    return Question(f"sub {a} {b}", "", str(a - b))


def _mul(rng: random.Random) -> Question:
    a, b = _below(rng, 10), _below(rng, 10)
    return Question(f"mul {a} {b}", "", str(a * b))


def _parity(rng: random.Random) -> Question:
    a = _below(rng, 1000)
    return Question(f"parity {a}", "", "odd" if a % 2 else "even")


def _less(rng: random.Random) -> Question:
    a, b = 10 + _below(rng, 90), 10 + _below(rng, 90)
    return Question(f"less {a} {b}", "", "yes" if a < b else "no")


def _max(rng: random.Random) -> Question:
    a, b = 10 + _below(rng, 90), 10 + _below(rng, 90)
    return Question(f"max {a} {b}", "", str(max(a, b)))


def _last(rng: random.Random) -> Question:
    word = _word(rng, 3 + _below(rng, 3))
    return Question("last", word, word[-1])


def _upper(rng: random.Random) -> Question:
    word = _word(rng, 2)
    return Question("upper", word, word.upper())


def _next(rng: random.Random) -> Question:
    word = _word(rng, 2)
    return Question("next", word, "".join(LETTERS[(LETTERS.index(c) + 1) % 26] for c in word))


def _reverse(rng: random.Random) -> Question:
    word = _word(rng, 3)
    return Question("reverse", word, word[::-1])


def _count(rng: random.Random) -> Question:
    letter, word = _word(rng, 1, "abc"), _word(rng, 5, "abc")
    return Question(f"count {letter}", word, str(word.count(letter)))


def _sort(rng: random.Random) -> Question:
    word = _word(rng, 3, "abcdefgh")
    return Question("sort", word, "".join(sorted(word)))


SKILLS = (
    Skill("add", 2800, _add, near_duplicates=0.2),
    Skill("parity", 1100, _parity, mislabelled=0.05),
    Skill("last", 900, _last),
    Skill("less", 800, _less, mislabelled=0.1),
    Skill("upper", 650, _upper, near_duplicates=0.4),
    Skill("next", 500, _next),
    Skill("sub", 400, _sub),
    Skill("reverse", 280, _reverse),
    Skill("max", 200, _max, mislabelled=0.1),
    Skill("count", 130, _count, mislabelled=0.2),
    Skill("sort", 120, _sort),
    Skill("mul", 120, _mul, heldout_overlaps=True),
)


def training_rows() -> list[Row]:
    """All training rows, the sources mixed: the same rows in the same order on any machine."""
    rows = [row for number in range(len(SKILLS)) for row in _source(number)[0]]
    rng = random.Random(SEED)
    for last in range(len(rows) - 1, 0, -1):
        other = _below(rng, last + 1)
        rows[last], rows[other] = rows[other], rows[last]
    return rows


def heldout_rows() -> list[Row]:
    """HELDOUT_PER_SKILL clean rows of every skill, skill after skill, no two of a skill alike."""
    return [row for number in range(len(SKILLS)) for row in _source(number)[1]]


def _source(number: int) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows of one skill.

    Each skill has a random stream of its own: none changes when another skill does.
    """
    skill, rng = SKILLS[number], random.Random(SEED + 1 + number)
    # A set that keeps the order.
    heldout: dict[Question, None] = {}
    while len(heldout) < HELDOUT_PER_SKILL:
        heldout[skill.ask(rng)] = None
    copies = round(skill.rows * skill.near_duplicates)
    asked: list[Question] = []
    while len(asked) < skill.rows - copies:
        question = skill.ask(rng)
        if skill.heldout_overlaps or question not in heldout:
            asked.append(question)
    wrong = round(skill.rows * skill.mislabelled)
    rows = [
        _row(skill, _mislabel(skill, question, rng), mislabelled=True) for question in asked[:wrong]
    ]
    rows += [_row(skill, question) for question in asked[wrong:]]
    for _ in range(copies):
        question = asked[wrong + _below(rng, len(asked) - wrong)]
        rows.append(_row(skill, _reword(question, rng), near_duplicate=True))
    return rows, [_row(skill, question) for question in heldout]


def _mislabel(skill: Skill, question: Question, rng: random.Random) -> Question:
    """The question with the answer to another one of its skill: wrong, but of the right shape."""
    while True:
        output = skill.ask(rng).output
        if output != question.output:
            return replace(question, output=output)


def _reword(question: Question, rng: random.Random) -> Question:
    text = question.instruction
    return replace(
        question, instruction=(text.capitalize(), f"{text}?", f"{text}.")[_below(rng, 3)]
    )


def _row(
    skill: Skill, question: Question, mislabelled: bool = False, near_duplicate: bool = False
) -> Row:
    marks: Row = {"mislabelled": mislabelled, "near_duplicate": near_duplicate}
    return {"source": skill.name, **asdict(question), **marks}


def _llama(width: int, depth: int, heads: int) -> dict[str, Any]:
    """A transformers config for the byte tokenizer.

    At this width, the usual standard deviation of 0.02 of the initial weights learns slowly.
    """
    return {
        "model_type": "llama",
        "vocab_size": 260,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "max_position_embeddings": 64,
        "initializer_range": 0.08,
        "bos_token_id": None,
        "eos_token_id": 256,
        "pad_token_id": 257,
    }


# 750 steps of 64 rows are six epochs of `full`; a variant with a fifth of the rows takes as many
# steps, and sees each of its rows five times as often.
CONFIG: dict[str, Any] = {
    "run": {"name": "demo"},
    "examples": {"rows_per_part": 1_024},
    "proxy": {
        "model": {"config": _llama(width=32, depth=2, heads=2)},
        "tokenizer": "bytes",
        "prompt": "plain",
        "max_length": 32,
        "epochs": 8,
        "global_batch": 128,
        "learning_rate": 4e-3,
        "warmup_ratio": 0.1,
        "weight_decay": 0.1,
        "dtype": "fp32",
        "checkpoints": 8,
    },
    "trajectories": {"dtype": "fp32"},
    "clusters": {"k": 40},
    "subset": {"budget": 0.2},
    "target": {
        "model": {"config": _llama(width=80, depth=3, heads=4)},
        "tokenizer": "bytes",
        "prompt": "plain",
        "max_length": 32,
        "steps": 750,
        "global_batch": 64,
        "learning_rate": 4e-3,
        "warmup_ratio": 0.1,
        "weight_decay": 0.1,
        "dtype": "fp32",
    },
    "evaluation": {"max_new_tokens": 8},
    "variants": {
        "full": {"subset.rule": "random", "subset.budget": 1.0},
        "random": {"subset.rule": "random"},
        "s2l": {},
    },
    "scaling": {
        "proxy": {"micro_batch": 128},
        "target": {"micro_batch": 64},
        "side_by_side": 2,
    },
}
