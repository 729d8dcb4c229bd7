"""Names and assignment keys: one grammar for subjects, file names and Unix accounts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuyard_protocol.names import AssignmentKey, given_submission_id, is_name, is_submission_id, nearest


@pytest.mark.parametrize("name", ["a", "0", "acme", "node-1", "n-0a1b2c3d", "a" * 63, "a--b", "a-"])
def test_a_name_is_lower_case_letters_digits_and_hyphens(name: str) -> None:
    assert is_name(name)


@pytest.mark.parametrize(
    "name", ["", "A", "-a", "a_b", "a.b", "a b", "a*", "a>", "a" * 64, "é", "a\n", "\na", "a\0", "٣", "..", "a/b"]
)
def test_everything_else_is_no_name(name: str) -> None:
    assert not is_name(name)


@given(st.text())
def test_a_name_is_one_safe_token(text: str) -> None:
    if is_name(text):
        assert text.isascii()
        assert not set(text) & set(" .*>/\\\t\r\n\0")


@pytest.mark.parametrize("submission_id", ["a", "nightly-17", "-", "s", "s-1", "s1x", "s1-", "a" * 64])
def test_a_tenant_may_choose_this_id(submission_id: str) -> None:
    assert is_submission_id(submission_id)


@pytest.mark.parametrize("submission_id", ["", "A", "a.b", "a" * 65, "s1", "s17", "s17-3", "ab\n", "s1\n"])
def test_a_tenant_may_not_choose_this_id(submission_id: str) -> None:
    assert not is_submission_id(submission_id)


@given(st.integers(1, 2**53), st.none() | st.integers(0, 999))
def test_nobody_can_choose_an_id_that_the_yard_gives(sequence: int, index: int | None) -> None:
    assert not is_submission_id(given_submission_id(sequence, index))


@given(st.integers(0, 2**53), st.integers(0, 2**31), st.integers(0, 1023))
def test_an_assignment_key_reads_what_it_prints(job: int, attempt: int, replica: int) -> None:
    key = AssignmentKey(job, attempt, replica)
    assert AssignmentKey.parse(str(key)) == key


@pytest.mark.parametrize(
    "text", ["", "1", "1.2", "1.2.3.4", "1.2.x", "1.-2.3", "1.2.3\n", "²1.2.3", "1..3", "9" * 30 + ".1.1"]
)
def test_other_words_are_no_assignment_key(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected an assignment such as '17\.1\.0'"):
        AssignmentKey.parse(text)


def test_the_nearest_name_is_offered_only_if_it_is_near() -> None:
    assert nearest("node-11", ["node-1", "head"]) == "node-1"
    assert nearest("zzz", ["node-1", "head"]) == ""
    assert nearest("x", []) == ""
