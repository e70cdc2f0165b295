"""The source of an elastic ViT in order of importance: --order and --depth-order."""

from collections.abc import Iterator

import models
from models.order import in_order, rank_layers, rank_layers_by_output, taylor_scores
from models.pruning import Scores, ranked, scores_of
from pipeline.loader import CheckedLoader
from training.build_data import order_loader
from training.config import Config
from training.initialise import batch_gradients, deterministic
from utils import print_main

import torch
from torch import Tensor

TOGETHER = 16  # images of which one gradient is taken (`models.order`), whatever --batch-size is


def put_in_order(aux_net: models.Elastic, config: Config, device: torch.device) -> None:
    """Permute the neurons and heads of an elastic ViT (--order), and choose the layers of its Des-Nets (--depth-order).

    The function of the whole ViT stays as it is. All processes compute the same, but for rounding where they differ in
    their hardware: `training.launch.start` lets them start from the weights of the main process.

    Args:
        aux_net: it has the head of its source where gradients are asked for.
        device: to compute gradients and outputs on.

    Raises:
        InputError: an image cannot be read.
    """
    order, depth_order = config.model.order, config.model.depth_order
    if (order, depth_order) == ("none", "even"):
        return
    vit, source = aux_net.to_vit().state_dict(), aux_net.arch
    scores: dict[str, Scores] = {}
    said = {"magnitude": "by the magnitude of their weights"}
    if "magnitude" in (order, depth_order):
        scores["magnitude"] = scores_of(vit, source)
    if {order, depth_order} & {"taylor", "output"}:
        loader = order_loader(config.with_options(batch_size=TOGETHER), device)
        images = f"over {len(loader.dataset)} training images"
        said |= {"taylor": f"by Taylor scores, {images}", "output": f"by what the output changes by, {images}"}
    if "taylor" in (order, depth_order):
        on_device = {name: w.to(device) for name, w in vit.items()}
        scores["taylor"] = taylor_scores(on_device, source, batch_gradients(vit, source, loader, device))
    if order != "none":
        aux_net.start_from(in_order(vit, source, scores[order]))
        aux_net.embedding_order = ranked(scores[order].embedding)
        print_main(f"neurons and heads are in order of importance, {said[order]}")
    if depth_order == "output":
        with deterministic():
            ranking = rank_layers_by_output(vit, source, Images(loader), device)
    elif depth_order != "even":
        ranking = rank_layers(scores[depth_order])
    if depth_order != "even":
        aux_net.keep_layers(ranking)
        layers = ", ".join(map(str, reversed(ranking)))
        print_main(f"layers from the least to the most important are {layers}, {said[depth_order]}")


class Images:
    """The images of a loader without their labels, as often as they are asked for.

    A batch of which no image can be read is left out.
    """

    def __init__(self, loader: CheckedLoader):
        self.loader = loader

    def __iter__(self) -> Iterator[Tensor]:
        return (images for images, _ in self.loader if len(images))
