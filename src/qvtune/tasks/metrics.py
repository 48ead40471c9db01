"""Metrics of classification and regression, by scikit-learn and SciPy, over the documents of all ranks.

They are computed from all predictions together, not averaged over batches or ranks, so they are what scikit-learn gives
for the whole set.
"""

from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvtune.distributed import process_group

Array = NDArray[Any]
Documents = dict[str, Array]  # of each document with a label: see ``Task.evaluate``


def in_order(own: Sequence[tuple[Array, ...]]) -> tuple[Array, ...]:
    """Arrays over documents, of each batch of this rank -> of all batches, in the order of the rows. Collective.

    Ranks take turns in the order of rows, a batch at a time; hence the sums below do not depend on their number.
    """
    of_ranks: list[Sequence[tuple[Array, ...]]] = process_group.all_gather_object(own)
    batches = [batch for batch in chain.from_iterable(zip_longest(*of_ranks)) if batch is not None]
    return tuple(map(np.concatenate, zip(*batches, strict=True)))


def class_documents(logits: NDArray[np.float32], labels: Array) -> Documents:
    """Cross entropy in nats and the class of the largest logit, from logits [N, C] and classes [N]."""
    exact = logits.astype(np.float64)
    loss = np.logaddexp.reduce(exact, axis=1) - exact[np.arange(len(labels)), labels]
    return {"loss": loss, "tokens": np.ones_like(labels), "prediction": exact.argmax(axis=1), "label": labels}


def score_documents(scores: NDArray[np.float32], labels: Array) -> Documents:
    """Squared error and score, from scores [N] and labels [N]."""
    predicted, exact = scores.astype(np.float64), labels.astype(np.float64)
    tokens = np.ones(len(labels), np.int64)
    return {"loss": np.square(exact - predicted), "tokens": tokens, "prediction": predicted, "label": exact}


def class_metrics(documents: Documents, num_classes: int) -> dict[str, float]:
    """``loss`` (mean cross entropy, nats), ``accuracy``, ``f1`` and ``matthews`` (Matthews' correlation).

    F1 is that of the second class where there are ``num_classes`` = 2, as GLUE has it, else the mean over the classes.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    predicted, labels = documents["prediction"], documents["label"]
    average = "binary" if num_classes == 2 else "macro"
    return {
        "loss": float(documents["loss"].mean()),
        "accuracy": float(accuracy_score(labels, predicted)),
        "f1": float(f1_score(labels, predicted, average=average, zero_division=0)),
        "matthews": float(matthews_corrcoef(labels, predicted)),
    }


def score_metrics(documents: Documents) -> dict[str, float]:
    """``loss`` (mean squared error), ``pearson`` and ``spearman``; a correlation with a constant is 0."""
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import mean_squared_error

    predicted, exact = documents["prediction"], documents["label"]
    is_constant = min(len(np.unique(predicted)), len(np.unique(exact))) < 2
    return {
        "loss": float(mean_squared_error(exact, predicted)),
        "pearson": 0.0 if is_constant else float(pearsonr(exact, predicted).statistic),
        "spearman": 0.0 if is_constant else float(spearmanr(exact, predicted).statistic),
    }
