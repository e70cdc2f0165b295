"""Image files as cameras and instruments write them: more than 8 bits, and turned by the camera."""

import struct
import zlib

from pipeline import images
from scripts import predict

import numpy as np
import pytest
from image_files import DEEP, FRACTIONS, TURNED_BACK, TWIN, held, saved
from PIL import Image

# ---------------------------------------------------------------------------------------------------------------------
# More than 8 bits
# ---------------------------------------------------------------------------------------------------------------------


def tiff(data: bytes, bits: int, kind: int = 1, photometric: int = 1, order: str = "<") -> bytes:
    """One grey image of the size of `DEEP`, as it can be but Pillow does not write it."""
    tags = [(256, 512), (257, 8), (258, bits), (259, 1), (262, photometric), (277, 1), (278, 8), (339, kind)]
    tags = [struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in tags]
    tags += [struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in ((273, 8), (279, len(data)))]
    tags.sort(key=lambda entry: struct.unpack(f"{order}H", entry[:2]))
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    return start + data + struct.pack(f"{order}H", len(tags)) + b"".join(tags) + bytes(4)


def twelve_bits() -> bytes:
    first, second = (DEEP >> 4).reshape(-1, 2).T
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()


def png(colour: int, *channels: np.ndarray) -> bytes:
    rows = np.stack(channels, 2).astype(">u2")
    chunks = {b"IHDR": struct.pack(">IIBBBBB", 512, 8, 16, colour, 0, 0, 0)}
    chunks |= {b"IDAT": zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    )


DEEP_FILES = {
    "png": lambda: saved(DEEP, "PNG"),
    "png with alpha": lambda: png(4, DEEP, np.full_like(DEEP, 65535)),
    "png in colour": lambda: png(2, DEEP, DEEP, DEEP),
    "tiff": lambda: saved(DEEP, "TIFF"),
    "tiff, packed": lambda: saved(DEEP, "TIFF", compression="tiff_lzw"),
    "tiff of the other byte order": lambda: tiff(DEEP.astype(">u2").tobytes(), 16, order=">"),
    "tiff, white is zero": lambda: tiff((65535 - DEEP).astype("<u2").tobytes(), 16, photometric=0),
    "tiff, 12 bits": lambda: tiff(twelve_bits(), 12),
    "tiff, signed": lambda: tiff((DEEP >> 1).astype("<i2").tobytes(), 16, kind=2),
    "tiff, 32 bits": lambda: saved(DEEP.astype(np.int32), "TIFF"),
    "tiff, 8 of 32 bits": lambda: saved(TWIN.astype(np.int32), "TIFF"),
    "tiff, fractions": lambda: saved(FRACTIONS, "TIFF"),
    "tiff, fractions, white is zero": lambda: tiff((1 - FRACTIONS).astype("<f4").tobytes(), 32, 3, photometric=0),
    "tiff, whole numbers as floats": lambda: saved(DEEP.astype(np.float32), "TIFF"),
    "tiff, 8 bits as floats": lambda: saved(TWIN.astype(np.float32), "TIFF"),
    "pgm": lambda: saved(DEEP, "PPM"),
    "pgm, 10 bits": lambda: b"P5 512 8 1023\n" + (DEEP >> 6).astype(">u2").tobytes(),
    "pgm in words": lambda: b"P2 512 8 65535\n" + " ".join(map(str, DEEP.flat)).encode(),
}


@pytest.mark.parametrize("name", DEEP_FILES)
def test_deep_images_are_scaled_to_8_bits(name, tmp_path):
    """By every reader: those of folders and shards call `decode`, predict.py has its own limits."""
    (tmp_path / "image").write_bytes(DEEP_FILES[name]())
    for found in (images.decode(open(tmp_path / "image", "rb")), predict.read_picture(tmp_path / "image")):  # noqa: SIM115
        assert found.mode == "RGB"
        assert np.abs(np.asarray(found).astype(int) - TWIN[..., None]).max() <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of phones
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", TURNED_BACK)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_picture_is_turned_upright(kind, orientation, tmp_path):
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8))
    upright = smooth.resize((80, 48), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[274] = orientation
    held(upright, orientation).save(tmp_path / "phone", format=kind, exif=exif, quality=95)
    found = predict.read_picture(tmp_path / "phone")
    assert found.size == upright.size
    assert np.abs(np.asarray(found).astype(int) - np.asarray(upright)).mean() < 4


def test_a_deep_picture_is_turned_and_one_with_broken_metadata_read(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(DEEP).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "deep.png", exif=exif)
    assert np.abs(np.asarray(predict.read_picture(tmp_path / "deep.png")).astype(int) - TWIN[..., None]).max() <= 1
    Image.fromarray(TWIN).save(tmp_path / "broken.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert predict.read_picture(tmp_path / "broken.jpg").size == (512, 8)
