"""The one exception whose text is meant for the user, and what keeps such a text on one short line."""

from __future__ import annotations

import reprlib
from typing import Any

LONGEST = 280
"""Characters of a message: with the program's name before it the line stays under 300."""


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message is one line: the field, the value given, and what would be right. The command line
    prints it without a traceback and exits with code 2. Whatever a file or an option holds, the
    message stays on one line and within `LONGEST` characters; a longer one loses its middle.
    """

    def __init__(self, message: object = ""):
        super().__init__(one_line(str(message)))


def one_line(text: str, longest: int = LONGEST) -> str:
    """The text without line breaks and other characters that cannot be printed, shortened in its middle."""
    if len(text) > 8 * longest:  # an escaped character takes up to ten
        text = text[: 4 * longest] + text[-4 * longest :]
    text = " ".join(line.strip() for line in text.splitlines())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(text) <= longest:
        return text
    head = 2 * longest // 3
    return f"{text[:head]} ... {text[len(text) - (longest - head - 5) :]}"


def shown(value: Any) -> str:
    """The value as a message quotes it: its `repr`, shortened, also where it has none or an endless one."""
    form = reprlib.Repr()
    form.maxstring = form.maxother = form.maxlong = 80
    form.maxlevel, form.maxlist, form.maxtuple, form.maxdict, form.maxset = 2, 8, 8, 4, 8
    try:
        return one_line(form.repr(value), 100)
    except (ValueError, RecursionError):  # a number of thousands of digits has no decimal form
        return f"a value of type {type(value).__name__}"


def first_line(error: BaseException) -> str:
    """What an error of another library says, for a line of ours; its type if it says nothing."""
    return one_line((str(error).strip().splitlines() or [type(error).__name__])[0], 200)
