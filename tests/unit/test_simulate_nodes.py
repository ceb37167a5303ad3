"""The model of tests/bench/simulate_nodes.py fits its calibration and uses the product's tree."""

from typing import Any

import pytest

from tests.bench import simulate_nodes as model

SMALL = {
    **model.MEASURED["calibration"],
    "rows": [262_144, 1_048_576],
    "clusters s": [4.0, 7.0],
    "round s": [0.1, 0.4],
    "subset s": [3.0, 6.0],
}


def measured(**driver: float) -> dict[str, Any]:
    return model.merged(
        model.MEASURED,
        {"calibration": SMALL, "driver": {name: 0.0 for name in model.MEASURED["driver"]} | driver},
    )


@pytest.mark.parametrize(("rows", "place"), [(262_144, 0), (1_048_576, 1)])
def test_what_it_was_calibrated_on_comes_back(rows: int, place: int) -> None:
    predicted = model.out_of_core(rows, measured())
    assert predicted == pytest.approx({name: SMALL[name][place] for name in predicted})


def test_ten_times_the_rows_take_the_slope_and_not_the_start_ten_times() -> None:
    predicted = model.out_of_core(10_485_760, measured())
    assert predicted == pytest.approx({"round s": 4.0, "clusters s": 43.0, "subset s": 42.0})


@pytest.mark.parametrize(
    ("shards", "messages", "levels"), [(1, 1, 1), (16, 16, 1), (17, 17, 2), (272, 32, 2)]
)
def test_a_question_waits_for_a_level_at_a_time(shards: int, messages: int, levels: int) -> None:
    costs = {"message": 1.0, "hop": 1000.0, "added byte": 0.0, "message through the store": 9.0}
    assert model._exchange(shards, 16, 8.0, costs, "added byte") == messages + 1000 * levels


COSTS = {
    "question": 1.0,
    "hop": 1000.0,
    "added byte": 0.0,
    "message": 0.0,
    "message through the store": 0.0,
}


@pytest.mark.parametrize(
    ("chunks", "tasks", "levels", "few"),
    [(1, 1, 0, 1), (16, 16, 0, 16), (17, 19, 1, 2), (1000, 1067, 2, 4)],
)
def test_what_chunks_answer_is_merged_before_it_comes_to_the_driver(
    chunks: int, tasks: int, levels: int, few: int
) -> None:
    question = model.Question(1, 5.0, 8.0 * model.SAMPLE)
    seconds, sent, received = question.asked(chunks, 16, 3, COSTS)
    assert seconds == tasks + 1000 * levels
    assert received == few * 8 * model.SAMPLE
    assert sent == 3 * 5 + (tasks - few) * 8 * model.SAMPLE
    assert question.asked(chunks, model.NO_TREE, 3, COSTS) == (
        chunks,
        15,
        chunks * 8 * model.SAMPLE,
    )


def test_small_answers_come_to_the_driver_before_they_are_merged_and_longer_ones_after() -> None:
    _, _, received = model.Question(1, 0.0, 10_000.0, joins=True).asked(32, 16, 1, COSTS)
    assert received == 32 * 10_000 + 2 * 160_000


def test_a_parameter_that_is_not_there_is_refused() -> None:
    with pytest.raises(SystemExit, match="got \\['mesage'\\]"):
        model.merged(model.MEASURED, {"driver": {"mesage": 1.0}})


def test_runs_of_a_size_are_averaged_and_large_ones_are_not_calibrated_on() -> None:
    def run(rows: int, seconds: float) -> dict[str, float]:
        return {"rows": rows, "clusters s": seconds, "round s": seconds / 10, "subset s": 1.0}

    bench: dict[str, Any] = {"k": 100, "rounds": 6, "rows_per_part": 131_072}
    bench["results"] = [run(1000, 1.0), run(10**7, 9.0), run(2000, 3.0), run(1000, 2.0)]
    assert model.calibration_of(bench)["clusters s"] == [1.5, 3.0]
    bench["results"] = bench["results"][:2]
    with pytest.raises(SystemExit, match="to calibrate on"):
        model.calibration_of(bench)
