"""The interface of a task. Nobody outside this package asks which task a run has; they call these."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import nn

from qvtune.config.data import LossOn
from qvtune.data.batch import Batch
from qvtune.data.mixture import Rows
from qvtune.data.packing import PackedRow
from qvtune.data.rows import BadRowError, Row
from qvtune.data.tokenize import Document
from qvtune.model.head import HeadSettings
from qvtune.tasks.metrics import Documents


@runtime_checkable
class Task(Protocol):
    """All that differs between tasks.

    Attributes:
        name: as in ``task: NAME`` of a recipe, and of the module that defines the task.
        cache_key: everything of the task that decides tokens and labels of a row.
        truncates: whether what ``tokenize`` returns depends on ``max_length``.
        needs_labels: whether ``classification.labels`` must be completed by ``labels_of`` before rows are tokenized.
        peft_task_type: PEFT's TaskType, which is saved in adapter_config.json.
        metric: the key of ``evaluate`` that decides which checkpoint is the best.
        higher_is_better: whether a larger value of ``metric`` is better.
    """

    name: str
    cache_key: str
    truncates: bool
    needs_labels: bool
    peft_task_type: str
    metric: str
    higher_is_better: bool

    @abstractmethod
    def labels_of(self, rows: Iterable[Row]) -> tuple[str, ...]:
        """The labels of training rows; the same on all ranks. Raises UserError where they cannot be those of a task."""

    @abstractmethod
    def head(self, seed: int, rows: Rows | None = None) -> HeadSettings | None:
        """The head that the model gets, new values from ``seed`` and training ``rows``; None where it has its own."""

    @abstractmethod
    def model_problems(self, config: Any, max_length: int) -> list[str]:
        """Why a model of this transformers configuration cannot be trained for the task on rows of ``max_length``
        tokens; empty when it can."""

    @abstractmethod
    def tokenize(
        self, rows: Sequence[Row], tokenizer: Any, loss_on: LossOn, max_length: int
    ) -> list[list[Document] | BadRowError]:
        """Tokens and labels of the documents of each row; BadRowError for a row that cannot be used.

        What is longer than ``max_length`` tokens is treated as ``data.on_long_row`` says afterwards, unless the task
        truncates it in a better place.
        Raises UserError where tokenizer, ``data.loss_on`` and rows do not go together.
        """

    @abstractmethod
    def label_of(self, row: PackedRow, document: int) -> str | None:
        """The label of a document as a person reads it; None where tokens have labels."""

    @abstractmethod
    def collate(self, rows: Sequence[PackedRow], pad_token_id: int) -> Batch:
        """Packed rows -> one micro-batch, whose ``labels[b, t]`` is what position t has to predict."""

    @abstractmethod
    def objective(self, model: nn.Module) -> nn.Module:
        """The module that DeepSpeed runs, around the model with its adapters: Batch -> loss.

        The loss is an fp32 scalar, summed over all labels; the loop divides it by their number over all
        micro-batches and ranks. With ``return_hidden_states=True`` the last hidden states [B, T, D] instead.
        """

    @abstractmethod
    def evaluate(self, engine: Any, batches: Iterable[Batch], documents: Documents | None = None) -> dict[str, float]:
        """Metric name -> value over the batches of all ranks; ``loss`` is always among them. Collective.

        ``batches`` are those of this rank, equally many on every rank (the last may have no labels). Where
        ``documents`` is given, it gets arrays over all documents of all ranks that have a label, in the order of the
        rows: ``loss`` (as the objective's, float64, summed over the document's labels), ``tokens`` (number of these
        labels), and where there is one label for a document ``prediction`` and ``label`` (class or score).
        """
