"""What images are like: the numbers that data checks judge. Axes: N image, H row, W column, C channel, P pixel.

`look_at` does what needs a whole image, mostly outside the interpreter's lock; `measure` computes on many looks at
once, because numpy's fixed cost per call, inside that lock, is larger than the arithmetic on one image.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from PIL import Image

PROBE = 32  # side of the centres that compressibility, correlation and sharpness look at
SMALL = 32  # the short side of the copy that all else is measured on has this many pixels, or up to twice as many
GRID = 4  # as many pixels of a row are looked at, at least, to average over a square
COPY = 32  # side of the grey copy that is hashed
THUMBNAIL = 16  # side of the grey copy that tells near duplicates from what merely hashes alike
_LUMA = np.array([0.299, 0.587, 0.114])
_LUMA_16 = np.array([19595, 38470, 7471], np.uint32)  # the same in Pillow's fixed point
# The first frequencies of the DCT-II, [K, N]: eight of COPY, up to a factor.
_COSINES = np.cos(np.pi / COPY * np.outer(np.arange(8), np.arange(COPY) + 0.5)).astype(np.float32)


@dataclass(frozen=True)
class Look:
    """What is kept of one image to measure it: some kilobytes."""

    small_HWC: np.ndarray
    entropy: float
    near_HWC: np.ndarray  # centre, in the image's own pixels
    far_HW: np.ndarray  # grey centre of the small copy
    copy: bytes  # grey, COPY x COPY


def look_at(image: Image.Image, content: bytes) -> Look:
    """A decoded image, RGB or L, and its bytes. A large one is first averaged over squares, which costs little."""
    small, extent = _small(image)
    grey = small if small.mode == "L" else small.convert("L")
    # Not BOX, which takes whole pixels of the small copy or none: then one picture in two sizes hashes differently.
    copy = grey.resize((COPY, COPY), Image.Resampling.BILINEAR, box=extent)
    return Look(
        small_HWC=_pixels(small, content if small is image else small.tobytes()),
        entropy=grey.entropy(),
        near_HWC=_centre(_pixels(image, content)).copy(),  # all else of the image can go
        far_HW=_centre(_pixels(grey, grey.tobytes())[..., 0]),
        copy=copy.tobytes(),
    )


def measure(looks: Sequence[Look]) -> dict[str, list[Any]]:
    """Properties of all images, by name.

    Returns:
        mean_r, mean_g, mean_b, std_r, std_g, std_b: of each channel, in 0..255; a grey image has three equal ones.
        brightness: mean luma, in 0..1.
        entropy: of the grey levels, in bits (0..8).
        sharpness: standard deviation of the edges in the centre of the small copy, in 0..255.
        compressibility: share of bytes that zlib leaves of the centre; noise keeps all of them.
        correlation: of neighbours, in the centre or in that of the small copy if that is more: a weave looks like noise
            from near. Near 1 in photographs, near 0 in noise, and 1 in a constant image, where it is not defined.
        phash: 64 bits that similar images share (`perceptual_hashes`).
        thumbnail: a grey copy, THUMBNAIL x THUMBNAIL bytes.
    """
    means_NC, deviations_NC = _moments([look.small_HWC for look in looks])
    near_N2 = _by_shape(_compressibility_and_correlation, [look.near_HWC for look in looks])
    far_N2 = _by_shape(_sharpness_and_correlation, [look.far_HW for look in looks])
    copies_NHW = np.frombuffer(b"".join(look.copy for look in looks), np.uint8).reshape(-1, COPY, COPY)
    return {
        **dict(zip(("mean_r", "mean_g", "mean_b"), means_NC.T.tolist(), strict=True)),
        **dict(zip(("std_r", "std_g", "std_b"), deviations_NC.T.tolist(), strict=True)),
        "brightness": (means_NC @ _LUMA / 255).tolist(),
        "entropy": [look.entropy for look in looks],
        "sharpness": far_N2[:, 0].tolist(),
        "compressibility": near_N2[:, 0].tolist(),
        "correlation": np.maximum(near_N2[:, 1], far_N2[:, 1]).tolist(),
        "phash": perceptual_hashes(copies_NHW).tolist(),
        "thumbnail": [thumbnail.tobytes() for thumbnail in _halved(copies_NHW)],
    }


def perceptual_hashes(copies_NHW: np.ndarray) -> np.ndarray:
    """64 bits each, uint64: which of the 8 x 8 lowest frequencies of a 32 x 32 copy lie above their median.

    Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions (2010), section 3.2.1.
    """
    low_NF = (_COSINES @ copies_NHW.astype(np.float32) @ _COSINES.T).reshape(-1, 64)
    low_NF[:, 0] = 0.0  # brightness says nothing of what is seen
    hashes_N: np.ndarray = np.packbits(low_NF > np.median(low_NF, axis=1, keepdims=True), axis=1).view(">u8")[:, 0]
    return hashes_N


def _small(image: Image.Image) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """A copy of SMALL pixels or more, and the box in it that the image fills: its last row and column may be partial.

    Each pixel is the mean over a square, of which GRID x GRID pixels are looked at, or few more. To average all takes
    twice the time, and moves the statistics by a hundredth of what lies between two photographs.
    """
    factor = min(image.size) // SMALL
    if factor <= 1:
        return image, (0.0, 0.0, *image.size)
    step = max(factor // GRID, 1)
    columns, rows = image.width // step, image.height // step
    if step > 1:
        within = (0.0, 0.0, columns * step, rows * step)
        image = image.resize((columns, rows), Image.Resampling.NEAREST, box=within)
    factor //= step
    return image.reduce(factor), (0.0, 0.0, columns / factor, rows / factor)


def _pixels(image: Image.Image, content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8).reshape(image.height, image.width, -1)


def _centre(pixels_HWC: np.ndarray) -> np.ndarray:
    height, width = pixels_HWC.shape[:2]
    top, left = max(height - PROBE, 0) // 2, max(width - PROBE, 0) // 2
    return pixels_HWC[top : top + PROBE, left : left + PROBE]


def _halved(pixels_NHW: np.ndarray) -> np.ndarray:
    """Means of two by two, rounded."""
    sums_NHW = pixels_NHW[:, ::2].astype(np.uint16) + pixels_NHW[:, 1::2]
    halved_NHW: np.ndarray = ((sums_NHW[..., ::2] + sums_NHW[..., 1::2] + 2) >> 2).astype(np.uint8)
    return halved_NHW


def _moments(images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations, [N, C], of HWC images. Sums of whole numbers: exact."""
    ends = [0, *accumulate(image.shape[0] * image.shape[1] for image in images)]
    pixels_P4 = np.ones((ends[-1], 4))  # the fourth is one, so that products of columns are sums, too
    for image, (start, end) in zip(images, pairwise(ends), strict=True):
        pixels_P4[start:end, :3] = image.reshape(end - start, -1)  # grey fills all three
    parts = (pixels_P4[start:end] for start, end in pairwise(ends))
    products_N44 = np.array([part.T @ part for part in parts]).reshape(-1, 4, 4)
    total_N1 = products_N44[:, 3, 3:]
    means_NC = products_N44[:, 3, :3] / total_N1
    variances_NC = products_N44.diagonal(axis1=1, axis2=2)[:, :3] / total_N1 - means_NC**2
    return means_NC, np.sqrt(np.maximum(variances_NC, 0))


def _by_shape(compute: Callable[[np.ndarray], np.ndarray], images: Sequence[np.ndarray]) -> np.ndarray:
    """Two numbers for each image, computed at once for those of one shape: uint8 [N, ...] goes in, [N, 2] comes out."""
    values_N2 = np.empty((len(images), 2))
    shapes = [image.shape for image in images]
    for shape in set(shapes):
        rows = [row for row, found in enumerate(shapes) if found == shape]
        values_N2[rows] = compute(np.stack([images[row] for row in rows]))
    return values_N2


def _compressibility_and_correlation(pixels_NHWC: np.ndarray) -> np.ndarray:
    grey_NHW = pixels_NHWC[..., 0]
    if pixels_NHWC.shape[3] == 3:
        grey_NHW = ((pixels_NHWC @ _LUMA_16 + 0x8000) >> 16).astype(np.uint8)
    left_N = [len(zlib.compress(grey_HW.tobytes(), 1)) / grey_HW.size for grey_HW in grey_NHW]
    return np.stack([left_N, _correlations(grey_NHW.astype(np.float32))], axis=1)


def _sharpness_and_correlation(grey_NHW: np.ndarray) -> np.ndarray:
    pixels_NHW = grey_NHW.astype(np.float32)
    return np.stack([_sharpness(pixels_NHW), _correlations(pixels_NHW)], axis=1)


def _sharpness(pixels_NHW: np.ndarray) -> np.ndarray:
    """Deviation of what Pillow's FIND_EDGES gives: eight times a pixel minus its eight neighbours, in 0..255."""
    if min(pixels_NHW.shape[1:]) < 3:
        return np.zeros(len(pixels_NHW))
    sums_NHW = pixels_NHW[:, :-2] + pixels_NHW[:, 1:-1] + pixels_NHW[:, 2:]
    sums_NHW = sums_NHW[:, :, :-2] + sums_NHW[:, :, 1:-1] + sums_NHW[:, :, 2:]
    deviations_N: np.ndarray = (9 * pixels_NHW[:, 1:-1, 1:-1] - sums_NHW).clip(0, 255).std((1, 2))
    return deviations_N


def _correlations(pixels_NHW: np.ndarray) -> np.ndarray:
    """Of each image: one minus half the mean squared step between neighbours, in units of the variance."""
    variance_N = pixels_NHW.var((1, 2))
    steps = [np.diff(pixels_NHW, axis=axis) for axis in (1, 2)]
    count = sum(step[0].size for step in steps)
    squares_N = sum(np.square(step).sum((1, 2)) for step in steps)
    varied_N = variance_N > 0
    return np.where(varied_N, 1 - squares_N / np.where(varied_N, 2 * variance_N * count, 1), 1.0)
