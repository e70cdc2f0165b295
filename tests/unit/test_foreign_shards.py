"""Shards that other programs have written: labels in .json, folders, the indexes of wids and timm."""

import json
from collections import Counter
from pathlib import Path

from common.errors import InputError
from datasets import build_dataset
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
    refused(tmp_path, r"has the label 9 of .*, index.json 9 classes", num_classes=9)
    (tmp_path / "classes.txt").write_text("".join(f"c{label}\n" for label in range(10)))
    assert build_dataset("WDS", str(tmp_path), True, None)[1] == [f"c{label}" for label in range(10)]
    (tmp_path / "imagenet-train-0001.tar").unlink()
    refused(tmp_path, r"_info.json lists imagenet-train-0001.tar, which is not there")
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
        (wids("a.tar"), "the index of wids lists a.tar: expected train or val in every name"),
        (wids(train[0]), "has no shards of val"),
        (wids("../train.tar"), "lists ../train.tar, which is not there"),
        ({"wids_version": 1}, r"does not list shards as expected \('shardlist'\)"),
        ({**wids(*train, *val), "shardlist": [{"url": train[0], "nsamples": "2"}]}, "2 samples in .* impossible"),
    ):
        (tmp_path / "index.json").write_text(json.dumps(content))
        refused(tmp_path, message, num_classes=10)
