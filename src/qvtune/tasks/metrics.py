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

Batches = Sequence[tuple[NDArray[np.float32], NDArray[Any]]]  # of each: logits [N, C], labels [N]


def in_order(own: Batches) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """All logits and labels in the order of the rows, on every rank. Collective.

    Ranks take turns in the order of rows, a batch at a time; hence the sums below do not depend on their number.
    """
    of_ranks: list[Batches] = process_group.all_gather_object(own)
    batches = [batch for batch in chain.from_iterable(zip_longest(*of_ranks)) if batch is not None]
    logits, labels = zip(*batches, strict=True)
    return np.concatenate(logits), np.concatenate(labels)


def class_metrics(logits: NDArray[np.float32], labels: NDArray[Any]) -> dict[str, float]:
    """``loss`` (mean cross entropy, nats), ``accuracy``, ``f1`` and ``matthews`` (Matthews' correlation).

    F1 is that of the second class where there are two, as GLUE has it, else the mean over the classes.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    exact = logits.astype(np.float64)
    at_label = exact[np.arange(len(labels)), labels]
    predicted = exact.argmax(axis=1)
    average = "binary" if logits.shape[1] == 2 else "macro"
    return {
        "loss": float((np.logaddexp.reduce(exact, axis=1) - at_label).mean()),
        "accuracy": float(accuracy_score(labels, predicted)),
        "f1": float(f1_score(labels, predicted, average=average, zero_division=0)),
        "matthews": float(matthews_corrcoef(labels, predicted)),
    }


def score_metrics(scores: NDArray[np.float32], labels: NDArray[Any]) -> dict[str, float]:
    """``loss`` (mean squared error), ``pearson`` and ``spearman``; a correlation with a constant is 0."""
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import mean_squared_error

    predicted, exact = scores.astype(np.float64), labels.astype(np.float64)
    is_constant = min(len(np.unique(predicted)), len(np.unique(exact))) < 2
    return {
        "loss": float(mean_squared_error(exact, predicted)),
        "pearson": 0.0 if is_constant else float(pearsonr(exact, predicted).statistic),
        "spearman": 0.0 if is_constant else float(spearmanr(exact, predicted).statistic),
    }
