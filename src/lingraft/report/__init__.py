"""One self-contained HTML page about a run: `render` gives the text, `write` publishes it atomically."""

from lingraft.report.page import render, write

__all__ = ["render", "write"]
