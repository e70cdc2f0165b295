"""scripts/study_report.py: its answers and tables are worked out by hand here, from a small study of two sizes."""

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

from models.registry import METHODS
from study.archive import ARCHIVE
from study.kept import COLUMNS
from study.report import main, write

import pytest
import yaml
from conftest import ENVIRONMENT, SECONDS, TESTS
from markdown_tables import cells

RESULTS = TESTS.parent / "results"
SCRIPT = TESTS.parent / "scripts" / "study_report.py"
PARAMETERS = {"small": 10_000, "large": 30_000}
MACS = {"small": 100, "large": 300}  # of one epoch
REPORT = {
    "learngenes": ["LeTs", "LeTs+"],
    "scratch": "scratch",
    "linear": "TLEG",
    "baselines": ["frugal", "wasteful"],
    "ablations": ["LeTs", "LeTs without teacher"],
    "widths": ["LeTs", "LeTs, l1_top"],
    "first": "A",
    "second": "B",
}
STUDY = {
    "study": "tiny",
    "sizes": {"small": "deit_nano_patch7_28_L3_H1", "large": "deit_nano_patch7_28_L3_H3"},
    "seeds": [0, 1],
    "data": {"A": {}, "B": {}},
    "runs": {
        "LeTs": {"kind": "vit", "data": "A", "epochs": [0, 1]},
        "LeTs+": {"kind": "vit", "data": "A", "epochs": [0, 1]},
        "TLEG": {"kind": "vit", "data": "A", "sizes": ["large"], "epochs": [0]},
        "scratch": {"kind": "vit", "data": "A", "epochs": [1, 10, 100]},
        "frugal": {"kind": "vit", "data": "A", "epochs": [0]},
        "wasteful": {"kind": "vit", "data": "A", "epochs": [0], "seeds": [0]},
        "LeTs without teacher": {"kind": "vit", "data": "A", "sizes": ["large"], "epochs": [0]},
        "LeTs, l1_top": {"kind": "vit", "data": "A", "epochs": [0]},
        "LeTs on B": {"kind": "vit", "method": "LeTs", "data": "B", "epochs": [1, 10]},
        "LeTs+ on B": {"kind": "vit", "method": "LeTs+", "data": "B", "epochs": [10]},
        "scratch on B": {"kind": "vit", "method": "scratch", "data": "B", "epochs": [300]},
    },
    "report": REPORT,
}
STORED = {"LeTs": 4000, "LeTs+": 5000, "TLEG": 5000, "frugal": 4400, "wasteful": 30_000, "LeTs without teacher": 4000}
# (method, data, epochs) → accuracies of the seeds of the small and of the large ViT
VITS = {
    ("LeTs", "A", 0): ([50, 54], [60, 62]),
    ("LeTs", "A", 1): ([70, 72], [80, 84]),
    ("LeTs+", "A", 0): ([60, 60], [50, 50]),
    ("LeTs+", "A", 1): ([75, 77], [88, 90]),
    ("TLEG", "A", 0): ([], [55, 57]),
    ("frugal", "A", 0): ([20, 20], [30, 30]),
    ("wasteful", "A", 0): ([58], [58]),
    ("LeTs without teacher", "A", 0): ([], [40, 44]),
    ("scratch", "A", 1): ([30, 30], [31, 31]),
    ("scratch", "A", 10): ([60, 60], [61, 61]),
    ("scratch", "A", 100): ([65, 67], [85, 85]),
    ("LeTs", "B", 1): ([81, 83], [85, 85]),
    ("LeTs", "B", 10): ([82, 85], []),
    ("LeTs+", "B", 10): ([85, 85], [91, 95]),
    ("scratch", "B", 300): ([80, 80], [90, 92]),
}


def rows(changes: dict | None = None) -> list[dict]:
    """results.csv of the study, with the accuracies in ``changes`` instead of those of `VITS`."""
    found = []

    def add(kind: str, method: str, data: str, size: str, seed: int, epochs: int, **numbers) -> None:
        what = dict(kind=kind, method=method, data=data, size=size, seed=seed, epochs=epochs)
        what["group"] = numbers.pop("group", method)
        found.append(dict(study="tiny", lr="", images_seen=0, seconds=1.0, device="cpu, 1 thread") | what | numbers)

    add("teacher", "teacher", "A", "", 0, 8, accuracy=90, macs=20_000, parameters=500, stored_parameters="")
    for method, macs in (("LeTs", 4000), ("LeTs+", 40_000), ("TLEG", 5000)):
        for seed in (0, 1):
            stage_1 = dict(macs=macs + 100 * seed - 50, parameters=600, stored_parameters=STORED[method])
            add("stage1", method, "A", "", seed, 50, accuracy="", **stage_1)
    for seed in (0, 1):  # what the second learngene starts from
        add("stage1", "LeTs+", "A", "", seed, 50, group="small ViT", macs=10, parameters=9, stored_parameters=9)
    for (method, data, epochs), both in (VITS | (changes or {})).items():
        for size, accuracies in zip(PARAMETERS, both, strict=True):
            vit = dict(macs=MACS[size] * epochs, parameters=PARAMETERS[size])
            vit["stored_parameters"] = STORED.get(method, PARAMETERS[size])
            for seed, accuracy in enumerate(accuracies):
                add("vit", method, data, size, seed, epochs, accuracy=accuracy, **vit)
    return found


def write_study(folder: Path, found: list[dict], **report) -> Path:
    folder.mkdir(exist_ok=True)
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(found)
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY | {"report": REPORT | report}, sort_keys=False))
    return folder


def answers(text: str) -> list[list[str]]:
    """The overview of claims.md: per claim the answers for LeTs and LeTs+."""
    return [line for claim, line in cells(text).items() if claim[0].isdigit()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole study and its report, written by the command line."""
    folder = write_study(tmp_path_factory.mktemp("results") / "tiny", rows())
    command = [sys.executable, SCRIPT, folder]
    subprocess.run(command, env=ENVIRONMENT, timeout=SECONDS, check=True)
    return folder


@pytest.fixture(scope="module")
def claims(folder: Path) -> str:
    return (folder / "claims.md").read_text()


@pytest.fixture(scope="module")
def other_claims(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Those of a study in which LeTs loses on the second data set, and scratch is good after 10 epochs."""
    changes = {("LeTs", "B", 10): ([85, 85], [90, 91]), ("scratch", "A", 10): ([95, 95], [96, 96])}
    folder = write_study(tmp_path_factory.mktemp("other"), rows(changes))
    write(folder)
    return (folder / "claims.md").read_text()


def of(claims: str, number: int, method: str) -> str:
    """What is below the heading of one claim and method."""
    text = claims[claims.index(f"\n## {number}.") :]
    text = text[text.index(f"\n### {method}: ") + 1 :]
    return text[: text.find("\n##")] if "\n##" in text else text


def test_each_claim_is_answered_for_each_learngene(claims: str):
    assert answers(claims) == [
        ["no", "yes"],
        ["not answered", "yes"],
        ["yes", "no"],
        ["yes", "no"],
        ["yes without the training of the teacher, not answered with it", "not answered"],
    ]


def test_what_is_to_come_is_counted(claims: str):
    # of LeTs, l1_top four, and of LeTs on B two
    assert "The study is not finished: 6 of 58 ViTs are to come." in claims


def test_margins_over_training_from_scratch(claims: str):
    lets = of(claims, 1, "LeTs")
    assert "Smallest margin: -3.0 points, at large. Of the pairs of size and seed, 2 of 4 win." in lets
    assert cells(lets)["small"] == ["1", "71.0", "66.0", "+5.0", "2 of 2"]
    assert cells(lets)["large"] == ["1", "82.0", "85.0", "-3.0", "0 of 2"]
    assert "Smallest margin: +4.0 points, at large. Of the pairs of size and seed, 4 of 4 win." in of(
        claims, 1, "LeTs+"
    )


def test_second_data_set_waits_for_the_last_run_before_it_says_no(claims: str, other_claims: str):
    lets = of(claims, 2, "LeTs")
    assert cells(lets)["small"] == ["10", "83.5", "80.0", "+3.5", "2 of 2"]
    assert cells(lets)["large"] == ["1", "85.0", "91.0", "-6.0", "0 of 2"]
    assert "Missing: LeTs on B, 10 epochs, at large." in lets
    assert answers(other_claims)[1] == ["no", "yes"]


def test_baselines_are_compared_over_the_sizes_of_both(claims: str):
    lets = of(claims, 3, "LeTs")
    little = cells(lets)
    assert little["LeTs > TLEG"] == ["yes", "61.0", "56.0", "+5.0", "1.25 ×", "large"]
    assert little["TLEG > frugal"] == ["yes", "56.0", "30.0", "+26.0", "1.10 ×", "large"]
    assert little["LeTs > frugal"] == ["yes", "56.5", "25.0", "+31.5", "1.10 ×", "all 2 sizes"]
    assert "LeTs > wasteful" not in little
    assert cells(lets, "store more")["LeTs > wasteful"] == ["no", "56.5", "58.0", "-1.5", "7.50 ×", "all 2 sizes"]
    assert cells(of(claims, 3, "LeTs+"))["LeTs+ > TLEG"][:4] == ["no", "50.0", "56.0", "-6.0"]


def test_stored_parameters(claims: str):
    assert "2 ViTs of together 40,000 parameters are made from 4,000: 10.0 × fewer." in of(claims, 4, "LeTs")
    assert "made from 5,000: 8.0 × fewer." in of(claims, 4, "LeTs+")


def test_cost_is_a_lower_bound_where_scratch_does_not_get_there(claims: str):
    lets = of(claims, 5, "LeTs")
    cost = cells(lets)
    # the large ViT gets from 61 to 82 of 85 % in 21 of 24 parts of a power of ten: 10 · 10 ** 0.875 epochs of 300 MACs
    assert cost["not counted"] == ["≥ 32.5 k", "4.4 k", "≥ 7.39 ×", "yes"]
    assert cost["counted"] == ["≥ 32.5 k", "24.4 k", "≥ 1.33 ×", "not answered"]
    each = cells(lets, "From scratch 1, 10, 100 epochs were tried; between two of these")
    assert each["small"] == ["71.0", "100 epochs: 66.0", "–", "≥ 100", "≥ 10 k"]
    assert each["large"] == ["82.0", "10 epochs: 61.0", "100 epochs: 85.0", "75", "22.5 k"]
    assert "Missing: runs from scratch of more than 100 epochs" in lets


def test_cost_is_that_of_as_many_epochs_as_get_there(other_claims: str):
    lets = of(other_claims, 5, "LeTs")
    assert lets.startswith("### LeTs: no\n")
    # 10 ** (41 / 65) epochs of 100 MACs, and 10 ** (51 / 65) of 300
    assert cells(lets)["not counted"] == ["2.25 k", "4.4 k", "0.51 ×", "no"]
    assert cells(lets, "From scratch")["large"] == ["82.0", "1 epoch: 31.0", "10 epochs: 96.0", "6", "1.83 k"]


def test_tables(folder: Path):
    text = (folder / "tables.md").read_text()
    first = cells(text, "## A: accuracy")
    header = first["size"]
    columns = [header.index(name) for name in ("LeTs, before training", "LeTs+, 1 epoch", "scratch, 100 epochs")]
    assert [first["small"][i] for i in columns] == ["52.0 ± 2.8", "76.0 ± 1.4", "66.0 ± 1.4"]
    assert [first["**mean of all 2**"][i] for i in columns] == ["56.5 ± 2.1", "82.5 ± 1.4", "75.5 ± 0.7"]
    assert first["**mean of the 1 of TLEG**"][header.index("TLEG, before training")] == "56.0 ± 1.4"
    assert first["**mean of all 2**"][header.index("TLEG, before training")] == "–"
    second = cells(text, "## B: accuracy")
    assert second["large"][second["size"].index("LeTs, 10 epochs")] == "–"
    untrained = cells(text, "## A, before training")
    assert untrained["LeTs+"] == ["5,000", "55.0 ± 0.0, 2 sizes", "60.0 ± 0.0", "50.0 ± 0.0"]
    assert untrained["wasteful"] == ["30,000", "58.0 (1), 2 sizes", "58.0 (1)", "58.0 (1)"]
    baselines = [line.strip("| ").split(" | ") for line in text[text.index("## A: baselines") :].splitlines()[4:8]]
    assert baselines[0][:3] == ["all 2 sizes", "frugal", "25.0 ± 0.0"]
    assert baselines[1] == ["LeTs", "56.5 ± 2.1", "76.5 ± 2.1", "–", "–"]
    assert baselines[3] == ["scratch", "–", "30.5 ± 0.0", "60.5 ± 0.0", "75.5 ± 0.7"]
    ablations = cells(text, "## A: ablations")
    assert (ablations["LeTs"], ablations["LeTs+"]) == (["61.0 ± 1.4"], ["50.0 ± 0.0"])
    assert ablations["LeTs without teacher"] == ["42.0 ± 2.8"]
    assert cells(text, "## A: selections of width")["LeTs, l1_top"] == ["–", "–"]
    cost = cells(text, "## Cost and storage")
    assert cost["LeTs"] == ["2", "4 k", "400", "4.4 k", "4,000", "40,000", "10.0 ×"]
    assert cost["scratch, 100 epochs"] == ["2", "–", "40 k", "40 k", "40,000", "40,000", "1.0 ×"]
    assert "Training the teacher, which is not counted here, costs 20 k MACs." in text


def test_summary(folder: Path):
    found = cells((folder / "summary.md").read_text())
    assert found["test accuracy, %"] == ["stored parameters", "small", "large"]
    assert found["LeTs, before training"] == ["4,000", "50.0–54.0", "60.0–62.0"]
    assert found["LeTs+, before training"] == ["5,000", "60.0", "50.0"]  # all seeds agree
    assert found["TLEG, before training"] == ["5,000", "–", "55.0–57.0"]
    assert found["scratch, 100 epochs"] == ["–", "65.0–67.0", "85.0"]
    assert found["parameters of each ViT"] == ["–", "10,000", "30,000"]


def test_same_results_give_the_same_files(folder: Path, tmp_path: Path):
    write(write_study(tmp_path, rows()))
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in tmp_path.iterdir()}
    assert names >= {"epochs.png", "family.png", "ablations.png", "cost.png"}
    assert all((folder / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)


@pytest.mark.parametrize("count", [0, 8])
def test_study_that_has_only_begun(count: int, tmp_path: Path):
    write(write_study(tmp_path, rows()[:count]))
    assert {answer for line in answers((tmp_path / "claims.md").read_text()) for answer in line} == {"not answered"}
    assert "LeTs+, 1 epoch" in (tmp_path / "tables.md").read_text()
    assert (tmp_path / "cost.png").stat().st_size > 0


def test_study_that_says_nothing_of_a_report_gets_one_table(tmp_path: Path):
    write_study(tmp_path, rows())
    study = {key: value for key, value in STUDY.items() if key != "report"}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"results.csv", "study.yaml", "tables.md"}
    first = cells((tmp_path / "tables.md").read_text())
    assert first["frugal"] == ["A", "before training", "–", "25.0 ± 0.0", "20.0 ± 0.0", "30.0 ± 0.0"]
    assert first["TLEG"][2] == "5 k"


def test_the_results_of_this_project_are_what_was_measured(tmp_path: Path):
    folders = [path.parent for path in RESULTS.glob("*/tables.md")]
    assert {"cpu", "trials", "elastic"} <= {folder.name for folder in folders}
    for folder in folders:
        copy = tmp_path / folder.name
        copy.mkdir()
        for name in ("results.csv", "study.yaml", ARCHIVE):  # whose logs have to agree with the rows
            shutil.copy(folder / name, copy)
        write(copy)
        for path in copy.glob("*.md"):
            assert path.read_text() == (folder / path.name).read_text(), path.name


def test_the_documents_quote_the_results():
    written = [path for path in RESULTS.glob("*/*.md") if path.name != "README.md"]
    measured = {line for path in written for line in path.read_text().splitlines()}
    pages = [path.read_text() for path in RESULTS.rglob("README.md")]
    pages.append((RESULTS.parent / "docs/elastic.md").read_text().partition("## What helps")[2])
    pages.append((RESULTS.parent / "README.md").read_text().partition("## Try it")[2].partition("\n## ")[0])
    quoted = [line for page in pages for line in page.splitlines() if line.startswith("| ")]
    assert quoted
    assert not [line for line in quoted if line not in measured]


def test_sentences_quote_the_results():
    """Every accuracy in the sentences about the family's study is one of its tables."""
    known = {*re.findall(r"\d+\.\d", (RESULTS / "family/details.md").read_text())}
    text = (RESULTS / "README.md").read_text().partition("## What surprised")[2].partition("\n## ")[0]
    (intro,) = re.findall(r"its members have.*?results/README", (RESULTS.parent / "README.md").read_text(), re.DOTALL)
    for quoting in (text, intro):
        found = re.findall(r"\d+\.\d", quoting)
        assert found
        assert {*found} <= known


def test_model_cards_quote_the_results():
    quotes = re.findall(r"^- \*\*(.*?)\*\*: (.*)$", (RESULTS / "family/details.md").read_text(), re.MULTILINE)
    methods = {name.lower(): quote for name, quote in quotes}
    assert {name: method.measured for name, method in METHODS.items()} == {name: methods.get(name) for name in METHODS}


def test_the_page_of_results_has_all_answers_in_order():
    for path in RESULTS.glob("*/answers.md"):
        lines = iter((RESULTS / "README.md").read_text().splitlines())
        missing = [line for line in path.read_text().splitlines() if line not in lines]  # goes on after each
        assert not missing, path.parent.name


ERRORS = {
    "unknown method": (rows, dict(baselines=["forgotten"]), "report names the method 'forgotten'"),
    "unknown data set": (rows, dict(second="C"), "report names the data set 'C': expected one of A, B"),
    "unknown key": (rows, dict(baseline=["frugal"]), "unknown key 'baseline'"),
    "no list": (rows, dict(learngenes="LeTs"), "learngenes is 'LeTs': expected names in a list"),
    "unknown size": (lambda: [*rows(), rows()[-1] | {"size": "huge"}], {}, "size 'huge' is none of study.yaml's"),
    "two rows": (lambda: [*rows(), rows()[-1]], {}, "two rows for scratch vit scratch B large, 300 epochs, seed 1"),
    "no number": (lambda: [*rows(), rows()[-1] | {"accuracy": "high"}], {}, "accuracy is 'high': expected a number"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_mistakes_are_one_sentence(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make, report, expected = ERRORS[case]
    assert main([str(write_study(tmp_path, make(), **report))]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert expected in message
    assert {path.name for path in tmp_path.iterdir()} == {"results.csv", "study.yaml"}


def test_results_that_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_study(tmp_path, [])
    (tmp_path / "results.csv").write_text("method,accuracy\n")
    assert main([str(tmp_path)]) == 2
    assert "has no column group" in capsys.readouterr().err
    (tmp_path / "results.csv").unlink()
    assert main([str(tmp_path)]) == 2
    assert "results.csv cannot be read" in capsys.readouterr().err
