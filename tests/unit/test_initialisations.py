"""What stage 2 can choose, and the initialisations that need no learngene, on weights small enough to check by hand."""

from dataclasses import replace

import main
import models
from models import selection
from models.axes import stack_layers
from models.depth_mapping import groups_of_layers, select_depth
from models.learngene import PARTS, save_published
from models.names import parse_arch
from models.selection import WIDTH_SELECTIONS
from models.vit import described

import pytest
import torch
from conftest import set_up_run
from torch.utils.flop_counter import FlopCounterMode

DIGITS = "--data-set DIGITS --num-workers 0 --batch-size 64 --warmup-epochs 0 --device cpu"


# ---------------------------------------------------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deit_nano_patch4_16_L3", "deit_tiny_patch16_224_L3_H5", "deit_micro_patch7_28_L1"])
@pytest.mark.parametrize(("num_classes", "in_chans"), [(10, 3), (1000, 1)])
def test_counts_from_shapes_are_those_of_the_model(name, num_classes, in_chans):
    arch = models.parse_arch(name)
    vit = models.create_model(name, num_classes=num_classes, in_chans=in_chans).eval()
    assert arch.num_params(num_classes, in_chans) == sum(p.numel() for p in vit.parameters())
    for block in vit.blocks:
        block.attn.fused_attn = False  # torch's counter knows its products of matrices
    with FlopCounterMode(display=False) as counter:
        vit(torch.zeros(1, in_chans, arch.img_size, arch.img_size))
    assert 2 * arch.macs(num_classes, in_chans) == counter.get_total_flops()


# ---------------------------------------------------------------------------------------------------------------------
# Width of TLEG
# ---------------------------------------------------------------------------------------------------------------------


def tleg(width: int = 16, heads: int = 4) -> models.Learngene:
    torch.manual_seed(0)
    aux_net = models.TLEG(models.ViTArch(width, 3, heads, 4, 8), num_classes=3)
    with torch.no_grad():
        for parameter in aux_net.parameters():
            parameter.normal_()
    return models.Learngene.of(aux_net)


@pytest.mark.parametrize("how", WIDTH_SELECTIONS)
def test_narrow_des_net_of_tleg_is_aligned(how):
    """A ViT of width 16 whose neurons outside the chosen ones are silent is the one of width 8 that keeps them."""
    gene = tleg()
    wide = gene.descend(replace(gene.arch, depth=2)).state_dict()
    neurons = selection.choose_neurons(wide, replace(gene.arch, depth=2, width=8, num_heads=2), how)
    assert [len(n) for n in (neurons.embedding, *neurons.heads)] == [8, 8, 8]
    narrow = gene.descend(replace(gene.arch, depth=2, width=8, num_heads=2), width_select=how).state_dict()
    images = torch.randn(2, 3, 8, 8)
    # q·kᵀ of the kept heads is that of the wide ViT, if its input is silent elsewhere
    x = torch.zeros(1, 4, 16)
    x[..., neurons.embedding] = torch.randn(1, 4, 8)
    q, k, _ = (x @ wide["blocks.1.attn.qkv.weight"].T + wide["blocks.1.attn.qkv.bias"]).chunk(3, dim=-1)
    inner = x[..., neurons.embedding] @ narrow["blocks.1.attn.qkv.weight"].T + narrow["blocks.1.attn.qkv.bias"]
    q_narrow, k_narrow, _ = inner.chunk(3, dim=-1)
    kept = [int(head) // 4 for head in neurons.heads[1][::4]]
    for i, head in enumerate(kept):
        here, there = slice(4 * i, 4 * i + 4), slice(4 * head, 4 * head + 4)
        expected = q[..., there] @ k[..., there].mT
        torch.testing.assert_close(q_narrow[..., here] @ k_narrow[..., here].mT, expected)
        # proj sees the same heads
        rows = wide["blocks.1.attn.proj.weight"][neurons.embedding]
        assert torch.equal(narrow["blocks.1.attn.proj.weight"][:, here], rows[:, there])
    assert torch.equal(narrow["pos_embed"], wide["pos_embed"][..., neurons.embedding])
    hidden = neurons.hidden[1]
    assert torch.equal(narrow["blocks.1.mlp.fc2.weight"], wide["blocks.1.mlp.fc2.weight"][neurons.embedding][:, hidden])
    assert torch.equal(narrow["blocks.1.mlp.fc1.bias"], wide["blocks.1.mlp.fc1.bias"][hidden])
    vit = gene.descend(replace(gene.arch, depth=2, width=8, num_heads=2), width_select=how).eval()
    assert vit(images).shape == (2, 3)


def test_magnitude_selection_of_tleg_keeps_the_largest():
    gene = tleg()
    with torch.no_grad():
        gene.tensors["patch_embed_weight"][[3, 7]] *= 100
        gene.tensors["B_qkv_weight"].view(3, 4, 4, 16)[:, 2] *= 100
        gene.tensors["B_fc1_weight"][40:44] *= 100
    wide = gene.descend(gene.arch).state_dict()
    top = selection.choose_neurons(wide, replace(gene.arch, width=4, num_heads=1), "l2_top")
    assert {3, 7} <= set(top.embedding.tolist())
    assert top.heads[0].tolist() == [8, 9, 10, 11]
    assert {40, 41, 42, 43} <= set(top.hidden[0].tolist())
    bottom = selection.choose_neurons(wide, replace(gene.arch, width=12, num_heads=3), "l1_bottom")
    assert not {3, 7} & set(bottom.embedding.tolist())
    assert bottom.heads[0].tolist() == [*range(8), *range(12, 16)]


def test_selection_of_all_neurons_is_the_identity():
    gene = tleg()
    wide = gene.descend(gene.arch).state_dict()
    for how in WIDTH_SELECTIONS:
        kept = selection.keep_neurons(wide, selection.choose_neurons(wide, gene.arch, how))
        assert kept.keys() == wide.keys()
        assert all(torch.equal(kept[name], wide[name]) for name in wide)


# ---------------------------------------------------------------------------------------------------------------------
# Depth, and parts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "depth", "coeff"),
    [
        ("even", 4, [0, 4, 8, 12]),
        ("even", 12, [0, 0, 2, 4, 4, 6, 8, 8, 10, 12, 12, 14]),
        ("first", 3, [0, 2, 4]),
        ("first", 10, [0, 0, 2, 2, 4, 6, 8, 10, 12, 14]),
        ("last", 3, [10, 12, 14]),
        ("last", 10, [0, 2, 4, 6, 8, 10, 12, 12, 14, 14]),
        ("last", 18, [0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 12, 14, 14, 14]),
        ("pairs:0,3", 4, [0, 2, 12, 14]),
        ("pairs:1", 3, [4, 4, 6]),
        ("pairs:1,2", 2, [4, 10]),
    ],
)
def test_depth_strategies(how, depth, coeff):
    layer, found = select_depth(depth, groups_of_layers(8, 16, 2, 2), layers_per_row=2, how=how)
    assert found == coeff
    assert [i // 4 for i in layer] == [r // 4 for r in coeff]  # each row with the pair that it was trained with


def test_depth_strategy_makes_the_des_net_of_its_lists():
    aux_net = models.create_aux_net(models.ViTArch(4, 4, 1, 4, 8), models.ViTArch(8, 8, 2, 4, 8), num_classes=3)
    gene = models.Learngene.of(aux_net)
    arch = replace(gene.arch, depth=3)
    layer, coeff = select_depth(3, groups_of_layers(4, 8, 2, 2), layers_per_row=2, how="last")
    expected, found = (
        gene.descend(arch, layer, coeff).state_dict(),
        gene.descend(arch, depth_select="last").state_dict(),
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(not torch.equal(found[name], w) for name, w in gene.descend(arch).state_dict().items())


@pytest.mark.parametrize("skipped", [[part] for part in PARTS] + [["attn", "mlp"]])
def test_skipped_parts_and_no_others_stay_random(skipped):
    gene = tleg()
    whole = gene.descend(gene.arch).state_dict()
    found = gene.descend(gene.arch, skip_init=skipped).state_dict()
    fresh = {name for name in whole if not torch.equal(found[name], whole[name])}
    assert fresh == {name for name in whole if any(PARTS[part] in name for part in skipped)}
    for name in fresh:  # as timm initialises them
        if name.endswith("bias"):
            assert not found[name].any() or "patch_embed" in name
        elif "norm" in name:
            assert (found[name] == 1).all()
        else:
            assert found[name].std() < 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Ablations of stage 1
# ---------------------------------------------------------------------------------------------------------------------


def test_every_layer_a_mixture_of_all_learngene_layers():
    """LiGO's depth expansion: W_i = Σ_j g[i, j] · W_j over all learngene layers j, without sharing of rows."""
    torch.manual_seed(0)
    src, tgt = models.ViTArch(4, 3, 1, 4, 8), models.ViTArch(4, 5, 1, 4, 8)
    aux_net = models.create_aux_net(src, tgt, layers_per_row=1, group_size=3, num_classes=3)
    p = dict(aux_net.named_parameters())
    assert p["g"].shape == (8, 5, 3)
    with torch.no_grad():
        p["g"].normal_()
        p["h"].normal_()
    vit = aux_net.to_vit()
    m = aux_net.structure.modules.index("blocks.*.mlp.fc1")
    for i in range(5):
        weight = sum(p["g"][m, i, j] * p["fc1_weight"][j] for j in range(3))
        bias = sum(p["h"][m, i, j] * p["fc1_bias"][j] for j in range(3))
        torch.testing.assert_close(vit.blocks[i].mlp.fc1.weight, weight)
        torch.testing.assert_close(vit.blocks[i].mlp.fc1.bias, bias)


def test_learngene_of_groups_is_saved_and_descends(tmp_path):
    src, tgt = models.ViTArch(4, 6, 1, 4, 8), models.ViTArch(8, 4, 2, 4, 8)
    aux_net = models.create_aux_net(src, tgt, layers_per_row=1, group_size=3, num_classes=3)
    models.Learngene.of(aux_net).save(tmp_path / "gene.safetensors")
    gene = models.load_learngene(tmp_path / "gene.safetensors")
    images = torch.randn(2, 3, 8, 8)
    own = list(range(4))
    torch.testing.assert_close(gene.descend(tgt, own, own).eval()(images), aux_net.eval()(images))
    with pytest.raises(models.InputError, match="published format mixes pairs of layers"):
        save_published(gene, tmp_path / "gene.pth")


@pytest.mark.parametrize("group_size", [0, 1, 7])
def test_refused_groups(group_size):
    src, tgt = models.ViTArch(4, 6, 1, 4, 8), models.ViTArch(8, 4, 2, 4, 8)
    with pytest.raises(models.InputError, match=r"groups of|in groups"):
        models.create_aux_net(src, tgt, group_size=group_size, num_classes=3)


def test_rows_that_are_not_shared():
    aux_net = models.create_aux_net(
        models.ViTArch(4, 4, 1, 4, 8), models.ViTArch(8, 8, 2, 4, 8), layers_per_row=1, num_classes=3
    )
    assert aux_net.g.shape == aux_net.h.shape == (8, 8, 2)
    vit = aux_net.to_vit()
    assert not torch.equal(vit.blocks[0].attn.qkv.weight, vit.blocks[1].attn.qkv.weight)


def randomised_full_width() -> models.LeTs:
    torch.manual_seed(0)
    aux_net = models.create_aux_net(
        models.ViTArch(4, 4, 1, 4, 8), models.ViTArch(12, 4, 3, 4, 8), full_width=True, num_classes=3
    )
    with torch.no_grad():
        for parameter in aux_net.parameters():
            parameter.normal_()
    return aux_net.eval()


def test_full_width_starts_by_keeping_the_old_neurons():
    """LiGO's matrices are [I; A] at the start, of the same distribution as those of LeTs."""
    src, tgt = models.ViTArch(4, 4, 1, 4, 8), models.ViTArch(12, 4, 3, 4, 8)
    aux_net = models.create_aux_net(src, tgt, full_width=True, num_classes=3)
    assert aux_net.E.shape == aux_net.C.shape == (12, 4)
    assert aux_net.Q.shape == (4, 12, 4)
    assert aux_net.M.shape == (4, 48, 16)
    for name in ("E", "C", "Q", "K", "V", "M"):
        matrix, old = getattr(aux_net, name), getattr(aux_net, name).shape[-1]
        assert (matrix[..., :old, :] == torch.eye(old)).all()
        torch.testing.assert_close(matrix.sum(-1), torch.ones(matrix.shape[:-1]))


def test_full_width_against_the_formulas():
    """W = ⟨A⟩ w ⟨B⟩ᵀ with ⟨A⟩ = A: every neuron, also an old one, is a mixture of the learngene's."""
    aux_net = randomised_full_width()
    p, vit = dict(aux_net.named_parameters()), aux_net.to_vit()
    g, h = (
        {m: p[a][i, 0] for i, m in enumerate(("norm1", "q", "k", "v", "proj", "norm2", "fc1", "fc2"))} for a in "gh"
    )

    def mixed(module, kind, one):
        coefficients = (g if kind == "weight" else h)[module]
        return sum(coefficients[j] * one(j) for j in range(2))

    block, E = vit.blocks[0], p["E"]
    q = mixed("q", "weight", lambda j: p["Q"][j] @ p["q_weight"][j] @ E.T)
    torch.testing.assert_close(block.attn.qkv.weight[:12], q)
    proj = mixed("proj", "weight", lambda j: E @ p["proj_weight"][j] @ p["V"][j].T)
    torch.testing.assert_close(block.attn.proj.weight, proj)
    fc2 = mixed("fc2", "weight", lambda j: E @ p["fc2_weight"][j] @ p["M"][j].T)
    torch.testing.assert_close(block.mlp.fc2.weight, fc2, atol=1e-4, rtol=1e-5)
    fc1_bias = mixed("fc1", "bias", lambda j: p["M"][j] @ p["fc1_bias"][j])
    torch.testing.assert_close(block.mlp.fc1.bias, fc1_bias)
    norm = mixed("norm2", "weight", lambda j: E @ p["norm2_weight"][j])
    torch.testing.assert_close(block.norm2.weight, norm)
    torch.testing.assert_close(vit.head.weight, p["head_weight"] @ p["C"].T)
    torch.testing.assert_close(vit.patch_embed.proj.weight.flatten(1), E @ p["patch_embed_weight"].flatten(1))


@pytest.mark.parametrize("how", WIDTH_SELECTIONS)
@pytest.mark.parametrize("heads", [1, 2])
def test_full_width_des_net_has_neurons_of_the_aux_net(how, heads, tmp_path):
    """Also at the learngene's own width: rows of the matrices are kept, never the learngene's neurons as they are."""
    models.Learngene.of(randomised_full_width()).save(tmp_path / "gene.safetensors")
    gene = models.load_learngene(tmp_path / "gene.safetensors")
    wide = gene.descend(gene.arch, width_select=how).state_dict()
    own = list(range(4))
    narrow = gene.descend(replace(gene.arch, width=4 * heads, num_heads=heads), own, own, width_select=how).state_dict()
    emb = selection.choose_rows(gene.tensors["E"], 4 * heads, how)
    assert torch.equal(narrow["pos_embed"], gene.tensors["pos_embed"][..., emb])
    torch.testing.assert_close(narrow["blocks.0.norm1.weight"], wide["blocks.0.norm1.weight"][emb])
    torch.testing.assert_close(narrow["head.weight"], (gene.tensors["head_weight"] @ gene.tensors["C"][emb].T))
    per_head = torch.cat([gene.tensors[a] for a in "QKV"]).unflatten(1, (3, 4)).movedim(1, 0).flatten(1)
    kept = selection.rows_of_heads(selection.choose_rows(per_head, heads, how), 4)
    k_wide = wide["blocks.0.attn.qkv.weight"][12:24][kept][:, emb]
    torch.testing.assert_close(narrow["blocks.0.attn.qkv.weight"][4 * heads : 8 * heads], k_wide)
    proj_wide = wide["blocks.0.attn.proj.weight"][emb][:, kept]
    torch.testing.assert_close(narrow["blocks.0.attn.proj.weight"], proj_wide)


def test_full_width_is_not_written_in_the_published_format(tmp_path):
    with pytest.raises(models.InputError, match="full width"):
        save_published(models.Learngene.of(randomised_full_width()), tmp_path / "gene.pth")


def test_direct_transformation_of_a_trained_vit():
    """With nothing to widen and each layer used once, the Aux-Net that starts from a trained ViT is that ViT."""
    arch = models.ViTArch(8, 4, 2, 4, 8)
    trained = models.create_vit(arch, num_classes=3).eval()
    for full_width in (False, True):
        aux_net = models.create_aux_net(
            arch, arch, layers_per_row=1, group_size=1, full_width=full_width, num_classes=3
        ).eval()
        aux_net.start_from(trained.state_dict())
        images = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(aux_net(images), trained(images))


def test_frozen_learngene_of_a_trained_vit_stays_as_it_is(tmp_path):
    trained = models.create_model("deit_nano_patch4_16_L2", num_classes=10)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(
                0.1 * torch.randn(parameter.shape)
            )  # biases of 0 would leave their coefficients without gradient
    torch.save(trained.state_dict(), tmp_path / "trained.pth")
    options = (
        f"{DIGITS} --src-arch deit_nano_patch4_16_L2 --tgt-arch deit_nano_patch4_16_L4_H3 --full-width --epochs 1 "
        f"--src-path {tmp_path / 'trained.pth'} --freeze-src --no-repeated-aug --output-dir {tmp_path / 'run'}"
    )
    fresh = set_up_run(options.split()).model
    assert main.main(options.split()) == 0
    gene = models.load_learngene(tmp_path / "run" / "learngene.safetensors")
    expected = stack_layers(trained.state_dict(), described(parse_arch("deit_nano_patch4_16_L2"), 10).structure)
    assert all(torch.equal(gene.tensors[name], expected[name]) for name in expected)
    transformation = gene.tensors.keys() - expected.keys()
    assert transformation == {*"ECQKVMgh", "pos_embed"}
    assert not any(torch.equal(gene.tensors[name], fresh.state_dict()[name]) for name in transformation)
    assert gene.config["full_width"] is True
