"""Fashion-MNIST with rotated images, which a study makes itself: another task for the same ViTs."""

import gzip
import shutil
from pathlib import Path

from datasets import build_dataset

import numpy as np

DEGREES = (90, 180, 270)


def write_rotated(source: str, degrees: int, folder: Path) -> None:
    """Write Fashion-MNIST to ``folder``, its images rotated counterclockwise, unless the folder is there already.

    The four idx files are gzipped, and appear together.

    Args:
        source: the folder of the images as they are.
        degrees: 90, 180 or 270.

    Raises:
        InputError: ``source`` does not hold Fashion-MNIST.
    """
    if folder.exists():
        return
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for part in ("train", "t10k"):
        dataset, _ = build_dataset("FMNIST", source, part == "train", None)
        rotated = np.rot90(dataset.images, degrees // 90, axes=(1, 2))
        for name, array in (("images-idx3", rotated), ("labels-idx1", np.array(dataset.targets, dtype=np.uint8))):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
            (unfinished / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes(), 1, mtime=0))
    unfinished.rename(folder)
