"""Make, measure, evaluate and fine-tune one member of a family."""

import json
import re
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from common.devices import memory_of, synchronize
from common.errors import InputError
from datasets import describe_classes
from engine import evaluate
from family.plan import Family, Member
from family.records import BATCHES, write_record
from models.formats.timm_folder import save_model
from models.names import name_of
from training.logs import Progress
from training.preprocessing import evaluation_config
from training.probe import fit_head

import torch
from torch import nn
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parents[1]
WARM_UP = 3  # passes whose time is not measured, but their memory
MIN_PASSES, MIN_SECONDS = 5, 0.3  # that are timed, whichever takes longer


def initialise(member: Member, family: Family) -> bool:
    """Initialise, time, save and evaluate a member, as far as its record lacks that.

    Returns:
        False if its latency is above the limit; nothing is written then.
    """
    record, new = member.record, member.record["identity"] is None
    measure = family.timed and record["device"] is None
    assess = family.evaluated and record["accuracy_before"] is None
    if not (new or measure or assess):
        return True
    vit = family.descend(member.arch).to(family.device)
    if family.probe_loader is not None:
        fit_head(vit, family.probe_loader, family.shape["num_classes"], family.autocast)
    if measure:
        record["device"] = family.device_name
        for batch in BATCHES:
            record |= measurements(vit, batch, family)
    if member.excess(family.options) > 1:
        return False
    if new:
        member.folder.mkdir(parents=True, exist_ok=True)
        save(vit, member, family)
    if assess:
        with Progress(len(family.test_batches), f"evaluating {member.title}") as progress:
            numbers = evaluate(vit, family.test_batches, family.device, family.autocast, progress.advance)
        record["accuracy_before"] = numbers["acc1"]
    record["identity"] = family.identity
    write_record(member.folder, record)
    return True


@torch.no_grad()
def measurements(vit: nn.Module, batch: int, family: Family) -> dict[str, float]:
    """Latency, throughput and memory of forward passes of ``batch`` images, each with its spread.

    Memory is that of the weights, the images and what a pass adds at its peak.
    """
    size = family.options.input_size
    images = torch.randn(batch, family.shape["in_chans"], size, size, device=family.device)

    def forward() -> None:
        with family.autocast:
            vit(images)
        synchronize(family.device)

    fixed = sum(tensor.nbytes for tensor in (*vit.parameters(), *vit.buffers(), images))
    memory = [fixed + memory_of(forward, family.device) for _ in range(WARM_UP)]
    times = []
    while len(times) < MIN_PASSES or sum(times) < MIN_SECONDS:
        start = time.perf_counter()
        forward()
        times.append(time.perf_counter() - start)
    found = with_spread(f"latency_ms_{batch}", [1000 * seconds for seconds in times])
    found |= with_spread(f"images_per_s_{batch}", [batch / seconds for seconds in times]) if batch > 1 else {}
    return found | with_spread(f"memory_bytes_{batch}", memory)


def with_spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """The median of repeated measurements, and their quartiles as ``NAME_low`` and ``NAME_high``."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {name: median, f"{name}_low": low, f"{name}_high": high}


def save(vit: nn.Module, member: Member, family: Family) -> None:
    """Write ``model.safetensors`` and ``config.json`` in timm's format."""
    save_model(
        vit,
        member.folder,
        member.arch,
        model_args={},
        data_config=evaluation_config(family.run_options.data, family.shape["in_chans"]),
        label_names=family.classes,
        label_descriptions=describe_classes(family.classes) if family.classes else None,
    )


def fine_tune(member: Member, family: Family) -> None:
    """Train with main.py, resume if an earlier call was stopped, and record the accuracy after the last epoch.

    Raises:
        InputError: main.py failed; the message is its own.
    """
    checkpoint = member.folder / "checkpoint.pth"
    resume = [f"--resume={checkpoint}"] if member.record["training"] is not None and checkpoint.exists() else []
    member.record["training"] = family.training
    write_record(member.folder, member.record)
    model = [f"--des-arch={name_of(member.arch)}", f"--output-dir={member.folder}"]
    run_main([*family.command, *model, *resume], member.title)
    log = [json.loads(line) for line in (member.folder / "log.txt").read_text().splitlines()]
    member.record["accuracy_after"] = log[-1]["test_acc1"]
    write_record(member.folder, member.record)


def run_main(arguments: list[str], name: str) -> None:
    """Run main.py in a process of its own; its output is a progress bar on a terminal, lines elsewhere."""
    last = deque(maxlen=20)
    with (
        subprocess.Popen(
            [sys.executable, REPOSITORY / "main.py", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
        tqdm(desc=f"training {name}", unit="step", leave=False, disable=None) as bar,
    ):
        for line in process.stdout:
            last.append(line.strip())
            if bar.disable:
                print(f"{name}: {line}", end="", flush=True)
            if progress := re.match(r"training (\d+)/(\d+),", line):
                bar.total = int(progress[2])
                bar.update(int(progress[1]) - bar.n)
    if process.returncode != 0:
        reason = next((line for line in reversed(last) if line.startswith("error: ")), " ".join(last))
        raise InputError(f"main.py cannot train {name}: {reason.removeprefix('error: ')}")
