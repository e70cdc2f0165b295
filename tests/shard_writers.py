"""Shards and indexes as other programs write them."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path


def write_tar(path: Path, images: Sequence[bytes], labels: Sequence[int], key: str | None = None) -> Path:
    """Numbered samples: an image, and its label in .cls or, under ``key``, in .json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            named = {"json": json.dumps({"width": 8, key: label}).encode()} if key else {"cls": b"%d" % label}
            for suffix, content in {"png": image, **named}.items():
                entry = tarfile.TarInfo(f"{i:06}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return path


def write_shards(folder: Path, images: Sequence[bytes], labels: Sequence[int], key: str | None = None) -> Path:
    """Three shards of 20 images, and the _info.json that timm reads."""
    splits = {}
    for split, shards in (("train", (0, 1)), ("validation", (2,))):
        names = [f"imagenet-{split}-{i:04}.tar" for i in range(len(shards))]
        for name, shard in zip(names, shards, strict=True):
            rows = slice(20 * shard, 20 * shard + 20)
            write_tar(folder / name, images[rows], labels[rows], key)
        splits[split] = {
            "name": split,
            "filenames": names,
            "shard_lengths": [20] * len(names),
            "num_samples": 20 * len(names),
            "alt_label": key or "",
        }
    (folder / "_info.json").write_text(json.dumps({"splits": splits}))
    return folder
