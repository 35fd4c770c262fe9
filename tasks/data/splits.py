"""Who belongs to which split. Axes: K class, S split."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.sparse import lil_array
from scipy.sparse.csgraph import maximum_flow

from tasks.contracts.errors import DataError
from tasks.contracts.records import SPLITS, SplitName
from tasks.contracts.spec import DataSpec
from tasks.data.cache import DecodedImages
from tasks.data.sources import some

_BY_TURN: tuple[SplitName, ...] = ("gate", "selection", "calibration", "train")  # of taking from a class


@dataclass(frozen=True, eq=False)
class Splits:
    """Rows of the images in each split, in an order that mixes the classes: any first part of it is a fair sample."""

    rows: Mapping[SplitName, np.ndarray]  # of the gate's own source, if it has one, else of the source
    duplicates_dropped: int


def split_images(images: DecodedImages, data: DataSpec, seed: int, gate: DecodedImages | None = None) -> Splits:
    """Splits that share no image, compared by decoded pixels, each with the source's mixture of classes.

    An image that occurs more than once is used once, and in the gate if it occurs there. Who belongs where follows from
    the pixels and the seed, so neither names nor the order of files matter. Every class gives each split its share to
    within one image. A gate with a source of its own (with the same classes) is all of that source.

    Raises:
        DataError: if the same pixels have two labels, or there are fewer images than asked for.
    """
    gate_rows, source_rows = _unique(images, gate, seed)
    dropped = len(images) - len(source_rows) + (0 if gate is None else len(gate) - len(gate_rows))
    sizes = _sizes(data, len(source_rows), dropped, has_own_gate=gate is not None)
    rows = _stratified(images.labels, source_rows, sizes, len(images.class_names))
    if gate is not None:
        rows["gate"] = gate_rows
    return Splits(rows={name: rows[name] for name in SPLITS}, duplicates_dropped=dropped)


def _unique(images: DecodedImages, gate: DecodedImages | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the gate and of the source without duplicates, each in an order that follows from pixels and seed."""
    parts = [images] if gate is None else [gate, images]  # of equal pixels the first is kept
    digests = np.concatenate([part.digests for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    _, kept, twin_of = np.unique(digests, return_index=True, return_inverse=True)
    first_of = kept[twin_of]
    at_odds = np.flatnonzero(labels != labels[first_of])
    if len(at_odds):
        _refuse_conflicts(parts, labels, at_odds, first_of)
    kept = kept[np.argsort(_ranks(digests[kept], seed), kind="stable")]
    num_gate = 0 if gate is None else len(gate)
    return kept[kept < num_gate], kept[kept >= num_gate] - num_gate


def _ranks(digests: np.ndarray, seed: int) -> np.ndarray:
    """A random number per image that depends on nothing but its pixels and the seed."""
    salt = seed.to_bytes(8, "little")
    return np.array([_hash64(digest, salt) for digest in digests.tolist()], np.uint64)


def _hash64(digest: bytes, salt: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(digest, digest_size=8, salt=salt).digest(), "little")


def _refuse_conflicts(
    parts: list[DecodedImages], labels: np.ndarray, at_odds: np.ndarray, first_of: np.ndarray
) -> None:
    names = [name for part in parts for name in part.names]
    class_names = parts[0].class_names
    pairs = [
        f"{names[first_of[row]]} ({class_names[labels[first_of[row]]]}) and {names[row]} ({class_names[labels[row]]})"
        for row in at_odds
    ]
    raise DataError(
        f"{len(pairs)} images have the same pixels as one of another class: {some(pairs, separator='; ')}.",
        remedy="Keep each image in one class only.",
    )


def _sizes(data: DataSpec, num_images: int, dropped: int, *, has_own_gate: bool) -> dict[SplitName, int]:
    """Images of the source in each split; train is what the others leave."""
    sizes: dict[SplitName, int] = {
        "gate": 0 if has_own_gate else _count(data.gate, num_images),
        "selection": _count(data.selection, num_images),
        "calibration": data.calibration,
    }
    asked = sum(sizes.values())
    if asked > num_images:
        parts = " + ".join(f"{size} {name}" for name, size in sizes.items() if size)
        raise DataError(
            f"The splits ask for {asked} images ({parts}), but {data.source} has {num_images}"
            + (f" after {dropped} duplicates were dropped." if dropped else "."),
            remedy="Lower data.calibration, data.selection or data.gate, or add images.",
        )
    return {**sizes, "train": num_images - asked}


def _count(size: float, num_images: int) -> int:
    return size if isinstance(size, int) else max(1, round(size * num_images))


def _stratified(
    labels: np.ndarray, rows: np.ndarray, sizes: Mapping[SplitName, int], num_classes: int
) -> dict[SplitName, np.ndarray]:
    """Deal out `rows`: of each class the first ones to the gate, the next ones to selection, and so on."""
    labels_of_rows = labels[rows]
    counts_K = np.bincount(labels_of_rows, minlength=num_classes)
    table_KS = _allocate(counts_K, np.array([sizes[name] for name in _BY_TURN]))
    by_class = np.argsort(labels_of_rows, kind="stable")
    turn_of = np.empty(len(rows), np.int64)
    turn_of[by_class] = np.repeat(np.tile(np.arange(len(_BY_TURN)), num_classes), table_KS.ravel())
    return {name: rows[turn_of == turn] for turn, name in enumerate(_BY_TURN)}


def _allocate(counts_K: np.ndarray, sizes_S: np.ndarray) -> np.ndarray:
    """How many images of each class go to each split: its exact share rounded up or down, rows and columns kept.

    By largest remainder, for the whole table at once: one split after the other could drift by two images.
    """
    total = counts_K.sum()
    floors_KS, remainders_KS = np.divmod(np.outer(counts_K, sizes_S), total)
    left_K, left_S = counts_K - floors_KS.sum(1), sizes_S - floors_KS.sum(0)
    up_KS = np.zeros(floors_KS.shape, np.int64)
    for cell in np.argsort(-remainders_KS, axis=None, kind="stable"):
        k, s = np.unravel_index(cell, up_KS.shape)
        if remainders_KS[k, s] and left_K[k] and left_S[s]:
            up_KS[k, s] = 1
            left_K[k] -= 1
            left_S[s] -= 1
    table_KS: np.ndarray = floors_KS + up_KS + _repair(up_KS, remainders_KS > 0, left_K, left_S)
    return table_KS


def _repair(up_KS: np.ndarray, may_rise_KS: np.ndarray, left_K: np.ndarray, left_S: np.ndarray) -> np.ndarray:
    """Changes of -1, 0 or 1 that place what greedy rounding left over.

    They are a maximum flow from classes to splits: forth through cells that may rise, back through cells that did. It
    always places everything, as the exact shares are themselves such a flow and all capacities are whole.
    """
    num_classes, num_splits = up_KS.shape
    source, classes, splits = 0, slice(1, num_classes + 1), slice(num_classes + 1, num_classes + num_splits + 1)
    capacity = lil_array((num_classes + num_splits + 2,) * 2, dtype=np.int32)
    capacity[source, classes] = left_K
    capacity[classes, splits] = may_rise_KS & (up_KS == 0)
    capacity[splits, classes] = up_KS.T
    capacity[splits, -1] = left_S
    flow = maximum_flow(capacity.tocsr(), source, capacity.shape[0] - 1)
    assert flow.flow_value == left_K.sum()
    changes_KS: np.ndarray = flow.flow[classes, splits].toarray()
    return changes_KS
