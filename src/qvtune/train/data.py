"""The data sets of a run: read, tokenized and described, in the same way for training and for a look at them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qvtune.config.data import DataSection, SourceSection
from qvtune.config.schema import ModelSection, RunConfig
from qvtune.data.dataset import TokenRows, build_token_rows
from qvtune.data.rows import BadRows, Row
from qvtune.data.sources.source import HUB, open_source, read_rows
from qvtune.errors import UserError, naming_setting
from qvtune.model.source import model_folder
from qvtune.storage.paths import cache_dir
from qvtune.tasks import get_task
from qvtune.tasks.task import Task
from qvtune.train.checks import Checks

Poll = Callable[[], None]
FindModel = Callable[[str, Path, str | None], Path | None]  # as ``model_folder``

TRAIN, EVAL = "data.train", "data.eval"
BASE = "model.name_or_path"


@dataclass(frozen=True)
class RunData:
    """The tokenizer of a run, and its rows by setting: ``data.train`` and, where it is set, ``data.eval``."""

    tokenizer: Any
    rows: dict[str, TokenRows]


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
    return RunData(tokenizer, rows)


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

    Rank 0 reads the rows. Where they cannot be used, which is a problem found, it is the configuration as it is.
    """
    task = get_task(config.task, config.classification)
    labels = checks.run_on_main(partial(_labels, task, config)) if task.needs_labels else None
    if labels is None:
        return config
    return config.model_copy(update={"classification": config.classification.model_copy(update={"labels": labels})})


def _labels(task: Task, config: RunConfig) -> tuple[str, ...]:
    with naming_setting(TRAIN):
        return task.labels_of(_training_rows(config))


def _training_rows(config: RunConfig) -> Iterator[Row]:
    for source in config.data.train_sources:
        bad = BadRows(source.path, config.data.on_bad_row)
        rows = list(read_rows(open_source(source), bad))
        bad.check(len(rows))
        yield from rows


def token_rows(
    config: RunConfig, tokenizer: Any, checks: Checks, poll: Poll = lambda: None, poll_alone: Poll = lambda: None
) -> dict[str, TokenRows]:
    """Setting -> its rows, without those that are a problem.

    Without a tokenizer, or the labels that a task needs, rows are only read: they can be bad.

    ``poll``, ``poll_alone``: as those of ``preflight``.
    """
    found: dict[str, TokenRows] = {}
    checks.run(partial(_refuse_what_has_no_effect, config.data))
    for setting, source in sources(config):
        poll()
        if tokenizer is None or get_task(config.task, config.classification).needs_labels:
            checks.run(partial(check_rows, setting, source, config))
            continue
        rows = checks.run_once_per_host(partial(_token_rows, setting, source, config, tokenizer, poll_alone))
        if rows is not None:
            found[setting] = rows
    return found


def sources(config: RunConfig) -> list[tuple[str, SourceSection]]:
    """Setting and value of each data set of the run."""
    first_of_eval = [sources[0] for sources in config.data.eval_sets.values()][:1]
    return [(TRAIN, config.data.train_sources[0]), *((EVAL, source) for source in first_of_eval)]


def _refuse_what_has_no_effect(data: DataSection) -> None:
    """Raises UserError with the settings of sources that nothing reads yet."""
    problems = []
    for setting, sets in ((TRAIN, {"": data.train_sources}), (EVAL, data.eval_sets)):
        if len(sets) > 1 or any(len(sources) > 1 for sources in sets.values()):
            problems.append(f"{setting}: several sources cannot be read yet; give one")
        for source in (source for sources in sets.values() for source in sources):
            if source.weight != 1:
                problems.append(f"{setting}: `weight` of a source has no effect yet; leave it out")
    if problems:
        raise UserError(problems)


def check_rows(setting: str, source: SourceSection, config: RunConfig, max_rows: int | None = None) -> None:
    """Read a data set, or its first rows, without tokenizing it. Raises UserError where rows are bad.

    For its first rows a data set of the hub is not downloaded: it is not checked then.
    """
    with naming_setting(setting):
        opened = open_source(source)
        if max_rows is not None and opened.kind == HUB:
            return
        bad = BadRows(source.path, config.data.on_bad_row)
        num_good = sum(1 for _ in read_rows(opened, bad, max_rows=max_rows))
        bad.check(num_good)


def data_statistics(config: RunConfig, rows: Mapping[str, TokenRows]) -> dict[str, Any]:
    """Setting -> source and ``Statistics`` of its rows, as plain JSON values: the content of ``run_dir/data.json``."""
    return {
        setting: {"source": source.path, **rows[setting].statistics}
        for setting, source in sources(config)
        if setting in rows
    }


def describe(statistics: Mapping[str, Any]) -> str:
    """A data set in one line."""
    text = "{documents} documents in {rows} rows, {tokens} tokens".format_map(statistics)
    reasons = ", ".join(f"{count} {reason}" for reason, count in statistics["skipped_by_reason"].items())
    for name, what in (
        ("skipped", f"bad rows skipped (data.on_bad_row): {reasons}"),
        ("split", "conversations divided into one document per answer: the chat template changes earlier turns"),
        ("truncated", "documents truncated to data.max_length"),
        ("dropped", "documents dropped: no label token within data.max_length"),
    ):
        text += f"; {statistics[name]} {what}" if statistics[name] else ""
    return text


def _token_rows(setting: str, source: SourceSection, config: RunConfig, tokenizer: Any, poll: Poll) -> TokenRows:
    task = get_task(config.task, config.classification)
    with naming_setting(setting):
        return build_token_rows(source, config.data, tokenizer, task, cache_dir() / "tokens", poll)
