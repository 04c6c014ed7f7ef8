"""Metrics that more than one chapter uses."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import roc_auc_score
from torch import Tensor


def accuracy(predicted: Tensor, gold: Tensor) -> float:
    """The share of equal entries of two vectors (n,)."""
    return float((predicted == gold).float().mean())


def top_jaccard(ours: Tensor, reference: Tensor, k: int) -> Tensor:
    """Jaccard overlap (n,) of the `k` highest-scored entries of each row; both (n, vocabulary)."""
    a, b = ours.topk(k).indices, reference.topk(k).indices  # (n, k)
    shared = (a[:, :, None] == b[:, None, :]).sum((1, 2)).float()
    return shared / (2 * k - shared)


def auc(scores: ArrayLike, positive: ArrayLike) -> float:
    """Area under the ROC curve of scores (n,) for a boolean target (n,); NaN when only one kind is there."""
    positive = np.asarray(positive, dtype=bool)
    if positive.all() or not positive.any():
        return float("nan")
    return float(roc_auc_score(positive, np.asarray(scores)))


def macro_auc(scores: ArrayLike, predicted: ArrayLike) -> float:
    """Mean one-against-the-rest AUC of scores (n, classes) for a class per row (n,).

    Classes that never or always occur have no AUC and are left out; NaN when none is left.
    """
    scores, predicted = np.asarray(scores), np.asarray(predicted)
    each = [auc(scores[:, c], predicted == c) for c in range(scores.shape[1])]
    known = [value for value in each if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
