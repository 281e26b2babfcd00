"""What is on disk is there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file or folder beside `path`, which takes its place when all went well and goes otherwise.

    Example:
        >>> with replacing(Path("a.txt")) as temporary:  # doctest: +SKIP
        ...     temporary.write_text("whole")
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, former = (path.with_name(f".{path.stem}.{os.getpid()}{kind}{path.suffix}") for kind in ("", ".former"))
    try:
        yield temporary
        if path.is_dir():  # which no folder can replace
            path.replace(former)
        temporary.replace(path)
    finally:
        if former.exists() and not path.exists():  # interrupted between the two
            former.replace(path)
        for left in (temporary, former):
            if left.is_dir():
                shutil.rmtree(left)
            left.unlink(missing_ok=True)
