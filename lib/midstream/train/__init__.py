"""The shared training loop, LoRA and distillation losses."""

from midstream.train.loop import Schedule, fit

__all__ = ["Schedule", "fit"]
