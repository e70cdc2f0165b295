"""Every command of the documentation runs as written, in a copy of the repository, and every path in it exists.

Blocks of bash and Python run in the order of the pages. Paths that the reader replaces have stand-ins, and a table of
rules appends options that make training short. What cannot run here has a rule that says why, and its options are
parsed. A command without a rule fails.
"""

import os
import re
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import models

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, MAIN
from docs_sandbox import Rule, Sandbox
from hub_stand_in import HubStandIn
from parquet_fixtures import as_files, digits, write_digits
from PIL import Image
from safetensors.torch import save
from shard_writers import write_shards

pytestmark = pytest.mark.full  # it takes over a minute

REPOSITORY = MAIN.parent
FIRST = ("README.md", "docs/options.md", "docs/models_out.md")  # their runs leave what other pages start from
PAGES = [*FIRST, *(f"docs/{path.name}" for path in sorted((REPOSITORY / "docs").glob("*.md")))]
PAGES += ["results/README.md", "results/cpu/README.md", "learngenes/README.md", "CONTRIBUTING.md"]
PAGES = list(dict.fromkeys(PAGES))

FEW = "--num-workers 0 --warmup-epochs 0 --no-repeated-aug"
IMAGES = f"--data-set FOLDER --input-size 16 --batch-size 4 {FEW}"  # instead of ImageNet
UNTRAINED = f"{IMAGES} --epochs 0 --no-model-ema --teacher-model test_resnet"
DIGITS = f"--epochs 1 --train-images 64 --batch-size 32 {FEW}"
# tags of timm's → small ViTs, whose random weights are offered under their tags
PRETRAINED = {
    "vit_small_patch16_224.augreg_in1k": "test_vit.r160_in1k",
    "vit_small_patch14_dinov2.lvd142m": "test_vit2.r160_in1k",
}
ELASTIC = f"{IMAGES} --epochs 0 --no-model-ema --descendant-depths 3,6 --descendant-heads 1,2"
ELASTIC_DATA = "--data-set FOLDER --input-size 16"
SMALL_DES_NET = "deit_base_patch16_224_L3_H6"
RULES = [
    Rule(r"^main\.py --help$"),
    # stages 1 and 2 at their published sizes
    Rule(r"--teacher-cache ", f"{IMAGES} --epochs 1 --no-model-ema --teacher-model test_resnet"),
    Rule(r"^sbatch .*conf_train_aux_lets", action="parse", reason="needs a SLURM cluster"),
    Rule(r"conf_train_aux_\w+\.yaml|lets_plus_\w+\.yaml", UNTRAINED),
    Rule(
        r"conf_train_des_lets\.yaml",
        f"--des-arch {SMALL_DES_NET} --mapping_layer none --mapping_layer_coeff none --epochs 1 {IMAGES}",
    ),
    Rule(r"conf_train_des_s\.yaml", f"{IMAGES} --epochs 0"),
    # the data in data/ are those that stand for ImageNet
    Rule(r"configs/downstream_\w+\.yaml", f"--des-arch {SMALL_DES_NET} {IMAGES} --no-download --epochs 0"),
    Rule(r"--finetune timm .*--linear-probe", f"{IMAGES} --no-download"),
    Rule(r"main\.py --eval --resume output/des/checkpoint\.pth", f"--model {SMALL_DES_NET} {IMAGES}"),
    # pretrained weights, for which small ones stand: their source has 6 layers and 2 heads
    Rule(r"--config configs/elastic\.yaml", f"{ELASTIC} --distillation-type none --teacher-model test_resnet"),
    Rule(r"--distillation-type feature", f"{ELASTIC}"),
    Rule(r"--load-gene output/elastic/.* --depths", f"--depths 3 --heads 1 {ELASTIC_DATA}"),
    Rule(r"--load-gene output/elastic/", f"--des-arch @L3-H1 --distillation-type none {UNTRAINED}"),
    Rule(r"--src-path timm|--load-gene output/(dino_)?grown/", UNTRAINED),
    # the head of the small one has other classes than the data
    Rule(r"--init taylor --init-path timm", f"{UNTRAINED} --init magnitude --model test_vit.r160_in1k@L4-H1"),
    # small images
    Rule(r"main\.py --config configs/digits\.yaml", "--train-images 32 --eval-interval 1000"),
    Rule(r"main\.py .*--data-set HF", f"--epochs 1 --batch-size 32 {FEW}"),
    Rule(r"main\.py .*--data-set WDS", f"--epochs 1 --input-size 16 --batch-size 4 {FEW}"),
    Rule(r"main\.py .*--data-set[ =](DIGITS|FMNIST)|main\.py --config output/\w+/args\.yaml", DIGITS),
    # scripts
    Rule(r"scripts/make_family\.py --load-gene output/random", "--depths 3 --heads 6"),
    Rule(r"scripts/make_family\.py", "--depths 2,3 --heads 1"),
    Rule(r"convert_learngene\.py output/study/", action="parse", reason="the study trains it in an hour"),
    Rule(r"scripts/(inspect_learngene|convert_learngene|download_learngenes|predict|export_model)\.py"),
    Rule(r"scripts/vit_kinds\.py"),
    Rule(r"scripts/make_shards\.py", "--shard-mb 0.01"),
    Rule(r"scripts/study\.py configs/study_quickstart\.yaml --seeds 0", "--only TLEG"),
    Rule(r"scripts/study\.py", action="parse", reason="takes hours; tests/integration/test_study.py runs a small one"),
    Rule(r"scripts/study_report\.py"),
    Rule(r"scripts/check_device\.py", action="parse", reason="tests/integration/test_check_device.py runs it"),
    Rule(r"scripts/torture\.py", action="parse", reason="takes an hour; tests/robustness/test_torture.py runs it"),
    Rule(r"benchmarks/\w+\.py", action="parse", reason="takes minutes, or needs a GPU"),
    Rule(r"^-m pytest", action="skip", reason="would run this test"),
    Rule(r"^-c "),
]


CXX = os.environ.get("CXX", "g++")


class Block(NamedTuple):
    """A fenced block: its page, the line it starts in, its language, and its text."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def lacks(self) -> str | None:
        """What this machine does not have to run it."""
        compiles = "aoti_compile_and_package" in self.text and shutil.which(CXX) is None
        return f"no C++ compiler {CXX}" if compiles else None


def blocks_of(page: str) -> Iterator[Block]:
    text = (REPOSITORY / page).read_text()
    for match in re.finditer(r"^```(bash|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(page, text[: match.start()].count("\n") + 1, *match.groups())


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


def make_images(folder: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 20, 20, 3), dtype=np.uint8)
    for i, image in enumerate(map(Image.fromarray, pixels)):
        for split in ("train", "val"):
            path = folder / split / ("cat", "dog")[i % 2] / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return folder


def make_fashion_mnist(folder: Path) -> Path:
    """The four idx files, with 200 and 20 images."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 200), ("t10k", 20)):
        header = np.array([0x803, count, 28, 28], dtype=">i4").tobytes()
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(
            np.array([0x801, count], dtype=">i4").tobytes() + labels.tobytes()
        )
    return folder


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    folder = tmp_path_factory.mktemp("docs")
    teacher = models.create_model("test_resnet", num_classes=2)
    torch.save({"model": teacher.state_dict()}, folder / "teacher.pth")
    shards = folder / "repository" / "output" / "shards"
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SilentHandler, directory=str(shards)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    replace = {
        "/path/to/imagenet": str(make_images(folder / "images")),
        "/path/to/levit_384": str(folder / "teacher.pth"),
        "/path/to/fashion-mnist": str(make_fashion_mnist(folder / "fashion-mnist")),
        "/usr/share/datasets/fashion-mnist": str(folder / "fashion-mnist"),
        "/path/to/local/disk": str(folder / "shard-cache"),
        "https://host/shards": f"http://127.0.0.1:{server.server_port}",
        **PRETRAINED,
        "vit_small_patch16_224": "test_vit",
    }
    with HubStandIn() as hub:
        for tag in PRETRAINED.values():
            hub.add(f"timm/{tag}", {"model.safetensors": save(models.create_model(tag).state_dict())})
        hub.add("datasets/uoft-cs/cifar100", as_files(write_digits(folder / "cifar100")))
        hub.add("datasets/timm/imagenet-1k-wds", as_files(write_shards(folder / "wds", *digits(0, 60))))
        environment = {**ENVIRONMENT, **hub.environment(folder / "hub")}
        with Sandbox(folder, RULES, replace, environment) as sandbox:
            image = next((folder / "images").rglob("*.jpg"))
            shutil.copy(image, sandbox.folder / "picture.jpg")
            (sandbox.folder / "data").symlink_to(folder / "images")
            yield sandbox
    server.shutdown()
    shutil.rmtree(folder)  # learngenes and models of published sizes


class SilentHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def outcomes(sandbox: Sandbox) -> dict[str, tuple[int, str]]:
    """Exit status and output of every block; after the first pages, two pages run at a time."""
    results = {}

    def run_page(page: str) -> None:
        for block in BLOCKS:
            if block.page == page and not block.lacks:
                results[str(block)] = sandbox.run(block.text, block.language)

    for page in FIRST:
        run_page(page)
    with ThreadPoolExecutor(max_workers=2) as pool:
        [*pool.map(run_page, [page for page in PAGES if page not in FIRST])]
    return results


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_commands_run_as_written(block: Block, outcomes: dict[str, tuple[int, str]]):
    if block.lacks:
        pytest.skip(block.lacks)
    status, output = outcomes[str(block)]
    assert status == 0, output[-4000:]


def test_every_rule_is_used(sandbox: Sandbox, outcomes: dict[str, tuple[int, str]]):
    assert {rule.pattern for rule in RULES} == sandbox.used_rules()


def test_a_command_without_a_rule_fails(sandbox: Sandbox):
    status, output = sandbox.run("python unknown.py")
    assert status != 0
    assert "no rule covers the command: unknown.py" in output


# ---------------------------------------------------------------------------------------------------------------------
# Paths and form
# ---------------------------------------------------------------------------------------------------------------------

ROOMS = "benchmarks|common|configs|device_check|docs|family|models|pipeline|results|scripts|study|tests|training"
PATH = re.compile(rf"(?<![\w/.-])((?:{ROOMS})/[\w./-]*[\w/]|\w+\.(?:py|md|txt|toml|sh))(?![\w(])")
# names of files that are not of the repository
ELSEWHERE = {"results/NAME", "train.py", "run_with_submitit.py", "tables.md", "family.md", "claims.md"}
ELSEWHERE |= {"classes.txt", "log.txt", "report.md", "tests/device/NAME.py", "results/gpu"}


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_paths_and_links_exist(page: str):
    text, folder = (REPOSITORY / page).read_text(), (REPOSITORY / page).parent
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        linked = folder / path if path else REPOSITORY / page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target
    prose = re.sub(r"\]\([^)]+\)", "]", text)
    named = {path for path in PATH.findall(prose) if path not in ELSEWHERE}
    missing = [path for path in named if not (REPOSITORY / path).exists() and not (folder / path).exists()]
    assert not missing


def test_the_readme_is_short_and_pages_open_with_their_command():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 150
    for page in PAGES[1:]:
        lines = [line for line in (REPOSITORY / page).read_text().splitlines() if line]
        assert lines[0].startswith("# "), page
        assert lines[1] == ("## Answers" if page == "results/README.md" else "```bash"), page
