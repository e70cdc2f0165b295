"""The head of the report: device, driver, versions and commit."""

import json
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from common.devices import CPU, device_name, device_of, free_memory, processors
from common.errors import InputError
from datasets import build_dataset
from training.command_line import REPOSITORY

PACKAGES = ("torch", "torchvision", "timm", "triton", "numpy")


def describe(device: str, data_path: Path | None, found: Path) -> None:
    """Write what is known of a device and its machine to the JSON file ``found``, or the user's error in asking."""
    try:
        where = device_of(device)
        if data_path is not None:
            build_dataset("FMNIST", str(data_path), True, None)
        content = {"kind": where.type, "device": device_name(where), **of_machine(where)}
    except InputError as error:
        content = {"error": str(error)}
    found.write_text(json.dumps(content))


def of_machine(device) -> dict:
    free = free_memory(device)
    content = {} if device.type == CPU else {"driver": driver()}
    content |= {"free memory, GiB": round(free / 2**30, 1)} if free else {}
    content |= {"processors": processors(), "system": platform.platform(), "Python": platform.python_version()}
    for name in PACKAGES:
        try:
            content[name] = version(name)
        except PackageNotFoundError:
            content[name] = None
    return {**content, "commit": commit(), "seed": 0}


def printed_by(*command: str) -> str | None:
    """What a program of the system prints; None if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=REPOSITORY)
    return done.stdout.strip() or None if done.returncode == 0 else None


def driver() -> str:
    """The version of NVIDIA's driver, or AMD's."""
    return (
        printed_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        or printed_by("rocm-smi", "--showdriverversion", "--csv")
        or "unknown"
    )


def commit() -> str:
    """The commit, and whether there are changes to it."""
    name = printed_by("git", "rev-parse", "--short", "HEAD")
    if name is None:
        return "unknown"
    return name + " with changes" * bool(printed_by("git", "status", "--porcelain", "--untracked-files=no"))
