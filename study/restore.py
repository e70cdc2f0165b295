"""Continue a study where its archives end, on a machine that has its results alone.

Of a finished run, ``results/NAME`` has the record and the logs, and the weights as long as other runs wait for them and
there is room (`study.kept`). Where such weights are not there, the run is done again, with the same options and seed.
What was made from the first training stays: the record has the SHA-256 of both.
"""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import InputError
from study.archive import ARCHIVE, WEIGHTS_ARCHIVE, read_files
from study.plan import FOLDERS, WEIGHTS, Run, Study
from study.records import RECORD, Record, differences, record_of

OPTIONS = "args.yaml"
LOGS = ("log.txt", OPTIONS)  # of each run, which results keep beside its record
WITH_WEIGHTS = (*WEIGHTS, "config.json")  # files that other runs load


@dataclass(frozen=True)
class Kept:
    """A run in the archives: its record, without a result if it has to be done again, and its files by their names."""

    record: Record
    files: dict[str, bytes]

    @property
    def has_weights(self) -> bool:
        return any(name in self.files for name in WEIGHTS)


def kept_runs(study: Study, root: Path, results: Path) -> dict[Run, Kept]:
    """The runs of the archives in ``results`` that the study continues from.

    None where ``root``, the folder that the runs write to, has runs already: who removes one of them wants another.

    Raises:
        InputError: an archive is damaged, or has a run with other options than the study.
    """
    path = results / ARCHIVE
    if not path.exists() or any((root / top).exists() for top in FOLDERS):
        return {}
    files, kept = read_files(path), {}
    if (results / WEIGHTS_ARCHIVE).exists():
        files |= read_files(results / WEIGHTS_ARCHIVE)
    for run in study.all_runs:
        text = files.get(f"{run.folder}/{RECORD}")
        if text is None:
            continue
        record = record_of(text, path)
        if (found := differences(run, record, run.lr)) is not None:
            raise InputError(f"{path} holds {run} with {found}: move this file away to begin the study anew")
        names = (name for name in (RECORD, *LOGS, *WITH_WEIGHTS) if f"{run.folder}/{name}" in files)
        kept[run] = Kept(record, {name: files[f"{run.folder}/{name}"] for name in names})
        check_weights(run, kept[run], results / WEIGHTS_ARCHIVE)
    return with_lost(kept, study)


def check_weights(run: Run, kept: Kept, path: Path) -> None:
    """Raises InputError where the weights of a run are not those of its record."""
    weights = next((kept.files[name] for name in WEIGHTS if name in kept.files), None)
    if weights is not None and hashlib.sha256(weights).hexdigest() != kept.record.result["sha256"]:
        raise InputError(f"{path} holds other weights of {run} than its record says: restore both archives")


def with_lost(kept: Mapping[Run, Kept], study: Study) -> dict[Run, Kept]:
    """``kept``, where a run has to be done again if one that is to be done needs its weights and they are not there."""
    kept = dict(kept)
    while True:
        to_do = [run for run in study.all_runs if run not in kept or kept[run].record.result is None]
        needed = {needed for run in to_do for needed in run.needs.values()}
        lost = [run for run in needed & kept.keys() if kept[run].record.result and not kept[run].has_weights]
        if not lost:
            return kept
        for run in lost:
            record = kept[run].record.anew()
            kept[run] = Kept(record, {RECORD: record.text.encode()})


def restore(kept: Mapping[Run, Kept], root: Path) -> None:
    """Write the files of these runs to their folders in ``root``, which appear together."""
    unfinished = root / ".restored"
    shutil.rmtree(unfinished, ignore_errors=True)
    for run, of_run in kept.items():
        (unfinished / run.folder).mkdir(parents=True)
        for name, content in of_run.files.items():
            (unfinished / run.folder / name).write_bytes(content)
    for top in FOLDERS:
        if (unfinished / top).exists():
            (unfinished / top).rename(root / top)
