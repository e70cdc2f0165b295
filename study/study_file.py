"""Read the YAML file of a study: check every key, and plan the runs before any of them starts.

Besides options of main.py, an entry under ``data`` may have the key ``rotated``: the study rotates the images of
Fashion-MNIST counterclockwise by 90, 180 or 270 degrees, and writes them to its output folder before they are used::

    data:
      ROTATED: {data-set: FMNIST, data-path: /usr/share/datasets/fashion-mnist, rotated: 90, train-images: 1000}

In options that are texts, ``{study}`` stands for the folder that the runs write to, ``{seed}`` for the seed of the run,
and in those of ViTs ``{arch}``, ``{size}``, ``{depth}`` and ``{heads}`` for theirs.

A group that is ``like: OTHER`` has all that the other has and it does not replace (`study.groups.groups_of`).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import models
from common.errors import InputError, error_context, nearest
from common.files import read_yaml
from options import place
from study.compared import read_compared
from study.groups import groups_of, lists_of
from study.plan import ROTATED, STUDY, Group, Study, plan
from study.results import slug
from study.rotated import DEGREES

KINDS = ("teacher", "stage1", "vit")
SET_BY_THE_STUDY = ("epochs", "lr", "seed", "output-dir", "resume", "config", "eval")
INITIALISED = ("load-gene", "finetune", "init")  # options of runs that log what they are before training

LIST, TEXT, MAP = (list,), (str,), (dict,)
STUDY_KEYS = {"study": TEXT, "sizes": MAP, "seeds": LIST, "options": MAP, "data": MAP, "tuning": MAP, "runs": MAP}
STUDY_KEYS |= {"report": MAP, "questions": MAP, "in_order": (bool,)}
GROUP_KEYS = {"kind": TEXT, "method": TEXT, "data": TEXT, "sizes": LIST, "seeds": LIST, "epochs": (int, list)}
GROUP_KEYS |= {"like": TEXT, "lr": (int, float, list, str), "tuning": MAP, "stored": (str, list), "options": MAP}


def read_study(path: Path, data_path: Path | None = None, device: str | None = None) -> Study:
    """The study of a YAML file, with all its runs planned.

    Args:
        data_path: the folder of data sets that have one, instead of that in the file.
        device: that of the runs, instead of what the file says.

    Raises:
        InputError: the file is not one of a study, or its runs cannot work.
    """
    content = read_yaml(path)
    with error_context(str(path)):
        check_keys(content, STUDY_KEYS, "the study", needed=("study", "seeds", "data", "runs"))
        if slug(content["study"]) != content["study"]:
            raise InputError(f"study is {content['study']!r}: expected a name that a folder can have")
        sizes, tuning = content.get("sizes", {}), content.get("tuning", {})
        for name, arch in sizes.items():
            with error_context(f"sizes, {name}"):
                models.parse_arch(str(arch))
            if slug(str(name)) != name:
                raise InputError(f"sizes: {name!r} is no name that a folder can have")
        check_keys(tuning, {"seed": (int,), "size": TEXT, "holdout": (int,)}, "tuning")
        options = named_options(content.get("options", {}), "options")
        options |= {} if device is None else {"device": device}
        data = {name: data_options(entry, f"data, {name}") for name, entry in content["data"].items()}
        for entry in data.values():
            entry |= {"data-path": str(data_path)} if data_path and "data-path" in entry else {}
        study = Study(
            content["study"], sizes, content["seeds"], options, data, tuning, {}, content.get("in_order", False)
        )
        check_numbers(study.seeds, "seeds")
        for name, entry in groups_of(content["runs"]).items():
            with error_context(f"runs, {name}"):
                study.groups[name] = read_group(str(name), entry, study)
        check_names(study)
        read_compared(content, {group.method for group in study.groups.values()}, study.sizes, study.data)
        plan(study)
    return study


def check_keys(content: object, known: Mapping[str, tuple[type, ...]], where: str, needed: Sequence[str] = ()) -> None:
    """Raises InputError unless ``content`` has the keys that it needs, and no others, with values of their types."""
    if not isinstance(content, dict):
        raise InputError(f"{where} is {content!r}: expected lines of 'key: value'")
    for key, value in content.items():
        if key not in known:
            raise InputError(f"{where} has an unknown key {key}: expected some of {', '.join(known)}")
        if type(value) not in known[key]:
            expected = " or ".join(kind.__name__ for kind in known[key])
            raise InputError(f"{where}: {key} is {value!r}, expected {expected}")
    if missing := [key for key in needed if not content.get(key)]:
        raise InputError(f"{where} has no {missing[0]}")


def check_numbers(values: list | None, what: str) -> None:
    if not values or len(set(values)) < len(values) or not all(type(value) is int and value >= 0 for value in values):
        raise InputError(f"{what} are {values}: expected different whole numbers")


def named_options(options: object, where: str) -> dict:
    """Options of main.py, written with '-'."""
    if not isinstance(options, dict):
        raise InputError(f"{where} is {options!r}: expected lines of 'option: value'")
    options = {str(name).replace("_", "-"): value for name, value in options.items()}
    if given := [name for name in options if name in SET_BY_THE_STUDY]:
        raise InputError(f"{where}: {given[0]} is not an option here: it is set for every run")
    if ROTATED in options:
        raise InputError(f"{where}: {ROTATED} is not an option: it belongs to an entry under data")
    return options


def data_options(entry: object, where: str) -> dict:
    """Options of main.py, and ``rotated`` where the study is to rotate the images."""
    degrees = entry.pop(ROTATED, None) if isinstance(entry, dict) else None
    options = named_options(entry, where)
    if degrees is None:
        return options
    if type(degrees) is not int or degrees not in DEGREES:
        raise InputError(f"{where}: {ROTATED} is {degrees!r}, expected {', '.join(map(str, DEGREES))} degrees")
    if options.get("data-set") != "FMNIST" or "data-path" not in options:
        raise InputError(f"{where}: {ROTATED} is for images of data-set FMNIST, in the folder data-path")
    return options | {"data-path": place(str(options["data-path"])), ROTATED: degrees}


def read_group(name: str, entry: object, study: Study) -> Group:
    check_keys(entry, GROUP_KEYS, "the group", needed=("kind", "data"))
    kind = entry["kind"]
    sizes, epochs, seeds = lists_of(entry, vars(study)).values()
    if kind not in KINDS:
        raise InputError(f"kind is {kind}: expected {', '.join(KINDS)}")
    if entry["data"] not in study.data:
        raise InputError(f"data is {entry['data']}: expected {' or '.join(study.data)}, as there are under data")
    if kind != "vit" and "sizes" in entry:
        raise InputError(f"sizes are those of ViTs: expected none for kind {kind}")
    if unknown := [size for size in sizes if size not in study.sizes]:
        raise InputError(f"size {unknown[0]} is not among sizes{nearest(str(unknown[0]), study.sizes)}")
    check_numbers(seeds, "seeds")
    options = named_options(entry.get("options", {}), "options")
    tuning = entry.get("tuning", {})
    check_keys(tuning, {"epochs": (int,), "size": TEXT, "options": MAP}, "tuning")
    check_numbers(epochs, "epochs")
    if kind != "vit" and (len(epochs) > 1 or not epochs[0]):
        raise InputError(f"epochs are {epochs}: expected one number above 0 for kind {kind}")
    before = 0 in epochs and any(epochs) and bool(options.keys() & set(INITIALISED))
    lrs, lr_of = learning_rates(entry.get("lr", []))
    if any(epochs) and not lrs and lr_of is None:
        raise InputError("lr is missing: expected a number, a list to choose from, or the name of a group")
    stored = entry.get("stored", [])
    return Group(
        name=name,
        kind=kind,
        method=entry.get("method", name),
        data=entry["data"],
        sizes=list(sizes) if kind == "vit" else [""],
        seeds=list(seeds),
        epochs=sorted(number for number in epochs if number or not before),
        before=before,
        lrs=lrs,
        lr_of=lr_of,
        tuning={**tuning, "options": named_options(tuning.get("options", {}), "tuning, options")},
        options=options,
        stored=stored if isinstance(stored, list) else [stored],
    )


def learning_rates(lr: object) -> tuple[list[float], str | None]:
    """Numbers, or the name of a group. In YAML 1e-3 is a text, unlike 1.0e-3."""
    try:
        rates = sorted(float(rate) for rate in (lr if isinstance(lr, list) else [lr]))
    except (TypeError, ValueError):
        if isinstance(lr, str):
            return [], lr
        raise InputError(f"lr is {lr}: expected numbers") from None
    if len(set(rates)) < len(rates) or not all(0 < rate < float("inf") for rate in rates):
        raise InputError(f"lr is {lr}: expected different numbers above 0")
    return rates, None


def check_names(study: Study) -> None:
    """Raises InputError where names of groups cannot be told apart, or those of other groups are unknown."""
    slugs: dict[str, str] = {}
    for name, group in study.groups.items():
        if re.search(r"[{}/]", name) or name in (STUDY, "seed", "arch", "size", "depth", "heads"):
            raise InputError(f"runs: {name!r} cannot be the name of a group, as references would mean something else")
        if group.slug in slugs:
            raise InputError(f"runs: {name!r} and {slugs[group.slug]!r} would have the same folder: rename one")
        slugs[group.slug] = name
        if group.lr_of is not None and group.lr_of not in study.groups:
            raise InputError(
                f"runs, {name}: lr is {group.lr_of}, which is no group{nearest(group.lr_of, study.groups)}"
            )
