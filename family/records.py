"""``family.json``: what is done for a member, so that the same command resumes where it was stopped."""

import json
from pathlib import Path

from common.errors import InputError
from common.files import atomic_write, read_json

BATCHES = (1, 64)  # batch sizes of which latency and memory are measured; --max-latency-ms limits that of the first
QUANTITIES = ("latency_ms_1", "latency_ms_64", "images_per_s_64", "memory_bytes_1", "memory_bytes_64")
SPREAD = ("", "_low", "_high")  # the median of repeated measurements, and their quartiles
MEASURED = tuple(quantity + part for quantity in QUANTITIES for part in SPREAD)
RECORD = ("identity", "training", "device", *MEASURED, "accuracy_before", "accuracy_after")
ADVICE = "choose another --output-dir, or remove the folder"


def read_record(folder: Path, identity: dict, training: dict | None, device_name: str | None) -> dict:
    """The record of a member; all values are None where there is no record, or the model is missing.

    Args:
        identity: see `family.plan.Family`, as is ``training``.
        device_name: where latency and memory are measured; those of another device are dropped. None keeps them.

    Raises:
        InputError: the folder holds a model that was made with other options.
    """
    path = folder / "family.json"
    if not path.exists() and (folder / "log.txt").exists():
        raise InputError(f"{folder} holds a run of main.py that is not part of a family: {ADVICE}")
    if not path.exists() or not (folder / "model.safetensors").exists():
        return dict.fromkeys(RECORD)
    record = read_json(path)
    # records of families that were made before more was measured stay valid
    required = {"identity", "training", "device", "accuracy_before", "accuracy_after"}
    known = isinstance(record, dict) and required <= record.keys() <= set(RECORD)
    if not known or not isinstance(record["identity"], dict):
        raise InputError(f"{path} is not a record of make_family.py: {ADVICE}")
    wanted = training or {"epochs": 0}
    for old, new in ((record["identity"], identity), (record["training"] or wanted, wanted)):
        for name in new:
            if old.get(name) != new[name]:
                raise InputError(f"{folder} was made with {name} {old.get(name)}, not {new[name]}: {ADVICE}")
    incomplete = not record.keys() >= set(MEASURED)
    if incomplete or (device_name is not None and record["device"] != device_name):
        record |= dict.fromkeys(("device", *MEASURED))
    return {name: record[name] for name in RECORD}


def write_record(folder: Path, record: dict) -> None:
    with atomic_write(folder / "family.json") as unfinished:
        Path(unfinished).write_text(json.dumps(record, indent=2) + "\n")
