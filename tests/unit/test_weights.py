"""Weights as people have them: in other precisions, under other names, without a head, and averaged."""

import argparse
import collections
import datetime
import pathlib
from collections.abc import Callable
from pathlib import Path

import models
from common.files import read_checkpoint
from models.formats.weights import weights_of
from training.build_model import create_sized
from training.foreign_weights import load_foreign_weights

import numpy as np
import pytest
import timm
import torch
from state_dicts import NAME, Weights, cast, equal, prefixed, without

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
DIGITS = "--data-set DIGITS --batch-size 32 --num-workers 0 --warmup-epochs 0"
TRAIN = f"{DIGITS} --train-images 64 --epochs 1 --lr 4e-2 --model-ema-decay 0.5"


def with_tokens(kind: str = "vit_base_patch16_224", classes: int = 10, **kwargs) -> Weights:
    """A ViT of the sizes of `NAME` as timm has it, with a class token."""
    torch.manual_seed(1)
    sizes = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2)
    return timm.create_model(kind, num_classes=classes, **sizes, **kwargs).state_dict()


def own_weights() -> Weights:
    torch.manual_seed(0)
    return models.create_model(NAME, num_classes=10).state_dict()


def load(content: object, path: Path, other_head: bool = True, model: torch.nn.Module | None = None) -> Weights:
    """What --finetune, or --teacher-path, takes of a file."""
    torch.save(content, path)
    model = create_sized(NAME, 10, 32) if model is None else model
    load_foreign_weights(model, str(path), "--finetune" if other_head else "--teacher-path", other_head)
    return model.state_dict()


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------

LIGHTNING = {"epoch": 1, "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}], "callbacks": {"a": {}}}
WRAPPED: dict[str, Callable[[Weights], object]] = {
    "model_state_dict": lambda w: {"model_state_dict": w, "optimizer_state_dict": {"state": {}}, "epoch": 3},
    "any key": lambda w: {"my_net": w, "epoch": 3},
    "deep": lambda w: {"a": {"b": {"weights": w}}},
    "beside a name": lambda w: {"model": "vit", "net": w},
    "in a tuple": lambda w: (w, {"epoch": 3}),
    "prefix": lambda w: prefixed("model.", w),
    "lightning": lambda w: {"state_dict": prefixed("model.", w), **LIGHTNING},
    "three prefixes": lambda w: {"state_dict": prefixed("module.model.backbone.", w)},
    "prefix without a dot": lambda w: prefixed("student_", w),
    "compiled block": lambda w: {name.replace("blocks.0.", "blocks.0._orig_mod."): t for name, t in w.items()},
    "not the average": lambda w: {"ema_state_dict": cast(w, torch.float64), "state_dict": w},
    "with a number": lambda w: {**w, "epoch": 3, "note": None},
    "the average alone": lambda w: {"model_ema": w},
    "teacher": lambda w: {"student": prefixed("b.", with_tokens()), "teacher": prefixed("b.", w)},
    "loss with a buffer": lambda w: {"dino_loss": {"center": torch.ones(3)}, "encoder": w, "center": torch.ones(3)},
    "beside a text tower": lambda w: {**prefixed("text.", {"a": torch.ones(3)}), **prefixed("image.trunk.", w)},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_weights_are_found_whatever_their_key_and_prefix(tmp_path, kind):
    weights = own_weights()
    assert equal(load(WRAPPED[kind](weights), tmp_path / "file.pth"), weights)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            lambda w: {"state_dict": w, "state_dict_ema": w | {}},
            "under 'state_dict' are taken, not those under stat",
        ),
        (lambda w: {"student": w, "teacher": cast(w, torch.float64)}, "under 'teacher' are taken, not those under stu"),
        (lambda w: prefixed("image.", w) | {"text.a": torch.ones(3)}, "named image.… are taken; left out: 1, such as"),
        (lambda w: cast(w, torch.float16), "its float16 tensors are read as float32"),
    ],
)
def test_a_choice_is_said(tmp_path, capsys, content, said):
    load(content(own_weights()), tmp_path / "file.pth")
    assert capsys.readouterr().out.count(said) == 1


def test_weights_whose_sum_overflows_are_finite(tmp_path):
    large = own_weights() | {"head.bias": torch.full((10,), 3e38)}
    assert equal(load(large, tmp_path / "large.pth", other_head=False), large)
    with pytest.raises(models.InputError, match=r"head\.bias holds values that are not finite"):
        load(large | {"head.bias": torch.tensor([3e38] * 9 + [torch.inf])}, tmp_path / "infinite.pth")


def test_dictionaries_that_are_many_in_few_are_searched_once(tmp_path):
    content: dict = {"a": 1}
    for _ in range(5):
        content = {str(i): content for i in range(1000)}
    with pytest.raises(models.InputError, match="holds no weights"):
        load(content, tmp_path / "file.pth")


@pytest.mark.parametrize("method", ["lets", "tleg"])
def test_learngene_under_other_names(tmp_path, method):
    file = torch.load(FIXTURES / f"{method}_learngene.pth", weights_only=False)
    expected = models.load_learngene(FIXTURES / f"{method}_learngene.pth", head_dim=4)
    for content in (
        {"model_state_dict": file["model"], "best": np.float64(3)},
        {"state_dict": prefixed("net.", file["model"])},
        {**file, "best": np.float64(3)},
    ):
        torch.save(content, tmp_path / "gene.pth")
        found = models.load_learngene(tmp_path / "gene.pth", head_dim=4)
        assert equal(found.tensors, expected.tensors)
        assert found.config == expected.config


# ---------------------------------------------------------------------------------------------------------------------
# Heads and tokens
# ---------------------------------------------------------------------------------------------------------------------


def dino() -> dict:
    head = {"head.mlp.0.weight": torch.zeros(3, 64), "head.last_layer.weight_g": torch.zeros(3, 1)}
    student, teacher = (without(with_tokens(), "head.") for _ in range(2))
    return {
        "student": prefixed("module.backbone.", student) | prefixed("module.", head),
        "teacher": prefixed("backbone.", teacher) | head,
        "dino_loss": {"center": torch.ones(1, 3)},
        "args": argparse.Namespace(arch="vit"),
    }


def mae() -> dict:
    decoder = {"decoder_embed.weight": torch.zeros(3, 64), "decoder_blocks.0.norm1.weight": torch.zeros(3)}
    return {"model": without(with_tokens(), "head.") | decoder | {"mask_token": torch.zeros(1, 1, 3)}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (with_tokens, ["a class token, this model none: cls_token and its position left out"]),
        (
            lambda: with_tokens("deit_base_distilled_patch16_224"),
            ["dist_token, their positions and head_dist left"],
        ),
        (dino, ["under 'teacher'", "backbone.…", "cls_token and its position", "no head (head): it is re-initialised"]),
        (lambda: {"teacher": prefixed("backbone.", without(with_tokens(), "head."))}, ["cls_token", "no head (head)"]),
        (
            mae,
            [
                "cls_token and its position",
                "no head (head): it is re-initialised",
                "training needed is left out: decoder",
            ],
        ),
    ],
    ids=["class token", "distilled", "dino", "dino backbone", "mae"],
)
def test_class_token_and_head_that_are_not_needed(tmp_path, capsys, content, said):
    file = content()
    found, shown = load(file, tmp_path / "file.pth"), capsys.readouterr().out
    for line in [*said, "its norm, applied before pooling, is taken for fc_norm"]:
        assert shown.count(line) == 1
    source = with_tokens("deit_base_distilled_patch16_224") if "dist_token" in file else with_tokens()
    tokens = 2 if "dist_token" in file else 1
    assert torch.equal(found["pos_embed"], source["pos_embed"][:, tokens:])
    assert torch.equal(found["fc_norm.weight"], source["norm.weight"])
    names = [name for name in found if name.startswith(("blocks.", "patch_embed."))]
    assert all(torch.equal(found[name], source[name]) for name in names)
    assert torch.equal(found["head.weight"], source["head.weight"]) == ("no head" not in shown)


def test_positions_without_the_class_token_are_resampled(tmp_path):
    large = with_tokens() | {"pos_embed": torch.randn(1, 1 + 36, 64)}
    found = load(large, tmp_path / "file.pth")
    plain = without(large, "cls_token") | {"pos_embed": large["pos_embed"][:, 1:]}
    assert torch.equal(found["pos_embed"], load(plain, tmp_path / "file.pth")["pos_embed"])


def test_distillation_token_for_a_network_with_a_class_token(tmp_path):
    sizes = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=10)
    vit, source = timm.create_model("vit_base_patch16_224", **sizes), with_tokens("deit_base_distilled_patch16_224")
    found = load(source, tmp_path / "file.pth", model=vit)
    assert torch.equal(found["cls_token"], source["cls_token"])
    assert torch.equal(found["pos_embed"], source["pos_embed"][:, [0, *range(2, 18)]])


@pytest.mark.parametrize(
    ("content", "other_head", "said"),
    [
        (
            lambda: without(own_weights(), "head."),
            False,
            ("no head.weight", "the head that is needed", "keys pos_embed"),
        ),
        (dino, False, ("no head.weight", "the head that is needed")),
        (lambda: with_tokens(classes=7), False, ("has 7 classes, the data 10",)),
        (lambda: with_tokens(reg_tokens=4), True, ("pos_embed has (1, 20, 64)", "found the keys reg_token")),
        (
            lambda: without(own_weights(), "blocks.1."),
            True,
            ("blocks.1.norm1.weight has nothing", "keys pos_embed"),
        ),
        (lambda: {"optimizer": {"a": torch.ones(1)}, "epoch": 3}, True, ("no weights", "the keys optimizer, epoch")),
        (lambda: own_weights() | {"a.b": torch.ones(1)}, True, ("a.b has (1,)", "found the keys a.b")),
        (
            lambda: cast(own_weights(), torch.float64) | {"head.bias": torch.tensor([1e300] * 10, dtype=torch.float64)},
            True,
            ("finite",),
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_its_keys(tmp_path, content, other_head, said):
    with pytest.raises(models.InputError) as error:
        load(content(), tmp_path / "file.pth", other_head)
    assert all(part in str(error.value) for part in said), error.value


def test_no_class_token_for_a_network_that_has_one(tmp_path):
    sizes = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=10)
    with pytest.raises(models.InputError, match=r"it has no cls_token: found pos_embed \(1, 16, 64\)"):
        load(own_weights(), tmp_path / "file.pth", model=timm.create_model("vit_base_patch16_224", **sizes))


# ---------------------------------------------------------------------------------------------------------------------
# Plain data beside the weights
# ---------------------------------------------------------------------------------------------------------------------

PLAIN = {
    "float64": np.float64(3),
    "float32": np.float32(2.5),
    "int64": np.int64(-3),
    "bool": np.bool_(True),
    "big-endian": np.dtype(">f8").type(3),
    "text": np.str_("a"),
    "path": pathlib.Path("/a/b"),
    "date": datetime.datetime(2026, 1, 2),
    "defaultdict": collections.defaultdict(list, a=[1]),
    "options": argparse.Namespace(lr=np.float64(1e-3), output_dir=pathlib.Path("a")),
}


@pytest.mark.parametrize("legacy", [False, True])
def test_plain_data_beside_the_weights(tmp_path, legacy):
    weights = own_weights()
    arrays = {"state": np.random.default_rng(0).integers(9, size=(2, 3)), "none": np.zeros(0), "f": np.ones((2, 3)).T}
    content = {"model": weights, **PLAIN, **arrays}
    torch.save(content, tmp_path / "file.pth", _use_new_zipfile_serialization=not legacy)
    found = read_checkpoint(tmp_path / "file.pth")
    text = {"path": "/a/b", "options": argparse.Namespace(lr=1e-3, output_dir="a")}
    assert {name: found[name] for name in PLAIN} == PLAIN | text
    assert all(np.array_equal(found[name].array, arrays[name]) for name in arrays)
    assert equal(weights_of(found, tmp_path / "file.pth"), weights)


def test_numbers_that_older_numpy_has_written(tmp_path):
    torch.save({"model": own_weights(), "best": np.float64(3)}, tmp_path / "new", _use_new_zipfile_serialization=False)
    content = (tmp_path / "new").read_bytes()
    old, new = b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n"
    assert (old in content) != (new in content)
    for name, before, after in (("old", new, old), ("newer", old, new)):
        (tmp_path / name).write_bytes(content.replace(before, after))
        assert read_checkpoint(tmp_path / name)["best"] == 3


class Trap:
    """What would run when it is read, if anything did."""

    def __init__(self, function: Callable, *args: object):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def nested() -> list:
    """A list of lists of …: terabytes as text, in a kilobyte."""
    lists: list = ["x"]
    for _ in range(40):
        lists = [lists, lists]
    return lists


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda folder: Trap(open, str(folder / "ran"), "w"), "open"),
        (lambda folder: Trap(eval, f"open({str(folder / 'ran')!r}, 'w')"), "eval"),
        (lambda folder: np.array([Trap(open, str(folder / "ran"), "w"), 1], dtype=object), "numpy.dtype[O8]"),
        (lambda folder: Trap(np.float64(1).__reduce__()[0], np.dtype("O"), b"cbuiltins\nopen\n."), "numpy.dtype[O8]"),
        (lambda folder: np.zeros(2, [("a", "f4")]), "numpy.dtype[V4]"),
        (lambda folder: Trap(torch.torch_version.TorchVersion, nested()), "torch.torch_version.TorchVersion"),
        (lambda folder: Trap(np.dtype, nested()), "numpy.dtype[list]"),
        (lambda folder: Trap(bytes, 2**40), "damaged"),
        (lambda folder: Trap(range, 2**40), "range"),
        (lambda folder: np.dtype("f4").type, "numpy.float32"),
    ],
)
def test_what_could_run_or_grow_is_refused_by_name(tmp_path, content, said):
    torch.save({"model": own_weights(), "best": content(tmp_path)}, tmp_path / "file.pth")
    with pytest.raises(models.InputError) as error:
        read_checkpoint(tmp_path / "file.pth")
    assert said in str(error.value)
    assert not (tmp_path / "ran").exists()
