"""A trained model as a folder in timm's own format: ``model.safetensors`` and ``config.json``.

timm alone reads it (``timm.create_model("local-dir:FOLDER", pretrained=True)``), and so does the Hugging Face Hub.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from common.errors import InputError, one_line
from common.files import atomic_write, read_checkpoint, read_json
from models.formats.weights import weights_of
from models.kinds import is_kind, sizes_of
from models.meta import WeightsOnMeta
from models.names import parse_arch
from models.preprocessing import Preprocessing
from models.stateless import vit_from_weights
from models.vit import PLAIN_VIT, ViTArch, create_vit, timm_kwargs

import timm
from safetensors.torch import save_file
from torch import Tensor, nn

AVERAGED_FOLDER = "model_ema"  # in the folder of a model, the folder of its average over the steps of training


def save_model(
    model: nn.Module,
    folder: str | os.PathLike,
    arch: str | ViTArch,
    model_args: Mapping,
    data_config: Mapping,
    label_names: Sequence[str] = (),
    label_descriptions: Mapping[str, str] | None = None,
) -> None:
    """Write ``model.safetensors`` and ``config.json``, each atomically.

    Args:
        model: a model that timm made.
        arch: kind and sizes of a ViT, or a name of timm's.
        model_args: what timm's entry of that name needs to make the same model; plain data.
        data_config: of evaluation, with timm's keys: ``input_size`` (channels, height, width), ``crop_pct``,
            ``crop_mode``, ``interpolation``, ``mean`` and ``std``.
        label_names: the classes in the order of the logits.
        label_descriptions: name → text, where the names are codes such as ImageNet's.
    """
    kept = ("first_conv", "classifier", "fixed_input_size", "pool_size")
    known = {key: value for key, value in dict(model.pretrained_cfg).items() if key in kept and value is not None}
    config = {
        "architecture": (arch.kind or PLAIN_VIT) if isinstance(arch, ViTArch) else arch,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": timm_kwargs(arch) if isinstance(arch, ViTArch) else dict(model_args),
        "pretrained_cfg": {"num_classes": model.num_classes, **known, **data_config},
    }
    if label_names:
        config["label_names"] = list(label_names)
    if label_descriptions:
        config["label_descriptions"] = dict(label_descriptions)
    folder = Path(folder)
    with atomic_write(folder / "model.safetensors") as unfinished:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, unfinished)
    with atomic_write(folder / "config.json") as unfinished:
        Path(unfinished).write_text(json.dumps(config, indent=2) + "\n")


def read_model(folder: str | os.PathLike) -> tuple[nn.Module, dict]:
    """The model in a folder that `save_model` wrote, in evaluation mode, and the content of its ``config.json``.

    Raises:
        InputError: a file is missing or damaged, or the two do not fit each other.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: expected one with model.safetensors and config.json")
    config = read_json(folder / "config.json")
    weights = weights_of(read_checkpoint(folder / "model.safetensors"), folder / "model.safetensors")
    try:
        _check_config(config)
        return _model_of(config, weights).eval(), config
    except InputError as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        what = f"{type(error).__name__} {one_line(error)}"
        raise InputError(f"{folder / 'config.json'} does not describe model.safetensors: {what}") from error


def averaged_folder(folder: str | os.PathLike) -> Path:
    """The folder of the averaged weights of the model in ``folder``.

    Raises:
        InputError: there is none.
    """
    averaged = Path(folder) / AVERAGED_FOLDER
    if not (averaged / "model.safetensors").is_file():
        raise InputError(f"{folder} has no averaged weights: expected {averaged}, which main.py --model-ema writes")
    return averaged


def _model_of(config: Mapping, weights: dict[str, Tensor]) -> nn.Module:
    """The model of ``config`` with ``weights``. Shapes are compared before anything is allocated."""
    name, num_classes, model_args = config["architecture"], config["num_classes"], config["model_args"]
    if not timm.is_model(name):
        raise InputError(f"architecture {str(name)[:100]!r} is none that the installed timm knows")
    arch, shape = None, {"num_classes": num_classes}
    if "embed_dim" in model_args:
        arch = _arch_of(name, model_args)
        shape["in_chans"] = config["pretrained_cfg"]["input_size"][0]
        create = partial(create_vit, arch, **shape)
    elif model_args.keys() <= {"img_size"}:
        if is_kind(name):
            replace(parse_arch(name), **model_args)  # no more patches than there may be
        create = partial(timm.create_model, name, **shape, **model_args)
    else:
        raise InputError(f"model_args {', '.join(model_args)[:100]} are unknown: expected img_size or none")
    with WeightsOnMeta():
        shapes = {key: tensor.shape for key, tensor in create().state_dict().items()}
    for key in shapes.keys() | weights.keys():
        if key not in shapes or key not in weights or shapes[key] != weights[key].shape:
            raise InputError(f"{key} of {name} is not in model.safetensors in the same shape")
    if arch is not None:
        return vit_from_weights(arch, weights, **shape)
    model = create()
    model.load_state_dict(weights)
    return model


def _arch_of(name: str, model_args: Mapping) -> ViTArch:
    """The ViT that ``timm.create_model(name, **model_args)`` makes.

    Raises:
        InputError: these are not the arguments of `timm_kwargs`.
    """
    sizes = {size: model_args[size] for size in ("depth", "num_heads", "patch_size", "img_size")}
    kind, width = None if name == PLAIN_VIT and "class_token" in model_args else name, model_args["embed_dim"]
    if "mlp_ratio" in model_args:  # timm's, which counts both gate and value of a packed SwiGLU
        rows = int(float(model_args["mlp_ratio"]) * width)
        sizes["mlp_ratio"] = rows / (2 if kind and sizes_of(kind)["packed"] else 1) / width
    arch = ViTArch(width, **sizes, kind=kind)
    expected = json.loads(json.dumps(timm_kwargs(arch)))
    if model_args != expected:
        raise InputError(f"model_args are not those of a ViT of these sizes: expected {expected}")
    return arch


def _check_config(config: object) -> None:
    """Raises InputError unless the values that are used have the right types."""
    if not isinstance(config, Mapping):
        raise InputError(f"holds a {type(config).__name__}, expected a mapping")
    images = config["pretrained_cfg"]
    labels = config.get("label_names")
    Preprocessing.from_config(images)
    rules = {
        "num_classes, a whole number": type(config["num_classes"]) is int,
        "input_size, three whole numbers": [type(size) for size in images["input_size"]] == [int] * 3,
        "label_names, one text per class": labels is None
        or (
            isinstance(labels, list)
            and len(labels) == config["num_classes"]
            and all(isinstance(n, str) for n in labels)
        ),
        "label_descriptions, a mapping": isinstance(config.get("label_descriptions", {}), Mapping),
    }
    for rule, kept in rules.items():
        if not kept:
            raise InputError(f"expected {rule}")
