"""Metrics, confidence intervals and repeated seeds, written once for every chapter."""

from midstream.measure.intervals import Interval, paired_interval, t_interval, wilson_interval
from midstream.measure.metrics import accuracy, auc, macro_auc, top_jaccard

__all__ = [
    "Interval",
    "accuracy",
    "auc",
    "macro_auc",
    "paired_interval",
    "t_interval",
    "top_jaccard",
    "wilson_interval",
]
