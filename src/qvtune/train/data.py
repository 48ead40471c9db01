"""The data sets of a run: read, tokenized and described, in the same way for training and for a look at them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qvtune.config.data import SourceSection
from qvtune.config.schema import ModelSection, RunConfig
from qvtune.data.dataset import TokenRows, build_token_rows
from qvtune.data.mixture import JoinedRows, RowOrder, Rows
from qvtune.data.rows import BadRows, Row
from qvtune.data.sources.source import HUB, Source, open_source, read_rows
from qvtune.data.spans import documents_as_text
from qvtune.errors import UserError, naming_setting
from qvtune.model.source import model_folder
from qvtune.storage.paths import cache_dir
from qvtune.tasks import get_task
from qvtune.tasks.glue import glue_settings
from qvtune.tasks.task import Task
from qvtune.train.checks import Checks

Poll = Callable[[], None]
FindModel = Callable[[str, Path, str | None], Path | None]  # as ``model_folder``

TRAIN, EVAL = "data.train", "data.eval"
_SAMPLES, _SAMPLE_DOCUMENTS, _SAMPLE_CHARACTERS = 2, 8, 2000  # rows; documents of each; characters of each
BASE = "model.name_or_path"


@dataclass(frozen=True)
class RunData:
    """Task, tokenizer and rows by setting of a run: ``data.train``, and those of ``data_sets`` for evaluation."""

    task: Task
    tokenizer: Any
    rows: dict[str, Rows]


def load_data(config: RunConfig) -> RunData:
    """Tokenizer and rows of a run, checked as ``preflight`` checks them, without anything else of the run.

    Raises UserError with every problem of tokenizer and data together.
    """
    checks = Checks()
    config = with_labels(config, checks)
    folder = find_base(config, checks)
    tokenizer = None if folder is None else checks.run(partial(load_tokenizer, folder, config.model))
    rows = token_rows(config, tokenizer, checks)
    checks.raise_all()
    return RunData(get_task(config.task, config.classification), tokenizer, rows)


def find_base(config: RunConfig, checks: Checks, find_model: FindModel = model_folder) -> Path | None:
    """The folder of the base model; None where there is none, or where that is a problem."""
    find = naming_setting(BASE)(find_model)
    return checks.run_once_per_host(lambda: find(config.model.name_or_path, cache_dir(), config.model.revision))


def load_tokenizer(folder: Path, model: ModelSection) -> Any:
    """The tokenizer of the base model in ``folder``. Raises UserError where there is none that can be loaded."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UserError(f"{folder}: no tokenizer that can be loaded ({error})", setting=BASE) from error


def with_labels(config: RunConfig, checks: Checks) -> RunConfig:
    """The configuration with the labels of the training rows, where the task needs labels and none are named.

    Those of a task of GLUE are known, and so are its problem and metric. For others rank 0 reads the rows. Where they
    cannot be used, which is a problem found, it is the configuration as it is.
    """
    names = checks.run_on_main(partial(_glue_tasks, config)) or set()
    if len(names) == 1:
        known = checks.run(partial(glue_settings, config.classification, *names))
        config = config.model_copy(update={"classification": known or config.classification})
    task = get_task(config.task, config.classification)
    labels = checks.run_on_main(partial(_labels, task, config)) if task.needs_labels else None
    if labels is None:
        return config
    return config.model_copy(update={"classification": config.classification.model_copy(update={"labels": labels})})


def _labels(task: Task, config: RunConfig) -> tuple[str, ...]:
    with naming_setting(TRAIN):
        return task.labels_of(_training_rows(config))


def _glue_tasks(config: RunConfig) -> set[str]:
    """The tasks of GLUE among the training sources."""
    with naming_setting(TRAIN):
        tasks = {open_source(source).settings.glue for source in config.data.train_sources}
    return {name for name in tasks if name is not None}


def _training_rows(config: RunConfig) -> Iterator[Row]:
    for source in config.data.train_sources:
        yield from _checked_rows(open_source(source), config)


def count_training_rows(config: RunConfig) -> int:
    """Good rows of ``data.train``, read without being tokenized. Raises UserError where rows are bad."""
    with naming_setting(TRAIN):
        return sum(1 for _ in _training_rows(config))


def token_rows(
    config: RunConfig, tokenizer: Any, checks: Checks, poll: Poll = lambda: None, poll_alone: Poll = lambda: None
) -> dict[str, Rows]:
    """Setting -> its rows, without those that are a problem.

    Without a tokenizer, or the labels that a task needs, rows are only read: they can be bad.

    ``poll``, ``poll_alone``: as those of ``preflight``.
    """
    found: dict[str, Rows] = {}
    only_read = tokenizer is None or get_task(config.task, config.classification).needs_labels
    for setting, sources in data_sets(config).items():
        parts = []
        for source in sources:
            poll()
            if only_read:
                checks.run(partial(check_rows, setting, source, config))
            else:
                parts.append(
                    checks.run_once_per_host(partial(_token_rows, setting, source, config, tokenizer, poll_alone))
                )
        complete = [part for part in parts if part is not None]
        if len(complete) == len(sources):
            found[setting] = complete[0] if len(sources) == 1 else JoinedRows(complete, config.data.max_length)
    return found


def data_sets(config: RunConfig) -> dict[str, tuple[SourceSection, ...]]:
    """Setting -> sources of each data set of the run; evaluation sets that have names are ``data.eval.NAME``."""
    sets = config.data.eval_sets
    named = isinstance(config.data.eval, dict) or len(sets) > 1
    return {
        TRAIN: config.data.train_sources,
        **{f"{EVAL}.{name}" if named else EVAL: one for name, one in sets.items()},
    }


def eval_sets(config: RunConfig, rows: Mapping[str, Rows]) -> dict[str, Rows]:
    """Name -> rows of each evaluation set; one without a name is called ``eval``."""
    settings = [setting for setting in data_sets(config) if setting != TRAIN]
    return {name: rows[setting] for name, setting in zip(config.data.eval_sets, settings, strict=True)}


def check_rows(setting: str, source: SourceSection, config: RunConfig, max_rows: int | None = None) -> None:
    """Read a source, or its first rows, without tokenizing it. Raises UserError where rows are bad.

    For its first rows a data set of the hub is not downloaded: it is not checked then.
    """
    with naming_setting(setting):
        opened = open_source(source)
        if max_rows is not None and opened.kind == HUB:
            return
        for _ in _checked_rows(opened, config, max_rows):
            pass


def _checked_rows(source: Source, config: RunConfig, max_rows: int | None = None) -> Iterator[Row]:
    """The good rows of a source, or of its first ``max_rows`` records. Raises UserError at their end for bad ones."""
    bad, num_good = BadRows(source.settings.path, config.data.on_bad_row), 0
    for row in read_rows(source, bad, max_rows=max_rows):
        num_good += 1
        yield row
    bad.check(num_good)


def row_order(config: RunConfig, rows: Rows) -> RowOrder:
    """The order in which the run visits the rows of ``data.train``."""
    weights = [source.weight for source in config.data.train_sources if source.weight is not None]
    return RowOrder([len(part) for part in _parts(rows)], weights, config.train.seed)


def max_steps(config: RunConfig, num_rows: int) -> int:
    """Optimizer steps of the run. An epoch has ``num_rows``, as many as all sources together."""
    train = config.train
    if train.max_steps is not None:
        return train.max_steps
    assert train.epochs is not None
    return max(1, math.ceil(train.epochs * num_rows / train.global_batch_size))


def data_statistics(config: RunConfig, rows: Mapping[str, Rows]) -> dict[str, Any]:
    """Setting -> source and ``Statistics`` of its rows, as plain JSON values: the content of ``run_dir/data.json``.

    Where there are several sources, their own are under ``sources``. ``passes``: how often the run visits all rows of a
    source.
    """
    found = {}
    for setting, sources in data_sets(config).items():
        if setting not in rows:
            continue
        of_sources = zip(sources, _parts(rows[setting]), strict=True)
        parts = [{"source": source.path, **part.statistics} for source, part in of_sources]
        if setting == TRAIN:
            num_visited = max_steps(config, len(rows[TRAIN])) * config.train.global_batch_size
            passes = row_order(config, rows[TRAIN]).passes(num_visited)
            for source, part, value in zip(sources, parts, passes, strict=True):
                part |= {"passes": value} if source.weight is None else {"passes": value, "weight": source.weight}
        joined = {"source": [source.path for source in sources], **rows[setting].statistics, "sources": parts}
        found[setting] = parts[0] if len(parts) == 1 else joined
    return found


def sample_rows(config: RunConfig, rows: Rows, tokenizer: Any) -> list[list[dict[str, Any]]]:
    """The first rows of the training order as plain JSON values: a list of documents for each.

    A document has ``spans``, pairs of a text and whether it has labels, and ``label``, that of the document where it
    has one of its own. Long documents are cut.
    """
    task = get_task(config.task, config.classification)
    found = []
    for index in row_order(config, rows).of_step(0, min(_SAMPLES, len(rows))).tolist():
        documents = []
        for number, spans in enumerate(documents_as_text(rows[index], tokenizer)[:_SAMPLE_DOCUMENTS]):
            label, left, pairs = task.label_of(rows[index], number), _SAMPLE_CHARACTERS, []
            for span in spans:
                if left > 0:
                    text = span.text if len(span.text) <= left else span.text[:left] + " ..."
                    pairs.append([text, span.has_label and label is None])
                left -= len(span.text)
            documents.append({"spans": pairs, "label": label})
        found.append(documents)
    return found


def describe(statistics: Mapping[str, Any]) -> list[str]:
    """A data set in one line, and one for each of its sources where there are several."""
    text = "{documents} documents in {rows} rows, {tokens} tokens".format_map(statistics)
    reasons = ", ".join(f"{count} {reason}" for reason, count in statistics["skipped_by_reason"].items())
    for name, what in (
        ("skipped", f"bad rows skipped (data.on_bad_row): {reasons}"),
        ("split", "conversations divided into one document per answer: the chat template changes earlier turns"),
        ("truncated", "documents truncated to data.max_length"),
        ("long_split", "documents divided: longer than data.max_length"),
        ("long_dropped", "documents left out: longer than data.max_length (data.on_long_row)"),
        ("dropped", "documents dropped: no label token within data.max_length"),
    ):
        text += f"; {statistics[name]} {what}" if statistics[name] else ""
    lines = [text]
    for one in statistics.get("sources", ()):
        lines.append(f"  {one['source']}: {one['rows']} rows")
        lines[-1] += f", weight {one['weight']:g}" if "weight" in one else ""
        lines[-1] += f", {one['passes']:.2f} passes" if "passes" in one else ""
    return lines


def places_of_row(config: RunConfig, rows: Rows, row: int) -> list[str]:
    """Source and number, from 1, of each row of ``data.train`` that a packed row has a part of.

    It is the number of a document where rows of the source were skipped, or divided into several documents.
    """
    first, found = 0, []
    numbers = list(dict.fromkeys(rows.documents(row).tolist()))
    for source, part in zip(config.data.train_sources, _parts(rows), strict=True):
        end = first + part.num_documents
        kind = "document" if part.statistics["skipped"] or part.statistics["split"] else "row"
        found += [f"{source.path}, {kind} {number - first + 1}" for number in numbers if first <= number < end]
        first = end
    return found


def _parts(rows: Rows) -> Sequence[Rows]:
    """Of each source."""
    return rows.sources if isinstance(rows, JoinedRows) else [rows]


def _token_rows(setting: str, source: SourceSection, config: RunConfig, tokenizer: Any, poll: Poll) -> TokenRows:
    task = get_task(config.task, config.classification)
    with naming_setting(setting):
        return build_token_rows(source, config.data, tokenizer, task, cache_dir() / "tokens", poll)
