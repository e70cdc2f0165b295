"""A third method is one class: everything else finds it in the registry.

The toy method has one learned layer; every layer of Aux-Net and Des-Net is a copy of it, scaled by its position.
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import main
import models
from common.errors import InputError
from models.aux_net import AuxNet
from models.learngene import save_published
from models.names import parse_arch
from models.registry import METHODS, method_class
from models.stateless import random_vit_weights
from models.vit import ViTArch
from scripts import inspect_learngene, make_family

import pytest
import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
SHORT = "--data-set DIGITS --batch-size 256 --num-workers 0 --cache-data --warmup-epochs 0 --device cpu"
OUTER = ("pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")
OUTER += ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")


def scaled_copies(p: Mapping[str, Tensor], depth: int, scale: float) -> dict[str, Tensor]:
    """The state dict of a ViT whose layer l of L is (1 + scale · l/L) times the learned layer."""
    weights = {name: p[name.replace(".", "_")] for name in OUTER}
    for name, tensor in p.items():
        if name.startswith("layer_"):
            timm_name = name.removeprefix("layer_").replace("__", ".")
            weights |= {f"blocks.{l}.{timm_name}": tensor * (1 + scale * l / depth) for l in range(depth)}
    return weights


class Toy(AuxNet):
    title = "Toy"
    choices = ("scale",)
    parts = {"layer": ("layer",), "the rest": ("pos_embed", "patch_embed", "fc_norm", "head")}  # noqa: RUF012

    def __init__(self, arch: ViTArch, **kwargs: object):
        super().__init__(arch, {}, **kwargs)
        vit = random_vit_weights(self.arch, num_classes=self.num_classes, in_chans=self.in_chans)
        self.add_parameters({name.replace(".", "_"): vit[name] for name in OUTER})
        block = {name.removeprefix("blocks.0."): w for name, w in vit.items() if name.startswith("blocks.0.")}
        self.add_parameters({f"layer_{name.replace('.', '__')}": tensor for name, tensor in block.items()})

    @classmethod
    def from_config(cls, config: object, **vit: object) -> "Toy":
        return cls(parse_arch(config.model), **vit)

    @classmethod
    def from_header(cls, header: Mapping, **vit: object) -> "Toy":
        return cls(ViTArch(**header["tgt_arch"]), **vit)

    def expand(self) -> dict[str, Tensor]:
        return scaled_copies(dict(self.named_parameters()), self.arch.depth, 1.0)

    @classmethod
    def descend(
        cls, tensors: dict[str, Tensor], header: Mapping, arch: ViTArch, scale: float = 1.0
    ) -> dict[str, Tensor]:
        if arch.width != header["tgt_arch"]["width"]:
            raise InputError(f"the Des-Net has width {arch.width}, this learngene {header['tgt_arch']['width']}")
        return scaled_copies(tensors, arch.depth, scale)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}


@pytest.fixture(scope="module")
def toy() -> Iterator[type[Toy]]:
    """The method, registered as a file in models/ would do it."""
    try:
        yield models.register_method("toy")(Toy)
    finally:
        METHODS.pop("toy", None)


@pytest.fixture(scope="module")
def stage_1(toy: type[Toy], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of stage 1, one epoch with descendants beside the Aux-Net."""
    folder = tmp_path_factory.mktemp("toy") / "stage_1"
    command = f"{SHORT} --method toy --model deit_nano_patch8_16_L3 --epochs 1 --descendants 1 --output-dir {folder}"
    assert main.main(command.split()) == 0
    return folder


def test_stage_1_writes_a_learngene(toy: type[Toy], stage_1: Path):
    gene = models.load_learngene(stage_1 / "learngene.safetensors")
    assert (gene.method, gene.options["method"], gene.options["descendants"]) == ("toy", "toy", 1)
    assert str(gene).startswith("Toy learngene (learngene file), L3-H2 (width 64)")
    assert isinstance(gene.aux_net(), toy)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(gene.aux_net()(images), gene.descend("deit_nano_patch8_16_L3").eval()(images))
    lines = [json.loads(line) for line in (stage_1 / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0]


def test_stage_1_resumes_from_its_checkpoint(stage_1: Path, tmp_path: Path):
    command = f"{SHORT} --config {stage_1}/args.yaml --epochs 2 --resume {stage_1}/checkpoint.pth"
    assert main.main([*command.split(), "--output-dir", str(tmp_path)]) == 0
    assert models.load_learngene(tmp_path / "checkpoint.pth").method == "toy"


def test_stage_2_initialises_a_des_net(stage_1: Path, tmp_path: Path):
    command = f"{SHORT} --des-arch deit_nano_patch8_16_L5 --load-gene {stage_1}/learngene.safetensors --epochs 0"
    assert main.main([*command.split(), "--output-dir", str(tmp_path)]) == 0
    assert (tmp_path / "model.safetensors").is_file()


def test_choices_of_the_method_reach_it_and_those_of_others_are_refused(stage_1: Path):
    gene = models.load_learngene(stage_1 / "learngene.safetensors")
    first, *_, last = gene.descend("deit_nano_patch8_16_L3", scale=0.0).blocks
    assert torch.equal(first.mlp.fc1.weight, last.mlp.fc1.weight)
    with pytest.raises(InputError, match="width_select belongs to LeTs and TLEG; this is a Toy learngene"):
        gene.descend("deit_nano_patch8_16_L3", width_select="l1_top")
    other = models.Learngene.of(models.create_model("aux_deit_nano_patch8_16_L2", num_classes=10))
    with pytest.raises(InputError, match="scale belongs to Toy; this is a TLEG learngene, which has no such choice"):
        other.descend("deit_nano_patch8_16_L2", scale=0.0)


def test_family_script(stage_1: Path, tmp_path: Path):
    command = f"--load-gene {stage_1}/learngene.safetensors --depths 2,4 --heads 1,2 --output-dir {tmp_path}"
    assert make_family.main(command.split()) == 0
    assert [path.name for path in sorted(tmp_path.glob("L*"))] == ["L2-H2", "L4-H2"]  # of one width


def test_inspector(stage_1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    picture = tmp_path / "toy.png"
    monkeypatch.setattr(sys, "argv", ["inspect", f"{stage_1}/learngene.safetensors", "--plot", str(picture)])
    assert inspect_learngene.main() == 0
    text = capsys.readouterr().out
    assert re.search(r"^  the rest +[\d,]+ +[\d.]+%$", text, re.MULTILINE)
    assert "the Des-Net has width 32, this learngene 64" not in text.partition("Des-Nets")[0]
    assert picture.stat().st_size > 10_000


def test_no_published_format(stage_1: Path, tmp_path: Path):
    gene = models.load_learngene(stage_1 / "learngene.safetensors")
    with pytest.raises(InputError, match="Toy has no published format"):
        save_published(gene, tmp_path / "toy.pth")


# ---------------------------------------------------------------------------------------------------------------------
# The registry
# ---------------------------------------------------------------------------------------------------------------------


def test_unknown_methods_are_refused():
    with pytest.raises(InputError, match="unknown method 'grow': expected one of lets, elastic, tleg"):
        method_class("grow")
    with pytest.raises(InputError, match="unknown method"):
        models.Learngene("grow", {}, {"num_classes": 1, "in_chans": 3}).aux_net()


def test_a_name_belongs_to_one_class():
    with pytest.raises(ValueError, match="'lets' is registered already, as LeTs"):
        models.register_method("lets")(Toy)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ("--method grow --model aux_deit_nano_patch8_16", "--method: unknown method 'grow'"),
        ("--method lets --src-arch deit_nano_patch8_16_L2_H1", "--tgt-arch is missing: stage 1 of LeTs needs"),
        ("--method tleg --model resnet18", "--model resnet18 is no Aux-Net of TLEG"),
        ("--method tleg --src-arch deit_nano_patch8_16_L2", "--model is missing: stage 1 of TLEG needs --model"),
        ("--method tleg --load-gene x", "--model is missing"),
    ],
)
def test_method_on_the_command_line(options: str, found: str, capfd: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as end:
        main.main([*SHORT.split(), *options.split()])
    assert end.value.code == 2
    assert capfd.readouterr().err.startswith(f"error: {found}")


# ---------------------------------------------------------------------------------------------------------------------
# No branch on a method outside its file
# ---------------------------------------------------------------------------------------------------------------------

OWN_FILES = ("models/lets.py", "models/tleg.py", "models/formats/published_lets.py")
MEASUREMENTS = ("benchmarks/device.py", "device_check/fast.py")  # a list of what is measured names methods
BRANCHES = (
    r"""['"](lets|tleg)['"]""",
    r"""[=!]= *['"](LeTs|TLEG)['"]""",
    r"isinstance\([^)]*\b(LeTs|TLEG)\b",
    r"type\([^)]*\) (is|==) [\w.]*\b(LeTs|TLEG)\b",
    r"\bcase ['\"]?[\w.]*(lets|tleg|LeTs|TLEG)\b",
)


def test_no_code_outside_its_file_branches_on_a_method():
    files = [path for path in REPOSITORY.glob("*/**/*.py") if path.relative_to(REPOSITORY).parts[0][0] != "."]
    found = []
    for path in [*REPOSITORY.glob("*.py"), *files]:
        name = path.relative_to(REPOSITORY).as_posix()
        if name.startswith(("tests/", "output/")) or name in OWN_FILES + MEASUREMENTS:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found += [f"{name}:{number}: {line.strip()}" for pattern in BRANCHES if re.search(pattern, line)]
    assert len(files) > 50
    assert found == []
