"""Hidden neurons as a size of their own: names, every kind of ViT, headers, both methods, baselines."""

import json
import math
from dataclasses import replace

import models
from models.axes import split
from models.baselines import check_source, source_arch, stacking, weight_selection
from models.cosine import front
from models.formats.timm_folder import read_model, save_model
from models.learngene import to_published
from models.meta import WeightsOnMeta
from models.pruning import prune
from models.vit import MAX_MLP_RATIO, timm_kwargs

import pytest
import timm
import torch
from kinds_of_vit import CLASSES, case_of, every_architecture, every_structure
from safetensors import safe_open
from safetensors.torch import load_file, save_file

PLAIN = "deit_nano_patch16_32_L4_H3"


def hidden_of(vit: torch.nn.Module) -> int:
    return vit.blocks[0].mlp.fc2.in_features


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "label", "hidden"),
    [
        ("deit_tiny_patch16_224_L12@L6-H3-M2", "L6-H3-M2", 384),
        ("deit_tiny_patch16_224_L12@L6-H2-M2.5", "L6-H2-M2.5", 320),
        ("deit_tiny_patch16_224_L12@L6-H3-M4", "L6-H3", 768),
        ("deit_tiny_patch16_224_L12@L6-H3", "L6-H3", 768),
        ("vit_small_patch16_224@L6-H3-M2", "L6-H3-M2", 384),
        ("vit_small_patch16_224.augreg_in1k@L6-H3-M0.1", "L6-H3-M0.1", 19),
        ("vit_so400m_patch14_siglip_224@L6-H16-M2.50", "L6-H16-M2.5", 2880),
    ],
)
def test_names(name, label, hidden):
    arch = models.parse_arch(name)
    assert (arch.label, arch.hidden, hidden_of(models.create_model(name, depth=1))) == (label, hidden, hidden)
    assert models.parse_arch(models.name_of(arch)) == arch
    assert models.is_vit(models.name_of(arch))
    assert models.parse_arch(f"@{label}", replace(arch, depth=1)) == arch
    assert label in str(arch)


def test_name_without_a_ratio_keeps_that_of_the_vit_at_hand():
    base = models.parse_arch("vit_small_patch16_224@L6-H3-M2")
    assert models.parse_arch("@L4-H2", base).hidden == 256
    assert models.parse_arch("@L4-H2-M4", base) == models.parse_arch("vit_small_patch16_224@L4-H2")


@pytest.mark.parametrize("hidden", [1, 3, 100, 129, 383, 1000])
def test_every_number_of_hidden_neurons_has_a_name(hidden):
    for name in (PLAIN, "vit_tiny_patch16_224"):
        arch = models.parse_arch(name)
        arch = replace(arch, mlp_ratio=hidden / arch.width)
        assert arch.hidden == hidden
        assert models.parse_arch(models.name_of(arch)) == arch


def test_equal_vits_are_equal():
    arch = models.parse_arch(PLAIN)
    assert replace(arch, mlp_ratio=4) == replace(arch, mlp_ratio=4.0) == arch
    assert hash(replace(arch, mlp_ratio=2)) == hash(replace(arch, mlp_ratio=2.0))
    assert "mlp_ratio" not in arch.as_dict()


@pytest.mark.parametrize("ratio", [0, -1, math.nan, math.inf, MAX_MLP_RATIO + 1, 10**400, 0.001])
def test_impossible_ratios_are_refused(ratio):
    for name in (PLAIN, "vit_tiny_patch16_224"):
        with pytest.raises(models.InputError, match="mlp_ratio"):
            replace(models.parse_arch(name), mlp_ratio=ratio)


@pytest.mark.parametrize("name", ["@L2-H1-M", "@L2-H1-M2x", "@L2-H1-M-2", "@L2-H1-M1e3", "@L2-H1-M2-M2", "@L2-M2"])
def test_names_that_are_none(name):
    with pytest.raises(models.InputError, match=r"-M\{ratio\}"):
        models.parse_arch(f"{PLAIN}{name}")


# ---------------------------------------------------------------------------------------------------------------------
# Every kind
# ---------------------------------------------------------------------------------------------------------------------


@every_architecture
def test_hidden_neurons_are_those_of_timms_model(kind):
    own = models.parse_arch(kind)
    assert replace(own, mlp_ratio=own.hidden / own.width) == own
    case = case_of(kind)
    for ratio, arch in zip((0.3, 1, 2.5, own.hidden / own.width / 2), 2 * (case.narrow, case.src), strict=True):
        arch = replace(arch, mlp_ratio=ratio)
        with WeightsOnMeta():
            vit = timm.create_model(kind, num_classes=CLASSES, **json.loads(json.dumps(timm_kwargs(arch))))
        assert hidden_of(vit) == arch.hidden
        assert arch.num_params(CLASSES) == sum(p.numel() for p in vit.parameters())
        unit = 64 if hasattr(vit.blocks[0].mlp, "fc1_g") else 1  # some are multiples of 8 or 64
        assert int(ratio * arch.width + 1e-6) <= arch.hidden < int(ratio * arch.width) + unit + 1
        smaller, larger = arch.macs(CLASSES), replace(arch, mlp_ratio=None).macs(CLASSES)
        assert (smaller < larger) == (arch.hidden < replace(arch, mlp_ratio=None).hidden)


@every_structure
def test_des_nets_have_the_first_hidden_neurons(kind):
    case = case_of(kind)
    source, images, half = case.source(), case.images(), case.src.hidden / case.src.width / 2
    lets = models.Learngene.of(case.aux_net(source.state_dict()))
    tleg = models.Learngene.of(models.TLEG(case.src, num_classes=CLASSES))
    own = split(source.state_dict())
    arch = replace(case.src, mlp_ratio=half)
    assert arch.hidden < case.src.hidden
    for name, tensor in split(lets.descend(arch).state_dict()).items():
        assert torch.equal(tensor, own[name][tuple(map(slice, tensor.shape))]), name
    for gene, sizes in ((lets, (case.narrow, case.src, case.wide)), (tleg, (case.narrow, case.src))):
        for size in sizes:
            for width_select in ("continuous", "l2_top"):
                vit = gene.descend(replace(size, mlp_ratio=half), width_select=width_select).eval()
                assert hidden_of(vit) == replace(size, mlp_ratio=half).hidden
                assert vit(images).isfinite().all()
        largest = gene.arch
        with pytest.raises(models.InputError, match=f"up to {largest.hidden} ") as refusal:
            gene.descend(replace(largest, mlp_ratio=3 * half))
        assert f"{replace(largest, mlp_ratio=3 * half).hidden} hidden neurons" in str(refusal.value)


@every_structure
def test_baselines_cut_hidden_neurons(kind):
    case = case_of(kind)
    weights, half = case.source().state_dict(), case.src.hidden / case.src.width / 2
    smaller, larger = replace(case.narrow, mlp_ratio=half), replace(case.src, mlp_ratio=3 * half)
    for baseline in (weight_selection, prune, front):
        made = baseline(weights, case.src, smaller)
        check_source(made, smaller)
        assert source_arch(made, case.src).hidden == smaller.hidden
    for baseline in (weight_selection, prune, stacking):
        with pytest.raises(models.InputError, match="hidden neurons") as refusal:
            baseline(weights, case.src, larger)
        assert str(case.src.hidden) in str(refusal.value)
    check_source(front(weights, case.src, larger), larger)


@every_structure
def test_aux_net_and_learngene_have_their_own_ratios(kind, tmp_path):
    case = case_of(kind)
    half = case.src.hidden / case.src.width / 2
    src, tgt = replace(case.src, mlp_ratio=half), replace(case.tgt, mlp_ratio=2.5 * half)
    torch.manual_seed(0)
    source = models.create_vit(src, num_classes=CLASSES).eval()
    aux = models.create_aux_net(src, tgt, num_classes=CLASSES).eval()
    aux.start_from(source.state_dict())
    images, gene = case.images(), models.Learngene.of(aux)
    with torch.no_grad():
        assert torch.equal(gene.descend(src).eval()(images), source(images))
        layers = [*range(tgt.depth)]
        torch.testing.assert_close(gene.descend(tgt, layers, layers).eval()(images), aux(images), rtol=1e-4, atol=1e-4)
    gene.save(tmp_path / "learngene.safetensors")
    loaded = models.load_learngene(tmp_path / "learngene.safetensors")
    assert (loaded.arch, loaded.header["src_arch"]) == (tgt, src.as_dict())
    save_model(source, tmp_path, src, model_args={}, data_config={"input_size": (3, 32, 32), "crop_pct": 1.0})
    vit, config = read_model(tmp_path)
    alone = timm.create_model(config["architecture"], num_classes=CLASSES, **config["model_args"]).eval()
    alone.load_state_dict(load_file(tmp_path / "model.safetensors"))
    with torch.no_grad():
        assert torch.equal(alone(images), source(images))
        assert torch.equal(vit.eval()(images), source(images))
    with pytest.raises(models.InputError, match="fewer than the learngene"):
        models.create_aux_net(tgt, replace(case.tgt, mlp_ratio=half / 2))


# ---------------------------------------------------------------------------------------------------------------------
# Plain ViTs
# ---------------------------------------------------------------------------------------------------------------------


def test_more_hidden_neurons_than_the_learngene_come_from_its_matrices():
    """A Des-Net as wide as the Aux-Net: M alone is cut, and what is left is that of the Aux-Net."""
    torch.manual_seed(0)
    aux = models.create_aux_net("deit_nano_patch16_32_L2_H1", PLAIN, num_classes=CLASSES)
    gene, layers = models.Learngene.of(aux), [0, 1, 2, 3]
    largest = split(gene.descend(PLAIN, layers, layers).state_dict())
    for name, hidden in ((f"{PLAIN}@L4-H3-M3", 288), (f"{PLAIN}@L4-H3-M1", 96)):
        vit = split(gene.descend(name, layers, layers).state_dict())
        assert vit["blocks.1.mlp.fc1.weight"].shape == (hidden, 96)
        for key, tensor in vit.items():
            if not (hidden < 128 and "fc2.weight" in key):  # whose sums over the learngene's neurons are shorter
                kept = largest[key][tuple(map(slice, tensor.shape))]
                torch.testing.assert_close(tensor, kept, msg=key)


def test_full_width_matrices_keep_as_many_rows():
    aux = models.create_aux_net("deit_nano_patch16_32_L2_H1", PLAIN, full_width=True, num_classes=CLASSES)
    vit = models.Learngene.of(aux).descend(f"{PLAIN}@L2-H3-M2")
    assert (vit.embed_dim, hidden_of(vit)) == (96, 192)


def test_published_formats_are_for_the_published_ratio():
    ratio = f"{PLAIN}@L4-H3-M2"
    genes = [models.create_aux_net("deit_nano_patch16_32_L2_H1", ratio), models.TLEG(models.parse_arch(ratio))]
    for aux in genes:
        with pytest.raises(models.InputError, match="MLP ratio of 4, this learngene has 2"):
            to_published(models.Learngene.of(aux))


DAMAGED = ["2", True, None, [2], {}, 0, -1, math.nan, math.inf, 1e300, 10**400, 2.1, 1]


@pytest.mark.parametrize("name", [f"{PLAIN}@L4-H3-M2", "vit_tiny_patch16_224@L4-H3-M2"])
def test_damaged_ratios_of_a_header_are_refused_in_one_line(name, tmp_path):
    path = tmp_path / "learngene.safetensors"
    models.Learngene.of(models.TLEG(models.parse_arch(name), num_classes=CLASSES)).save(path)
    assert models.load_learngene(path).arch.mlp_ratio == 2
    with safe_open(path, "pt") as file:
        header, tensors = json.loads(file.metadata()["learngene"]), load_file(path)
    for ratio in DAMAGED:
        damaged = {**header, "tgt_arch": {**header["tgt_arch"], "mlp_ratio": ratio}}
        save_file(tensors, path, {"learngene": json.dumps(damaged)})
        with pytest.raises(models.InputError) as refusal:
            models.load_learngene(path)
        assert "\n" not in str(refusal.value)
        assert len(str(refusal.value)) < 1000
