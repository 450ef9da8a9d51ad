"""The one exception for everything a user can put right, and hints for it."""

import difflib
from typing import Any


class UserError(ValueError):
    """A message that names the file, line or field, what was found and what is needed."""

    told = False  # on every rank: the first one says it for all


def nearest(name: str, known: Any) -> str:
    """`; did you mean X?`, or nothing."""
    match = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    return f"; did you mean {match[0]!r}?" if match else f"; known: {', '.join(map(str, known))}"


def check_keys(section: str, given: dict[str, Any], known: Any) -> None:
    """Raises UserError for keys of a passed-through section that its class does not have."""
    for key in given:
        if key not in known:
            match = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {match[0]!r}?" if match else ""
            raise UserError(f"{section}: unknown key {key!r}{hint}")
