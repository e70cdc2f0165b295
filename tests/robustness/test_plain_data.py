"""What a pickle could make of plain data that is refused, and which names of classes a file of weights gives."""

import datetime
import os
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import models
from common import plain_data
from common.errors import InputError, shown
from common.files import read_checkpoint
from models.formats.class_names import class_names
from models.formats.published import options_of
from models.formats.weights import find_weights, found_in, in_float32
from training.checkpoints import schedule_lag_in
from training.foreign_weights import load_foreign_weights

import numpy as np
import pytest
import torch
from conftest import Run, run_many
from safetensors.torch import save_file

VIT = "deit_nano_patch8_32_L2"
NAMES = [f"thing {i}" for i in range(10)]


def name(path: str) -> bytes:
    module, _, name = path.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def number(value: int) -> bytes:
    content = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def pickled(body: bytes) -> bytes:
    return b"\x80\x02}" + text("model") + body + b"s."


def zipped(path: Path, pickle: bytes) -> Path:
    """A file of torch's format with a pickle of one's own."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in entries.items():
            archive.writestr(entry, pickle if entry.endswith("data.pkl") else content)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def doubled(function: str, start: bytes, more: bytes, times: int = 30) -> bytes:
    """Each call is given the result of the call before, twice or with an argument: gigabytes, if it is allowed."""
    body = b"(" + start + b"q\x00"
    for _ in range(times):
        body += name(function) + b"h\x00" + more + b"\x86Rq\x00"
    return body + b"t"


# numpy.dtype("f4"), and one that is a Namespace at first
FLOAT = name("numpy.dtype") + text("f4") + b"\x89\x88\x87R"
STATE = b"}" + text("dtype") + text("O") + b"s" + b"}" + text("__class__") + name("numpy.dtype") + b"s\x86"
DISGUISED = name("argparse.Namespace") + b")R" + STATE + b"b"
EMPTY = name("_codecs.encode") + text("") + text("latin1") + b"\x86R"


def array(shape: bytes, dtype: bytes = FLOAT) -> bytes:
    return name("numpy._core.multiarray._reconstruct") + b")R(" + b"K\x01" + shape + dtype + b"\x89" + EMPTY + b"tb"


def scalar(dtype: bytes) -> bytes:
    return name("numpy._core.multiarray.scalar") + dtype + EMPTY + b"\x86R"


CRAFTED = {
    "paths": (doubled("pathlib.PosixPath", text("a" * 64), b"h\x00"), "pathlib.Path"),
    "a path of numbers": (name("pathlib.PurePosixPath") + number(2**70) + b"\x85R", "pathlib.Path"),
    "hex": (doubled("_codecs.encode", text("a" * 64), text("hex"), 1), "_codecs.encode"),
    "hex of bytes": (doubled("_codecs.encode", EMPTY, text("hex")), "_codecs.encode"),
    "text again and again": (b"(" + text("a" * 999) + b"q\x01" + text("latin1") + b"q\x02" + (
        name("_codecs.encode") + b"h\x01h\x02\x86R") * 999 + b"t", "_codecs.encode"),
    "many axes": (array(b"(" + number(2**2000) * 65 + b"t"), "numpy.ndarray"),
    "long axes": (array(b"(" + number(2**2000) * 60 + b"t"), "numpy.ndarray"),
    "an array of a disguised type": (array(b"K\x00\x85", DISGUISED), "numpy.dtype"),
    "a number of a disguised type": (scalar(DISGUISED), "numpy.dtype"),
}  # fmt: skip


@pytest.mark.parametrize("case", CRAFTED)
def test_pickles_that_would_grow_are_refused(case, tmp_path):
    body, said = CRAFTED[case]
    assert f"besides tensors and plain data it holds {said}; save" in refusal(zipped(tmp_path / "file", pickled(body)))


def test_torch_has_its_own_function_again(tmp_path):
    allowed = torch._weights_only_unpickler._get_allowed_globals()
    before = dict(allowed)
    refusal(zipped(tmp_path / "file", pickled(CRAFTED["hex"][0])))
    assert allowed == before
    with plain_data.allow_plain_data(10):
        assert torch._weights_only_unpickler._get_allowed_globals()["_codecs.encode"]("é", "latin1") == b"\xe9"


@pytest.mark.parametrize("legacy", [False, True])
def test_dates_and_empty_arrays_are_read(tmp_path, legacy):
    zone = datetime.timezone(datetime.timedelta(hours=2), "here")
    times = {"utc": datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc), "here": datetime.time(1, tzinfo=zone)}
    arrays = {"none": np.zeros((0, 5)), "long": np.arange(300), "none of text": np.str_("")}
    torch.save({"model": {}, **times, **arrays}, tmp_path / "file", _use_new_zipfile_serialization=not legacy)
    found = read_checkpoint(tmp_path / "file")
    assert {key: found[key] for key in times} == times
    assert (found["none"].array.shape, found["none of text"]) == ((0, 5), "")
    assert np.array_equal(found["long"].array, arrays["long"])


# ---------------------------------------------------------------------------------------------------------------------
# Messages
# ---------------------------------------------------------------------------------------------------------------------


def nested(of: Callable) -> object:
    value = of("x", "y")
    for _ in range(60):
        value = of(value, value)
    return value


@pytest.mark.parametrize(
    "of", [lambda *parts: [*parts], lambda a, b: Namespace(a=a, b=b), lambda a, b: {"a": a, "b": b}]
)
def test_a_message_does_not_write_out_what_is_nested(of):
    value = nested(of)
    with pytest.raises(InputError, match=r"schedule_lag is 'a (list|dict|Namespace)', expected 0 or 1"):
        schedule_lag_in({"schedule_lag": value})
    with pytest.raises(InputError, match=r"depth is 'a list', expected a whole number"):
        models.learngene._check_config({"depth": [value]})


def test_names_of_weights_that_are_no_text_are_not_written_out(tmp_path):
    key: frozenset = frozenset("x")
    for _ in range(60):
        key = frozenset([key, (key,)])  # which keeps its hash
    (tmp_path / "file").write_bytes(b"content")
    assert found_in({key: 1}) == "the keys a frozenset"
    assert options_of({key: 1, "lr": 2}) == {"lr": 2}
    with pytest.raises(InputError, match="no text"):
        find_weights({"model": {key: torch.ones(1), "a": torch.ones(1)}}, tmp_path / "file")
    assert [shown(value) for value in ("x" * 70, 3, None, True)] == ["x" * 60, "3", "None", "True"]


# ---------------------------------------------------------------------------------------------------------------------
# Names of classes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("of", [list, tuple])
def test_names_are_found_in_both_formats(tmp_path, legacy, of):
    content = {"model": {"a": torch.ones(3)}, "classes": of(NAMES)}
    path = tmp_path / os.fsdecode(b"of \xff.safetensors")  # a name that is no text, nor says what it is
    torch.save(content, tmp_path / "file", _use_new_zipfile_serialization=not legacy)
    (tmp_path / "file").rename(path)
    assert class_names(path) == NAMES
    assert class_names(path, read_checkpoint(path)) == NAMES


def test_names_are_found_beside_weights_whose_path_is_no_text(tmp_path):
    folder = tmp_path / os.fsdecode(b"of \xff")
    folder.mkdir()
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").rename(folder / "model.safetensors")
    (folder / "config.json").write_text('{"label_names": ["a", "b"]}')
    assert class_names(folder / "model.safetensors") == ["a", "b"]


def test_the_weights_are_not_read_for_the_names(tmp_path, monkeypatch):
    torch.save({"model": {"a": torch.ones(3)}, "classes": NAMES}, tmp_path / "file")
    asked, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: asked.append(options["mmap"]) or load(*args, **options))
    assert class_names(tmp_path / "file") == NAMES
    assert read_checkpoint(tmp_path / "file")["classes"] == NAMES
    assert asked == [True, False]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("teachers")
    content = {"model": models.create_model(VIT, num_classes=10).state_dict(), "classes": NAMES}
    torch.save(content, folder / "legacy", _use_new_zipfile_serialization=False)
    torch.save(content, folder / "whole")
    whole = (folder / "whole").read_bytes()
    at = whole.index(b"data.pkl")
    (folder / "cut").write_bytes(whole[: len(whole) // 2])
    (folder / "local header").write_bytes(whole.replace(whole[at - 40 : at], bytes(40)))
    central = whole.rindex(b"PK\1\2", 0, whole.index(b"data.pkl", at + 9))
    for case, (place, value) in {"encrypted": (8, 1), "method": (10, 99), "deflated": (10, 8)}.items():
        (folder / case).write_bytes(whole[: central + place] + bytes([value]) + whole[central + place + 1 :])
    options = f"--data-set DIGITS --batch-size 32 --num-workers 0 --model {VIT} --epochs 0 --train-images 64"
    options += f" --distillation-type hard --teacher-model {VIT} --teacher-path"
    return run_many({path.name: Run([*options.split(), str(path)]) for path in folder.iterdir()}, folder / "runs")


@pytest.mark.parametrize("case", ["legacy", "whole", "cut", "local header", "encrypted", "method", "deflated"])
def test_a_teacher_of_other_classes_or_damaged_is_refused_in_one_line(teachers, case):
    outcome = teachers[case]
    assert (outcome.codes, outcome.stderr.count("\n")) == ([2], 1), outcome.stderr
    other = "was trained on other classes than the data have: class 0 is 'thing 0' there"
    assert (other in outcome.stderr) == (case in ("legacy", "whole")), outcome.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Tied tensors
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tied_tensors_are_read(tmp_path, dtype):
    weights = {key: tensor.to(dtype) for key, tensor in models.create_model(VIT, num_classes=10).state_dict().items()}
    weights |= {key: weights[key.replace("blocks.1.", "blocks.0.")] for key in weights if "blocks.1." in key}
    torch.save(weights, tmp_path / "file")
    assert sum(t.nbytes for t in weights.values()) > os.path.getsize(tmp_path / "file")
    model = models.create_model(VIT, num_classes=10)
    load_foreign_weights(model, str(tmp_path / "file"), "--finetune", other_head=True)
    assert all(torch.equal(tensor, weights[key].float()) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "views",
    [
        lambda t: {"a": t.expand(10**6, 1000)},
        lambda t: {str(i): t[i:] for i in range(500)},  # each is another part
        lambda t: {str(i): t for i in range(101)},
    ],
)
def test_what_declares_more_than_it_has_is_refused(tmp_path, views):
    (tmp_path / "file").write_bytes(bytes(5000))
    with pytest.raises(
        InputError, match=r"is refused: (it has 5,000 bytes and declares|a tensor has more than 100 names)"
    ):
        in_float32(views(torch.ones(1000)), tmp_path / "file")
