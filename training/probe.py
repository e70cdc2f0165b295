"""A linear probe: how well a linear head on the frozen features of a ViT tells the classes of the data apart."""

from collections.abc import Iterable
from contextlib import AbstractContextManager

import utils
from common.devices import exact, exact_device
from pipeline.loader import CheckedLoader
from training.build_data import plain_loader
from training.config import Config

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PROBE_IMAGES = 10_000  # at most, where a run without labels is evaluated again and again
RIDGE = 0.01  # λ, where the neurons have a variance of 1


def probe_loader(config: Config, device: torch.device) -> CheckedLoader:
    """The training images that a probe is fitted to: as test images are prepared, this process's share of them.

    --linear-probe takes all that the run would train on.
    """
    count = None if config.runtime.linear_probe else PROBE_IMAGES
    return plain_loader(config, count, device, slice(utils.rank(), None, utils.world_size()))


@torch.no_grad()
def fit_head(
    vit: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    autocast: AbstractContextManager,
) -> None:
    """Give a timm ViT the head of least squares, in the place of that which it may have.

    Ridge regression of one-hot targets on the pooled features in closed form, as for the few-shot accuracies of
    Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021: W minimises mean |W z + b − y|² + λ |W|², where z
    are the features with mean 0 and variance 1. Nothing is random; all processes, each with its share of the images,
    get the same head.

    Args:
        vit: the ViT, in evaluation mode afterwards.
        loader: images and labels.
        autocast: the precision of the forward pass.
    """
    device, width = next(vit.parameters()).device, vit.num_features
    vit.eval()
    products = torch.zeros(width + 1, width + 1 + num_classes, dtype=torch.float64, device=exact_device(device))
    for images, labels in loader:
        if len(images):  # a batch is empty if none of its images can be read
            with autocast:
                pooled = vit.forward_head(vit.forward_features(images.to(device)), pre_logits=True)
            x = F.pad(exact(pooled), (0, 1), value=1.0)
            products += x.T @ torch.cat([x, F.one_hot(labels.to(x.device), num_classes)], dim=1)
    products = utils.sum_over_processes(products)
    moments, targets = (products / products[-1, width]).split([width + 1, num_classes], dim=1)
    mean, shares = moments[-1, :-1], targets[-1]
    covariance = moments[:-1, :-1] - mean.outer(mean)
    std = covariance.diagonal().clamp_min(1e-12).sqrt()
    ridge = RIDGE * torch.eye(width, dtype=std.dtype, device=std.device)
    solution = torch.linalg.solve(
        covariance / std.outer(std) + ridge, (targets[:-1] - mean.outer(shares)) / std[:, None]
    )
    weight = (solution / std[:, None]).T
    vit.reset_classifier(num_classes)
    vit.to(device)
    heads = vit.get_classifier()
    for head in heads if isinstance(heads, tuple) else (heads,):  # two of them with a distillation token
        head.weight.copy_(weight)
        head.bias.copy_(shares - weight @ mean)
