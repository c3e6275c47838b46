"""Regular expressions: what the grammar compiler would misread is refused by name.

xgrammar 0.2.8 drops some assertions with no more than a warning, takes an unknown escape for the
letter itself and lets a JSON string's pattern spell characters that no JSON string holds. What is
left here means the same in Python, except that ``.`` matches a line break too.
"""

from __future__ import annotations

import re

from aquiline.core.errors import AquilineError

_CONTROLS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "0": "\0"}
# One element of an expression: an escape, the start of a group or of a class, or a character.
_ESCAPE = r"\\x[0-9A-Fa-f]{2}|\\u[0-9A-Fa-f]{4}|\\."
_ELEMENT = re.compile(rf"{_ESCAPE}|\(\?(?:<[=!]|<\w+>|.)?|\[\^?\]?|.", re.DOTALL)
_COUNTS = re.compile(r"\{(\d+)(?:,(\d*))?\}")
_MAX_COUNT = 128  # beyond it, a JSON string's pattern admits what only escapes can say
_IN_CLASS = re.compile(rf"{_ESCAPE}|.", re.DOTALL)


def check_pattern(pattern: str, where: str, in_json: bool = False) -> None:
    """Refuse what would be misread.

    Args:
        where: the field, for the message.
        in_json: the pattern is of the characters between a JSON string's quotes.
    """
    if not isinstance(pattern, str):
        raise AquilineError(f"{where}={pattern!r}: give a regular expression")
    counts = [int(count) for pair in _COUNTS.findall(pattern) for count in pair if count]
    if in_json and max(counts, default=0) > _MAX_COUNT:
        raise AquilineError(
            f"{where}: a count of {max(counts)}; nest counts up to {_MAX_COUNT}: (?:.{{100}}){{3}}"
        )
    in_class, negated, depth, alternatives = False, False, 0, False
    position = 0
    while match := (_IN_CLASS if in_class else _ELEMENT).match(pattern, position):
        element, position = match[0], match.end()
        fault = _class_fault(element) if in_class else _fault(element, match, pattern)
        if element[0] == "\\":
            fault = _escape_fault(element)
        if in_json and not fault and not negated and _character(element) in _NOT_IN_JSON:
            fault = "JSON holds this character only escaped"
        if fault:
            raise AquilineError(
                f"{where}: {element!r} at {match.start()}: {fault}; rewrite the expression"
            )
        if in_class:
            in_class = element != "]"
            negated = negated and in_class
        elif element[0] == "[":
            in_class, negated = True, element == "[^"
        else:
            depth += (element[0] == "(") - (element == ")")
            alternatives |= element == "|" and depth == 0
    if alternatives and (pattern[0] == "^" or pattern[-1] == "$"):
        raise AquilineError(f"{where}: an anchor binds one alternative only; write ^(?:a|b)$")


def whole_string(pattern: str) -> str:
    """The pattern of a whole string that has a match of ``pattern`` anywhere in it."""
    begins, ends = pattern.startswith("^"), _ends(pattern)
    body = pattern[begins : len(pattern) - ends]
    return f"^{'' if begins else '.*'}(?:{body}){'' if ends else '.*'}$"


def _ends(pattern: str) -> bool:
    """Whether the last character is an anchor, not an escaped dollar."""
    elements = _ELEMENT.findall(pattern)
    return bool(elements) and elements[-1] == "$"


_NOT_IN_JSON = frozenset('"\\' + "".join(map(chr, range(32))))


def _character(element: str) -> str | None:
    """The character that an element stands for, if it is one."""
    if element[0] != "\\":
        return element if len(element) == 1 else None
    if len(element) > 2:
        return chr(int(element[2:], 16))
    return _CONTROLS.get(element[1], None if element[1].isalnum() else element[1])


def _escape_fault(element: str) -> str | None:
    letter = element[1:2]
    known = len(element) > 2 or letter in _CONTROLS or (letter and letter in "dDwWsS")
    if known or (letter and not letter.isalnum()):
        return None
    return "the escape is not supported"


def _class_fault(element: str) -> str | None:
    return "nested and POSIX classes are not supported" if element[0] == "[" else None


def _fault(element: str, match: re.Match[str], pattern: str) -> str | None:
    if element == "^" and match.start() > 0:
        return "an anchor at the start only"
    if element == "$" and match.end() < len(pattern):
        return "an anchor at the end only"
    if element.startswith("(?") and not (element == "(?:" or re.fullmatch(r"\(\?<\w+>", element)):
        return "assertions and flags are not supported"
    if element in ("[]", "[^]"):
        return "the class is empty"
    return None
