"""Part: bridges between modalities."""
