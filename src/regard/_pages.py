"""Pages of the documentation that a command makes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def write_pages(module: str, pages: Callable[[], Mapping[str, str]], arguments: Sequence[str]) -> int:
    """``python -m MODULE FOLDER``: write files, by name, below the folder named; the exit code."""
    if len(arguments) != 1:
        print(f"usage: python -m {module} FOLDER", file=sys.stderr)
        return 2
    for name, text in pages().items():
        path = Path(arguments[0]) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0
