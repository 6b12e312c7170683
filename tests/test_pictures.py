"""A user's picture: values against what was drawn, in every mode, and every refusal; then the
pixels that each encoder reads, against the libraries' own preprocessing.
"""

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from PIL import Image
from timm.models.convnext import ConvNeXt
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Pix2StructImageProcessor,
    Pix2StructVisionConfig,
    Pix2StructVisionModel,
)

from meteor_mini.pictures import (
    IMAGENET_DEFAULT_MEAN,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    deep_grey,
    load_picture,
    pixels_for,
    resize_square,
    to_square,
    view_of,
)
from stage1_encode import encode

RED, WHITE = (200, 30, 40), (255, 255, 255)


def save(tmp_path, image, name="picture.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def middle(tensor):
    """The pixel in the middle, as 0..255 integers."""
    S = tensor.shape[-1]
    return tuple((tensor[0, :, S // 2, S // 2] * 255).round().int().tolist())


def near(got, want, tolerance=0):
    return max(abs(g - w) for g, w in zip(got, want)) <= tolerance


def test_a_square_rgb_picture_keeps_every_pixel(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    tensor = load_picture(save(tmp_path, Image.fromarray(pixels)))
    assert tensor.shape == (1, 3, 96, 96) and tensor.dtype == torch.float32
    assert torch.equal(tensor[0].permute(1, 2, 0) * 255, torch.from_numpy(pixels).float())


@pytest.mark.parametrize(
    "mode, name, want, tolerance",
    [
        ("RGB", "x.png", RED, 0),
        ("RGBA", "x.png", RED, 0),
        ("P", "x.png", RED, 0),
        ("L", "x.png", (82, 82, 82), 0),
        ("LA", "x.png", (82, 82, 82), 0),
        ("1", "x.png", WHITE, 0),
        ("CMYK", "x.jpg", RED, 6),
    ],
)
def test_modes(tmp_path, mode, name, want, tolerance):
    image = Image.new("RGB", (16, 16), RED)
    white = Image.new("1", (16, 16), 1)
    image = white if mode == "1" else image.quantize() if mode == "P" else image.convert(mode)
    got = load_picture(save(tmp_path, image, name))
    assert got.shape == (1, 3, 16, 16) and near(middle(got), want, tolerance), middle(got)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(tmp_path, mode):
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0)).convert(mode)
    path = save(tmp_path, image, **({"transparency": 0} if mode == "P" else {}))
    assert middle(load_picture(path)) == WHITE


def test_half_transparency_is_mixed_with_white(tmp_path):
    path = save(tmp_path, Image.new("RGBA", (16, 16), (0, 0, 0, 128)))
    assert near(middle(load_picture(path)), (127,) * 3, 1)


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.pgm"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, name):
    values = np.full((16, 16), 65535, np.uint16)
    values[:, :10] = 257 * 100
    tensor = load_picture(save(tmp_path, Image.fromarray(values), name))
    assert middle(tensor) == (100, 100, 100) and tensor[0, :, 8, 15].tolist() == [1, 1, 1]


@pytest.mark.filterwarnings("error")
def test_deep_grey_ranges():
    assert deep_grey(np.array([[0, 257, 65535]]), "I").tolist() == [[0, 1, 255]]
    assert deep_grey(np.array([[-10, 90, 70_000]]), "I").tolist() == [[0, 0, 255]]
    assert deep_grey(np.array([[70_000, 70_000]]), "I").tolist() == [[0, 0]]
    assert deep_grey(np.array([[0, 0.2, 1]]), "F").tolist() == [[0, 51, 255]]
    assert deep_grey(np.array([[-1.0, 0, 1]]), "F").tolist() == [[0, 128, 255]]


def test_nan_pixels_are_refused(tmp_path):
    path = save(tmp_path, Image.fromarray(np.full((16, 16), np.nan, np.float32)), "nan.tif")
    with pytest.raises(ValueError, match="nan.tif cannot be decoded: it holds NaN"):
        load_picture(path)


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (32, 16), WHITE)
    image.paste(RED, (0, 0, 16, 16))  # left half; orientation 6 turns it clockwise: the top half
    exif = Image.Exif()
    exif[0x0112] = 6
    tensor = load_picture(save(tmp_path, image, exif=exif))
    column = (tensor[0, :, :, 16] * 255).round().int()
    assert tuple(column[:, 4].tolist()) == RED and tuple(column[:, 28].tolist()) == WHITE


def test_padding_keeps_the_picture_in_the_middle_of_its_mean_colour():
    image = Image.new("RGB", (40, 20), (100, 100, 100))
    image.paste((200, 200, 200), (20, 0, 40, 20))
    square = (to_square(image)[0] * 255).round()
    assert square.shape == (3, 40, 40)
    assert (square[:, 10:30, :20] == 100).all() and (square[:, 10:30, 20:] == 200).all()
    assert (square[:, :10] == 150).all() and (square[:, 30:] == 150).all()


def test_missing_directory_empty_and_text(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("this is no picture\n" * 20)
    for name, message in {
        "none.png": "none.png does not exist",
        ".": "or is no file",
        "empty.png": "empty.png is an empty file",
        "text.png": "text.png cannot be decoded: cannot identify",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_picture(tmp_path / name)


def test_a_truncated_file_is_refused(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path = save(tmp_path, noise, "cut.jpg")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"cut.jpg cannot be decoded: \S"):
        load_picture(path)


# ------------------------------------------------------------------------- what each encoder reads


def clip():
    return open_clip.transformer.VisionTransformer(
        32, 4, width=32, layers=3, heads=4, mlp_ratio=2.0, output_dim=8
    )


def pix2struct(grid=None):
    config = Pix2StructVisionConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        d_kv=8,
        d_ff=32,
        seq_len=80,
        patch_embed_hidden_size=3 * 4**2,
        initializer_range=0.02,
    )
    model = Pix2StructVisionModel(config).eval()
    if grid is not None:
        model.config.meteor_grid = grid
    return model


def dinov2():
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=4
    )
    return Dinov2Model(config).eval()


def images(B=3, side=32, seed=0):
    return torch.rand(B, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_resize_and_normalise_as_open_clip_does():
    noise = np.random.default_rng(0).integers(0, 256, (3, 50, 50, 3), dtype=np.uint8)
    transform = open_clip.image_transform(32, is_train=False)
    want = torch.stack([transform(Image.fromarray(n)) for n in noise])
    pixels = view_of(clip())(torch.from_numpy(noise).permute(0, 3, 1, 2).float() / 255)
    # Pillow rounds to bytes, twice
    assert pixels.shape == (3, 3, 32, 32) and (pixels - want).abs().mean() < 1 / 255 / max(
        OPENAI_CLIP_STD
    )


def test_a_picture_of_the_right_size_is_only_normalised():
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    assert torch.equal(view_of(clip())(images()), (images() - mean) / std)


def test_pix2struct_reads_what_the_librarys_processor_makes():
    view = view_of(pix2struct())
    pictures = F.interpolate(images(2, 9), 48, mode="bilinear")
    processor = Pix2StructImageProcessor(patch_size={"height": 4, "width": 4}, do_convert_rgb=False)
    made = processor(list(pictures), max_patches=64 + 5, return_tensors="pt").flattened_patches
    assert (made[:, 64:] == 0).all()  # padded by 5
    torch.testing.assert_close(view(pictures), made[:, :64], rtol=0, atol=1e-5)


def test_a_picture_of_one_colour_is_standardised_without_a_division_by_zero():
    patches = view_of(pix2struct())(torch.full((1, 3, 32, 32), 0.5))
    assert patches.isfinite().all() and (patches[..., 2:] == 0).all()


def test_mean_and_std_of_open_clip_then_timm_then_clip():
    model = clip()
    assert view_of(model).mean == OPENAI_CLIP_MEAN and view_of(model).std == OPENAI_CLIP_STD
    model.preprocess_cfg = {"mean": (0.5, 0.5, 0.25), "std": [0.5, 0.25, 0.5]}
    assert view_of(model).mean == (0.5, 0.5, 0.25) and view_of(model).std == (0.5, 0.25, 0.5)
    vit = timm.create_model("test_vit", num_classes=0)
    assert view_of(vit).mean == tuple(vit.pretrained_cfg["mean"])
    vit.preprocess_cfg = {"mean": (0.25,) * 3, "std": (0.5,) * 3}
    assert view_of(vit).mean == (0.25,) * 3
    assert view_of(dinov2()).mean == IMAGENET_DEFAULT_MEAN


def test_sizes_grids_and_widths():
    def read(model):
        view = view_of(model)
        return view.size, view.grid, view.width

    assert read(clip()) == ((32, 32), (8, 8), 32)
    assert read(pix2struct()) == ((32, 32), (8, 8), 32)  # the largest square below 80 patches
    assert read(pix2struct((4, 16))) == ((16, 64), (4, 16), 32)
    assert read(dinov2()) == ((32, 32), (8, 8), 32)
    wide = dinov2()
    wide.config.meteor_grid = (6, 10)
    assert read(wide) == ((24, 40), (6, 10), 32)
    tower = TimmModel("test_convnext", 16, image_size=64, pool="", proj="linear")
    assert read(tower)[:2] == ((64, 64), (2, 2))
    assert view_of(tower.trunk).size == (160, 160)  # timm's pretrained_cfg
    eva = TimmModel("eva02_tiny_patch14_224", 16, image_size=224, pool="token", proj=None)
    assert read(eva) == ((224, 224), (16, 16), 192)
    with pytest.raises(ValueError, match="a ConvNeXt needs an input size: set pretrained_cfg"):
        view_of(ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)))


@pytest.mark.parametrize("build", [clip, pix2struct, lambda: pix2struct((4, 16)), dinov2])
@torch.no_grad()
def test_a_view_makes_what_its_encoder_takes(build):
    model = build().eval()
    view = view_of(model)
    tokens, _ = encode(model, view(images(2, 40)))
    assert tokens.shape == (2, view.num_tokens, view.width) == (2, 64, 32)


def test_pixels_are_in_the_type_of_the_weights():
    encoders = {"clip": clip().bfloat16(), "dinov2": dinov2()}
    views = {name: view_of(encoder) for name, encoder in encoders.items()}
    pixels = pixels_for(encoders, views, images(), torch.device("cpu"))
    assert [x.dtype for x in pixels] == [torch.bfloat16, torch.float32]


def test_resizing_a_square_stays_within_0_and_1():
    resized = resize_square((images(2, 9) > 0.5).float(), 32)
    assert resized.shape == (2, 3, 32, 32) and resized.min() == 0 and resized.max() == 1


@pytest.mark.parametrize(
    "bad, message",
    [
        (
            torch.rand(3, 32, 32),
            r"images must be float .B, 3, H, W., got torch.float32 .3, 32, 32.",
        ),
        (torch.rand(1, 1, 32, 32), "images must be float"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "images must be float .* got torch.uint8"),
        (255 * torch.ones(1, 3, 32, 32), r"images must be in .0, 1.: divide bytes by 255"),
        (torch.rand(1, 3, 32, 32) - 0.5, "images must be in"),
        (torch.full((1, 3, 32, 32), float("nan")), "images must be in"),
    ],
)
@pytest.mark.parametrize("build", [clip, pix2struct])
def test_what_is_no_batch_of_pictures_is_refused(build, bad, message):
    with pytest.raises(ValueError, match=message):
        view_of(build())(bad)


def test_an_encoder_of_transformers_without_a_view_is_refused():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    clip = CLIPVisionModel(CLIPVisionConfig(hidden_size=24, num_attention_heads=2, image_size=32))
    with pytest.raises(ValueError, match="got transformers' CLIPVisionModel"):
        view_of(clip)
