"""The fingerprint of a base: names, shapes, dtypes and checksums of its tensors, computed while they are read."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from qvtune.errors import UserError
from qvtune.model.head import is_head_tensor
from qvtune.model.shard import Placement
from qvtune.storage.atomic import atomic_file
from qvtune.storage.checksum import add_checksums, all_finite, partial_checksum
from qvtune.storage.safetensors import StoredTensor, TensorSource

Fingerprint = dict[str, str]  # tensor name -> "bfloat16[576, 192] 0123456789abcdef"
MANIFEST = "nf4_manifest.json"  # of a folder made by launch/quantize.py
_SHOWN = 10
_HALF = 2**32


class ContentChecksums:
    """Checksums of what a process has read of a model folder, tensor by tensor.

    Whoever reads adds what it is responsible for, once: of elements that several ranks read, one adds them. ``sums`` is
    the checksum so far by tensor name. Several threads may add different tensors.
    """

    def __init__(self, weights: TensorSource) -> None:
        self.weights = weights
        self.sums: dict[str, int] = {}
        self._not_finite: set[str] = set()

    def add(self, name: str, data: torch.Tensor, first: int = 0) -> None:
        """Add elements (1-D, of the stored dtype, or bytes as uint8), ``first`` being the position of the first."""
        part = partial_checksum(data, first * data.dtype.itemsize)
        self.sums[name] = add_checksums([self.sums.get(name, 0), part])
        if not all_finite(data):
            self._not_finite.add(name)

    @property
    def is_finite(self) -> bool:
        """Whether all that has been added here is finite."""
        return not self._not_finite

    def set_whole(self, name: str, data: torch.Tensor) -> None:
        """The whole tensor, whatever has been added of it before."""
        self.sums[name] = 0
        self.add(name, data)

    def describe(self, name: str) -> str:
        """The fingerprint's entry for a tensor that this process has added whole."""
        return _entry(self.weights[name], self.sums[name])

    def require_finite(self) -> None:
        """Raises UserError naming the tensors, of those added here, that hold NaN or infinite values."""
        _require_finite(self.weights, sorted(self._not_finite))

    def fingerprint(self, placement: Placement) -> Fingerprint:
        """The fingerprint of all that the ranks have added; collective.

        Raises UserError, on all ranks, naming every tensor with values that are not finite.
        """
        names = sorted(self.weights)
        own = torch.tensor(
            [[*divmod(self.sums.get(name, 0), _HALF), name in self._not_finite] for name in names],
            dtype=torch.int64,
        )
        parts = torch.stack(placement.all_gather(own.flatten())).view(-1, len(names), 3)
        flags = parts[:, :, 2].sum(0).tolist()
        _require_finite(self.weights, [name for name, flag in zip(names, flags, strict=True) if flag])
        sums = [
            add_checksums([high * _HALF + low for high, low in of_ranks.tolist()])
            for of_ranks in parts[:, :, :2].unbind(1)
        ]
        found = {name: _entry(self.weights[name], total) for name, total in zip(names, sums, strict=True)}
        return _of_source(self.weights.folder / MANIFEST, found)


def _require_finite(weights: TensorSource, bad: Sequence[str]) -> None:
    if bad:
        raise UserError([f"{weights.folder}: tensor {name!r} holds NaN or infinite values" for name in bad])


def _entry(tensor: StoredTensor, checksum: int) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} {checksum:016x}"


def _of_source(manifest: Path, found: Fingerprint) -> Fingerprint:
    """The fingerprint of a folder made by launch/quantize.py is that of its source, if its own content is intact."""
    if not manifest.exists():
        return found
    recorded = json.loads(manifest.read_text(encoding="utf-8"))
    advice = "the folder is damaged; delete it and make it again with launch/quantize.py"
    require_same(recorded["tensors"], found, str(manifest.parent), advice, same_heads=False)
    source: Fingerprint = recorded["source"]
    return source


def require_same(expected: Fingerprint, found: Fingerprint, what: str, advice: str, *, same_heads: bool = True) -> None:
    """Raises UserError naming the tensors that differ; ``what`` is compared, ``advice`` says what to do.

    Without ``same_heads`` the tensors of a head may be in one of the two alone: training with a head of its own reads
    the rest.
    """
    one_sided = set() if same_heads else {name for name in expected.keys() ^ found.keys() if is_head_tensor(name)}
    names = sorted((expected.keys() | found.keys()) - one_sided)
    differing = [name for name in names if expected.get(name) != found.get(name)]
    if differing:
        problems = [
            f"{what}: tensor {name!r} is {found.get(name, 'missing')}, expected {expected.get(name, 'none')}"
            for name in differing[:_SHOWN]
        ]
        more = f"{len(differing) - _SHOWN} more tensors differ; " if len(differing) > _SHOWN else ""
        raise UserError([*problems, more + advice])


def require_unchanged(weights: TensorSource, found: Fingerprint, records: Path) -> None:
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
            require_same(record["tensors"], found, str(folder), advice, same_heads=False)
            if found.keys() <= record["tensors"].keys():
                return
            found = record["tensors"] | found
    records.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as private:
        private.write_text(json.dumps({"folder": str(folder), "files": files, "tensors": found}), encoding="utf-8")


def read(path: Path) -> Fingerprint:
    """A fingerprint from a JSON file."""
    stored: Fingerprint = json.loads(path.read_text(encoding="utf-8"))
    return stored
