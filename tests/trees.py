"""What lies in a folder, to be compared with what lay there before or lies in another."""

import hashlib
from pathlib import Path


def hashes(folder: Path, pattern: str = "**/*") -> dict[str, str]:
    """SHA-256 of every file by its path in the folder."""
    files = sorted(path for path in folder.glob(pattern) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
