#!/usr/bin/env python3
"""Export the model of a folder to model.onnx and model.pt2, with a dynamic batch size.

scripts/export_model.py --model output/des
scripts/export_model.py --model output/des --formats onnx --images picture.jpg other.png
scripts/export_model.py --model output/des --int8 --data-set IMNET --data-path /path/to/imagenet

Each file is loaded again and compared with the model before it replaces an existing one. --int8 also quantises
model.onnx, and --data-set prints the accuracy of each file.
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
from common import console
from common.files import atomic_write
from datasets import SHARDED, build_dataset
from models.formats.class_names import first_difference
from models.formats.timm_folder import averaged_folder
from models.preprocessing import Preprocessing
from options import DATA_SETS, local_path, place
from pipeline.loader import CheckedDataset, CheckedLoader, collate
from scripts.predict import load, printable, read_picture
from training.label_check import names_known

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils.data import DataLoader, Dataset

TOLERANCE = 1e-4  # between logits
INT8 = "model_int8.onnx"
INT8_TOLERANCE = 0.25  # of the spread of the logits
BATCH = 64  # images of an accuracy
MAX_BATCH = 2**31 - 1  # torch 2.6 cannot export position embeddings for an unlimited batch
ONNX_LIMIT = 1536 * 2**20  # bytes of weights; for more, torch writes a second file


class ExportError(Exception):
    """The model cannot be exported; printed as one line."""


# ---------------------------------------------------------------------------------------------------------------------
# Two functions per format: write a file, and load it as a function images → logits
# ---------------------------------------------------------------------------------------------------------------------


def write_onnx(program: ExportedProgram, path: str) -> None:
    names = dict(input_names=["images"], output_names=["logits"])
    # torch 2.6 does not optimise by default
    torch.onnx.export(program, (), path, **names, dynamo=True, optimize=True, external_data=False, verbose=False)


def read_onnx(path: str) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised anyway
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def write_torch(program: ExportedProgram, path: str) -> None:
    with open(path, "wb") as file:  # as a path it would have to end in .pt2
        torch.export.save(program, file)


def read_torch(path: str) -> Callable[[Tensor], Tensor]:
    # torch.export.load can execute code from a file; this file was just written here
    with open(path, "rb") as file:
        return torch.export.load(file).module()


FORMATS = {  # name → file, writer, reader, additional packages
    "onnx": ("model.onnx", write_onnx, read_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "torch": ("model.pt2", write_torch, read_torch, ()),
}


def trace(model: nn.Module, size: Sequence[int]) -> ExportedProgram:
    """Trace ``model`` for batches of images of ``size`` (channels, height, width).

    Raises:
        ExportError: torch cannot trace the model.
    """
    # a batch of one would be traced as constant; files contain the example, so it must not be one of the pictures
    example = torch.zeros(2, *size)
    try:
        with quiet():
            return torch.export.export(
                model, (example,), dynamic_shapes=({0: Dim("batch", max=MAX_BATCH)},), strict=False
            )
    except Exception as error:  # exporters raise all kinds of errors
        raise ExportError(f"torch {torch.__version__} cannot export this model: {reason(error)}") from error


def write(program: ExportedProgram, format: str, path: Path, images: Tensor, logits: Sequence[Tensor]) -> float:
    """Write ``program`` to ``path`` and compare its logits with the model's.

    Args:
        logits: of the model, one tensor per batch size to test, each for the first images.

    Returns:
        The largest absolute difference of a logit.

    Raises:
        InputError: ``path`` cannot be written.
        ExportError: the exporter failed, or the difference is too large; ``path`` is unchanged.
    """
    _, writer, reader, packages = FORMATS[format]
    try:
        with atomic_write(path) as unfinished, quiet(), torch.no_grad():
            writer(program, unfinished)
            exported = reader(unfinished)
            difference = torch.cat([exported(images[: len(some)]) - some for some in logits]).abs().max().item()
            if not difference <= TOLERANCE:  # catches NaN, too
                raise ExportError(f"its logits are {difference:.1e} off the model's, more than {TOLERANCE:.0e}")
    except OSError as error:
        raise models.InputError(f"{path} cannot be written: {error.strerror or error}") from error
    except Exception as error:  # exporters raise all kinds of errors
        raise ExportError(f"{path} is not written ({versions_of('torch', *packages)}): {reason(error)}") from error
    return difference


def write_int8(source: Path, path: Path, images: Tensor, logits: Tensor) -> float:
    """Quantise the matrices of an ONNX file to 8 bits, and compare the logits with the model's.

    The quantisation is dynamic: activations get their scale in each call, so no images are needed for a calibration.
    The patch embedding, a convolution, stays in float. Weights are unsigned, because products of signed and unsigned
    bytes overflow on processors without VNNI.

    Args:
        source: ``model.onnx``.
        images: (count, channels, height, width).
        logits: of the model, for ``images``.

    Returns:
        The root of the mean squared difference of a logit, as a share of the standard deviation of the model's logits
        of an image.

    Raises:
        InputError: ``path`` cannot be written.
        ExportError: the quantisation failed, or the difference is too large; ``path`` is unchanged.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    program = onnx.load(source)
    del program.graph.value_info[:]  # shapes, of which the quantisation changes some
    try:
        with atomic_write(path) as unfinished, quiet():
            quantize_dynamic(program, unfinished, ["MatMul"], per_channel=True, weight_type=QuantType.QUInt8)
            difference = read_onnx(unfinished)(images) - logits
            spread = logits.std(dim=1, correction=0).square().mean().sqrt()
            share = (difference.square().mean().sqrt() / spread).item()
            if not share <= INT8_TOLERANCE:  # catches NaN, too
                raise ExportError(
                    f"its logits are {share:.0%} of their spread off the model's, over {INT8_TOLERANCE:.0%}"
                )
    except OSError as error:
        raise models.InputError(f"{path} cannot be written: {error.strerror or error}") from error
    except Exception as error:  # exporters raise all kinds of errors
        raise ExportError(f"{path} is not written ({versions_of('onnx', 'onnxruntime')}): {reason(error)}") from error
    return share


def versions_of(*packages: str) -> str:
    return ", ".join(f"{name} {import_module(name).__version__}" for name in packages)


def reason(error: Exception) -> str:
    """The first line of the original error."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = str(error).strip().partition("\n")[0][:300]
    return line if isinstance(error, ExportError) else f"{type(error).__name__} {line}"


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the exporters' warnings about their own internals."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable()
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def check_formats(text: str, model: nn.Module) -> list[str]:
    """Parse a list of formats such as 'onnx,torch'.

    Raises:
        InputError: a format is unknown, unsuitable for the size of the model, or needs a package that is not installed.
    """
    formats = list(dict.fromkeys(text.split(",")))
    for format in formats:
        if format not in FORMATS:
            raise models.InputError(f"--formats {text}: {format!r} is unknown, expected {' or '.join(FORMATS)}")
        for package in FORMATS[format][3]:
            try:
                import_module(package)
            except ImportError as error:
                needed = " ".join(FORMATS[format][3])
                raise models.InputError(
                    f"--formats {format} needs {package}, which cannot be imported: pip install {needed}"
                ) from error
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if "onnx" in formats and size > ONNX_LIMIT:
        raise models.InputError(f"--formats onnx takes up to {ONNX_LIMIT:,} bytes of weights: the model has {size:,}")
    return formats


def build_test_set(name: str, path: str | None, transform: Callable, config: Mapping) -> Dataset:
    """The test images of --data-set.

    Raises:
        InputError: they are not there, or have other classes than the model.
    """
    dataset, classes = build_dataset(name, path, is_train=False, transform=transform, single_split=True)
    if len(classes) != config["num_classes"]:
        raise models.InputError(f"--data-set {name} has {len(classes)} classes, the model {config['num_classes']}")
    if difference := first_difference(config.get("label_names"), names_known(name, classes)):
        raise models.InputError(f"--data-set {name} has other classes than the model: {difference}")
    return dataset


def accuracies(exported: Sequence[Callable[[Tensor], Tensor]], dataset: Dataset, config: Mapping) -> list[float]:
    """Of each model the share of images whose most probable class is theirs; each image is read once.

    Raises:
        InputError: an image cannot be read.
    """
    loader = DataLoader(CheckedDataset(dataset), BATCH, collate_fn=collate)
    preparation = Preprocessing.from_config(config["pretrained_cfg"])
    checked = CheckedLoader(loader, False, torch.device("cpu"), mean=preparation.mean, std=preparation.std)
    right = [0] * len(exported)
    with torch.no_grad():
        for images, labels in checked:
            for i, logits_of in enumerate(exported):
                right[i] += (logits_of(images).argmax(dim=1) == labels).sum().item()
    return [number / len(dataset) for number in right]


def run(args: argparse.Namespace) -> None:
    folder = averaged_folder(args.model) if args.model_ema else args.model
    model, transform, config = load(folder)
    formats = check_formats(args.formats, model)
    if args.int8 and "onnx" not in formats:
        raise models.InputError(f"--int8 quantises model.onnx: expected onnx in --formats, found {args.formats}")
    if args.data_path and not args.data_set:
        raise models.InputError(f"--data-path {args.data_path} needs --data-set: expected the kind of its data")
    dataset = build_test_set(args.data_set, args.data_path, transform, config) if args.data_set else None
    if args.images:
        images = [transform(read_picture(path)) for path in args.images]
    else:
        digits, _ = build_dataset("DIGITS", None, is_train=False, transform=transform)
        images = [digits[i][0] for i in range(16)]
    images = torch.stack(images * 2 if len(images) == 1 else images)
    sizes = sorted({1, 2, len(images)})
    program = trace(model, images.shape[1:])
    with torch.no_grad():
        logits = [model(images[:size]) for size in sizes]
    batches = f"{', '.join(map(str, sizes[:-1]))} and {sizes[-1]}"
    readers = {}
    for format in formats:
        path, readers[path] = folder / FORMATS[format][0], FORMATS[format][2]
        difference = write(program, format, path, images, logits)
        print(printable(f"{path}: largest difference of a logit {difference:.1e}, in batches of {batches} images"))
    if args.int8:
        source, path, readers[path] = folder / FORMATS["onnx"][0], folder / INT8, read_onnx
        share = write_int8(source, path, images, logits[-1])
        size = path.stat().st_size / source.stat().st_size
        print(printable(f"{path}: {size:.0%} of the bytes, logits {share:.1%} of their spread off the model's"))
    if dataset is not None:
        found = accuracies([reader(str(path)) for path, reader in readers.items()], dataset, config)
        for path, share in zip(readers, found, strict=True):
            print(printable(f"{path}: accuracy {share:.2%} on {len(dataset):,} test images of {args.data_set}"))


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--model", required=True, type=local_path, metavar="FOLDER", help="with model.safetensors and config.json"
    )
    p.add_argument("--model-ema", action="store_true", help="export the averaged weights, in FOLDER/model_ema")
    p.add_argument("--formats", default="onnx,torch", help="onnx, torch (torch.export), or both")
    p.add_argument("--int8", action="store_true", help=f"also write {INT8}, whose matrices have 8 bits")
    local = [name for name in DATA_SETS if name not in SHARDED]  # those need options of main.py
    p.add_argument("--data-set", choices=local, help="print the accuracy of each file on its test images")
    p.add_argument("--data-path", type=place, metavar="FOLDER", help="the folder that holds the data set")
    p.add_argument(
        "--images",
        type=place,
        nargs="+",
        metavar="FILE",
        help="to compare on; default: 16 handwritten digits",
    )
    try:
        run(p.parse_args())
    except models.InputError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 2
    except ExportError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    console.accept_any_text()
    sys.exit(main())
