"""Check the options and build the run."""

import argparse
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import models
import utils
from common.download import fetch
from common.errors import InputError, error_context, one_line
from common.files import atomic_write
from common.hub import check_upload
from models.depth_mapping import mapping_or_default
from pipeline.folders import download
from training.build import (
    autocast_of,
    build_criterion,
    build_ema,
    build_optimizer,
    build_teaching,
    check_means,
    device_of,
)
from training.build_data import build_loaders, build_mixup, splits_needed
from training.build_model import build_model, des_option, input_size_of, load_gene
from training.checkpoints import (
    resume,
)
from training.checks import check_kind
from training.config import recipe
from training.label_check import check_names
from training.logs import EpochLog
from training.run import Run

import torch
from timm.utils import random_seed


def set_up(args: argparse.Namespace) -> Run:
    """Check all options and build everything; no process waits for another here.

    Raises:
        InputError: an option, file or combination that cannot work.
    """
    kind = check_kind(args)
    if args.output_dir is None and (args.on_nan == "rollback" or args.wandb):
        needs = (
            "--wandb keeps its files in it" if args.wandb else "--on-nan rollback goes back to the checkpoints in it"
        )
        raise InputError(f"--output-dir is missing: {needs}")
    output_dir = writable_folder(args.output_dir)
    check_push_options(args)
    device = device_of(args)
    autocast, half = autocast_of(args, device)
    if not args.eval:
        check_means(args, device)
    args.input_size = input_size_of(args, args.tgt_arch or args.des_arch or args.model)
    random_seed(args.seed)
    gene = load_gene(args) if kind == "descend" else None
    facts = facts_of(args, gene)
    train_loader, test_loader, classes = build_loaders(args, device)
    num_classes = len(classes)
    if utils.is_main():  # the others have the same files
        check_names(args, classes, gene)
    model = build_model(args, kind, num_classes, gene).to(device)
    if args.grad_checkpointing:
        try:
            model.set_grad_checkpointing()
        except (AssertionError, AttributeError) as error:
            raise InputError(f"--grad-checkpointing: {args.model} cannot recompute its activations") from error
    mixup, base_criterion = build_mixup(args, num_classes)
    optimizer, scheduler = build_optimizer(args, model)
    run = Run(
        args=args,
        kind=kind,
        output_dir=output_dir,
        device=device,
        autocast=autocast,
        train_loader=train_loader,
        test_loader=test_loader,
        classes=classes,
        model=model,
        ema=build_ema(args, model),
        mixup=mixup,
        teacher=build_teaching(args, train_loader.dataset, num_classes, device),
        criterion=build_criterion(args, base_criterion),
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=torch.amp.GradScaler(device.type, enabled=half),
        epoch=args.start_epoch,
        facts=facts,
    )
    if args.resume:
        resume(run)
    run.set_learning_rate()
    if args.push_to_hub and run.epoch >= args.epochs > 0:
        raise InputError(f"--push-to-hub: nothing is left to train or upload, epoch {run.epoch} has been reached")
    if output_dir is not None and not args.eval:
        run.log = EpochLog(output_dir, run.earlier, run.output, mirror=wandb_of(args))
    return run


def writable_folder(path: str | None) -> Path | None:
    """The output folder, made if need be; only the main process writes."""
    if path is None or not utils.is_main():
        return None
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(2):  # the second takes the place of the first, as every file of a run that is written again
            with atomic_write(folder / ".writable") as unfinished:
                Path(unfinished).write_bytes(b"as the files of the run are")
        (folder / ".writable").unlink()
        return folder
    except OSError as error:
        raise InputError(f"--output-dir {path} cannot be written: {error.strerror}") from error


def wandb_of(args: argparse.Namespace) -> Callable[[dict, int], None]:
    """Where numbers go besides the files: nowhere, or to Weights & Biases."""
    if args.wandb is None:
        return lambda numbers, place: None
    try:
        import wandb
    except ImportError as error:
        raise InputError(f"--wandb needs the package wandb, which is not installed ({error})") from error
    try:  # a run that is continued is another run of the same group
        run = wandb.init(project=args.wandb, group=Path(args.output_dir).name, dir=args.output_dir, config=recipe(args))
    except wandb.Error as error:
        raise InputError(f"--wandb {args.wandb} cannot be used: {one_line(error)}") from error
    return lambda numbers, place: run.log(dict(numbers), step=place)


# ---------------------------------------------------------------------------------------------------------------------
# From and to other machines
# ---------------------------------------------------------------------------------------------------------------------


def fetch_addresses(args: argparse.Namespace) -> None:
    """Download what options name by address, once per machine, after the options are known to fit each other."""
    check_kind(args)
    gene = "learngene_ema.safetensors" if args.gene_ema else "learngene.safetensors"
    sources = {  # option → address, and the file of a Hub repository that is meant
        "--load-gene": (args.load_gene, gene),
        "--finetune": (args.finetune, gene if models.is_aux_name(args.model or "") else "model.safetensors"),
        "--resume": (args.resume, "checkpoint.pth"),
        "--init-path": (args.init_path, "model.safetensors"),
        "--src-path": (args.src_path, "model.safetensors"),
        "--teacher-path": (args.teacher_path, "model.safetensors"),
    }
    for option, (source, name) in sources.items():
        if source and is_address(source) and utils.local_rank() == 0:
            with error_context(option):
                fetch(source, on_hub=name)


def fetch_data(args: argparse.Namespace) -> None:
    """Download the data set, once per machine, if that is asked for and it is not there."""
    if args.download and utils.local_rank() == 0:
        download(args.data_set, args.data_path, splits_needed(args))


def check_push_options(args: argparse.Namespace) -> None:
    """Raises InputError where --push-to-hub cannot succeed."""
    if args.push_to_hub is None:
        return
    if args.output_dir is None or args.eval:
        found = "--eval writes nothing" if args.eval else "--output-dir is missing"
        raise InputError(f"--push-to-hub uploads what a run writes into --output-dir: {found}")
    if utils.is_main():
        with error_context("--push-to-hub"):
            check_upload(args.push_to_hub)


def facts_of(args: argparse.Namespace, gene: models.Learngene | None) -> dict[str, object]:
    """Where the weights of a run come from, for its model card."""
    if args.src_arch:
        start = f"{public(args.src_path)}{', frozen' * args.freeze_src}" if args.src_path else "timm's initialisation"
        return {"learngene": args.src_arch, "Aux-Net": args.tgt_arch, "learngene starts from": start}
    facts = {"architecture": args.des_arch or args.model, "finetuned from": args.finetune and public(args.finetune)}
    if args.init:
        facts["initialised by"] = f"{args.init}, from {public(args.init_path)}"
    if gene is not None:
        facts |= {
            "learngene": gene,
            "its file": public(args.load_gene),
            "width selection": args.width_select,
        }
        if gene.method == "lets":
            with error_context(des_option(args)):
                depth = models.parse_arch(args.des_arch or args.model).depth
                lists = args.mapping_layer, args.mapping_layer_coeff, args.depth_select
                mapping = mapping_or_default(gene.config, depth, *lists)
            facts |= dict(zip(("mapping_layer", "mapping_layer_coeff"), mapping, strict=True))
    return {name: str(value) for name, value in facts.items() if value is not None}


def public(source: str) -> str:
    """An address without passwords and signatures, or the name of a file without the folders of this machine."""
    parts = urlsplit(source)
    if parts.scheme in ("http", "https"):
        return f"{parts.scheme}://{parts.hostname}{parts.path}"
    return source if is_address(source) else Path(source).name


def is_address(source: str) -> bool:
    return source.startswith(("http://", "https://", "hf-hub:"))
