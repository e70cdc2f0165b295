"""Errors that the user can put right, and the words of their messages."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import NoneType


@contextmanager
def error_context(options: str) -> Iterator[None]:
    """Errors inside say which options they are about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{options}: {error}") from error


class InputError(ValueError):
    """Something that the user can put right, said in one sentence.

    The sentence may repeat what stands in a file: it is cut, and cleaned of what could do things to a terminal.
    """

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else " " for c in message[:1000]))


def one_line(error: Exception) -> str:
    """What an error of a library says, short enough for one sentence of ours; some add a stack trace."""
    return " ".join(str(error).split())[:300]


def shown(value: object) -> str:
    """A value from a file, for a message: text and numbers in at most 60 characters, of anything else its type.

    Lists of lists of …, each twice in the next, are terabytes as text.
    """
    return str(value)[:60] if isinstance(value, (str, int, float, NoneType)) else f"a {type(value).__name__}"


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known ones that look like it."""
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; the nearest names are {', '.join(near)}" if near else ""
