"""Rule teachers: an offline stand-in for language models.

Each counts one thing in a row and says System 2 above a limit; `RULES` is their whole definition.
"""

import re
from collections.abc import Callable

from lorapar.answers import split_answer
from lorapar.data import Row

_MARK = re.compile(r"<<.*?>>")  # GSM8K's calculator marks, <<48/2=24>>
_OPERATOR = re.compile(r"(?<=[\d)%])[ \t]*[-−+*/×÷x][ \t]*(?=[-−]?[$€£(]*\.?\d)")


def worked_steps(row: Row) -> int:
    """Lines of the worked answer with an `=`, or calculator marks, whichever are more."""
    work = _work(row)
    return max(sum("=" in line for line in work.splitlines()), len(_MARK.findall(work)))


def operator_count(row: Row) -> int:
    """Operators between numbers in the worked answer; those inside calculator marks if more."""
    work = _work(row)
    inside = sum(len(_OPERATOR.findall(mark)) for mark in _MARK.findall(work))
    return max(len(_OPERATOR.findall(_MARK.sub("", work))), inside)


def question_length(row: Row) -> int:
    """Words of the question."""
    return len(row.question.split())


def _work(row: Row) -> str:
    return split_answer(row.answer)[0] or row.answer


RULES: dict[str, tuple[Callable[[Row], int], int]] = {  # name → (count, most that is System 1)
    "rule:worked_steps": (worked_steps, 2),
    "rule:operator_count": (operator_count, 2),
    "rule:question_length": (question_length, 40),
}
RULES_VERSION = 1  # raise it when a count changes: old rule votes are then not used again
