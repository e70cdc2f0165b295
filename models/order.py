"""The neurons, heads and layers of a trained ViT in order of importance.

An elastic ViT (`models.elastic`) keeps the first neurons and heads of a trained one, so the first ones have to be the
important ones. `in_order` permutes them: embedding neurons in the whole network, heads and hidden neurons in each layer
and in a pooling block. This changes no sum but the order of its terms, and so leaves the function as it is.

Of a neuron, head or layer S are the weights with it on one of their axes (`models.axes`), and g_s = ∂L/∂w_s, with L
summed over the images of a batch:

    magnitude    I_S = Σ_{s∈S} |w_s|
    Taylor       I_S = Σ_batches |Σ_{s∈S} g_s w_s|

The latter is what the loss changes by, to first order, when all of S are scaled down together: the contribution of a
group in Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, with the absolute value in the
place of the square. Hou et al., "DynaBERT: Dynamic BERT with Adaptive Width and Depth", NeurIPS 2020, rewire heads and
hidden neurons by it and leave the embedding as it is; Zhu et al., "EA-ViT: Efficient Adaptation for Elastic Vision
Transformer", ICCV 2025, order the embedding, too. Two details matter. In a trained ViT the gradients of all images
nearly cancel, so the absolute value is taken of a few images at a time. And pruning adds up single weights, Σ |g_s w_s|
(`models.pruning`), where weights of opposite effect count twice instead of cancelling.

Nearly all weights have the embedding on an axis: those that write it (patch embedding, proj, fc2), those that read it
(q, k, v, fc1, head), and the norms between. The scale γ of a norm and the columns that read it are tied, as γ/a and a·W
give the same function. Σ g_s w_s does not depend on a, Σ |w_s| does: the magnitude of an embedding neuron says how
training has divided products among their factors as much as what they do. Neither score sees that the norms have
another mean and variance without a neuron.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace

from common.devices import exact
from models.pruning import Scores, ranked, sums_of
from models.selection import Neurons, keep_neurons, rows_of_heads, take_layers
from models.stateless import classes_of, move_buffers, vit_without_weights
from models.vit import ViTArch

import torch
from torch import Tensor, nn
from torch.func import functional_call


def taylor_scores(vit: Mapping[str, Tensor], source: ViTArch, gradients: Iterable[Mapping[str, Tensor]]) -> Scores:
    """The scores I_S = Σ_batches |Σ_{s∈S} g_s w_s| of the parts of a trained ViT, in float64 on the CPU.

    Args:
        vit: the state dict of a ViT of ``source``.
        gradients: of the loss of each batch, under the same names and on the same device.
    """
    total: dict[str, Tensor | int] = dict.fromkeys((field.name for field in fields(Scores)), 0)
    for g in gradients:
        found = sums_of({name: w * g[name] for name, w in vit.items()}, source)
        total = {part: total[part] + getattr(found, part).abs().cpu() for part in total}
    return Scores(**total)


def in_order(vit: dict[str, Tensor], source: ViTArch, scores: Scores) -> dict[str, Tensor]:
    """The state dict of the same function, in which the neurons and heads of higher scores come first.

    Layers stay where they are. Of equal scores the order stays as it is. The features of a ViT without head are its
    embedding neurons, in the new order.

    Args:
        vit: the state dict of a ViT of ``source``.
        scores: of its parts (`taylor_scores`, `models.pruning.scores_of`).
    """
    neurons = Neurons(
        embedding=ranked(scores.embedding),
        heads=[rows_of_heads(ranked(heads), source.head_dim) for heads in scores.heads],
        hidden=[ranked(hidden) for hidden in scores.hidden],
    )
    if source.pool_head_dim:
        neurons = neurons._replace(
            pool_heads=rows_of_heads(ranked(scores.pool_heads), source.pool_head_dim),
            pool_hidden=ranked(scores.pool_hidden),
        )
    return keep_neurons(vit, neurons)


def rank_layers(scores: Scores) -> list[int]:
    """The layers from the highest score to the lowest; of equal ones the first comes first."""
    return ranked(scores.layers).tolist()


@torch.no_grad()
def rank_layers_by_output(
    vit: Mapping[str, Tensor], source: ViTArch, batches: Iterable[Tensor], device: torch.device
) -> list[int]:
    """The layers from the most to the least important, by what the output changes by when they are left out.

    Greedy: the layer without which the output changes least is dropped first, then the next among those that are left,
    and so on. The change is always that from the output f of the whole ViT,

        1/n Σ_x ‖f(x) − f_without(x)‖²        over the n images x

    f are the logits, for which a ViT with a head is used: what changes in its features and is not read by the head does
    not count. Of a ViT without head they are the pooled features. No labels are needed.

    A ViT of N layers passes about N²/2 times over the images, with two thirds of its layers on average.

    Args:
        vit: the state dict of a ViT of ``source``, with any head or none.
        batches: images (batch, channels, height, width), which are read N times.
        device: to compute on. The ViT is once in its memory.
    """
    weights = {name: w.to(device) for name, w in vit.items()}
    kept, dropped = list(range(source.depth)), []
    while len(kept) > 1:
        changes = changes_without_one(weights, source, kept, batches)
        least = min(reversed(range(len(kept))), key=changes.__getitem__)  # of equal ones the last
        dropped.append(kept.pop(least))
    return [*kept, *reversed(dropped)]


def changes_without_one(
    weights: dict[str, Tensor], source: ViTArch, kept: Sequence[int], batches: Iterable[Tensor]
) -> list[float]:
    """For each of the layers ``kept``, the change of the output without it, as in `rank_layers_by_output`."""
    whole, shallower = (without_weights(weights, source, depth) for depth in (source.depth, len(kept) - 1))
    ways = [take_layers(weights, [layer for layer in kept if layer != out]) for out in kept]
    changes, count = torch.zeros(len(kept), dtype=torch.float64), 0
    for images in batches:
        images = images.to(weights["patch_embed.proj.weight"].device)
        expected = exact(functional_call(whole, weights, (images,)))
        found = [exact(functional_call(shallower, way, (images,))) for way in ways]
        changes += torch.stack([(output - expected).square().sum() for output in found]).cpu()
        count += len(images)
    return (changes / count).tolist()


def without_weights(weights: Mapping[str, Tensor], source: ViTArch, depth: int) -> nn.Module:
    """A ViT of so many layers, and else of the sizes of ``source``, to be run with weights on their device."""
    kernel, classes = weights["patch_embed.proj.weight"], classes_of(weights)
    vit = vit_without_weights(replace(source, depth=depth), num_classes=classes, in_chans=kernel.shape[1])
    move_buffers(vit, kernel.device)
    return vit.eval()
