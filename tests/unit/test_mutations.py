"""The mutations of tests/mutations.py still fit the code; running them takes minutes."""

from collections import Counter

from tests.mutations import MUTATIONS, ROOT, occurrences


def test_every_mutation_changes_one_place_and_names_tests_that_are_there() -> None:
    assert {m.name: occurrences(m) for m in MUTATIONS if occurrences(m) != 1} == {}
    paths = {path for m in MUTATIONS for path in m.tests}
    for path in paths:
        file, _, test = path.partition("::")
        assert f"def {test}" in (ROOT / "tests/unit" / file).read_text(), path


def test_mutations_are_many_and_have_names_of_their_own() -> None:
    assert len(MUTATIONS) >= 40
    assert max(Counter(m.name for m in MUTATIONS).values()) == 1
    assert all(m.old != m.new for m in MUTATIONS)
