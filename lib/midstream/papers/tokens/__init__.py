"""Part: fewer tokens, fewer bits."""
