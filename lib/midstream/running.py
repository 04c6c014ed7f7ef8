"""Parameters in, executed notebook and record out."""

from midstream.chapter import Chapter, open_chapter

__all__ = ["Chapter", "open_chapter"]
