"""The methods by name. A method is one class in one file of this folder; everything else asks the class.

    @register_method("new")
    class New(AuxNet):
        ...

`AuxNet` lists what such a class has to define.
"""

from collections.abc import Callable
from typing import TypeVar

from common.errors import InputError, error_context, shown
from models.aux_net import AuxNet

METHODS: dict[str, type[AuxNet]] = {}

Method = TypeVar("Method", bound=type[AuxNet])


def register_method(name: str) -> Callable[[Method], Method]:
    """Class decorator: make an `AuxNet` the method ``name``, as learngene files and ``--method`` call it.

    Raises:
        ValueError: another class has this name.
    """

    def register(cls: Method) -> Method:
        if METHODS.get(name, cls) is not cls:
            raise ValueError(f"the method {name!r} is registered already, as {METHODS[name].__name__}")
        cls.method, cls.usage = name, cls.usage or f"--method {name}"
        METHODS[name] = cls
        return cls

    return register


def method_class(name: object) -> type[AuxNet]:
    """The class of the method ``name``.

    Raises:
        InputError: no method of this name is registered.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise InputError(f"unknown method {shown(name)!r}: expected one of {', '.join(METHODS)}")
    return METHODS[name]


def choices_of_methods() -> dict[str, list[str]]:
    """Arguments of ``descend`` that any method takes → the titles of the methods that take it."""
    titles: dict[str, list[str]] = {}
    for cls in METHODS.values():
        for choice in cls.choices:
            titles.setdefault(choice, []).append(cls.title)
    return titles


def method_of_stage_1(config: object) -> type[AuxNet] | None:
    """The method whose stage 1 the options ask for, by ``--method`` or by others; None for another run.

    Args:
        config: an object whose attributes are the options of main.py.

    Raises:
        InputError: --method is no registered name.
    """
    if config.method is not None:
        with error_context("--method"):
            return method_class(config.method)
    return next((cls for cls in METHODS.values() if cls.is_meant_by(config)), None)
