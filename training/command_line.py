"""Command line and YAML files: the only place that sees argparse. `parse_options` makes a `Config` of them."""

import argparse
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from common.errors import InputError, error_context, nearest
from common.files import read_yaml
from options import Accepted, Refused, number_or_none, option_parser, parts, ratios, text_or_none, whole_numbers
from pipeline.shard_cache import COMMAND
from training.config import Config

REPOSITORY = Path(__file__).resolve().parents[1]


class Parser(argparse.ArgumentParser):
    """A parser that raises InputError where argparse would print its usage and exit."""

    def error(self, message: str):
        raise InputError(message[:500])  # it repeats the value, which may be of any length in a file


def parse_options(argv: Sequence[str]) -> Config:
    """The options of a run: command line over YAML over defaults.

    Raises:
        InputError: an option or a key that does not exist, or a value of the wrong kind.
    """
    parser = option_parser(Parser)
    argv = [with_dashes(argument) for argument in argv]
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        raise InputError(f"unknown option {unknown[0]}{nearest(unknown[0], parser._option_string_actions)}")
    check_local_rank(args)
    if args.config:
        from_file = config_arguments(parser, args.config)
        try:
            parser.parse_args(from_file)
        except InputError as error:
            raise InputError(f"--config {args.config}: {error}") from None
        given, args = args.data_path, parser.parse_args(from_file + argv)
        if given is None and (args.data_path or "").startswith(COMMAND):  # what a file says is not executed
            raise InputError(f"--config {args.config}: data_path is a command, which only the command line may give")
    return config_of(vars(args))


def config_of(options: Mapping[str, object]) -> Config:
    """Options by name, as the parser gives them, as a `Config`; lists become tuples."""
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    sections = {section.name: section.type for section in fields(Config)}
    return Config(**{name: kind(**{f.name: options[f.name] for f in fields(kind)}) for name, kind in sections.items()})


def check_local_rank(args: argparse.Namespace) -> None:
    """Compare ``--local-rank``, which torch.distributed.launch gives without ``--use_env``, with the environment.

    Raises:
        InputError: the environment says something else, or nothing, and the processes would not find each other.
    """
    given, expected = vars(args).get("local_rank", -1), os.environ.get("LOCAL_RANK")
    if given > 0 and expected is None:
        raise InputError(
            f"--local-rank {given} is given, but LOCAL_RANK is missing in the environment: expected a start by "
            "torchrun or torch.distributed.launch"
        )
    if given >= 0 and expected is not None and str(given) != expected:
        raise InputError(f"--local-rank is {given}, LOCAL_RANK in the environment {expected}: expected the same")


def with_dashes(argument: str) -> str:
    """``--output_dir=a_b`` as ``--output-dir=a_b``."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if argument.startswith("--") else argument


def config_arguments(parser: Parser, path: str) -> list[str]:
    """A YAML file as the command line that says the same.

    ``/configs/x.yaml`` that does not exist is looked up in this repository, as the published commands need it.
    """
    file = Path(path)
    if not file.exists() and file.parts[:2] == ("/", "configs"):
        file = REPOSITORY / path.lstrip("/")
    with error_context("--config"):
        content = read_yaml(file) or {}
    if not isinstance(content, dict):
        raise InputError(f"--config {path} holds a {type(content).__name__}: expected lines of 'option: value'")
    return arguments_of(parser, content, f"--config {path}")


def arguments_of(parser: Parser, options: dict, source: str) -> list[str]:
    """Plain data {option: value} as the command line that says the same; messages begin with ``source``."""
    arguments, given = [], {}
    for key, value in options.items():
        option = "--" + str(key).replace("_", "-")
        action = parser._option_string_actions.get(option)
        if action is None or option in ("--config", "--help"):
            raise InputError(f"{source}: unknown key {key}{nearest(option, parser._option_string_actions)}")
        if (other := given.setdefault(id(action), key)) != key:
            raise InputError(f"{source}: {other} and {key} are the same option: expected one of them")
        no = "--no-" + option[2:]
        if isinstance(action, Accepted) and value is False and no in parser._option_string_actions:
            arguments.append(no)  # which says why that is refused
        elif not isinstance(action, Refused):
            arguments += argument_of(action, option, key, value, source)
        elif value not in (None, False, ""):
            arguments.append(option)
    return arguments


def argument_of(action: argparse.Action, option: str, key: object, value: object, source: str) -> list[str]:
    """One option with its value as words of a command line, none where ``value`` is null and so is the default."""
    two_way = isinstance(action, argparse.BooleanOptionalAction)
    if isinstance(action, Accepted) and value is None:
        return []
    if action.nargs == 0 or two_way:
        if not isinstance(value, bool):
            raise InputError(f"{source}: {key} is {yaml_value(value)}, expected true or false")
        if two_way and option.startswith("--no-"):
            option, value = action.option_strings[0], not value
        return [option] if value else ["--no-" + option[2:]] if two_way else []
    if value is None or value is False:
        return switched_off(action, option, key, value, source)
    plain = isinstance(value, list) and not any(isinstance(v, (list, dict)) for v in value)
    if plain and action.nargs is not None:
        return [option, *map(str, value)]
    if plain and action.type in (whole_numbers, ratios, parts):
        return [f"{option}={','.join(map(str, value))}"]
    if isinstance(value, (list, dict, bool)):
        raise InputError(f"{source}: {key} is {yaml_value(value)}, expected a single value")
    return [f"{option}={value}"]


def switched_off(action: argparse.Action, option: str, key: object, value: bool | None, source: str) -> list[str]:
    """What null or false (YAML's ``no`` and ``off``, too) means for an option that takes a value: none.

    Raises:
        InputError: the option cannot be without a value.
    """
    if action.default in (None, argparse.SUPPRESS):
        return []
    if action.type in (text_or_none, number_or_none) or "none" in (action.choices or ()):
        return [f"{option}=none"]
    if action.type is parts:
        return [f"{option}="]
    default = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
    raise InputError(f"{source}: {key} is {yaml_value(value)}, expected a value such as the default, {default}")


def yaml_value(value: object) -> str:
    """A value of a YAML file for a message."""
    return "null" if value is None else reprlib.repr(value)
