"""Weights of a model from a trained ViT of other sizes: --init."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import models
from common.errors import InputError, error_context
from models.baselines import BASELINES, NEED_GRADIENTS, check_source, source_arch
from models.formats.foreign import without_training_parts
from models.formats.weights import load_weights
from models.stateless import classes_of, vit_from_weights, vit_without_weights
from models.vit import ViTArch
from pipeline.loader import CheckedLoader
from training.build_data import order_loader
from training.config import TIMM, Config, tagged_name
from training.foreign_weights import fit_head, fit_images, read_foreign_weights, timm_weights
from utils import print_main

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def initialise_from(model: nn.Module, config: Config, num_classes: int, device: torch.device) -> None:
    """Give ``model`` weights from a trained ViT of other sizes (`models.baselines.BASELINES`).

    Images, patches and channels of the source are fitted first, its sizes are changed then, its head is fitted last.

    Args:
        num_classes: of the data.
        device: to compute gradients on.

    Raises:
        InputError: the source is of another kind, cannot have the sizes of ``model``, or cannot be read.
    """
    init, path = config.model.init, config.model.init_path
    arch = replace(models.parse_arch(config.model.model), img_size=config.data.input_size)
    with error_context(f"--init-path {path}"):
        if path == TIMM:
            weights = timm_weights(tagged_name(config.model, "init_path"), img_size=config.data.input_size)
        else:
            weights = read_foreign_weights(path, model)
        weights, remarks = without_training_parts(weights, model.state_dict().keys())
        trained = source_arch(weights, arch)
        for remark in (f"{trained}, for {init.replace('_', ' ')}", *remarks):
            print_main(f"{path}: {remark}")
        source = replace(trained, patch_size=arch.patch_size, img_size=arch.img_size)
        weights = fit_images(weights, vit_without_weights(source, num_classes=classes_of(weights)), path)
        check_source(weights, source)
        more = ()
        if init in NEED_GRADIENTS:
            more = (gradients_of(weights, source, config, num_classes, device),)
        weights, remarks = fit_head(BASELINES[init](weights, source, arch, *more), model, other_head=True)
    load_weights(model, weights, f"--init-path {path}")
    for remark in remarks:
        print_main(f"{path}: {remark}")


def gradients_of(
    weights: dict[str, Tensor], source: ViTArch, config: Config, num_classes: int, device: torch.device
) -> dict[str, Tensor]:
    """Gradients of the cross entropy, summed over the images of `batch_gradients`, on the CPU.

    Args:
        weights: the state dict of a ViT of ``source``.
        num_classes: of the data.

    Raises:
        InputError: the ViT has no head for the classes of the data, or an image cannot be read.
    """
    if (found := classes_of(weights)) != num_classes:
        raise InputError(
            f"--init {config.model.init} needs a source with a head for the {num_classes} classes of the data: this "
            f"one has {f'{found} classes' if found else 'no head'}; train it on the data first, or use --init magnitude"
        )
    total = {name: torch.zeros_like(w, device=device) for name, w in weights.items()}
    for gradients in batch_gradients(weights, source, order_loader(config, device), device):
        total = {name: total[name] + g for name, g in gradients.items()}
    return {name: g.cpu() for name, g in total.items()}


def batch_gradients(
    weights: dict[str, Tensor], source: ViTArch, loader: CheckedLoader, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Gradients of the cross entropy, summed over each batch of a loader, on the device.

    Without dropout. All processes read the same images and compute with deterministic operators, so that they choose
    the same neurons.

    Args:
        weights: the state dict of a ViT of ``source`` with a head for the classes of the data.
        loader: an `order_loader`.

    Raises:
        InputError: an image cannot be read.
    """
    vit = vit_from_weights(source, weights, num_classes=classes_of(weights)).to(device).eval()
    for images, labels in loader:
        if not len(images):  # none of the batch can be read
            continue
        vit.zero_grad()
        with deterministic():
            logits = vit(images.to(device))
            nn.functional.cross_entropy(logits.float(), labels.to(device), reduction="sum").backward()
        yield {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in vit.named_parameters()}


@contextmanager
def deterministic() -> Iterator[None]:
    """Operators that compute the same in each process."""
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        yield
