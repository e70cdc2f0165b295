"""What the Parquet files of a data set of the Hub are: splits, columns, classes; images, and the order of training."""

import json
import time
from collections import Counter
from itertools import groupby
from pathlib import Path

from common.errors import InputError
from datasets import build_dataset
from pipeline import parquet
from pipeline.hub_layout import files_of_splits, matches, read_card
from pipeline.shard_cache import ShardCache
from pipeline.shards import Choices
from samplers import TrainSampler, shuffled
from training.build_data import plain_loader
from training.config import Config, DataConfig

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from parquet_fixtures import CARD, CLASSES, digits, features, write_digits, write_parquet


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_digits(tmp_path_factory.mktemp("hub") / "digits")


def built(path: Path, is_train: bool = True, cache: ShardCache | None = None, alone: bool = False, **choices: object):
    """A data set, its classes, and its images."""
    dataset, classes = build_dataset(
        "HF", str(path), is_train, None, shard_cache=cache, single_split=alone, choices=Choices(**choices)
    )
    pairs = (dataset[i] for i in range(len(dataset)))
    return dataset, classes, Counter((np.asarray(image).tobytes(), label) for image, label in pairs)


def refused(path: Path, message: str, is_train: bool = True, **choices: object) -> None:
    with pytest.raises(InputError, match=message):
        built(path, is_train, **choices)


@pytest.fixture(scope="module")
def images(folder) -> dict[bool, Counter]:
    return {is_train: built(folder, is_train)[2] for is_train in (True, False)}


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def test_images_labels_and_names(folder, images):
    dataset, classes, _ = built(folder)
    assert classes == CLASSES  # of the schema: README.md says other ones
    assert (images[True].total(), images[False].total()) == (320, 60)
    sums = [sum(np.frombuffer(pixels, np.uint8).astype(int)[::3]) for pixels in next(zip(*images[False], strict=True))]
    assert len(set(sums)) > 30
    assert sorted(label for _, label in images[False].elements()) == sorted(digits(320, 60)[1])
    assert dataset.shard_sizes == [16] * 7 + [8] + [16] * 6 + [16] * 6 + [8]
    assert dataset.name_of(130).endswith("data/train-00001-of-00003.parquet: row 10")


@pytest.mark.parametrize("plain", [True, False])
def test_unpacked_images_are_the_same(images, tmp_path, plain):
    """Whether images are structs or plain bytes, and with or without a cache."""
    path, cache = write_digits(tmp_path / "digits", plain=plain), ShardCache(tmp_path / "cache", 10**9)
    for is_train, expected in images.items():
        assert built(path, is_train)[2] == built(path, is_train, cache)[2] == expected
    assert len([*cache.folder.glob("*.arrow")]) == 4


def test_a_file_is_unpacked_once_and_evicted(folder, images, tmp_path):
    cache = ShardCache(tmp_path, 10**9)
    built(folder, True, cache)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.arrow")}
    size = max(path.stat().st_size for path in kept)
    small = ShardCache(tmp_path, 2 * size)
    small.check = lambda *sizes: None  # which asks for all of so little
    assert built(folder, False, small)[2] == images[False]
    assert len([*tmp_path.glob("*.arrow")]) <= 2
    assert built(folder, True, small)[2] == images[True]


def test_rows_without_an_image_can_be_skipped(tmp_path):
    files, labels = digits(0, 20)
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", [*files[:-1], None], labels, features(), rows=10)
    dataset, _ = build_dataset("HF", str(tmp_path), True, None)
    with pytest.raises(ValueError, match="the row holds no image"):
        dataset[19]


# ---------------------------------------------------------------------------------------------------------------------
# The order
# ---------------------------------------------------------------------------------------------------------------------


def test_each_lane_reads_row_group_after_row_group_of_file_after_file():
    sizes, per_file = [10] * 120, [30, 50, 40]
    order, lanes = shuffled(sizes, 3, 4, per_file), 4
    assert sorted(order) == list(range(1200))
    group_of, file_of = np.repeat(np.arange(120), 10), np.repeat(np.arange(3), np.multiply(per_file, 10))
    for lane in range(lanes):
        for of in (group_of, file_of):
            visited = [part for part, _ in groupby(of[order[lane::lanes]])]
            assert len(set(visited)) == len(visited)  # no way back
    files = [file for file, _ in groupby(file_of[shuffled(sizes, 3, 1, per_file)])]
    assert sorted(files) == [0, 1, 2]
    assert any((shuffled(sizes, seed, 4, per_file) != order).any() for seed in range(3))


def test_the_sampler_knows_the_files(folder):
    dataset, _, _ = built(folder)
    assert dataset.per_file == [8, 6, 7]
    of_files = TrainSampler(320, 1, shard_sizes=dataset.shard_sizes, per_file=dataset.per_file)
    without = TrainSampler(320, 1, shard_sizes=dataset.shard_sizes)
    assert sorted(index for index, _ in of_files) == list(range(320))
    assert [*of_files] != [*without]


def test_a_few_images_are_spread_over_files_that_are_sorted(tmp_path):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", digits(0, 20)[0], [0] * 10 + [1] * 10, features(["a", "b"]))
    data = DataConfig("HF", str(tmp_path), input_size=16, num_workers=0)
    (batch,) = plain_loader(Config(data=data), 4, torch.device("cpu"))
    assert batch[1].tolist() == [0, 0, 1, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Splits
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("data/train-*", "data/train-00000-of-00001.parquet", True),
        ("data/train-*", "data/a/train-0.parquet", False),
        ("**/train/*.parquet", "a/b/train/0.parquet", True),
        ("**/train/*.parquet", "train/0.parquet", True),
        ("train/**", "train/a/0.parquet", True),
        ("./x[0-4].parquet", "x3.parquet", True),
        ("x.parquet", "xxparquet", False),
        ("**/x.parquet", "a/y.parquet", False),
        ("**", "a/b.parquet", True),
    ],
)
def test_patterns(pattern, name, expected):
    assert matches(name, pattern) is expected


def test_a_pattern_of_many_folders_takes_no_time():
    pattern, name = "**/" * 40 + "x.parquet", "a/" * 2000 + "y.parquet"
    start = time.perf_counter()
    card = {"configs": [{"data_files": pattern}]}
    assert files_of_splits([name], card, "x") == {}
    assert files_of_splits([name.replace("y", "x")], card, "x") == {"train": [name.replace("y", "x")]}
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["data/train-00000-of-00001.parquet", "data/validation-0.parquet"], {"train": 1, "validation": 1}),
        (["train/0.parquet", "train/1.parquet", "val/0.parquet"], {"train": 2, "validation": 1}),
        (["default/partial-train/0000.parquet", "default/test/0000.parquet"], {"train": 1, "test": 1}),
        (["a.parquet"], {"train": 1}),
        (["constrain-dev.parquet"], {"validation": 1}),
    ],
)
def test_splits_by_the_names_of_files(names, expected):
    assert {split: len(files) for split, files in files_of_splits(names, {}, "x").items()} == expected


def test_splits_of_the_card(tmp_path):
    names = ["data/train-0.parquet", "data/b/1.parquet", "data/test-0.parquet"]

    def of(data_files: object) -> dict:
        return files_of_splits(names, {"configs": [{"config_name": "a", "data_files": data_files}]}, "x")

    assert of("data/b/*") == {"train": names[1:2]}
    assert of([{"split": "x", "path": ["data/t*", "data/b/*"]}]) == {"x": names}
    two = [{"config_name": name, "data_files": f"data/{name}/*"} for name in ("a", "b")]
    with pytest.raises(InputError, match=r"x has 2 configurations \(a, b\), and none is the default"):
        files_of_splits(names, {"configs": two}, "x")
    assert files_of_splits(names, {"configs": [two[0], {**two[1], "default": True}]}, "x") == {"train": names[1:2]}
    with pytest.raises(InputError, match=r"files of train in a and in b, and README.md does not say"):
        files_of_splits(["a/train.parquet", "b/train.parquet"], {}, "x")
    with pytest.raises(InputError, match="lists data_files in an unknown form"):
        of([{"path": "x"}])
    (tmp_path / "README.md").write_text("# No card\n")
    assert read_card(tmp_path / "README.md") == {}
    (tmp_path / "README.md").write_text("---\na: &x 1\nb: *x\n---\n")
    with pytest.raises(InputError, match=r"README.md contains the alias"):
        read_card(tmp_path / "README.md")


def test_splits_that_options_name(folder, images):
    _, _, found = built(folder, False, val_split="train")
    assert found == images[True]
    refused(folder, r"no split dev, its splits are train, test: --hf-val-split names one", False, val_split="dev")


def test_one_split_is_enough_for_an_evaluation(tmp_path):
    write_parquet(tmp_path / "test.parquet", *digits(0, 20), features())
    assert built(tmp_path, False, alone=True)[2].total() == 20
    refused(tmp_path, "no split train, its splits are test: --hf-train-split names one")


# ---------------------------------------------------------------------------------------------------------------------
# Columns and classes
# ---------------------------------------------------------------------------------------------------------------------


def two_splits(folder: Path, described: dict | None, **columns: object) -> Path:
    files, labels = digits(0, 20)
    for split in ("train", "test"):
        write_parquet(folder / f"{split}.parquet", files, columns.pop("labels", labels), described, **columns)
    return folder


def test_several_columns_of_labels(tmp_path):
    described = {**features(label="fine_label"), "coarse_label": {"_type": "ClassLabel", "names": ["a", "b"]}}
    coarse = {"coarse_label": [0, 1] * 10}
    two_splits(tmp_path, described, label="fine_label", **coarse)
    assert built(tmp_path)[1] == CLASSES
    assert built(tmp_path, label_column="coarse_label")[1] == ["a", "b"]
    refused(tmp_path, "--hf-label-column x: .* has no such column, its columns are img, coarse", label_column="x")
    refused(tmp_path, r"--hf-image-column names another one", image_column="fine_label")
    refused(tmp_path, r"column img is of type struct.*expected labels", label_column="img")


def test_labels_that_say_little(tmp_path):
    two_splits(tmp_path / "numbers", None)
    assert built(tmp_path / "numbers")[1] == [str(label) for label in range(10)]
    assert len(built(tmp_path / "numbers", num_classes=12)[1]) == 12
    refused(tmp_path / "numbers", "a label that none of its 5 classes has .*9, expected 0 to 4", num_classes=5)
    two_splits(tmp_path / "card", None)
    (tmp_path / "card" / "README.md").write_text(
        CARD.replace("data/", "").replace("-*", ".parquet").replace("'1': one", "'1': one\n" + NAMES)
    )
    assert built(tmp_path / "card")[1][:3] == ["zero", "one", "2nd"]
    files, labels = digits(0, 20)
    write_parquet(tmp_path / "text" / "train.parquet", files, [str(label) for label in labels])
    refused(tmp_path / "text", "no column of labels among img, label: --hf-label-column names one")
    refused(tmp_path / "text", "label is of type string, expected labels in whole numbers", label_column="label")
    write_parquet(tmp_path / "ambiguous" / "train.parquet", files, labels, label="y", z=labels)
    refused(tmp_path / "ambiguous", r"several columns of labels \(z, y\): --hf-label-column names one")
    write_parquet(tmp_path / "unlabelled" / "train.parquet", files, labels, features())
    write_parquet(tmp_path / "unlabelled" / "test.parquet", files, [-1] * 20, features())
    refused(tmp_path / "unlabelled", "images without a label in its split test: -1, expected 0 to 9")
    write_parquet(tmp_path / "null" / "train.parquet", files, [*labels[1:], None], features())
    refused(tmp_path / "null", "1 images without a label in the column label", alone=True)
    write_parquet(tmp_path / "other" / "train.parquet", files, labels, features())
    write_parquet(tmp_path / "other" / "test.parquet", files, labels, features(CLASSES[::-1]))
    refused(tmp_path / "other", "other classes in its split test than in train")


NAMES = "\n".join(f"          '{label}': {label}nd" for label in range(2, 10))


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong
# ---------------------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def overwrite(path: Path) -> None:
    """The pages of the file, but not its footer."""
    content, footer = path.read_bytes(), pq.read_metadata(path)
    begin = footer.row_group(0).column(0).data_page_offset
    path.write_bytes(content[:begin] + bytes(200) + content[begin + 200 :])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "train.parquet is damaged or no Parquet file"),
        (overwrite, "train.parquet is damaged or no Parquet file"),
        (lambda path: path.write_bytes(b""), "train.parquet is damaged or no Parquet file"),
        (lambda path: path.write_bytes(b"PAR1" + bytes(90) + b"\xff\xff\xff\x7fPAR1"), "damaged or no Parquet file"),
        (lambda path: path.write_bytes(b"PAR1" + bytes(90) + b"\x20\0\0\0PAR1"), "damaged or no Parquet file"),
        (lambda path: write_parquet(path, [None] * 20, [0] * 20, features()), "is of type null|has no images"),
        (lambda path: write_parquet(path, [], [], features()), "no images in its split train|is of type null"),
        (lambda path: path.unlink(), "no split train"),
    ],
)
@pytest.mark.parametrize("cached", [False, True])
def test_files_that_cannot_be_used(tmp_path, damage, message, cached):
    damage(two_splits(tmp_path / "set", features()) / "train.parquet")
    with pytest.raises(InputError, match=message):
        built(tmp_path / "set", cache=ShardCache(tmp_path / "cache", 10**9) if cached else None)


def test_other_columns_in_another_file(tmp_path):
    files, labels = digits(0, 20)
    write_parquet(tmp_path / "train-0.parquet", files, labels, features())
    write_parquet(tmp_path / "train-1.parquet", files, labels, features(label="y"), label="y")
    refused(tmp_path, "train-1.parquet has no column label: expected the columns of the other files", alone=True)


def test_columns_of_another_type_in_another_file(tmp_path):
    files, labels = digits(0, 20)
    write_parquet(tmp_path / "test.parquet", files, labels, features())
    write_parquet(tmp_path / "train-0.parquet", files, labels, features())
    write_parquet(tmp_path / "train-1.parquet", files, [str(label) for label in labels], features())
    refused(tmp_path, "train-1.parquet has a column label of type string: expected labels in whole numbers, as in the")
    write_parquet(tmp_path / "train-1.parquet", ["x"] * 20, labels, features(), plain=True)
    refused(tmp_path, "train-1.parquet has no column img.bytes: expected the columns of the other files")


@pytest.mark.parametrize("names", ["{cat: 0, dog: 1}", "{.inf: cat}", "{'0': cat, null: dog}"])
def test_a_card_that_names_classes_in_another_form(tmp_path, names):
    two_splits(tmp_path, None)
    column = f"dataset_info: {{features: [{{name: label, dtype: {{class_label: {{names: {names}}}}}}}]}}"
    (tmp_path / "README.md").write_text(f"---\n{column}\n---\n")
    refused(
        tmp_path, r"^--data-path .*: README.md names classes in an unknown form \(.*: expected the numbers of class"
    )


def test_large_row_groups_need_a_cache(folder, monkeypatch):
    monkeypatch.setattr(parquet, "HELD_LIMIT", 10**4)
    refused(folder, r"--shard-cache is missing: .* has row groups of up to .* MB, of which each data worker would hold")


def test_places_that_hold_no_data_set(tmp_path):
    refused(tmp_path, r"--data-path .* does not hold HF: it has no Parquet files")
    refused(tmp_path / "nowhere", "nowhere is not a folder: expected one, or the OWNER/NAME of a data set")
    refused(Path("owner/name"), "--shard-cache is missing: --data-path owner/name is no folder")
    with pytest.raises(InputError, match="names no data set of the Hub"):
        build_dataset("HF", "a/b/c@d", True, None, shard_cache=ShardCache(tmp_path / "cache", 10**9))


def test_the_fingerprint_is_of_the_content(folder, tmp_path):
    digests = {json.dumps(built(path)[0].digests) for path in (folder, write_digits(tmp_path / "again"))}
    assert len(digests) == 1
    other = write_digits(tmp_path / "other", rows=20)
    assert json.dumps(built(other)[0].digests) not in digests
