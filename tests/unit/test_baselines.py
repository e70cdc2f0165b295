"""Initialisations from a trained ViT of other sizes, on weights small enough to check by hand, and on several kinds."""

import math
from dataclasses import replace

import models
from models.baselines import BASELINES, NEED_GRADIENTS, check_source, source_arch, weight_selection
from models.cosine import front, resample
from models.pruning import choose, most_important, prune, scores_of
from models.selection import Neurons, keep_neurons, rows_of_heads

import pytest
import torch
from torch import Tensor

# one head of two neurons in the small ViT, two heads in the large one
SMALL, LARGE = models.ViTArch(2, 2, 1, 4, 8), models.ViTArch(4, 3, 2, 4, 8)
KINDS = (
    None,
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_small_patch14_reg4_dinov2",  # register tokens, LayerScale
    "vit_giant_patch14_dinov2",  # SwiGLU in one tensor
    "vit_base_patch16_siglip_224",  # pooling block
    "eva02_tiny_patch14_224",  # SwiGLU in two tensors, q_bias and v_bias, rotary positions beside pos_embed
    "vit_medium_patch16_rope_reg1_gap_256",  # rotary positions alone
)


def small_arch(kind: str | None, depth: int, heads: int) -> models.ViTArch:
    """A small ViT of a kind, for images of 2 × 2 patches."""
    if kind is None:
        return models.ViTArch(4 * heads, depth, heads, 4, 8)
    arch = models.parse_arch(f"{kind}@L{depth}-H{heads}")
    return replace(arch, img_size=2 * arch.patch_size)


def random_weights(arch: models.ViTArch) -> dict[str, Tensor]:
    torch.manual_seed(0)
    weights = models.create_vit(arch, num_classes=3).state_dict()
    return {name: 0.2 * torch.randn(tensor.shape) for name, tensor in weights.items()}


def logits_of(arch: models.ViTArch, weights: dict[str, Tensor]) -> Tensor:
    """Of two images, in float64."""
    vit = models.create_vit(arch, num_classes=3)
    vit.load_state_dict(weights)
    images = torch.randn(2, 3, arch.img_size, arch.img_size, generator=torch.Generator().manual_seed(1))
    return vit.double().eval()(images.double())


def numbered(arch: models.ViTArch) -> dict[str, Tensor]:
    """A ViT's state dict in which every number is another one."""
    weights = models.create_vit(arch, num_classes=3).state_dict()
    start, filled = 0, {}
    for name, tensor in weights.items():
        filled[name] = torch.arange(start, start + tensor.numel(), dtype=torch.float32).view(tensor.shape)
        start += tensor.numel()
    return filled


def made(baseline: str, weights: dict[str, Tensor], source: models.ViTArch, arch: models.ViTArch) -> dict[str, Tensor]:
    """What a baseline makes of ``weights``; those that need gradients get some."""
    gradients = ({name: w.sin() for name, w in weights.items()},) if baseline in NEED_GRADIENTS else ()
    return BASELINES[baseline](weights, source, arch, *gradients)


# ---------------------------------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("baseline", BASELINES)
def test_same_sizes_are_the_trained_vit(baseline, kind):
    arch = small_arch(kind, 2, 2)
    source = random_weights(arch)
    found = made(baseline, source, arch, arch)
    assert found.keys() == source.keys()
    assert all(torch.equal(found[name], source[name]) for name in source)


# baseline → layers and heads of source and target
SIZES = {baseline: [((3, 3), (2, 2)), ((2, 3), (2, 2))] for baseline in ("weight_selection", "magnitude", "taylor")}
SIZES |= {baseline: [((2, 2), (5, 2)), ((3, 2), (2, 2))] for baseline in ("stacking", "interpolation")}
SIZES["front"] = [((3, 3), (2, 2)), ((2, 2), (3, 3)), ((2, 3), (3, 2))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("baseline", BASELINES)
def test_other_sizes_are_a_vit_of_the_kind(baseline, kind):
    for sizes in SIZES[baseline]:
        source, arch = (small_arch(kind, *size) for size in sizes)
        weights = made(baseline, random_weights(source), source, arch)
        assert logits_of(arch, weights).isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# Sizes of the source
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_come_from_the_weights(kind):
    trained, arch = small_arch(kind, 3, 2), small_arch(kind, 1, 3)
    weights = random_weights(trained)
    assert source_arch(weights, arch) == trained
    check_source(weights, trained)
    check_source({name: w for name, w in weights.items() if "head" not in name.split(".")[0]}, trained)
    if "pos_embed" in weights:  # else the images are those of the target
        larger = replace(trained, img_size=3 * trained.patch_size)
        assert source_arch(random_weights(larger), arch) == larger
        wide = replace(trained, img_size=(2 * trained.patch_size, trained.patch_size))
        own = models.create_vit(wide, num_classes=3, img_size=wide.img_size).state_dict()
        assert source_arch(own, replace(arch, img_size=wide.img_size)) == wide
        with pytest.raises(models.InputError, match="for 2 patches"):
            source_arch(own, arch)


def test_another_kind_is_refused():
    tokens, plain = small_arch("vit_tiny_patch16_224", 2, 2), models.ViTArch(128, 2, 2, 16, 32)
    scaled = replace(tokens, kind="vit_small_patch14_dinov2")
    with pytest.raises(models.InputError, match=r"no cls_token: expected the weights of vit_tiny_patch16_224, found"):
        check_source(random_weights(plain), tokens)
    with pytest.raises(models.InputError, match=r"no blocks.0.ls1.gamma"):
        check_source(random_weights(tokens), scaled)
    with pytest.raises(models.InputError, match=r"blocks.0.ls1.gamma, which vit_tiny_patch16_224 does not have"):
        check_source(random_weights(scaled), tokens)
    with pytest.raises(models.InputError, match=r"width 128 cannot be divided into heads of 48"):
        source_arch(random_weights(tokens), replace(tokens, width=48, num_heads=1))
    wide = {**random_weights(tokens), "blocks.1.mlp.fc1.bias": torch.zeros(2)}
    with pytest.raises(models.InputError, match=r"blocks.1.mlp.fc1.bias is \(2,\), that of .* is \(512,\)"):
        check_source(wide, tokens)
    with pytest.raises(models.InputError, match=r"no blocks.0: expected the weights of"):
        source_arch({"patch_embed.proj.weight": torch.zeros(4, 3, 2, 2)}, tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Selection and growth
# ---------------------------------------------------------------------------------------------------------------------


def test_weight_selection_takes_evenly_spaced_neurons_of_the_first_layers():
    large = numbered(LARGE)
    small = weight_selection(large, LARGE, SMALL)
    expected = models.create_vit(SMALL, num_classes=3).state_dict()
    assert {name: tensor.shape for name, tensor in small.items()} == {name: t.shape for name, t in expected.items()}
    ends = [0, 3]  # two of four, evenly spaced
    assert torch.equal(small["pos_embed"], large["pos_embed"][..., ends])
    qkv, wide = small["blocks.1.attn.qkv.weight"], large["blocks.1.attn.qkv.weight"]
    assert torch.equal(qkv, wide[[0, 3, 4, 7, 8, 11]][:, ends])
    hidden = [0, 2, 4, 6, 9, 11, 13, 15]  # eight of sixteen, evenly spaced
    assert torch.equal(small["blocks.0.mlp.fc1.weight"], large["blocks.0.mlp.fc1.weight"][hidden][:, ends])
    assert torch.equal(small["blocks.0.mlp.fc2.weight"], large["blocks.0.mlp.fc2.weight"][ends][:, hidden])
    assert torch.equal(small["head.weight"], large["head.weight"][:, ends])


@pytest.mark.parametrize(("baseline", "layers"), [("stacking", [0, 1, 2, 0, 1]), ("interpolation", [0, 0, 1, 1, 2])])
def test_depth_growth_repeats_layers(baseline, layers):
    source = numbered(LARGE)
    grown = BASELINES[baseline](source, LARGE, replace(LARGE, depth=5))
    assert grown.keys() == models.create_vit(replace(LARGE, depth=5), num_classes=3).state_dict().keys()
    for l, layer in enumerate(layers):
        for name in ("norm1.bias", "attn.qkv.weight", "mlp.fc2.weight"):
            assert torch.equal(grown[f"blocks.{l}.{name}"], source[f"blocks.{layer}.{name}"])
    assert torch.equal(grown["head.weight"], source["head.weight"])


# ---------------------------------------------------------------------------------------------------------------------
# Pruning
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taylor", [False, True])
def test_scores_of_a_plain_vit_are_sums_over_its_weights(taylor):
    """Against loops over the weights of timm's plain ViT, written without the table of axes."""
    vit = random_weights(LARGE)
    gradients = {name: torch.randn(w.shape) for name, w in vit.items()} if taylor else None
    a = {name: ((w * gradients[name]) if taylor else w).abs() for name, w in vit.items()}
    found = scores_of(vit, LARGE, gradients)
    for neuron in range(4):
        total = a["pos_embed"][..., neuron].sum() + a["head.weight"][:, neuron].sum()
        total += sum(a[f"patch_embed.proj.{kind}"][neuron].sum() for kind in ("weight", "bias"))
        total += sum(a[f"fc_norm.{kind}"][neuron] for kind in ("weight", "bias"))
        for l in range(3):
            block = f"blocks.{l}."
            for kind in ("weight", "bias"):
                total += sum(a[f"{block}{name}.{kind}"][neuron].sum() for name in ("attn.proj", "mlp.fc2"))
                total += sum(a[f"{block}{name}.{kind}"][neuron] for name in ("norm1", "norm2"))
            total += sum(a[f"{block}{name}.weight"][:, neuron].sum() for name in ("attn.qkv", "mlp.fc1"))
        assert found.embedding[neuron].item() == pytest.approx(total.item(), rel=1e-5)
    for l in range(3):
        block = f"blocks.{l}."
        for head in range(2):
            rows = [4 * part + 2 * head + i for part in range(3) for i in range(2)]
            total = a[f"{block}attn.qkv.weight"][rows].sum() + a[f"{block}attn.qkv.bias"][rows].sum()
            total += a[f"{block}attn.proj.weight"][:, 2 * head : 2 * head + 2].sum()
            assert found.heads[l, head].item() == pytest.approx(total.item(), rel=1e-5)
        for neuron in range(16):
            total = a[f"{block}mlp.fc1.weight"][neuron].sum() + a[f"{block}mlp.fc1.bias"][neuron]
            total += a[f"{block}mlp.fc2.weight"][:, neuron].sum()
            assert found.hidden[l, neuron].item() == pytest.approx(total.item(), rel=1e-5)
        total = sum(w.sum() for name, w in a.items() if name.startswith(block))
        assert found.layers[l].item() == pytest.approx(total.item(), rel=1e-5)


def test_equal_scores_keep_the_first():
    assert most_important(torch.tensor([1.0, 2, 1, 2, 0]), 3).tolist() == [0, 1, 3]


def test_pruned_vit_has_the_most_important_parts_in_their_order():
    vit = random_weights(LARGE)
    vit["blocks.0.attn.proj.weight"][:, 2:] += 9  # the second head of layer 0, the first of layer 2
    vit["blocks.2.attn.proj.weight"][:, :2] += 9
    vit["blocks.0.mlp.fc2.weight"][:, [1, 3, 4, 7, 8, 9, 11, 15]] += 9
    vit["pos_embed"][..., [1, 2]] += 99
    small = prune(vit, LARGE, SMALL)
    embedding = [1, 2]
    for l, (layer, head) in enumerate([(0, [2, 3]), (2, [0, 1])]):  # layer 1 is the smallest
        wide = vit[f"blocks.{layer}.attn.qkv.weight"]
        rows = torch.cat([wide[4 * part : 4 * part + 4][head] for part in range(3)])
        assert torch.equal(small[f"blocks.{l}.attn.qkv.weight"], rows[:, embedding])
        wide = vit[f"blocks.{layer}.attn.proj.weight"]
        assert torch.equal(small[f"blocks.{l}.attn.proj.weight"], wide[embedding][:, head])
    wide = vit["blocks.0.mlp.fc1.weight"][[1, 3, 4, 7, 8, 9, 11, 15]]
    assert torch.equal(small["blocks.0.mlp.fc1.weight"], wide[:, embedding])
    assert torch.equal(small["head.weight"], vit["head.weight"][:, embedding])


def permutation(source: models.ViTArch) -> Neurons:
    """All neurons of a ViT in another order; heads as wholes, in each layer another."""

    def heads(head_dim: int) -> Tensor:
        return rows_of_heads(torch.randperm(source.width // head_dim), head_dim)

    return Neurons(
        embedding=torch.randperm(source.width),
        heads=[heads(source.head_dim) for _ in range(source.depth)],
        hidden=[torch.randperm(source.hidden) for _ in range(source.depth)],
        pool_heads=heads(source.pool_head_dim) if source.pool_head_dim else slice(None),
        pool_hidden=torch.randperm(source.pool_hidden),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("taylor", [False, True])
def test_pruning_does_not_depend_on_the_order_of_neurons(kind, taylor):
    source, arch = small_arch(kind, 3, 3), small_arch(kind, 2, 2)
    vit = random_weights(source)
    gradients = {name: torch.randn(w.shape) for name, w in vit.items()} if taylor else None
    order = permutation(source)
    permuted = keep_neurons(vit, order)
    torch.testing.assert_close(logits_of(source, permuted), logits_of(source, vit))
    expected = logits_of(arch, prune(vit, source, arch, gradients))
    found = logits_of(arch, prune(permuted, source, arch, gradients and keep_neurons(gradients, order)))
    torch.testing.assert_close(found, expected)


def test_head_choices_differ_between_layers():
    """Neurons of each layer are chosen apart, and the pruned ViT computes with them."""
    vit = random_weights(LARGE)
    vit["blocks.0.attn.qkv.weight"][:2] += 9
    vit["blocks.1.attn.qkv.weight"][2:4] += 9
    layers, neurons = choose(scores_of(vit, LARGE), LARGE, replace(LARGE, width=2, num_heads=1))
    assert layers == [0, 1, 2]
    assert [heads.tolist() for heads in neurons.heads[:2]] == [[0, 1], [2, 3]]


def test_pruning_needs_a_larger_vit():
    for arch in (replace(SMALL, depth=4), replace(SMALL, width=6, num_heads=3)):
        with pytest.raises(models.InputError, match="pruning needs a larger ViT than"):
            prune(random_weights(LARGE), LARGE, arch)


# ---------------------------------------------------------------------------------------------------------------------
# Cosine basis
# ---------------------------------------------------------------------------------------------------------------------


def transformed(x: list[float], length: int) -> list[float]:
    """The formula of `resample`, sum by sum."""
    n, m = len(x), min(len(x), length)
    X = [sum(x[t] * math.cos(math.pi * k * (2 * t + 1) / (2 * n)) for t in range(n)) for k in range(m)]
    return [
        (X[0] + 2 * sum(X[k] * math.cos(math.pi * k * (2 * t + 1) / (2 * length)) for k in range(1, m))) / length
        for t in range(length)
    ]


@pytest.mark.parametrize(("old", "new"), [(6, 4), (4, 6), (3, 1), (1, 3), (5, 5)])
def test_length_of_an_axis_changes_as_in_the_formula(old, new):
    x = torch.randn(2, old, 3)
    found = resample(x, 1, new)
    assert found.shape == (2, new, 3)
    for i in range(2):
        for j in range(3):
            assert found[i, :, j].tolist() == pytest.approx(transformed(x[i, :, j].tolist(), new), abs=1e-5)


@pytest.mark.parametrize(("source", "arch"), [(LARGE, SMALL), (SMALL, LARGE), (SMALL, replace(SMALL, depth=4))])
def test_front_is_the_formula_on_each_tensor(source, arch):
    """Against the axes of single weights; layer j of the source has mean and deviation of layer j of the result."""
    vit = random_weights(source)
    found = front(vit, source, arch)

    def normalised(w: Tensor) -> Tensor:
        return (w - w.mean()) / (w.std() + 1e-8)

    def along(w: Tensor, lengths: list[int]) -> Tensor:
        for axis, length in enumerate(lengths):
            columns = w.movedim(axis, -1)
            resized = [transformed(row, length) for row in columns.reshape(-1, w.shape[axis]).tolist()]
            w = torch.tensor(resized).view(*columns.shape[:-1], length).movedim(-1, axis)
        return w

    kernel = vit["patch_embed.proj.weight"]
    expected = along(normalised(kernel).view(source.width * 3, 16), [arch.width * 3, 16]) * kernel.std() + kernel.mean()
    torch.testing.assert_close(found["patch_embed.proj.weight"], expected.view(arch.width, 3, 4, 4))
    positions = vit["pos_embed"]
    expected = along(normalised(positions), [1, 4, arch.width]) * positions.std() + positions.mean()
    torch.testing.assert_close(found["pos_embed"], expected if source.width != arch.width else positions)
    for name, lengths in {
        "attn.qkv.weight": [3 * arch.width, arch.width],
        "mlp.fc2.weight": [arch.width, arch.hidden],
        "norm1.bias": [arch.width],
    }.items():
        layers = [vit[f"blocks.{l}.{name}"] for l in range(source.depth)]
        expected = along(torch.stack([normalised(w) for w in layers]), [arch.depth, *lengths])
        for l in range(arch.depth):
            own = layers[min(l, source.depth - 1)]
            layer = expected[l] * own.std() + own.mean()
            torch.testing.assert_close(found[f"blocks.{l}.{name}"], layer, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_constant_weights_stay_constant(kind):
    source = small_arch(kind, 2, 3)
    vit = {name: torch.full_like(w, 0.5) for name, w in random_weights(source).items()}
    for arch in (small_arch(kind, 3, 2), small_arch(kind, 1, 3)):
        for w in front(vit, source, arch).values():
            torch.testing.assert_close(w, torch.full_like(w, 0.5))
