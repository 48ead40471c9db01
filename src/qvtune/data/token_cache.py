"""Rows of a source -> tokenized documents on disk: made once, by several processes, and kept.

KEY/            documents-000000.arrow ... and documents.json: complete; KEY is a hash of all that decides the content
.KEY.partial/   the files that are finished so far; the next start goes on from there
.KEY.lock       there while a process works on KEY
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerBase

from qvtune.config.data import DataSection
from qvtune.console import console
from qvtune.data.chat import FIXED_DATE
from qvtune.data.chunk import Chunk, ChunkTokenizer, Found, RowTokenizer, chunks
from qvtune.data.documents import Counts, write_summary
from qvtune.data.encode import whole_texts
from qvtune.data.rows import MAX_PROBLEMS_SHOWN, BadRows
from qvtune.data.sources.source import Source
from qvtune.data.workers import Poll, available_cores, in_processes
from qvtune.errors import UserError
from qvtune.storage.atomic import publish
from qvtune.storage.lock import exclusive
from qvtune.storage.partial import DiskFullError

CACHE_VERSION = 7  # increment it when the same rows would give other tokens, labels, columns or chunks
_FULL = (errno.ENOSPC, errno.EDQUOT)


def tokenized(
    source: Source,
    config: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    task: RowTokenizer,
    cache_dir: Path,
    poll: Poll,
) -> Path:
    """The folder of a source's ``Documents``; made first, unless the same rows were tokenized in the same way before.

    Processes that want the same documents wait for the one that makes them. What is interrupted goes on at the next
    start; after a UserError nothing is left.

    Raises UserError for rows or a tokenizer that cannot be used, and whatever ``poll`` raises.
    """
    folder = cache_dir / _key(source, config, tokenizer, task)
    if not folder.is_dir():
        with exclusive(folder.with_name(f".{folder.name}.lock"), poll):
            if not folder.is_dir():
                _make(folder, source, config, tokenizer, task, poll)
    return folder


def _make(
    folder: Path,
    source: Source,
    config: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    task: RowTokenizer,
    poll: Poll,
) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    for unfinished in partial.glob(".*"):
        unfinished.unlink()
    try:
        loss_on = source.settings.loss_on or config.loss_on
        work = ChunkTokenizer(
            partial, source.settings.path, source.parser(), task, tokenizer, loss_on, config.max_length
        )
        found = _tokenize(source, config, work, poll)
        write_summary(partial, [one.num_documents for one in found], _counts(found, source, config))
        publish(partial, folder, if_taken="keep")
    except UserError:
        shutil.rmtree(partial)
        raise
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise DiskFullError(
            f"{error.strerror} in {folder.parent}; make room there and start again, which goes on where it was (the "
            "environment variable QVTUNE_CACHE names another folder)"
        ) from error


def _tokenize(source: Source, config: DataSection, work: ChunkTokenizer, poll: Poll) -> list[Found]:
    """What was found in every chunk, in order."""
    found: dict[int, Found] = {}
    only_read = False  # once rows are bad that may not be, all that matters is which others are

    def unfinished() -> Iterator[Chunk]:
        for chunk in chunks(source.records()):
            if (finished := work.finished(chunk)) is not None:
                found[chunk.number] = finished
            else:
                yield replace(chunk, tokenize=not only_read)

    with _progress() as progress:
        bar = progress.add_task(f"tokenizing {source.settings.path}", total=None)
        for one in in_processes(work, unfinished(), config.num_workers or available_cores(), poll):
            found[one.number] = one
            only_read |= config.on_bad_row == "error" and one.unreadable.count > 0
            progress.update(bar, completed=sum(one.num_rows for one in found.values()))
    return [found[number] for number in sorted(found)]


def _progress() -> Progress:
    shown = console()
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}: {task.completed:,.0f} rows"),
        TimeElapsedColumn(),
        console=shown,
        disable=not shown.is_terminal,
        transient=True,
    )


def _counts(found: Sequence[Found], source: Source, config: DataSection) -> Counts:
    """Numbers of all rows. Raises UserError where rows are bad that may not be, or none is good."""
    unreadable, refused = (
        _joined([getattr(one, name) for one in found], source, config) for name in ("unreadable", "refused")
    )
    num_rows = sum(one.num_rows for one in found)
    unreadable.check(num_rows)
    refused.check(num_rows - refused.count)
    return {
        "source_rows": num_rows - refused.count,
        "skipped": unreadable.count + refused.count,
        "skipped_by_reason": dict(unreadable.kinds + refused.kinds),
        "split": sum(one.num_divided for one in found),
    }


def _joined(parts: Sequence[BadRows], source: Source, config: DataSection) -> BadRows:
    joined = BadRows(source.settings.path, config.on_bad_row)
    for part in parts:
        joined.kinds += part.kinds
        joined.problems += part.problems[: MAX_PROBLEMS_SHOWN - len(joined.problems)]
    return joined


def _key(source: Source, config: DataSection, tokenizer: PreTrainedTokenizerBase, task: RowTokenizer) -> str:
    """Hash of everything that determines the documents."""
    parts = {
        "version": CACHE_VERSION,
        "task": task.cache_key,
        "max_length": config.max_length if task.truncates else None,
        "template_date": FIXED_DATE,
        "source": source.identity(),
        "loss_on": source.settings.loss_on or config.loss_on,
        "on_bad_row": config.on_bad_row,
        "tokenizer": whole_texts(tokenizer).to_str() if tokenizer.is_fast else tokenizer.get_vocab(),
        "tokenizer_class": type(tokenizer).__name__,
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
