"""Identities, sizes, mappings, selections and initialisation of both methods."""

from dataclasses import replace

import models
from models import lets
from models.depth_mapping import groups_of_layers, rows_of_coefficients, select_depth
from models.initialisation import DEPTH_SCHEMES, WIDTH_SCHEMES, init_depth, init_width
from models.selection import WIDTH_SELECTIONS

import pytest
import torch
from torch.nn.functional import cross_entropy

MODULES = ("norm1", "q", "k", "v", "proj", "norm2", "fc1", "fc2")
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
AUX = models.ViTArch(width=24, depth=8, num_heads=6, patch_size=8, img_size=16)
SRC = models.ViTArch(width=8, depth=4, num_heads=2, patch_size=8, img_size=16)


def randomised(aux_net: models.AuxNet) -> models.AuxNet:
    """Parameters at random, so that nothing is zero or equal by accident."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in aux_net.parameters():
            p.normal_(std=0.3)
    return aux_net.eval()


def lets_aux(src: models.ViTArch = SRC, tgt: models.ViTArch = AUX, **kwargs) -> models.LeTs:
    return randomised(models.create_aux_net(src, tgt, num_classes=5, **kwargs))


def tleg_aux(arch: models.ViTArch = AUX) -> models.TLEG:
    return randomised(models.TLEG(arch, num_classes=5))


def select(aux_net: models.LeTs, how: str = "continuous") -> dict[str, torch.Tensor]:
    """The learngene of 8 of 16 new neurons, 2 of 4 new heads."""
    arch = replace(AUX, width=16, num_heads=4)
    return lets.select_width(dict(aux_net.named_parameters()), aux_net.structure, SRC, arch, False, how)


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


# ---------------------------------------------------------------------------------------------------------------------
# Counts and identities
# ---------------------------------------------------------------------------------------------------------------------


def test_published_parameter_counts():
    aux_net = models.create_aux_net("deit_small_patch16_224_L8", "deit_base_patch16_224_L16_H12")
    assert parameters(aux_net) == 37_735_784
    assert parameters(models.create_model("deit_small_patch16_224_L8")) == 14_952_040
    counts = {
        size: parameters(models.create_model(f"aux_deit_{size}_patch16_224")) for size in ("tiny", "small", "base")
    }
    assert counts == {"tiny": 1_268_392, "small": 4_305_256, "base": 15_687_400}


@pytest.mark.parametrize("layers_per_row", [1, 2, 3])
def test_lets_des_net_of_the_aux_nets_own_sizes_is_the_aux_net(layers_per_row):
    aux_net = lets_aux(layers_per_row=layers_per_row)
    own = list(range(AUX.depth))
    vit = models.Learngene.of(aux_net).descend(AUX, mapping_layer=own, mapping_layer_coeff=own).eval()
    expanded = aux_net.expand()
    assert all(torch.equal(weight, expanded[name]) for name, weight in vit.state_dict().items())
    assert torch.equal(vit(IMAGES), aux_net(IMAGES))


def test_tleg_des_net_with_the_aux_nets_norm_is_the_aux_net():
    aux_net = tleg_aux()
    assert torch.equal(aux_net.to_vit()(IMAGES), aux_net(IMAGES))
    vit = models.Learngene.of(aux_net).descend(AUX)
    expanded = aux_net.expand()
    renamed = {name.replace("fc_norm", "norm"): weight for name, weight in vit.state_dict().items()}
    assert renamed.keys() == expanded.keys()
    assert all(torch.equal(renamed[name], expanded[name]) for name in expanded)


def test_tleg_layer_is_linear_in_its_position():
    aux_net = tleg_aux()
    weights = models.Learngene.of(aux_net).descend(replace(AUX, depth=5)).state_dict()
    for l in range(5):
        theta = aux_net.B_fc1_weight + l / 5 * aux_net.A_fc1_weight
        torch.testing.assert_close(weights[f"blocks.{l}.mlp.fc1.weight"], theta)


def test_aux_layers_that_share_pair_and_row_are_equal():
    weights = lets_aux().expand()
    assert torch.equal(weights["blocks.2.attn.qkv.weight"], weights["blocks.3.attn.qkv.weight"])
    assert not torch.equal(weights["blocks.1.attn.qkv.weight"], weights["blocks.2.attn.qkv.weight"])


def test_expansion_against_the_formulas_one_weight_at_a_time():
    """The formulas of the method, written out for one layer without any stacking."""
    aux_net = lets_aux()
    p, weights = dict(aux_net.named_parameters()), aux_net.expand()
    i, pair, row = 5, 5 // 4, 5 // 2  # Aux layer 5 of 8: pair 1 of 2, row 2 of 4

    def grown(A: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.eye(A.shape[1]), A])

    for module, out, into in (("fc1", "M", "E"), ("fc2", "E", "M"), ("proj", "E", "V")):
        m = MODULES.index(module)
        W = b = 0
        for c, j in enumerate((2 * pair, 2 * pair + 1)):
            A_out = grown(p[out] if out == "E" else p[out][j])
            A_in = grown(p[into] if into == "E" else p[into][j])
            W = W + p["g"][m, row, c] * A_out @ p[f"{module}_weight"][j] @ A_in.T
            b = b + p["h"][m, row, c] * A_out @ p[f"{module}_bias"][j]
        name = f"blocks.{i}.attn.proj" if module == "proj" else f"blocks.{i}.mlp.{module}"
        torch.testing.assert_close(weights[f"{name}.weight"], W)
        torch.testing.assert_close(weights[f"{name}.bias"], b)


# ---------------------------------------------------------------------------------------------------------------------
# A grid of sizes
# ---------------------------------------------------------------------------------------------------------------------

GRID = [
    (n, N, layers_per_row, src_heads, tgt_heads)
    for n, N in [(2, 3), (2, 5), (4, 4), (4, 10), (6, 6), (6, 9), (8, 16)]
    for layers_per_row in (1, 2, 3)
    for src_heads, tgt_heads in [(1, 3), (2, 2)]
]


@pytest.mark.parametrize(("n", "N", "layers_per_row", "src_heads", "tgt_heads"), GRID)
def test_lets_sizes(n, N, layers_per_row, src_heads, tgt_heads):
    src = models.ViTArch(4 * src_heads, n, src_heads, 8, 16)
    tgt = models.ViTArch(4 * tgt_heads, N, tgt_heads, 8, 16)
    aux_net = lets_aux(src, tgt, layers_per_row=layers_per_row)
    logits = aux_net(IMAGES)
    cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    assert logits.shape == (3, 5)
    assert all(p.grad is not None for p in aux_net.parameters())
    gene = models.Learngene.of(aux_net)
    for depth in (1, 2, N - 1, N, 2 * N + 1):
        for heads in range(1, tgt_heads + 1):
            arch = models.ViTArch(4 * heads, depth, heads, 8, 16)
            vit = gene.descend(arch).eval()
            assert (len(vit.blocks), vit.embed_dim) == (depth, 4 * heads)
            assert vit(IMAGES).isfinite().all()


@pytest.mark.parametrize(
    ("src", "tgt", "message"),
    [
        (SRC, replace(AUX, depth=1), "fewer than the pairs"),
        (replace(SRC, width=32, num_heads=8), AUX, "narrower"),
        (replace(SRC, num_heads=4), AUX, "differ in size"),
        (replace(SRC, patch_size=4), AUX, "patches"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(src, tgt, message):
    with pytest.raises(models.InputError, match=message):
        models.create_aux_net(src, tgt)


def test_wider_than_the_aux_net_is_refused_with_the_widest():
    gene = models.Learngene.of(lets_aux())
    with pytest.raises(models.InputError, match="widest that this learngene can make is 24"):
        gene.descend(models.ViTArch(28, 4, 7, 8, 16))


# ---------------------------------------------------------------------------------------------------------------------
# Mappings and selections
# ---------------------------------------------------------------------------------------------------------------------


def test_default_mapping_gives_the_published_lists():
    layer, coeff = select_depth(12, groups_of_layers(8, 16, 2, 2), layers_per_row=2)
    assert layer == [0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    assert coeff == [0, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 14]


@pytest.mark.parametrize(
    ("depth", "coeff"),
    [
        (1, [0]),
        (3, [0, 8, 14]),
        (8, [0, 2, 4, 6, 8, 10, 12, 14]),
        (9, [0, 2, 4, 6, 6, 8, 10, 12, 14]),
        (16, [r for r in range(0, 16, 2) for _ in range(2)]),
        (18, [0, 0, 2, 2, 4, 4, 6, 6, 6, 8, 8, 8, 10, 10, 12, 12, 14, 14]),
    ],
)
def test_default_mapping_of_other_depths(depth, coeff):
    layer, found = select_depth(depth, groups_of_layers(8, 16, 2, 2), layers_per_row=2)
    assert found == coeff
    assert [a // 4 for a in layer] == [r // 4 for r in coeff]


def test_mapping_takes_pair_and_row_apart():
    aux_net = lets_aux()
    p = dict(aux_net.named_parameters())
    vit = models.Learngene.of(aux_net).descend(replace(AUX, depth=1), mapping_layer=[7], mapping_layer_coeff=[1])
    m = MODULES.index("norm1")
    old = sum(p["g"][m, 0, c] * p["norm1_weight"][2 + c] for c in range(2))  # pair 1, row 0
    torch.testing.assert_close(vit.blocks[0].norm1.weight[: SRC.width], old)


@pytest.mark.parametrize("how", WIDTH_SELECTIONS)
def test_selection_that_keeps_all_rows_is_the_identity(how):
    aux_net = lets_aux()
    gene, own = models.Learngene.of(aux_net), list(range(AUX.depth))
    vit = gene.descend(AUX, mapping_layer=own, mapping_layer_coeff=own, width_select=how).eval()
    assert torch.equal(vit(IMAGES), aux_net(IMAGES))


def test_continuous_selection_takes_the_first_rows():
    aux_net = lets_aux()
    p, cut = dict(aux_net.named_parameters()), select(aux_net)
    assert torch.equal(cut["E"], p["E"][:8])
    assert torch.equal(cut["Q"], p["Q"][:, :8])
    assert torch.equal(cut["C"], p["C"][:8])
    assert torch.equal(cut["M"], p["M"][:, :32])
    assert torch.equal(cut["pos_embed"], p["pos_embed"][..., :16])


@pytest.mark.parametrize(
    ("how", "norm", "largest"), [(f"l{i}_{end}", i, end == "top") for i in (1, 2) for end in ("top", "bottom")]
)
def test_magnitude_selection_stays_aligned(how, norm, largest):
    aux_net = lets_aux()
    p = dict(aux_net.named_parameters())
    cut = select(aux_net, how)
    sizes = torch.linalg.vector_norm(p["E"], ord=norm, dim=1)
    kept = sizes.argsort(descending=largest)[:8].sort().values
    assert torch.equal(cut["E"], p["E"][kept])
    assert torch.equal(cut["C"], p["C"][kept])
    assert torch.equal(cut["pos_embed"], p["pos_embed"][..., torch.cat([torch.arange(8), 8 + kept])])
    head_sizes = torch.stack(
        [
            torch.linalg.vector_norm(torch.cat([p[a][:, 4 * h : 4 * h + 4].flatten() for a in "QKV"]), ord=norm)
            for h in range(4)
        ]
    )
    heads = head_sizes.argsort(descending=largest)[:2].sort().values.tolist()
    rows = [4 * h + i for h in heads for i in range(4)]
    for a in "QKV":
        assert torch.equal(cut[a], p[a][:, rows])
    for j in range(SRC.depth):
        hidden = torch.linalg.vector_norm(p["M"][j], ord=norm, dim=1).argsort(descending=largest)[:32].sort().values
        assert torch.equal(cut["M"][j], p["M"][j][hidden])


def test_narrower_than_the_learngene_keeps_its_first_neurons():
    aux_net = lets_aux()
    p = dict(aux_net.named_parameters())
    vit = models.Learngene.of(aux_net).descend(replace(AUX, width=4, num_heads=1)).eval()
    torch.testing.assert_close(vit.patch_embed.proj.weight, p["patch_embed_weight"][:4])
    torch.testing.assert_close(vit.head.weight, p["head_weight"][:, :4])
    assert vit.blocks[0].mlp.fc1.weight.shape == (16, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Initialisation
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", WIDTH_SCHEMES)
def test_width_matrices_start_as_described(scheme):
    torch.manual_seed(0)
    A = init_width((5, 12, 8), scheme, noise=0.03)
    torch.testing.assert_close(A.sum(-1), torch.ones(5, 12))
    assert (A >= 0).all()
    if scheme == "sel":
        assert torch.equal(A.sort(-1).values, torch.eye(8)[7].expand(5, 12, 8))
    if scheme == "sel_noisy":
        assert (A.max(-1).values > 0.8).all()
        assert (A > 0).all()
    if scheme == "rand_softmax":
        assert (A.max(-1).values / A.min(-1).values <= 2.7183).all()
    if scheme == "rand":
        assert (A.max(-1).values < 0.8).all()
    assert not torch.equal(A[0], A[1])


@pytest.mark.parametrize("scheme", DEPTH_SCHEMES)
@pytest.mark.parametrize("layers_per_row", [1, 2])
def test_depth_coefficients_start_as_described(scheme, layers_per_row):
    torch.manual_seed(0)
    rows = range(0, 16, layers_per_row)
    of_rows = rows_of_coefficients(groups_of_layers(8, 16, 2, layers_per_row), 8, 2, layers_per_row)
    assert [row.number for row in of_rows] == [*rows]
    g = init_depth(8, of_rows, scheme, noise=0.03, group_size=2)
    assert g.shape == (8, len(rows), 2)
    torch.testing.assert_close(g.sum(-1), torch.ones(8, len(rows)))
    if scheme.startswith("stackbert"):
        assert torch.equal(g.argmax(-1), torch.tensor([r % 2 for r in rows]).expand(8, -1))
        assert (g.max(-1).values >= (1 if scheme == "stackbert" else 1 / 1.03)).all()


def test_learngene_starts_as_a_timm_vit():
    torch.manual_seed(0)
    aux_net = models.create_aux_net("deit_small_patch16_224_L8", "deit_base_patch16_224_L16_H12")
    for module in ("q", "k", "v", "proj", "fc1", "fc2"):
        weight = getattr(aux_net, f"{module}_weight")
        assert weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert weight.abs().max() <= 2
        assert not getattr(aux_net, f"{module}_bias").any()
    assert (aux_net.norm1_weight == 1).all()


def test_tleg_starts_as_described():
    torch.manual_seed(0)
    aux_net = models.create_model("aux_deit_small_patch16_224")
    for module in ("qkv", "proj", "fc1", "fc2"):
        for half in "AB":
            assert getattr(aux_net, f"{half}_{module}_weight").std().item() == pytest.approx(0.02, rel=0.02)
            assert not getattr(aux_net, f"{half}_{module}_bias").any()
    for norm in ("norm1", "norm2"):
        assert (getattr(aux_net, f"B_{norm}_weight") == 1).all()
        assert not getattr(aux_net, f"A_{norm}_weight").any()
        assert not getattr(aux_net, f"A_{norm}_bias").any()
        assert not getattr(aux_net, f"B_{norm}_bias").any()
    modules = {name[2:].rpartition("_")[0] for name in aux_net.state_dict() if name.startswith("A_")}
    assert modules == {"norm1", "qkv", "proj", "norm2", "fc1", "fc2"}


def test_parameters_keep_the_order_of_earlier_checkpoints():
    """An optimiser's state is numbered by it."""
    tleg = list(models.create_model("aux_deit_nano_patch8_16_L4", num_classes=10).state_dict())
    assert tleg[:6] == [
        *("pos_embed", "patch_embed_weight", "norm_weight", "head_weight"),
        *("A_norm1_weight", "B_norm1_weight"),
    ]
    assert tleg[16:21] == ["patch_embed_bias", "norm_bias", "head_bias", "A_norm1_bias", "B_norm1_bias"]
    lets = list(models.create_aux_net("deit_nano_patch8_16_L2_H1", "deit_nano_patch8_16_L4_H2").state_dict())
    assert lets[:3] == ["pos_embed", "norm1_weight", "proj_weight"]
    assert lets[-8:] == [*"ECQKVM", "g", "h"]
