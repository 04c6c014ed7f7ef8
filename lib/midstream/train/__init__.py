"""The shared training loop, LoRA and distillation losses."""

from midstream.train.distill import Traced, confidence, gradient_loss, gradients, patience_loss, soft_label_loss, trace
from midstream.train.loop import Schedule, fit

__all__ = [
    "Schedule",
    "Traced",
    "confidence",
    "fit",
    "gradient_loss",
    "gradients",
    "patience_loss",
    "soft_label_loss",
    "trace",
]
