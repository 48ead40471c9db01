"""The checksum of a file, read from its content once and from a record as long as the file stays as it is."""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from qvtune.storage.atomic import atomic_file
from qvtune.storage.files import sha256

_SETTLED_SECONDS = 2.0  # time stamps of some file systems are that coarse


def recorded_sha256(path: Path, records: Path) -> str:
    """SHA-256 of a file's content in hexadecimal; ``records`` is the folder of the records.

    A record counts as long as device, inode, size and both time stamps of the file are those of then. None is made of a
    file that has changed in the last seconds: its next change might leave all of them as they are.
    """
    path = path.resolve()
    record = records / f"{hashlib.sha256(str(path).encode()).hexdigest()}.json"
    before = _state(path)
    if record.is_file():
        known = json.loads(record.read_text(encoding="utf-8"))
        if known["state"] == before:
            return str(known["sha256"])
    started = time.time()
    found = sha256(path)
    if _state(path) == before and started - max(before["mtime_ns"], before["ctime_ns"]) / 1e9 > _SETTLED_SECONDS:
        records.mkdir(parents=True, exist_ok=True)
        with atomic_file(record) as private:
            private.write_text(json.dumps({"path": str(path), "state": before, "sha256": found}), encoding="utf-8")
    return found


def _state(path: Path) -> dict[str, Any]:
    found = os.stat(path)
    return {
        "device": found.st_dev,
        "inode": found.st_ino,
        "size": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,
    }
