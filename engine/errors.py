"""The one exception for everything a user can mend: recipes print it as a single line and leave with exit code 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """Bad option, missing folder, malformed annotation. The message says what, where (file:line) and how to mend it."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # names of files may hold line breaks


@contextmanager
def writing(
    path: str | Path, *others: type[Exception], mend: str = "free space or choose another --output"
) -> Iterator[None]:
    """What cannot be written below `path` (no right, no space) becomes an InputError that names it. others: what a
    library raises in place of OSError; mend: what to do about it."""
    try:
        yield
    except (OSError, *others) as error:  # type: ignore[misc]
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        file = getattr(error, "filename", None)
        what = f"cannot write {file} ({reason})" if file else f"cannot write there ({reason})"
        raise InputError(f"{path}: {what}; {mend}") from error
