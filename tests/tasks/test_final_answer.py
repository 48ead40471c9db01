"""Final answers as GSM8K has them, and by other patterns."""

import pytest

from qvtune.config.generate import GenerateSection
from qvtune.tasks.final_answer import exact_match, final_answer

GSM8K = GenerateSection(rows=1).final_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She makes 9 * 2 = $18.\n#### 18", "18"),
        ("#### 1\nno:\n####  2 ", "2"),
        ("#### 1,234,567", "1234567"),
        ("#### 1200.", "1200"),
        ("#### 3.50", "3.50"),
        ("#### a, b", "a, b"),
        ("18", None),
        ("####", None),
    ],
)
def test_the_number_after_the_marks(text: str, expected: str | None) -> None:
    assert final_answer(text, GSM8K) == expected


def test_the_share_of_equal_final_answers() -> None:
    """An answer without the marks is wrong where the expected one has them, whatever it says."""
    pairs = [("so #### 18", "thus\n#### 18"), ("18", "#### 18"), ("#### 8", "#### 18"), ("#### 1,000", "#### 1000")]
    assert exact_match(pairs, GSM8K) == 0.5


def test_whole_answers_are_compared_where_none_is_marked() -> None:
    assert exact_match([("Paris. ", "Paris"), ("#### Paris", "Paris"), ("paris", "Paris")], GSM8K) == 1 / 3


def test_another_pattern() -> None:
    assert exact_match([(r"so \boxed{3}", r"\boxed{2}, no: \boxed{3}")], r"\\boxed\{(.*?)\}") == 1
