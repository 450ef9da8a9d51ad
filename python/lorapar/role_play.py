"""What a teacher is asked, and how its reply is read: prompt in, one label or an abstention out."""

import json
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from lorapar.config import PROMPTS
from lorapar.data import SYSTEMS, Row, row_hash
from lorapar.errors import UserError, nearest

NAMES = ("System1", "System2")  # what a teacher is to answer with, in the order of SYSTEMS
LONGEST_REPLY = 40  # characters; a label with more around it is not "exactly one label"
RESPONSE_FORMAT = {
    "type": "json_schema",
    "json_schema": {
        "name": "label",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"label": {"type": "string", "enum": list(NAMES)}},
            "required": ["label"],
            "additionalProperties": False,
        },
    },
}

_MARKUP = r"[\s\"'“”‘’`*_.:;,()<>\[\]#-]*"  # quotes, Markdown, a full stop; no question mark
_LABEL = re.compile(
    rf"{_MARKUP}(?:(?:the )?(?:answer|label)(?: is)?{_MARKUP})?system[\s_-]*([12]){_MARKUP}",
    re.IGNORECASE,
)
_FENCED = re.compile(r"```(?:json)?\s*(\{.*\})\s*```", re.DOTALL)
_PLACE = re.compile(r"\{(model|question|answer|mark)\}")


def load_prompt(name: str) -> str:
    """The text of `role_play` or `plain`, or of the user's own file.

    Its places are {question}, {answer}, {model} (whom the teacher plays) and {mark} (sixteen hex
    digits of its own hash, for marks around the row's text); other braces are left alone.

    Raises:
        UserError: no such file, or one without {question} or {answer}.
    """
    if name in PROMPTS:
        return (files("lorapar") / "prompts" / f"{name}.txt").read_text(encoding="utf-8")
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(
            f"labels.prompt: {name!r} cannot be read ({e}); expected a UTF-8 text file, or one of "
            f"{', '.join(PROMPTS)}{nearest(name, PROMPTS) if '/' not in name else ''}"
        ) from None
    for place in ("{question}", "{answer}"):
        if place not in text:
            raise UserError(f"labels.prompt: {name} has no {place}; teachers are to judge both")
    return text


def prompt_for(row: Row, prompt: str, target: str) -> str:
    """The prompt with its places filled in one pass: braces in the row's text are left alone."""
    values: dict[str, Callable[[], str]] = {
        "model": lambda: target,
        "question": lambda: row.question,
        "answer": lambda: row.answer,
        "mark": lambda: row_hash(row)[:16],
    }
    return _PLACE.sub(lambda place: values[place[1]](), prompt)


def target_name(model: str) -> str:
    """The name that teachers play: a folder's own name, a hub name as it is."""
    return Path(model).resolve().name if Path(model).exists() else model


def parse_label(raw: str) -> str | None:
    """The one label a reply is, or None for an abstention: anything else, or more around it.

    A reply is the label itself, or the JSON object that RESPONSE_FORMAT asks for; what a teacher
    thinks before it, up to </think>, does not count.
    """
    text = raw.rpartition("</think>")[2].strip()
    if "<think>" in text:
        return None
    if fenced := _FENCED.fullmatch(text):
        text = fenced[1]
    if text.startswith("{"):
        return _from_json(text)
    return _only_label(text)


def _from_json(text: str) -> str | None:
    try:
        value: Any = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError):
        return None
    if len(value) != 1 or value[0][0] != "label" or not isinstance(value[0][1], str):
        return None
    return _only_label(value[0][1])


def _only_label(text: str) -> str | None:
    found = _LABEL.fullmatch(text) if len(text) <= LONGEST_REPLY else None
    return SYSTEMS[int(found[1]) - 1] if found else None
