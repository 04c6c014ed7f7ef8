"""Part: distillation and transfer."""
