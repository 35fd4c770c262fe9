"""Does a graph run, with finite answers, and do its scales fit what it computes? The rules that need a runtime."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto

from tasks.contracts.errors import DataError, EngineError
from tasks.graph.index import QUANTIZE, Graph, name_of
from tasks.graph.lint import Finding
from tasks.graph.rules_tensorrt import APART

Feed = Mapping[str, np.ndarray]
Run = Callable[[Path, Iterable[Feed]], Iterator[Feed]]
FEW = 2  # images of noise
BATCH = 16  # images at once, where the batch is open


def trial(model: onnx.ModelProto, run: Run, work: Path, images_NCHW: np.ndarray | None = None) -> tuple[Finding, ...]:
    """Findings of L25, and of L22 if there are images.

    Args:
        model: keeps the rules whose breach is an error.
        run: runs an ONNX file on one feed after the other.
        work: folder for copies of the model.
        images_NCHW: preprocessed; otherwise smooth noise with mean 0 and deviation 1, as normalised photographs have.

    Raises:
        DataError: if the images do not fit the model's input.
    """
    graph = Graph(model)
    (image,) = graph.inputs
    sizes = [size.dim_value for size in image.type.tensor_type.shape.dim]
    given_NCHW = _smooth_noise((sizes[0] or FEW, *sizes[1:])) if images_NCHW is None else _checked(images_NCHW, sizes)
    count = sizes[0] or BATCH
    whole = len(given_NCHW) - len(given_NCHW) % (sizes[0] or 1)  # a batch of fixed size cannot be smaller
    feeds = [{image.name: given_NCHW[start : start + count]} for start in range(0, whole, count)]
    path = work / "trial.onnx"
    onnx.save(model, path)
    broken: Counter[str] = Counter()
    try:
        for answer in run(path, feeds):
            broken.update({name: int((~np.isfinite(values)).sum()) for name, values in answer.items()})
    except EngineError as error:
        return (_failure(model.graph.name, error.problem),)
    failures = tuple(_failure(name, f"{number} values are not finite") for name, number in broken.items() if number)
    if failures or images_NCHW is None:
        return failures
    return tuple(_unfit_scales(graph, lambda path: run(path, feeds), work))


def _failure(node: str, found: str) -> Finding:
    remedy = "Find the first operator that fails or overflows: export the model up to it."
    return Finding(rule="L25", severity="error", node=node, found=found, remedy=remedy)


def _smooth_noise(shape: tuple[int, ...]) -> np.ndarray:
    """Neighbouring pixels alike, as in photographs: the running mean of white noise along each side."""
    noise = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    for axis in range(2, len(shape)):
        noise = np.mean([np.roll(noise, step, axis) for step in range(4)], axis=0)
    return np.asarray((noise - noise.mean()) / noise.std(), np.float32)


def _checked(images_NCHW: np.ndarray, sizes: list[int]) -> np.ndarray:
    shape = list(images_NCHW.shape)
    fits = len(shape) == len(sizes) and shape[1:] == sizes[1:] and shape[0] >= max(sizes[0], 1)
    if not fits or images_NCHW.dtype != np.float32:
        wanted = ", ".join(str(size or "any") for size in sizes)
        raise DataError(
            f"The images are {images_NCHW.dtype}{shape}; the graph takes float32[{wanted}].",
            remedy="Give preprocessed images as the graph takes them.",
        )
    return images_NCHW


def _unfit_scales(graph: Graph, answers: Callable[[Path], Iterator[Feed]], work: Path) -> Iterator[Finding]:
    """Scales that reach far beyond what the images give, or far from all of it."""
    quantizing: dict[str, NodeProto] = {}
    for node in graph.of_type(QUANTIZE):
        if node.input[0] not in graph.roots:
            quantizing.setdefault(node.input[0], node)
    path = work / "observed.onnx"
    onnx.save(_observed(graph.model, quantizing), path)
    largest: dict[str, float] = defaultdict(float)
    for answer in answers(path):
        for name in quantizing:
            largest[name] = max(largest[name], float(answer[_top(name)]))
    for name, node in quantizing.items():
        scale = graph.number(node.input[1])
        if scale and largest[name] and not 1 / APART <= 127 * scale / largest[name] <= APART:
            yield Finding(
                rule="L22",
                severity="warning",
                node=name_of(node),
                found=f"a scale that reaches {127 * scale:.3g} for values up to {largest[name]:.3g}",
                remedy="Calibrate again, on images like these.",
            )


def _observed(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """The model, giving the largest magnitude of each tensor and nothing else."""
    observed = onnx.ModelProto()
    observed.CopyFrom(model)
    del observed.graph.output[:]
    for name in names:
        size = f"{name}_size"
        observed.graph.node.append(onnx.helper.make_node("Abs", [name], [size]))
        observed.graph.node.append(onnx.helper.make_node("ReduceMax", [size], [_top(name)], keepdims=0))
        observed.graph.output.append(onnx.ValueInfoProto(name=_top(name)))
    return observed


def _top(name: str) -> str:
    return f"{name}_largest"
