"""What a proof is computed on: fixed prompts, and documents that the run was evaluated on."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvtune.data import IGNORE_INDEX
from qvtune.errors import UserError
from qvtune.storage.paths import cache_dir

if TYPE_CHECKING:
    from qvtune.config.data import SourceSection
    from qvtune.config.schema import RunConfig

PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Write a Python function that returns the n-th Fibonacci number, and explain how it works.",
    "Übersetze ins Englische: Der schnelle braune Fuchs springt über den faulen Hund.",
    "17 * 23 = 391, so 391 / 17 = 23. What is 24 * 24 - 1?",
    '{"name": "Ada", "born": 1815, "fields": ["mathematics", "computing"]} Describe this person in one sentence.',
    "Once upon a time, in a village at the foot of a mountain, there lived an old clockmaker who never slept.",
)
_DEFAULT_ROWS = 8


@dataclass(frozen=True)
class Text:
    """Token ids, and for each position the token that it has to predict (-100: none, no loss)."""

    ids: list[int]
    targets: list[int]

    @property
    def has_labels(self) -> bool:
        """Whether any position has a loss."""
        return any(target != IGNORE_INDEX for target in self.targets)


def fixed_prompts(tokenizer: Any) -> list[Text]:
    """``PROMPTS``, as a user's turn where the tokenizer has a chat template; no losses."""
    rows: list[list[int]] = []
    for prompt in PROMPTS:
        if tokenizer.chat_template:
            turn = [{"role": "user", "content": prompt}]
            encoded = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)
        else:
            encoded = tokenizer(prompt)
        rows.append(encoded["input_ids"])
    return [Text(ids, [IGNORE_INDEX] * len(ids)) for ids in rows]


def evaluation_rows(tokenizer: Any, checkpoint: Path | None, num_rows: int | None) -> list[Text]:
    """The first documents that the run was evaluated on, with the run's own mask of labels.

    ``num_rows`` None: 8, or none where ``checkpoint`` is not in a run folder (None: comes from elsewhere) or the data
    is gone.
    Raises UserError where rows are asked for and cannot be had.
    """
    config_file = checkpoint.parent.parent / "config.yaml" if checkpoint else Path("config.yaml of a run")
    run = _run_config(config_file) if checkpoint else None
    source = _evaluation_source(run)
    if run is None or source is None:
        if num_rows:
            raise UserError(
                f"--proof-rows {num_rows}: needs {config_file} with a data.eval that is still there; leave the option "
                "out to compare on the fixed prompts alone"
            )
        return []
    return list(islice(_documents(tokenizer, source, run), _DEFAULT_ROWS if num_rows is None else num_rows))


def _run_config(config_file: Path) -> "RunConfig | None":
    if not config_file.is_file():
        return None
    from qvtune.config.load import load_config

    return load_config(config_file)


def _evaluation_source(run: "RunConfig | None") -> "SourceSection | None":
    """The first source of ``data.eval`` where it is set and there; relative to the current folder, as in training."""
    if run is None or not run.data.eval_sets:
        return None
    from qvtune.data.sources.source import open_source

    source = next(iter(run.data.eval_sets.values()))[0]
    try:
        next(open_source(source).records(), None)
    except UserError:  # gone; the fixed prompts are enough
        return None
    return source


def _documents(tokenizer: Any, source: "SourceSection", run: "RunConfig") -> Iterator[Text]:
    import numpy as np

    from qvtune.data.dataset import build_token_rows
    from qvtune.tasks import get_task

    rows = build_token_rows(source, run.data, tokenizer, get_task(run.task, run.classification), cache_dir() / "tokens")
    for row in map(rows.__getitem__, range(len(rows))):
        ends = np.cumsum(row.document_lengths)[:-1]
        for ids, labels in zip(np.split(row.input_ids, ends), np.split(row.labels, ends), strict=True):
            yield Text(ids.tolist(), [*labels[1:].tolist(), IGNORE_INDEX])
