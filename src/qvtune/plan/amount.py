"""How many optimizer steps and tokens a run has, as far as that is known before anything is tokenized."""

import math
from dataclasses import dataclass
from pathlib import Path

from qvtune.config.schema import RunConfig
from qvtune.errors import UserError
from qvtune.train.checks import Checks
from qvtune.train.data import TRAIN, load_tokenizer, max_steps, token_rows


@dataclass(frozen=True)
class Amount:
    """``steps`` of ``tokens_per_step`` tokens; None where the number of steps is not known. ``source`` says whence."""

    steps: int | None
    tokens_per_step: float
    source: str


class _NotTokenized(Exception):
    """The rows are in no cache."""


def amount_of(run: RunConfig, folder: Path, tokens: int | None) -> Amount:
    """From ``tokens`` of the data set, else from its rows in the cache of tokens, else from ``train.max_steps``.

    ``folder`` is that of the base, whose tokenizer is part of the key of the cache.
    """
    length, batch = run.data.max_length, run.train.global_batch_size
    if tokens is not None:
        return _amount(run, math.ceil(tokens / length), length, f"--tokens {tokens:,}, in full rows")
    cached = _cached_counts(run, folder)
    if cached is not None:
        rows, tokens = cached
        return _amount(run, rows, tokens / rows, f"{rows:,} rows of {TRAIN} with {tokens:,} tokens, in the cache")
    if run.train.max_steps is not None:
        return Amount(run.train.max_steps, batch * length, "train.max_steps, in full rows")
    return Amount(None, batch * length, f"{TRAIN} has not been tokenized here; give --tokens N")


def _amount(run: RunConfig, rows: int, tokens_per_row: float, source: str) -> Amount:
    return Amount(max_steps(run, rows), run.train.global_batch_size * tokens_per_row, source)


def _cached_counts(run: RunConfig, folder: Path) -> tuple[int, int] | None:
    """Rows and tokens of the training data, if it has been tokenized on this machine as the run would.

    Looked for only where the sources are files or folders here: nothing is fetched.
    """
    if not all(source.path == "demo" or Path(source.path).exists() for source in run.data.train_sources):
        return None

    def not_cached() -> None:
        raise _NotTokenized

    try:
        tokenizer = load_tokenizer(folder, run.model)
        train_only = run.model_copy(update={"data": run.data.model_copy(update={"eval": None})})
        rows = token_rows(train_only, tokenizer, Checks(), poll_alone=not_cached)
    except (_NotTokenized, UserError):  # a folder with only config.json, data that is elsewhere: not needed here
        return None
    if TRAIN not in rows:
        return None
    return len(rows[TRAIN]), int(rows[TRAIN].num_tokens.sum())
