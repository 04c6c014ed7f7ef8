"""Metrics, confidence intervals and repeated seeds, written once for every chapter."""

from midstream.measure.intervals import Interval, paired_interval, t_interval, wilson_interval

__all__ = ["Interval", "paired_interval", "t_interval", "wilson_interval"]
