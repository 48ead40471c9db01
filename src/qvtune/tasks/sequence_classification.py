"""Sequence classification: a class, or a number, for a text or a pair of texts.

Shape suffixes: B rows, T positions, N documents with a label of the batch, D hidden size, C outputs of the head.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from qvtune.config.data import LossOn
from qvtune.config.schema import ClassificationSection
from qvtune.data import IGNORE_INDEX
from qvtune.data.batch import Batch, collate, padding_token
from qvtune.data.mixture import Rows
from qvtune.data.packing import PackedRow
from qvtune.data.rows import BadRowError, LabelledRow, Row
from qvtune.data.tokenize import Document
from qvtune.errors import UserError
from qvtune.model.adapters import transformers_model
from qvtune.model.families import FAMILIES, family_of
from qvtune.model.head import HeadSettings, head_path
from qvtune.model.varlen import VARLEN
from qvtune.tasks.labels import decode_scores, encode_class, encode_score, mean_score, sorted_labels
from qvtune.tasks.metrics import Documents, class_documents, class_metrics, in_order, score_documents, score_metrics
from qvtune.tasks.task import Task

_MANY_LABELS = 1000  # more classes than this are most likely numbers


class SequenceClassification(Task):
    """Mean cross entropy, or squared error, of the documents; the head is transformers' own."""

    name = "sequence_classification"
    truncates = True
    peft_task_type = "SEQ_CLS"

    def __init__(self, settings: ClassificationSection) -> None:
        self.settings = settings
        self.is_regression = settings.problem == "regression"
        automatic = "pearson" if self.is_regression else "accuracy"
        self.metric = automatic if settings.metric == "auto" else settings.metric
        self.higher_is_better = self.metric != "loss"
        self.needs_labels = settings.labels is None and not self.is_regression
        self.cache_key = f"{self.name} {settings.problem} {settings.labels}"

    def labels_of(self, rows: Iterable[Row]) -> tuple[str, ...]:
        """As ``Task``; the labels are sorted, so that the order of the rows does not matter."""
        found = sorted_labels({row.label for row in rows if isinstance(row, LabelledRow)})
        if not 2 <= len(found) <= _MANY_LABELS:
            raise UserError(
                f"the training rows have {len(found)} different labels ({', '.join(found[:5])}, ...); classification "
                f"needs 2 to {_MANY_LABELS}. Name them in classification.labels, or set classification.problem: "
                "regression where they are numbers"
            )
        return found

    def head(self, seed: int, rows: Rows | None = None) -> HeadSettings:
        """As ``Task``; without labels, which are known after the rows have been read, one for two classes."""
        if not self.is_regression:
            return HeadSettings(self.settings.labels or ("0", "1"), seed)
        return HeadSettings(None, seed, None if rows is None else mean_score(_encoded_labels(rows)))

    def model_problems(self, config: Any, max_length: int) -> list[str]:
        """Encoders have learned positions up to a length."""
        family = FAMILIES[config.model_type]
        if not family.is_encoder:
            return []
        longest = config.max_position_embeddings - first_position(config)
        if max_length <= longest:
            return []
        return [
            f"data.max_length: {max_length} is more than the {longest} positions of the model; set at most {longest}"
        ]

    def tokenize(
        self, rows: Sequence[Row], tokenizer: Any, loss_on: LossOn, max_length: int
    ) -> list[list[Document] | BadRowError]:
        """One document a row: the text, or the pair, with the tokenizer's special tokens, its label at the first token.

        A document of more than ``max_length`` tokens is truncated, a pair in its longer text.
        """
        if loss_on != "answers":
            raise UserError(f"loss_on: {loss_on} has no effect with task: {self.name}; leave it out")
        found: list[list[Document] | BadRowError] = []
        for row in rows:
            try:
                found.append([self._document(row, tokenizer, max_length)])
            except BadRowError as reason:
                found.append(reason)
        return found

    def _document(self, row: Row, tokenizer: Any, max_length: int) -> Document:
        if not isinstance(row, LabelledRow):
            raise BadRowError(f"it has no label, as task: {self.name} needs (data.format: labelled)")
        if self.is_regression:
            label = encode_score(row.label)
        else:
            assert self.settings.labels is not None, "labels_of was not asked"
            label = encode_class(row.label, self.settings.labels)
        ids, types, truncated = _tokenize(row, tokenizer, max_length)
        return Document(ids, [label, *[IGNORE_INDEX] * (len(ids) - 1)], truncated, types)

    def label_of(self, row: PackedRow, document: int) -> str:
        """The name of the class, or the score."""
        label = torch.tensor(row.labels[row.document_lengths[:document].sum()])
        if self.is_regression:
            return f"{decode_scores(label).item():g}"
        assert self.settings.labels is not None, "labels_of was not asked"
        return self.settings.labels[int(label)]

    def collate(self, rows: Sequence[PackedRow], pad_token_id: int) -> Batch:
        """A document's label is at its first token."""
        return collate(rows, pad_token_id, shift=False)

    def objective(self, model: nn.Module) -> nn.Module:
        """Encoder or decoder, pooling, head and loss."""
        return ClassificationObjective(model, is_regression=self.is_regression)

    def evaluate(self, engine: Any, batches: Iterable[Batch], documents: Documents | None = None) -> dict[str, float]:
        """``loss``, and the metrics of ``class_metrics`` or ``score_metrics``, of all documents of all ranks."""
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for batch in batches:
            here = batch.to(engine.device)
            logits_NC = engine(here, return_logits=True)
            labels_N = decoded(labelled_documents(here)[1], is_regression=self.is_regression)
            found.append((logits_NC.cpu().numpy(), labels_N.cpu().numpy()))
        logits, labels = in_order(found)
        of_each = score_documents(logits[:, 0], labels) if self.is_regression else class_documents(logits, labels)
        if documents is not None:
            documents.update(of_each)
        return score_metrics(of_each) if self.is_regression else class_metrics(of_each, logits.shape[1])


def _tokenize(row: LabelledRow, tokenizer: Any, max_length: int) -> tuple[list[int], list[int], bool]:
    """Tokens, their types (empty where the model has none), and whether there were more of them.

    Padding tokens at the end of a text are left out: with a decoder transformers takes the last token that is none for
    the one that has seen the whole text. Raises BadRowError where nothing else is left.
    """
    encoded = tokenizer(row.text, row.text_pair, verbose=False)
    truncated = len(encoded["input_ids"]) > max_length
    if truncated:
        encoded = tokenizer(row.text, row.text_pair, verbose=False, truncation=True, max_length=max_length)
    ids: list[int] = encoded["input_ids"]
    length, padding = len(ids), padding_token(tokenizer)
    while length and ids[length - 1] == padding:
        length -= 1
    if not length:
        raise BadRowError("its text gives no tokens")
    return ids[:length], encoded.get("token_type_ids", [])[:length], truncated


def make_task(settings: ClassificationSection) -> Task:
    """The task with the settings of section ``classification``."""
    return SequenceClassification(settings)


class ClassificationObjective(nn.Module):
    """transformers' model for sequence classification on packed rows; build it after the base is filled.

    A decoder's document is seen whole by its last token, an encoder's is pooled at its first, where the special token
    is: as transformers does with one document a row.
    """

    def __init__(self, model: nn.Module, *, is_regression: bool) -> None:
        super().__init__()
        self.model = model
        self.is_regression = is_regression
        self._classifier = [transformers_model(model)]  # in a list: registered once, under ``model``
        self._is_encoder = family_of(self._classifier[0]).is_encoder

    def forward(self, batch: Batch, return_logits: bool = False, return_hidden_states: bool = False) -> torch.Tensor:
        """Sum over the documents of ``-log p(class)``, nats, or of squared errors: fp32 scalar, 0 where N is 0.

        With ``return_logits`` the fp32 logits [N, C], or scores [N, 1], of the labelled documents in their order; with
        ``return_hidden_states`` those before pooling, [B, T, D].
        """
        if return_hidden_states:
            return self._hidden(batch)
        positions_N, labels_N = labelled_documents(batch, at_end=not self._is_encoder)
        logits_NC = self._head(self._hidden(batch).flatten(0, 1).index_select(0, positions_N)).float()
        if return_logits:
            return logits_NC
        targets_N = decoded(labels_N, is_regression=self.is_regression)
        if self.is_regression:
            return mse_loss(logits_NC[:, 0], targets_N, reduction="sum")
        return cross_entropy(logits_NC, targets_N, reduction="sum")

    def _hidden(self, batch: Batch) -> torch.Tensor:
        """[B, T, D]. Isolation of documents: of a decoder as in task causal_lm.

        An encoder builds no mask of packed rows itself: it gets one, in the form that its attention takes; the flash
        kernels take cu_seqlens instead.
        """
        inner = self._classifier[0].base_model
        options: dict[str, Any] = {"position_ids": batch.position_ids, "attention_mask": None, "use_cache": False}
        if self._is_encoder:
            options["position_ids"] = batch.position_ids + first_position(inner.config)
            options["attention_mask"] = _document_mask(inner, batch)
            if inner.config.type_vocab_size > 1:
                options["token_type_ids"] = batch.token_type_ids
        hidden_BTD: torch.Tensor = inner(
            input_ids=batch.input_ids,
            cu_seq_lens_q=batch.cu_seqlens,
            cu_seq_lens_k=batch.cu_seqlens,
            max_length_q=batch.max_seqlen,
            max_length_k=batch.max_seqlen,
            **options,
        ).last_hidden_state
        return hidden_BTD

    def _head(self, pooled_ND: torch.Tensor) -> torch.Tensor:
        """transformers' modules between the pooled position and the logits; an encoder's take it from a row."""
        classifier = self._classifier[0]
        head = classifier.get_submodule(head_path(classifier))
        if not self._is_encoder:
            logits_NC: torch.Tensor = head(pooled_ND)
            return logits_NC
        pooler = getattr(classifier.base_model, "pooler", None)
        pooled_N1D = pooled_ND[:, None]
        logits_NC = head(pooled_N1D if pooler is None else classifier.dropout(pooler(pooled_N1D)))
        return logits_NC


def labelled_documents(batch: Batch, *, at_end: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each document with a label its first position (or last) in the flattened batch, and its label; int64 [N]."""
    starts_N = batch.label_positions
    labels_N = batch.labels.flatten().index_select(0, starts_N)
    if not at_end:
        return starts_N, labels_N
    ends = batch.cu_seqlens[1:].long()
    return ends.index_select(0, torch.searchsorted(ends, starts_N, right=True)) - 1, labels_N


def decoded(labels_N: torch.Tensor, *, is_regression: bool) -> torch.Tensor:
    """Classes as they are, int64; scores in fp32."""
    return decode_scores(labels_N) if is_regression else labels_N


def first_position(config: Any) -> int:
    """Position of an encoder's first token: RoBERTa's learned positions start after that of the padding."""
    return config.pad_token_id + 1 if FAMILIES[config.model_type].positions_after_padding else 0


def _document_mask(inner: Any, batch: Batch) -> Any:
    """Each token sees those of its document, before and behind it; None where the attention takes ``cu_seqlens``."""
    from transformers.masking_utils import (
        create_bidirectional_mask,
        find_packed_sequence_indices,
        packed_sequence_mask_function,
    )

    if inner.config._attn_implementation == VARLEN:
        return None
    document_BT = find_packed_sequence_indices(batch.position_ids)
    like_BT0 = torch.empty(*batch.input_ids.shape, 0, dtype=inner.dtype, device=batch.input_ids.device)
    mask: Any = create_bidirectional_mask(
        inner.config,
        like_BT0,
        attention_mask=None,
        and_mask_function=None if document_BT is None else packed_sequence_mask_function(document_BT),
    )
    return mask


def _encoded_labels(rows: Rows) -> np.ndarray:
    labels = np.concatenate([rows[index].labels for index in range(len(rows))])
    encoded: np.ndarray = labels[labels != IGNORE_INDEX]
    return encoded
