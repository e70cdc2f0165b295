"""``family.json``: what is done for a member, so that the same command resumes where it was stopped."""

import json
from pathlib import Path

from common.errors import InputError
from common.files import atomic_write, read_json

RECORD = ("identity", "training", "device", "latency_ms_1", "latency_ms_64", "accuracy_before", "accuracy_after")
ADVICE = "choose another --output-dir, or remove the folder"


def read_record(folder: Path, identity: dict, training: dict | None, device_name: str | None) -> dict:
    """The record of a member; all values are None where there is no record, or the model is missing.

    Args:
        identity: see `family.plan.Family`, as is ``training``.
        device_name: where latencies are measured; those of another device are dropped. None keeps them.

    Raises:
        InputError: the folder holds a model that was made with other options.
    """
    path = folder / "family.json"
    if not path.exists() and (folder / "log.txt").exists():
        raise InputError(f"{folder} holds a run of main.py that is not part of a family: {ADVICE}")
    if not path.exists() or not (folder / "model.safetensors").exists():
        return dict.fromkeys(RECORD)
    record = read_json(path)
    if not isinstance(record, dict) or record.keys() != set(RECORD) or not isinstance(record["identity"], dict):
        raise InputError(f"{path} is not a record of make_family.py: {ADVICE}")
    wanted = training or {"epochs": 0}
    for old, new in ((record["identity"], identity), (record["training"] or wanted, wanted)):
        for name in new:
            if old.get(name) != new[name]:
                raise InputError(f"{folder} was made with {name} {old.get(name)}, not {new[name]}: {ADVICE}")
    if device_name is not None and record["device"] != device_name:
        record |= dict.fromkeys(("device", "latency_ms_1", "latency_ms_64"))
    return record


def write_record(folder: Path, record: dict) -> None:
    with atomic_write(folder / "family.json") as unfinished:
        Path(unfinished).write_text(json.dumps(record, indent=2) + "\n")
