"""A user's picture file -> one square tensor in [0, 1] -> the pixels that each encoder reads.

`load_picture` makes the square, which is the same for all encoders. `EncoderView` makes of it what
one encoder's own preprocessing would: its size, its mean and standard deviation, its patches. It
works on batches of tensors, which the preprocessing of open_clip and timm does not take; the tests
compare the two. Pix2Struct's own makes 31 x 31 patches of some squares that hold 32 x 32.
"""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from stage1_encode import can_prune_inside, find_encoder

MAX_SQUARE = 1024  # larger pictures are scaled down; each encoder resizes to its own input anyway


def load_picture(path: str | Path) -> torch.Tensor:
    """Read a picture as the encoders of a Meteor see it: padded to a square in its mean colour.

    Returns: (1, 3, S, S) float32 in [0, 1]; S is the longer side, at most 1024.
    Raises: see `open_picture`.
    """
    return to_square(open_picture(path))


def open_picture(path: str | Path) -> Image.Image:
    """Read a picture of any format and mode that Pillow reads; of an animation its first frame.

    EXIF rotation is applied, and transparency laid on white.

    Returns: an RGB picture of its own size.
    Raises: ValueError, one sentence that names the file, where it is missing, empty, no picture or
    broken.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"picture {path} does not exist, or is no file")
    if path.stat().st_size == 0:
        raise ValueError(f"picture {path} is an empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd headers
            with Image.open(path) as image:
                return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # on broken bytes Pillow's decoders raise a dozen kinds
        raise ValueError(f"picture {path} cannot be decoded: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB: transparent pixels on white, deep grey scaled to 8 bits, not clipped."""
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(deep_grey(np.asarray(image), image.mode)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def deep_grey(values: np.ndarray, mode: str) -> np.ndarray:
    """(H, W) values of more than 8 bits -> uint8.

    Modes "I;16*", and "I" where all values fit 16 bits: 65535 is white. "F" in [0, 1]: 1 is white.
    Other ranges carry no white point, so their minimum becomes black and their maximum white.
    """
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinite values")
    low, high = values.min(), values.max()
    white = 1 if mode == "F" else 65535
    if low < 0 or high > white:
        values = values - low
        white = high - low if high > low else 1  # all alike: black
    return (values / white * 255).round().astype(np.uint8)


def to_square(image: Image.Image) -> torch.Tensor:
    """RGB picture -> (1, 3, S, S), padded in its mean colour; a small square stays as it is."""
    side = min(max(image.size), MAX_SQUARE)
    mean = tuple(np.asarray(image).mean(axis=(0, 1)).round().astype(int).tolist())
    square = ImageOps.pad(image, (side, side), method=Image.Resampling.BICUBIC, color=mean)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].float() / 255


def resize_square(image: Tensor, side: int) -> Tensor:
    """(B, 3, S, S) in [0, 1] -> (B, 3, side, side)."""
    bicubic = InterpolationMode.BICUBIC
    return transforms.resize(image, [side, side], bicubic, antialias=True).clamp(0, 1)


# -------------------------------------------------------------------------- what each encoder reads


@dataclass(frozen=True)
class EncoderView:
    """What one encoder reads of a picture, and what it makes of it.

    size: (H, W) pixels; grid: (h, w) patches; width: D of its tokens; mean, std: of each colour, or
    None for those of each picture (Pix2Struct); interpolation: how pictures are resized; patch:
    side of the flattened patches that a Pix2Struct reads instead of pixels, None for other
    encoders.
    """

    size: tuple[int, int]
    grid: tuple[int, int]
    width: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    interpolation: InterpolationMode = InterpolationMode.BICUBIC
    patch: int | None = None

    @property
    def num_tokens(self) -> int:
        h, w = self.grid
        return h * w

    def __call__(self, images: Tensor) -> Tensor:
        """Resize and normalise, in float32.

        Args: images (B, 3, any H, any W) float in [0, 1].
        Returns: pixels (B, 3, H, W), or flattened patches (B, N, 2 + 3 p^2) for a Pix2Struct.
        Raises: ValueError for images of another shape, type or range.
        """
        check_images(images)
        if self.mean is None:
            mean, std = picture_statistics(images)
        else:
            mean, std = (images.new_tensor(c).view(3, 1, 1) for c in (self.mean, self.std))
        if images.shape[-2:] != self.size:
            images = transforms.resize(images, list(self.size), self.interpolation, antialias=True)
            images = images.clamp(0, 1)  # bicubic overshoots
        pixels = (images - mean) / std
        return pixels if self.patch is None else flatten_patches(pixels, self.patch)


def pixels_for(
    encoders: dict[str, nn.Module],
    views: dict[str, EncoderView],
    images: Tensor,
    device: torch.device,
) -> list[Tensor]:
    """What each encoder reads of pictures (B, 3, H, W) float in [0, 1]; in the encoder's dtype.

    Raises: TypeError for anything but a tensor; ValueError for one that is not as above.
    """
    if not isinstance(images, Tensor):
        raise TypeError(
            "images must be a tensor (B, 3, H, W) in [0, 1], as meteor_mini.pictures.load_picture"
            f"(file) gives, or an Encoded batch, got {type(images).__name__}"
        )
    images, pixels = images.to(device), []
    for name, encoder in encoders.items():
        dtype = max(encoder.parameters(), key=Tensor.dim).dtype  # of a weight, not of a norm
        pixels.append(views[name](images).to(dtype))
    return pixels


def check_images(images: Tensor) -> None:
    if not images.is_floating_point() or images.dim() != 4 or images.shape[1] != 3:
        got = f"{images.dtype} {tuple(images.shape)}"
        raise ValueError(f"images must be float (B, 3, H, W), got {got}")
    if not ((images >= 0) & (images <= 1)).all():
        raise ValueError("images must be in [0, 1]: divide bytes by 255")


def picture_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each picture over all its values, as Pix2Struct takes them."""
    mean = images.mean(dim=(1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    least = images[0].numel() ** -0.5  # of a picture of one colour
    std = images.flatten(1).std(dim=1).clamp(min=least)
    return mean, std.view(-1, 1, 1, 1)


def flatten_patches(pixels: Tensor, p: int) -> Tensor:
    """Pix2Struct's input: of each patch its row and column, from 1, then its pixels, channels last.

    Args: pixels (B, 3, h p, w p). Returns: (B, h w, 2 + 3 p^2).
    """
    B, _, H, W = pixels.shape
    rows, columns = torch.arange(1, H // p + 1), torch.arange(1, W // p + 1)
    places = torch.cartesian_prod(rows, columns).to(pixels)  # (N, 2)
    patches = F.unfold(pixels, p, stride=p).mT  # (B, N, 3 p^2), channels first
    patches = patches.unflatten(2, (3, p * p)).transpose(2, 3).flatten(2)  # channels last
    return torch.cat([places.expand(B, -1, -1), patches], dim=2)


def view_of(encoder: nn.Module) -> EncoderView:
    """The view of an encoder that a Meteor may have: of open_clip or timm, Pix2Struct or DINOv2.

    Mean and std: those of open_clip's preprocess_cfg, else of timm's pretrained_cfg, else CLIP's.
    Pix2Struct and DINOv2 take any grid: config.meteor_grid, where it is set.

    Raises: ValueError for another encoder, and for a ConvNeXt without an input size.
    """
    model = find_encoder(encoder)
    if hasattr(getattr(model, "config", None), "patch_embed_hidden_size"):
        return pix2struct_view(model)
    if hasattr(model, "config"):
        if model.config.model_type != "dinov2":
            raise ValueError(
                "encoder must be of open_clip or timm, a Pix2Struct or a DINOv2, "
                f"got transformers' {type(model).__name__}"
            )
        return dinov2_view(model)
    tower = getattr(encoder, "visual", encoder)
    open_clip_cfg = getattr(tower, "preprocess_cfg", None)
    timm_cfg = getattr(model, "pretrained_cfg", None)
    statistics = open_clip_cfg or timm_cfg or {}
    if not can_prune_inside(model):  # ConvNeXt
        size = getattr(tower, "image_size", None) or (timm_cfg or {}).get("input_size")
        if size is None:
            raise ValueError(
                "a ConvNeXt needs an input size: set pretrained_cfg = {'input_size': (3, H, W)}"
            )
        size, width = size[-2:], model.num_features
        stride = model.feature_info[-1]["reduction"]
        grid = size[0] // stride, size[1] // stride
    elif hasattr(model, "patch_embed"):  # timm
        patches = model.patch_embed
        size, grid, width = patches.img_size, patches.grid_size, model.embed_dim
    else:
        size, grid, width = model.image_size, model.grid_size, model.conv1.out_channels
    size = tuple(size)
    return EncoderView(
        size=size,
        grid=tuple(grid),
        width=width,
        mean=tuple(statistics.get("mean", OPENAI_CLIP_MEAN)),
        std=tuple(statistics.get("std", OPENAI_CLIP_STD)),
    )


def pix2struct_view(model: nn.Module) -> EncoderView:
    """A fixed grid: the library's own preprocessing makes 31 x 31 patches of some squares."""
    config = model.config
    patch = math.isqrt(config.patch_embed_hidden_size // 3)
    side = math.isqrt(config.seq_len)
    h, w = getattr(config, "meteor_grid", (side, side))
    return EncoderView(
        size=(h * patch, w * patch),
        grid=(h, w),
        width=config.hidden_size,
        mean=None,
        std=None,
        interpolation=InterpolationMode.BILINEAR,
        patch=patch,
    )


def dinov2_view(model: nn.Module) -> EncoderView:
    config, patch = model.config, model.config.patch_size
    side = config.image_size // patch
    h, w = getattr(config, "meteor_grid", (side, side))
    return EncoderView(
        size=(h * patch, w * patch),
        grid=(h, w),
        width=config.hidden_size,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
    )
