"""Comparing things on a machine that others use too: in turn, in one process, pair by pair."""

import platform
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import timm
import torch
from tqdm import trange


def in_turn(measure: Mapping[str, Callable[[], float]], repeats: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Call each function once, then each again, …; a slow moment of the machine meets all of them.

    Returns:
        For each name what its function returned, in the order of the calls, without the first ``warm_up`` ones.
    """
    results = {name: [] for name in measure}
    for i in trange(warm_up + repeats, leave=False):
        for name, function in measure.items():
            result = function()
            if i >= warm_up:
                results[name].append(result)
    return results


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> str:
    """Median and range of the ratios of what was measured in turn, such as '0.65 (0.61–0.72, 5 pairs)'."""
    ratios = sorted(a / b for a, b in zip(numerators, denominators, strict=True))
    return f"{statistics.median(ratios):.3f} ({ratios[0]:.3f}–{ratios[-1]:.3f}, {len(ratios)} pairs)"


def machine(device: str | torch.device = "cpu") -> str:
    """What the numbers were measured with, in a line."""
    if torch.device(device).type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        where = f"{torch.get_num_threads()} thread(s) of {model[1] if model else platform.machine()}"
    return f"{where}, Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}, seed 0"


def peak_memory() -> int:
    """Bytes that this process has had at most; getrusage would count those of the process that started it too."""
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
