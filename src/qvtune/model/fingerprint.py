"""What a base is: names, shapes, dtypes and content of its tensors, taken while they are read."""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qvtune.errors import UserError
from qvtune.storage.checksum import add_checksums
from qvtune.storage.safetensors import BaseWeights

if TYPE_CHECKING:  # its kernels take seconds to import, and merging often does without them
    from qvtune.model.nf4 import Gather

Fingerprint = dict[str, str]  # tensor name -> "bfloat16[576, 192] 0123456789abcdef"
MANIFEST = "nf4_manifest.json"  # of a folder made by launch/quantize.py
_SHOWN = 10
_HALF = 2**32


def content_of(weights: BaseWeights, gather: "Gather", device: torch.device) -> Fingerprint:
    """The fingerprint of all that the ranks have read together; collective.

    Raises UserError, on all ranks, naming every tensor with values that are not finite.
    """
    names = sorted(weights)
    own = torch.tensor(
        [[*divmod(weights.checksums.get(name, 0), _HALF), name in weights.not_finite] for name in names],
        dtype=torch.int64,
        device=device,
    )
    parts = torch.stack(gather(own.flatten())).view(-1, len(names), 3).cpu()
    bad = [name for name, flag in zip(names, parts[:, :, 2].sum(0).tolist(), strict=True) if flag]
    if bad:
        raise UserError([f"{weights.folder}: tensor {name!r} holds NaN or infinite values" for name in bad])
    checksums = [
        add_checksums([high * _HALF + low for high, low in rows.tolist()]) for rows in parts[:, :, :2].unbind(1)
    ]
    found = {name: describe(weights, name, checksum) for name, checksum in zip(names, checksums, strict=True)}
    return _of_source(weights.folder / MANIFEST, found)


def _of_source(manifest: Path, found: Fingerprint) -> Fingerprint:
    """A folder made by launch/quantize.py is known by what it was made from, when its own content is undamaged."""
    if not manifest.exists():
        return found
    recorded = json.loads(manifest.read_text(encoding="utf-8"))
    advice = "the folder is damaged; delete it and make it again with launch/quantize.py"
    require_same(recorded["tensors"], found, str(manifest.parent), advice)
    source: Fingerprint = recorded["source"]
    return source


def describe(weights: BaseWeights, name: str, checksum: int | None = None) -> str:
    """One tensor's entry; by default with the checksum of what this process has read of it."""
    tensor = weights[name]
    checksum = weights.checksums[name] if checksum is None else checksum
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} {checksum:016x}"


def require_same(expected: Fingerprint, found: Fingerprint, what: str, advice: str) -> None:
    """Raises UserError naming the tensors that differ; ``what`` is compared, ``advice`` says what to do."""
    differing = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    if differing:
        problems = [
            f"{what}: tensor {name!r} is {found.get(name, 'missing')}, expected {expected.get(name, 'none')}"
            for name in differing[:_SHOWN]
        ]
        more = f"{len(differing) - _SHOWN} more tensors differ; " if len(differing) > _SHOWN else ""
        raise UserError([*problems, more + advice])


def require_unchanged(weights: BaseWeights, found: Fingerprint, records: Path) -> None:
    """Compare a folder with what was read of it the first time, which is recorded in ``records``.

    Raises UserError naming the tensors whose bytes have changed since, in the files or on the way from them. Files that
    have taken the place of others (by their inodes) are a new base.
    """
    folder = weights.folder.resolve()
    path = records / f"{hashlib.sha256(str(folder).encode()).hexdigest()}.json"
    files = {str(file): file.stat().st_ino for file in weights.files()}
    if path.is_file():
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["files"] == files:
            advice = f"these bytes have changed since {folder} was read first; if they were meant to, delete {path}"
            require_same(record["tensors"], found, str(folder), advice)
            return
    records.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=records, suffix=".json", delete=False) as file:
        json.dump({"folder": str(folder), "files": files, "tensors": found}, file)
    os.replace(file.name, path)


def read(path: Path) -> Fingerprint:
    """A fingerprint from a JSON file."""
    stored: Fingerprint = json.loads(path.read_text(encoding="utf-8"))
    return stored
