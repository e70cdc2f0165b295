"""The runs of a study: the options of main.py, the runs that each one depends on, and what each one costs.

`study.study_file` reads the YAML file; `plan` makes the runs and checks their options before anything starts.
"""

import re
from dataclasses import dataclass, field, replace
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from statistics import mean

import models
from common.errors import InputError, error_context, nearest
from datasets import SHARDED, build_dataset, train_holdout_split
from main import builder_of
from models.meta import NumbersOnCpu
from models.vit import FORWARD_AND_BACKWARD
from options import option_parser
from study.groups import of_size
from study.results import slug
from training.build_data import choices_of, shard_cache_of
from training.build_model import CHANNELS, build_supernet, create_sized, size_sampler
from training.checks import check
from training.command_line import Parser, arguments_of, parse_options
from training.config import SOURCE, TIMM, Config, DataConfig, weight_sources
from training.config import resolve as resolve_config
from training.setup import is_address

import torch
from torch.utils.flop_counter import FlopCounterMode

EVALUATED = 10_000  # images of an evaluation, about
START = 10**10  # MACs that take about as long as the start of a run
# where and how fast a run works
NOT_THE_RESULT = ("data-path", "device", "num-workers", "pin-mem", "log-interval", "teacher-cache")
OUTPUT = "output/study"  # where runs write to by default, in a folder of the study's name
STUDY = "study"  # {study} in an option: the folder of the study
ROTATED = "rotated"  # by how many degrees: a key of data that is no option of main.py
WITHOUT_FILES = {"src_path": None, "freeze_src": False, "finetune": None, "init": None}
WITHOUT_FILES |= {"order": "none", "depth_order": "even"}
FOLDERS = ("tuning", "runs")  # of a study
WEIGHTS = ("model.safetensors", "learngene.safetensors")  # files of a run that other runs may load


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
    before: bool  # whether the accuracy before training is a row of its own
    lrs: list[float]  # more than one: a grid to tune
    lr_of: str | None  # the group whose learning rates it uses
    tuning: dict
    options: dict
    stored: list[str]  # references to the runs whose weights are stored for the family; empty: the run itself

    @property
    def slug(self) -> str:
        return slug(self.name)


@dataclass(eq=False)
class Run:
    """A run of main.py; ``needs`` maps the references in its options to runs."""

    group: Group
    size: str
    epochs: int
    seed: int
    lr: float | None  # None: the best of ``tuned_by``
    tuning: bool = False
    options: dict = field(default_factory=dict)
    needs: dict[str, "Run"] = field(default_factory=dict)
    stored: list["Run"] = field(default_factory=list)
    tuned_by: list["Run"] = field(default_factory=list)
    images: int = 0  # training images seen, repetitions counted
    macs: int = 0
    cost: int = 0  # macs, plus an estimate of evaluation and start

    @property
    def folder(self) -> Path:
        """Relative to the folder of the study."""
        if self.tuning:
            return Path("tuning", self.group.slug, str(self.epochs), f"{self.lr:g}")
        return Path("runs", self.group.slug, self.size, str(self.epochs), str(self.seed))

    def data_folder(self, root: Path) -> Path:
        """Where a study with the folder ``root`` writes the rotated images of this run."""
        return root / "data" / f"{slug(self.options['data-path'])}_{self.options[ROTATED]}"

    @property
    def after(self) -> set["Run"]:
        return {*self.needs.values(), *self.stored, *self.tuned_by}

    @property
    def identity(self) -> dict:
        """The options that its result depends on, without the learning rate."""
        options = {name: value for name, value in self.options.items() if name not in NOT_THE_RESULT}
        return {**options, "epochs": self.epochs, "seed": self.seed}

    def arguments(self, root: Path, lr: float | None) -> list[str]:
        """The command line of main.py, where ``root`` is the folder of the study."""
        options = dict(self.options)
        folders = {STUDY: root, **{reference: root / run.folder for reference, run in self.needs.items()}}
        for name, value in options.items():
            for reference, folder in folders.items() if isinstance(value, str) else ():
                options[name] = options[name].replace(f"{{{reference}}}", str(folder))
        options |= {"epochs": self.epochs, "seed": self.seed, "output-dir": str(root / self.folder)}
        if options.pop(ROTATED, None):
            options["data-path"] = str(self.data_folder(root))
        options |= {} if lr is None else {"lr": lr}
        return arguments_of(option_parser(Parser), options, "options")

    def __str__(self) -> str:
        what = f"{self.epochs} epoch{'s' * (self.epochs != 1)}"
        what += f", tuning, lr {self.lr:g}" if self.tuning else ""
        return f"{self.group.name}{' ' * bool(self.size)}{self.size} seed {self.seed}, {what}"


@dataclass
class Study:
    """The content of the YAML file, and the runs that it describes."""

    name: str
    sizes: dict[str, str]
    seeds: list[int]
    options: dict
    data: dict[str, dict]
    tuning: dict
    groups: dict[str, Group]
    in_order: bool = False  # whether runs are started in the order of the file, seed by seed
    runs: dict[tuple, Run] = field(default_factory=dict)  # group, size, epochs, seed → run
    grids: dict[tuple, list[Run]] = field(default_factory=dict)  # group, epochs → runs with its learning rates

    def place_of(self, run: Run) -> tuple[int, ...]:
        """Sorts runs by their seed, then as the file names them; those that tune come when others wait for them."""
        places = [*self.groups].index(run.group.name), run.group.sizes.index(run.size), run.epochs
        return run.tuning, run.seed, *places

    @property
    def all_runs(self) -> list[Run]:
        return [*self.runs.values(), *dict.fromkeys(run for grid in self.grids.values() for run in grid)]


# ---------------------------------------------------------------------------------------------------------------------
# Planning
# ---------------------------------------------------------------------------------------------------------------------


def plan(study: Study) -> None:
    """Make the runs, resolve what they refer to, and check their options.

    Raises:
        InputError: a run cannot work, or runs depend on each other in a circle.
    """
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
            resolve_options(run, study)
            run.tuned_by = tuning_of(run.group, run.epochs, study) if run.lr is None and run.epochs else []
    for run in study.all_runs:  # a rate that is taken from a group with one needs no tuning
        if run.lr is None and run.epochs and not run.tuned_by:
            run.lr = source_of_lr(run.group, study).lrs[0]
    order_of(study.all_runs)
    known: dict[tuple, tuple[int, int, int]] = {}
    for run in study.all_runs:
        kind = run.group.name, run.epochs, run.tuning, str(run.options)
        if kind not in known:  # seeds make no difference unless options name them, learning rates none
            with error_context(f"runs, {run.group.name}"):
                known[kind] = costs_of(checked_options(run))
        run.images, run.macs, run.cost = known[kind]


def grids_of(group: Group, study: Study) -> dict[tuple, list[Run]]:
    """The runs that tune the learning rate for each number of epochs; they may train for fewer epochs."""
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
    """The group whose learning rates ``group`` uses."""
    seen = [group.name]
    while group.lr_of is not None:
        group = study.groups[group.lr_of]
        if group.name in seen:
            raise InputError(f"lr goes in a circle: {' → '.join([*seen, group.name])}")
        seen.append(group.name)
    return group


def tuning_of(group: Group, epochs: int, study: Study) -> list[Run]:
    """The runs that tune the learning rate of a group; none where the rate is given."""
    source = source_of_lr(group, study)
    if len(source.lrs) == 1:
        return []
    if (source.name, epochs) not in study.grids:
        raise InputError(f"lr is that of {source.name}, which has none for {epochs} epochs")
    return study.grids[source.name, epochs]


def resolve_options(run: Run, study: Study) -> None:
    """Set the options of a run, and find the runs that they refer to."""
    group = run.group
    options = study.options | study.data[group.data] | group.options
    if run.tuning:
        options |= {"holdout": study.tuning["holdout"]} | group.tuning["options"]
    for name, value in options.items():
        run.options[name] = substitute(value, run, study) if isinstance(value, str) else value
        for reference, rest in re.findall(r"\{([^{}]*)\}([^{}]*)", str(run.options[name])):
            if reference == STUDY:
                continue
            run.needs[reference] = resolve(reference, run, study)
            if rest.lstrip("/") not in WEIGHTS:
                raise InputError(f"{name} is {value}: expected {' or '.join(WEIGHTS)} of that run")
    if not run.tuning:
        run.stored = [resolve(substitute(reference, run, study), run, study) for reference in group.stored]


def substitute(text: str, run: Run, study: Study) -> str:
    """``text`` with ``{seed}``, ``{arch}``, ``{size}``, ``{depth}`` and ``{heads}`` replaced by those of the run."""
    return of_size(text.replace("{seed}", str(run.seed)), run.size, study.sizes)


def resolve(reference: str, run: Run, study: Study) -> Run:
    """The run that a reference of ``run``, ``group`` or ``group/size/epochs``, stands for.

    Raises:
        InputError: there is no such run.
    """
    name, *rest = reference.split("/")
    group = study.groups.get(name)
    if group is None:
        raise InputError(f"{{{reference}}} refers to {name}, which is no group{nearest(name, study.groups)}")
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
    """The runs in an order in which each comes after those that it depends on.

    Raises:
        InputError: they depend on each other in a circle.
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
    if ROTATED in run.options:  # that the study has not written yet, and whose labels are the same
        config = config.with_options(data_path=run.options["data-path"])
    kind = check(config)
    for name, (place, _) in weight_sources(config.model, config.teacher, None).items():
        option = name.replace("_", "-")
        file = run.options.get(option)  # references are checked elsewhere
        there = place == TIMM or is_address(place) or Path(place).exists()
        if isinstance(file, str) and "{" not in file and not there:
            raise InputError(f"{option} is {file}, which is not there: expected a file, or a reference to a group")
    name = config.model.des_name
    if config.data.input_size is None:
        raise InputError("input-size is missing: by default it is that of the learngene, which is not there yet")
    if kind == "descend" or (kind == "plain" and models.is_vit(name)):
        models.parse_arch(name)  # every name stands for a ViT
    else:
        model = replace(config.model, **WITHOUT_FILES)  # the weights that it may start from are not there yet
        with torch.device("meta"), NumbersOnCpu():
            network = builder_of(model)(model, config.data.input_size, 1, None)
            if model.descendants:
                build_supernet(config, network, 1)
    return config


def costs_of(config: Config) -> tuple[int, int, int]:
    """Of a run: images trained on, MACs of its training or linear probe, and about what it costs in all."""
    data = config.data
    images, classes = size_of_data(data)
    if data.batch_size > images:
        raise InputError(f"batch-size {data.batch_size} is more than the {images} training images")
    epochs = config.schedule.epochs
    seen = epochs * (images // data.batch_size * data.batch_size)
    size, model, teacher = data.input_size, config.model, config.teacher
    forward = macs_of(model.arch, size, classes)
    if model.descendants and epochs:  # alone or beside the Aux-Net
        sampler = size_sampler(model, size, classes, epochs)
        forward = round(mean(map(sampler.mean_macs, range(epochs)))) + forward * (not sampler.alone)
    teacher_macs = 0
    if teacher.distillation_type != "none":
        teacher_macs = macs_of(
            model.src_arch if teacher.teacher_model == SOURCE else teacher.teacher_model, size, classes
        )
    probed = images if config.runtime.linear_probe else 0
    macs = seen * (FORWARD_AND_BACKWARD * forward + teacher_macs) + probed * forward
    return seen, macs, macs + EVALUATED * forward + START


@lru_cache
def size_of_data(data: DataConfig) -> tuple[int, int]:
    """The number of images to train on, and of their classes."""
    dataset, classes = build_dataset(
        data.data_set,
        data.data_path,
        is_train=True,
        transform=None,
        inat_category=data.inat_category,
        shard_cache=shard_cache_of(data),
        single_split=data.holdout is not None,  # then no test images are needed
        choices=choices_of(data),
    )
    # shards and Parquet files list no labels, and are used as a whole: the numbers of their images stand for labels
    labels = range(len(dataset)) if data.data_set in SHARDED else dataset.targets
    return len(train_holdout_split(labels, data.train_images, data.holdout)[0]), len(classes)


@lru_cache
def macs_of(name: str, size: int, classes: int) -> int:
    """Multiply-accumulate operations of the forward pass of one image of ``size`` pixels.

    Of timm's models, of which no formula is known here, torch counts them.
    """
    if models.is_vit(name):
        return replace(models.parse_arch(name), img_size=size).macs(classes, CHANNELS)
    with torch.device("meta"):
        model, image = create_sized(name, classes, size).eval(), torch.empty(1, CHANNELS, size, size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(image)
    return counter.get_total_flops() // 2
