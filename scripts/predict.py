#!/usr/bin/env python3
"""Predict the most probable classes of pictures with a model folder written by main.py.

scripts/predict.py --model output/des picture.jpg other.png
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
from common import console
from models.formats.timm_folder import averaged_folder, read_model
from models.preprocessing import Preprocessing
from options import place
from pipeline.images import apply_orientation, as_rgb

import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

# those of torchvision's ImageFolder; Pillow supports more, such as PostScript, for which it starts another program
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# the shorter side is resized to the model's input size; these limits keep the longer one from filling the memory
LARGEST = 2048  # pixels of the resized shorter side
LONGEST = 100  # ratio of the sides
LINE = 100  # characters of a class name with its description


def load(folder: str | Path) -> tuple[nn.Module, Callable[[Image.Image], Tensor], dict]:
    """Load a model folder.

    Returns:
        The model, the evaluation transform of main.py (RGB picture → (3, height, width)), and ``config.json``.

    Raises:
        InputError: a file is missing or damaged, or the files do not match.
    """
    model, config = read_model(folder)
    images = config["pretrained_cfg"]
    if max(images["input_size"]) / Preprocessing.from_config(images).crop_pct > LARGEST:
        raise models.InputError(f"{folder}/config.json: input_size or crop_pct makes pictures of over {LARGEST} pixels")
    try:
        transform = create_transform(**resolve_data_config(pretrained_cfg=images), is_training=False)
        with torch.inference_mode():
            found = model(transform(Image.new("RGB", (32, 32)))[None]).shape
    except Exception as error:  # invalid values raise all kinds of errors
        what = f"{type(error).__name__} {' '.join(str(error).split())[:300]}"
        raise models.InputError(f"{folder}/config.json does not describe how to prepare pictures: {what}") from error
    if found != (1, config["num_classes"]):
        raise models.InputError(f"{folder} gives {tuple(found)} for one picture, expected (1, {config['num_classes']})")
    return model, transform, config


def read_picture(path: str | Path) -> Image.Image:
    """Load a picture as RGB with 8 bits per channel, rotated as its EXIF orientation says.

    Raises:
        InputError: the file is missing, damaged, not a picture, or too elongated to be resized in memory.
    """
    if not Path(path).is_file():
        raise models.InputError(f"{path} is {'a folder' if Path(path).is_dir() else 'missing'}: expected a picture")
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large pictures and unusual metadata
            picture = Image.open(file, formats=FORMATS)
            picture.load()
            picture = apply_orientation(as_rgb(picture))
    except Image.UnidentifiedImageError as error:
        raise models.InputError(f"{path} is no picture: expected one of {', '.join(FORMATS)}") from error
    except Exception as error:  # damaged files make the parsers raise all kinds of errors
        what = " ".join(str(error).split())[:300]
        raise models.InputError(f"{path} cannot be read as a picture: {what or type(error).__name__}") from error
    if max(picture.size) > LONGEST * min(picture.size):
        size = "×".join(map(str, picture.size))
        raise models.InputError(f"{path} has {size} pixels: expected a side at most {LONGEST} times the other")
    return picture


def printable(text: object) -> str:
    """``text`` without control characters, which a terminal would interpret."""
    return "".join(character for character in str(text) if character.isprintable())


def class_names(config: Mapping) -> list[str]:
    """Name and description of each class, or its number."""
    names = config.get("label_names") or range(config["num_classes"])
    meanings = config.get("label_descriptions", {})
    return [printable(f"{name}  {meanings.get(name, '')}").rstrip()[:LINE] for name in names]


def most_probable(logits: Tensor, names: Sequence[str], top_k: int) -> Iterable[str]:
    """One line per class, most probable first, for the logits (classes,) of one picture."""
    for probability, index in zip(*logits.double().softmax(-1).topk(min(top_k, len(names))), strict=True):
        yield f"{probability.item():8.2%}  {names[index]}"


def predict(args: argparse.Namespace) -> None:
    if args.top_k < 1:
        raise models.InputError(f"--top-k {args.top_k} is too small: at least 1")
    folder = averaged_folder(args.model) if args.model_ema else args.model
    model, transform, config = load(folder)
    with torch.inference_mode():  # one by one: all pictures may not fit into memory
        logits = torch.cat([model(transform(read_picture(path))[None]) for path in args.images])
    if not logits.isfinite().all():
        raise models.InputError(f"{folder} gives logits that are not finite")
    names = class_names(config)
    for path, row in zip(args.images, logits, strict=True):
        print(printable(path), *most_probable(row, names, args.top_k), sep="\n")


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--model", type=place, required=True, metavar="FOLDER", help="with model.safetensors and config.json"
    )
    p.add_argument("--model-ema", action="store_true", help="take the averaged weights, in FOLDER/model_ema")
    p.add_argument("--top-k", type=int, default=5, help="how many classes to show")
    p.add_argument("images", type=place, nargs="+", metavar="IMAGE", help=f"file of the kind {', '.join(FORMATS)}")
    try:
        predict(p.parse_args())
    except models.InputError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    console.accept_any_text()
    sys.exit(main())
