"""scripts/check_device.sh --small, where nothing is installed that the program can do without, and cut off."""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

from device_check.command_line import main
from device_check.machine import describe
from device_check.processes import PRELOADED
from device_check.report import shown
from study.runner import LATE

import pytest
from conftest import ENVIRONMENT, SECONDS, TESTS

SCRIPT = TESTS.parent / "scripts" / "check_device.sh"
# what a machine has to have, as pip names it; torch and timm bring some of these
THERE = {
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "scipy",
    "scikit-learn",
    "safetensors",
    "tqdm",
    "matplotlib",
    "pillow",
}
THERE |= {"tensorboard", "pyyaml", "filelock", "huggingface_hub", "pytest", "packaging"}
# pip's name → module
MODULES = {"onnxruntime": "onnxruntime", "pytest-xdist": "xdist"}
HOOK = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {missing} else super().find_spec(name, path, target)

sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
"""


def not_needed() -> set[str]:
    """The modules of requirements.txt that a check must do without."""
    lines = (TESTS.parent / "requirements.txt").read_text().splitlines()
    names = {re.match(r"[\w.-]+", line)[0].lower() for line in lines if re.match(r"\w", line)}
    assert names & THERE
    return {MODULES.get(name, name.replace("-", "_")) for name in names - THERE} | {"gdown", "trustme", "onnx"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Mapping[str, str]:
    """One in which the modules that are not needed cannot be imported, and no plug-in of pytest is loaded."""
    folder = tmp_path_factory.mktemp("without")
    (folder / "sitecustomize.py").write_text(HOOK.format(missing=not_needed()))
    changed = {"PYTHONPATH": str(folder), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHON": sys.executable}
    imported = subprocess.run([sys.executable, "-c", "import xdist"], env=ENVIRONMENT | changed, capture_output=True)
    assert b"No module named" in imported.stderr
    return ENVIRONMENT | changed


def write_tests(folder: Path, text: str) -> Path:
    path = folder / "test_here.py"
    path.write_text(text)
    return path


def assert_same(folder: Path) -> dict:
    """The report as JSON, after a comparison with that in Markdown: every cell of every table is in a line of it."""
    report, lines = json.loads((folder / "report.json").read_text()), (folder / "report.md").read_text().splitlines()
    rows = [[*row] for part in report["parts"] for table in part["tables"] for row in map(dict.values, table["rows"])]
    cells = [re.split(r" (?<!\\)\| ", line.strip("| ")) for line in lines if line.startswith("|")]
    for row in rows:
        wanted = {shown(value) for value in row}
        assert any(wanted <= {*line, "–"} for line in cells), row
    for part in report["parts"]:
        assert any(line.endswith(f"{part['title']}: {part['state']}") for line in lines)
        assert {f"- **{problem}**" for problem in part["problems"]} <= {*lines}
        assert {f"- {note}" for note in part["notes"]} <= {*lines}
    return report


@pytest.mark.full  # half a minute of processor time
def test_a_small_check(tmp_path, environment):
    tests = write_tests(tmp_path, "import pytest\ndef test_good(): pass\n@pytest.mark.full\ndef test_long(): pass\n")
    command = [SCRIPT, "--small", "--device", "cpu", "--out", tmp_path / "out", "--minutes", "30", "--tests", tests]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "out" / "report.md").read_text()
    report = assert_same(tmp_path / "out")
    assert report["status"] == 0
    right, fast, holds = report["parts"]
    assert [part["state"] for part in report["parts"]] == ["all right"] * 3
    (table,) = right["tables"]
    assert [(row["file"], row["passed"], row["failed"]) for row in table["rows"]] == [("test_here.py", 1, 0)]
    titles = [table["title"] for table in fast["tables"]]
    assert len(titles) == 9, fast["notes"]
    steps = next(table["rows"] for table in fast["tables"] if table["title"] == "Stage 1 of LeTs")
    assert [row["network"] for row in steps] == ["LeTs", "plain ViT"]
    assert all(row["images/s"] == pytest.approx(1000 * row["batch"] / row["ms per step"]) for row in steps)
    assert all(row["% of the matrix product"] > 0 for row in steps)
    runs, accuracies, progress = holds["tables"]
    assert {row["group"] for row in runs["rows"]} == {"scratch", "elastic stage 1", "elastic"}
    assert [(row["method"], row["epochs"]) for row in accuracies["rows"]] == [("elastic", 0), ("scratch", 1)]
    assert [row["missing"] for row in progress["rows"]] == [0, 0, 0]
    assert {"device", "torch", "commit", "seconds", "command"} <= report["head"].keys()
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["logs.tar.gz", "report.json", "report.md", "study.tar.0"]
    with tarfile.open(tmp_path / "out" / "study.tar.0") as tar:
        assert {"small/runs.tar.gz", "small/results.csv", "small/study.yaml"} <= {*tar.getnames()}


def test_a_failed_test_and_a_check_that_is_cut_off(tmp_path):
    tests = write_tests(
        tmp_path, "def test_bad():\n    assert 1 + 1 == 3, 'arithmetic'\ndef test_last():\n    import os; os.abort()\n"
    )
    out = tmp_path / "out"
    command = [SCRIPT, "--small", "--device", "cpu", "--out", out, "--tests", tests]
    with subprocess.Popen(command, env=ENVIRONMENT | {"PYTHON": sys.executable}, stdout=subprocess.PIPE) as process:
        for line in process.stdout:
            if line.startswith(b"Fast"):
                break
        os.kill(process.pid, signal.SIGKILL)
    report = assert_same(out)
    assert report["status"] == 1
    right, fast, holds = report["parts"]
    assert (right["state"], fast["state"], holds["state"]) == ("not all right", "not finished", "not finished")
    failed, ended = right["problems"]
    assert failed == "test_here.py: test_bad failed"
    assert ended == "test_here.py failed with status -6 after 1 of 2 tests in test_last"
    assert "AssertionError: arithmetic" in right["outputs"]["test_here.py: test_bad"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tests", "nowhere"], "--tests nowhere: found no such test files"),
        (["--part", "right"], "unrecognized arguments: --part right"),
        (["--minutes", "0"], "argument --minutes: 0 is not above 0"),
    ],
)
def test_wrong_arguments(tmp_path, capsys, options, message):
    assert main(["--out", str(tmp_path / "out"), *options]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert not (tmp_path / "out").exists()


def test_a_device_or_data_that_are_not_there(tmp_path):
    for device, data_path, message in (
        ("tpu", None, "no such kind of device"),
        ("cpu", tmp_path, "t10k-images-idx3-ubyte"),
    ):
        describe(device, data_path, tmp_path / "found.json")
        assert message in json.loads((tmp_path / "found.json").read_text())["error"]


def test_servers_do_not_ask_for_a_device_before_they_fork():
    """CUDA cannot be used in a fork of a process that has used it; torch refuses even after it has counted devices."""
    program = """
import torch
def asked(*args): raise AssertionError("asked for a device")
for place in (torch.cuda, torch.accelerator, torch.xpu):
    for name in ("is_available", "device_count", "_lazy_init", "init"):
        if hasattr(place, name):
            setattr(place, name, asked)
import {modules}
""".format(modules=", ".join({*PRELOADED, "training.launch", "study.runner", "scripts.study", *LATE}))
    done = subprocess.run([sys.executable, "-c", program], cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
