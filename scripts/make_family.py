#!/usr/bin/env python3
"""A family of Des-Nets from one learngene: every depth × heads of a grid, written, measured, and fine-tuned if asked.

scripts/make_family.py --load-gene learngene.safetensors --depths 3-12 --heads 3,6,9,12 --output-dir output/family \\
    --data-set FOLDER --data-path /path/to/images --max-params 30M
scripts/make_family.py … --epochs 5 -- --batch-size 128 --lr 1e-4

Options after -- go to main.py. The results of each Des-Net are kept in its folder, in family.json: the same command
continues where it was stopped. A folder that was made with other options is refused, not made again: it may hold many
hours of fine-tuning, and models made in different ways cannot be compared in one table.
"""

import argparse
import csv
import json
import math
import platform
import re
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import models
from common import console
from common.download import fetch
from common.errors import InputError, error_context
from common.files import atomic_write, read_json, sha256
from datasets import DATA_SETS, SMALL, describe_classes
from engine import evaluate
from models import ViTArch
from models.formats.timm_folder import save_model
from models.vit import FORWARD_AND_BACKWARD, MAX_DEPTH
from options import at_least, place, place_or_none
from scripts.inspect_learngene import name_of
from training.build import autocast_of, device_of
from training.build_data import build_loaders
from training.build_model import CHANNELS
from training.checks import check_data
from training.command_line import Parser, parse_options, with_dashes
from training.config import Config, options_of, recipe, resolve
from training.label_check import names_known, warn_of_head
from training.logs import Progress
from training.setup import writable_folder

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.utils import random_seed
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

BATCHES = (1, 64)  # images at once whose latency is measured; the limit is on the first
HELD_IN_MEMORY = 2**30  # bytes of test images that are decoded only once, for all models
# what main.py would do besides fine-tuning, or to one depth only
NOT_FOR_A_FAMILY = ("src_arch", "tgt_arch", "init", "init_path", "finetune", "resume", "eval", "push_to_hub")
NOT_FOR_A_FAMILY += ("push_ema", "mapping_layer", "mapping_layer_coeff")
INITIALISATION = ("width_select", "depth_select", "skip_init")  # options of main.py that descend takes
WHERE_IT_RUNS = ("device", "num_workers", "pin_mem", "log_interval")  # they do not change what is trained
RECORD = ("identity", "training", "device", "latency_ms_1", "latency_ms_64", "accuracy_before", "accuracy_after")


@dataclass
class Member:
    """A Des-Net of the grid; ``record`` is the content of its ``family.json``, None for what is not known yet."""

    arch: ViTArch
    folder: Path
    params: int
    macs: int
    record: dict

    @property
    def name(self) -> str:
        return f"L{self.arch.depth}-H{self.arch.num_heads}"

    @property
    def accuracy(self) -> float | None:
        after, before = self.record["accuracy_after"], self.record["accuracy_before"]
        return before if after is None else after

    def excess(self, args: argparse.Namespace) -> float:
        """The largest of its costs, as a fraction of the limit on it; above 1 it does not fit."""
        costs = [(self.params, args.max_params), (self.macs, args.max_macs)]
        costs.append((self.record["latency_ms_1"], args.max_latency_ms))
        return max((cost / limit for cost, limit in costs if cost is not None and limit is not None), default=0.0)

    def __str__(self) -> str:
        accuracy, latency = self.accuracy, self.record["latency_ms_1"]
        parts = [] if accuracy is None else [f"{accuracy:.2f} %"]
        parts += [f"{self.params:,} parameters", f"{self.macs:,} MACs"]
        parts += [] if latency is None else [f"{latency:.2f} ms"]
        return f"{self.name} with {', '.join(parts)}"


@dataclass
class Setting:
    """What all members of the family share."""

    args: argparse.Namespace
    options: Config  # of main.py
    command: list[str]  # main.py's command line, without the Des-Net and its folder
    gene: models.Learngene
    device: torch.device
    autocast: AbstractContextManager
    loaders: list[DataLoader] | None  # training and test images
    classes: list[str]
    shape: dict[str, int]  # num_classes and in_chans of every member
    identity: dict  # what a member is made from
    training: dict | None  # what its fine-tuning follows from

    @property
    def evaluated(self) -> bool:
        return self.loaders is not None and not self.args.no_eval

    @property
    def measured(self) -> bool:
        return self.evaluated or self.args.max_latency_ms is not None

    @cached_property
    def test_batches(self) -> Iterable:
        """The test images, in memory if they fit."""
        test_loader = self.loaders[1]
        bytes_of_image = 4 * self.shape["in_chans"] * self.args.input_size**2
        if len(test_loader.dataset) * bytes_of_image > HELD_IN_MEMORY:
            return test_loader
        return list(tqdm(test_loader, desc="reading the test images", leave=False, disable=None))

    @cached_property
    def device_name(self) -> str:
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        else:
            info = Path("/proc/cpuinfo")  # platform.processor() is empty on Linux
            model = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
            name = f"{model[1] if model else platform.machine()}, {torch.get_num_threads()} threads"
        return f"{name}, {getattr(self.autocast, 'fast_dtype', torch.float32)}".replace("torch.", "")

    def descend(self, arch: ViTArch) -> nn.Module:
        random_seed(self.options.runtime.seed)  # a fresh head does not depend on what was made before
        choices = {name: getattr(self.options.model, name) for name in INITIALISATION}
        return self.gene.descend(arch, **self.shape, **choices).eval()


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------


def numbers(text: str) -> list[int]:
    """'3-5,9' as [3, 4, 5, 9]."""
    found = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,3})(?:-(\d{1,3}))?", part.strip())
        if match is None:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers and ranges such as 3-6,9,12")
        first, last = int(match[1]), int(match[2] or match[1])
        if not 1 <= first <= last <= MAX_DEPTH:
            raise argparse.ArgumentTypeError(f"{part!r} is empty or too large: expected 1 to {MAX_DEPTH}, as in 3-6")
        found.update(range(first, last + 1))
    return sorted(found)


def amount(text: str) -> int:
    """'1.5M' as 1500000."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?)([kmg]?)", text.lower())
    value = int(float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[match[2]]) if match else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount such as 500k, 10M or 2.5G")
    return value


def milliseconds(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time: expected a number above 0")
    return value


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of this script, and those after ``--``."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument(
        "--load-gene", type=place, required=True, help="learngene file, published checkpoint, or address of one"
    )
    p.add_argument("--depths", type=numbers, required=True, help="numbers of layers, such as 3-12 or 3-6,9,12")
    p.add_argument("--heads", type=numbers, required=True, help="numbers of heads, likewise")
    p.add_argument("--output-dir", type=place, required=True, help="a folder per Des-Net, and family.csv, .md and .png")
    p.add_argument("--data-set", choices=sorted(DATA_SETS), help="whose test images to evaluate on; default: none")
    p.add_argument("--data-path", type=place_or_none, help="the folder that holds it; not needed for DIGITS")
    p.add_argument("--no-eval", action="store_true", help="only initialise and write (--data-set gives the classes)")
    p.add_argument("--epochs", type=at_least(0), default=0, help="fine-tune each Des-Net with main.py")
    p.add_argument("--max-params", type=amount, help="leave out Des-Nets of more parameters, such as 10M")
    p.add_argument("--max-macs", type=amount, help="leave out Des-Nets of more multiply-accumulates per image")
    p.add_argument("--max-latency-ms", type=milliseconds, help="leave out Des-Nets that take longer for one image")
    p.add_argument("--input-size", type=at_least(1), help="pixels; default: the learngene's")
    p.add_argument("--gene-ema", action="store_true", help="take the averaged weights of a checkpoint")
    p.add_argument("--width-select", help="as in main.py")
    p.add_argument("--head-dim", type=at_least(1), default=64, help="neurons of a head, for published checkpoints")
    end = argv.index("--") if "--" in argv else len(argv)
    args, unknown = p.parse_known_args([with_dashes(argument) for argument in argv[:end]])
    if unknown:
        raise InputError(f"unknown option {unknown[0]}: options of main.py follow after --")
    rest = [with_dashes(argument) for argument in argv[end + 1 :]]
    for option in (argument.partition("=")[0] for argument in rest):
        if option in p._option_string_actions:
            raise InputError(f"{option} belongs before --: it is an option of this script")
    if args.epochs and (args.data_set is None or args.no_eval):
        found = "--no-eval is given" if args.no_eval else "--data-set is missing"
        raise InputError(f"--epochs {args.epochs} trains and evaluates: {found}")
    return args, rest


def command_of(args: argparse.Namespace, rest: Sequence[str], gene_path: Path) -> list[str]:
    """The command line of main.py without the Des-Net and its folder; what this script was given wins."""
    given = {"--load-gene": gene_path, "--input-size": args.input_size, "--epochs": args.epochs}
    given |= {"--data-set": args.data_set, "--data-path": args.data_path, "--width-select": args.width_select}
    command = [f"{name}={value}" for name, value in given.items() if value is not None]
    return [*rest, *command, "--gene-ema" if args.gene_ema else "--no-gene-ema"]


def set_up(args: argparse.Namespace, rest: list[str]) -> Setting:
    """Read the learngene, once, and check everything that can be checked before the work."""
    with error_context(f"--load-gene {args.load_gene}"):
        path = fetch(args.load_gene, f"learngene{'_ema' * args.gene_ema}.safetensors")
        gene = models.load_learngene(path, args.head_dim, args.gene_ema)
    print(f"{args.load_gene}: {gene}", flush=True)
    args.input_size = args.input_size or gene.arch.img_size
    command = command_of(args, rest, path)
    config = resolve(parse_options(command))
    options, defaults = options_of(config), options_of(Config())
    for name in NOT_FOR_A_FAMILY:
        if options[name] != defaults[name]:
            raise InputError(f"--{name.replace('_', '-')} is not for a family: every Des-Net starts from the learngene")
    check_data(config.data)
    device = device_of(config.runtime.device)
    writable_folder(args.output_dir)
    loaders, classes, in_chans = None, [], gene.config["in_chans"]
    if args.data_set:
        (*loaders, classes), in_chans = build_loaders(config, device), CHANNELS
        if gene.num_classes != len(classes):
            print(f"the learngene has {gene.num_classes} classes, the data {len(classes)}: the heads are fresh")
        warn_of_head(f"--load-gene {args.load_gene}", gene.classes, names_known(args.data_set, classes))
    identity = {"learngene": sha256(path), "head_dim": gene.arch.head_dim, "gene_ema": args.gene_ema}
    identity |= {name: options[name] for name in (*INITIALISATION, "input_size", "eval_crop_ratio", "seed")}
    identity |= {"data_set": args.data_set, "data_path": args.data_path and str(Path(args.data_path).resolve())}
    training = {name: value for name, value in recipe(config).items() if name not in WHERE_IT_RUNS}
    identity, training = json.loads(json.dumps([identity, training if args.epochs else None]))  # as files give it back
    shape = {"num_classes": len(classes) or gene.num_classes, "in_chans": in_chans}
    autocast, _ = autocast_of(config.runtime.amp_dtype, device)
    return Setting(args, config, command, gene, device, autocast, loaders, classes, shape, identity, training)


# ---------------------------------------------------------------------------------------------------------------------
# The members
# ---------------------------------------------------------------------------------------------------------------------


def grid(setting: Setting) -> list[Member]:
    """All members that the learngene can make; how many layers they have makes no difference to whether it can.

    Raises:
        InputError: there are none, or a folder holds something else.
    """
    args, aux, members = setting.args, setting.gene.arch, []
    with error_context(f"--input-size {args.input_size}"):
        aux = replace(aux, img_size=args.input_size)
    for heads in args.heads:
        arch = replace(aux, depth=1, num_heads=heads, width=heads * aux.head_dim)
        try:
            setting.descend(arch)
        except InputError as error:
            print(f"left out, {heads} heads: {error}", flush=True)
            continue
        for depth in args.depths:
            arch = replace(arch, depth=depth)
            counts = arch.num_params(**setting.shape), arch.macs(**setting.shape)
            folder = Path(args.output_dir, f"L{depth}-H{heads}")
            members.append(Member(arch, folder, *counts, read_record(folder, setting)))
    if not members:
        raise InputError(f"--heads {','.join(map(str, args.heads))}: this learngene can make none of these Des-Nets")
    if args.epochs and not models.follows_grammar(name_of(members[0].arch)):
        raise InputError(
            f"--epochs {args.epochs}: main.py has no name for ViTs with heads of {aux.head_dim} neurons, "
            "only for 32 and 64; without --epochs they can be made"
        )
    return members


def read_record(folder: Path, setting: Setting) -> dict:
    """What ``family.json`` says is done already; empty where there is none, or the model is gone.

    Raises:
        InputError: the folder holds a model that was made in another way.
    """
    path = folder / "family.json"
    advice = "choose another --output-dir, or remove the folder"
    if not path.exists() and (folder / "log.txt").exists():
        raise InputError(f"{folder} holds a run of main.py that is of no family: {advice}")
    if not path.exists() or not (folder / "model.safetensors").exists():
        return dict.fromkeys(RECORD)
    record = read_json(path)
    if not isinstance(record, dict) or record.keys() != set(RECORD) or not isinstance(record["identity"], dict):
        raise InputError(f"{path} is no record of this script: {advice}")
    asked = setting.training or {"epochs": 0}
    for old, new in ((record["identity"], setting.identity), (record["training"] or asked, asked)):
        for name in new:
            if old.get(name) != new[name]:
                raise InputError(f"{folder} was made with {name} {old.get(name)}, not {new[name]}: {advice}")
    if setting.measured and record["device"] != setting.device_name:  # times on two devices do not compare
        record |= dict.fromkeys(("device", "latency_ms_1", "latency_ms_64"))
    return record


def write_record(member: Member) -> None:
    with atomic_write(member.folder / "family.json") as unfinished:
        Path(unfinished).write_text(json.dumps(member.record, indent=2) + "\n")


def initialise(member: Member, setting: Setting) -> bool:
    """Make, measure, write and evaluate what is not recorded yet; False if it takes longer than allowed."""
    record, new = member.record, member.record["identity"] is None
    measure = setting.measured and record["device"] is None
    assess = setting.evaluated and record["accuracy_before"] is None
    if not (new or measure or assess):
        return True
    vit = setting.descend(member.arch).to(setting.device)
    if measure:
        record["device"] = setting.device_name
        record["latency_ms_1"], record["latency_ms_64"] = (latency(vit, batch, setting) for batch in BATCHES)
    if member.excess(setting.args) > 1:
        return False
    if new:
        member.folder.mkdir(exist_ok=True)
        save(vit, member, setting)
    if assess:
        with Progress(len(setting.test_batches), f"evaluating {member.name}") as progress:
            numbers = evaluate(vit, setting.test_batches, setting.device, setting.autocast, progress.advance)
        record["accuracy_before"] = numbers["acc1"]
    record["identity"] = setting.identity
    write_record(member)
    return True


@torch.no_grad()
def latency(vit: nn.Module, batch: int, setting: Setting) -> float:
    """Milliseconds of a forward pass of ``batch`` images: the median of what runs in 0.2 s, but of three at least."""
    size = setting.args.input_size
    images = torch.randn(batch, setting.shape["in_chans"], size, size, device=setting.device)
    times = []
    while len(times) < 5 or sum(times[2:]) < 0.2:
        start = time.perf_counter()
        with setting.autocast:
            vit(images)
        if setting.device.type == "cuda":
            torch.cuda.synchronize(setting.device)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[2:])  # the first two are the warm-up


def save(vit: nn.Module, member: Member, setting: Setting) -> None:
    size = setting.args.input_size
    small = DATA_SETS[setting.options.data.data_set][2] is not None and size <= SMALL  # small images are used whole
    save_model(
        vit,
        member.folder,
        member.arch,
        model_args={},
        data_config={
            "input_size": [setting.shape["in_chans"], size, size],
            "crop_pct": 1.0 if small else setting.options.data.eval_crop_ratio,
            "crop_mode": "squash" if small else "center",
            "interpolation": "bicubic",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
        },
        label_names=setting.classes,
        label_descriptions=describe_classes(setting.classes) if setting.classes else None,
    )


def fine_tune(member: Member, setting: Setting) -> None:
    """Train with main.py, from where an earlier call was stopped, and record the accuracy after the last epoch."""
    checkpoint = member.folder / "checkpoint.pth"
    resume = [f"--resume={checkpoint}"] if member.record["training"] is not None and checkpoint.exists() else []
    member.record["training"] = setting.training
    write_record(member)
    model = [f"--des-arch={name_of(member.arch)}", f"--output-dir={member.folder}"]
    command = [sys.executable, REPOSITORY / "main.py", *setting.command, *model, *resume]
    last = deque(maxlen=20)
    with (
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process,
        tqdm(desc=f"training {member.name}", unit="step", leave=False, disable=None) as bar,
    ):
        for line in process.stdout:
            last.append(line.strip())
            if bar.disable:
                print(f"{member.name}: {line}", end="", flush=True)
            if progress := re.match(r"training (\d+)/(\d+),", line):
                bar.total = int(progress[2])
                bar.update(int(progress[1]) - bar.n)
    if process.returncode != 0:
        reason = next((line for line in reversed(last) if line.startswith("error: ")), " ".join(last))
        raise InputError(f"main.py cannot train {member.name}: {reason.removeprefix('error: ')}")
    log = [json.loads(line) for line in (member.folder / "log.txt").read_text().splitlines()]
    member.record["accuracy_after"] = log[-1]["test_acc1"]
    write_record(member)


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


def write_results(members: Sequence[Member], setting: Setting) -> None:
    """``family.csv``, ``family.md``, and ``family.png`` if accuracy is known."""
    out = Path(setting.args.output_dir)
    stored = sum(tensor.numel() for tensor in setting.gene.tensors.values())
    sizes = ("depth", "heads", "width", "parameters", "macs")
    rows = [
        dict(zip(sizes, (m.arch.depth, m.arch.num_heads, m.arch.width, m.params, m.macs), strict=True))
        | {name: m.record[name] for name in RECORD[2:]}
        | {"stored_parameters": stored}
        for m in members
    ]
    with (
        atomic_write(out / "family.csv") as unfinished,
        open(unfinished, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    with atomic_write(out / "family.md") as unfinished:
        Path(unfinished).write_text(
            "\n".join([*family_table(rows), "", *summary(members, stored, setting)]) + "\n", encoding="utf-8"
        )
    if all(member.accuracy is not None for member in members):
        figure = draw(
            members, f"Des-Nets of {Path(setting.args.load_gene).name}, test images of {setting.args.data_set}"
        )
        with atomic_write(out / "family.png") as unfinished:
            figure.savefig(unfinished, format="png", dpi=150)


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; its first row is the head, its first column flush left."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|---|" + "---:|" * (len(rows[0]) - 1), *lines[1:]]


def family_table(rows: Sequence[dict]) -> list[str]:
    head = ["Des-Net", "width", "parameters", "MACs", "ms, 1 image", "ms, 64 images", "untrained", "fine-tuned"]
    lines = []
    for row in rows:
        times = [f"{row[name]:.2f}" if row[name] is not None else "" for name in ("latency_ms_1", "latency_ms_64")]
        both = [f"{row[name]:.2f} %" if row[name] is not None else "" for name in ("accuracy_before", "accuracy_after")]
        counts = [str(row["width"]), f"{row['parameters']:,}", f"{row['macs']:,}"]
        lines.append([f"L{row['depth']}-H{row['heads']}", *counts, *times, *both])
    return markdown([head, *lines])


def summary(members: Sequence[Member], stored: int, setting: Setting) -> list[str]:
    """What was stored and what training cost, and what these numbers take for granted."""
    args, gene = setting.args, setting.gene
    params, macs = sum(m.params for m in members), sum(m.macs for m in members)
    epochs, images, unknown = stage_1_of(setting)
    aux = gene.arch.macs(gene.num_classes, gene.config["in_chans"])
    fine_tuning = FORWARD_AND_BACKWARD * args.epochs * len(setting.loaders[0].dataset) * macs if args.epochs else 0
    stage_1_cost, alone = (FORWARD_AND_BACKWARD * epochs * images * per_image for per_image in (aux, macs))
    costs = [stage_1_cost, stage_1_cost + fine_tuning, alone]
    first, together, each = ["unknown"] * 3 if unknown else [f"{cost:.3e}" for cost in costs]
    saving = "" if unknown else f", {alone / costs[1]:.2f} times as many"
    devices = sorted({m.record["device"] for m in members if m.record["device"] is not None})
    return [
        *markdown([
            ["", "with the learngene", f"{len(members)} ViTs one by one"],
            ["parameters stored", f"{stored:,}", f"{params:,}, {params / stored:.2f} times as many"],
            ["MACs of stage 1", first, ""],
            [f"MACs of fine-tuning for {args.epochs} epoch{'s' * (args.epochs != 1)}", f"{fine_tuning:.3e}", ""],
            ["MACs of training, together", together, each + saving],
        ]),
        "",
        f"Learngene: {gene}.",
        "",
        "MACs are multiply-accumulates of one image's forward pass, counted from shapes. Training takes three times as "
        "many per image, forward and backward, and an epoch sees every training image once. Stage 1 trains the Aux-Net"
        + (f", for {epochs} epochs of {images:,} images" if not unknown else "")
        + "; the forward passes of a teacher and the expansion of the weights are not counted. One by one, each ViT is "
        "trained for as many epochs of the same images as stage 1."
        + (f" The cost of stage 1 is unknown: {unknown}." if unknown else ""),
        *(["", f"Latency, the median of 3 runs or more after a warm-up: {'; '.join(devices)}."] if devices else []),
    ]  # fmt: skip


def stage_1_of(setting: Setting) -> tuple[int, int, str]:
    """The epochs and training images of stage 1, and why they are not known if they are not."""
    epochs, data_set = setting.gene.options.get("epochs"), setting.gene.options.get("data_set")
    if type(epochs) is not int or epochs < 1:
        return 0, 0, "the learngene does not record its epochs"
    if setting.loaders is None or data_set != setting.args.data_set:
        return 0, 0, f"it was trained on {str(data_set)[:50]}, which is not the data set given here"
    return epochs, len(setting.loaders[0].dataset), ""


def pareto(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, accuracy) such that none that costs as little or less is better, by rising cost."""
    front = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((cost, accuracy))
    return front


def draw(members: Sequence[Member], title: str) -> Figure:
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    costs = [
        ("parameters", "", [m.params for m in members]),
        ("MACs of one image", "", [m.macs for m in members]),
        ("latency of one image", "s", [m.record["latency_ms_1"] / 1000 for m in members]),
    ]
    for axes, (label, unit, values) in zip(panels, costs, strict=True):
        axes.set_xlabel(label)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(unit))
        axes.xaxis.set_minor_formatter(NullFormatter())
        draw_panel(axes, members, values)
    panels[0].set_ylabel("test accuracy, %")
    panels[0].legend(frameon=False)
    figure.suptitle(title)
    return figure


def draw_panel(axes: Axes, members: Sequence[Member], costs: Sequence[float]) -> None:
    """Untrained hollow, fine-tuned filled; the Pareto front of what is used in the end, with names."""
    both = {"untrained": ("accuracy_before", "white"), "fine-tuned": ("accuracy_after", "#0b6e99")}
    for label, (key, colour) in both.items():
        points = [(c, m.record[key]) for c, m in zip(costs, members, strict=True) if m.record[key] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), "o", color="#0b6e99", markerfacecolor=colour, label=label, zorder=3)
    final = {(cost, m.accuracy): m.name for cost, m in zip(costs, members, strict=True)}
    front = pareto(final)
    axes.plot(*zip(*front, strict=True), color="#c4572e", linewidth=1.5, label="Pareto front", zorder=2)
    for point in front:
        style = dict(ha="left", va="top", rotation=-30, rotation_mode="anchor", fontsize="small")
        axes.annotate(final[point], point, (4, -5), textcoords="offset points", **style)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.1, y=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def make(setting: Setting) -> None:
    args = setting.args
    every = grid(setting)
    rejected = [member for member in every if member.excess(args) > 1]
    members = [member for member in every if member.excess(args) <= 1]
    progress = Progress(len(members), "making the family")
    for member in tuple(members):
        if not initialise(member, setting):
            members.remove(member)
            rejected.append(member)
        progress.advance()
        known = {"accuracy": member.accuracy} if member.accuracy is not None else {}
        progress.show({"depth": member.arch.depth, "heads": member.arch.num_heads, **known})
    progress.close()
    nearest = min(rejected, key=lambda member: member.excess(args), default=None)
    if not members:
        raise InputError(f"nothing fits the limits: the nearest is {nearest}")
    write_results(members, setting)
    for member in tqdm(members, desc="fine-tuning the family", disable=None if args.epochs else True):
        if args.epochs and member.record["accuracy_after"] is None:
            fine_tune(member, setting)
    write_results(members, setting)
    print(f"{len(members)} Des-Nets: {args.output_dir}/family.csv, family.md" + ", family.png" * setting.evaluated)
    if setting.evaluated:
        print(f"the best that fits: {max(members, key=lambda m: (m.accuracy, -m.params))}")
    else:
        print(f"the largest that fits: {max(members, key=lambda m: m.params)}")
    if nearest is not None:
        print(f"the nearest that does not fit: {nearest}")


def main(argv: Sequence[str]) -> int:
    try:
        make(set_up(*parse(argv)))
    except (InputError, OSError) as error:  # an OSError names the file that cannot be written
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    console.accept_any_text()
    sys.exit(main(sys.argv[1:]))
