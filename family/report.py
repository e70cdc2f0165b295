"""``family.csv``, ``family.md`` and ``family.png``."""

import csv
from collections.abc import Sequence
from pathlib import Path

from common.files import atomic_write
from family.plan import Family, Member
from family.plots import plot_family
from family.records import RECORD
from models.vit import FORWARD_AND_BACKWARD


def write_results(members: Sequence[Member], family: Family) -> None:
    """Write the table, the costs, and the plot if all accuracies are known."""
    out = Path(family.options.output_dir)
    stored = sum(tensor.numel() for tensor in family.gene.tensors.values())
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
            "\n".join([*family_table(rows), "", *summary(members, stored, family)]) + "\n", encoding="utf-8"
        )
    if all(member.accuracy is not None for member in members):
        gene, data_set = Path(family.options.load_gene).name, family.options.data_set
        figure = plot_family(members, f"Des-Nets of {gene}, test images of {data_set}")
        with atomic_write(out / "family.png") as unfinished:
            figure.savefig(unfinished, format="png", dpi=150)


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table: the first row is the header, the first column is left-aligned."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|---|" + "---:|" * (len(rows[0]) - 1), *lines[1:]]


def family_table(rows: Sequence[dict]) -> list[str]:
    header = ["Des-Net", "width", "parameters", "MACs", "ms, 1 image", "ms, 64 images", "untrained", "fine-tuned"]
    lines = []
    for row in rows:
        times = [f"{row[name]:.2f}" if row[name] is not None else "" for name in ("latency_ms_1", "latency_ms_64")]
        both = [f"{row[name]:.2f} %" if row[name] is not None else "" for name in ("accuracy_before", "accuracy_after")]
        counts = [str(row["width"]), f"{row['parameters']:,}", f"{row['macs']:,}"]
        lines.append([f"L{row['depth']}-H{row['heads']}", *counts, *times, *both])
    return markdown([header, *lines])


def summary(members: Sequence[Member], stored: int, family: Family) -> list[str]:
    """Stored parameters and training cost, with the learngene and without, and how they are counted."""
    epochs, images, unknown = stage_1_length(family)
    devices = sorted({m.record["device"] for m in members if m.record["device"] is not None})
    return [
        *cost_table(members, stored, family),
        "",
        f"Learngene: {family.gene}.",
        "",
        *probe_note(family),
        "MACs are multiply-accumulates of one image's forward pass, counted from shapes. Training takes three times as "
        "many per image, forward and backward, and an epoch sees every training image once. Stage 1 trains the Aux-Net"
        + (f", for {epochs} epochs of {images:,} images" if not unknown else "")
        + "; the forward passes of a teacher and the expansion of the weights are not counted. One by one, each ViT is "
        "trained for as many epochs of the same images as stage 1."
        + (f" The cost of stage 1 is unknown: {unknown}." if unknown else ""),
        *(["", f"Latency, the median of 3 runs or more after a warm-up: {'; '.join(devices)}."] if devices else []),
    ]  # fmt: skip


def probe_note(family: Family) -> list[str]:
    if family.probe_loader is None:
        return []
    images = f"{len(family.probe_loader.dataset):,} training images"
    return [f"The learngene has no head. Untrained members have that of a linear probe, fitted to {images}.", ""]


def cost_table(members: Sequence[Member], stored: int, family: Family) -> list[str]:
    options, gene = family.options, family.gene
    params, macs = sum(m.params for m in members), sum(m.macs for m in members)
    epochs, images, unknown = stage_1_length(family)
    aux = gene.arch.macs(gene.num_classes, gene.config["in_chans"])
    images_tuned = options.epochs * len(family.loaders[0].dataset) if options.epochs else 0
    fine_tuning = FORWARD_AND_BACKWARD * images_tuned * macs
    stage_1, alone = (FORWARD_AND_BACKWARD * epochs * images * per_image for per_image in (aux, macs))
    costs = [stage_1, stage_1 + fine_tuning, alone]
    first, together, each = ["unknown"] * 3 if unknown else [f"{cost:.3e}" for cost in costs]
    saving = "" if unknown else f", {alone / costs[1]:.2f} times as many"
    return markdown([
        ["", "with the learngene", f"{len(members)} ViTs one by one"],
        ["parameters stored", f"{stored:,}", f"{params:,}, {params / stored:.2f} times as many"],
        ["MACs of stage 1", first, ""],
        [f"MACs of fine-tuning for {options.epochs} epoch{'s' * (options.epochs != 1)}", f"{fine_tuning:.3e}", ""],
        ["MACs of training, together", together, each + saving],
    ])  # fmt: skip


def stage_1_length(family: Family) -> tuple[int, int, str]:
    """The epochs and the training images of stage 1, and the reason if they are unknown."""
    epochs, data_set = family.gene.options.get("epochs"), family.gene.options.get("data_set")
    if type(epochs) is not int or epochs < 1:
        return 0, 0, "the learngene does not record its epochs"
    if family.loaders is None or data_set != family.options.data_set:
        return 0, 0, f"it was trained on {str(data_set)[:50]}, which is not the data set given here"
    return epochs, len(family.loaders[0].dataset), ""
