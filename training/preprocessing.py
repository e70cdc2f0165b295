"""The preprocessing of a run: that of the weights it starts from, unless options say otherwise."""

from dataclasses import asdict
from pathlib import Path

import models
from common.download import fetch
from common.errors import InputError, error_context
from datasets import WHOLE, are_small
from models.kinds import check_tag
from models.preprocessing import DEFAULT, Preprocessing, preprocessing_in
from training.config import (
    TIMM,
    Config,
    DataConfig,
    ModelConfig,
    TeacherConfig,
    option_name,
    tagged_name,
    weight_sources,
)
from utils import print_main

import timm
from timm.models import get_pretrained_cfg

# of DataConfig → of Preprocessing
PREPROCESSING_OPTIONS = {
    "mean": "mean",
    "std": "std",
    "interpolation": "interpolation",
    "eval_crop_ratio": "crop_pct",
    "crop_mode": "crop_mode",
}


def preprocessing_of(data: DataConfig) -> Preprocessing:
    """What the options say, and the default where they say nothing."""
    given = {name: getattr(data, option) for option, name in PREPROCESSING_OPTIONS.items()}
    return Preprocessing(**{name: value for name, value in given.items() if value is not None})


def resolve_preprocessing(config: Config, gene: models.Learngene | None = None) -> Config:
    """A copy of ``config`` with all `PREPROCESSING_OPTIONS`: as given, else as the weights at the start were trained.

    Logs what differs from the default because of these weights.

    Args:
        gene: the learngene of --load-gene, if that is given.

    Raises:
        InputError: a file of weights describes a preprocessing that cannot be used.
    """
    source, theirs = source_of(config, gene)
    missing = {option: name for option, name in PREPROCESSING_OPTIONS.items() if getattr(config.data, option) is None}
    config = config.with_options(**{option: getattr(theirs, name) for option, name in missing.items()})
    other = [option for option in not_default(config.data) if option in missing]
    if other:
        values = (f"{option_name(option)} {shown(getattr(config.data, option))}" for option in other)
        print_main(f"{', '.join(values)}: as in {source}")
    return config


def not_default(data: DataConfig) -> list[str]:
    """The `PREPROCESSING_OPTIONS` whose values are not the default ones."""
    default, ours = asdict(DEFAULT), asdict(preprocessing_of(data))
    return [option for option, name in PREPROCESSING_OPTIONS.items() if ours[name] != default[name]]


def shown(value: object) -> str:
    return " ".join(f"{number:g}" for number in value) if isinstance(value, tuple) else str(value)


def source_of(config: Config, gene: models.Learngene | None) -> tuple[str, Preprocessing]:
    """The weights that the run starts from, as their option names them, and their preprocessing.

    Of several the last ones to be loaded count. A file that says nothing about its images has DeiT's preprocessing, or
    that of the tag where the architecture is a name of timm's with one.
    """
    sources = weight_sources(config.model, config.teacher, config.runtime.resume)
    if "resume" in sources:
        return in_source("resume", *sources["resume"], "")
    if gene is not None:
        return f"--load-gene {config.model.load_gene}", gene.preprocessing
    option = next((option for option in ("finetune", "src_path", "init_path") if option in sources), None)
    if option is None:
        return "", DEFAULT
    return in_source(option, *sources[option], tagged_name(config.model, option) or "")


def in_source(option: str, source: str, file: str, name: str) -> tuple[str, Preprocessing]:
    """The preprocessing of weights of the architecture ``name``, and how a message names them.

    Args:
        option, source, file: as in `training.config.weight_sources`.
    """
    label, name = f"{option_name(option)} {source}", name.partition("@")[0]
    with error_context(label):
        found = None if source == TIMM else preprocessing_in(place_of(source, file))
        if source == TIMM or (found is None and "." in name):
            return f"{label} ({name})", of_timm(name)
    if found is None:
        note_silence(label, name)
    return label, found or DEFAULT


def note_silence(label: str, name: str) -> None:
    """Log that a file of weights says nothing about its images, if timm has other weights of the architecture."""
    usual = of_timm(name)
    if (usual.mean, usual.std) != (DEFAULT.mean, DEFAULT.std):
        tagged = f"{name.partition('.')[0]}.{get_pretrained_cfg(name).tag}"
        print_main(
            f"{label} says nothing about its images: they are normalised as DeiT's; timm's {tagged} has "
            f"--mean {shown(usual.mean)} --std {shown(usual.std)}"
        )


def place_of(source: str, file: str) -> Path:
    """The local file of weights; a path that does not exist is left to its reader."""
    try:
        return fetch(source, on_hub=file)
    except InputError:
        return Path(source)


def of_timm(name: str) -> Preprocessing:
    """The preprocessing of the weights that timm has for ``NAME[.tag]``, or the default if it has none.

    Raises:
        InputError: timm does not know the tag.
    """
    check_tag(name)
    config = get_pretrained_cfg(name) if timm.is_model(name) else None
    return DEFAULT if config is None else Preprocessing.from_config(config.to_dict())


def of_teacher(config: TeacherConfig) -> Preprocessing:
    """The preprocessing of the images that the teacher was trained on."""
    sources = weight_sources(ModelConfig(), config, None)
    if "teacher_path" not in sources:
        return of_timm(config.teacher_model)
    return in_source("teacher_path", *sources["teacher_path"], config.teacher_model)[1]


def evaluation_config(data: DataConfig, in_chans: int) -> dict:
    """How the run evaluates, with timm's keys, for the ``config.json`` of a model."""
    size = data.input_size
    whole = WHOLE if are_small(data.data_set, size) else {}
    return {"input_size": [in_chans, size, size], **preprocessing_of(data).as_config(), **whole}
