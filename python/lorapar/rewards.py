"""Rewards for GRPO: pure functions of one completion, and TRL's form of them.

Two families. The repaired ones compare answers as numbers and read the final answer where the
run's template puts it. The `released_*` ones behave as the five of the LoRA-PAR authors' script,
its defects included (docs/defects.md), for the XML answer form it uses.
"""

import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from lorapar.answers import correct, extract, parse_number, split_answer
from lorapar.errors import UserError, nearest

Reward = Callable[[str, str, str], float]  # completion, reference answer, marker → reward

_XML_STRICT = re.compile(r"<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n?", re.DOTALL)
_XML_SOFT = re.compile(r"\s*<reasoning>.*?</reasoning>\s*<answer>.*?</answer>", re.DOTALL)
_HASH = re.compile(r"\s*(?:.*\n)*?#### ?\S[^\n]*\s*")
_TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")


def correct_answer(completion: str, answer: str, marker: str) -> float:
    """2.0 if the marked final answer equals the reference as a number."""
    return 2.0 if correct(completion, answer, marker) else 0.0


def numeric_answer(completion: str, answer: str, marker: str) -> float:
    """0.5 if there is a marked final answer and it is one number: signs, commas, decimals count."""
    return 0.5 if parse_number(extract(completion, marker)) is not None else 0.0


def answer_format(completion: str, answer: str, marker: str) -> float:
    """0.5 if the completion has its answer marked once, at its end."""
    if marker == "xml":
        return 0.5 if _XML_STRICT.fullmatch(completion) else 0.0
    return 0.5 if completion.count("####") == 1 and _HASH.fullmatch(completion) else 0.0


def soft_format(completion: str, answer: str, marker: str) -> float:
    """0.5 if the answer is marked at all, whatever stands around it."""
    if marker == "xml":
        return 0.5 if _XML_SOFT.match(completion) else 0.0
    return 0.5 if extract(completion, marker) else 0.0


def tag_count(completion: str, answer: str, marker: str) -> float:
    """0.125 for each XML tag that occurs exactly once, less 0.001 a character after the last."""
    count = sum(0.125 for tag in _TAGS if completion.count(tag) == 1)
    if completion.count("</answer>") == 1:
        count -= 0.001 * len(completion.rpartition("</answer>")[2].strip())
    return count


def released_correctness(completion: str, answer: str, marker: str) -> float:
    """2.0 if the text between the last <answer> and the next </answer> is the gold string."""
    gold = split_answer(answer)[1].replace(",", "").replace("$", "")
    return 2.0 if _released_answer(completion) == gold else 0.0


def released_int(completion: str, answer: str, marker: str) -> float:
    """0.5 if that text is all digits."""
    return 0.5 if _released_answer(completion).isdigit() else 0.0


def released_strict_format(completion: str, answer: str, marker: str) -> float:
    """0.5 for both blocks with exact newlines, the trailing one included."""
    pattern = r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$"
    return 0.5 if re.match(pattern, completion, re.DOTALL) else 0.0


def released_soft_format(completion: str, answer: str, marker: str) -> float:
    """0.5 if the stripped completion starts with both blocks."""
    pattern = r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>"
    return 0.5 if re.match(pattern, completion.strip(), re.DOTALL) else 0.0


def released_xml_count(completion: str, answer: str, marker: str) -> float:
    """0.125 a tag with its newlines, less 0.001 a character after the end, charged twice.

    Without a newline after </answer> the whole completion counts as being after the end.
    """
    count = 0.0
    if completion.count("<reasoning>\n") == 1:
        count += 0.125
    if completion.count("\n</reasoning>\n") == 1:
        count += 0.125
    if completion.count("\n<answer>\n") == 1:
        count += 0.125
        count -= 0.001 * len(completion.split("\n</answer>\n")[-1])
    if completion.count("\n</answer>") == 1:
        count += 0.125
        count -= 0.001 * (len(completion.split("\n</answer>")[-1]) - 1)
    return count


def _released_answer(completion: str) -> str:
    return completion.split("<answer>")[-1].split("</answer>")[0].strip()


REWARDS: dict[str, Reward] = {
    f.__name__: f
    for f in (
        correct_answer,
        numeric_answer,
        answer_format,
        soft_format,
        tag_count,
        released_correctness,
        released_int,
        released_strict_format,
        released_soft_format,
        released_xml_count,
    )
}


def trl_rewards(
    rewards: Sequence[str | dict[str, float]], marker: str
) -> tuple[list[Callable], list[float]]:
    """Functions and weights for `GRPOTrainer`, from the configuration's list.

    Each entry is a name of `REWARDS`, `{name: weight}`, or `package.module.function` in TRL's own
    form (called as TRL calls it).

    Raises:
        UserError: an unknown name, or a dotted path that cannot be imported.
    """
    functions, weights = [], []
    for entry in rewards:
        pairs = entry.items() if isinstance(entry, dict) else [(entry, 1.0)]
        for name, weight in pairs:
            if not isinstance(name, str) or not isinstance(weight, int | float):
                raise UserError(f"rewards: expected a name or {{name: weight}}, found {entry!r}")
            functions.append(_dotted(name) if "." in name else _named(name, marker))
            weights.append(float(weight))
    return functions, weights


def _named(name: str, marker: str) -> Callable:
    if name not in REWARDS:
        raise UserError(f"rewards: {name!r} is unknown{nearest(name, REWARDS)}")
    reward = REWARDS[name]

    def call(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
        return [reward(_text(c), gold, marker) for c, gold in zip(completions, answer)]

    call.__name__ = name
    return call


def _dotted(path: str) -> Callable:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as e:
        raise UserError(f"rewards: {path!r} cannot be imported: {e}") from None


def _text(completion: Any) -> str:
    """A completion as TRL gives it: text, or messages whose last one is the answer."""
    return completion if isinstance(completion, str) else completion[-1]["content"]
