"""Accuracy of one model, and of two models on the same images. Letters: N images, C classes, K best answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from uuid import uuid4
from zipfile import BadZipFile

import numpy as np
from scipy.stats import binomtest

from tasks.contracts.errors import EngineError, StoreError
from tasks.contracts.records import Accuracy, ArtifactRef, Comparison

NUM_BEST = 5
MAX_CONFUSION_CLASSES = 100
Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution
Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """What a model answered about N images: its best K = min(5, C) classes, the best first."""

    labels: np.ndarray  # [N] int64
    top: np.ndarray  # [N, K] int32

    @property
    def is_right(self) -> np.ndarray:
        """[N] whether the label is the best."""
        return np.asarray(self.top[:, 0] == self.labels)

    @property
    def is_near(self) -> np.ndarray:
        """[N] whether the label is among the best K."""
        return np.asarray((self.top == self.labels[:, None]).any(axis=1))


def predict(
    answer: Callable[[np.ndarray], np.ndarray],
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    num_images: int,
    progress: Callable[[int, int], None] | None = None,
) -> Predictions:
    """Ask a model about every batch of (pixels_NCHW, labels_N), which are `num_images` together.

    Raises:
        EngineError: if logits are no finite [N, C], or images are missing.
    """
    labels, tops, done = [], [], 0
    for pixels_NCHW, labels_n in batches:
        logits_NC = answer(pixels_NCHW)
        if logits_NC.ndim != 2 or len(logits_NC) != len(labels_n):
            raise EngineError(
                f"{len(labels_n)} images were answered with {list(logits_NC.shape)}, not with logits [N, C]."
            )
        is_finite_N = np.isfinite(logits_NC).all(axis=1)
        if not is_finite_N.all():
            raise EngineError(
                f"The logits of image {done + int(is_finite_N.argmin())} are not finite.",
                remedy="Look for a layer whose range overflows, and keep it float.",
            )
        tops.append(best_classes(logits_NC))
        labels.append(labels_n)
        done += len(labels_n)
        if progress:
            progress(done, num_images)
    if done != num_images or not done:
        raise EngineError(f"{done} images were scored, {num_images} were expected.")
    return Predictions(labels=np.concatenate(labels).astype(np.int64), top=np.concatenate(tops))


def best_classes(logits_NC: np.ndarray) -> np.ndarray:
    """The best min(5, C) classes of each row [N, K], the best first; of equals, the lower index.

    Picking the maximum a few times is quicker than sorting, and argmax takes the first of equals.
    """
    remaining_NC = logits_NC.astype(np.float32)
    rows_N = np.arange(len(remaining_NC))
    top_NK = np.empty((len(remaining_NC), min(NUM_BEST, remaining_NC.shape[1])), np.int32)
    for rank in range(top_NK.shape[1]):
        top_NK[:, rank] = remaining_NC.argmax(axis=1)
        remaining_NC[rows_N, top_NK[:, rank]] = -np.inf
    return top_NK


def accuracy_of(predictions: Predictions, num_classes: int, ref: ArtifactRef) -> Accuracy:
    """Scores of stored `predictions`.

    Raises:
        EngineError: if the model knows more classes than `num_classes`.
    """
    highest = int(max(predictions.top.max(), predictions.labels.max()))
    if highest >= num_classes:
        raise EngineError(f"Class {highest} was answered or asked for; there are {num_classes}, from 0.")
    num_images = len(predictions.labels)
    num_right, num_near = int(predictions.is_right.sum()), int(predictions.is_near.sum())
    confusion_CC = _confusion(predictions, num_classes) if num_classes <= MAX_CONFUSION_CLASSES else None
    images_C, right_C = _per_class(predictions, num_classes)
    return Accuracy(
        num_images=num_images,
        top1=percent(num_right, num_images),
        top1_interval=wilson(num_right, num_images),
        top5=percent(num_near, num_images),
        top5_interval=wilson(num_near, num_images),
        recall=tuple(
            percent(int(right), int(images)) if images else None
            for right, images in zip(right_C, images_C, strict=True)
        ),
        confusion=None if confusion_CC is None else tuple(tuple(row) for row in confusion_CC.tolist()),
        predictions=ref,
    )


def compare(
    float_predictions: Predictions, engine_predictions: Predictions, class_names: tuple[str, ...]
) -> Comparison:
    """The engine against the float model on the same images, in the same order.

    Raises:
        EngineError: if the two were not scored on the same images.
    """
    if not np.array_equal(float_predictions.labels, engine_predictions.labels):
        raise EngineError("The float model and the engine were scored on different images.", remedy="Score both again.")
    num_images = len(float_predictions.labels)
    float_right_N, engine_right_N = float_predictions.is_right, engine_predictions.is_right
    only_float = int((float_right_N & ~engine_right_N).sum())
    only_engine = int((engine_right_N & ~float_right_N).sum())

    images_C, float_right_C = _per_class(float_predictions, len(class_names))
    _, engine_right_C = _per_class(engine_predictions, len(class_names))
    drop_C = np.full(len(class_names), -np.inf)
    np.divide(100 * (float_right_C - engine_right_C), images_C, out=drop_C, where=images_C > 0)
    worst = int(drop_C.argmax())

    return Comparison(
        top1_drop=percent(only_float - only_engine, num_images),
        top1_drop_interval=paired_interval(only_float, only_engine, num_images),
        top5_drop=percent(int(float_predictions.is_near.sum()) - int(engine_predictions.is_near.sum()), num_images),
        class_drop=float(drop_C[worst]),
        worst_class=class_names[worst],
        agreement=percent(int((float_predictions.top[:, 0] == engine_predictions.top[:, 0]).sum()), num_images),
        only_float_right=only_float,
        only_engine_right=only_engine,
        p_value=float(binomtest(only_float, only_float + only_engine).pvalue) if only_float + only_engine else 1.0,
    )


def percent(count: int, total: int) -> float:
    """Rounded once, so that 7 of 1000 equals a limit written as 0.7."""
    return 100 * count / total


def wilson(count: int, total: int) -> Interval:
    """95 % interval of a share, in percent (Wilson 1927)."""
    interval = binomtest(count, total).proportion_ci(method="wilson")
    return 100 * float(interval.low), 100 * float(interval.high)


def paired_interval(only_first: int, only_second: int, total: int) -> Interval:
    """95 % interval of the difference of two shares of the same images, in points.

    Wald's, after half an image was added to each cell of McNemar's table (Agresti and Min 2005, "Simple improved
    confidence intervals for comparing matched proportions"): it keeps its width where few or no answers differ.
    """
    b, c, n = only_first + 0.5, only_second + 0.5, total + 2
    middle = (b - c) / n
    reach = Z95 * sqrt(b + c - (b - c) ** 2 / n) / n
    return 100 * max(middle - reach, -1.0), 100 * min(middle + reach, 1.0)


def save_predictions(predictions: Predictions, path: Path) -> None:
    """Write an npz that depends on nothing but the predictions; it appears whole or not at all."""
    partial = path.with_name(f"{uuid4().hex}.npz")
    try:
        np.savez_compressed(partial, labels=predictions.labels, top=predictions.top)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_predictions(path: Path) -> Predictions:
    """Read what `save_predictions` wrote.

    Raises:
        StoreError: if the file is something else.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Predictions(labels=arrays["labels"], top=arrays["top"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, TypeError, AttributeError) as error:
        raise StoreError(f"{path} holds no predictions: {error}.", remedy="Score the model again.") from error


def _per_class(predictions: Predictions, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [C] and right answers [C] of every class."""
    images_C = np.bincount(predictions.labels, minlength=num_classes)
    right_C = np.bincount(predictions.labels[predictions.is_right], minlength=num_classes)
    return images_C, right_C


def _confusion(predictions: Predictions, num_classes: int) -> np.ndarray:
    """How often label l [rows] was answered with class c [columns]."""
    cells = predictions.labels * num_classes + predictions.top[:, 0]
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)
