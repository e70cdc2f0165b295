"""A family of several learngenes; its page in a headless browser, without a network: axes, limits and recipes."""

import csv
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import models
from family.plan import names_of
from models.formats.timm_folder import read_model
from scripts import make_family

import browser
import numpy as np
import pytest
import torch
from browser import Page
from conftest import ENVIRONMENT, MAIN, SECONDS
from PIL import Image

GRID = ["--depths", "1,4", "--heads", "1,3", "--data-set", "DIGITS"]
MAIN_OPTIONS = ["--", "--num-workers", "0", "--device", "cpu"]
AXES = ["parameters", "MACs", "latency", "throughput", "memory, 1 image", "memory, 64 images"]
PARAMETERS, LATENCY, THROUGHPUT = (AXES.index(name) for name in ("parameters", "latency", "throughput"))
END, HOME, LEFT = ("End", 35), ("Home", 36), ("ArrowLeft", 37)  # keys, with their codes
COLOURS = ("0b6e99", "5a8f29", "c4572e")  # of two learngenes and of the Pareto front
NAMES = ["grown_b_img_src_x_onerror_alert_1_", "tleg"]


def amount_of(colour: str, pixels: np.ndarray) -> int:
    """How many pixels of a picture (height, width, 3) have nearly a colour in hexadecimal."""
    return (abs(pixels - np.array([*bytes.fromhex(colour)])).max(-1) < 8).sum()


@pytest.fixture(scope="module")
def genes(tmp_path_factory) -> list[Path]:
    """A LeTs and a TLEG learngene of random weights; the name of one would be an element of HTML."""
    folder = tmp_path_factory.mktemp("genes")
    torch.manual_seed(0)
    lets = models.create_aux_net("deit_nano_patch8_16_L2_H1", "deit_nano_patch8_16_L4_H3", num_classes=10)
    tleg = models.create_model("aux_deit_nano_patch8_16_L4_H3", num_classes=10)
    paths = [folder / "grown<b>&'<img src=x onerror=alert(1)>.safetensors", folder / "tleg" / "learngene.safetensors"]
    paths[1].parent.mkdir()
    for aux_net, path in zip((lets, tleg), paths, strict=True):
        models.Learngene.of(aux_net, {"epochs": 1, "data_set": "DIGITS"}).save(path)
    return paths


def make(genes: list[Path], out: Path) -> int:
    return make_family.main(["--load-gene", *map(str, genes), *GRID, "--output-dir", str(out), *MAIN_OPTIONS])


@pytest.fixture(scope="module")
def family(genes, tmp_path_factory) -> Path:
    """The family of both, with made-up numbers: larger is better and faster, and TLEG better by a point."""
    out = tmp_path_factory.mktemp("family")
    assert make(genes, out) == 0
    for i, name in enumerate(NAMES):
        for folder in (out / name).iterdir():
            record = json.loads((folder / "family.json").read_text())
            depth, heads = int(folder.name[1]), int(folder.name[-1])
            record["accuracy_before"] = 50.0 + 2 * depth + 10 * heads + i
            numbers = {"latency_ms_1": 10 / depth / heads, "images_per_s_64": 2000 / depth}
            for quantity, value in numbers.items():
                record |= {quantity: value, f"{quantity}_low": 0.9 * value, f"{quantity}_high": 1.2 * value}
            (folder / "family.json").write_text(json.dumps(record))
    assert make(genes, out) == 0
    return out


@pytest.fixture(scope="module")
def rows(family) -> dict[str, dict[str, str]]:
    """The rows of family.csv, by the titles of the page."""
    with (family / "family.csv").open(newline="") as file:
        return {f"{row['learngene']} L{row['depth']}-H{row['heads']}": row for row in csv.DictReader(file)}


# ---------------------------------------------------------------------------------------------------------------------
# Several learngenes
# ---------------------------------------------------------------------------------------------------------------------


def test_several_learngenes_are_compared(genes, family, rows):
    sizes = [f"L{depth}-H{heads}" for heads in (1, 3) for depth in (1, 4)]
    assert [*rows] == [f"{name} {size}" for name in NAMES for size in sizes]
    assert {path.name for path in family.iterdir() if path.is_dir()} == {*NAMES}
    for name, path in zip(NAMES, genes, strict=True):
        gene = models.load_learngene(path)
        for size in sizes:
            vit, _ = read_model(family / name / size)
            expected = gene.descend(f"@{size}").state_dict()
            assert all(torch.equal(tensor, expected[key]) for key, tensor in vit.state_dict().items())
            assert int(rows[f"{name} {size}"]["stored_parameters"]) == gene.num_params
    lines = (family / "family.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("## ")] == [f"## {name}" for name in NAMES]
    assert [line.split(" | ")[0] for line in lines[2:10]] == [f"| {title}" for title in rows]
    with Image.open(family / "family.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert all(amount_of(colour, pixels) > 100 for colour in COLOURS)


def test_a_learngene_that_is_given_twice_is_refused(genes, tmp_path, capsys):
    assert make([*genes, genes[0]], tmp_path) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: --load-gene {genes[0]} is given twice")
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["output/LeTs/learngene.safetensors"], ["LeTs"]),
        (["a/one/learngene.safetensors", "a/two/learngene_ema.safetensors"], ["one", "two"]),
        (["a/run/learngene.safetensors", "b/run/learngene.safetensors"], ["a-run", "b-run"]),
        (["tleg v1.5.pth", "hf-hub:owner/name@main", "https://host/x/y.pth#sha256=0"], ["tleg_v1.5", "name_main", "y"]),
        (["../<b>/$x\udcff.pth", "folder/"], ["_x_", "folder"]),
    ],
)
def test_names_of_learngenes(sources, names):
    assert names_of(sources) == names


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> Iterator[Page]:
    program = browser.find()
    if program is None:
        pytest.skip(f"no browser: found none of {', '.join(browser.NAMES)}")
    with browser.browsing(program, tmp_path_factory.mktemp("browser") / "profile") as page:
        yield page


@pytest.fixture
def page(opened, family) -> Iterator[Page]:
    """The page, newly opened; at the end no script has failed, and nothing but the file was asked for."""
    opened.requests.clear()
    opened.open(family / "family.html")
    yield opened
    assert opened.problems == []
    outside = [address for address in opened.requests if not address.startswith("data:")]  # an image of plotly's own
    assert outside == [(family / "family.html").as_uri()]


def text(page: Page, element: str) -> str:
    return page.value(f"document.getElementById('{element}').textContent")


def shown(page: Page) -> list[dict]:
    """The traces: x, y, name."""
    return page.value("document.getElementById('plot').data.map(({x, y, name}) => ({x, y, name}))")


def slide(page: Page, axis: int, *keys: tuple[str, int]) -> str:
    """Move the slider of a limit by keys; what is written beside it."""
    page.value(f"document.querySelectorAll('.limit input')[{axis}].focus()")
    for key in keys:
        page.press(*key)
    return page.value(f"document.querySelectorAll('.limit output')[{axis}].value")


def test_it_opens_with_the_best_of_all(page, rows, tmp_path):
    assert page.value("document.title") == f"Des-Nets of {', '.join(NAMES)}, test images of DIGITS"
    assert text(page, "best") == "tleg L4-H3"
    assert "accuracy, untrained89.00 %" in text(page, "numbers")
    assert f"parameters{int(rows['tleg L4-H3']['parameters']):,}" in text(page, "numbers")
    assert [trace["name"] for trace in shown(page)] == [*NAMES, "Pareto front", "best that fits"]
    page.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert all(amount_of(colour, pixels) > 100 for colour in COLOURS)


@pytest.mark.parametrize("number", range(len(AXES)))
def test_axes_are_chosen_by_a_click(page, rows, number):
    page.click(f"document.querySelectorAll('[name=axis]')[{number}]")
    column, unit = [
        ("parameters", 1), ("macs", 1), ("latency_ms_1", 1), ("images_per_s_64", 1), ("memory_bytes_1", 1e-6),
        ("memory_bytes_64", 1e-6),
    ][number]  # fmt: skip
    *learngenes, front, best = shown(page)
    values = {name: unit * float(row[column]) for name, row in rows.items()}
    accuracies = {name: float(row["accuracy_before"]) for name, row in rows.items()}
    for name, trace in zip(NAMES, learngenes, strict=True):
        assert trace["x"] == pytest.approx([value for title, value in values.items() if title.startswith(name)])
        assert trace["y"] == [value for title, value in accuracies.items() if title.startswith(name)]
    sign = -1 if number == THROUGHPUT else 1
    undominated = [
        name
        for name in rows
        if not any(
            accuracies[other] >= accuracies[name]
            and sign * values[other] <= sign * values[name]
            and (accuracies[other], values[other]) != (accuracies[name], values[name])
            for other in rows
        )
    ]
    assert sorted(front["x"]) == pytest.approx(sorted(values[name] for name in undominated))
    assert front["y"] == sorted(front["y"])
    assert best["x"] == pytest.approx([values["tleg L4-H3"]])


def test_limits_change_the_best(page, rows):
    sizes = sorted({int(row["parameters"]) for row in rows.values()})
    assert slide(page, PARAMETERS, LEFT) == f"≤ {sizes[-2]:,}"
    assert text(page, "best") == "tleg L1-H3"
    assert slide(page, PARAMETERS, HOME) == f"≤ {sizes[0]:,}"
    assert text(page, "best") == "tleg L1-H1"
    assert shown(page)[-1]["y"] == [63.0]

    assert slide(page, PARAMETERS, END) == "any"
    assert text(page, "best") == "tleg L4-H3"
    assert slide(page, THROUGHPUT, HOME) == "≥ 2,000"
    assert text(page, "best") == "tleg L1-H3"


def test_limits_that_nothing_fits(page):
    slide(page, PARAMETERS, HOME)  # the smallest is the slowest here
    assert slide(page, LATENCY, HOME) == "≤ 0.833 ms"
    assert text(page, "best") == "No size fits these limits"
    assert page.value("document.getElementById('recipe').hidden")
    slide(page, PARAMETERS, END)
    assert text(page, "best") == "tleg L4-H3"


def test_a_hidden_learngene_is_not_the_best(page):
    page.click("document.querySelectorAll('#plot .legendtoggle')[1]")
    page.wait_for("plot.data[1].visible === 'legendonly'")  # it could have been a double-click
    assert text(page, "best") == f"{NAMES[0]} L4-H3"


def test_pointing_at_a_size_shows_its_numbers(page, rows):
    x, y = page.middle("document.querySelectorAll('#plot .scatterlayer .trace')[1].querySelectorAll('.point')[0]")
    page.point_at(x, y)
    page.wait_for("document.querySelector('.hoverlayer .hovertext')")
    found = page.value("document.querySelector('.hoverlayer').textContent")
    assert "tleg L1-H1" in found
    assert f"parameters: {int(rows['tleg L1-H1']['parameters']):,}" in found
    assert "latency of one image: 10.0 (9.00 to 12.0) ms" in found


def test_what_makes_the_best_can_be_copied_and_makes_it(page, genes, tmp_path):
    page.click("document.querySelector('[data-copies=command]')")
    assert page.value("document.querySelector('[data-copies=command]').textContent") == "Copied"
    assert page.value("getSelection().toString()") == text(page, "command")
    command = shlex.split(text(page, "command").replace("\\\n", ""))
    assert command[:2] == ["python", "main.py"]
    done = subprocess.run(
        [sys.executable, MAIN, *command[2:]], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "output").iterdir()
    from_command, _ = read_model(folder)

    lines = text(page, "python").splitlines()
    assert len(lines) == 2
    names = {}
    exec("\n".join(lines), names)
    expected = models.load_learngene(genes[1]).descend("@L4-H3").state_dict()
    for vit in (from_command, names["vit"]):
        assert all(torch.equal(tensor, expected[key]) for key, tensor in vit.state_dict().items())


def test_nothing_is_sent_to_a_service(page):
    titles = page.value("[...document.querySelectorAll('.modebar-btn')].map((button) => button.dataset.title)")
    assert titles
    assert not [title for title in titles if "share" in title.lower() or "cloud" in title.lower()]
