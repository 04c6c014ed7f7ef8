"""Progress bars are for terminals: elsewhere they would fill logs and notebooks."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def bars_only_on_a_terminal() -> Iterator[None]:
    """Silence the progress bars of transformers and of the Hub's client where standard error is no terminal."""
    if sys.stderr.isatty():
        yield
        return
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    was_on, gguf_bar = logging.is_progress_bar_enabled(), gguf.tqdm
    logging.disable_progress_bar()
    gguf.tqdm = functools.partial(gguf_bar, disable=True)  # this one bar does not ask the setting
    try:
        yield
    finally:
        gguf.tqdm = gguf_bar
        if was_on:
            logging.enable_progress_bar()
