"""Where things lie on this machine."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Things that can be made again (demo model, tokenized data): ``QVTUNE_CACHE``, else the user's cache folder."""
    if chosen := os.environ.get("QVTUNE_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qvtune"
