"""Midstream: papers on what happens between a model's layers and along its tokens, as a book that runs."""

__version__ = "0.1.0"
