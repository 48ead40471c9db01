"""Where the rows of a source are."""

from pathlib import Path

from qvtune.config.data import SourceSection
from qvtune.embedded.data import demo_files
from qvtune.storage.paths import cache_dir


def source_file(source: SourceSection) -> Path:
    """The file of a source; that of ``demo`` is made on first use."""
    if source.path != "demo":
        return Path(source.path)
    train_file, eval_file = demo_files(cache_dir())
    return eval_file if source.split == "eval" else train_file
