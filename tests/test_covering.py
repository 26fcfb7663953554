"""A covering design leaves no pair out, and is as short as it says."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from covering import pairwise
from symmetry_cases import CASES, by_kind, meeting

DRAWS = [[random.Random(seed).randint(1, 9) for _ in range(2 + seed % 5)] for seed in range(30)]


@pytest.mark.parametrize("sizes", [*DRAWS, [12, 14, 9], [4] * 10, [1, 1]], ids=str)
def test_every_pair_of_values_meets_and_few_rows_do_it(sizes: list[int]) -> None:
    factors = [[f"{place}.{value}" for value in range(size)] for place, size in enumerate(sizes)]
    rows = pairwise(*factors)
    for one, other in itertools.combinations(range(len(sizes)), 2):
        assert {(row[one], row[other]) for row in rows} == set(itertools.product(factors[one], factors[other]))
    assert len(set(rows)) == len(rows)
    largest, second = sorted(sizes, reverse=True)[:2]
    assert largest * second <= len(rows) <= math.prod(sizes)
    if len(sizes) == 3:
        assert len(rows) <= 1.25 * largest * second + 2


def test_ten_factors_of_four_values_take_dozens_of_rows_and_not_a_million() -> None:
    assert len(pairwise(*[range(4)] * 10)) <= 36


def test_equal_factors_give_equal_rows_and_values_need_no_hash() -> None:
    factors = [[{"a": 1}, {"b": 2}], [[0], [1], [2]], "xy"]
    assert pairwise(*factors) == pairwise(*factors)


@pytest.mark.parametrize(("factors", "says"), [([], "two factors"), (["ab"], "two factors"), (["ab", ""], "factor 1")])
def test_what_has_no_pairs_is_refused(factors: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        pairwise(*factors)


@pytest.mark.parametrize("count", [1, 2, 3, 6, 12])
def test_values_meet_every_kind_of_symmetry_and_every_case_is_met(count: int) -> None:
    rows = [(value, str(case)) for value, case in meeting(range(count), CASES)]
    kinds = [{str(case) for case in kind} for kind in by_kind(CASES)]
    assert len(kinds) >= 14
    assert sorted(name for kind in kinds for name in kind) == sorted(map(str, CASES))
    for value, kind in itertools.product(range(count), kinds):
        assert any((value, name) in rows for name in kind)
    assert {name for _, name in rows} == {str(case) for case in CASES}
    assert len(set(rows)) == len(rows) <= max(count * len(CASES), len(CASES))
    assert count < 6 or len(rows) < 0.6 * count * len(CASES)
