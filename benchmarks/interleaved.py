"""Interleaved measurements, for comparisons on a shared machine: alternate in one process, compare pair by pair."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from common.devices import CPU, device_name, no_waiting, synchronize
from common.files import atomic_write

import timm
import torch
from tqdm import trange


def in_turn(measure: Mapping[str, Callable[[], float]], repeats: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Call all functions in turn, ``warm_up`` + ``repeats`` times, so that background load affects all of them.

    Returns:
        For each name the results of its function in order, without those of the warm-up.
    """
    results = {name: [] for name in measure}
    for i in trange(warm_up + repeats, leave=False):
        for name, function in measure.items():
            result = function()
            if i >= warm_up:
                results[name].append(result)
    return results


def seconds_of(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call of ``step`` on a device. That the process waits for the device within it is an error."""
    synchronize(device)
    start = time.perf_counter()
    with no_waiting(device):
        step()
    synchronize(device)
    return time.perf_counter() - start


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> str:
    """Median and range of the pairwise ratios, such as '0.650 (0.610–0.720, 5 pairs)'."""
    ratios = sorted(a / b for a, b in zip(numerators, denominators, strict=True))
    return f"{statistics.median(ratios):.3f} ({ratios[0]:.3f}–{ratios[-1]:.3f}, {len(ratios)} pairs)"


def machine(device: str | torch.device = "cpu") -> str:
    """Device and versions on one line."""
    where = device_name(torch.device(device))
    if torch.device(device).type == CPU:
        where = f"{torch.get_num_threads()} thread(s) of {where}"
    return f"{where}, Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}, seed 0"


def write_rows(path: str | Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write measurements to a JSON file, all that there are so far."""
    with atomic_write(path) as unfinished:
        Path(unfinished).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
