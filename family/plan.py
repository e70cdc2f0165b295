"""The options of a family, what its members share, and the grid of its members."""

import json
import re
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import models
from common.devices import CPU, device_name, device_of
from common.download import fetch
from common.errors import InputError, error_context
from common.files import sha256
from family.records import read_record
from models import ViTArch
from models.listed import source_of
from models.names import name_of
from pipeline.loader import CheckedLoader
from training.build import autocast_of
from training.build_data import build_loaders
from training.build_model import CHANNELS, sized
from training.checks import check_data
from training.command_line import parse_options
from training.config import Config, options_of, recipe, resolve, square
from training.label_check import names_known, warn_of_head
from training.preprocessing import PREPROCESSING_OPTIONS, not_default, resolve_preprocessing
from training.probe import probe_loader
from training.setup import is_address, writable_folder

import torch
from timm.utils import random_seed
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

IN_MEMORY_LIMIT = 2**30  # bytes of test images that are decoded once and kept for all models
# options of main.py that select another kind of run, or fit one depth only
REFUSED = ("src_arch", "tgt_arch", "init", "init_path", "finetune", "resume", "eval", "push_to_hub")
REFUSED += ("push_ema", "mapping_layer", "mapping_layer_coeff")
INITIALISATION = ("width_select", "depth_select", "skip_init")  # options of main.py that descend takes
NO_EFFECT = ("device", "num_workers", "pin_mem", "log_interval")  # on what is trained


@dataclass(frozen=True)
class FamilyOptions:
    """The options of ``scripts/make_family.py``, as its ``--help`` describes them."""

    load_gene: Sequence[str]
    depths: Sequence[int]
    heads: Sequence[int]
    output_dir: str
    data_set: str | None = None
    data_path: str | None = None
    no_eval: bool = False
    epochs: int = 0
    max_params: int | None = None
    max_macs: int | None = None
    max_latency_ms: float | None = None
    input_size: int | None = None
    gene_ema: bool = False
    width_select: str | None = None
    head_dim: int = 64
    mlp_ratios: Sequence[float] | None = None

    def __post_init__(self):
        if self.epochs and (self.data_set is None or self.no_eval):
            found = "--no-eval is given" if self.no_eval else "--data-set is missing"
            raise InputError(f"--epochs {self.epochs} trains and evaluates: {found}")


@dataclass
class Member:
    """A Des-Net of the grid.

    Attributes:
        title: its size; among Des-Nets of several learngenes also the name of its own.
        record: the content of its ``family.json``, None for values not known yet.
    """

    title: str
    arch: ViTArch
    folder: Path
    params: int
    macs: int
    record: dict

    @property
    def accuracy(self) -> float | None:
        """In percent: after fine-tuning if there was any, else of the initialised Des-Net."""
        after, before = self.record["accuracy_after"], self.record["accuracy_before"]
        return before if after is None else after

    def excess(self, options: FamilyOptions) -> float:
        """Its cost as a fraction of the limit, the largest over all limits; the Des-Net fits if it is at most 1."""
        costs = [(self.params, options.max_params), (self.macs, options.max_macs)]
        costs.append((self.record["latency_ms_1"], options.max_latency_ms))
        return max((cost / limit for cost, limit in costs if cost is not None and limit is not None), default=0.0)

    def __str__(self) -> str:
        accuracy, latency = self.accuracy, self.record["latency_ms_1"]
        parts = [] if accuracy is None else [f"{accuracy:.2f} %"]
        parts += [f"{self.params:,} parameters", f"{self.macs:,} MACs"]
        parts += [] if latency is None else [f"{latency:.2f} ms"]
        return f"{self.title} with {', '.join(parts)}"


@dataclass(frozen=True, eq=False)
class Family:
    """What all members share.

    Attributes:
        name: of the learngene, to tell several apart.
        source: the file or address of the learngene, as it was given.
        folder: of the members.
        run_options: of main.py.
        command: the command line of main.py, without the Des-Net and its folder.
        loaders: training and test images; None without a data set.
        shape: ``num_classes`` and ``in_chans`` of every member.
        identity: the learngene and the options that determine the weights and the accuracy of an initialised member.
        training: the options that determine fine-tuning; None without it.
    """

    options: FamilyOptions
    name: str
    source: str
    folder: Path
    run_options: Config
    command: list[str]
    gene: models.Learngene
    device: torch.device
    autocast: AbstractContextManager
    loaders: list[DataLoader] | None
    classes: list[str]
    shape: dict[str, int]
    identity: dict
    training: dict | None

    @property
    def evaluated(self) -> bool:
        return self.loaders is not None and not self.options.no_eval

    @property
    def timed(self) -> bool:
        return self.evaluated or self.options.max_latency_ms is not None

    @cached_property
    def test_batches(self) -> Iterable:
        """The test images, in memory if they fit."""
        test_loader = self.loaders[1]
        bytes_of_image = 4 * self.shape["in_chans"] * self.options.input_size**2
        if len(test_loader.dataset) * bytes_of_image > IN_MEMORY_LIMIT:
            return test_loader
        return list(tqdm(test_loader, desc="reading the test images", leave=False, disable=None))

    @cached_property
    def probe_loader(self) -> CheckedLoader | None:
        """The images that heads are fitted to, where the learngene has none and the data are given."""
        if self.gene.num_classes or self.loaders is None:
            return None
        return probe_loader(self.run_options, self.device)

    @cached_property
    def device_name(self) -> str:
        """Device, threads and precision, which latencies depend on."""
        name = device_name(self.device)
        if self.device.type == CPU:
            name += f", {torch.get_num_threads()} threads"
        return f"{name}, {getattr(self.autocast, 'fast_dtype', torch.float32)}".replace("torch.", "")

    @property
    def choices(self) -> dict[str, object]:
        """How members are made, as `models.Learngene.descend` takes it."""
        return {name: getattr(self.run_options.model, name) for name in INITIALISATION}

    def title_of(self, arch: ViTArch) -> str:
        return f"{self.name} {arch.label}" if len(self.options.load_gene) > 1 else arch.label

    def forget_images(self) -> None:
        """Free the memory of the test images."""
        self.__dict__.pop("test_batches", None)

    def descend(self, arch: ViTArch) -> nn.Module:
        random_seed(self.run_options.runtime.seed)  # a re-initialised head does not depend on the members before it
        return self.gene.descend(arch, **self.shape, **self.choices).eval()


def names_of(sources: Sequence[str]) -> list[str]:
    """A name for each learngene, also of a folder: the end of its path, as short as tells all apart.

    ``output/LeTs/learngene.safetensors`` is ``LeTs``. Other characters than those of words become ``_``.

    Raises:
        InputError: one is given twice.
    """
    paths = [source.partition("#")[0] if is_address(source) else str(Path(source).absolute()) for source in sources]
    parts = []
    for path in paths:
        stem = re.sub(r"\.(safetensors|pth|pt|bin)$", "", path.rstrip("/"))
        names = [re.sub(r"[^\w.+-]+", "_", name) for name in stem.split("/") if name not in ("", ".", "..")]
        parts.append(names[:-1] if len(names) > 1 and names[-1] in ("learngene", "learngene_ema") else names)
    for count in range(1, max(1, *map(len, parts)) + 1):
        names = ["-".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    again = next((source for i, source in enumerate(sources) if paths[i] in paths[:i]), sources[-1])
    raise InputError(f"--load-gene {again} is given twice, or has the name of another: expected different learngenes")


def build_families(options: FamilyOptions, main_options: Sequence[str]) -> list[Family]:
    """Load the learngenes and the data, and check all options before anything is built.

    Args:
        main_options: options of main.py, as on its command line.

    Raises:
        InputError: a file or an option cannot be used.
    """
    out, several = Path(options.output_dir), len(options.load_gene) > 1
    return [
        build_family(options, main_options, source, name, out / name if several else out)
        for source, name in zip(options.load_gene, names_of(options.load_gene), strict=True)
    ]


def build_family(options: FamilyOptions, main_options: Sequence[str], source: str, name: str, folder: Path) -> Family:
    """Load one learngene and the data, and check all options; see `Family` for ``source``, ``name`` and ``folder``.

    Raises:
        InputError: a file or an option cannot be used.
    """
    with error_context(f"--load-gene {source}"):
        path = fetch(source_of(source), f"learngene{'_ema' * options.gene_ema}.safetensors")
        gene = models.load_learngene(path, options.head_dim, options.gene_ema)
    print(f"{source}: {gene}", flush=True)
    options = replace(options, input_size=options.input_size or square(gene.arch, "the learngene"))
    command = main_command(options, main_options, path)
    run_options = resolve_preprocessing(resolve(parse_options(command)), gene)
    check_run_options(run_options)
    check_data(run_options.data)
    device = device_of(run_options.runtime.device)
    writable_folder(options.output_dir)
    loaders, classes, in_chans = None, [], gene.config["in_chans"]
    if options.data_set:
        (*loaders, classes), in_chans = build_loaders(run_options, device), CHANNELS
        if gene.num_classes != len(classes):
            found = f"{gene.num_classes} classes, the data {len(classes)}: the heads are re-initialised"
            found = found if gene.num_classes else "no head: those of its members come from a linear probe"
            print(f"the learngene has {found}")
        warn_of_head(f"--load-gene {source}", gene.classes, names_known(options.data_set, classes))
    identity, training = reproducible_options(options, run_options, gene, path)
    shape = {"num_classes": len(classes) or gene.num_classes, "in_chans": in_chans}
    autocast, _ = autocast_of(run_options.runtime.amp_dtype, device)
    return Family(
        options=options,
        name=name,
        source=source,
        folder=folder,
        run_options=run_options,
        command=command,
        gene=gene,
        device=device,
        autocast=autocast,
        loaders=loaders,
        classes=classes,
        shape=shape,
        identity=identity,
        training=training,
    )


def main_command(options: FamilyOptions, main_options: Sequence[str], gene_path: Path) -> list[str]:
    """The command line of main.py without the Des-Net and its folder; ``options`` take precedence."""
    given = {"--load-gene": gene_path, "--input-size": options.input_size, "--epochs": options.epochs}
    given |= {"--data-set": options.data_set, "--data-path": options.data_path, "--width-select": options.width_select}
    command = [f"{name}={value}" for name, value in given.items() if value is not None]
    return [*main_options, *command, "--gene-ema" if options.gene_ema else "--no-gene-ema"]


def check_run_options(run_options: Config) -> None:
    """Raises InputError if an option of main.py does not fit a family."""
    given, defaults = options_of(run_options), options_of(Config())
    for name in REFUSED:
        if given[name] != defaults[name]:
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option} cannot be used for a family: every Des-Net starts from the learngene")


def reproducible_options(
    options: FamilyOptions, run_options: Config, gene: models.Learngene, gene_path: Path
) -> tuple[dict, dict | None]:
    """`Family.identity` and `Family.training`, as they come back from JSON."""
    identity = {"learngene": sha256(gene_path), "head_dim": gene.arch.head_dim, "gene_ema": options.gene_ema}
    given = options_of(run_options)
    identity |= {name: given[name] for name in (*INITIALISATION, "input_size", "eval_crop_ratio", "seed")}
    data_path = options.data_path and str(Path(options.data_path).resolve())
    identity |= {"data_set": options.data_set, "data_path": data_path}
    other = not_default(run_options.data)
    identity |= {name: given[name] for name in other}
    # records of families that were made before the other options existed stay valid
    without = {*NO_EFFECT, *PREPROCESSING_OPTIONS} - {"eval_crop_ratio", *other}
    training = {name: value for name, value in recipe(run_options).items() if name not in without}
    return tuple(json.loads(json.dumps([identity, training if options.epochs else None])))


def archs_of_grid(family: Family) -> list[ViTArch]:
    """The sizes of the grid that the learngene can make; why others are left out is printed.

    Widths and MLP ratios are tried out at depth 1. Which depths a method refuses is found out without memory.
    """
    options, archs = family.options, []
    with error_context(f"--input-size {options.input_size}"):
        aux = sized(family.gene.arch, options.input_size)
    grid = [(heads, ratio) for heads in options.heads for ratio in options.mlp_ratios or [aux.mlp_ratio]]
    for heads, ratio in grid:
        of_ratio = f" and MLP ratio {ratio:g}" if options.mlp_ratios else ""
        try:
            arch = replace(aux, depth=1, num_heads=heads, width=heads * aux.head_dim, mlp_ratio=ratio)
            family.descend(arch)
        except InputError as error:
            print(f"left out, {heads} heads{of_ratio}: {error}", flush=True)
            continue
        for depth in options.depths:
            arch = replace(arch, depth=depth)
            try:
                family.gene.check(arch, **{k: v for k, v in family.choices.items() if k != "skip_init"})
            except InputError as error:
                print(f"left out, {arch.label}: {error}", flush=True)
                continue
            archs.append(arch)
    return [*dict.fromkeys(archs)]  # ratios that make equally many hidden neurons are the same ViT


def build_members(family: Family) -> list[Member]:
    """The members of the grid that the learngene can make.

    Raises:
        InputError: there are none, or the folder of one holds another model.
    """
    options, members = family.options, []
    for arch in archs_of_grid(family):
        counts = arch.num_params(**family.shape), arch.macs(**family.shape)
        folder = family.folder / arch.label
        timed_on = family.device_name if family.timed else None
        record = read_record(folder, family.identity, family.training, timed_on)
        members.append(Member(family.title_of(arch), arch, folder, *counts, record))
    if not members:
        heads = ",".join(map(str, options.heads))
        raise InputError(f"--heads {heads}: the learngene {family.name} can make none of these Des-Nets")
    if options.epochs and not models.is_vit(name_of(members[0].arch)):
        raise InputError(
            f"--epochs {options.epochs}: main.py has no name for {members[0].arch}, with heads of "
            f"{members[0].arch.head_dim} neurons (deit_… have 32 or 64); without --epochs they can be made"
        )
    return members
