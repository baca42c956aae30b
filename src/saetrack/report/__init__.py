"""A track to look at: one HTML page that opens from disk and needs no network, and its figures in matplotlib."""

from .page import WrittenReport, write_report
from .plots import Plots

__all__ = ["Plots", "WrittenReport", "write_report"]
