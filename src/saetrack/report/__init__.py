"""One HTML page from a track, to explore in a browser: opens from disk, asks nothing of the network."""

from .page import WrittenReport, write_report

__all__ = ["WrittenReport", "write_report"]
