"""Data sets in the format of the Hugging Face Hub: Parquet files with its metadata, written by pyarrow."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_digits

CLASSES = [f"digit {label}" for label in range(10)]
CARD = """---
license: mit
dataset_info:
  features:
  - name: img
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
          '0': zero
          '1': one
configs:
- config_name: plain
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: data/test-*
---

# Digits
"""


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def digits(first: int, count: int) -> tuple[list[bytes], list[int]]:
    """Files and labels of some handwritten digits."""
    data = load_digits()
    rows = slice(first, first + count)
    return [png((image * 255 / 16).astype(np.uint8)) for image in data.images[rows]], data.target[rows].tolist()


def features(names: Sequence[str] | None = CLASSES, image: str = "img", label: str = "label") -> dict:
    """What the package datasets writes about the columns."""
    kind = {"_type": "Value", "dtype": "int64"} if names is None else {"_type": "ClassLabel", "names": list(names)}
    return {image: {"_type": "Image"}, label: kind}


def write_parquet(
    path: Path,
    images: Sequence[bytes | None],
    labels: Sequence,
    described: dict | None = None,
    plain: bool = False,
    rows: int = 16,
    label: str = "label",
    **columns: Sequence,
) -> None:
    """Images and labels in row groups of ``rows``.

    Args:
        described: the features, if they are written.
        plain: write the bytes of images without a struct.
        label: the name of the column of labels.
        columns: others.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    structs = [image and {"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)]
    table = pa.table({"img": list(images) if plain else structs, **columns, label: labels})
    if described is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": described}})})
    pq.write_table(table, path, row_group_size=rows)


def write_digits(folder: Path, **options: object) -> Path:
    """Digits in three files to train and one to test, 380 images: a folder as it is on the Hub."""
    described = options.pop("described", features())
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    for i, (first, count) in enumerate(((0, 120), (120, 96), (216, 104))):
        path = folder / "data" / f"train-{i:05}-of-00003.parquet"
        write_parquet(path, *digits(first, count), described, **options)
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", *digits(320, 60), described, **options)
    return folder


def as_files(folder: Path) -> dict[str, bytes]:
    """Path → content, as `HubStandIn.add` takes them."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
