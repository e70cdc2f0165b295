"""User errors and the formatting of their messages."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import NoneType


class InputError(ValueError):
    """A user error: printed as one line, exit status 2.

    The message may quote a file: it is truncated, and control characters are replaced.
    """

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else " " for c in message[:1000]))


@contextmanager
def error_context(options: str) -> Iterator[None]:
    """Prefix the message of an InputError raised inside with ``options``."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{options}: {error}") from error


def one_line(error: Exception) -> str:
    """The message of a library's error on one line, truncated; some messages contain a stack trace."""
    return " ".join(str(error).split())[:300]


def shown(value: object) -> str:
    """A value from a file for a message: text and numbers in at most 60 characters, for other values the type.

    Nested lists from a hostile file can be terabytes as text.
    """
    return str(value)[:60] if isinstance(value, (str, int, float, NoneType)) else f"a {type(value).__name__}"


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: the most similar known names."""
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; the nearest names are {', '.join(near)}" if near else ""
