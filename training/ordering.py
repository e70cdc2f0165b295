"""The source of an elastic ViT in order of importance: --order and --depth-order."""

from collections.abc import Iterator

import models
from models.baselines import is_head
from models.order import in_order, rank_layers, rank_layers_by_output, ranked, taylor_scores
from models.pruning import Scores, scores_of
from pipeline.loader import CheckedLoader
from training.build_data import order_loader
from training.config import Config
from training.initialise import batch_gradients, deterministic, no_head
from utils import print_main

import torch
from torch import Tensor

TOGETHER = 16  # images of which one gradient is taken (`models.order`), whatever --batch-size is


def put_in_order(aux_net: models.Elastic, config: Config, num_classes: int, device: torch.device) -> None:
    """Permute the neurons and heads of an elastic ViT (--order), and choose the layers of its Des-Nets (--depth-order).

    The function of the whole ViT stays as it is. All processes compute the same, but for rounding where they differ in
    their hardware: `training.launch.start` lets them start from the weights of the main process.

    Args:
        num_classes: of the data.
        device: to compute gradients and outputs on.

    Raises:
        InputError: gradients are asked for and the source has no trained head, or an image cannot be read.
    """
    order, depth_order = config.model.order, config.model.depth_order
    if (order, depth_order) == ("none", "even"):
        return
    vit, source = aux_net.to_vit().state_dict(), aux_net.arch
    scores: dict[str, Scores] = {}
    if "magnitude" in (order, depth_order):
        scores["magnitude"] = scores_of(vit, source)
    if "taylor" in (order, depth_order):
        if not has_trained_head(vit):
            option = "--order" if order == "taylor" else "--depth-order"
            raise no_head(option, num_classes, "that of this one is as timm initialises it, with biases of 0")
        few = config.with_options(batch_size=TOGETHER)
        on_device = {name: w.to(device) for name, w in vit.items()}
        scores["taylor"] = taylor_scores(on_device, source, batch_gradients(vit, source, few, device))
    if order != "none":
        aux_net.start_from(in_order(vit, source, scores[order]))
        aux_net.embedding_order = ranked(scores[order].embedding)
        print_main(f"neurons and heads are in order of importance, {described(order, config, device)}")
    if depth_order != "even":
        by_output = depth_order == "output"
        ranking = rank_by_output(vit, source, config, device) if by_output else rank_layers(scores[depth_order])
        aux_net.keep_layers(ranking)
        layers = ", ".join(map(str, reversed(ranking)))
        print_main(
            f"layers from the least to the most important are {layers}, {described(depth_order, config, device)}"
        )


def described(by: str, config: Config, device: torch.device) -> str:
    """What decided an order, for messages."""
    if by == "magnitude":
        return "by the magnitude of their weights"
    what = {"taylor": "by Taylor scores", "output": "by what the output changes by without them"}[by]
    return f"{what}, over {len(order_loader(config, device).dataset)} training images"


def rank_by_output(vit: dict[str, Tensor], source: models.ViTArch, config: Config, device: torch.device) -> list[int]:
    """`models.order.rank_layers_by_output` over --order-images training images, of features without a trained head."""
    if not has_trained_head(vit):
        vit = {name: w for name, w in vit.items() if not is_head(name)}
    with deterministic():
        return rank_layers_by_output(vit, source, Images(order_loader(config, device)), device)


class Images:
    """The images of a loader without their labels, as often as they are asked for.

    A batch of which no image can be read is left out.
    """

    def __init__(self, loader: CheckedLoader):
        self.loader = loader

    def __iter__(self) -> Iterator[Tensor]:
        return (images for images, _ in self.loader if len(images))


def has_trained_head(vit: dict[str, Tensor]) -> bool:
    """Whether the head differs from that which a source without one gets, whose biases are 0."""
    return "head.bias" not in vit or bool(vit["head.bias"].any())
