"""Rewards: the paper's five with their defects, and the repaired ones without."""

import pytest

from lorapar.errors import UserError
from lorapar.rewards import REWARDS, trl_rewards

ANSWER = "5 * 4 = 20\n#### 1,000"
GOOD_XML = "<reasoning>\n5 * 4 = 20\n</reasoning>\n<answer>\n1000\n</answer>\n"
GOOD_HASH = " 5 * 4 = 20\n#### 1000"


def value(name, completion, answer=ANSWER, marker="xml"):
    return REWARDS[name](completion, answer, marker)


def total(prefix, completion, marker="xml"):
    return sum(f(completion, ANSWER, marker) for n, f in REWARDS.items() if n.startswith(prefix))


def test_a_perfect_completion_earns_four_by_the_released_rewards():
    assert total("released_", GOOD_XML) == pytest.approx(4.0)


def test_the_newline_trap_of_the_released_tag_count():
    """D14: without the final newline the whole length is charged, and strict format is lost."""
    long = f"<reasoning>\n{'x' * 600}\n</reasoning>\n<answer>\n42\n</answer>"
    assert value("released_xml_count", long + "\n") == pytest.approx(0.5)
    assert value("released_xml_count", long) == pytest.approx(-0.146)
    assert (
        value("released_strict_format", long) == 0 != value("released_strict_format", long + "\n")
    )
    for text in (long, long + "\n"):
        assert value("tag_count", text) == pytest.approx(0.5)
        assert value("answer_format", text) == 0.5
    assert value("tag_count", long + "\n" + "y" * 100) == pytest.approx(0.4)


def test_answers_without_tags_earn_nothing_repaired():
    """D15: "42" earns 0.5 + 2.0 there."""
    assert (
        value("released_int", "42", "#### 42") + value("released_correctness", "42", "#### 42")
        == 2.5
    )
    assert value("numeric_answer", "42", "#### 42") + value("correct_answer", "42", "#### 42") == 0


def test_numbers_are_compared_as_numbers():
    """D13: raw string equality there, and digits only."""
    for text in ("1,000", "$1,000", "1000.0"):
        completion = f"<answer>\n{text}\n</answer>"
        assert value("released_correctness", completion) == value("released_int", completion) == 0
        assert value("correct_answer", completion) == 2.0
        assert value("numeric_answer", completion) == 0.5
    assert value("numeric_answer", "<answer>-5</answer>") == 0.5
    assert value("numeric_answer", "<answer>dunno</answer>") == 0


@pytest.mark.parametrize(
    ("completion", "strict", "soft"),
    [
        (GOOD_HASH, 0.5, 0.5),
        ("#### 5", 0.5, 0.5),
        (GOOD_HASH + "\n", 0.5, 0.5),
        (GOOD_HASH + "\nand more text", 0, 0.5),
        ("#### 1\n#### 2", 0, 0.5),
        ("no mark 5", 0, 0),
        ("####", 0, 0),
    ],
)
def test_hash_formats(completion, strict, soft):
    assert value("answer_format", completion, marker="####") == strict
    assert value("soft_format", completion, marker="####") == soft


def test_xml_formats():
    assert value("answer_format", GOOD_XML) == value("soft_format", GOOD_XML) == 0.5
    loose = "<reasoning>a</reasoning> <answer>5</answer> trailing"
    assert value("answer_format", loose) == 0 and value("soft_format", loose) == 0.5
    assert (
        value("released_soft_format", loose) == 0.5 and value("released_strict_format", loose) == 0
    )


def my_reward(completions, **columns):
    """A reward in TRL's own form, for the dotted path."""
    return [float(len(c)) for c in completions]


def test_trl_form():
    functions, weights = trl_rewards(
        ["correct_answer", {"numeric_answer": 0.25}, f"{__name__}.my_reward"], "####"
    )
    assert weights == [1.0, 0.25, 1.0]
    assert [f.__name__ for f in functions] == ["correct_answer", "numeric_answer", "my_reward"]
    text, messages = [GOOD_HASH, "#### 7"], [[{"role": "assistant", "content": GOOD_HASH}]] * 2
    given = {"prompts": ["", ""], "answer": [ANSWER, ANSWER], "trainer_state": None}
    assert functions[0](completions=text, **given) == [2.0, 0.0]
    assert functions[0](completions=messages, **given) == [2.0, 2.0]


def test_unknown_rewards():
    with pytest.raises(
        UserError, match="'corect_answer' is unknown; did you mean 'correct_answer'"
    ):
        trl_rewards(["corect_answer"], "####")
    with pytest.raises(UserError, match="'nowhere.f' cannot be imported"):
        trl_rewards(["nowhere.f"], "####")
