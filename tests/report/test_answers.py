"""Answers on the console: the first ones, shortened, whatever characters they have."""

from io import StringIO
from typing import Any

from rich.console import Console

from qvtune.report.answers import NUM_SHOWN, answers_table


def shown(answers: list[dict[str, Any]], **fields: Any) -> str:
    console = Console(width=100, record=True, file=StringIO())
    console.print(answers_table(7, {"answers": answers, "seconds": 1.25, **fields}))
    return console.export_text()


def test_the_first_answers_beside_the_expected_ones() -> None:
    answers = [{"prompt": f"question {n}", "answer": f"answer [{n}]", "expected": f"#### {n}"} for n in range(9)]
    text = shown(answers, exact_match=0.25)
    assert f"step 7: generated 9 answers, exact_match 0.2500 (1.2 s); {NUM_SHOWN} of them:" in text
    for number in range(9):
        cells = (f"question {number}", f"answer [{number}]", f"#### {number}")
        assert all((cell in text) is (number < NUM_SHOWN) for cell in cells)


def test_without_expected_answers_there_is_no_column_for_them() -> None:
    text = shown([{"prompt": "question", "answer": "x" * 1000, "expected": None}])
    assert "step 7: generated 1 answers (1.2 s)\n" in text and "expected" not in text
    assert text.count("x") == 300
