"""Answers are compared as numbers (defects D12, D13), and found by their mark."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorapar.answers import correct, extract, parse_number, same_answer, split_answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", 42), ("1,000", 1000), ("$18", 18), ("42.0", 42), ("-5", -5), ("+3", 3), (".5", 0.5),
        ("−7", -7), ("3/4", Fraction(3, 4)), ("12 apples", 12), ("$1,234.50 per week", 1234.5),
        ("7.", 7), ("", None), (None, None), ("none", None), ("3 or 4", None), ("1/0", None),
        ("1,2", None), ("2,1,25", None), ("1,0000", None), ("12,345,678.5", 12345678.5),
    ],
)  # fmt: skip
def test_parse_number(text, number):
    assert parse_number(text) == (None if number is None else Fraction(str(number)))


@given(st.integers(-(10**12), 10**12))
def test_every_integer_is_read_back_in_every_style(n):
    for text in (str(n), f"{n:,}", f"${n:,}", f"{n}.0", f" {n} "):
        assert parse_number(text) == n


def test_extract():
    assert extract("1 + 1 = 2\n#### 2", "####") == "2"
    assert extract("#### 1\nno\n#### 3 \nmore", "####") == "3"
    assert extract("the answer is 3", "####") is None and extract("a ####", "####") is None
    assert extract("<answer>\n5\n</answer>", "xml") == "5"
    assert extract("<answer>1</answer> <answer>2</answer>", "xml") == "2"
    assert extract("#### 5", "xml") is None and extract("<answer>5", "xml") is None


def test_split_answer():
    assert split_answer("a\nb\n#### 1,000") == ("a\nb", "1,000")
    assert split_answer("just 5") == ("", "just 5")


def test_the_comma_cases_of_the_released_scorer():
    """D12: "2,125" and "2,999" both parse to 2 there, and "2125" counts as wrong."""
    assert correct("#### 2,999", "#### 2,125", "####", "released_hash")
    assert not correct("#### 2125", "#### 2,125", "####", "released_hash")
    assert not correct("#### 2,999", "#### 2,125", "####")
    assert correct("#### 2125", "#### 2,125", "####")


def test_the_int_cases_of_the_released_scorer():
    """D13: int() rejects commas, dollars and decimals there."""
    for text in ("1,000", "$1000", "1000.0"):
        completion = f"<answer>{text}</answer>"
        assert not correct(completion, "#### 1,000", "xml", "released_answer_tag")
        assert correct(completion, "#### 1,000", "xml")
    assert correct("<answer>1000</answer>", "#### 1,000", "xml", "released_answer_tag")
    assert correct("1000", "#### 1000", "xml", "released_answer_tag")  # D15: no tag needed there
    assert not correct("1000", "#### 1000", "xml")


def test_answers_that_are_no_plain_numbers_go_to_math_verify():
    assert same_answer("$\\frac{2}{4}$", "$\\frac{1}{2}$")
    assert not same_answer("$\\frac{2}{3}$", "$\\frac{1}{2}$")
    assert same_answer("Paris", "Paris") and not same_answer("Rome", "7")
    assert not same_answer(None, "7")


def test_math_verify_works_outside_the_main_thread():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(same_answer, "$\\sqrt{4}$", "$\\sqrt{4}+0$").result() is True


def test_unknown_scorer():
    with pytest.raises(ValueError, match="scorer 'exact' is none of"):
        correct("", "", "####", "exact")
