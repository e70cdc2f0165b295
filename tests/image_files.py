"""Images with more than 8 bits, and images that a camera has turned."""

import io

import numpy as np
from PIL import Image

DEEP = np.tile(np.linspace(0, 65535, 512).round().astype(np.uint16), (8, 1))
TWIN = np.rint(DEEP / 257).astype(np.uint8)


def saved(pixels: np.ndarray, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=kind, **options)
    return file.getvalue()


FRACTIONS = (DEEP / 65535).astype(np.float32)


TURNED_BACK = {  # orientation → how the camera holds the upright picture
    1: (),
    2: (Image.Transpose.FLIP_LEFT_RIGHT,),
    3: (Image.Transpose.ROTATE_180,),
    4: (Image.Transpose.FLIP_TOP_BOTTOM,),
    5: (Image.Transpose.TRANSPOSE,),
    6: (Image.Transpose.ROTATE_90,),
    7: (Image.Transpose.TRANSVERSE,),
    8: (Image.Transpose.ROTATE_270,),
}


def held(upright: Image.Image, orientation: int) -> Image.Image:
    for method in TURNED_BACK[orientation]:
        upright = upright.transpose(method)
    return upright
