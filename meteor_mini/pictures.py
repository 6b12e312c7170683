"""A user's picture file -> one square (1, 3, S, S) float tensor in [0, 1], the same for every encoder."""

import struct
import sys
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

MIN_SIDE, MAX_SIDE, MAX_ASPECT = 8, 10_000, 20  # pixels, pixels, longer side : shorter side
MAX_SQUARE = 1024  # larger pictures are scaled down; each encoder resizes to its own input anyway
LIMITS = f"sides of {MIN_SIDE} to {MAX_SIDE} px and an aspect ratio of at most {MAX_ASPECT}:1 are allowed"
# What Pillow's decoders raise on broken bytes. AttributeError and its like are missing on purpose.
BROKEN = (
    OSError,
    SyntaxError,
    RuntimeError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    OverflowError,
    struct.error,
    zlib.error,
)


def load_picture(path: str | Path) -> torch.Tensor:
    """Read a picture of any format and mode that Pillow reads; of an animation its first frame.

    EXIF rotation is applied, transparency laid on white, and the picture padded to a square in its mean
    colour. That an animation has more frames is noted on stderr.

    Returns: (1, 3, S, S) float32 in [0, 1]; S is the longer side, at most 1024.
    Raises: ValueError, one sentence that names the file, where it is missing, empty, no picture or broken,
    and for sides or an aspect ratio outside the limits above.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"picture {path} " + ("is not a file" if path.exists() else "does not exist")
        )
    if path.stat().st_size == 0:
        raise ValueError(f"picture {path} is an empty file")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # Pillow's remarks on odd headers; what matters becomes an error
        with decoding(path):
            image = Image.open(path)  # reads the header alone
        with image:
            width, height = image.size
            if not MIN_SIDE <= min(width, height) <= max(width, height) <= MAX_SIDE or max(
                width, height
            ) > MAX_ASPECT * min(width, height):
                raise ValueError(f"picture {path} has {width} x {height} px; {LIMITS}")
            with decoding(path):
                animated = getattr(image, "is_animated", False)
                rgb = to_rgb(ImageOps.exif_transpose(image))
    if animated:
        print(f"note: {path} has several frames, the first one is used", file=sys.stderr)
    return to_square(rgb)


@contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Turn what Pillow raises into a ValueError of one sentence that names the file."""
    try:
        yield
    except Image.UnidentifiedImageError:
        raise ValueError(f"picture {path} is in no picture format that Pillow can read") from None
    except Image.DecompressionBombError:
        raise ValueError(f"picture {path} is too large; {LIMITS}") from None
    except BROKEN as error:
        raise ValueError(f"picture {path} cannot be decoded: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB, transparent pixels on white, deep grey scaled to 8 bits rather than clipped."""
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(deep_grey(np.asarray(image), image.mode)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def deep_grey(values: np.ndarray, mode: str) -> np.ndarray:
    """(H, W) values of more than 8 bits -> uint8.

    Modes "I;16*", and "I" where all values fit 16 bits: 65535 is white. "F" in [0, 1]: 1 is white. Other
    ranges carry no white point, so their minimum becomes black and their maximum white.
    """
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinite values")
    low, high = values.min(), values.max()
    white = 1 if mode == "F" else 65535
    if low < 0 or high > white:
        values, white = values - low, high - low or 1  # all alike: black
    return (values / white * 255).round().astype(np.uint8)


def to_square(image: Image.Image) -> torch.Tensor:
    """RGB picture -> (1, 3, S, S), padded in its mean colour; a square of up to 1024 px stays as it is."""
    side = min(max(image.size), MAX_SQUARE)
    mean = tuple(np.asarray(image).mean(axis=(0, 1)).round().astype(int).tolist())
    square = ImageOps.pad(image, (side, side), method=Image.Resampling.BICUBIC, color=mean)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].float() / 255
