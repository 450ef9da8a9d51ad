"""Final answers: found by their mark, compared as numbers."""

import re
from fractions import Fraction

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+(?![\d,]*\d)|\d+)(?:\.\d+)?(?:/\d+)?|[-+]?\.\d+")
_XML = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def split_answer(answer: str) -> tuple[str, str]:
    """(worked steps, final answer) of a reference answer; without `####` all of it is final."""
    reasoning, mark, final = answer.rpartition("####")
    return (reasoning.strip(), final.strip()) if mark else ("", answer.strip())


def extract(text: str, marker: str) -> str | None:
    """The text after the last `####`, or inside the last answer tags; None if it is not marked."""
    if marker == "xml":
        found = _XML.findall(text)
        return found[-1].strip() if found else None
    _, mark, after = text.rpartition("####")
    lines = after.strip().splitlines()
    return lines[0].strip() if mark and lines else None


def parse_number(text: str | None) -> Fraction | None:
    """The number a short text states: `1,000`, `$18`, `42.0`, `-5`, `3/4`, `12 apples`.

    None if it states none or more than one.
    """
    if text is None:
        return None
    found = _NUMBER.findall(text.replace("$", "").replace("−", "-"))
    if len(found) != 1:
        return None
    try:
        return Fraction(found[0].replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def same_answer(predicted: str | None, gold: str) -> bool:
    """Equal as numbers if both are numbers, else by math-verify."""
    if predicted is None:
        return False
    a, b = parse_number(predicted), parse_number(gold)
    if a is not None and b is not None:
        return a == b
    if predicted.strip() == gold.strip():
        return True
    if b is not None:
        return False
    from math_verify import parse, verify

    # Its time-outs use signals, which only the main thread may set.
    return verify(
        parse(gold, parsing_timeout=None),
        parse(predicted, parsing_timeout=None),
        timeout_seconds=None,
    )


def correct(completion: str, answer: str, marker: str, scorer: str = "number") -> bool:
    """Whether a completion gives the reference's final answer.

    scorer: `number`, or the released script's two: `released_hash` (digits after the last ####)
    and `released_answer_tag` (int() of the last answer tag).
    """
    gold = split_answer(answer)[1]
    match scorer:
        case "number":
            return same_answer(extract(completion, marker), gold)
        case "released_hash":
            pattern = re.compile(r"####\s*(-?\d+)")
            predicted, reference = pattern.findall(completion), pattern.findall(answer)
            return bool(predicted and reference) and predicted[-1] == reference[-1]
        case "released_answer_tag":
            try:
                text = completion.split("<answer>")[-1].split("</answer>")[0].strip()
                return int(text) == int(gold.replace(",", "").replace("$", ""))
            except ValueError:
                return False
    raise ValueError(f"scorer {scorer!r} is none of number, released_hash, released_answer_tag")


SCORERS = ("number", "released_hash", "released_answer_tag")
