"""Tracks out of saetrack and into it: other libraries' files, and repositories on the Hub."""

from .exporting import EXPORT_FORMATS, export_track
from .importing import ImportedFacts, import_map, import_sae

__all__ = ["EXPORT_FORMATS", "ImportedFacts", "export_track", "import_map", "import_sae"]
