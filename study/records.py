"""The record that a study keeps of each run, ``run.json``, and the result that it reads from the files of the run."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from common.errors import InputError
from common.files import atomic_write, sha256
from study.plan import NOT_THE_RESULT, WEIGHTS, Run

from safetensors import safe_open

RECORD = "run.json"


@dataclass
class Record:
    """The content of ``run.json`` in the folder of a run; ``result`` is None until the run is done.

    Attributes:
        identity: the options that the result depends on.
        made_from: reference → SHA-256 of the weights of that run.
        former: SHA-256 of the weights of former trainings, which were not kept, and from which others were made.
    """

    identity: dict
    lr: float | None
    made_from: dict[str, str]
    seconds: float = 0
    device: str = ""
    result: dict | None = None
    former: list[str] = field(default_factory=list)

    @property
    def tuned_on(self) -> float:
        """What a learning rate is chosen by: the accuracy, of a family the mean of its largest and smallest member."""
        ends = self.result["accuracy"], self.result.get("smallest")
        return mean(accuracy for accuracy in ends if accuracy is not None)

    @property
    def trainings(self) -> list[str]:
        """SHA-256 of the weights of every training of this run."""
        return [*self.former, self.result["sha256"]]

    def anew(self) -> "Record":
        """The record of a finished run that has to be done again, before it starts."""
        return Record(self.identity, self.lr, {}, former=self.trainings)

    @property
    def text(self) -> str:
        return json.dumps(vars(self), indent=1) + "\n"

    def write(self, folder: Path) -> None:
        with atomic_write(folder / RECORD) as unfinished:
            Path(unfinished).write_text(self.text)


def read_record(path: Path) -> Record | None:
    """The record of a run, or None if the run was not begun.

    Raises:
        InputError: the file holds something else.
    """
    return record_of(path.read_bytes(), path) if path.exists() else None


def record_of(content: bytes, path: Path) -> Record:
    """The record in the ``content`` of a file.

    Raises:
        InputError: it is something else; the message names ``path``.
    """
    try:
        return Record(**json.loads(content))
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} is no record of a run: remove its folder to run it again") from error


def differences(run: Run, record: Record, lr: float | None) -> str | None:
    """The first option that a run was begun with and would not be begun with now, in words; None if there is none.

    Args:
        lr: its learning rate now; None if that is not known yet.
    """
    asked = json.loads(json.dumps(run.identity)) | ({} if lr is None else {"lr": lr})
    found = {name: value for name, value in record.identity.items() if name not in NOT_THE_RESULT}
    found |= {} if lr is None else {"lr": record.lr}
    for name in [*asked, *found]:
        if asked.get(name) != found.get(name):
            return f"{name} {found.get(name, 'nothing')}, not {asked.get(name, 'nothing')}"
    return None


def result_of(folder: Path) -> dict:
    """Accuracies, numbers of parameters and SHA-256 of the weights of a finished run of main.py."""
    log = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    weights = next(folder / name for name in WEIGHTS if (folder / name).exists())
    with safe_open(weights, framework="pt") as file:
        stored = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return {
        "accuracy": log[-1]["test_acc1"],
        "smallest": log[-1].get("smallest_test_acc1"),
        "before": log[0]["test_acc1"] if log[0]["epoch"] == -1 else None,
        "parameters": log[-1]["n_parameters"],
        "stored": stored,
        "sha256": sha256(weights),
    }


def not_finite(folder: Path) -> str | None:
    """The message of main.py if a loss or weight that was not finite has ended the run."""
    return next((line for line in last_printed(folder, 3) if line.startswith("error: ") and "finite" in line), None)


def last_printed(folder: Path, lines: int) -> list[str]:
    """The last lines of the output of a run."""
    output = folder / "output.txt"
    return output.read_text(errors="replace").splitlines()[-lines:] if output.exists() else []
