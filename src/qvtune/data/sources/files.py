"""The files of a source: what a path, a folder or a pattern means, and which kind of file it is."""

import glob
import os
import re
from pathlib import Path

from qvtune.errors import UserError

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".md": "text",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"  # in folders that save_to_disk of datasets has written
_TABLES = ("parquet", "arrow")  # compressed inside
_NOT_ROWS = re.compile(r"(readme|license|licence|changelog|dataset_infos?)\b.*", re.IGNORECASE)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_ADVICE = "Give a file, a folder, a pattern (`rows/*.jsonl`), a hub id (`owner/name`) or `demo`"
_REASONS = {
    ".zip": "an archive; unpack it and give the folder",
    ".tar": "an archive; unpack it and give the folder",
    ".tgz": "an archive; unpack it and give the folder",
    ".7z": "an archive; unpack it and give the folder",
    ".lz4": "compressed in a way that cannot be read here; compress it with gzip, bzip2, xz or zstd",
    ".pkl": "a pickle, which can run any code when it is opened; save it as Parquet",
    ".pt": "a pickle, which can run any code when it is opened; save it as Parquet",
    ".xlsx": "a spreadsheet; save it as CSV",
}


def is_hub_id(path: str) -> bool:
    """Whether ``path`` is nothing on this machine, and can be ``owner/name`` on the hub."""
    known = Path(path).suffix.lower() in (*KINDS, *COMPRESSED, *_REASONS)
    return bool(_HUB_ID.fullmatch(path)) and not known and not Path(path).exists()


def saved_folder(path: str) -> bool:
    """Whether ``save_to_disk`` of ``datasets`` has written this folder."""
    return any((Path(path) / name).is_file() for name in (SAVED, SAVED_SPLITS))


def find_files(path: str, split: str | None) -> tuple[tuple[Path, ...], str]:
    """The files of a path on this machine, in the order of their names, and their kind (a value of KINDS).

    ``split`` selects files of a folder by their names, as ``datasets`` does (``train-00000.parquet``, ``test/a.csv``).
    Raises UserError where there are none, or of several kinds.
    """
    place = Path(path)
    if "://" in path:
        raise UserError(f"{path} is an address on a network; download the files, or give a hub id (`owner/name`)")
    if place.is_dir():
        files = _of_folder(place, split)
    elif split is not None:
        raise UserError(f"`split: {split}` is for folders and hub ids, and {path} is neither; leave it out")
    elif glob.has_magic(path) and not place.exists():
        files = sorted(file for file in map(Path, glob.glob(path, recursive=True)) if file.is_file())
        if not files:
            raise UserError(f"no file matches {path}. {_ADVICE}.")
    else:
        files = [place]
    kinds = {file: kind_of(file) for file in files}
    if len(set(kinds.values())) > 1:
        firsts = {kind: file for file, kind in reversed(kinds.items())}
        listed = ", ".join(f"{file} is {kind}" for kind, file in sorted(firsts.items()))
        raise UserError(f"{path} has files of several kinds ({listed}); give a pattern that matches one kind")
    return tuple(files), kinds[files[0]]


def kind_of(file: Path) -> str:
    """A value of KINDS, by the file's name. Raises UserError for any other name, and where there is no such file."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSED
    last = (suffixes[-2:-1] if compressed else suffixes[-1:]) or [""]
    kind = KINDS.get(last[0])
    if not file.exists():
        raise UserError(f"cannot read {file}: No such file or directory. {_ADVICE}.")
    if kind is None or (compressed and kind in _TABLES):
        reason = _REASONS.get(last[0]) or (
            f"compressed {kind}; unpack it" if kind else f"of no known kind ({last[0]!r})"
        )
        raise UserError(
            f"{file} is {reason}. Files are told by their names: {', '.join(KINDS)}; text also compressed: "
            f"{', '.join(COMPRESSED)}."
        )
    return kind


def _of_folder(folder: Path, split: str | None) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if _is_data(file, folder))
    if not files:
        raise UserError(f"{folder} has no data: no file with one of the endings {', '.join(KINDS)}")
    splits = _splits(folder)
    if split is None and len(splits) < 2:
        return files
    if split not in splits:
        found = "several splits" if split is None else f"no split {split!r}"
        raise UserError(f"{folder} has {found}: its files are of {', '.join(splits)}; set `split`, or give a pattern")
    return [file for file in files if os.path.realpath(file) in splits[split]]


def _is_data(file: Path, folder: Path) -> bool:
    parts = file.relative_to(folder).parts
    hidden = any(part.startswith((".", "_")) for part in parts)
    suffixes = {suffix.lower() for suffix in file.suffixes[-2:]}
    return bool(suffixes & KINDS.keys()) and not hidden and not _NOT_ROWS.fullmatch(file.name) and file.is_file()


def _splits(folder: Path) -> dict[str, set[str]]:
    """Split -> files, by the rules of ``datasets`` for names of files and folders."""
    from datasets.data_files import DataFilesDict, get_data_patterns

    base = str(folder.absolute())
    found = DataFilesDict.from_patterns(get_data_patterns(base), base)
    return {str(split): {os.path.realpath(file) for file in files} for split, files in found.items()}
