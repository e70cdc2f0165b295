"""The published commands run as they are written, and every file in configs/ holds the published recipe.

Each command runs for one epoch on 1000 tiny images, under one of the three launchers; only epochs, batch size, image
size and the number of processes are lowered, and for two Des-Nets the depth, which the published text leaves to the
user. At 16 pixels an image is a single patch, which makes a step of the base-size ViTs affordable.
"""

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import models
from models.meta import WeightsOnMeta
from training.checks import kind_of_run
from training.command_line import parse_options
from training.config import options_of, resolve

import pytest
import timm
import torch
from conftest import ENVIRONMENT, MAIN, free_port
from PIL import Image
from safetensors.torch import load_file

REPOSITORY = MAIN.parent
CLASSES = 1000
INPUT_SIZE = 16
SECONDS = 600  # a run that lasts longer hangs, and is ended

# ---------------------------------------------------------------------------------------------------------------------
# The commands, as published
# ---------------------------------------------------------------------------------------------------------------------

LETS_AUX = (
    "python3 -u -m torch.distributed.launch --nproc_per_node=4 --master_port 20001 --use_env main.py "
    "--src-arch deit_small_patch16_224_L8 --tgt-arch deit_base_patch16_224_L16_H12 --batch-size 128 --epochs 300 "
    "--warmup-epochs 5 --data-path path-to-ImageNet-1K --output_dir path-to-output --weight-decay 0.05 --lr 5e-4 "
    "--teacher-model levit_384 --teacher-path path-to-teacher --distillation-type soft --distillation-alpha 1.0"
)
LETS_DES = (
    "python3 -u -m torch.distributed.launch --nproc_per_node=2 --master_port 20002 --use_env main.py "
    "--des-arch deit_base_patch16_224_L12 --batch-size 256 --epochs 5 --warmup-epochs 0 "
    "--data-path path-to-ImageNet-1K --output_dir path-to-output --weight-decay 0.05 --lr 1e-5 --min-lr 1e-6 "
    "--load-gene /path/to/learngene --mapping_layer '0,1,4,5,6,7,8,9,10,11,12,13' "
    "--mapping_layer_coeff '0,2,4,4,6,6,8,8,10,10,12,14'"
)
TLEG_AUX = """python3 -u -m torch.distributed.launch --nproc_per_node=4 \\
        --master_port {port} \\
        --use_env main.py \\
        --config /configs/conf_train_aux_{size}.yaml"""
TLEG_DES = """python3 -u -m torch.distributed.launch --nproc_per_node=4 \\
        --master_port {port} \\
        --use_env ./main.py \\
        --config /configs/conf_train_des_{size}.yaml"""
FIRST_RELEASE_AUX = """\
python3 -u -m torch.distributed.launch --nproc_per_node=4 --master_port 23002 --use_env main.py \\
        --model aux_deit_small_patch16_224 --drop-path 0.0 --batch-size 128 --epochs 150 \\
        --data-path /path/to/imagenet --output_dir /path/to/save \\
        --teacher-model levit_384 --teacher-path /path/to/teacher --distillation-type soft --distillation-alpha 1.0"""
FIRST_RELEASE_DES = """\
python3 -u -m torch.distributed.launch --nproc_per_node=4 --master_port 28001 --use_env ./main.py \\
        --model deit_small_patch16_224_L12 --batch-size 128 --epochs 35 --warmup-epochs 0 \\
        --data-path /path/to/imagenet --output_dir /path/to/save --load-gene /path/to/small_learngene"""


@dataclass(frozen=True)
class Case:
    """A published command and how it is run here.

    Attributes:
        arch: of the model that is trained.
        gene: stage 2: the case that trains the learngene, and which of its files is loaded.
        launcher: ``launch`` as published, ``torchrun``, or ``plain`` python.
        edits: what the published text leaves to the user, beside paths.
    """

    command: str
    arch: str
    gene: tuple[str, str] | None = None
    launcher: str = "launch"
    processes: int = 1
    edits: str = ""


CASES = {
    # Every command once, and both stages under each of the three launchers, two of which start two processes.
    # Stage 1 comes first, so that no case of stage 2 waits long for its learngene.
    "lets-aux": Case(LETS_AUX, "deit_base_patch16_224_L16_H12"),
    "tleg-aux-ti": Case(TLEG_AUX.format(port=23001, size="ti"), "aux_deit_tiny_patch16_224", processes=2),
    "tleg-aux-s": Case(TLEG_AUX.format(port=23002, size="s"), "aux_deit_small_patch16_224", launcher="torchrun"),
    "tleg-aux-b": Case(TLEG_AUX.format(port=23003, size="b"), "aux_deit_base_patch16_224", launcher="plain"),
    "tleg-aux-first-release": Case(FIRST_RELEASE_AUX, "aux_deit_small_patch16_224", launcher="plain"),
    "lets-des": Case(
        LETS_DES, "deit_base_patch16_224_L12", gene=("lets-aux", "learngene.safetensors"), launcher="plain"
    ),
    "tleg-des-ti": Case(
        TLEG_DES.format(port=27001, size="ti"),
        "deit_tiny_patch16_224_L12",
        gene=("tleg-aux-ti", "learngene.safetensors"),
        launcher="torchrun",
        processes=2,
    ),
    "tleg-des-s": Case(
        TLEG_DES.format(port=28001, size="s"),
        "deit_small_patch16_224_L5",
        gene=("tleg-aux-s", "checkpoint.pth"),
        edits="--model-type deit_small_patch16_224_L5",
    ),
    "tleg-des-b": Case(
        TLEG_DES.format(port=29001, size="b"),
        "deit_base_patch16_224_L3",
        gene=("tleg-aux-b", "learngene.safetensors"),
        launcher="plain",
        edits="--model-type deit_base_patch16_224_L3",
    ),
    "tleg-des-first-release": Case(
        FIRST_RELEASE_DES,
        "deit_small_patch16_224_L12",
        gene=("tleg-aux-first-release", "learngene.safetensors"),
        launcher="plain",
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# Running them
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    status: int
    folder: Path
    output: str


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that is gone afterwards: checkpoints of base-size ViTs take more than a gigabyte each."""
    folder = tmp_path_factory.mktemp("published")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def imagenet(root: Path) -> Path:
    """ImageNet's layout, 1000 classes in train/ and in val/; links, because all show the same tiny picture."""
    picture = root / "picture"
    picture.mkdir()
    Image.radial_gradient("L").resize((8, 8)).convert("RGB").save(picture / "0.png")
    (root / "imagenet" / "train").mkdir(parents=True)
    for label in range(CLASSES):
        (root / "imagenet" / "train" / f"n{label:08d}").symlink_to(picture)
    (root / "imagenet" / "val").symlink_to("train")
    return root / "imagenet"


@pytest.fixture(scope="session")
def teacher(root: Path) -> Path:
    """A checkpoint of an untrained LeViT-384."""
    model = models.create_model("levit_384", num_classes=CLASSES, img_size=INPUT_SIZE)
    torch.save({"model": model.state_dict()}, root / "teacher.pth")
    return root / "teacher.pth"


@pytest.fixture(scope="session")
def outcome_of(
    request: pytest.FixtureRequest, root: Path, imagenet: Path, teacher: Path
) -> Iterator[Callable[[str], Outcome]]:
    """Runs the cases that were selected and those they need, two at a time, and waits for the one asked for."""
    started: dict[str, Future[Outcome]] = {}

    def run(name: str) -> Outcome:
        case = CASES[name]
        folder, gene = root / name, root / "no-learngene"
        if case.gene is not None:
            gene = started[case.gene[0]].result().folder / case.gene[1]
        argv = command_line(case, imagenet, folder, teacher, gene)
        env = {**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ""}  # two processes want two devices, or the CPU
        pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        with subprocess.Popen(argv, cwd=REPOSITORY, env=env, **pipe) as process:
            try:
                output, _ = process.communicate(timeout=SECONDS)
            except subprocess.TimeoutExpired:
                process.terminate()  # a launcher that is killed would leave its processes behind
                raise
        return Outcome(process.returncode, folder, output)

    selected = [item.callspec.params["name"] for item in request.session.items if "outcome_of" in item.fixturenames]
    sources = {CASES[name].gene[0] for name in selected if CASES[name].gene is not None}
    pool = ThreadPoolExecutor(max_workers=2)
    for name in CASES:  # in their order, so that a learngene is always begun before it is waited for
        if name in sources.union(selected):
            started[name] = pool.submit(run, name)
    yield lambda name: started[name].result()
    pool.shutdown(cancel_futures=True)


def command_line(case: Case, imagenet: Path, folder: Path, teacher: Path, gene: Path) -> list[str]:
    """The published words with the user's paths in them, a launcher for this machine, and less work at the end."""
    paths = {
        "path-to-ImageNet-1K": imagenet,
        "/path/to/imagenet": imagenet,
        "path-to-output": folder,
        "/path/to/save": folder,
        "path-to-teacher": teacher,
        "/path/to/teacher": teacher,
        "/path/to/learngene": gene,
        "/path/to/small_learngene": gene,
    }
    words = [str(paths.get(word, word)) for word in shlex.split(case.command.replace("\\\n", " "))]
    script = next(i for i, word in enumerate(words) if word.endswith("main.py"))
    launcher, program = words[:script], words[script:]
    if "--config" in program:  # the file holds the placeholders, the command line wins
        program += ["--data-path", str(imagenet), "--output_dir", str(folder)]
        program += ["--load-gene", str(gene)] if case.gene is not None else ["--teacher-path", str(teacher)]
    program += shlex.split(case.edits)
    program += ["--epochs", "1", "--input-size", str(INPUT_SIZE)]
    # an even number of images, and more than half of what a process has: one step
    program += ["--batch-size", str(CLASSES // case.processes // 2 + 2)]
    if case.launcher == "plain":
        return [sys.executable, *program]
    launcher[0] = sys.executable
    launcher[launcher.index("--master_port") + 1] = str(free_port())
    launcher = [re.sub(r"^(--nproc_per_node)=\d+$", rf"\1={case.processes}", word) for word in launcher]
    if case.launcher == "torchrun":
        launcher[launcher.index("torch.distributed.launch")] = "torch.distributed.run"
        launcher.remove("--use_env")  # what torchrun always does
    return launcher + program


FIRST = ("tleg-aux-ti",)  # in two processes


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FIRST else pytest.mark.full) for name in CASES]
)
def test_command_runs_as_published(name: str, outcome_of: Callable[[str], Outcome]):
    case, outcome = CASES[name], outcome_of(name)
    assert outcome.status == 0, outcome.output
    assert f"{case.processes} process(es)" in outcome.output
    log = [json.loads(line) for line in (outcome.folder / "log.txt").read_text().splitlines()]
    # stage 2 also logs what the initialisation alone gives
    assert [line["epoch"] for line in log] == ([0] if case.gene is None else [-1, 0])
    assert {"train_loss", "train_lr", "test_loss", "test_acc1", "n_parameters"} <= log[-1].keys()
    assert all(math.isfinite(value) for line in log for value in line.values())
    arch = models.parse_arch(case.arch)
    if case.gene is None:
        gene = models.load_learngene(outcome.folder / "learngene.safetensors")
        assert (gene.method, gene.num_classes) == (name.split("-")[0], CLASSES)
        assert (gene.arch.width, gene.arch.depth, gene.arch.num_heads) == (arch.width, arch.depth, arch.num_heads)
        assert sum(t.numel() for t in gene.tensors.values()) == log[-1]["n_parameters"]
    else:
        config = json.loads((outcome.folder / "config.json").read_text())
        with WeightsOnMeta():
            vit = timm.create_model(config["architecture"], num_classes=config["num_classes"], **config["model_args"])
        weights = load_file(outcome.folder / "model.safetensors")
        vit.load_state_dict(weights, assign=True)
        assert (vit.embed_dim, len(vit.blocks), vit.num_classes) == (arch.width, arch.depth, CLASSES)
        assert all(t.isfinite().all() for t in weights.values())
        shutil.rmtree(outcome.folder)  # while other cases are running


# ---------------------------------------------------------------------------------------------------------------------
# The files in configs/
# ---------------------------------------------------------------------------------------------------------------------

STAGE_1 = dict(
    batch_size=128,
    warmup_epochs=5,
    lr=5e-4,
    min_lr=1e-5,
    teacher_model="levit_384",
    teacher_path="/path/to/teacher",
    distillation_type="soft",
    distillation_alpha=1.0,
)
TLEG_STAGE_1 = dict(STAGE_1, kind="tleg", drop_path=0.0)
TLEG_STAGE_2 = dict(
    kind="descend", batch_size=128, warmup_epochs=0, lr=5e-4, min_lr=1e-5, drop_path=0.1, distillation_type="none"
)
RECIPE = {
    "conf_train_aux_ti": dict(TLEG_STAGE_1, model="aux_deit_tiny_patch16_224", epochs=150),
    "conf_train_aux_s": dict(TLEG_STAGE_1, model="aux_deit_small_patch16_224", epochs=150),
    "conf_train_aux_b": dict(TLEG_STAGE_1, model="aux_deit_base_patch16_224", epochs=100),
    "conf_train_aux_lets": dict(
        STAGE_1,
        kind="lets",
        src_arch="deit_small_patch16_224_L8",
        tgt_arch="deit_base_patch16_224_L16_H12",
        epochs=300,
        drop_path=0.1,
        layers_per_row=2,
        trans_init_scheme=["stackbert_noisy", "rand"],
    ),
    "conf_train_des_ti": dict(
        TLEG_STAGE_2, model="deit_tiny_patch16_224_L12", load_gene="/path/to/tiny_learngene", epochs=35
    ),
    "conf_train_des_s": dict(
        TLEG_STAGE_2, model="deit_small_patch16_224_L12", load_gene="/path/to/small_learngene", epochs=35
    ),
    "conf_train_des_b": dict(
        TLEG_STAGE_2, model="deit_base_patch16_224_L12", load_gene="/path/to/base_learngene", epochs=40
    ),
    "conf_train_des_lets": dict(
        kind="descend",
        des_arch="deit_base_patch16_224_L12",
        load_gene="/path/to/learngene",
        mapping_layer=[0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13],
        mapping_layer_coeff=[0, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 14],
        batch_size=256,
        epochs=5,
        warmup_epochs=0,
        lr=1e-5,
        min_lr=1e-6,
        drop_path=0.1,
        distillation_type="none",
    ),
}
DEIT = dict(
    data_set="IMNET",
    data_path="/path/to/imagenet",
    output_dir="/path/to/save",
    opt="adamw",
    sched="cosine",
    weight_decay=0.05,
    aa="rand-m9-mstd0.5-inc1",
    mixup=0.8,
    cutmix=1.0,
    reprob=0.25,
    smoothing=0.1,
    repeated_aug=True,
    model_ema=True,
    model_ema_decay=0.99996,
)
DEPTHS = [
    *(("ti", f"deit_tiny_patch16_224_L{depth}") for depth in (3, 6, 9, 12)),
    *(("s", f"deit_small_patch16_224_L{depth}") for depth in range(3, 13)),
    *(("b", f"deit_base_patch16_224_L{depth}") for depth in range(3, 13)),
]


def test_every_published_config_is_in_the_recipe():
    assert {file.stem for file in (REPOSITORY / "configs").glob("conf_train_*")} == RECIPE.keys()


@pytest.mark.parametrize("name", RECIPE)
def test_config_holds_the_recipe(name: str):
    config = resolve(parse_options(["--config", f"/configs/{name}.yaml"]))
    options, expected = options_of(config), {**DEIT, **RECIPE[name]}
    assert {**options, "kind": kind_of_run(config.model)} == {**options, **expected}


@pytest.mark.parametrize(("size", "name"), DEPTHS)
def test_every_published_depth_is_one_option_away(size: str, name: str):
    config = parse_options(["--config", f"/configs/conf_train_des_{size}.yaml", "--model-type", name]).model
    assert (config.model, kind_of_run(config)) == (name, "descend")
    with WeightsOnMeta():
        vit = models.create_model(config.model, drop_path_rate=config.drop_path)
    assert len(vit.blocks) == int(name.rpartition("_L")[2])


def test_eleven_layers_for_45_epochs():
    command = "--config /configs/conf_train_des_s.yaml --model-type deit_small_patch16_224_L11 --epochs 45"
    config = parse_options(command.split())
    assert (config.model.model, config.schedule.epochs) == ("deit_small_patch16_224_L11", 45)
