"""Data sets of the hub, and folders that ``save_to_disk`` has written, through ``datasets``."""

from collections.abc import Mapping
from typing import Any

from qvtune.config.data import SourceSection
from qvtune.errors import UserError


def load_saved(source: SourceSection) -> Any:
    """The ``Dataset`` of a folder. Raises UserError where it cannot be read, or has no such split."""
    import datasets
    import pyarrow as pa

    try:
        found = datasets.load_from_disk(source.path)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise UserError(
            f"{source.path} cannot be read as a folder of save_to_disk ({_short(error)}); copy or make it again"
        ) from error
    if isinstance(found, datasets.DatasetDict):
        return _split_of(source, found)
    if source.split is not None:
        raise UserError(f"{source.path} has no splits; leave `split: {source.split}` out")
    return found


def load_hub(source: SourceSection) -> Any:
    """The ``Dataset``, or with ``streaming`` the ``IterableDataset``, of a hub id.

    Raises UserError where there is none, where it has no such configuration or split, or where the hub cannot be
    reached and the data set is not in the cache of ``datasets``.
    """
    import datasets

    try:
        found = datasets.load_dataset(
            source.path, source.name, split=source.split, revision=source.revision, streaming=source.streaming
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(_why_not(source, error)) from error
    return _split_of(source, found) if source.split is None else found


def identity(source: SourceSection, rows: Any) -> dict[str, Any]:
    """What determines the rows: the fingerprint of a ``Dataset``, or the commit that is streamed."""
    if not source.streaming:
        return {"fingerprint": rows._fingerprint}
    import datasets

    builder = datasets.load_dataset_builder(source.path, source.name, revision=source.revision)
    return {"commit": builder.hash, "name": builder.config.name, "split": source.split}


def _split_of(source: SourceSection, splits: Mapping[str, Any]) -> Any:
    if source.split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if source.split is None or source.split not in splits:
        found = "several splits" if source.split is None else f"no split {source.split!r}"
        raise UserError(f"{source.path} has {found}: there are {', '.join(splits)}; set `split` to one of them")
    return splits[source.split]


def _why_not(source: SourceSection, error: Exception) -> str:
    import datasets

    what = f"{source.path} is no file or folder here, and as a hub data set it cannot be loaded: {_short(error)}."
    if not datasets.config.HF_HUB_OFFLINE and not isinstance(error, ConnectionError):
        return what
    state = "HF_HUB_OFFLINE is set" if datasets.config.HF_HUB_OFFLINE else "the hub was not reached"
    return (
        f"{what} ({state}, and it is not in the cache {datasets.config.HF_DATASETS_CACHE}: load it once where the hub "
        "can be reached, with the same HF_HOME, or give its files)"
    )


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
