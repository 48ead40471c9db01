"""The eight tasks of GLUE (arXiv 1804.07461): columns, label names, metric and files of each."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

GlueName = Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"]
HUB_ID = "nyu-mll/glue"
BY_NAME = "glue/"  # glue/sst2 as the path of a source
MATCHED, MISMATCHED = "matched", "mismatched"  # MNLI's two evaluation sets


@dataclass(frozen=True)
class GlueTask:
    """One task.

    Attributes:
        texts: columns of the text, or of both texts of a pair, on the hub; the label is in ``label`` there.
        labels: names of the classes in the order of their numbers; empty where the label is a number (regression).
        metric: the one that decides which checkpoint is the best: the first of those that GLUE reports.
        tsv: columns of the texts and of the label in the official TSV files, where they differ from the hub's.
        without_header: the same as numbers from 1, where the official files have no header.
        only_here: columns that no other data set has: a TSV file with all of them is one of the task's.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...] = ()
    metric: str = "accuracy"
    tsv: tuple[str, ...] = ()
    without_header: tuple[int, ...] = ()
    only_here: frozenset[str] = frozenset()

    @property
    def layouts(self) -> list[tuple[str, ...]]:
        """Columns of texts and label that a row may have: the official file's, the hub's, or this project's."""
        own = ("text", "text_pair")[: len(self.texts)]
        return [layout for layout in (self.tsv, (*self.texts, "label"), (*own, "label")) if layout]


_PAIR = ("sentence1", "sentence2")
GLUE: dict[str, GlueTask] = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), "matthews", without_header=(4, 2)),
    "sst2": GlueTask(("sentence",), ("negative", "positive")),
    "mrpc": GlueTask(
        _PAIR,
        ("not_equivalent", "equivalent"),
        tsv=("#1 String", "#2 String", "Quality"),
        only_here=frozenset({"#1 String", "#2 String"}),
    ),
    "stsb": GlueTask(
        _PAIR, (), "pearson", tsv=(*_PAIR, "score"), only_here=frozenset({*_PAIR, "old_index", "source1", "source2"})
    ),
    "qqp": GlueTask(
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        tsv=("question1", "question2", "is_duplicate"),
        only_here=frozenset({"qid1", "qid2", "question1", "question2", "is_duplicate"}),
    ),
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        tsv=(*_PAIR, "gold_label"),
        only_here=frozenset({*_PAIR, "promptID", "pairID", "genre", "sentence1_parse"}),
    ),
    "qnli": GlueTask(("question", "sentence"), ("entailment", "not_entailment")),
    "rte": GlueTask(_PAIR, ("entailment", "not_entailment")),
}
_FILES = {
    "train": "train.tsv",
    "validation": "dev.tsv",
    f"validation_{MATCHED}": f"dev_{MATCHED}.tsv",
    f"validation_{MISMATCHED}": f"dev_{MISMATCHED}.tsv",
}


def task_in(path: str) -> str | None:
    """The task that ``glue/NAME`` names; None for another path."""
    name = path.removeprefix(BY_NAME)
    return name if name != path and name in GLUE else None


def official_file(folder: Path, split: str | None) -> Path | None:
    """The file of a split in a task's folder as GLUE publishes it; None where there is none."""
    file = folder / _FILES[split] if split in _FILES else None
    return file if file is not None and file.is_file() else None


def is_official(folder: Path) -> bool:
    """Whether a folder has files as GLUE publishes them."""
    return any(official_file(folder, split) for split in _FILES)
