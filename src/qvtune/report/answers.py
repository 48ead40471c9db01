"""Answers of a model while it is trained, for the console."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

NUM_SHOWN = 3
_CHARACTERS = 300  # of a text


def answers_table(step: int, fields: Mapping[str, Any]) -> RenderableType:
    """The first answers of an event ``generation``, given by its fields, and a line about all of them."""
    answers: Sequence[Mapping[str, Any]] = fields["answers"]
    shown = answers[:NUM_SHOWN]
    columns = ["prompt", "answer", *(["expected"] if any(one["expected"] is not None for one in shown) else [])]
    table = Table(*(Column(name, overflow="fold") for name in columns), show_lines=True)
    for one in shown:
        table.add_row(*(_excerpt(one[column] or "") for column in columns))
    matches = f", exact_match {fields['exact_match']:.4f}" if "exact_match" in fields else ""
    more = f"; {NUM_SHOWN} of them:" if len(answers) > NUM_SHOWN else ""
    line = f"step {step}: generated {len(answers)} answers{matches} ({fields['seconds']:.1f} s){more}"
    return Group(Text(line), table)


def _excerpt(text: str) -> Text:
    return Text(text if len(text) <= _CHARACTERS else text[:_CHARACTERS] + " ...")
