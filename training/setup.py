"""Build a run from its options."""

from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import models
import utils
from common.devices import device_of
from common.errors import InputError, error_context, one_line
from common.files import atomic_write
from common.hub import check_upload
from models.registry import method_of_stage_1
from training.build import (
    autocast_of,
    build_criterion,
    build_ema,
    build_optimizer,
    build_teaching,
    check_means,
)
from training.build_data import build_loaders, build_mixup
from training.build_model import Builder, build_supernet, descend_choices, load_gene
from training.checkpoints import resume
from training.checks import check
from training.config import TIMM, Config, ModelConfig, recipe, resolve_with, tagged_name, weight_sources
from training.initialise import initialise_from
from training.label_check import check_teacher_names, names_known, warn_of_head, warn_of_heads
from training.logs import EpochLog
from training.ordering import put_in_order
from training.preprocessing import resolve_preprocessing
from training.probe import probe_loader
from training.run import Run

import torch
from timm.utils import random_seed
from torch import nn

MEASURED = (
    "accuracy of the method in miniature (Fashion-MNIST, at most 0.5 M parameters; 3 seeds, or as many as in brackets)"
)


def set_up(config: Config, build: Builder) -> Run:
    """Build everything; no process waits for another here.

    Args:
        config: after `training.launch.prepare`.
        build: builds the model, as `training.build_model.build_plain_model` does.

    Raises:
        InputError: a file, the data or an option that cannot be used.
    """
    output_dir = writable_folder(config.output.output_dir)
    check_repository(config.output.push_to_hub)
    device = device_of(config.runtime.device, utils.local_rank(), alone=utils.world_size() == 1)
    autocast, half = autocast_of(config.runtime.amp_dtype, device)
    if not config.runtime.eval:
        check_means(config.optim, config.runtime.compile and config.trains, half, device)
    random_seed(config.runtime.seed)
    gene = None
    if config.model.load_gene:
        gene = load_gene(config.model)
        config = resolve_with(config, gene)
        check(config)
    config = resolve_preprocessing(config, gene)
    facts = facts_of(config.model, gene)
    train_loader, test_loader, classes = build_loaders(config, device)
    if utils.is_main():  # the others have the same files
        check_names(config, classes, gene)
    num_classes = 0 if config.teacher.without_labels else len(classes)
    model = model_of(config, build, num_classes, gene, device)
    supernet = build_supernet(config, model, num_classes) if config.model.descendants else None
    if config.model.grad_checkpointing:
        checkpoint_gradients(supernet or model, config.model.arch)
    mixup, base_criterion = build_mixup(config.augment, config.data.input_size, len(classes))
    optimizer, scheduler = build_optimizer(
        config.optim, config.schedule, config.data.batch_size, config.runtime.seed, model
    )
    run = Run(
        config=config,
        output_dir=output_dir,
        device=device,
        autocast=autocast,
        train_loader=train_loader,
        test_loader=test_loader,
        classes=classes,
        model=model,
        ema=build_ema(config.optim, model) if config.optim.model_ema and not config.runtime.eval else None,
        mixup=mixup,
        teacher=build_teaching(config, train_loader.dataset, len(classes), device),
        criterion=build_criterion(base_criterion, config.teacher, config.model),
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=torch.amp.GradScaler(device.type, enabled=half),
        epoch=config.schedule.start_epoch,
        facts=facts,
        supernet=supernet,
    )
    begin(run)
    return run


def model_of(
    config: Config, build: Builder, num_classes: int, gene: models.Learngene | None, device: torch.device
) -> nn.Module:
    """The model of the run on its device, with the weights of --init, or in the order of --order."""
    model = build(config.model, config.data.input_size, num_classes, gene)
    if config.model.init and not config.runtime.resume:  # the weights of a checkpoint replace all others
        initialise_from(model, config, num_classes, device)
    if isinstance(model, models.Elastic) and not (config.runtime.resume or config.runtime.eval):
        put_in_order(model, config, device)
    return model.to(device)


def begin(run: Run) -> None:
    """Load the checkpoint of --resume, set the learning rate, open the log, and the images of a linear probe."""
    config = run.config
    if config.teacher.without_labels or config.runtime.linear_probe:
        run.probe_loader = probe_loader(config, run.device)
    if config.runtime.resume:
        resume(run)
    if config.runtime.linear_probe and (run.epoch or run.position.images):
        raise InputError(
            "--linear-probe is for weights that are not trained further, and this run has begun to: expected them by "
            "--finetune, and an --output-dir without checkpoints"
        )
    run.set_learning_rate()
    if config.output.push_to_hub and run.epoch >= config.schedule.epochs > 0:
        raise InputError(f"--push-to-hub: nothing is left to train or upload, epoch {run.epoch} has been reached")
    if run.output_dir is not None and not config.runtime.eval:
        run.log = EpochLog(run.output_dir, run.epochs, run.output, mirror=wandb_of(config))


def checkpoint_gradients(model: nn.Module, name: str | None) -> None:
    try:
        model.set_grad_checkpointing()
    except (AssertionError, AttributeError) as error:
        raise InputError(f"--grad-checkpointing: {name} cannot recompute its activations") from error


def check_repository(push_to_hub: str | None) -> None:
    """Raises InputError where --push-to-hub names a repository that this process is to write and cannot."""
    if push_to_hub and utils.is_main():
        with error_context("--push-to-hub"):
            check_upload(push_to_hub)


def check_names(config: Config, classes: list[str], gene: models.Learngene | None) -> None:
    """Compare the classes of the data with those of the weights that the options name."""
    ours = names_known(config.data.data_set, classes)
    if not config.runtime.eval:
        check_teacher_names(config.teacher, ours)
    if config.runtime.resume or config.teacher.without_labels or config.runtime.linear_probe:
        return  # no head is kept: the weights of a checkpoint replace it, or it is left out, or fitted anew
    if gene is not None:
        warn_of_head(f"--load-gene {config.model.load_gene}", gene.classes, ours)
    sources = weight_sources(config.model, config.teacher, config.runtime.resume)
    warn_of_heads(sources, config.model, ours)


# ---------------------------------------------------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------------------------------------------------


def writable_folder(path: str | None) -> Path | None:
    """The output folder, created if need be; only the main process writes.

    Raises:
        InputError: it cannot be written.
    """
    if path is None or not utils.is_main():
        return None
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(2):  # the second replaces the first, as every file of a run is replaced
            with atomic_write(folder / ".writable") as unfinished:
                Path(unfinished).write_bytes(b"as the files of the run are")
        (folder / ".writable").unlink()
        return folder
    except OSError as error:
        raise InputError(f"--output-dir {path} cannot be written: {error.strerror}") from error


def wandb_of(config: Config) -> Callable[[dict, int], None]:
    """Where numbers go besides the files: nowhere, or to Weights & Biases."""
    project, folder = config.output.wandb, config.output.output_dir
    if project is None:
        return lambda numbers, step: None
    try:
        import wandb
    except ImportError as error:
        raise InputError(f"--wandb needs the package wandb, which is not installed ({error})") from error
    try:  # a resumed run is another run of the same group
        run = wandb.init(project=project, group=Path(folder).name, dir=folder, config=recipe(config))
    except wandb.Error as error:
        raise InputError(f"--wandb {project} cannot be used: {one_line(error)}") from error
    return lambda numbers, step: run.log(dict(numbers), step=step)


# ---------------------------------------------------------------------------------------------------------------------
# For the model card
# ---------------------------------------------------------------------------------------------------------------------


def facts_of(config: ModelConfig, gene: models.Learngene | None) -> dict[str, object]:
    """Where the weights of a run come from, for its model card."""
    if (method := method_of_stage_1(config)) is not None:
        facts = {"method": method.title} | {name: getattr(config, o) for o, name in method.arch_options.items()}
        start = start_of(config, "src_path") or start_of(config, "finetune")
        frozen = ", frozen" * config.freeze_src
        facts |= {"learngene starts from": start + frozen if start else "timm's initialisation"}
        return facts | measured(method)
    facts = {"architecture": config.des_name, "finetuned from": start_of(config, "finetune")}
    if config.init:
        facts["initialised by"] = f"{config.init}, from {start_of(config, 'init_path')}"
    if gene is not None:
        facts |= {
            "learngene": gene,
            "its file": public(config.load_gene),
            "width selection": config.width_select,
        }
        with error_context(config.des_option):
            facts |= gene.facts(models.parse_arch(config.des_name), **descend_choices(config))
        facts |= measured(gene.method_class)
    return {name: str(value) for name, value in facts.items() if value is not None}


def measured(method: type[models.AuxNet]) -> dict[str, str]:
    """What to expect of the method, from a study of its ViTs."""
    return {MEASURED: method.measured} if method.measured else {}


def start_of(config: ModelConfig, option: str) -> str | None:
    """What an option names that gives the first weights."""
    source = getattr(config, option)
    if source == TIMM:
        return f"timm's weights of {tagged_name(config, option)}"
    return source and public(source)


def public(source: str) -> str:
    """An address without passwords and signatures, or the name of a file without the folders of this machine."""
    parts = urlsplit(source)
    if parts.scheme in ("http", "https"):
        return f"{parts.scheme}://{parts.hostname}{parts.path}"
    return source if is_address(source) else Path(source).name


def is_address(source: str) -> bool:
    return source.startswith(("http://", "https://", "hf-hub:"))
