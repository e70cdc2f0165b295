"""What a run leaves behind: learngene or model, and its upload to the Hub."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import models
from common.errors import error_context
from common.files import atomic_write, hardlink_or_copy
from common.hub import model_card, upload
from datasets import describe_classes
from models.formats.timm_folder import AVERAGED_FOLDER, save_model
from training.build_model import CHANNELS, wants_size
from training.config import LEARNGENE, MODEL, recipe
from training.label_check import names_known
from training.preprocessing import evaluation_config, preprocessing_of
from training.run import Run
from utils import print_main

from torch import nn


def write_weights(run: Run) -> None:
    """Stage 1: the learngene files. Else: the model, and its average, in timm's own format."""
    if isinstance(run.model, models.AuxNet):
        data = run.config.data
        classes = names_known(data.data_set, run.classes) if run.model.num_classes else None
        known = dict(classes=classes, preprocessing=preprocessing_of(data))
        learngene = partial(models.Learngene.of, options=recipe(run.config), **known)
        learngene(run.model).save(run.output_dir / "learngene.safetensors")
        if run.ema is not None:
            learngene(run.ema.module, averaged=True).save(run.output_dir / "learngene_ema.safetensors")
        else:  # an earlier run's average would pass for that of this learngene
            (run.output_dir / "learngene_ema.safetensors").unlink(missing_ok=True)
        return
    write_model(run, run.model, run.output_dir)
    averaged, beside = run.output_dir / AVERAGED_FOLDER, run.output_dir / "model_ema.safetensors"
    if run.ema is not None:
        averaged.mkdir(exist_ok=True)
        write_model(run, run.ema.module, averaged)
        hardlink_or_copy(averaged / "model.safetensors", beside)
    else:  # an earlier run's average would pass for that of this model
        for path in (beside, averaged / "model.safetensors", averaged / "config.json"):
            path.unlink(missing_ok=True)


def write_model(run: Run, model: nn.Module, folder: Path) -> None:
    """A folder that timm reads: ``model``, which is that of the run or its average."""
    name, size = run.config.model.des_name, run.config.data.input_size
    save_model(
        model,
        folder,
        replace(models.parse_arch(name), img_size=size) if models.is_vit(name) else name,
        model_args={"img_size": size} if not models.is_vit(name) and wants_size(name) else {},
        data_config=evaluation_config(run.config.data, CHANNELS),  # whatever timm records for the architecture
        label_names=run.classes,
        label_descriptions=describe_classes(run.classes),
    )


def push(run: Run) -> None:
    """Upload the output folder with a model card."""
    output, is_aux_net = run.config.output, isinstance(run.model, models.AuxNet)
    source = f"hf-hub:{output.push_to_hub}"
    if is_aux_net:
        usage = f'import models\n\ngene = models.load_learngene("{source}")'
    else:
        usage = f'import timm\n\nmodel = timm.create_model("{source}", pretrained=True)'
    facts, folder = card_facts(run), run.output_dir
    if output.push_ema:  # a repository of its own, as timm loads model.safetensors and nothing else
        folder = folder / AVERAGED_FOLDER
        decay = run.config.optim.model_ema_decay
        facts["weights"] = f"exponential moving average over the steps of training, decay {decay:g}"
        hardlink_or_copy(run.output_dir / "log.txt", folder / "log.txt")
    card = model_card(output.push_to_hub.partition("/")[2], facts, run.epochs, recipe(run.config), usage)
    with atomic_write(folder / "README.md") as unfinished:
        Path(unfinished).write_text(card, encoding="utf-8", errors="backslashreplace")
    files = ["README.md", "log.txt"]
    if is_aux_net:
        files += [LEARNGENE] + ["learngene_ema.safetensors"] * (run.ema is not None)
    else:
        files += [MODEL, "config.json"]
    with error_context("--push-to-hub"):
        print_main(f"uploaded: {upload(folder, files, output.push_to_hub)}")


def card_facts(run: Run) -> dict[str, str]:
    """What the model card says about the run besides the options."""
    data, teacher = run.config.data, run.config.teacher
    facts = {**run.facts, "data": f"{data.data_set}, {len(run.classes)} classes, {data.input_size} pixels"}
    if data.train_images:
        facts["training images"] = f"{data.train_images:,}"
    if data.holdout:
        facts["test images"] = f"{data.holdout:,} training images that were held out"
    distils = teacher.distillation_type != "none"
    facts["teacher"] = f"{teacher.teacher_model}, {teacher.distillation_type} distillation" if distils else "none"
    facts["parameters"] = f"{sum(p.numel() for p in run.model.parameters()):,}"
    return facts
