"""How a data set of the Hugging Face Hub says what its files are: its splits, its columns and its classes.

A data set is Parquet files. The YAML at the beginning of README.md may list configurations, with the files of each
split, and the features of the columns:

    configs:
    - config_name: default
      data_files:
      - split: train
        path: data/train-*
    dataset_info:
      features:
      - name: label
        dtype:
          class_label:
            names: {'0': apple, '1': pear}

The schema of a file written by the package ``datasets`` has the features again, as JSON under the key ``huggingface``.
"""

import fnmatch
import json
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from common.errors import InputError, error_context
from common.files import parse_yaml

import pyarrow as pa

# split → the words in the names of files or folders that stand for it, without a list of files
WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label")  # of several, the first of these
BYTES = "bytes"  # the field of an image's struct


# ---------------------------------------------------------------------------------------------------------------------
# Splits
# ---------------------------------------------------------------------------------------------------------------------


def read_card(path: Path | None) -> dict:
    """The YAML at the beginning of a README.md; empty if there is none.

    Raises:
        InputError: it is not YAML of plain data.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path else []
    if not lines or lines[0].strip() != "---":
        return {}
    content = parse_yaml("\n".join(takewhile(lambda line: line.strip() != "---", lines[1:])), path)
    return content if isinstance(content, dict) else {}


def files_of_splits(names: Sequence[str], card: Mapping, source: str) -> dict[str, list[str]]:
    """The Parquet files ``names`` of each split, as the card lists them, or as their names say.

    Args:
        source: of the files, for messages.

    Raises:
        InputError: the card offers several configurations, or the names say nothing.
    """
    config = default_config(card, source)
    folder = str(config.get("data_dir") or "").strip("./")
    if folder:
        names = [name for name in names if name.startswith(f"{folder}/")]
    try:
        patterns = patterns_of(config.get("data_files"))
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{source}: README.md lists data_files in an unknown form: expected split and path") from error
    if patterns:
        listed = {
            split: [name for name in names if any(matches(name, pattern) for pattern in of_split)]
            for split, of_split in patterns.items()
        }
        return {split: files for split, files in listed.items() if files}
    splits: dict[str, list[str]] = {}
    for name in names:
        splits.setdefault(split_in_name(name), []).append(name)
    for split, files in splits.items():
        folders = sorted({name.rpartition("/")[0] for name in files})
        if len(folders) > 1:
            raise InputError(
                f"{source} has files of {split} in {folders[0] or 'its root'} and in {folders[1]}, and README.md does "
                "not say which belong together: expected one of these folders"
            )
    return splits


def default_config(card: Mapping, source: str) -> Mapping:
    """The configuration that is meant if none is named; empty if the card has none."""
    configs = card.get("configs") or []
    known = [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []
    chosen = [c for c in known if c.get("default") is True] or [c for c in known if c.get("config_name") == "default"]
    if len(known) > 1 and not chosen:
        found = ", ".join(str(config.get("config_name"))[:40] for config in known[:6])
        raise InputError(
            f"{source} has {len(known)} configurations ({found}), and none is the default: download the files of one"
        )
    return (chosen or known or [{}])[0]


def patterns_of(data_files: object) -> dict[str, list[str]]:
    """split → patterns, from the ``data_files`` of a card: a pattern, a list of them, or of splits with patterns."""
    if not data_files:
        return {}
    if isinstance(data_files, (str, list)) and all(isinstance(entry, str) for entry in data_files):
        return {"train": [data_files] if isinstance(data_files, str) else data_files}
    paths = {str(entry["split"]): entry["path"] for entry in data_files}
    return {split: [path] if isinstance(path, str) else [str(one) for one in path] for split, path in paths.items()}


def matches(name: str, pattern: str) -> bool:
    """Whether a path fits a pattern, in which ``*`` stands for a part of a name and ``**`` for any folders."""
    parts, reached = name.split("/"), {0}  # how many parts the pattern so far may stand for
    for wanted in pattern.removeprefix("./").split("/"):  # no search: a pattern is the text of a stranger
        if wanted == "**":
            reached = set(range(min(reached, default=len(parts) + 1), len(parts) + 1))
        else:
            reached = {i + 1 for i in reached if i < len(parts) and fnmatch.fnmatchcase(parts[i], wanted)}
    return len(parts) in reached


def split_in_name(name: str) -> str:
    """The split that the name of a file says, else the innermost folder that says one; ``train`` if none does."""
    for part in reversed(name.split("/")):
        words = set(re.split(r"[^a-z]+", part.lower()))
        for split, known in WORDS.items():
            if words.intersection(known):
                return split
    return "train"


def choose_split(splits: Mapping[str, object], is_train: bool, wanted: str | None, source: str) -> str:
    """The name of the split to train on, or to evaluate on.

    Args:
        wanted: the one that an option names.

    Raises:
        InputError: there is none.
    """
    option = "--hf-train-split" if is_train else "--hf-val-split"
    expected = WORDS["train"] if is_train else (*WORDS["validation"], *WORDS["test"])
    found = [wanted] if wanted else [name for name in expected if name in splits]
    if not found or found[0] not in splits:
        missing = wanted or (f"{expected[0]}" if is_train else "validation or test")
        there = ", ".join(name[:40] for name in [*splits][:8]) or "none"
        raise InputError(f"{source} has no split {missing}, its splits are {there}: {option} names one of them")
    return found[0]


# ---------------------------------------------------------------------------------------------------------------------
# Columns
# ---------------------------------------------------------------------------------------------------------------------


class Feature(NamedTuple):
    """What a column is (``Image``, ``ClassLabel``, …), and the names of the classes."""

    kind: str
    names: list[str] | None = None


def features_of(schema: pa.Schema, card: Mapping) -> dict[str, Feature]:
    """column → feature, from the metadata of a schema, else from the card; empty if neither says anything.

    Raises:
        InputError: the card names classes by something else than their numbers.
    """
    try:
        listed = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature_of(feature) for name, feature in listed.items()}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        pass
    try:
        infos = card["dataset_info"]
        config = default_config(card, "README.md").get("config_name")
        of_config = [infos] if isinstance(infos, dict) else [i for i in infos if i.get("config_name") == config]
        info = (of_config or infos)[0]
        return {entry["name"]: feature_of_card(entry.get("dtype")) for entry in info["features"]}
    except (LookupError, TypeError, AttributeError):
        return {}


def feature_of(feature: object) -> Feature:
    kind, names = (feature.get("_type"), feature.get("names")) if isinstance(feature, dict) else (None, None)
    return Feature(str(kind), [str(name) for name in names] if isinstance(names, list) and names else None)


def feature_of_card(kind: object) -> Feature:
    if kind == "image":
        return Feature("Image")
    if isinstance(kind, dict) and "class_label" in kind:
        names = (kind["class_label"] or {}).get("names")
        if isinstance(names, dict):
            try:
                names = [names[key] for key in sorted(names, key=int)]
            except (ValueError, TypeError, ArithmeticError) as error:
                key, name = next(iter(names.items()))
                raise InputError(
                    f"README.md names classes in an unknown form ({key!s:.40}: {name!s:.40}): expected the numbers of "
                    "classes with their names, '0': cat"
                ) from error
        return Feature("ClassLabel", [str(name) for name in names] if names else None)
    return Feature(str(kind)[:40])


class Columns(NamedTuple):
    """Where images and labels are.

    Attributes:
        bytes: the path of the images in the schema, ``image.bytes`` if they are structs.
        names: of the classes; None if the files do not say them.
    """

    image: str
    bytes: str
    label: str
    names: list[str] | None


def choose_columns(schema: pa.Schema, card: Mapping, image: str | None, label: str | None, source: str) -> Columns:
    """The columns of images and labels.

    Args:
        image, label: the ones that options name.

    Raises:
        InputError: there is none, there are several, or what it holds cannot be used.
    """
    with error_context(source):
        features = features_of(schema, card)
    types = {field.name: field.type for field in schema}
    images = [name for name in types if features.get(name, Feature("")).kind == "Image"]
    images = images or [name for name in types if is_image(types[name])]
    image = choose(image, images, IMAGE_COLUMNS, types, "images", "--hf-image-column", source)
    if not is_image(types[image]):
        raise InputError(
            f"{source}: the column {image} is of type {str(types[image])[:60]}, expected the bytes of images, or a "
            "struct of bytes and path: --hf-image-column names another one"
        )
    labels = [name for name in types if features.get(name, Feature("")).kind == "ClassLabel"]
    labels = labels or [name for name in types if pa.types.is_integer(types[name])]
    label = choose(label, labels, LABEL_COLUMNS, types, "labels", "--hf-label-column", source)
    if not pa.types.is_integer(types[label]):
        raise InputError(
            f"{source}: the column {label} is of type {str(types[label])[:60]}, expected labels in whole numbers: "
            "--hf-label-column names another one"
        )
    names = features.get(label, Feature("")).names
    if names is not None and len(set(names)) < len(names):
        raise InputError(f"{source}: the column {label} names a class twice: expected different names")
    return Columns(image, f"{image}.{BYTES}" if pa.types.is_struct(types[image]) else image, label, names)


def is_image(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold files of images."""
    if pa.types.is_struct(kind):
        return any(field.name == BYTES and is_image(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def choose(
    wanted: str | None,
    found: Sequence[str],
    preferred: Sequence[str],
    types: Mapping[str, object],
    what: str,
    option: str,
    source: str,
) -> str:
    """The column that an option names, else the only one that fits, else the first of the preferred ones.

    Raises:
        InputError: there is none of this name, none that fits, or several.
    """
    if wanted is not None:
        if wanted not in types:
            there = ", ".join(name[:40] for name in [*types][:12])
            raise InputError(f"{option} {wanted}: {source} has no such column, its columns are {there}")
        return wanted
    if len(found) == 1:
        return found[0]
    first = next((name for name in preferred if name in found), None)
    if first is None:
        there = ", ".join(name[:40] for name in (found or [*types])[:12])
        count = f"several columns of {what} ({there})" if found else f"no column of {what} among {there}"
        raise InputError(f"{source} has {count}: {option} names one")
    return first
