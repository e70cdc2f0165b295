"""A study as its YAML file describes it: the runs of main.py, what each of them needs, and what it costs.

Everything that can be wrong in the file is found here, before anything runs.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from statistics import mean

import models
from common.errors import InputError, error_context, nearest
from common.files import read_yaml
from datasets import build_dataset, train_holdout_split
from main import builder_of
from models.vit import FORWARD_AND_BACKWARD
from options import option_parser
from study.results import lists_of, read_report
from training.build_model import CHANNELS, build_supernet, create_sized, descendants_of
from training.checks import check
from training.command_line import Parser, arguments_of, parse_options
from training.config import Config, ModelConfig, weight_sources
from training.config import resolve as resolve_config
from training.setup import is_address

import torch
from torch.utils.flop_counter import FlopCounterMode

KINDS = ("teacher", "stage1", "vit")
EVALUATED, START = 10_000, 10**10  # about the images of an evaluation, and the MACs that a run's beginning is worth
SET_BY_THE_STUDY = ("epochs", "lr", "seed", "output-dir", "resume", "config", "eval")
INITIALISED = ("load-gene", "finetune", "init")  # options of runs that log what they are before training
NOT_THE_RESULT = ("data-path", "device", "num-workers", "pin-mem", "log-interval")  # places and speed
WITHOUT_FILES = {"src_path": None, "freeze_src": False, "finetune": None, "init": None}
WEIGHTS = ("model.safetensors", "learngene.safetensors")  # what of a run others may refer to

LIST, TEXT, MAP = (list,), (str,), (dict,)
STUDY_KEYS = {"study": TEXT, "sizes": MAP, "seeds": LIST, "options": MAP, "data": MAP, "tuning": MAP, "runs": MAP}
STUDY_KEYS |= {"report": MAP}
GROUP_KEYS = {"kind": TEXT, "method": TEXT, "data": TEXT, "sizes": LIST, "seeds": LIST, "epochs": (int, list)}
GROUP_KEYS |= {"lr": (int, float, list, str), "tuning": MAP, "stored": (str, list), "options": MAP}


@dataclass
class Group:
    """An entry under ``runs``."""

    name: str
    kind: str
    method: str
    data: str
    sizes: list[str]  # [""] where the runs have none
    seeds: list[int]
    epochs: list[int]  # of its runs
    before: bool  # whether what its runs are before training is a row of its own
    lrs: list[float]  # a grid to be tuned if they are more than one
    lr_of: str | None  # the group whose learning rates are taken
    tuning: dict
    options: dict
    stored: list[str]  # references to what has to be stored for the family; empty: to the run itself

    @property
    def slug(self) -> str:
        return slug(self.name)


@dataclass(eq=False)
class Run:
    """A run of main.py; ``needs`` are the runs that its options refer to, by their references."""

    group: Group
    size: str
    epochs: int
    seed: int
    lr: float | None  # None: chosen by ``tuned_by``
    tuning: bool = False
    options: dict = field(default_factory=dict)
    needs: dict[str, "Run"] = field(default_factory=dict)
    stored: list["Run"] = field(default_factory=list)
    tuned_by: list["Run"] = field(default_factory=list)
    images: int = 0  # that it trains on, counted as often as it sees them
    macs: int = 0
    cost: int = 0  # macs and what a run does besides, roughly

    @property
    def folder(self) -> Path:
        """Relative to that of the study."""
        if self.tuning:
            return Path("tuning", self.group.slug, str(self.epochs), f"{self.lr:g}")
        return Path("runs", self.group.slug, self.size, str(self.epochs), str(self.seed))

    @property
    def after(self) -> set["Run"]:
        return {*self.needs.values(), *self.stored, *self.tuned_by}

    @property
    def identity(self) -> dict:
        """What its result follows from, but for the learning rate, as a file gives it back."""
        options = {name: value for name, value in self.options.items() if name not in NOT_THE_RESULT}
        return {**options, "epochs": self.epochs, "seed": self.seed}

    def arguments(self, root: Path, lr: float | None) -> list[str]:
        """The command line of main.py, with the study's files in ``root``."""
        options = dict(self.options)
        for name, value in options.items():
            for reference, run in self.needs.items() if isinstance(value, str) else ():
                options[name] = options[name].replace(f"{{{reference}}}", str(root / run.folder))
        options |= {"epochs": self.epochs, "seed": self.seed, "output-dir": str(root / self.folder)}
        options |= {} if lr is None else {"lr": lr}
        return arguments_of(option_parser(Parser), options, "options")

    def __str__(self) -> str:
        what = f"{self.epochs} epoch{'s' * (self.epochs != 1)}"
        what += f", tuning, lr {self.lr:g}" if self.tuning else ""
        return f"{self.group.name}{' ' * bool(self.size)}{self.size} seed {self.seed}, {what}"


@dataclass
class Study:
    """What the YAML file says, and the runs that follow from it."""

    name: str
    sizes: dict[str, str]
    seeds: list[int]
    options: dict
    data: dict[str, dict]
    tuning: dict
    groups: dict[str, Group]
    runs: dict[tuple, Run] = field(default_factory=dict)  # group, size, epochs, seed → run
    grids: dict[tuple, list[Run]] = field(default_factory=dict)  # group, epochs → runs with its learning rates

    @property
    def all_runs(self) -> list[Run]:
        return [*self.runs.values(), *dict.fromkeys(run for grid in self.grids.values() for run in grid)]


def slug(name: str) -> str:
    """A name as that of a folder."""
    return re.sub(r"[^\w.+-]+", "_", name)


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_study(path: Path) -> Study:
    """The study of a YAML file, with all its runs planned.

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
        data = {name: named_options(entry, f"data, {name}") for name, entry in content["data"].items()}
        study = Study(content["study"], sizes, content["seeds"], options, data, tuning, {})
        check_numbers(study.seeds, "seeds")
        for name, entry in content["runs"].items():
            with error_context(f"runs, {name}"):
                study.groups[name] = read_group(str(name), entry, study)
        check_names(study)
        if "report" in content:
            read_report(content, {group.method for group in study.groups.values()}, study.data)
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
    return options


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
        if re.search(r"[{}/]", name) or name in ("arch", "size", "depth", "heads"):
            raise InputError(f"runs: {name!r} cannot be the name of a group, as references would mean something else")
        if group.slug in slugs:
            raise InputError(f"runs: {name!r} and {slugs[group.slug]!r} would have the same folder: rename one")
        slugs[group.slug] = name
        if group.lr_of is not None and group.lr_of not in study.groups:
            raise InputError(f"runs, {name}: lr is {group.lr_of}, which is no group{near(group.lr_of, study)}")


def near(name: str, study: Study) -> str:
    return nearest(name, study.groups)


# ---------------------------------------------------------------------------------------------------------------------
# Planning
# ---------------------------------------------------------------------------------------------------------------------


def plan(study: Study) -> None:
    """Make the runs, tie them to those that they need, and see to it that each of them can work."""
    for group in study.groups.values():
        for size in group.sizes:
            for epochs in group.epochs:
                for seed in group.seeds:
                    run = Run(group, size, epochs, seed, group.lrs[0] if epochs and len(group.lrs) == 1 else None)
                    study.runs[group.name, size, epochs, seed] = run
        if len(group.lrs) > 1:
            study.grids |= grids_of(group, study)
    for run in study.all_runs:
        with error_context(f"runs, {run.group.name}"):
            tie(run, study)
            run.tuned_by = tuning_of(run.group, run.epochs, study) if run.lr is None and run.epochs else []
    for run in study.all_runs:  # a rate that is taken from a group with one needs no tuning
        if run.lr is None and run.epochs and not run.tuned_by:
            run.lr = source_of_lr(run.group, study).lrs[0]
    order_of(study.all_runs)
    known: dict[tuple, tuple[int, int, int]] = {}
    for run in study.all_runs:
        kind = run.group.name, run.size, run.epochs, run.tuning
        if kind not in known:  # seeds and learning rates make no difference
            with error_context(f"runs, {run.group.name}"):
                known[kind] = costs_of(checked_options(run))
        run.images, run.macs, run.cost = known[kind]


def grids_of(group: Group, study: Study) -> dict[tuple, list[Run]]:
    """The runs that choose the learning rate for each number of epochs; they need not train for as many."""
    size = group.tuning.get("size", study.tuning.get("size")) if group.kind == "vit" else ""
    if size not in group.sizes:
        raise InputError(
            f"runs, {group.name}: lr is to be tuned at size {size}: expected one of its sizes, "
            f"{', '.join(group.sizes)}, under tuning"
        )
    if not {"seed", "holdout"} <= study.tuning.keys():
        raise InputError(f"runs, {group.name}: lr is to be tuned, for which tuning needs a seed and a holdout")
    seed, most = study.tuning["seed"], group.tuning.get("epochs", max(group.epochs))
    trained = {epochs: min(epochs, most) for epochs in group.epochs if epochs}
    grids = {epochs: [Run(group, size, epochs, seed, lr, True) for lr in group.lrs] for epochs in {*trained.values()}}
    return {(group.name, epochs): grids[trained[epochs]] for epochs in trained}


def source_of_lr(group: Group, study: Study) -> Group:
    """The group that has the learning rates of ``group``."""
    seen = [group.name]
    while group.lr_of is not None:
        group = study.groups[group.lr_of]
        if group.name in seen:
            raise InputError(f"lr goes in a circle: {' → '.join([*seen, group.name])}")
        seen.append(group.name)
    return group


def tuning_of(group: Group, epochs: int, study: Study) -> list[Run]:
    """The runs that choose its learning rate; none where one is given."""
    source = source_of_lr(group, study)
    if len(source.lrs) == 1:
        return []
    if (source.name, epochs) not in study.grids:
        raise InputError(f"lr is that of {source.name}, which has none for {epochs} epochs")
    return study.grids[source.name, epochs]


def tie(run: Run, study: Study) -> None:
    """Fill in the options of a run, and find the runs that they refer to."""
    group = run.group
    options = study.options | study.data[group.data] | group.options
    if run.tuning:
        options |= {"holdout": study.tuning["holdout"]} | group.tuning["options"]
    for name, value in options.items():
        run.options[name] = fill(value, run, study) if isinstance(value, str) else value
        for reference, rest in re.findall(r"\{([^{}]*)\}([^{}]*)", str(run.options[name])):
            run.needs[reference] = resolve(reference, run, study)
            if rest.lstrip("/") not in WEIGHTS:
                raise InputError(f"{name} is {value}: expected {' or '.join(WEIGHTS)} of that run")
    if not run.tuning:
        run.stored = [resolve(fill(reference, run, study), run, study) for reference in group.stored]


def fill(text: str, run: Run, study: Study) -> str:
    """``text`` with what stands for the run's size."""
    if run.size:
        arch = models.parse_arch(study.sizes[run.size])
        names = {"arch": study.sizes[run.size], "size": run.size, "depth": arch.depth, "heads": arch.num_heads}
        for name, value in names.items():
            text = text.replace(f"{{{name}}}", str(value))
    return text


def resolve(reference: str, run: Run, study: Study) -> Run:
    """The run that ``group`` or ``group/size/epochs`` means for ``run``.

    Raises:
        InputError: there is none.
    """
    name, *rest = reference.split("/")
    group = study.groups.get(name)
    if group is None:
        raise InputError(f"{{{reference}}} refers to {name}, which is no group{near(name, study)}")
    if len(rest) not in (0, 2) or (not rest and len(group.epochs) > 1):
        raise InputError(f"{{{reference}}}: expected {{{name}}}, or {{{name}/SIZE/EPOCHS}} if it has several")
    size, epochs = rest or (run.size if group.kind == "vit" else "", group.epochs[0])
    seed = group.seeds[0] if run.tuning or len(group.seeds) == 1 else run.seed
    key = name, size, int(epochs) if str(epochs).isdecimal() else epochs, seed
    if key not in study.runs:
        raise InputError(
            f"{{{reference}}}: {name} has no run of size {size or 'none'}, {epochs} epochs and seed {seed}"
        )
    return study.runs[key]


def order_of(runs: list[Run]) -> list[Run]:
    """The runs such that each comes after those that it needs.

    Raises:
        InputError: they need each other in a circle.
    """
    try:
        return [*TopologicalSorter({run: run.after for run in runs}).static_order()]
    except CycleError as error:
        names = dict.fromkeys(run.group.name for run in error.args[1])
        raise InputError(f"runs refer to each other in a circle: {' ← '.join([*names, next(iter(names))])}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Options and costs
# ---------------------------------------------------------------------------------------------------------------------


def checked_options(run: Run) -> Config:
    """The options of a run as main.py understands them; the files that others make need not be there yet.

    Raises:
        InputError: main.py would refuse them.
    """
    config = resolve_config(parse_options(run.arguments(Path("output"), run.lr)))
    kind = check(config)
    for name, (place, _) in weight_sources(config.model, config.teacher, None).items():
        option = name.replace("_", "-")
        file = run.options.get(option)  # references are checked elsewhere
        if isinstance(file, str) and "{" not in file and not is_address(place) and not Path(place).exists():
            raise InputError(f"{option} is {file}, which is not there: expected a file, or a reference to a group")
    name = config.model.des_name
    if kind == "descend" or (kind == "plain" and models.follows_grammar(name)):
        models.parse_arch(name)  # every name stands for a ViT
    else:
        model = replace(config.model, **WITHOUT_FILES)  # the weights that it may start from are not there yet
        with torch.device("meta"):
            network = builder_of(model)(model, config.data.input_size, 1, None)
            if model.descendants:
                build_supernet(model, network, config.data.input_size)
    return config


def costs_of(config: Config) -> tuple[int, int, int]:
    """Of a run: images seen, MACs of its training, and about what it costs in all."""
    data = config.data
    images, classes = size_of_data(data.data_set, data.data_path, data.inat_category, data.train_images, data.holdout)
    if data.batch_size > images:
        raise InputError(f"batch-size {data.batch_size} is more than the {images} training images")
    seen = config.schedule.epochs * (images // data.batch_size * data.batch_size)
    size, model, teacher = data.input_size, config.model, config.teacher
    forward = macs_of(model.arch, size, classes)
    if model.descendants:  # alone or beside the Aux-Net
        forward = descendant_macs(model, size, classes) + forward * (model.descendant_weight < 1)
    taught = macs_of(teacher.teacher_model, size, classes) if teacher.distillation_type != "none" else 0
    macs = seen * (FORWARD_AND_BACKWARD * forward + taught)
    return seen, macs, macs + EVALUATED * forward + START


def descendant_macs(config: ModelConfig, input_size: int, classes: int) -> int:
    """Multiply-accumulates of the descendants of a step of stage 1 that an image passes through, in the mean."""
    return round(config.descendants * mean(a.macs(classes, CHANNELS) for a in descendants_of(config, input_size)))


@lru_cache
def size_of_data(
    name: str, path: str | None, category: str, train_images: int | None, holdout: int | None
) -> tuple[int, int]:
    """The number of images to train on, and of their classes."""
    labels, classes = labels_of(name, path, category, holdout is not None)
    return len(train_holdout_split(labels, train_images, holdout)[0]), classes


@lru_cache
def labels_of(name: str, path: str | None, category: str, alone: bool) -> tuple[Sequence[int], int]:
    """The labels of all training images, and the number of classes; ``alone`` if no test images are needed."""
    dataset, classes = build_dataset(name, path, True, None, category, alone=alone)
    return dataset.targets, len(classes)


@lru_cache
def macs_of(name: str, size: int, classes: int) -> int:
    """Multiply-accumulate operations of the forward pass of one image of ``size`` pixels.

    Of timm's models, of which no formula is known here, torch counts them.
    """
    if models.follows_grammar(name):
        return replace(models.parse_arch(name), img_size=size).macs(classes, CHANNELS)
    with torch.device("meta"):
        model, image = create_sized(name, classes, size).eval(), torch.empty(1, CHANNELS, size, size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(image)
    return counter.get_total_flops() // 2
