"""Pieces of generated pages: tables, badges and raw HTML inside Markdown."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], classes: str) -> str:
    """An HTML table in Markdown; with the class `stacked` a phone shows each row as a card."""
    return raw(bare_table(columns, rows, classes))


def bare_table(columns: Sequence[str], rows: Iterable[Sequence[str]], classes: str) -> str:
    """The same table as HTML alone."""
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    inner = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="{classes}">{inner}</table></div>'


def facts_table(facts: Iterable[tuple[str, str]]) -> str:
    """A table of labels and what belongs to them, as HTML."""
    rows = "".join(f'<tr><th scope="row">{label}</th><td>{text}</td></tr>' for label, text in facts)
    return raw(f'<table class="card-facts"><tbody>{rows}</tbody></table>')


def plot(figure: Figure, alt: str, caption: str = "") -> str:
    """A matplotlib figure as part of a page; it is closed."""
    import matplotlib.pyplot as plt

    data = io.BytesIO()
    figure.savefig(data, format="png", facecolor="white")
    plt.close(figure)
    code, width = base64.b64encode(data.getvalue()).decode(), round(figure.get_figwidth() * 100)
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    image = f'<img src="data:image/png;base64,{code}" alt="{html.escape(alt)}" style="width:{width}px;max-width:100%">'
    return raw(f'<figure class="midstream">{image}{below}</figure>')


def picture(pixels: np.ndarray, alt: str, shown: int) -> str:
    """An image, (height, width, 3 or 4) bytes, as part of a page, `shown` CSS pixels wide, with sharp pixels."""
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(pixels).save(data, format="png", optimize=True)
    code = base64.b64encode(data.getvalue()).decode()
    height = round(shown * pixels.shape[0] / pixels.shape[1])
    size = f'width="{shown}" height="{height}"'
    return f'<img class="pixels" src="data:image/png;base64,{code}" alt="{html.escape(alt)}" {size}>'


def badge(kind: str, word: str = "") -> str:
    """A verdict as a coloured word; the word, not the colour, carries the meaning."""
    return f'<span class="verdict verdict-{kind}">{html.escape(word or kind)}</span>'


def prose(text: str) -> str:
    """Plain text with `code` as HTML."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))


def unit(text: str) -> str:
    """A unit as it follows a number: `%` at once, others after a space."""
    return html.escape(text if text.startswith(("%", "×")) or not text else f" {text}")


def plain(text: str) -> str:
    """Text that Markdown leaves as it is."""
    return re.sub(r"([\\`*_{}\[\]<>$|])", r"\\\1", text)


def raw(markup: str) -> str:
    """HTML that Markdown hands through."""
    return f"```{{raw}} html\n{markup}\n```"
