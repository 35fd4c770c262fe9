"""From a decoded image to the model's input: what to do, the half done once (pixels), the half done per batch (floats).

Axes: N image, C channel, H row, W column.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from tasks.contracts.errors import DataError, SpecError
from tasks.contracts.spec import DataSpec, ModelSpec, PreprocessSpec
from tasks.data.open_source import DIGITS
from tasks.data.sources import in_mode

DIGITS_MEAN, DIGITS_STD = 0.306, 0.324  # of all 1797 digits, enlarged as below
DIGITS_SIDE = 32  # halved by five strides, as most networks do, it still leaves a pixel

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


def resolve_preprocess(model: ModelSpec, data: DataSpec) -> PreprocessSpec:
    """What `data` asks for, else the digits' own, else what torchvision trains the architecture with.

    Weights from a file say nothing of their training, so a torchvision architecture's own recipe is taken for them; the
    report shows it.

    Raises:
        SpecError: if none of them says how.
    """
    if data.preprocess is not None:
        return data.preprocess
    named = _torchvision_weights(model)
    if data.source == DIGITS and named is None:
        channels = 3 if model.architecture.startswith("torchvision:") else 1  # torchvision's models take colour
        return PreprocessSpec(resize=DIGITS_SIDE, mean=(DIGITS_MEAN,) * channels, std=(DIGITS_STD,) * channels)
    recipe = _recipe(model, named or "DEFAULT")
    if recipe is not None:
        return recipe
    raise SpecError(
        f"Nothing says how images become the input of {model.architecture} with weights {model.weights}.",
        remedy="Give data.preprocess (resize, crop, mean and std) as in training, such as "
        "--set data.preprocess.resize=224.",
    )


def num_channels(preprocess: PreprocessSpec) -> int:
    """3 for colour, 1 for grey."""
    return len(preprocess.mean)


def to_channels(image: Image.Image, preprocess: PreprocessSpec) -> Image.Image:
    """The image as RGB or L, as the model takes it."""
    return in_mode(image, "L" if num_channels(preprocess) == 1 else "RGB")


def fit_image(image: Image.Image, preprocess: PreprocessSpec) -> np.ndarray:
    """Resized and cropped pixels, uint8 HWC: those of torchvision's Resize and CenterCrop on a PIL image.

    Raises:
        DataError: if the image is smaller than the crop, which torchvision would pad with black.
    """
    fitted = _crop(_resize(to_channels(image, preprocess), preprocess), preprocess)
    return np.asarray(fitted).reshape(fitted.height, fitted.width, num_channels(preprocess))


def normalise(pixels_NHWC: np.ndarray, preprocess: PreprocessSpec) -> np.ndarray:
    """Float32 NCHW, contiguous: `(pixel / 255 - mean) / std` as one multiplication and one addition."""
    std_C = np.array(preprocess.std)
    scale_C11 = (1 / (255 * std_C)).astype(np.float32)[:, None, None]
    offset_C11 = (-np.array(preprocess.mean) / std_C).astype(np.float32)[:, None, None]
    pixels_NCHW = pixels_NHWC.transpose(0, 3, 1, 2)
    values_NCHW = np.empty(pixels_NCHW.shape, np.float32)
    np.multiply(pixels_NCHW, scale_C11, out=values_NCHW)
    values_NCHW += offset_C11
    return values_NCHW


def _torchvision_weights(model: ModelSpec) -> str | None:
    """The name of the torchvision weights that are asked for; None for weights from a file."""
    members = _members(model)
    return model.weights if model.weights in members else None


def _recipe(model: ModelSpec, weights: str) -> PreprocessSpec | None:
    """How torchvision prepares images for these weights of the architecture."""
    from torchvision.transforms._presets import ImageClassification

    member = _members(model).get(weights)
    transforms = None if member is None else member.transforms()
    if not isinstance(transforms, ImageClassification):
        return None
    return PreprocessSpec(
        resize=_side(transforms.resize_size),
        crop=_side(transforms.crop_size),
        interpolation=transforms.interpolation.value,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )


def _members(model: ModelSpec) -> Mapping[str, Any]:
    """All weights that torchvision has for the architecture, by name."""
    home, _, name = model.architecture.partition(":")
    if home != "torchvision":
        return {}
    from torchvision import models  # takes seconds to import

    if name not in models.list_models():
        return {}
    members: Mapping[str, Any] = models.get_model_weights(name).__members__
    return members


def _side(size: list[int]) -> int | tuple[int, int]:
    return size[0] if len(size) == 1 else (size[0], size[1])


def _resize(image: Image.Image, preprocess: PreprocessSpec) -> Image.Image:
    if preprocess.resize is None:
        return image
    if isinstance(preprocess.resize, tuple):
        height, width = preprocess.resize
    else:
        short = min(image.size)
        width, height = (preprocess.resize * side // short for side in image.size)
    return image.resize((width, height), _RESAMPLING[preprocess.interpolation])


def _crop(image: Image.Image, preprocess: PreprocessSpec) -> Image.Image:
    if preprocess.crop is None:
        return image
    height, width = preprocess.crop if isinstance(preprocess.crop, tuple) else (preprocess.crop, preprocess.crop)
    if image.height < height or image.width < width:
        raise DataError(
            f"{image.width}x{image.height} pixels (width x height) after resizing are less than the crop "
            f"of {width}x{height}",
            remedy="Lower data.preprocess.crop or raise resize.",
        )
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
