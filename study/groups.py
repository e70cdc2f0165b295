"""The groups of runs in a study's YAML file, as they are written there: what they plan, and what they need."""

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import models
from common.errors import InputError

Ancestor = tuple[str, str, str]  # group, size and number of epochs of runs whose weights others need


def groups_of(runs: Mapping[str, Any]) -> dict[str, Any]:
    """The groups under ``runs``. One that is ``like`` another has all of it that it does not replace.

    Options are replaced one by one; null removes one.

    Raises:
        InputError: a group is like one that there is not, or groups are like each other in a circle.
    """

    def whole(name: str, seen: tuple[str, ...]) -> Any:
        group = runs[name]
        if not isinstance(group, Mapping) or "like" not in group:
            return group
        if group["like"] not in runs:
            raise InputError(f"runs, {name}: like is {group['like']!r:.100}, which is no group")
        if group["like"] in (seen := (*seen, name)):
            raise InputError(f"runs: {' → '.join([*seen, group['like']])}: groups are like each other in a circle")
        other = whole(group["like"], seen)
        own = {key: value for key, value in group.items() if key != "like"}
        parts = [entry.get("options", {}) for entry in (other, own) if isinstance(entry, Mapping)]
        if len(parts) < 2 or not all(isinstance(part, Mapping) for part in parts):
            return own  # what reads it says what is wrong
        options = {str(key).replace("_", "-"): value for part in parts for key, value in part.items()}
        return {**other, **own, "options": {key: value for key, value in options.items() if value is not None}}

    return {name: whole(name, ()) for name in runs}


def lists_of(group: Mapping, study: Mapping) -> dict[str, Any]:
    """Sizes, numbers of epochs and seeds of a group's runs: the study's where it has none of its own."""
    lists = {key: group.get(key, study.get(key)) for key in ("sizes", "epochs", "seeds")}
    if isinstance(lists["epochs"], int):
        lists["epochs"] = [lists["epochs"]]
    return lists


def planned_vits(content: Mapping, path: Path) -> set[tuple[str, str, str, int, int]]:
    """`Results.planned` of what study.yaml holds. Raises InputError, naming ``path``, if a group is none."""
    planned = set()
    for name, group in content["runs"].items():
        if not isinstance(group, Mapping):
            raise InputError(f"{path}: {name!s:.100} is {group!r:.100}: expected a group of runs")
        if group.get("kind") != "vit":
            continue
        lists = lists_of(group, content)
        for key, value in lists.items():
            if not isinstance(value, list | dict):
                raise InputError(f"{path}: {name!s:.100} has the {key} {value!r:.100}: expected a list")
        planned |= {(group.get("method", name), group.get("data"), *vit) for vit in itertools.product(*lists.values())}
    return planned


def of_size(text: str, size: str, sizes: Mapping[str, str]) -> str:
    """``text`` with ``{arch}``, ``{size}``, ``{depth}`` and ``{heads}`` replaced by those of a size that there is."""
    if size not in sizes or "{" not in text:
        return text
    arch = models.parse_arch(str(sizes[size]))
    names = {"arch": sizes[size], "size": size, "depth": arch.depth, "heads": arch.num_heads}
    for name, value in names.items():
        text = text.replace(f"{{{name}}}", str(value))
    return text


def ancestors(content: Mapping) -> dict[tuple[str, str, str], set[Ancestor]]:
    """`Results.ancestors` of what study.yaml holds."""
    found = {}
    for name, group in content["runs"].items():
        if group.get("kind") == "vit":
            for size in lists_of(group, content)["sizes"]:
                runs, waiting = set(), {(name, size, "")}
                while waiting:
                    waiting = {run for of, size, _ in waiting for run in referred(content, of, size)} - runs
                    runs |= waiting
                found.setdefault((group.get("method", name), group.get("data"), size), set()).update(runs)
    return found


def referred(content: Mapping, name: str, size: str) -> set[Ancestor]:
    """The runs that the options of a group's run name: ``{GROUP}`` or ``{GROUP/SIZE/EPOCHS}``, as in `study.plan`."""
    groups, found = content["runs"], set()
    group = groups[name]
    for options in (content.get("options"), content["data"].get(group.get("data")), group.get("options")):
        for value in options.values() if isinstance(options, Mapping) else ():
            for reference in re.findall(r"\{([^{}]*)\}", of_size(str(value), size, content["sizes"])):
                of, *rest = reference.split("/")
                if of not in groups:  # {seed} is none
                    continue
                own = size if groups[of].get("kind") == "vit" else ""
                epochs = lists_of(groups[of], content)["epochs"] or [""]
                found.add((of, *rest) if len(rest) == 2 else (of, own, str(epochs[0])))
    return found
