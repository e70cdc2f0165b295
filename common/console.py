"""Makes standard output and error robust: any encoding, closed streams, a terminal that has gone away.

Imports nothing slow, so that --help stays fast.
"""

import io
import os
import sys
from collections.abc import Collection
from errno import EDQUOT, EIO, ENOSPC, EPIPE
from typing import TextIO

GONE = (EIO, EPIPE)  # a closed terminal, and a pipe without a reader
FULL = (ENOSPC, EDQUOT)


class _Descriptor(io.FileIO):
    """A stream that discards output if writing fails with one of the ``ignored`` errors."""

    def __init__(self, number: int, ignored: Collection[int]):
        super().__init__(number, "w", closefd=False)
        self.ignored = ignored

    def write(self, data: bytes) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in self.ignored:
                raise
            return len(data)


def accept_any_text(ignored: Collection[int] = GONE) -> None:
    r"""Make standard output and error accept any text; characters outside their encoding become ``\x…`` or ``\u…``.

    Every script calls this first. Streams that are not the system's, such as those of a test, are left as they are.

    Args:
        ignored: errno values of failed writes that do not end the program.
    """
    sys.stdout = _opened(sys.stdout, 1, ignored)
    sys.stderr = _opened(sys.stderr, 2, ignored)


def _opened(stream: TextIO | None, number: int, ignored: Collection[int]) -> TextIO:
    if stream is None:  # closed by the parent process
        return open(os.devnull, "w", encoding="utf-8")
    if type(stream) is not io.TextIOWrapper or stream.fileno() != number:
        return stream
    stream.flush()
    raw = _Descriptor(number, ignored)
    buffer = raw if stream.write_through else io.BufferedWriter(raw)  # PYTHONUNBUFFERED, as Python itself does
    buffering = dict(line_buffering=stream.line_buffering, write_through=stream.write_through)
    return io.TextIOWrapper(buffer, encoding=stream.encoding, errors="backslashreplace", **buffering)
