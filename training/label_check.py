"""Whether weights that a run starts from, or is taught by, were trained on the classes of its data."""

import argparse
import re
import sys
from collections.abc import Sequence
from contextlib import suppress

import models
from common.download import fetch
from common.errors import InputError
from models.formats.class_names import class_names, first_difference

from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import get_pretrained_cfg

NUMBERED = ("FLOWERS", "WDS")  # data sets that call their classes by numbers where they know no names


def names_known(data_set: str, classes: Sequence[str]) -> list[str] | None:
    """The names of the classes of the data, or None where they are only numbers."""
    numbers = ([str(i + first) for i in range(len(classes))] for first in (0, 1))
    return None if data_set in NUMBERED and list(classes) in numbers else list(classes)


def check_names(args: argparse.Namespace, classes: Sequence[str], gene: models.Learngene | None) -> None:
    """Compare the classes of the data with those of the files that the options name, where both are known.

    A head that is kept for other classes is warned of: it may be trained further, and the names may mean the same.

    Raises:
        InputError: the teacher was trained on others.
    """
    ours = names_known(args.data_set, classes)
    if args.distillation_type != "none" and not args.eval:
        source = f"--teacher-path {args.teacher_path}" if args.teacher_path else f"--teacher-model {args.teacher_model}"
        theirs = names_in(args.teacher_path) if args.teacher_path else names_of_timm(args.teacher_model, ours)
        if difference := first_difference(theirs, ours):
            raise InputError(f"{source} was trained on other classes than the data have: {difference}")
    if args.resume:  # which has the last word on all weights
        return
    if gene is not None:
        warn_of_head(f"--load-gene {args.load_gene}", gene.classes, ours)
    of_aux = "learngene.safetensors" if models.is_aux_name(args.model or "") else "model.safetensors"
    for option, on_hub in {
        "finetune": of_aux,
        "init_path": "model.safetensors",
        "src_path": "model.safetensors",
    }.items():
        if source := getattr(args, option):
            warn_of_head(f"--{option.replace('_', '-')} {source}", names_in(source, on_hub), ours)


def warn_of_head(source: str, theirs: Sequence[str] | None, ours: Sequence[str] | None) -> None:
    if difference := first_difference(theirs, ours):
        print(
            f"warning: {source} was trained on other classes, and its head is kept: {difference}",
            file=sys.stderr,
            flush=True,
        )


def names_in(source: str, on_hub: str = "model.safetensors") -> list[str] | None:
    """The class names of a file or address, or None where it does not know them, or its reader will refuse it."""
    try:
        path = fetch(source, on_hub=on_hub)
    except InputError:
        return None
    if source.startswith("hf-hub:"):
        where, _, revision = source.removeprefix("hf-hub:").partition("@")
        config = "/".join([*where.split("/")[:2], "config.json"]) + f"@{revision}" * bool(revision)
        with suppress(InputError):  # not every repository has one
            fetch(f"hf-hub:{config}")  # it then lies beside the weights
    return class_names(path)


def names_of_timm(model: str, ours: Sequence[str] | None) -> list[str] | None:
    """The classes of timm's weights of ``model``, where the data call theirs by WordNet's codes, as ImageNet does."""
    try:
        subset = infer_imagenet_subset(get_pretrained_cfg(model))
    except RuntimeError:  # of an unknown tag
        return None
    if subset is None or not all(re.fullmatch(r"n\d{8}", name) for name in ours or [""]):
        return None
    return ImageNetInfo(subset).label_names()
