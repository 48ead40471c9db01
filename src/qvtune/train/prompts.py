"""The prompts that are answered while training, with the tokens that training has for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from qvtune.config.generate import GenerateSection
from qvtune.config.schema import RunConfig
from qvtune.data import IGNORE_INDEX
from qvtune.data.rows import BadRowError, BadRows, ChatRow, PlainTextRow, Row, TextRow
from qvtune.data.sources.source import open_source, read_rows
from qvtune.data.tokenize import tokenize_rows
from qvtune.errors import UserError, naming_setting
from qvtune.train.data import TRAIN, data_sets

GENERATE = "train.generate"
_NO_ANSWER = "."  # stands where the answer would be, and is left out again


@dataclass(frozen=True)
class Prompt:
    """Text (of a conversation its last message), tokens, and the expected answer; None where it is not known."""

    text: str
    ids: list[int]
    expected: str | None


def load_prompts(config: RunConfig, tokenizer: Any) -> list[Prompt]:
    """The prompts of ``train.generate``. Raises UserError where they, or the rows, cannot be read or have none."""
    settings = config.train.generate
    assert settings is not None
    if settings.rows is not None:
        rows, known = _first_rows(config, settings.rows), True
    else:
        rows, known = _rows_of_texts(prompt_texts(settings), config), False
    prompts, problems = [], []
    # Labels are on the last answer alone: all before it is the prompt, exactly as training has it.
    for row, documents in zip(rows, tokenize_rows(rows, tokenizer, "last_answer"), strict=True):
        if isinstance(documents, BadRowError):
            if not known:  # what is wrong with rows of data.eval is found where these are read
                problems.append(f"{row.place}: {documents}")
            continue
        if isinstance(row, TextRow) and not row.prompt.strip():
            problems.append(f"{row.place}: the prompt is empty")
            continue
        ids, labels = documents[-1].ids, documents[-1].labels
        start = next(place for place, label in enumerate(labels) if label != IGNORE_INDEX)
        answer = tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
        prompts.append(Prompt(_shown(row), ids[:start], answer if known else None))
    if not prompts and not problems:
        problems.append(f"none of the first {settings.rows} rows can be used")
    if problems:
        raise UserError(problems, GENERATE)
    return prompts


def prompt_texts(settings: GenerateSection) -> Sequence[str]:
    """Those of ``prompts``, or of ``file``; empty where the prompts are rows. Raises UserError for a bad file."""
    if settings.file is None:
        return settings.prompts or ()
    try:
        lines = Path(settings.file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{settings.file}: cannot be read as UTF-8 text ({error})", f"{GENERATE}.file") from error
    if not (texts := [line for line in lines if line.strip()]):
        raise UserError(f"{settings.file} has no prompts; it must have one per line", f"{GENERATE}.file")
    return texts


def _first_rows(config: RunConfig, count: int) -> list[Row]:
    """Good rows of the first set of ``data.eval``."""
    setting, sources = next(one for one in data_sets(config).items() if one[0] != TRAIN)
    with naming_setting(setting):
        every = chain.from_iterable(read_rows(open_source(one), BadRows(one.path, "skip")) for one in sources)
        rows = list(islice(every, count))
    if texts := [row.place for row in rows if isinstance(row, PlainTextRow)]:
        raise UserError(
            f"{texts[0]} is a row of text, in which there is no prompt; give train.generate.prompts", f"{GENERATE}.rows"
        )
    return rows


def _rows_of_texts(texts: Sequence[str], config: RunConfig) -> list[Row]:
    """Rows like the first one of ``data.train``."""
    source = config.data.train_sources[0]
    with naming_setting(TRAIN):
        first = next(read_rows(open_source(source), BadRows(source.path, "skip")), None)
    places = [f"prompt {number}" for number in range(1, len(texts) + 1)]
    if not isinstance(first, ChatRow):
        return [TextRow(place, text, _NO_ANSWER) for place, text in zip(places, texts, strict=True)]
    answer = {"role": "assistant", "content": _NO_ANSWER}
    return [
        ChatRow(place, ({"role": "user", "content": text}, answer)) for place, text in zip(places, texts, strict=True)
    ]


def _shown(row: Row) -> str:
    if isinstance(row, TextRow):
        return row.prompt
    assert isinstance(row, ChatRow)
    last = max(index for index, message in enumerate(row.messages) if message["role"] == "assistant")
    text: str = row.messages[last - 1]["content"]
    return text
