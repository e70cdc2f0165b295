"""What the user got wrong: one sentence, exit status 2, no traceback, said once by all processes together.

Every case is a command line, run in one process, in two, or in both ways. The traps among the files are checkpoints
that would run code if they were unpickled.
"""

import pickle
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import models
import options
from datasets import DATA_SETS
from models.baselines import BASELINES
from models.learngene import PARTS, to_published
from models.lets import DEPTH_SCHEMES, WIDTH_SCHEMES
from models.selection import WIDTH_SELECTIONS

import pytest
import torch
from conftest import MAIN, Outcome, Run, run_main, run_many
from error_cases import AS_USERS, CASES, FIXTURES, NO_ERRORS, RUNS
from PIL import Image

# What an earlier run has left, which none of these runs may touch.
EARLIER = ("checkpoint.pth", "learngene.safetensors", "model.safetensors", "config.json", "log.txt", "args.yaml")


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def make_classes(folder: Path, **images: int) -> None:
    """One folder per class with as many images as asked for."""
    for name, count in images.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8)).save(folder / name / f"{i}.png")


def make_files(files: Path) -> None:
    """The files that the command lines of `CASES` name."""
    (files / "text.txt").write_text("good morning\n")
    (files / "key.yaml").write_text("batch-size: 8\nwarmup_epoch: 3\n")
    (files / "number.yaml").write_text("epochs: many\n")
    (files / "flag.yaml").write_text("pin_mem: 3\n")
    (files / "list.yaml").write_text("lr: [1, 2]\n")
    (files / "broken.yaml").write_text("epochs: [1\nlr: 2\n")
    (files / "code.yaml").write_text(f"epochs: !!python/object/apply:builtins.open ['{files / 'marker'}', w]\n")
    (files / "alias.yaml").write_text("lr: &rate 1e-3\nmin-lr: *rate\n")

    trees = {
        "good": (dict(ant=1, bat=1), dict(ant=1, bat=1)),
        "differ": (dict(ant=1, bat=1), dict(ant=1, bat=1, cow=1)),
        "renamed": (dict(ant=1, cow=1), dict(ant=1, dog=1)),
        "empty-train": (dict(ant=1, bat=0), dict(ant=1, bat=1)),
        "empty-val": (dict(ant=1, bat=1), dict(ant=1, bat=0)),
        "no-val": (dict(ant=1, bat=1), {}),
    }
    for name, (train, val) in trees.items():
        make_classes(files / name / "train", **train)
        make_classes(files / name / "val", **val)

    lets = models.create_aux_net("deit_nano_patch8_32_L4_H1", "deit_nano_patch8_32_L8_H2", num_classes=10)
    models.Learngene.of(lets).save(files / "lets.safetensors")
    tleg = models.create_model("aux_deit_nano_patch8_32", num_classes=10)
    models.Learngene.of(tleg).save(files / "tleg.safetensors")
    own = (files / "lets.safetensors").read_bytes()
    (files / "cut.safetensors").write_bytes(own[: len(own) // 2])
    (files / "head.safetensors").write_bytes(own[:100])
    (files / "empty.pth").touch()
    for method in ("lets", "tleg"):
        whole = (FIXTURES / f"{method}_learngene.pth").read_bytes()
        (files / f"{method}_cut.pth").write_bytes(whole[: len(whole) // 2])
    partial = to_published(models.Learngene.of(lets))
    del partial["__sm_0_norm1_bias"]
    torch.save({"model": partial}, files / "partial.pth")
    with torch.no_grad():
        lets.E[0, 0] = torch.nan
    models.Learngene.of(lets).save(files / "nan.safetensors")

    ten = models.create_model("deit_nano_patch8_32_L2", num_classes=10).state_dict()
    torch.save({"model": ten}, files / "ten.pth")
    state = {"optimizer": 5, "lr_scheduler": 5, "scaler": 5, "epoch": 5}
    torch.save({"model": ten, "model_ema": ten, **state}, files / "state.pth")
    five = models.create_model("deit_nano_patch8_32_L2", num_classes=5)
    torch.save({"model": five.state_dict()}, files / "five.pth")
    deeper = models.create_model("deit_nano_patch8_32_L3", num_classes=10)
    torch.save({"model": deeper.state_dict()}, files / "deeper.pth")
    torch.save([1, 2], files / "list.pth")
    torch.save({"epoch": 3}, files / "epoch.pth")
    torch.save({"model": 3}, files / "number.pth")

    trap = {"model": ten, "args": Trap(files / "marker")}
    torch.save(trap, files / "trap.pth")
    torch.save(trap, files / "trap.safetensors")
    torch.save(trap, files / "trap.tar", _use_new_zipfile_serialization=False)
    (files / "trap.pkl").write_bytes(pickle.dumps(trap))


def content_of(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below, and what is in it."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


class Results(NamedTuple):
    """All runs; each wrote, or tried to, to a folder of its own in ``output``."""

    of: dict[str, Outcome]  # by name and number of processes
    as_users: dict[str, Outcome]
    files: Path
    before: dict[str, bytes | None]
    output: Path


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Run the cases that the selected tests look at."""
    calls = [
        item.callspec.params
        for item in request.session.items
        if item.fspath == request.fspath and hasattr(item, "callspec")
    ]
    selected = [(call["name"], call["processes"]) for call in calls if "processes" in call]
    started = [call["name"] for call in calls if call["name"] in AS_USERS and "processes" not in call]
    tmp = tmp_path_factory.mktemp("errors")
    files, output = tmp / "files", tmp / "output"
    files.mkdir()
    make_files(files)
    before = content_of(files)

    def command(args: str, folder: str) -> list[str]:
        (output / folder).mkdir(parents=True)
        for file in EARLIER:
            (output / folder / file).write_text(file)
        case = shlex.split(args.replace("FIXTURES", str(FIXTURES)).replace("FILES", str(files)))
        return ["--device", "cpu", "--output-dir", str(output / folder), *case]

    def start(name: str) -> Outcome:
        done = run_main(*command(CASES[name].args, f"{name}_as_users"), **AS_USERS[name])
        return Outcome([done.returncode], done.stdout, done.stderr)

    runs = {f"{name} {n}": Run(command(CASES[name].args, f"{name}_{n}"), n) for name, n in selected}
    runs |= {name: Run(shlex.split(args)) for name, args in NO_ERRORS.items()}
    done = run_many(runs, tmp / "printed")
    with ThreadPoolExecutor(2) as pool:
        as_users = dict(zip(started, pool.map(start, started), strict=True))
    return Results(done, as_users, files, before, output)


def check_message(name: str, stderr: str) -> None:
    """One line, with everything that the case expects in it."""
    assert "Traceback" not in stderr, stderr
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    missing = [part for part in CASES[name].expected if part not in lines[0]]
    assert not missing, lines[0]


FIRST = ("option", "gene_code", "yaml_key", "resume_classes", "output")  # in two processes


@pytest.mark.parametrize(
    ("name", "processes"),
    [pytest.param(*run, marks=() if run[1] == 1 or run[0] in FIRST else pytest.mark.full) for run in RUNS],
)
def test_message(name: str, processes: int, results: Results):
    codes, stdout, stderr = results.of[f"{name} {processes}"]
    check_message(name, stderr)
    assert codes == [2] * processes
    assert "Traceback" not in stdout


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if case else ()) for name, case in AS_USERS.items()]
)
def test_as_users_start_it(name: str, results: Results):
    (code,), stdout, stderr = results.as_users[name]
    if "processes" in AS_USERS[name]:  # the launcher, which ended by itself, has its own status and report
        assert code != 0
        assert f'File "{MAIN}"' not in stderr
        stderr = "\n".join(line for line in (stdout + stderr).splitlines() if line.startswith("error: "))
    else:
        assert code == 2
    check_message(name, stderr)


def test_nothing_is_damaged(results: Results):
    for folder in results.output.iterdir():
        assert content_of(folder) == {file: file.encode() for file in EARLIER}, folder
    assert content_of(results.files) == results.before  # no trap has made its file


def test_trap_would_run_code(tmp_path: Path):
    torch.save({"args": Trap(tmp_path / "marker")}, tmp_path / "trap.pth")
    torch.load(tmp_path / "trap.pth", weights_only=False)["args"].close()
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", NO_ERRORS)
def test_no_error(name: str, results: Results):
    assert results.of[name].codes == [0], results.of[name].stderr
    assert results.of[name].stderr == ""


def test_the_words_of_the_options_are_those_of_the_program():
    for words, known in {
        options.DATA_SETS: DATA_SETS,
        options.WIDTH_SELECTIONS: WIDTH_SELECTIONS,
        options.PARTS: PARTS,
        options.BASELINES: BASELINES,
        options.DEPTH_SCHEMES: DEPTH_SCHEMES,
        options.WIDTH_SCHEMES: WIDTH_SCHEMES,
    }.items():
        assert sorted(words) == sorted(known)


def test_help_needs_nothing_that_takes_long_to_import():
    script = "import sys, main; code = main.main(['--help']); sys.exit(code or any(m in sys.modules for m in HEAVY))"
    command = [sys.executable, "-c", f"HEAVY = {{'torch', 'timm', 'numpy'}}; {script}"]
    done = subprocess.run(command, cwd=MAIN.parent, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--load-gene" in done.stdout
