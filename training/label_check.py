"""Whether the weights of teacher and start were trained on the classes of the data."""

import re
import sys
from collections.abc import Mapping, Sequence

from common.download import fetch
from common.errors import InputError
from models.formats.class_names import class_names, first_difference
from training.config import MODEL, SOURCE, TAGGED, TIMM, ModelConfig, TeacherConfig, option_name, tagged_name

from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import get_pretrained_cfg

NUMBERED = ("FLOWERS", "HF", "WDS")  # data sets that number their classes if they have no names


def names_known(data_set: str, classes: Sequence[str]) -> list[str] | None:
    """The names of the classes of the data, or None where they are only numbers."""
    numbers = ([str(i + first) for i in range(len(classes))] for first in (0, 1))
    return None if data_set in NUMBERED and list(classes) in numbers else list(classes)


def check_teacher_names(teacher: TeacherConfig, ours: Sequence[str] | None) -> None:
    """Compare the classes of the teacher with those of the data, where both are known.

    Raises:
        InputError: they differ.
    """
    if teacher.distillation_type == "none" or teacher.teacher_model == SOURCE:
        return
    path, name = teacher.teacher_path, teacher.teacher_model
    theirs = names_in(path) if path else names_of_timm(name, ours)
    if difference := first_difference(theirs, ours):
        raise InputError(f"{teacher.option} was trained on other classes than the data have: {difference}")


def warn_of_heads(sources: Mapping[str, tuple[str, str]], config: ModelConfig, ours: Sequence[str] | None) -> None:
    """Warn of heads of other classes: they are kept, as they may be trained further, or the names mean the same.

    Args:
        sources: options, with the weights that they name, as `training.config.weight_sources` gives them.
    """
    for option in TAGGED:
        if option in sources:
            source, on_hub = sources[option]
            theirs = names_of_timm(tagged_name(config, option), ours) if source == TIMM else names_in(source, on_hub)
            warn_of_head(f"{option_name(option)} {source}", theirs, ours)


def warn_of_head(source: str, theirs: Sequence[str] | None, ours: Sequence[str] | None) -> None:
    if difference := first_difference(theirs, ours):
        print(
            f"warning: {source} was trained on other classes, and its head is kept: {difference}",
            file=sys.stderr,
            flush=True,
        )


def names_in(source: str, on_hub: str = MODEL) -> list[str] | None:
    """The class names in a file or at an address; None if there are none, or the file cannot be read."""
    try:
        return class_names(fetch(source, on_hub=on_hub))
    except InputError:
        return None


def names_of_timm(model: str, ours: Sequence[str] | None) -> list[str] | None:
    """The classes of timm's weights of ``model``, if those of the data are WordNet's codes, as ImageNet's are."""
    try:
        subset = infer_imagenet_subset(get_pretrained_cfg(model))
    except RuntimeError:  # of an unknown tag
        return None
    if subset is None or not all(re.fullmatch(r"n\d{8}", name) for name in ours or [""]):
        return None
    return ImageNetInfo(subset).label_names()
