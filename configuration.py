"""What the options say together: command line and YAML files, which run they describe, and what is recorded of them."""

import argparse
import os
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import models
from models import InputError
from options import Accepted, Refused, number_or_none, option_parser, parts, text_or_none, whole_numbers
from shards import COMMAND, is_remote

REPOSITORY = Path(__file__).resolve().parent


@contextmanager
def about(options: str) -> Iterator[None]:
    """Errors inside say which options they are about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{options}: {error}") from error


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, through the same door as every other error of the user's."""

    def error(self, message: str):
        raise InputError(message[:500])  # it repeats what was given, which a file can make as long as it likes


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """Command line over YAML over defaults.

    Raises:
        InputError: an option or a key that does not exist, or a value of the wrong kind.
    """
    parser = option_parser(Parser)
    argv = [with_dashes(argument) for argument in argv]
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        raise InputError(f"unknown option {unknown[0]}{models.nearest(unknown[0], parser._option_string_actions)}")
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
    # training averages unless it is told not to, evaluation takes the averaged weights only if it is told to
    args.model_ema = bool(args.model_ema) if args.eval else args.model_ema is not False
    vars(args).pop("local_rank", None)  # another one in each process
    return args


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
    with about("--config"):
        content = models.read_yaml(file) or {}
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
            raise InputError(f"{source}: unknown key {key}{models.nearest(option, parser._option_string_actions)}")
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
            raise InputError(f"{source}: {key} is {shown(value)}, expected true or false")
        if two_way and option.startswith("--no-"):
            option, value = action.option_strings[0], not value
        return [option] if value else ["--no-" + option[2:]] if two_way else []
    if value is None or value is False:
        return switched_off(action, option, key, value, source)
    plain = isinstance(value, list) and not any(isinstance(v, (list, dict)) for v in value)
    if plain and action.nargs is not None:
        return [option, *map(str, value)]
    if plain and action.type in (whole_numbers, parts):
        return [f"{option}={','.join(map(str, value))}"]
    if isinstance(value, (list, dict, bool)):
        raise InputError(f"{source}: {key} is {shown(value)}, expected a single value")
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
    raise InputError(f"{source}: {key} is {shown(value)}, expected a value such as the default, {default}")


def shown(value: object) -> str:
    """A value of a YAML file for a message."""
    return "null" if value is None else reprlib.repr(value)


# ---------------------------------------------------------------------------------------------------------------------
# Which run they describe
# ---------------------------------------------------------------------------------------------------------------------


# options of one kind of run alone, and what that kind is
OPTIONS_OF = {
    "lets": (
        (
            *("layers_per_row", "group_size", "full_width", "src_path", "freeze_src", "trans_init_scheme"),
            *("descendants", "descendant_depths", "descendant_heads", "descendant_weight"),
        ),
        "needs --src-arch and --tgt-arch: it says how the weights of a LeTs Aux-Net are made",
    ),
    "descend": (
        ("mapping_layer", "mapping_layer_coeff", "width_select", "depth_select", "skip_init", "gene_ema"),
        "needs --load-gene: it says how a Des-Net is made from a learngene",
    ),
}


def check_kind(args: argparse.Namespace) -> str:
    """`kind_of_run`, with nothing said that such a run would not do.

    Raises:
        InputError: as `kind_of_run`, or an option of another kind of run is given.
    """
    kind, defaults = kind_of_run(args), vars(option_parser().parse_args([]))
    for other, (options, reason) in OPTIONS_OF.items():
        for option in options:
            if other != kind and getattr(args, option) != defaults[option]:
                raise InputError(f"--{option} {reason}")
    if not args.descendants:
        for option in OPTIONS_OF["lets"][0]:
            if option.startswith("descendant_") and getattr(args, option) != defaults[option]:
                raise InputError(
                    f"--descendants is missing: --{option} says which are trained beside the Aux-Net, and how"
                )
    if args.descendants and args.compile:
        raise InputError("--compile needs the same sizes in every step: --descendants draws others each time")
    check_augmentation(args, defaults)
    if args.teacher_cache and args.distillation_type == "none":
        raise InputError("--teacher-cache needs --distillation-type soft or hard: it keeps what a teacher says")
    if args.teacher_cache_top and not args.teacher_cache:
        raise InputError("--teacher-cache is missing: --teacher-cache-top says how much of the outputs is kept in it")
    if args.teacher_cache and args.skip_bad_images:
        raise InputError("--skip-bad-images changes the images of a step, for which --teacher-cache keeps outputs")
    if args.shard_cache and not (args.data_set == "WDS" and is_remote(args.data_path or "")):
        raise InputError("--shard-cache keeps shards from elsewhere: --data-set WDS with an address or a command")
    if args.shard_cache_gb != defaults["shard_cache_gb"] and not args.shard_cache:
        raise InputError("--shard-cache is missing: --shard-cache-gb says how much is kept in it")
    if args.eval and args.model_ema and not args.resume:
        raise InputError("--resume is missing: --eval --model-ema evaluates the averaged weights of a checkpoint")
    if args.push_ema and not (args.push_to_hub and args.model_ema):
        missing = "--push-to-hub is missing" if args.model_ema else "--no-model-ema leaves nothing to upload"
        raise InputError(f"{missing}: --push-ema uploads the averaged weights")
    if args.push_ema and kind in ("lets", "tleg"):
        raise InputError("--push-ema is for other models: --push-to-hub uploads a learngene with its average anyway")
    if args.data_set == "WDS" and (args.train_images or args.holdout):
        option = "--train-images" if args.train_images else "--holdout"
        raise InputError(f"{option} takes single images, which --data-set WDS cannot: expected another --data-set")
    return kind


def check_augmentation(args: argparse.Namespace, defaults: dict) -> None:
    """Raises InputError where options of the augmentation exclude each other."""
    if args.src and not args.three_augment:
        raise InputError("--ThreeAugment is missing: --src says how it crops")
    if args.three_augment and args.cache_data:
        raise InputError("--cache-data cannot augment with --ThreeAugment: expected one of them")
    for option in ("aa", "reprob") if args.three_augment else ():
        value = getattr(args, option)
        if value and value != defaults[option]:
            raise InputError(f"--ThreeAugment takes the place of --{option} {value}: expected one of them")


def kind_of_run(args: argparse.Namespace) -> str:
    """``lets`` or ``tleg`` (stage 1), ``descend`` (stage 2), or ``plain``.

    Raises:
        InputError: the options do not say which, or contradict each other.
    """
    if args.src_arch or args.tgt_arch:
        if not (args.src_arch and args.tgt_arch):
            missing = "--tgt-arch" if args.src_arch else "--src-arch"
            raise InputError(f"{missing} is missing: stage 1 of LeTs needs --src-arch and --tgt-arch")
        for option in ("load_gene", "des_arch", "model", "finetune", "init", "init_path"):
            if getattr(args, option):
                option = "--" + option.replace("_", "-")
                raise InputError(f"{option} belongs to another run: --src-arch and --tgt-arch train a learngene")
        if args.freeze_src and not args.src_path:
            raise InputError("--src-path is missing: --freeze-src trains what expands a trained ViT")
        for scheme, known in zip(args.trans_init_scheme, (models.DEPTH_SCHEMES, models.WIDTH_SCHEMES), strict=True):
            if scheme not in known:
                raise InputError(f"--trans-init-scheme {scheme} is unknown: expected one of {', '.join(known)}")
        return "lets"
    if args.load_gene:
        if models.is_aux_name(args.des_arch or args.model or ""):
            raise InputError(f"{args.des_arch or args.model} is an Aux-Net: --load-gene initialises a deit_… Des-Net")
        if not (args.des_arch or args.model):
            raise InputError("--des-arch is missing: it names the Des-Net that --load-gene initialises")
        if args.finetune or args.init or args.init_path:
            raise InputError("--load-gene gives the first weights, as do --finetune and --init: choose one")
        return "descend"
    if args.des_arch:
        raise InputError("--load-gene is missing: it names the learngene that initialises --des-arch")
    if (args.init is None) != (args.init_path is None):
        missing = "--init" if args.init is None else "--init-path"
        raise InputError(f"{missing} is missing: --init says how, and --init-path from which trained ViT")
    if args.init and (args.finetune or not models.follows_grammar(args.model or "") or models.is_aux_name(args.model)):
        raise InputError("--init makes a ViT from another one: give --model deit_…, and no --finetune")
    if not args.model:
        raise InputError("nothing to run: give --src-arch and --tgt-arch, or --des-arch and --load-gene, or --model")
    return "tleg" if models.is_aux_name(args.model) else "plain"


# ---------------------------------------------------------------------------------------------------------------------
# What is recorded of them
# ---------------------------------------------------------------------------------------------------------------------


def options_in_effect(args: argparse.Namespace) -> dict:
    """Plain data with which ``--config`` repeats the run from its start."""
    defaults = vars(option_parser().parse_args([]))
    options = {name: value for name, value in vars(args).items() if name not in ("config", "resume", "start_epoch")}
    # what was taken back with 'none' has to be taken back again
    taken_back = {name: "none" for name, value in options.items() if value is None and defaults[name] is not None}
    return {name: value for name, value in options.items() if value is not None} | taken_back


def options_file(args: argparse.Namespace) -> dict:
    """`options_in_effect` for ``args.yaml``, with which ``--eval`` evaluates the model's own weights, too.

    ``model_ema: true``, the default of training, would ask evaluation for the averaged ones.
    """
    options = options_in_effect(args)
    return {name: value for name, value in options.items() if (name, value) != ("model_ema", True)}


def recipe(args: argparse.Namespace) -> dict:
    """The options in effect without those that name places on this machine, for files that others will read."""
    places = {"data_path", "download", "shard_cache", "shard_cache_gb", "output_dir", "teacher_cache"}
    places |= {"load_gene", "finetune", "init_path", "src_path", "teacher_path"}
    return {name: value for name, value in options_in_effect(args).items() if name not in places}
