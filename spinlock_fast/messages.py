"""Text of messages: one line, bounded length, no control characters."""

from __future__ import annotations

import re
import reprlib
import unicodedata
from typing import Any

_MESSAGE_LIMIT = 1000
# Right-to-left and isolate marks change the order in which a terminal shows the characters around them.
_BIDIRECTIONAL_MARKS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

_NUMBERS = re.compile(r"[-+0-9.eE ,]+|[-+]?(inf|nan)")  # a number or a range of numbers, such as "-0.5"


def printable(text: str) -> str:
    """The text with control characters, line ends, lone surrogates and bidirectional marks escaped, such as \\x1b.

    Names of datasets and columns come from files, and must not reach a terminal, an SVG or an XML file unescaped.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(c) if _is_unsafe(c) else c for c in text)


def csv_text(text: str) -> str:
    """A printable text for a CSV field; an apostrophe precedes one that a spreadsheet would evaluate."""
    text = printable(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) and not _NUMBERS.fullmatch(text) else text


def _is_unsafe(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs", "Cn", "Zl", "Zp") or character in _BIDIRECTIONAL_MARKS


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def one_line(message: object, limit: int = _MESSAGE_LIMIT) -> str:
    """The text of an error or a message as one printable line; the middle of a long text is omitted."""
    text = str(message)
    if len(text) > 8 * limit:  # bounds the time of the loops below
        text = text[: 4 * limit] + text[-4 * limit :]
    text = printable(" ".join(text.split()))
    return text if len(text) <= limit else f"{text[: limit - limit // 4]} ... {text[-limit // 4 :]}"


class _BoundedRepr(reprlib.Repr):
    def __init__(self, limit: int) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxstring = self.maxother = limit

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to print an integer of more than 4,300 digits.
        if x.bit_length() > 4 * self.maxother:
            return f"an integer of about {int(x.bit_length() * 0.30103) + 1} digits"
        return repr(x)


def shown(value: Any, limit: int = 60) -> str:
    """`repr` of a value in at most `limit` characters, in a time that does not depend on its size."""
    text = printable(_BoundedRepr(limit).repr(value))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def format_bytes(size: float) -> str:
    """A number of bytes in three significant digits and a decimal unit: 36,900 -> "36.9 kB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def shortened(text: str, most: int) -> str:
    """The printable text in at most `most` characters.

    Words are left out in its middle, or characters of a single long word.
    """
    text = printable(text)
    if len(text) <= most:
        return text
    return _without_middle_words(text, most) or _without_middle(text, most)


def _without_middle(text: str, most: int) -> str:
    tail = (most - 1) // 2
    return f"{text[: most - 1 - tail]}…{text[len(text) - tail :]}"


def _without_middle_words(text: str, most: int) -> str | None:
    """First and last words with an ellipsis between; None where the first and the last word are too long."""
    words = re.findall(r"[^_ ./:-]*[_ ./:-]+|[^_ ./:-]+$", text)
    first, last = 1, len(words) - 1
    if last < first or len(words[0]) + len(words[-1]) + 1 > most:
        return None

    def fits(first: int, last: int) -> bool:
        return first <= last and sum(map(len, words[:first] + words[last:])) + 1 <= most

    while fits(first + 1, last) or fits(first, last - 1):
        head, tail = (sum(map(len, part)) for part in (words[:first], words[last:]))
        longer_head = fits(first + 1, last) and (head <= tail or not fits(first, last - 1))
        first, last = (first + 1, last) if longer_head else (first, last - 1)
    return f"{''.join(words[:first]).rstrip('_ ./:-')}…{''.join(words[last:])}"
