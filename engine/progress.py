"""Progress of a long job: a bar on a terminal, a plain line now and then elsewhere; both with rate and time left."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm


class Progress:
    """update(done, note) until total; `first` units were done before this process."""

    def __init__(self, title: str, total: int, first: int = 0, unit: str = "it", every: float = 20.0):
        self.title, self.total, self.first, self.unit, self.every = title, total, first, unit, every
        self.began = self.said = time.monotonic()
        self.bar = tqdm(desc=title, total=total, initial=first, unit=unit) if sys.stderr.isatty() else None

    def update(self, done: int, note: str = "") -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(done - self.bar.n)
            return
        now = time.monotonic()
        if now - self.said >= self.every or done == self.total:
            self.said = now
            rate = (done - self.first) / max(now - self.began, 1e-9)
            left = (self.total - done) / max(rate, 1e-9)
            print(
                f"{self.title}: {done}/{self.total} {self.unit}s, {rate:.2f} {self.unit}/s, {left:.0f} s left"
                + (f", {note}" if note else ""),
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
