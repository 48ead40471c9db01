"""Exact match of final answers: of the number after ``####`` in GSM8K (arXiv 2110.14168), for instance."""

import re
from collections.abc import Sequence

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3})")


def final_answer(text: str, pattern: str) -> str | None:
    """The group of the last match of ``pattern``; None without a match.

    Without the commas of thousands, a full stop at the end and blanks around it: `1,200.` is `1200`.
    """
    found = re.findall(pattern, text)
    return _normal(found[-1]) if found else None


def exact_match(pairs: Sequence[tuple[str, str]], pattern: str) -> float:
    """The share of (answer, expected answer), at least one, whose final answers are equal.

    Where the expected answer has no match, the whole texts are compared.
    """
    return sum(_matches(answer, expected, pattern) for answer, expected in pairs) / len(pairs)


def _matches(answer: str, expected: str, pattern: str) -> bool:
    wanted = final_answer(expected, pattern)
    if wanted is None:
        return _normal(answer) == _normal(expected)
    return final_answer(answer, pattern) == wanted


def _normal(text: str) -> str:
    return _THOUSANDS.sub("", text.strip().removesuffix(".").rstrip())
