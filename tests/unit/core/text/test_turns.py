"""What of an answer is compared."""

import pytest

from s2l_ray.core.text.turns import without_thought


@pytest.mark.parametrize(
    "answer", ["42", " 42\n", "<think>\n\n</think>\n\n42", "a</think>b</think> 42"]
)
def test_an_answer_is_compared_without_its_thought_and_white_space_around_it(answer: str) -> None:
    assert without_thought(answer) == "42"
