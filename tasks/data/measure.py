"""What images are like: the numbers that data checks judge. Axes: N image, H row, W column, C channel, P pixel.

`look_at` does what needs a whole image, mostly outside the interpreter's lock; `measure` computes on many looks at
once, because numpy's fixed cost per call, inside that lock, is larger than the arithmetic on one image.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

PROBE = 32  # side of the centres that compressibility, correlation and sharpness look at
SMALL = 32  # side of the copy that all else is measured on; an image's own side if that is less than twice as much
GRID = 5  # as many pixels of a row are looked at to average over a square
THUMBNAIL = 16  # side of the grey copy that tells near duplicates from what merely hashes alike
_LUMA = np.array([0.299, 0.587, 0.114])
_LUMA_16 = np.array([19595, 38470, 7471, 0], np.float32)  # the same in Pillow's fixed point, of RGB and RGBX
# The first frequencies of the DCT-II, [K, N]: eight of SMALL, up to a factor.
_COSINES = np.cos(np.pi / SMALL * np.outer(np.arange(8), np.arange(SMALL) + 0.5)).astype(np.float32)

_MEASURED = np.dtype(
    [
        *((f"{statistic}_{channel}", np.float32) for statistic in ("mean", "std") for channel in "rgb"),
        *(
            (name, np.float32)
            for name in ("brightness", "std_luma", "entropy", "sharpness", "compressibility", "correlation")
        ),
        ("phash", np.uint64),
        ("thumbnail", f"V{THUMBNAIL**2}"),
    ]
)


@dataclass(frozen=True)
class Look:
    """What is kept of one image to measure it: some kilobytes."""

    small_HWC: np.ndarray
    near_HWC: np.ndarray  # centre, in the image's own pixels


def look_at(image: Image.Image, pixels_HWC: np.ndarray) -> Look:
    """A decoded image, RGB or L, and its pixels."""
    small = _small(image)
    return Look(
        small_HWC=np.frombuffer(small.tobytes(), np.uint8).reshape(small.height, small.width, -1),
        near_HWC=pixels_HWC[_centre(*image.size)].copy(),  # all else of the image can go
    )


def measure(looks: Sequence[Look]) -> dict[str, list[Any]]:
    """Properties of all images, by name.

    Returns:
        mean_r, mean_g, mean_b, std_r, std_g, std_b: of each channel, in 0..255; a grey image has three equal ones.
        brightness: mean luma, in 0..1.
        std_luma: of luma, in 0..255: what a model of one channel is given.
        entropy: of the grey levels, in bits (0..8).
        sharpness: standard deviation of the edges in the centre of the small copy, in 0..255.
        compressibility: share of bytes that zlib leaves of the centre; noise keeps all of them.
        correlation: of neighbours, in the centre or in that of the small copy if that is more: a weave looks like noise
            from near. Near 1 in photographs, near 0 in noise, and 1 in a constant image, where it is not defined.
        phash: 64 bits that similar images share (`perceptual_hashes`).
        thumbnail: a grey copy, THUMBNAIL x THUMBNAIL bytes.
    """
    found = np.empty(len(looks), _MEASURED)
    shapes = [look.small_HWC.shape for look in looks]
    for shape in set(shapes):  # that of the other part follows from it
        rows = [row for row, other in enumerate(shapes) if other == shape]
        small_NHWC = np.stack([looks[row].small_HWC for row in rows])
        near_NHWC = np.stack([looks[row].near_HWC for row in rows])
        for name, values_N in _properties(small_NHWC, near_NHWC).items():
            found[name][rows] = values_N
    return {name: found[name].tolist() for name in _MEASURED.names or ()}


def perceptual_hashes(copies_NHW: np.ndarray) -> np.ndarray:
    """64 bits each, uint64: which of the 8 x 8 lowest frequencies of a 32 x 32 copy lie above their median.

    Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions (2010), section 3.2.1.
    """
    low_NF = (_COSINES @ copies_NHW.astype(np.float32) @ _COSINES.T).reshape(-1, 64)
    low_NF[:, 0] = 0.0  # brightness says nothing of what is seen
    hashes_N: np.ndarray = np.packbits(low_NF > np.median(low_NF, axis=1, keepdims=True), axis=1).view(">u8")[:, 0]
    return hashes_N


def _small(image: Image.Image) -> Image.Image:
    """A copy, SMALL x SMALL where the image is large: each pixel is the mean of what is looked at in its square.

    To average all takes about twice the time, and moves the statistics by a hundredth of what lies between two
    photographs.
    """
    across, down = (1 if side < 2 * SMALL else GRID for side in image.size)
    if across == down == 1:
        return image
    width, height = (side if side < 2 * SMALL else SMALL * GRID for side in image.size)
    return image.resize((width, height), Image.Resampling.NEAREST).reduce((across, down))


def _centre(width: int, height: int) -> tuple[slice, slice]:
    """Its rows and its columns."""
    top, left = max(height - PROBE, 0) // 2, max(width - PROBE, 0) // 2
    return slice(top, top + PROBE), slice(left, left + PROBE)


def _properties(small_NHWC: np.ndarray, near_NHWC: np.ndarray) -> dict[str, np.ndarray]:
    means_NC, deviations_NC = _moments(small_NHWC)
    grey_NHW, near_NHW = _grey(small_NHWC), _grey(near_NHWC)
    copies_NHW = _copies(grey_NHW)
    rows, columns = _centre(*grey_NHW.shape[:0:-1])
    far_NHW = grey_NHW[:, rows, columns].astype(np.float32)
    return {
        **dict(zip(("mean_r", "mean_g", "mean_b"), means_NC.T, strict=True)),
        **dict(zip(("std_r", "std_g", "std_b"), deviations_NC.T, strict=True)),
        "brightness": means_NC @ _LUMA / 255,
        "std_luma": grey_NHW.std((1, 2)),
        "entropy": _entropies(grey_NHW),
        "sharpness": _sharpness(far_NHW),
        "compressibility": np.array([len(zlib.compress(grey_HW.tobytes(), 1)) / grey_HW.size for grey_HW in near_NHW]),
        "correlation": np.maximum(_correlations(near_NHW.astype(np.float32)), _correlations(far_NHW)),
        "phash": perceptual_hashes(copies_NHW),
        "thumbnail": _halved(copies_NHW).reshape(len(copies_NHW), -1).view(_MEASURED["thumbnail"])[:, 0],
    }


def _grey(pixels_NHWC: np.ndarray) -> np.ndarray:
    """Luma, uint8, as Pillow rounds it."""
    channels = pixels_NHWC.shape[3]
    if channels == 1:
        return pixels_NHWC[..., 0]
    luma_NHW = pixels_NHWC.astype(np.float32) @ _LUMA_16[:channels]  # whole numbers below 2**24: exact
    return ((luma_NHW + 0x8000) / 0x10000).astype(np.uint8)


def _copies(grey_NHW: np.ndarray) -> np.ndarray:
    """All of SMALL x SMALL pixels."""
    if grey_NHW.shape[1:] == (SMALL, SMALL):
        return grey_NHW
    images = (Image.fromarray(grey_HW) for grey_HW in grey_NHW)
    return np.stack([np.asarray(image.resize((SMALL, SMALL), Image.Resampling.BILINEAR)) for image in images])


def _halved(pixels_NHW: np.ndarray) -> np.ndarray:
    """Means of two by two, rounded."""
    sums_NHW = pixels_NHW[:, ::2].astype(np.uint16) + pixels_NHW[:, 1::2]
    halved_NHW: np.ndarray = ((sums_NHW[..., ::2] + sums_NHW[..., 1::2] + 2) >> 2).astype(np.uint8)
    return halved_NHW


def _moments(pixels_NHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations, [N, 3]. Sums of whole numbers: exact."""
    pixels_NPC = pixels_NHWC.reshape(len(pixels_NHWC), -1, pixels_NHWC.shape[3]).astype(np.float64)
    count = pixels_NPC.shape[1]
    means_NC = (np.ones(count) @ pixels_NPC) / count
    squares_NC = np.diagonal(pixels_NPC.transpose(0, 2, 1) @ pixels_NPC, axis1=1, axis2=2) / count
    deviations_NC = np.sqrt(np.maximum(squares_NC - means_NC**2, 0))
    shape = (len(pixels_NHWC), 3)  # a grey one has three equal ones
    return np.broadcast_to(means_NC, shape), np.broadcast_to(deviations_NC, shape)


def _entropies(grey_NHW: np.ndarray) -> np.ndarray:
    count = len(grey_NHW)
    levels_NP = grey_NHW.reshape(count, -1) + 256 * np.arange(count)[:, None]
    shares_NL = np.bincount(levels_NP.ravel(), minlength=256 * count).reshape(count, 256) / levels_NP.shape[1]
    entropies_N: np.ndarray = -(shares_NL * np.log2(np.where(shares_NL > 0, shares_NL, 1))).sum(1)
    return entropies_N


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
