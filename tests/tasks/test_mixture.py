"""The mixture of families: which member a meta-batch is of, and what the members themselves give."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from gallery_cases import load

from metateleport.families import FamilyError


def test_all_members_come_once_before_one_comes_again() -> None:
    mixture = load("mixture", {"members": "quadratic,digits,teacher"})
    for first in range(0, 12, 3):
        assert {mixture.augmented(index, 7).name for index in range(first, first + 3)} == {
            "quadratic",
            "digits",
            "teacher",
        }
    orders = {tuple(mixture.augmented(turn * 3 + place, 7).name for place in range(3)) for turn in range(8)}
    assert len(orders) > 1


def test_a_member_that_is_named_twice_comes_twice() -> None:
    mixture = load("mixture", {"members": "digits, teacher, digits"})
    assert Counter(mixture.augmented(index, 0).name for index in range(6)) == {"digits": 4, "teacher": 2}


def test_a_members_settings_vary_as_the_member_varies_them() -> None:
    own = load("digits").augmented(0, 3)
    assert load("mixture", {"members": "digits"}).augmented(0, 3).settings() == own.settings()


def test_without_variation_it_is_its_first_member() -> None:
    mine, own = load("mixture", {"members": "digits,teacher"}).stack(range(2)), load("digits").stack(range(2))
    for (name, value), (own_name, own_value) in zip(mine.named_parameters(), own.named_parameters(), strict=True):
        assert name == own_name
        assert torch.equal(value, own_value)


@pytest.mark.parametrize(
    ("members", "words"), [("", "names of families"), ("digits,,teacher", "names of families"), ("mixture", "itself")]
)
def test_members_that_cannot_be(members: str, words: str) -> None:
    with pytest.raises(FamilyError, match=words):
        load("mixture", {"members": members})
    with pytest.raises(FamilyError, match="no task family"):
        load("mixture", {"members": "digits,nothing"}).augmented(0, 0)


def test_validation_is_on_families_that_are_left_out() -> None:
    mixture = load("mixture", {"members": "digits", "left_out": "teacher,quadratic"})
    drawn = [mixture.augmented(index, 1) for index in range(4)]
    assert {each.of("train").name for each in drawn} == {"digits"}
    assert Counter(each.of("validation").name for each in drawn) == {"teacher": 2, "quadratic": 2}
    assert drawn[0].stack([0], "validation").deterministic == drawn[0].of("validation").stack([0]).deterministic
    own, alone = drawn[1].stack([5], "train", 3), drawn[1].of("train").stack([5], "train", 3)
    assert all(torch.equal(one, two) for one, two in zip(own.parameters(), alone.parameters(), strict=True))


def test_a_member_cannot_be_left_out() -> None:
    with pytest.raises(FamilyError, match="digits is a member"):
        load("mixture", {"members": "digits,teacher", "left_out": "digits"})
