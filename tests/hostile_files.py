"""Mutated files of every format that the program reads, and the readers that it uses for them."""

import copy
import io
import json
import random
import resource
import shutil
import signal
import zipfile
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import models
from models.formats.timm_folder import read_model, save_model
from models.learngene import to_published
from models.listed import read_list
from training.checkpoints import resume, write_checkpoint
from training.command_line import parse_options
from training.foreign_weights import load_foreign_weights
from training.run import accuracy

import torch
import yaml
from conftest import TESTS, set_up_run
from safetensors.torch import load_file, save

HUGE = 2**40
PLAIN = "--data-set DIGITS --model deit_nano_patch8_16_L2 --num-workers 0 --batch-size 64 --warmup-epochs 0"
RUN_CONFIG = "model: deit_nano_patch8_16_L2\ndata-set: DIGITS\nlr: 5e-4\nmapping-layer: [0, 1]\npin-mem: true\n"


# ---------------------------------------------------------------------------------------------------------------------
# Mutations
# ---------------------------------------------------------------------------------------------------------------------


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Cut off, with flipped bits, or with a block of something else; often near the beginning, where headers are."""
    span = len(content) if rng.random() < 0.5 else min(len(content), 600)
    at = rng.randrange(span)
    kind = rng.randrange(5)
    if kind == 0:
        return content[:at]
    if kind == 1:
        flipped = bytearray(content)
        for _ in range(rng.choice((1, 1, 1, 8))):
            flipped[rng.randrange(span)] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    block = rng.randbytes(rng.choice((1, 4, 8, 64)))
    if kind == 2:
        block = rng.choice((bytes(len(block)), b"\xff" * len(block)))
    end = at if kind == 4 else at + len(block)
    return content[:at] + block + content[end:]


def mutate_tensors(tensors: dict, rng: random.Random) -> dict:
    """A state dict with something wrong in one of its tensors."""
    tensors = dict(tensors)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name].clone()
    kind = rng.randrange(9)
    if kind == 0:
        del tensors[name]
        return tensors
    if kind == 1:
        tensors[rng.choice(("extra", "blocks.9.attn.q.weight", "blocks.999999999.norm1.weight", ""))] = tensor
        return tensors
    if kind == 2:
        tensor = tensor.reshape(-1) if tensor.ndim > 1 else tensor[None]
    elif kind == 3:
        tensor = tensor.new_empty(rng.choice(((0,), (0, *tensor.shape), ())))
    elif kind == 4:
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice((float("nan"), float("inf")))
    elif kind == 5:
        tensor = tensor.to(rng.choice((torch.int64, torch.bool, torch.float16, torch.int8)))
    elif kind == 6:
        tensor = torch.cat([tensor, tensor]) if tensor.ndim else tensor.expand(2).clone()
    elif kind == 7:
        tensor = tensor[..., :-1].clone() if tensor.ndim else tensor[None]
    else:
        tensor = tensor.movedim(0, -1).contiguous() if tensor.ndim else tensor.to(torch.int64)
    tensors[name] = tensor
    return tensors


def mutate_values(value: object, rng: random.Random) -> object:
    """Plain data with one of its values replaced."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        return {**value, key: mutate_values(value[key], rng)}
    wrong = (
        None,
        -1,
        0,
        1,
        3.5,
        HUGE,
        2**80,
        10**400,
        float("nan"),
        "x",
        "x" * 5000,
        True,
        [],
        {},
        [1, 2],
        [[]],
        {"a": {}},
    )
    return rng.choice(wrong)


# ---------------------------------------------------------------------------------------------------------------------
# Formats: a good file, and what can be wrong with it besides its bytes
# ---------------------------------------------------------------------------------------------------------------------


def as_safetensors(tensors: dict, header: object, rng: random.Random) -> bytes:
    """A learngene or model file, perhaps declaring other shapes and places than those of its tensors."""
    content = save(tensors, metadata=None if header is None else {"learngene": json.dumps(header)})
    if rng.random() < 0.8:
        return content
    begin = 8 + int.from_bytes(content[:8], "little")
    table = json.loads(content[8:begin])
    entry = table[rng.choice([name for name in table if name != "__metadata__"])]
    if rng.random() < 0.5:
        entry["shape"] = rng.choice(([HUGE, HUGE], [HUGE], [0, HUGE], [2**64], [-1]))
    if rng.random() < 0.7:
        entry["data_offsets"] = rng.choice(([0, HUGE], [HUGE, HUGE + 4], [8, 4], [0, 2**64]))
    text = json.dumps(table).encode()
    length = rng.choice((len(text), len(text), HUGE, 2**63, len(text) + 1))
    return length.to_bytes(8, "little") + text + content[begin:]


def as_torch(content: object, rng: random.Random) -> bytes:
    """A checkpoint as torch writes it: now, as it did once, or compressed, which it never does."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=rng.random() < 0.8)
    if rng.random() < 0.9 or not zipfile.is_zipfile(file):
        return file.getvalue()
    packed = io.BytesIO()
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            data = source.read(entry)
            target.writestr(entry.filename, data + bytes(2**26 if entry.filename.endswith("data/0") else 0))
    return packed.getvalue()


def strange_tensor(rng: random.Random) -> object:
    """What a pickle may hold in place of a tensor: nothing of it is in the file."""
    one = torch.ones(1)
    return rng.choice(
        (
            one.expand(HUGE),
            one.expand(2**20, 2**20),
            torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.int64), one, (2**30, 2**30)),
            torch.empty(2**20, 2**20, device="meta"),
            one.to(torch.complex64),
            torch.quantize_per_tensor(one, 0.1, 0, torch.quint8),
            {"a": one},
            [one],
            "text",
            None,
        )
    )


def mutate_checkpoint(content: dict, rng: random.Random) -> dict:
    """A checkpoint with something wrong in its weights, its optimiser's state, or its plain data."""
    content = copy.deepcopy(content)
    key = rng.choice(sorted(content))
    if key in ("model", "model_ema") and rng.random() < 0.7:
        content[key] = mutate_tensors(content[key], rng)
    elif key in ("model", "model_ema"):
        content[key][rng.choice(sorted(content[key]))] = strange_tensor(rng)
    elif key == "optimizer" and content[key]["state"] and rng.random() < 0.7:
        moments = content[key]["state"][rng.choice(sorted(content[key]["state"]))]
        if rng.random() < 0.3:
            moments[rng.choice(sorted(moments))] = strange_tensor(rng)
        else:
            moments.update(mutate_tensors(moments, rng))
    elif key == "args":
        content[key] = Namespace(**{"tgt_arch": mutate_values("x", rng), "lr": [1, {"a": 2}]})
    else:
        content[key] = mutate_values(content[key], rng)
    return content


def small_aux_net(method: str) -> models.AuxNet:
    torch.manual_seed(0)
    if method == "lets":
        return models.create_aux_net("deit_nano_patch8_16_L2_H1", "deit_nano_patch8_16_L4", num_classes=10)
    return models.create_model("aux_deit_nano_patch8_16_L4_H1", num_classes=10)


def own_gene(method: str, folder: Path) -> Callable[[random.Random], bytes]:
    gene = models.Learngene.of(small_aux_net(method), {"epochs": 3})
    gene.save(folder / "good")
    header, tensors = gene.header, {name: t.detach() for name, t in gene.tensors.items()}

    def structural(rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            return as_safetensors(tensors, mutate_values(header, rng), rng)
        return as_safetensors(mutate_tensors(tensors, rng), header, rng)

    return structural


def published_gene(method: str, folder: Path) -> Callable[[random.Random], bytes]:
    good = torch.load(TESTS / "fixtures" / f"{method}_learngene.pth", weights_only=False)
    # two layers instead of eight or twelve, in a fraction of the time
    weights = to_published(models.Learngene.of(small_aux_net(method)))
    good |= {"model": weights, "model_ema": {name: tensor.clone() for name, tensor in weights.items()}}
    torch.save(good, folder / "good")
    return lambda rng: as_torch(mutate_checkpoint(good, rng), rng)


def checkpoint(folder: Path) -> Callable[[random.Random], bytes]:
    run = set_up_run([*PLAIN.split(), "--epochs", "2", "--output-dir", str(folder / "run")])
    for parameter in run.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    run.optimizer.step()
    run.epoch = 1
    write_checkpoint(run)
    shutil.copy(folder / "run" / "checkpoint.pth", folder / "good")
    good = torch.load(folder / "good", weights_only=True)
    return lambda rng: as_torch(mutate_checkpoint(good, rng), rng)


def model_weights(folder: Path) -> Callable[[random.Random], bytes]:
    model = models.create_model("deit_nano_patch8_16_L2", num_classes=10)
    data = {"input_size": [3, 16, 16], "crop_pct": 1.0, "crop_mode": "squash"}
    save_model(model, folder, models.parse_arch("deit_nano_patch8_16_L2"), {}, data, list("0123456789"))
    shutil.copy(folder / "model.safetensors", folder / "good")
    tensors = load_file(folder / "good")
    return lambda rng: as_safetensors(mutate_tensors(tensors, rng), None, rng)


def model_config(folder: Path) -> Callable[[random.Random], bytes]:
    model_weights(folder)
    shutil.copy(folder / "config.json", folder / "good")
    good = json.loads((folder / "good").read_text())
    return lambda rng: json.dumps(mutate_values(good, rng)).encode()


def as_yaml(value: object, rng: random.Random) -> bytes:
    """YAML of a value, perhaps with aliases that would make gigabytes of it, or deep nesting."""
    text = yaml.safe_dump(value)
    if rng.random() < 0.1:
        text = "a: &a [x, x]\n" + "".join(
            f"{chr(c)}: &{chr(c)} [*{chr(c - 1)}, *{chr(c - 1)}]\n" for c in range(98, 123)
        )
    elif rng.random() < 0.1:
        text = "lr: " + "[" * 400 + "]" * 400
    elif rng.random() < 0.1:
        text += rng.choice(("lr: !!python/name:os.system\n", "? [a]\n: 1\n", "lr: !!binary aaaa\n", "1: 2\n"))
    return text.encode()


def run_config(folder: Path) -> Callable[[random.Random], bytes]:
    (folder / "good").write_text(RUN_CONFIG)
    return lambda rng: as_yaml(mutate_values(yaml.safe_load(RUN_CONFIG), rng), rng)


def registry(folder: Path) -> Callable[[random.Random], bytes]:
    shutil.copy(TESTS.parent / "scripts" / "learngenes.yaml", folder / "good")
    good = yaml.safe_load((folder / "good").read_text())
    return lambda rng: as_yaml([mutate_values(good[0], rng)], rng)


# ---------------------------------------------------------------------------------------------------------------------
# Readers, as the program uses them
# ---------------------------------------------------------------------------------------------------------------------


def read_gene(head_dim: int) -> Callable[[Path], object]:
    return partial(models.load_learngene, head_dim=head_dim)


def resume_reader() -> Callable[[Path], object]:
    run = set_up_run([*PLAIN.split(), "--epochs", "2"])
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def read(path: Path) -> None:
        run.config = run.config.with_options(resume=str(path))
        resume(run)
        run.optimizer.step()
        run.scheduler.step(run.epoch)
        run.train_loader.sampler.set_position(run.epoch, run.position.images)
        json.dumps([*run.epochs, max(run.epochs, key=accuracy, default=None), run.position.state()])

    return read


def finetune() -> Callable[[Path], object]:
    model = models.create_model("deit_nano_patch8_16_L2", num_classes=10)
    return lambda path: load_foreign_weights(model, str(path), "--finetune", other_head=True)


def folder_with(name: str) -> Callable[[Path], object]:
    """Reads the model folder after putting the file into it under ``name``."""

    def read(path: Path) -> object:
        folder = path.parent if path.name == "good" else path.parent.parent
        shutil.copy(path, folder / name)
        return read_model(folder)

    return read


def read_run_config() -> Callable[[Path], object]:
    return lambda path: parse_options(["--config", str(path)])


def read_registry() -> Callable[[Path], object]:
    return read_list


class Format(NamedTuple):
    """How a good file is written, with what can be wrong with it besides its bytes; and how it is read."""

    make: Callable[[Path], Callable[[random.Random], bytes]]
    reader: Callable[[], Callable[[Path], object]]


FORMATS = {
    "lets": Format(partial(own_gene, "lets"), partial(read_gene, 32)),
    "tleg": Format(partial(own_gene, "tleg"), partial(read_gene, 32)),
    "published-lets": Format(partial(published_gene, "lets"), partial(read_gene, 32)),
    "published-tleg": Format(partial(published_gene, "tleg"), partial(read_gene, 32)),
    "checkpoint": Format(checkpoint, resume_reader),
    "weights": Format(model_weights, finetune),
    "folder-weights": Format(model_weights, partial(folder_with, "model.safetensors")),
    "folder-config": Format(model_config, partial(folder_with, "config.json")),
    "run-config": Format(run_config, read_run_config),
    "registry": Format(registry, read_registry),
}


# ---------------------------------------------------------------------------------------------------------------------
# The process that reads
# ---------------------------------------------------------------------------------------------------------------------

SECONDS = 240  # after which a file counts as one that hangs its reader


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Hang(BaseException):
    """Not an Exception: no reader may take it for what is wrong with the file."""


def hang(*_) -> None:
    raise Hang("the reader hangs")


def read_all(name: str, folder: Path) -> dict:
    """Read the mutated files of a format: how often what happened, and the growth of memory in bytes."""
    read = FORMATS[name].reader()
    good = read(folder / "good")  # which also imports what reading needs
    signal.signal(signal.SIGALRM, hang)
    before = peak()
    ends = {"read": 0, "refused": 0, "wrong": []}
    for path in sorted((folder / "bad").iterdir()):
        signal.alarm(SECONDS)
        try:
            found = read(path)
            ends["read"] += 1
            # a flipped bit can make a consistent file of another size, but not one of other parts
            if isinstance(good, models.Learngene) and found.tensors.keys() != good.tensors.keys():
                ends["wrong"].append(f"{path.name}: read as {found}")
        except models.InputError as error:
            ends["refused"] += 1
            if "\n" in str(error) or len(str(error)) > 1500:
                ends["wrong"].append(f"{path.name}: {str(error)[:2000]}")
        except (Exception, Hang) as error:
            ends["wrong"].append(f"{path.name}: {type(error).__name__}: {str(error)[:300]}")
        signal.alarm(0)
    return {**ends, "grown": peak() - before}


def read_large(path: Path) -> dict:
    """The growth of memory by reading a learngene, and by making a small Des-Net of it."""
    before = peak()
    models.load_learngene(path).descend("deit_base_patch16_224_L1_H1")
    return {"grown": peak() - before}


def read_bomb(path: Path) -> dict:
    """What is said of a file that is no learngene, and the growth of memory by reading it."""
    before = peak()
    try:
        models.load_learngene(path)
    except models.InputError as error:
        return {"said": str(error), "grown": peak() - before}
    return {"said": "read", "grown": peak() - before}


def report(name: str, path: Path, result: Path) -> None:
    """Read what is at ``path``, and write what happened to a JSON file."""
    readers = {"large": read_large, "bomb": read_bomb}
    result.write_text(json.dumps(readers[name](path) if name in readers else read_all(name, path)))
