"""The label of a document as the int32 that the token cache has for it: the index of a class, or a score's bits."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from qvtune.data.rows import BadRowError


def encode_class(label: str, names: Sequence[str]) -> int:
    """Index of a class. Raises BadRowError for one that is not among ``names``."""
    if label not in names:
        raise BadRowError(
            f"the label {label!r} is none of the {len(names)} labels of the run ({', '.join(names)}), which are those "
            "of classification.labels or of the training rows"
        )
    return list(names).index(label)


def encode_score(label: str) -> int:
    """The bits of a float32. No number has those of IGNORE_INDEX, which are a NaN's. Raises BadRowError for others."""
    try:
        score = np.float32(float(label))
    except ValueError as error:
        raise BadRowError(f"the label {label!r} is no number (classification.problem: regression)") from error
    if not math.isfinite(score):
        raise BadRowError(f"the label {label!r} is no finite float32")
    return int(score.view(np.int32))


def decode_scores(encoded: torch.Tensor) -> torch.Tensor:
    """fp32 scores from integers of any width."""
    return encoded.to(torch.int32).view(torch.float32)


def mean_score(encoded: NDArray[np.int32]) -> float:
    """Of all scores, in float64."""
    return float(encoded.view(np.float32).astype(np.float64).mean())


def sorted_labels(found: set[str]) -> tuple[str, ...]:
    """Numbers in their order, else text in that of its code points: the same whatever the order of the rows."""
    try:
        return tuple(sorted(found, key=lambda label: (int(label), label)))
    except ValueError:
        return tuple(sorted(found))
