"""Standard output and error as they are: of any encoding, closed, or to a terminal that is gone.

It imports nothing that takes time, for the sake of --help.
"""

import io
import os
import sys
from collections.abc import Collection
from errno import EDQUOT, EIO, ENOSPC, EPIPE
from typing import TextIO

GONE = (EIO, EPIPE)  # a closed terminal, and a pipe that nobody reads
FULL = (ENOSPC, EDQUOT)


class _Descriptor(io.FileIO):
    """Takes what is written where writing fails for a reason that is ignored; there is no place to say so."""

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
    r"""Make standard output and error take every text; what their encoding does not have becomes ``\x…`` or ``\u…``.

    Every script calls this first. What is no stream of the system, but of a test, say, stays as it is.

    Args:
        ignored: reasons for which the system refuses to write that do not end the program.
    """
    sys.stdout = _opened(sys.stdout, 1, ignored)
    sys.stderr = _opened(sys.stderr, 2, ignored)


def _opened(stream: TextIO | None, number: int, ignored: Collection[int]) -> TextIO:
    if stream is None:  # closed by whoever started this
        return open(os.devnull, "w", encoding="utf-8")
    if type(stream) is not io.TextIOWrapper or stream.fileno() != number:
        return stream
    stream.flush()
    raw = _Descriptor(number, ignored)
    buffer = raw if stream.write_through else io.BufferedWriter(raw)  # PYTHONUNBUFFERED, as Python itself does
    buffering = dict(line_buffering=stream.line_buffering, write_through=stream.write_through)
    return io.TextIOWrapper(buffer, encoding=stream.encoding, errors="backslashreplace", **buffering)
