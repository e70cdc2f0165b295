"""Part 2, fast: the measurements of docs/performance.md that are for a device, the most important ones first."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.devices import CPU
from device_check.processes import run_benchmark, start_fork, wait_for
from device_check.report import Part, Report, Table

MATRIX = "matrix product"
SMALL_SECONDS = 300.0  # for a measurement with --small, on a CPU that may be busy
AGAINST_PLAIN = "A step is forward, backward, AdamW and EMA in bfloat16; ratios are medians of pairs, with their range."
# TFLOP/s of dense bfloat16 matrix products without sparsity, by a part of the device's name, from the data sheets:
# nvidia.com/en-us/data-center/{h200,h100,a100,l40s,l4,a10}, amd.com/en/products/accelerators/instinct (MI300X, MI250X)
DATA_SHEET = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L40": 181, "L4": 121, "A10": 125}
DATA_SHEET |= {"MI300X": 1307, "MI250X": 383}


@dataclass(frozen=True)
class Measurement:
    """A call of a program of benchmarks/, and the table of its rows."""

    title: str
    program: str
    arguments: Sequence[str]
    seconds: float  # at most
    remark: str = ""


def measurements(kind: str, small: bool, data_path: str | None) -> list[Measurement]:
    """What is measured, in order.

    Args:
        kind: of the device.
        data_path: the folder of Fashion-MNIST, if there is one.
    """
    device = ["--device", kind]
    few = ["--small", "--repeats", "2", "--seconds", "0.2", "--dtype", "float32"] if small else []
    sizes = ["8"] if small else ["128", "256", "64", "512"]
    first = sizes[:1]
    data = ["--data-set", "FMNIST", "--data-path", data_path] if data_path and not small else []
    engine = ["--model", "deit_nano_patch8_24_L2_H1", "--batch-size", "8", "--steps", "4", "--repeats", "1"]
    if not small:
        engine = ["--model", "deit_base_patch16_224_L12", "--batch-size", "128", "--dtype", "bfloat16"]
        engine += ["--steps", "20", "--repeats", "2"]

    def steps(title: str, what: str, batches: Sequence[str], seconds: float, *more: str) -> Measurement:
        arguments = [*what.split(), "--batch-sizes", *batches, *device, *few, *more]
        return Measurement(title, "device", arguments, seconds, AGAINST_PLAIN.replace("bfloat16", "float32") * small)

    planned = [
        Measurement("What the device can do", "device", ["rates", *device, *few], 30),
        steps("Stage 1 of LeTs", "lets", sizes, 50),
        steps("Stage 1 of LeTs, compiled", "lets", first, 75, "--compile"),
        steps("Stage 1 of TLEG", "tleg", first, 35),
        steps("Several sizes in a step: an elastic family", "elastic", first, 35),
        steps("Several sizes in a step: LeTs with descendants", "descendants", first, 35),
        Measurement("The engine against timm's loop", "engine", [*engine, *device], 45),
        Measurement("Small images, --cache-data", "cache", ["--input-size", "28", *data, *device, *quick(small)], 45),
        Measurement("Small runs at a time", "device", ["together", *device, *few], 60),
        Measurement("Photographs from data workers", "device", ["photographs", *device, *few], 45),
        steps("Stage 1 of TLEG, compiled", "tleg", first, 60, "--compile"),
        steps("Stage 1 of LeTs, compiled, other batches", "lets", sizes[1:], 100, "--compile"),
        steps("Stage 1 of TLEG, other batches", "tleg", sizes[1:], 35),
    ]
    if not small:
        return planned
    few = [one for one in planned if "--compile" not in one.arguments and "other batches" not in one.title]
    return [replace(one, seconds=SMALL_SECONDS) for one in few]


def quick(small: bool) -> list[str]:
    return (
        ["--repeats", "1", "--seconds", "0.2", "--batch-size", "32"]
        if small
        else ["--repeats", "3", "--seconds", "0.5"]
    )


def run(report: Report, part: Part, planned: Sequence[Measurement], kind: str, logs: Path, until: float) -> None:
    """Take the measurements while there is time; each is in the report as soon as there are numbers."""
    for number, measurement in enumerate(planned):
        left = until - time.monotonic()
        if left < min(10, measurement.seconds / 4):
            part.notes.append(f"{measurement.title}: left out, no time was left")
            continue
        take(report, part, measurement, logs / f"fast_{number}", min(left, measurement.seconds))
        add_utilisation(part, str(report.head.get("device")), kind)
        report.write()
    part.state = "not all right" if part.problems else "all right"
    report.write()


def take(report: Report, part: Part, measurement: Measurement, files: Path, seconds: float) -> None:
    """Take one measurement; what there is of its table grows while it runs."""
    numbers, printed, table = files.with_suffix(".json"), files.with_suffix(".log"), None

    def read() -> None:
        nonlocal table
        rows = json.loads(numbers.read_text()) if numbers.exists() else []
        if rows and (table is None or len(rows) > len(table.rows)):
            if table is None:
                table = Table(measurement.title, rows, measurement.remark)
                part.tables.append(table)
            table.rows = rows
            report.write()

    arguments = (measurement.program, [*measurement.arguments, "--json", str(numbers)])
    ended = wait_for(start_fork(run_benchmark, arguments, printed, seconds), read)
    read()
    if ended.late:
        rows = f" after {len(table.rows)} rows" if table else ""
        part.notes.append(f"{measurement.title}: ran out of its {seconds:.0f} s{rows}")
    elif ended.status or table is None:
        part.problems.append(f"{measurement.title}: {ended}")
        part.outputs[measurement.title] = "\n".join(printed.read_text(errors="replace").splitlines()[-12:])
    for row in table.rows if table else ():
        if row.get("note"):
            part.notes.append(f"{measurement.title}: {row.get('network', '')} {row['note']}")


def add_utilisation(part: Part, device: str, kind: str) -> None:
    """To rows with TFLOP/s add their share of the measured rate of a matrix product, and of the data sheet's."""
    rates = (row["TFLOP/s"] for table in part.tables for row in table.rows if MATRIX in str(row.get("what")))
    measured = next(rates, None)
    sheet = next((peak for name, peak in DATA_SHEET.items() if name in device), None) if kind != CPU else None
    for table in part.tables:
        for row in table.rows:
            if "TFLOP/s" in row and measured and MATRIX not in str(row.get("what")):
                row["% of the matrix product"] = 100 * row["TFLOP/s"] / measured
            if "TFLOP/s" in row and sheet:
                row["% of the data sheet"] = 100 * row["TFLOP/s"] / sheet
