"""The learngenes of this repository: found by their names, small, and as accurate as their page says."""

import csv
import re
from pathlib import Path

import models
from models.listed import LIST, read_list
from scripts import convert_learngene, make_family

import pytest
import torch
from conftest import Run, run_many
from safetensors import safe_open
from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "learngenes"
FMNIST = Path("/usr/share/datasets/fashion-mnist")
MOST_BYTES = 2_000_000
SIZES = [f"L{depth}-H{heads}" for heads in (1, 2) for depth in (1, 2, 3, 4)]
HERE = [name for name, entry in read_list(LIST).items() if entry.is_here]


def page() -> dict[str, list[str]]:
    """Of each learngene on the page, its bytes and the accuracy of each size."""
    text = (FOLDER / "README.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| (.+) \|$", text, re.MULTILINE)
    return {name: cells.split(" | ") for name, cells in rows}


def test_all_are_listed_and_on_the_page():
    files = {path.stem: path.stat().st_size for path in FOLDER.glob("*.safetensors")}
    assert sorted(files) == sorted(HERE) == sorted(page())
    assert sum(files.values()) <= MOST_BYTES
    for name, size in files.items():
        assert page()[name][0] == f"{size:,}"
        assert models.load_learngene(name).method == name.split("-")[1]


@pytest.mark.parametrize("data_set", ["DIGITS", pytest.param("FMNIST", marks=pytest.mark.full)])
def test_accuracies_are_those_of_the_page(data_set: str, tmp_path: Path):
    """To a few images: other machines round differently."""
    if data_set == "FMNIST" and not FMNIST.is_dir():
        pytest.skip("Fashion-MNIST is not installed")
    names = [name for name in HERE if name.startswith(data_set.lower())]
    options = ["--depths=1-4", "--heads=1,2", f"--data-set={data_set}", f"--output-dir={tmp_path}"]
    options += [f"--data-path={FMNIST}"] if data_set == "FMNIST" else []
    assert make_family.main(["--load-gene", *names, *options, "--", "--num-workers=0", "--device=cpu"]) == 0
    with open(tmp_path / "family.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(r["learngene"], f"L{r['depth']}-H{r['heads']}"): float(r["accuracy_before"]) for r in rows}
    for name in names:
        said = dict(zip(SIZES, page()[name][1:], strict=True))
        assert {size for size in SIZES if said[size] == "–"} <= {
            size for size in SIZES if "H1" in size and "tleg" in name
        }
        for size, accuracy in said.items():
            assert accuracy == "–" or found[name, size] == pytest.approx(float(accuracy), abs=1), (name, size)


def test_main_takes_a_name(tmp_path: Path):
    stage_2 = ["--des-arch=@L2-H1", "--data-set=DIGITS", "--epochs=0", "--num-workers=0", "--no-model-ema"]
    runs = {
        "named": Run([*stage_2, "--load-gene=digits-elastic", f"--output-dir={tmp_path / 'named'}"]),
        "nearly": Run([*stage_2, "--load-gene=digits-elastik"]),
        "elsewhere": Run([*stage_2, "--load-gene=tleg"], processes=2),
    }
    outcomes = run_many(runs, tmp_path / "runs")
    assert outcomes["named"].codes == [0], outcomes["named"].stderr
    weights = load_file(tmp_path / "named/model.safetensors")
    expected = models.load_learngene("digits-elastic").descend("@L2-H1").state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert outcomes["nearly"].codes == [2]
    assert outcomes["nearly"].stderr.startswith(
        "error: --load-gene: digits-elastik is no file, and no name of scripts/"
    )
    assert "; the nearest names are digits-elastic" in outcomes["nearly"].stderr
    assert outcomes["elsewhere"].codes == [2, 2]
    assert outcomes["elsewhere"].stderr.count("error:") == 1
    assert "scripts/download_learngenes.py tleg" in outcomes["elsewhere"].stderr


def test_a_file_of_that_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    models.load_learngene("digits-tleg").save("digits-lets")
    assert models.load_learngene("digits-lets").method == "tleg"


def test_half_precision_is_half_as_large_and_refuses_what_it_cannot_hold(tmp_path: Path, capsys: pytest.CaptureFixture):
    gene = models.load_learngene("digits-tleg")
    gene.save(tmp_path / "whole.safetensors")
    source, half = str(tmp_path / "whole.safetensors"), tmp_path / "half.safetensors"
    assert convert_learngene.main([source, str(half), "--half"]) == 0
    assert half.stat().st_size < 0.55 * Path(source).stat().st_size
    with safe_open(half, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    again = models.load_learngene(half).tensors
    assert all(torch.equal(again[name], tensor) for name, tensor in gene.tensors.items())  # it was half before

    name = next(iter(gene.tensors))
    gene.tensors[name] = gene.tensors[name] + 1e5
    gene.save(source)
    capsys.readouterr()
    assert convert_learngene.main([source, str(tmp_path / "new.safetensors"), "--half"]) == 2
    assert f"{name} has a value that is too large for torch.float16" in capsys.readouterr().err
    assert not (tmp_path / "new.safetensors").exists()
    assert convert_learngene.main([source, str(tmp_path / "new.pth"), "--half"]) == 2
    assert "--half is for .safetensors" in capsys.readouterr().err
