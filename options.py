"""The options of main.py: command line, YAML files, and which of them belong together."""

import argparse
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import models
from datasets import DATA_SETS, INAT_CATEGORIES
from losses import DISTILLATION_TYPES
from models import InputError
from shards import COMMAND

ON_NAN = ("stop", "skip", "rollback")
RUNS = """Train learngenes, initialise ViTs from them, and train any timm model.

stage 1, LeTs    main.py --src-arch deit_small_patch16_224_L8 --tgt-arch deit_base_patch16_224_L16_H12 …
stage 1, TLEG    main.py --model aux_deit_small_patch16_224 …
stage 2          main.py --des-arch deit_base_patch16_224_L12 --load-gene learngene.safetensors …
anything else    main.py --model resnet18 …           a teacher, or a baseline from scratch
"""

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


def whole_numbers(text: str) -> list[int] | None:
    """'0,1,4', or 'none' to take back what a YAML file says."""
    try:
        return None if text.lower() == "none" else [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 0,1,4") from None


def parts(text: str) -> list[str]:
    """'attn,mlp': parts of a ViT."""
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in models.PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no part: expected some of {','.join(models.PARTS)}")
    return names


def at_least(lowest: int, highest: int | None = None):
    """The type of an option that is a whole number from ``lowest`` up, perhaps to ``highest``."""

    def number(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"{value} is too small: at least {lowest}")
        if highest is not None and value > highest:
            raise argparse.ArgumentTypeError(f"{value} is too large: at most {highest}")
        return value

    number.__name__ = "whole number"  # argparse puts it into its message
    return number


def ratio(above_zero: bool = False, below_one: bool = False):
    """The type of an option that is a number from 0 to 1, with or without its ends."""

    def number(text: str) -> float:
        value = float(text)
        if not 0 <= value <= 1 or (above_zero and value == 0) or (below_one and value == 1):
            raise argparse.ArgumentTypeError(
                f"{value:g} is not between 0{' (excluded)' * above_zero} and 1{' (excluded)' * below_one}"
            )
        return value

    number.__name__ = "number"
    return number


def positive(text: str) -> float:
    """A number above zero."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value:g} is not above 0")
    return value


def text_or_none(text: str) -> str | None:
    return None if text.lower() in ("", "none") else text


def option_parser() -> Parser:
    """DeiT's options and this program's. Written with '-'; '_' is understood too."""
    p = Parser("main.py", description=RUNS, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    flag = argparse.BooleanOptionalAction

    g = p.add_argument_group("what to run")
    g.add_argument("--config", help="YAML file whose keys are these options; the command line wins")
    g.add_argument("--model", "--model-type", help="aux_deit_… (TLEG stage 1), or any model to train as it is")
    g.add_argument("--src-arch", help="LeTs stage 1: the learngene, such as deit_small_patch16_224_L8")
    g.add_argument("--tgt-arch", help="LeTs stage 1: the Aux-Net, such as deit_base_patch16_224_L16_H12")
    g.add_argument("--des-arch", help="stage 2: the Des-Net, such as deit_base_patch16_224_L12")
    g.add_argument("--load-gene", help="stage 2: learngene file, published checkpoint, or address of one")
    g.add_argument("--gene-ema", action=flag, default=False, help="take model_ema of the learngene's checkpoint")
    g.add_argument("--mapping-layer", type=whole_numbers, help="LeTs stage 2: Aux layer of each layer, '0,1,4,…'")
    g.add_argument("--mapping-layer-coeff", type=whole_numbers, help="LeTs stage 2: Aux layer whose coefficients")
    g.add_argument("--width-select", default="continuous", choices=models.WIDTH_SELECTIONS)
    g.add_argument("--depth-select", default="default", help="LeTs stage 2: default, even, first, last, or pairs:0,2,…")
    g.add_argument("--skip-init", type=parts, default=[], help=f"stage 2: leave at random {','.join(models.PARTS)}")
    g.add_argument("--init", choices=models.RIVALS, help="start from a trained ViT of other sizes, without learngene")
    g.add_argument("--init-path", help="the trained ViT of --init: checkpoint or address")
    g.add_argument("--layers-per-row", type=at_least(1), default=2, help="LeTs stage 1: layers sharing coefficients")
    g.add_argument("--group-size", type=at_least(1), default=2, help="LeTs stage 1: learngene layers in a mixture")
    g.add_argument("--full-width", action=flag, default=False, help="LeTs stage 1: LiGO's width matrices")
    g.add_argument("--src-path", help="LeTs stage 1: a trained ViT of --src-arch that the learngene starts from")
    g.add_argument("--freeze-src", action=flag, default=False, help="LeTs stage 1: train only what expands --src-path")
    g.add_argument(
        "--trans-init-scheme",
        nargs=2,
        metavar=("D", "W"),
        default=["stackbert_noisy", "rand"],
        help=f"D: {', '.join(models.DEPTH_SCHEMES)}; W: {', '.join(models.WIDTH_SCHEMES)}",
    )
    g.add_argument("--trans-init-noise", nargs=2, type=float, metavar=("D", "W"), default=[0.03, 0.03])
    g.add_argument("--finetune", help="start from the weights of a checkpoint; another head stays fresh")
    g.add_argument("--resume", help="continue from a checkpoint; auto: from the newest whole one in --output-dir")
    g.add_argument("--start-epoch", type=at_least(0), default=0)
    g.add_argument("--eval", action="store_true", help="evaluate and stop")
    g.add_argument("--epochs", type=at_least(0), default=300, help="0: initialise, evaluate, write the model")

    g = p.add_argument_group("data")
    g.add_argument("--data-set", default="IMNET", choices=sorted(DATA_SETS))
    g.add_argument(
        "--data-path",
        help="the folder that holds the data set; not needed for DIGITS. WDS also takes an address, or a command that "
        "writes the file {} to its standard output: 'pipe:aws s3 cp s3://bucket/imagenet/{} -'",
    )
    g.add_argument("--shard-cache", metavar="DIR", help="WDS: keep shards from elsewhere here, on a disk of this host")
    g.add_argument("--shard-cache-gb", type=positive, default=200, help="… at most so many GB; ImageNet has 150")
    g.add_argument("--inat-category", default="name", choices=INAT_CATEGORIES)
    g.add_argument("--input-size", type=at_least(1), help="pixels; default: the architecture's")
    g.add_argument("--batch-size", type=at_least(1), default=64, help="images per process and step")
    g.add_argument("--accum-iter", type=at_least(1), default=1, help="batches per optimiser step")
    g.add_argument("--num-workers", type=at_least(0), default=10)
    g.add_argument(
        "--cache-data",
        action=flag,
        default=False,
        help="hold small images in the device's memory and augment them there in batches: the same recipe, "
        "other random numbers",
    )
    g.add_argument("--pin-mem", action=flag, default=True)
    g.add_argument("--dist-eval", action="store_true", help="for DeiT's commands: evaluation is always distributed")
    g.add_argument("--skip-bad-images", action="store_true", help="go on without images that cannot be read")
    g.add_argument("--eval-crop-ratio", type=ratio(above_zero=True), default=0.875)

    g = p.add_argument_group("augmentation")
    g.add_argument("--color-jitter", type=float, default=0.3)
    g.add_argument("--aa", type=text_or_none, default="rand-m9-mstd0.5-inc1", help="AutoAugment policy, or none")
    g.add_argument("--train-interpolation", default="bicubic", choices=("bicubic", "bilinear", "random"))
    g.add_argument("--repeated-aug", action=flag, default=True)
    g.add_argument("--reprob", type=ratio(), default=0.25)
    g.add_argument("--remode", default="pixel", choices=("const", "rand", "pixel"))
    g.add_argument("--recount", type=at_least(1), default=1)
    g.add_argument("--mixup", type=float, default=0.8)
    g.add_argument("--cutmix", type=float, default=1.0)
    g.add_argument("--cutmix-minmax", type=float, nargs=2)
    g.add_argument("--mixup-prob", type=ratio(), default=1.0)
    g.add_argument("--mixup-switch-prob", type=ratio(), default=0.5)
    g.add_argument("--mixup-mode", default="batch", choices=("batch", "pair", "elem"))
    g.add_argument("--smoothing", type=ratio(below_one=True), default=0.1)

    g = p.add_argument_group("regularisation and averaging")
    g.add_argument("--drop", type=ratio(), default=0.0)
    g.add_argument("--drop-path", type=ratio(below_one=True), default=0.1)
    g.add_argument("--clip-grad", type=float)
    g.add_argument("--model-ema", action=flag, default=True)
    g.add_argument("--model-ema-decay", type=ratio(), default=0.99996)
    g.add_argument("--model-ema-force-cpu", action="store_true")

    g = p.add_argument_group("optimiser and schedule")
    g.add_argument("--opt", default="adamw")
    g.add_argument("--opt-eps", type=float, default=1e-8)
    g.add_argument("--opt-betas", type=float, nargs="+")
    g.add_argument("--momentum", type=float, default=0.9)
    g.add_argument("--weight-decay", type=float, default=0.05)
    g.add_argument(
        "--lr", type=float, default=5e-4, help="for 512 images per optimiser step; scaled to the real number"
    )
    g.add_argument("--unscale-lr", action="store_true", help="take --lr as it is")
    g.add_argument("--sched", default="cosine")
    g.add_argument("--lr-noise", type=float, nargs="+")
    g.add_argument("--lr-noise-pct", type=float, default=0.67)
    g.add_argument("--lr-noise-std", type=float, default=1.0)
    g.add_argument("--warmup-lr", type=float, default=1e-6)
    g.add_argument("--min-lr", type=float, default=1e-5)
    g.add_argument("--decay-epochs", type=float, default=30)
    g.add_argument("--warmup-epochs", type=at_least(0), default=5)
    g.add_argument("--cooldown-epochs", type=at_least(0), default=10)
    g.add_argument("--decay-rate", type=float, default=0.1)

    g = p.add_argument_group("distillation")
    g.add_argument("--teacher-model", default="regnety_160")
    g.add_argument("--teacher-path", help="checkpoint or http(s) address; default: timm's pretrained weights")
    g.add_argument("--distillation-type", default="none", choices=DISTILLATION_TYPES)
    g.add_argument("--distillation-alpha", type=float, default=0.5)
    g.add_argument("--distillation-tau", type=float, default=1.0)
    g.add_argument("--teacher-cache", metavar="DIR", help="keep the teacher's outputs for other runs, and use them")
    g.add_argument("--teacher-cache-top", type=at_least(1), metavar="K", help="… of K classes; default: all, exactly")

    g = p.add_argument_group("run")
    g.add_argument("--output-dir", help="where everything is written; default: nothing is")
    g.add_argument("--save-every-steps", type=at_least(1), help="besides every epoch, write a checkpoint every N steps")
    g.add_argument("--save-every-minutes", type=positive, help="… and when so many minutes have passed since the last")
    g.add_argument("--keep-checkpoints", type=at_least(0), default=1, help="old checkpoints to keep, besides the best")
    g.add_argument("--on-nan", default="stop", choices=ON_NAN, help="what to do when loss or gradient is not finite")
    g.add_argument("--dist-timeout", type=positive, default=10, help="minutes that processes wait for each other")
    g.add_argument("--wandb", metavar="PROJECT", help="also send all numbers to Weights & Biases, if it is installed")
    g.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload what was trained to the Hugging Face Hub")
    g.add_argument("--device", default="auto", help="auto, cuda or cpu")
    g.add_argument(
        "--amp-dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="auto: float32 on CPU, else bfloat16 where the device has it, float16 where not",
    )
    g.add_argument("--compile", action="store_true", help="torch.compile")
    g.add_argument("--grad-checkpointing", action="store_true", help="recompute activations to save memory")
    g.add_argument("--seed", type=at_least(0, 2**32 - 1), default=0)
    g.add_argument("--log-interval", type=at_least(1), default=50, help="steps between two looks at the loss")
    return p  # fmt: skip


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """Command line over YAML over defaults.

    Raises:
        InputError: an option or a key that does not exist, or a value of the wrong kind.
    """
    parser = option_parser()
    argv = [with_dashes(argument) for argument in argv]
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        raise InputError(f"unknown option {unknown[0]}{models.nearest(unknown[0], parser._option_string_actions)}")
    if args.config:
        from_file = config_arguments(parser, args.config)
        try:
            parser.parse_args(from_file)
        except InputError as error:
            raise InputError(f"--config {args.config}: {error}") from None
        given, args = args.data_path, parser.parse_args(from_file + argv)
        if given is None and (args.data_path or "").startswith(COMMAND):  # what a file says is not executed
            raise InputError(f"--config {args.config}: data_path is a command, which only the command line may give")
    return args


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
    arguments = []
    for key, value in content.items():
        option = "--" + str(key).replace("_", "-")
        action = parser._option_string_actions.get(option)
        if action is None or option in ("--config", "--help"):
            raise InputError(
                f"--config {path}: unknown key {key}{models.nearest(option, parser._option_string_actions)}"
            )
        plain = not any(isinstance(v, (list, dict)) for v in (value if isinstance(value, list) else ()))
        if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
            if not isinstance(value, bool):
                raise InputError(f"--config {path}: {key} is {reprlib.repr(value)}, expected true or false")
            if value or isinstance(action, argparse.BooleanOptionalAction):
                arguments.append(option if value else "--no-" + option[2:])
        elif isinstance(value, list) and plain and action.nargs is not None:
            arguments += [option, *map(str, value)]
        elif isinstance(value, list) and plain and action.type in (whole_numbers, parts):
            arguments.append(f"{option}={','.join(map(str, value))}")
        elif isinstance(value, (list, dict, bool)):
            raise InputError(f"--config {path}: {key} is {reprlib.repr(value)}, expected a single value")
        elif value is not None:
            arguments.append(f"{option}={value}")
    return arguments


# ---------------------------------------------------------------------------------------------------------------------
# Which run they describe
# ---------------------------------------------------------------------------------------------------------------------


# options of one kind of run alone, and what that kind is
OPTIONS_OF = {
    "lets": (
        ("layers_per_row", "group_size", "full_width", "src_path", "freeze_src", "trans_init_scheme"),
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
    if args.teacher_cache and args.distillation_type == "none":
        raise InputError("--teacher-cache needs --distillation-type soft or hard: it keeps what a teacher says")
    if args.teacher_cache_top and not args.teacher_cache:
        raise InputError("--teacher-cache is missing: --teacher-cache-top says how much of the outputs is kept in it")
    return kind


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


def recipe(args: argparse.Namespace) -> dict:
    """The options in effect without those that name places on this machine, for files that others will read."""
    places = {"data_path", "shard_cache", "shard_cache_gb", "output_dir", "teacher_cache"}
    places |= {"load_gene", "finetune", "init_path", "src_path", "teacher_path"}
    return {name: value for name, value in options_in_effect(args).items() if name not in places}
