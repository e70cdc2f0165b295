"""Shards that other programs have written: labels in .json, folders, the indexes of wids and timm."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from common.errors import InputError
from datasets import build_dataset
from pipeline.shard_cache import ShardCache
from pipeline.shards import Choices
from scripts import make_shards

import numpy as np
import pytest
from parquet_fixtures import digits
from shard_writers import write_shards, write_tar

FILES, LABELS = digits(0, 60)[0], [i % 10 for i in range(60)]
TRAIN, VAL = slice(0, 40), slice(40, 60)


def images_of(path: Path, is_train: bool = True, alone: bool = False, **choices: object) -> Counter:
    dataset, _ = build_dataset("WDS", str(path), is_train, None, single_split=alone, choices=Choices(**choices))
    pairs = (dataset[i] for i in range(len(dataset)))
    return Counter((np.asarray(image).tobytes(), label) for image, label in pairs)


def refused(path: Path, message: str, **choices: object) -> None:
    with pytest.raises(InputError, match=message):
        images_of(path, **choices)


def labels_of(found: Counter) -> list[int]:
    return sorted(label for _, label in found.elements())


def make_folders(folder: Path, key: str | None = None) -> Path:
    """Numbered shards in train/ and val/."""
    for split, rows in (("train", TRAIN), ("val", VAL)):
        half = (rows.start + rows.stop) // 2
        write_tar(folder / split / "000000.tar", FILES[rows.start : half], LABELS[rows.start : half], key)
        write_tar(folder / split / "000001.tar", FILES[half : rows.stop], LABELS[half : rows.stop], key)
    return folder


def index(folder: Path, *options: str) -> dict:
    assert make_shards.main(["--index", str(folder), *options]) == 0
    return json.loads((folder / "index.json").read_text())


@pytest.mark.parametrize("key", [None, "label", "class_id"])
def test_numbered_shards_in_folders(tmp_path, key):
    make_folders(tmp_path, key)
    refused(tmp_path, r"has no index.json: scripts/make_shards.py --index")
    written = index(tmp_path, *(["--label-key", key] if key == "class_id" else []))
    assert [shard["file"] for shard in written["val"]] == ["val/000000.tar", "val/000001.tar"]
    assert written["label_key"] == (key if key == "class_id" else None)
    assert labels_of(images_of(tmp_path)) == sorted(LABELS[TRAIN])
    assert labels_of(images_of(tmp_path, False)) == sorted(LABELS[VAL])
    dataset, _ = build_dataset("WDS", str(tmp_path), True, None)
    assert dataset.name_of(0) == "train/000000.tar: 000000.png"


def test_labels_in_json_that_cannot_be_used(tmp_path, capsys):
    make_folders(tmp_path, "class_id")
    assert make_shards.main(["--index", str(tmp_path)]) == 2
    assert "000000.tar has no label under the key label in 000000.json: expected a number" in capsys.readouterr().err
    assert make_shards.main(["--index", str(tmp_path), "--label-key", "width"]) == 2
    assert "no images of 8 of 9 classes, such as 0" in capsys.readouterr().err
    assert make_shards.main(["--data-path", "x", "--output-dir", "y", "--label-key", "width"]) == 2
    assert "--index is missing" in capsys.readouterr().err
    index(tmp_path, "--label-key", "class_id")
    refused(tmp_path, "has no label under the key other", label_column="other")
    write_tar(tmp_path / "train" / "000000.tar", FILES[:1], [-1], "class_id")
    assert make_shards.main(["--index", str(tmp_path), "--label-key", "class_id"]) == 2
    assert "has the label b'-1' in 000000.json: expected a whole number" in capsys.readouterr().err


@pytest.mark.parametrize("key", [None, "target"])
def test_the_index_of_timm(tmp_path, key):
    write_shards(tmp_path, FILES, LABELS, key)
    refused(tmp_path, r"--nb-classes is missing: .*_info.json does not name the classes, and there is no classes.txt")
    assert labels_of(images_of(tmp_path, num_classes=10)) == sorted(LABELS[TRAIN])
    assert labels_of(images_of(tmp_path, False, alone=True, num_classes=10)) == sorted(LABELS[VAL])
    refused(tmp_path, r"has the label 9 of .*, --nb-classes says 9 classes", num_classes=9)
    (tmp_path / "classes.txt").write_text("".join(f"c{label}\n" for label in range(10)))
    assert build_dataset("WDS", str(tmp_path), True, None)[1] == [f"c{label}" for label in range(10)]
    (tmp_path / "imagenet-train-0001.tar").unlink()
    refused(tmp_path, r"_info.json lists 'imagenet-train-0001.tar', which is not there")
    (tmp_path / "_info.json").write_text('{"splits": 5}')
    refused(tmp_path, r"_info.json does not list shards as expected")


def wids(*names: str, **more: object) -> dict:
    return {"wids_version": 1, "shardlist": [{"url": name, "nsamples": 20} for name in names], **more}


def test_the_index_of_wids(tmp_path, capsys):
    write_shards(tmp_path, FILES, LABELS)
    (tmp_path / "_info.json").unlink()
    train, val = (
        ["imagenet-train-0000.tar", "./imagenet-train-0001.tar"],
        ["https://host/x/imagenet-validation-0000.tar"],
    )
    (tmp_path / "index.json").write_text(json.dumps(wids(*train, *val)))
    refused(tmp_path, "--nb-classes is missing")
    assert labels_of(images_of(tmp_path, num_classes=10)) == sorted(LABELS[TRAIN])
    assert labels_of(images_of(tmp_path, False, num_classes=10)) == sorted(LABELS[VAL])
    parts = [wids(*names, name=name) for name, names in (("train", train), ("val", val))]
    (tmp_path / "index.json").write_text(json.dumps({"wids_version": 1, "datasets": parts}))
    assert labels_of(images_of(tmp_path, num_classes=10)) == sorted(LABELS[TRAIN])
    assert make_shards.main(["--index", str(tmp_path)]) == 2  # it would be lost
    assert "index.json is of another program" in capsys.readouterr().err
    for content, message in (
        (wids("a.tar"), "index.json lists 'a.tar': expected train, val or test in every name"),
        (wids(train[0]), "has no shards of val"),
        (wids("../train.tar"), "names the shard '../train.tar': expected a file name such as a-0.tar"),
        ({"wids_version": 1}, r"does not list shards as expected \('shardlist'\)"),
        ({**wids(*train, *val), "shardlist": [{"url": train[0], "nsamples": "2"}]}, "2 samples in .* impossible"),
    ):
        (tmp_path / "index.json").write_text(json.dumps(content))
        refused(tmp_path, message, num_classes=10)


def lists(folder: Path, content: object) -> Path:
    """``folder`` with an index of timm or wids alone."""
    for name in ("index.json", "_info.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / ("_info.json" if "splits" in content else "index.json")).write_text(json.dumps(content))
    return folder


def timm(train: object, val: object, train_lengths: object = (20,), val_lengths: object = (10,)) -> dict:
    splits = (("train", train, train_lengths), ("val", val, val_lengths))
    return {"splits": {name: {"filenames": files, "shard_lengths": sizes} for name, files, sizes in splits}}


def test_the_longest_end_of_an_address_says_which_shard_it_is(tmp_path):
    """Numbered shards have the same names in both splits."""
    make_folders(tmp_path)
    for where in ("https://host:80/x/", "s3://bucket/", "/elsewhere/x/", f"{tmp_path}/", "./"):
        names = [f"{where}{split}/00000{i}.tar" for split in ("train", "val") for i in (0, 1)]
        content = wids(*names)
        for entry, samples in zip(content["shardlist"], (20, 20, 10, 10), strict=True):
            entry["nsamples"] = samples
        lists(tmp_path, content)
        assert labels_of(images_of(tmp_path, num_classes=10)) == sorted(LABELS[TRAIN]), where
        assert labels_of(images_of(tmp_path, False, alone=True, num_classes=10)) == sorted(LABELS[VAL]), where
    write_tar(tmp_path / "000000.tar", FILES[TRAIN], LABELS[TRAIN])
    (tmp_path / "val" / "000000.tar").unlink()
    (tmp_path / "train" / "000000.tar").unlink()
    lists(tmp_path, wids("s3://bucket/train/000000.tar", "s3://bucket/val/000000.tar"))
    message = "'s3://bucket/train/000000.tar' and 's3://bucket/val/000000.tar', but there is only 000000.tar for both"
    with pytest.raises(InputError, match=message):
        images_of(tmp_path, False, alone=True, num_classes=10)


@pytest.mark.parametrize("in_other_folder", [False, True])
def test_an_absolute_name_in_a_relative_folder(tmp_path, monkeypatch, in_other_folder):
    (make_folders(tmp_path / "data"), monkeypatch.chdir(tmp_path))
    place = "/nowhere" if in_other_folder else tmp_path / "data"
    names = [[f"{place}/{split}/000000.tar"] for split in ("train", "val")]
    lists(Path("data"), timm(*names))
    assert len(images_of(Path("data"), num_classes=10)) == 20
    lists(Path("data"), timm(["/etc/passwd"], names[1]))
    refused(Path("data"), "data/_info.json names the shard '/etc/passwd': expected a file name", num_classes=10)


def test_test_shards_are_taken_where_there_are_none_to_validate(tmp_path):
    names = [f"latest-{split}-0.tar" for split in ("train", "test", "val")]
    for i, name in enumerate(names):
        write_tar(tmp_path / name, FILES[20 * i : 20 * i + 20], LABELS[20 * i : 20 * i + 20])
    for chosen, shard in ((names, 2), (names[:2], 1)):
        lists(tmp_path, wids(*chosen))
        dataset, _ = build_dataset("WDS", str(tmp_path), False, None, choices=Choices(num_classes=10))
        assert [entry.file for entry in dataset.shards] == [names[shard]]
    parts = [wids(names[i], name=name) for i, name in ((0, "train"), (2, "test"))]
    lists(tmp_path, {"wids_version": 1, "datasets": parts})
    assert labels_of(images_of(tmp_path, False, num_classes=10)) == sorted(LABELS[40:60])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            timm(["train/000000.tar", "train/000001.tar"], ["val/000000.tar"]),
            "2 filenames and 1 shard_l",
        ),
        (timm(["train/000000.tar"], ["val/000000.tar"], val_lengths=[]), "1 filenames and 0 shard_lengths of val"),
        (timm([5], ["val/000000.tar"]), "names the shard '5': expected a file name such as a-0.tar"),
        (timm([None], ["val/000000.tar"]), "names the shard 'None'"),
        (timm(["a\0.tar"], ["val/000000.tar"]), r"names the shard 'a\\x00.tar'"),
        (timm(["a" * 300 + ".tar"], ["val/000000.tar"]), r"lists 'aaa.*', which is not there"),
        (
            timm(["train/000000.tar"], ["val/000000.tar"], ["20"]),
            "with 20 samples in .* impossible",
        ),
        (timm(5, ["val/000000.tar"]), "does not list shards as expected"),
        (wids(5, "val/000000.tar"), "does not list shards as expected"),
        (wids("s3://train/", "val/000000.tar"), "names the shard 's3://train/'"),
        (wids("train/000000.tar", "train/000000.tar"), "'train/000000.tar' and 'train/000000.tar', but there is only"),
    ],
)
def test_names_and_lengths_that_cannot_be_used(tmp_path, content, message):
    lists(make_folders(tmp_path), content)
    refused(tmp_path, rf"^{tmp_path}/(_info|index).json .*{message}", num_classes=10)


def test_the_names_of_classes(tmp_path):
    write_shards(tmp_path, FILES, LABELS)
    names = [f"c{label}" for label in range(10)]
    (tmp_path / "classes.txt").write_text("\n".join(names) + "\n\n \n")
    assert build_dataset("WDS", str(tmp_path), True, None)[1] == names
    for content, message in (
        (b"caf\xe9\n", r"is not UTF-8 \(0xe9 at byte 3\): expected the name of a class in each line"),
        (b"a\n\nb\n", "has no name in line 2: expected the name of a class"),
        (b"a\nb\na\n", "has 'a' in lines 1 and 3: expected different names"),
        (b"\n\n", "is empty: expected the name of a class"),
    ):
        (tmp_path / "classes.txt").write_bytes(content)
        refused(tmp_path, f"^{tmp_path}/classes.txt {message}")
        (make_folders(tmp_path / "own") / "classes.txt").write_bytes(content)
        assert make_shards.main(["--index", str(tmp_path / "own")]) == 2


def test_messages_name_what_says_a_number(tmp_path):
    write_shards(tmp_path, FILES, LABELS)
    content = json.loads((tmp_path / "_info.json").read_text())
    content["splits"]["train"]["shard_lengths"] = [5, 5]
    lists(tmp_path, content)
    refused(tmp_path, "^imagenet-train-0000.tar has 20 samples, _info.json says 5$", num_classes=10)
    lists(tmp_path, wids("imagenet-train-0000.tar", "imagenet-validation-0000.tar"))
    (tmp_path / "classes.txt").write_text("a\nb\n")
    refused(tmp_path, r"^imagenet-train-0000.tar has the label 9 of .*, classes.txt says 2 classes$")


# ---------------------------------------------------------------------------------------------------------------------
# On the Hub
# ---------------------------------------------------------------------------------------------------------------------

COMMIT = "0123456789" * 4


def on_hub(cache: Path, folder: Path, **digests: object) -> Mapping:
    """Arguments of `build_dataset` for a data set whose list of files and small files are in the cache.

    Args:
        digests: other SHA-256 for all shards, of which the right ones are in the cache, too.
    """
    cache.mkdir(exist_ok=True)
    files = []
    for path in sorted(path for path in folder.rglob("*.*") if path.is_file()):
        name, content = path.relative_to(folder).as_posix(), path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        kept = f"{digest[:16]}-{name.replace('/', '-')}" if path.suffix == ".tar" else f"owner--x--{COMMIT}--{name}"
        (cache / kept).write_bytes(content)
        files.append((name, len(content), digests.get("sha256", digest) if path.suffix == ".tar" else None))
    (cache / f"owner--x--{COMMIT}--files.json").write_text(json.dumps(files))
    address = f"hf-hub:datasets/owner/x@{COMMIT}"
    return {"name": "WDS", "path": address, "transform": None, "shard_cache": ShardCache(cache, 10**9)}


def test_which_shard_of_the_hub_an_address_is(tmp_path):
    choices = Choices(num_classes=10)
    content = wids(*(f"https://host/x/{split}/000000.tar" for split in ("train", "val")))
    content["shardlist"][1]["nsamples"] = 10
    folder = lists(make_folders(tmp_path / "x"), content)
    for is_train, split in ((True, "train"), (False, "val")):
        arguments = {**on_hub(tmp_path / "cache", folder), "choices": choices}
        dataset, _ = build_dataset(is_train=is_train, single_split=True, **arguments)
        assert [shard.file for shard in dataset.shards] == [f"{split}/000000.tar"]
    assert dataset.name_of(0) == "val/000000.tar: 000000.png"
    (folder / "val" / "000000.tar").unlink()
    with pytest.raises(InputError, match=r"lists 'https://host/x/val/000000.tar', which is not there"):
        build_dataset(is_train=False, single_split=True, **on_hub(tmp_path / "1", folder), choices=choices)
    for name in ("a/val", "b/val"):
        write_tar(folder / name / "000000.tar", FILES[:10], LABELS[:10])
    with pytest.raises(InputError, match=r"which may be a/val/000000.tar or b/val/000000.tar: expected one file"):
        build_dataset(is_train=False, single_split=True, **on_hub(tmp_path / "2", folder), choices=choices)


@pytest.mark.parametrize("digest", ["../../../../a/b/c/d", "A" * 64, 5, ["a"]])
def test_a_digest_of_the_hub_that_is_none(tmp_path, digest):
    write_shards(tmp_path / "x", FILES, LABELS)
    arguments = {**on_hub(tmp_path / "cache", tmp_path / "x", sha256=digest), "choices": Choices(num_classes=10)}
    with pytest.raises(InputError, match=r"^the Hub lists imagenet-train-0000.tar with the SHA-256 .*: expected 64 h"):
        build_dataset(is_train=True, **arguments)
