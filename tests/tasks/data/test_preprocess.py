"""Preprocessing against torchvision, on real photos."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision import models, transforms

from tasks.contracts.errors import DataError, SpecError
from tasks.contracts.spec import DataSpec, ModelSpec, PreprocessSpec
from tasks.data.preprocess import fit_image, normalise, resolve_preprocess

PHOTOS = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
SIZES = [(640, 427), (427, 640), (331, 257), (500, 375), (224, 224)]
MODES = transforms.InterpolationMode


@pytest.mark.parametrize("photo", PHOTOS, ids=["china", "flower"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (224, 223), ((96, 130), (95, 64)), (None, 200)], ids=str)
def test_pixels_equal_torchvision(
    photo: Image.Image,
    size: tuple[int, int],
    interpolation: str,
    resize: int | tuple[int, int] | None,
    crop: int | tuple[int, int],
) -> None:
    """Resize and centre crop give the very pixels of torchvision's Resize and CenterCrop."""
    image = photo.resize(size)
    steps = [] if resize is None else [transforms.Resize(resize, MODES(interpolation))]
    expected = transforms.Compose([*steps, transforms.CenterCrop(crop)])(image)
    pixels_HWC = fit_image(image, PreprocessSpec(resize=resize, crop=crop, interpolation=interpolation))
    np.testing.assert_array_equal(pixels_HWC, np.asarray(expected))


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "efficientnet_b1"])
def test_whole_path_equals_torchvision_weights(name: str) -> None:
    """What is resolved from torchvision's weights does what their own transforms do, to within 1e-6."""
    preprocess = resolve_preprocess(ModelSpec(architecture=f"torchvision:{name}", weights="DEFAULT"), DataSpec())
    values_NCHW = normalise(np.stack([fit_image(photo, preprocess) for photo in PHOTOS]), preprocess)
    theirs = models.get_model_weights(name).DEFAULT.transforms()
    expected_NCHW = torch.stack([theirs(photo) for photo in PHOTOS]).numpy()
    np.testing.assert_allclose(values_NCHW, expected_NCHW, rtol=0, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_normalise_equals_torchvision(channels: int) -> None:
    """All 256 values come out as ToTensor and Normalize give them, float32, NCHW and contiguous."""
    preprocess = PreprocessSpec(mean=(0.485, 0.456, 0.406)[:channels], std=(0.229, 0.224, 0.225)[:channels])
    pixels_NHWC = np.repeat(np.arange(256, dtype=np.uint8), channels).reshape(1, 16, 16, channels)
    values_NCHW = normalise(pixels_NHWC, preprocess)
    theirs = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(list(preprocess.mean), list(preprocess.std))]
    )
    np.testing.assert_allclose(values_NCHW[0], theirs(pixels_NHWC[0]).numpy(), rtol=0, atol=1e-6)
    assert values_NCHW.dtype == np.float32
    assert values_NCHW.flags.c_contiguous


@given(st.integers(1, 900), st.integers(1, 900), st.integers(1, 300))
def test_short_side_takes_the_size_asked_for(width: int, height: int, side: int) -> None:
    """The short side is exact; the long one is rounded down, as torchvision does."""
    expected = transforms.functional._compute_resized_output_size((height, width), [side])
    assume(max(expected) < 2000)  # larger ones only take longer
    pixels_HWC = fit_image(Image.new("L", (width, height)), PreprocessSpec(resize=side, mean=(0.5,), std=(0.5,)))
    assert list(pixels_HWC.shape[:2]) == expected


def test_channels_follow_the_mean() -> None:
    """One mean makes the image grey, three make it colour."""
    grey = PreprocessSpec(mean=(0.5,), std=(0.5,))
    assert fit_image(PHOTOS[0], grey).shape == (427, 640, 1)
    assert fit_image(PHOTOS[0].convert("L"), PreprocessSpec()).shape == (427, 640, 3)


def test_an_image_smaller_than_the_crop_is_refused() -> None:
    """torchvision would pad with black."""
    with pytest.raises(DataError, match=r"341x256 pixels .* less than the crop of 300x300"):
        fit_image(PHOTOS[0].resize((640, 480)), PreprocessSpec(resize=256, crop=300))


def test_own_preprocessing_wins() -> None:
    """What the data section says goes before what the weights bring."""
    own = PreprocessSpec(resize=40)
    model = ModelSpec(weights="IMAGENET1K_V1")
    assert resolve_preprocess(model, DataSpec(preprocess=own)) == own


def test_torchvision_weights_bring_theirs() -> None:
    """Resize, crop, interpolation, mean and std of the named weights."""
    model = ModelSpec(architecture="torchvision:efficientnet_b1", weights="IMAGENET1K_V2")
    assert resolve_preprocess(model, DataSpec(source="photos")) == PreprocessSpec(resize=255, crop=240)


def test_weights_from_a_file_take_the_recipe_of_the_architecture() -> None:
    """They say nothing themselves, and torchvision trains each architecture in one way."""
    model = ModelSpec(architecture="torchvision:resnet50", weights="mine.pth")
    named = ModelSpec(architecture="torchvision:resnet50", weights="DEFAULT")
    data = DataSpec(source="photos")
    assert resolve_preprocess(model, data) == resolve_preprocess(named, data)


@pytest.mark.parametrize(("architecture", "channels"), [("mine:net", 1), ("torchvision:resnet18", 3)])
def test_digits_bring_theirs(architecture: str, channels: int) -> None:
    """Grey for a model of one's own, three equal channels for torchvision's."""
    preprocess = resolve_preprocess(ModelSpec(architecture=architecture), DataSpec(source="digits"))
    assert preprocess.resize == 32
    assert len(set(preprocess.mean)) == 1
    assert len(preprocess.mean) == channels


@pytest.mark.parametrize(
    "model",
    [
        ModelSpec(architecture="mine:net", weights="weights.pth"),
        ModelSpec(architecture="mine:net", weights="DEFAULT"),
        ModelSpec(architecture="torchvision:no_such_net", weights="DEFAULT"),
        ModelSpec(architecture="torchvision:fcn_resnet50", weights="DEFAULT"),
    ],
    ids=str,
)
def test_unknown_preprocessing_is_refused(model: ModelSpec) -> None:
    """Nothing is guessed."""
    with pytest.raises(SpecError, match=r"Give data\.preprocess"):
        resolve_preprocess(model, DataSpec(source="photos"))
