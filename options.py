"""The options of main.py: names, types, defaults and help.

This module imports nothing slow, so that --help answers at once. Choices are repeated here for that reason; a test
compares them with the modules that define them.
"""

import argparse
import os
import textwrap
from pathlib import Path

DATA_SETS = ("CARS", "CIFAR10", "CIFAR100", "DIGITS", "FLOWERS", "FMNIST", "FOLDER", "FOOD101", "HF", "IMNET")
DATA_SETS += ("INAT19", "MINIIMNET", "TINYIMNET", "WDS")
INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")
WIDTH_SELECTIONS = ("continuous", "l1_top", "l1_bottom", "l2_top", "l2_bottom")
PARTS = ("attn", "mlp", "norm", "patch_embed", "pos_embed")
BASELINES = ("weight_selection", "stacking", "interpolation", "magnitude", "taylor", "front")
DEPTH_SCHEMES = ("stackbert_noisy", "stackbert", "alternate_noisy", "copy", "rand", "rand_softmax")
WIDTH_SCHEMES = ("rand", "rand_softmax", "sel", "sel_noisy")
DISTILLATION_TYPES = ("none", "soft", "hard", "feature")
DISTILLATION_MEANS = ("logits", "images")
SIZE_SAMPLINGS = ("random", "smallest", "sandwich")
ORDERS = ("none", "magnitude", "taylor")
DEPTH_ORDERS = ("even", "magnitude", "taylor", "output")
OF_METHOD = "; default: the method's"
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")
COLOURS = ("R", "G", "B")
OF_SOURCE = "; default: that of the weights at the start"
ON_NAN = ("stop", "skip", "rollback")
WEIGHTS = "address, or timm for the weights of the architecture's tag"
RUNS = """Train learngenes, initialise ViTs from them, and train any timm model.

stage 1, LeTs    main.py --src-arch deit_small_patch16_224_L8 --tgt-arch deit_base_patch16_224_L16_H12 …
                 main.py --src-arch vit_small_patch16_224.augreg_in1k --src-path timm --tgt-arch @L16-H12 …
stage 1, elastic main.py --src-arch vit_small_patch16_224.augreg_in1k --src-path timm …
stage 1, TLEG    main.py --model aux_deit_small_patch16_224 …
stage 2          main.py --des-arch deit_base_patch16_224_L12 --load-gene learngene.safetensors …
                 main.py --des-arch @L6-H3 --load-gene learngene.safetensors …
anything else    main.py --model resnet18 …           a teacher, or a baseline from scratch

NAME[.tag]@L{depth}-H{heads} is the ViT NAME of timm's in another depth and width, NAME@L{depth}-H{heads}-M{ratio} one
whose layers have ratio × width hidden neurons; @L{depth}-H{heads} alone is of the kind of the source (--tgt-arch) or of
the learngene (--des-arch).
"""


def whole_numbers(text: str) -> list[int] | None:
    """'0,1,4', or 'none' to take back what a YAML file says."""
    try:
        return None if text.lower() == "none" else [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 0,1,4") from None


def ratios(text: str) -> list[float] | None:
    """'1,2.5,4', or 'none' to take back what a YAML file says."""
    try:
        return None if text.lower() == "none" else [positive(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1,2.5,4") from None


def parts(text: str) -> list[str]:
    """'attn,mlp': parts of a ViT."""
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no part: expected some of {','.join(PARTS)}")
    return names


def at_least(lowest: int, highest: int | None = None):
    """The type of an option that takes a whole number of at least ``lowest``, and at most ``highest``."""

    def number(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"{value} is too small: at least {lowest}")
        if highest is not None and value > highest:
            raise argparse.ArgumentTypeError(f"{value} is too large: at most {highest}")
        return value

    number.__name__ = "whole number"  # argparse puts it into its message
    return number


def ratio(above_zero: bool = False, below_one: bool = False, highest: int = 1):
    """The type of an option that takes a number from 0 to ``highest``, with or without its ends."""

    def number(text: str) -> float:
        value = float(text)
        if not 0 <= value <= highest or (above_zero and value == 0) or (below_one and value == 1):
            raise argparse.ArgumentTypeError(
                f"{value:g} is not between 0{' (excluded)' * above_zero} and {highest}{' (excluded)' * below_one}"
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


def finite(text: str) -> float:
    """A number, and neither infinity nor NaN."""
    value = float(text)
    if not abs(value) < float("inf"):
        raise argparse.ArgumentTypeError(f"{value:g} is not a finite number")
    return value


class OneOrTwo(argparse.Action):
    """One value that stands for both of two, or two values."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if len(values) > 2:
            raise argparse.ArgumentError(self, f"{len(values)} values are given, expected one or two")
        setattr(namespace, self.dest, values * 2 if len(values) == 1 else values)


def text_or_none(text: str) -> str | None:
    return None if text.lower() in ("", "none") else text


def number_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def place(text: str) -> str:
    """A path, with a leading ``~`` or ``~user`` replaced; also an address or a command, which stays as it is."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: expected a path")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~") and not os.path.lexists(expanded):
        raise argparse.ArgumentTypeError(f"{text!r} names no user of this machine; ./{text} would be a path")
    return expanded


def place_or_none(text: str) -> str | None:
    """`place`, or None for an empty text, which stands for "not given" in DeiT."""
    return place(text) if text else None


def local_path(text: str) -> Path:
    """`place` as a `Path`, for options of scripts."""
    return Path(place(text))


class Accepted(argparse.Action):
    """An option of DeiT's or LeTs' commands that has no effect here: its value is checked and dropped."""

    def __init__(self, option_strings: list[str], dest: str, nargs: int | None = None, type: type | None = None):
        hidden = argparse.SUPPRESS
        super().__init__(option_strings, dest=hidden, nargs=nargs, default=hidden, type=type, help=hidden)

    def __call__(self, *args: object) -> None:
        """Leave the namespace as it is."""


class Refused(argparse.Action):
    """An option of DeiT's or LeTs' commands that would change the run in a way that is not implemented here."""

    def __init__(self, option_strings: list[str], dest: str, reason: str):
        hidden = argparse.SUPPRESS
        super().__init__(option_strings, dest=hidden, nargs="?", default=hidden, help=hidden)
        self.reason = reason

    def __call__(self, parser: argparse.ArgumentParser, namespace: object, values: object, option: str) -> None:
        parser.error(f"{option} {self.reason}")


FLAGS_WITHOUT_EFFECT = ("--dist-eval", "--distributed", "--resplit", "--train-mode", "--tune-depth", "--tune-width")
FLAGS_WITHOUT_EFFECT += ("--tune-small-model", "--trans-tie-param")
OPTIONS_WITHOUT_EFFECT = {"--dist-url": str, "--dist-backend": str, "--world-size": int, "--patience-epochs": int}
OPTIONS_WITHOUT_EFFECT |= {"--initialize-scheme": str, "--mapping-scheme": str, "--coeff-mapping": str}
OPTIONS_WITHOUT_EFFECT |= {"--tune-residual-noise": float, "--learning-rate-res": float, "--weight-decay-res": float}
SUBMITIT = "is an option of DeiT's run_with_submitit.py: start the processes with torchrun, or with scripts/slurm.sh"
REFUSED = {
    "--cosub": "is not implemented: expected a command without it; --descendants trains several networks together",
    "--attn-only": "is not implemented: all layers are trained; expected a command without it",
    "--no-train-mode": "is not implemented: --drop 0 --drop-path 0 train without dropout and drop-path",
    "--pretrained": "is not implemented: --finetune takes the weights of a checkpoint",
    "--load-tar": "is not implemented: --data-set WDS reads tar files",
    "--tune-residual": "is not implemented: expanded weights have no additive terms; expected a command without it",
    "--no-tune-depth": "is not implemented: depth coefficients are always trained; expected a command without it",
    "--no-tune-width": "is not implemented: width matrices are always trained; expected a command without it",
    "--no-tune-small-model": "is not implemented: --src-path with --freeze-src trains only what expands a ViT",
    "--no-trans-tie-param": "is not implemented: layers always share width matrices; expected a command without it",
    **dict.fromkeys(("--nodes", "--ngpus", "--node", "--gpu", "--timeout", "--job-dir", "--partition"), SUBMITIT),
    **dict.fromkeys(("--use-volta32", "--comment"), SUBMITIT),
}


def add_foreign_options(p: argparse.ArgumentParser) -> None:
    """Options of DeiT's and LeTs' programs that have no effect here, or are refused with the reason."""
    names = textwrap.fill(", ".join([*FLAGS_WITHOUT_EFFECT, *OPTIONS_WITHOUT_EFFECT]), 76)
    g = p.add_argument_group("accepted for the commands of DeiT and LeTs, without effect", names)
    for name in FLAGS_WITHOUT_EFFECT:
        g.add_argument(name, action=Accepted, nargs=0)
    for name, kind in OPTIONS_WITHOUT_EFFECT.items():
        g.add_argument(name, action=Accepted, type=kind)
    for name, reason in REFUSED.items():
        g.add_argument(name, action=Refused, reason=reason)
    # given by torch.distributed.launch without --use_env, to each process its own
    g.add_argument("--local-rank", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def option_parser(kind: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.ArgumentParser:
    """DeiT's options and this program's. Written with '-'; '_' is understood too."""
    p = kind("main.py", description=RUNS, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    flag = argparse.BooleanOptionalAction

    g = p.add_argument_group("what to run")
    g.add_argument("--config", type=place_or_none, help="YAML file whose keys are these options; the command line wins")
    g.add_argument("--method", help="stage 1: the method, such as lets or tleg; default: what the next options ask for")
    g.add_argument("--model", "--model-type", help="aux_deit_… (TLEG stage 1), or any model to train as it is")
    g.add_argument("--src-arch", help="LeTs stage 1: the learngene, such as deit_small_patch16_224_L8, or a timm ViT")
    g.add_argument("--tgt-arch", help="LeTs stage 1: the Aux-Net, such as deit_base_patch16_224_L16_H12, or @L16-H12")
    g.add_argument("--des-arch", help="stage 2: the Des-Net, such as deit_base_patch16_224_L12, or @L6-H3")
    g.add_argument(
        "--load-gene",
        type=place_or_none,
        help="stage 2: learngene file, published checkpoint, address of one, or name in scripts/learngenes.yaml",
    )
    g.add_argument("--gene-ema", action=flag, default=False, help="take model_ema of the learngene's checkpoint")
    g.add_argument("--mapping-layer", type=whole_numbers, help="LeTs stage 2: Aux layer of each layer, '0,1,4,…'")
    g.add_argument("--mapping-layer-coeff", type=whole_numbers, help="LeTs stage 2: Aux layer whose coefficients")
    g.add_argument("--width-select", default="continuous", choices=WIDTH_SELECTIONS)
    g.add_argument("--depth-select", default="default", help="LeTs stage 2: default, even, first, last, or pairs:0,2,…")
    g.add_argument("--skip-init", type=parts, default=[], help=f"stage 2: leave at random {','.join(PARTS)}")
    g.add_argument("--init", choices=BASELINES, help="start from a trained ViT of other sizes, without learngene")
    g.add_argument(
        "--init-path", type=place_or_none, help=f"the trained ViT of --init: checkpoint, model folder, {WEIGHTS}"
    )
    g.add_argument(
        "--order-images",
        type=at_least(1),
        default=512,
        metavar="N",
        help="training images on which --init, --order and --depth-order look for what is important",
    )
    g.add_argument(
        "--layers-per-row",
        type=at_least(1),
        help="LeTs stage 1: layers sharing coefficients; default: 2 (deit_…), 1 (other kinds)",
    )
    g.add_argument("--group-size", type=at_least(1), default=2, help="LeTs stage 1: learngene layers in a mixture")
    g.add_argument("--full-width", action=flag, default=False, help="LeTs stage 1: LiGO's width matrices")
    g.add_argument(
        "--src-path",
        type=place_or_none,
        help="stage 1 of LeTs and elastic: a trained ViT of --src-arch that the learngene starts from: checkpoint, "
        f"model folder, {WEIGHTS}",
    )
    g.add_argument(
        "--order",
        choices=ORDERS,
        help="elastic: which neurons and heads of the source come first, and are those that Des-Nets keep; default: "
        "none, as they are",
    )
    g.add_argument(
        "--depth-order",
        choices=DEPTH_ORDERS,
        help="elastic: which layers Des-Nets keep: evenly spaced ones (default), those of the highest score, or those "
        "without which the output changes most",
    )
    g.add_argument("--freeze-src", action=flag, default=False, help="LeTs stage 1: train only what expands --src-path")
    g.add_argument(
        "--trans-init-scheme",
        nargs="+",
        action=OneOrTwo,
        metavar=("D", "W"),
        help=f"D: {', '.join(DEPTH_SCHEMES)}; W: {', '.join(WIDTH_SCHEMES)}; default: stackbert_noisy rand (deit_…), "
        "copy rand (other kinds)",
    )
    g.add_argument(
        "--trans-init-noise",
        nargs="+",
        type=float,
        action=OneOrTwo,
        metavar=("D", "W"),
        default=[0.03, 0.03],
        help="of the …_noisy schemes; one number is for both",
    )
    g.add_argument(
        "--descendants",
        type=at_least(0),
        metavar="K",
        help="stage 1: train K Des-Nets beside the Aux-Net in every step; default: 0, elastic: 2",
    )
    g.add_argument(
        "--descendant-depths",
        type=whole_numbers,
        help="… of these depths; default: from the learngene's (TLEG: 2, elastic: half the source's) up",
    )
    g.add_argument(
        "--descendant-heads",
        type=whole_numbers,
        help="… and heads; default: from the learngene's (elastic: half the source's) up",
    )
    g.add_argument(
        "--descendant-mlp-ratios",
        type=ratios,
        help="… and hidden neurons, as multiples of the width; default: the Aux-Net's",
    )
    g.add_argument(
        "--descendant-weight",
        type=ratio(),
        help="… their share of the loss; 1: without the Aux-Net; default: 0.5, elastic: 1",
    )
    g.add_argument(
        "--descendant-sampling",
        choices=SIZE_SAMPLINGS,
        help="… of random sizes, the smallest and random ones, or the largest, the smallest and random ones between"
        + OF_METHOD,
    )
    g.add_argument(
        "--descendant-warmup-epochs", type=at_least(0), metavar="N", help="… the largest alone in the first N epochs"
    )
    g.add_argument(
        "--descendant-coarse-to-fine",
        action=flag,
        help="… at first of the smallest and largest depth, heads and MLP ratio; then of those in the middle, too; at "
        "last of all",
    )
    g.add_argument(
        "--chain-weight",
        type=ratio(),
        help="share of the loss of a descendant that comes from the next larger one of its step" + OF_METHOD,
    )
    g.add_argument(
        "--finetune",
        type=place_or_none,
        help=f"start from the weights of a checkpoint, model folder, {WEIGHTS}; a head of other classes is "
        "re-initialised",
    )
    g.add_argument(
        "--resume",
        type=place_or_none,
        help="continue from a checkpoint; auto: from the newest whole one in --output-dir",
    )
    g.add_argument("--start-epoch", type=at_least(0), default=0)
    g.add_argument("--eval", action="store_true", help="evaluate and stop")
    g.add_argument("--epochs", type=at_least(0), default=300, help="0: initialise, evaluate, write the model")
    g.add_argument(
        "--linear-probe",
        action="store_true",
        help="with --epochs 0: give the ViT the linear head that fits its features of the training images best",
    )

    g = p.add_argument_group("data")
    g.add_argument("--data-set", default="IMNET", choices=DATA_SETS)
    g.add_argument(
        "--data-path",
        type=place_or_none,
        help="the folder that holds the data set; not needed for DIGITS. HF also takes OWNER/NAME[@REVISION], a data "
        "set of the Hugging Face Hub, WDS an address (https://…, hf-hub:datasets/OWNER/NAME), or a command that "
        "writes the file {} to its standard output: 'pipe:aws s3 cp s3://bucket/imagenet/{} -'",
    )
    g.add_argument(
        "--download",
        action=flag,
        default=False,
        help="fetch CIFAR10, CIFAR100, FLOWERS, FMNIST, FOOD101, INAT19 or TINYIMNET to --data-path if it is not there",
    )
    g.add_argument(
        "--shard-cache",
        type=place_or_none,
        metavar="DIR",
        help="WDS, HF: keep data from elsewhere here, on a disk of this host",
    )
    g.add_argument("--shard-cache-gb", type=positive, default=200, help="… at most so many GB; ImageNet has 150")
    g.add_argument(
        "--train-images",
        type=at_least(1),
        metavar="N",
        help="train on N of the training images, the same for every --seed, each class with its share",
    )
    g.add_argument(
        "--holdout",
        type=at_least(1),
        metavar="N",
        help="hold out N of the training images, and evaluate on them instead of the test images; test_… in the log is "
        "then about them",
    )
    g.add_argument("--nb-classes", type=at_least(1), help="expected number of classes of the data; default: counted")
    g.add_argument("--inat-category", default="name", choices=INAT_CATEGORIES)
    g.add_argument("--hf-image-column", metavar="NAME", help="HF: the column of images; default: the data set says it")
    g.add_argument("--hf-label-column", metavar="NAME", help="… of labels; WDS: the key of the label in .json files")
    g.add_argument("--hf-train-split", metavar="NAME", help="HF: the split to train on; default: train")
    g.add_argument("--hf-val-split", metavar="NAME", help="… to evaluate on; default: validation, else test")
    g.add_argument("--input-size", type=at_least(1), help="pixels; default: the architecture's")
    g.add_argument("--batch-size", "--batch", type=at_least(1), default=64, help="images per process and step")
    g.add_argument(
        "--accum-iter", "--accumulation-step", type=at_least(1), default=1, help="batches per optimiser step"
    )
    g.add_argument("--num-workers", type=at_least(0), default=10)
    g.add_argument(
        "--cache-data",
        action=flag,
        default=False,
        help="hold small images in the device's memory and augment them there in batches: the same recipe, "
        "other random numbers",
    )
    g.add_argument("--pin-mem", action=flag, default=True)
    g.add_argument("--skip-bad-images", action="store_true", help="go on without images that cannot be read")
    g.add_argument("--mean", type=finite, nargs=3, metavar=COLOURS, help="subtracted from pixels of 0 to 1" + OF_SOURCE)
    g.add_argument("--std", type=positive, nargs=3, metavar=COLOURS, help="they are then divided by this" + OF_SOURCE)
    g.add_argument("--interpolation", choices=INTERPOLATIONS, help="of the resize in evaluation" + OF_SOURCE)
    g.add_argument(
        "--eval-crop-ratio",
        type=ratio(above_zero=True, highest=2),
        help="side of the crop of an evaluation as a share of the resized image's; above 1 it is padded" + OF_SOURCE,
    )
    g.add_argument(
        "--crop-mode",
        choices=CROP_MODES,
        help="… resized before are the shorter side (center), both (squash) or the longer one (border)" + OF_SOURCE,
    )

    g = p.add_argument_group("augmentation")
    g.add_argument(
        "--three-augment",
        "--ThreeAugment",
        action=flag,
        default=False,
        help="DeiT III's 3-Augment in the place of --aa and --reprob: grey, solarised or blurred, then --color-jitter",
    )
    g.add_argument("--src", action=flag, default=False, help="… with its simple random crop: resized, then shifted")
    g.add_argument(
        "--crop-padding",
        type=at_least(0),
        metavar="N",
        help="training shifts small images, and those of --src, by up to N pixels; default: an eighth of --input-size, "
        "with --src 4",
    )
    g.add_argument("--color-jitter", type=number_or_none, default=0.3)
    g.add_argument("--aa", type=text_or_none, default="rand-m9-mstd0.5-inc1", help="AutoAugment policy, or none")
    g.add_argument("--train-interpolation", default="bicubic", choices=("bicubic", "bilinear", "random"))
    g.add_argument("--repeated-aug", action=flag, default=True)
    g.add_argument("--reprob", type=ratio(), default=0.25)
    g.add_argument("--remode", default="pixel", choices=("const", "rand", "pixel"))
    g.add_argument("--recount", type=at_least(1), default=1)
    g.add_argument("--mixup", type=float, default=0.8)
    g.add_argument("--cutmix", type=float, default=1.0)
    g.add_argument(
        "--cutmix-minmax",
        nargs="+",
        type=ratio(),
        action=OneOrTwo,
        metavar=("MIN", "MAX"),
        help="sides of cutmix's boxes as shares of the image's, instead of --cutmix; one number for a fixed size",
    )
    g.add_argument("--mixup-prob", type=ratio(), default=1.0)
    g.add_argument("--mixup-switch-prob", type=ratio(), default=0.5)
    g.add_argument("--mixup-mode", default="batch", choices=("batch", "pair", "elem"))
    g.add_argument("--smoothing", type=ratio(below_one=True), default=0.1)
    g.add_argument(
        "--bce-loss",
        action=flag,
        default=False,
        help="DeiT III's binary cross-entropy: 1 for every class that is mixed into an image (smoothed by --smoothing)",
    )

    g = p.add_argument_group("regularisation and averaging")
    g.add_argument("--drop", type=ratio(), default=0.0, help="dropout of a ViT's positions, projections and MLPs")
    g.add_argument("--drop-path", type=ratio(below_one=True), default=0.1)
    g.add_argument("--clip-grad", type=number_or_none)
    g.add_argument(
        "--model-ema",
        action=flag,
        help="average the weights over the steps; default in training. With --eval: evaluate the averaged weights of "
        "--resume; not the default",
    )
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
    g.add_argument("--decay-rate", "--dr", type=float, default=0.1)

    g = p.add_argument_group("distillation")
    g.add_argument(
        "--teacher-model", default="regnety_160", help="an architecture, or source: stage 1's own --src-path"
    )
    g.add_argument(
        "--teacher-path", type=place_or_none, help="checkpoint or http(s) address; default: timm's pretrained weights"
    )
    g.add_argument(
        "--distillation-type",
        default="none",
        choices=DISTILLATION_TYPES,
        help="what the teacher is asked for: logits (soft), decisions (hard), or features, of elastic stage 1's source",
    )
    g.add_argument(
        "--distillation-alpha",
        type=float,
        help="its share of the loss, the rest is that of the labels; default: 0.5, with features 1 and no head",
    )
    g.add_argument("--distillation-tau", type=float, default=1.0)
    g.add_argument(
        "--distillation-mean",
        choices=DISTILLATION_MEANS,
        help="the divergence of soft distillation over the number of logits, as in DeiT, or of images, which a mixture "
        "with labels needs; default: logits, elastic: images",
    )
    g.add_argument(
        "--teacher-cache",
        type=place_or_none,
        metavar="DIR",
        help="cache of the teacher's logits: write it, or read what other runs wrote",
    )
    g.add_argument(
        "--teacher-cache-top",
        type=at_least(1),
        metavar="K",
        help="… keep the logits of the K largest classes; default: all, exactly",
    )

    g = p.add_argument_group("run")
    g.add_argument("--output-dir", type=place_or_none, help="where everything is written; default: nothing is")
    g.add_argument(
        "--eval-interval",
        type=at_least(1),
        default=1,
        metavar="K",
        help="evaluate, log and write everything after every K epochs, and after the last",
    )
    g.add_argument("--save-every-steps", type=at_least(1), help="write a checkpoint N steps after the last one, too")
    g.add_argument("--save-every-minutes", type=positive, help="… and when so many minutes have passed since the last")
    g.add_argument("--keep-checkpoints", type=at_least(0), default=1, help="old checkpoints to keep, besides the best")
    g.add_argument("--on-nan", default="stop", choices=ON_NAN, help="what to do when loss or gradient is not finite")
    g.add_argument("--dist-timeout", type=positive, default=10, help="minutes that processes wait for each other")
    g.add_argument(
        "--wandb",
        type=text_or_none,
        metavar="PROJECT",
        help="also send all numbers to Weights & Biases, if it is installed",
    )
    g.add_argument(
        "--push-to-hub", type=text_or_none, metavar="OWNER/NAME", help="upload what was trained to the Hugging Face Hub"
    )
    g.add_argument(
        "--push-ema", action="store_true", help="… with the averaged weights in the place of the model's own"
    )
    g.add_argument(
        "--device", default="auto", help="auto: the accelerator that torch finds, else cpu; or cuda, cuda:1, xpu, mps"
    )
    g.add_argument(
        "--amp-dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="auto: float32 on CPU and MPS, else bfloat16 where the device has it, float16 where not",
    )
    g.add_argument("--compile", action="store_true", help="torch.compile")
    g.add_argument("--grad-checkpointing", action="store_true", help="recompute activations to save memory")
    g.add_argument("--seed", type=at_least(0, 2**32 - 1), default=0)
    g.add_argument(
        "--log-interval", type=at_least(1), default=50, help="log every N steps, the only host–device synchronisation"
    )

    add_foreign_options(p)
    return p  # fmt: skip
