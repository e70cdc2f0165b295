"""``family.csv``, ``family.md``, ``family.png`` and ``family.html``."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from common.errors import InputError
from common.files import atomic_write
from family.page import family_page
from family.plan import Family, FamilyOptions, Member
from family.plots import plot_family
from family.records import BATCHES, RECORD, SPREAD
from models.learngene import Learngene
from models.sizes import SizeSampler
from models.vit import FORWARD_AND_BACKWARD
from training.build_model import size_sampler
from training.config import ModelConfig

MEASUREMENT = (
    "Latency of one image and images per second in batches of 64: the median of 5 forward passes or more after a "
    "warm-up, and their quartiles. MB are 10^6 bytes of weights, images and what a pass adds at its peak, without "
    "Python and torch. Measured on: "
)
MAX_EPOCHS = 10**5  # of which the cost is summed; more are damage to the file


Made = Mapping[Family, Sequence[Member]]


def write_results(made: Made, options: FamilyOptions) -> None:
    """Write the table, the costs, and the plot and the page if all accuracies are known."""
    out = Path(options.output_dir)
    rows = [row_of(member, family) for family, members in made.items() for member in members]
    with (
        atomic_write(out / "family.csv") as unfinished,
        open(unfinished, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    with atomic_write(out / "family.md") as unfinished:
        Path(unfinished).write_text("\n".join(described(made)) + "\n", encoding="utf-8")
    records = [member.record for members in made.values() for member in members]
    if all(record["accuracy_before"] is not None and record["device"] is not None for record in records):
        title = f"Des-Nets of {', '.join(family.name for family in made)}, test images of {options.data_set}"
        with atomic_write(out / "family.png") as unfinished:
            plot_family(made, title).savefig(unfinished, format="png", dpi=150)
        with atomic_write(out / "family.html") as unfinished:
            Path(unfinished).write_text(family_page(made, title), encoding="utf-8")


def row_of(member: Member, family: Family) -> dict[str, object]:
    """A row of ``family.csv``."""
    arch = member.arch
    return {
        "depth": arch.depth,
        "heads": arch.num_heads,
        "width": arch.width,
        "parameters": member.params,
        "macs": member.macs,
        **{name: member.record[name] for name in RECORD[2:]},
        "stored_parameters": stored_parameters(family),
        "mlp_ratio": round(arch.mlp_ratio or arch.hidden / arch.width, 4),
        "learngene": family.name,
    }


def stored_parameters(family: Family) -> int:
    return sum(tensor.numel() for tensor in family.gene.tensors.values())


def described(made: Made) -> list[str]:
    """The lines of ``family.md``: all Des-Nets, then what each learngene costs."""
    lines = family_table([member for members in made.values() for member in members])
    for family, members in made.items():
        title = ["", f"## {family.name}"] if len(made) > 1 else []
        lines += [*title, "", *summary(members, stored_parameters(family), family)]
    return lines


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table: the first row is the header, the first column is left-aligned."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|---|" + "---:|" * (len(rows[0]) - 1), *lines[1:]]


def family_table(members: Sequence[Member]) -> list[str]:
    """A line for each member. Hidden neurons have a column if not all members have the MLP ratio of the kind."""
    header = ["Des-Net", "width", "parameters", "MACs", "ms, 1 image", "images/s", "MB, 1 image", "MB, 64 images"]
    with_hidden = any(m.arch.mlp_ratio is not None for m in members)
    lines = [[*header[:2], *["hidden"] * with_hidden, *header[2:], "untrained", "fine-tuned"]]
    for m in members:
        numbers = m.record
        measured = [
            shown_spread(numbers, "latency_ms_1", 1, ".2f"),
            shown_spread(numbers, "images_per_s_64", 1, ",.0f"),
        ]
        measured += [shown_spread(numbers, f"memory_bytes_{batch}", 1e-6, ",.2f") for batch in BATCHES]
        both = [f"{numbers[a]:.2f} %" if numbers[a] is not None else "" for a in ("accuracy_before", "accuracy_after")]
        sizes = [m.arch.width, *[m.arch.hidden] * with_hidden]
        lines.append([m.title, *map(str, sizes), f"{m.params:,}", f"{m.macs:,}", *measured, *both])
    return markdown(lines)


def shown_spread(record: Mapping[str, float | None], quantity: str, unit: float, form: str) -> str:
    """A median with its quartiles, such as ``1.20 (1.17–1.31)``; without them where they are the same."""
    if record[quantity] is None:
        return ""
    median, low, high = (format(unit * record[quantity + part], form) for part in SPREAD)
    return median if low == high else f"{median} ({low}–{high})"


def summary(members: Sequence[Member], stored: int, family: Family) -> list[str]:
    """Stored parameters and training cost, with the learngene and without, and how they are counted."""
    stage_1 = stage_1_of(family)
    devices = sorted({m.record["device"] for m in members if m.record["device"] is not None})
    return [
        *cost_table(members, stored, family),
        "",
        f"Learngene: {family.gene}.",
        "",
        *probe_note(family),
        "MACs are multiply-accumulates of one image's forward pass, counted from shapes. Training takes three times as "
        "many per image, forward and backward, and an epoch sees every training image once. Stage 1 trains "
        + stage_1.trains
        + (f", for {stage_1.epochs} epochs of {stage_1.images:,} images" if not stage_1.unknown else "")
        + "; the forward passes of a teacher, the expansion of the weights and the training of a ViT that stage 1 "
        "starts from are not counted. One by one, each ViT is trained for as many epochs of the same images as stage 1."
        + (f" The cost of stage 1 is unknown: {stage_1.unknown}." if stage_1.unknown else ""),
        *(["", MEASUREMENT + "; ".join(devices) + "."] if devices else []),
    ]  # fmt: skip


def probe_note(family: Family) -> list[str]:
    if family.probe_loader is None:
        return []
    images = f"{len(family.probe_loader.dataset):,} training images"
    return [f"The learngene has no head. Untrained members have that of a linear probe, fitted to {images}.", ""]


def cost_table(members: Sequence[Member], stored: int, family: Family) -> list[str]:
    options, stage_1 = family.options, stage_1_of(family)
    params, macs = sum(m.params for m in members), sum(m.macs for m in members)
    images_tuned = options.epochs * len(family.loaders[0].dataset) if options.epochs else 0
    fine_tuning = FORWARD_AND_BACKWARD * images_tuned * macs
    alone = FORWARD_AND_BACKWARD * stage_1.epochs * stage_1.images * macs
    costs = [stage_1.macs, stage_1.macs + fine_tuning, alone]
    first, together, each = ["unknown"] * 3 if stage_1.unknown else [f"{cost:.3e}" for cost in costs]
    saving = "" if stage_1.unknown else f", {alone / costs[1]:.2f} times as many"
    return markdown([
        ["", "with the learngene", f"{len(members)} ViTs one by one"],
        ["parameters stored", f"{stored:,}", f"{params:,}, {params / stored:.2f} times as many"],
        ["MACs of stage 1", first, ""],
        [f"MACs of fine-tuning for {options.epochs} epoch{'s' * (options.epochs != 1)}", f"{fine_tuning:.3e}", ""],
        ["MACs of training, together", together, each + saving],
    ])  # fmt: skip


@dataclass(frozen=True)
class Stage1:
    """What stage 1 cost.

    Attributes:
        trains: which ViTs, in words.
        macs: of forward and backward passes, in all epochs.
        images: of an epoch.
        unknown: the reason, if the cost is unknown.
    """

    trains: str
    macs: float = 0
    epochs: int = 0
    images: int = 0
    unknown: str = ""


def stage_1_of(family: Family) -> Stage1:
    """The cost of stage 1, from the options that the learngene records."""
    gene, options, trains = family.gene, family.gene.options, "the Aux-Net"
    epochs, data_set = options.get("epochs"), options.get("data_set")
    try:
        sampler = sampler_of(gene)
        if sampler is not None:
            trains = ("" if sampler.alone else "the Aux-Net and ") + "Des-Nets of the sizes that each step draws"
        if type(epochs) is not int or not 1 <= epochs <= MAX_EPOCHS:
            return Stage1(trains, unknown="the learngene does not record its epochs")
        macs = sum(sampler.mean_macs(epoch) for epoch in range(epochs)) if sampler is not None else 0
    except (InputError, TypeError, ValueError, AttributeError, KeyError):
        return Stage1(trains, unknown="the learngene records no options of stage 1 that can be used")
    if family.loaders is None or data_set != family.options.data_set:
        unknown = f"it was trained on {str(data_set)[:50]}, which is not the data set given here"
        return Stage1(trains, unknown=unknown)
    if sampler is None or not sampler.alone:
        macs += epochs * gene.arch.macs(gene.num_classes, gene.config["in_chans"])
    images = len(family.loaders[0].dataset)
    return Stage1(trains, FORWARD_AND_BACKWARD * images * macs, epochs, images)


def sampler_of(gene: Learngene) -> SizeSampler | None:
    """What drew the sizes of each step of stage 1; None if it trained the Aux-Net alone."""
    recorded = {name: gene.options.get(name) for name in (option.name for option in fields(ModelConfig))}
    options = {**gene.method_class.defaults, **{name: value for name, value in recorded.items() if value is not None}}
    if not options.get("descendants"):
        return None
    known = {name: value for name, value in options.items() if name in recorded}
    return size_sampler(ModelConfig(**known), gene.arch.img_size, gene.num_classes, gene.options.get("epochs"))
