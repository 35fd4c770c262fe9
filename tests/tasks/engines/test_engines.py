"""The contract of every engine adapter, on a graph small enough to be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from tasks.contracts.errors import EngineError
from tasks.engines.base import Engine, TensorInfo
from tasks.engines.onnxruntime import OnnxRuntimeEngine
from tasks.engines.tensorrt import TensorRtEngine
from tests.tasks.engines.conftest import plan_maker

# Two logits of a 1x2x2 image: the sum of its pixels, and that sum negated.
TINY = """
<ir_version: 10, opset_import: ["": 21]>
tiny (float[N,1,2,2] pixels) => (float[N,2] logits)
<float[4,2] weight = {1, -1, 1, -1, 1, -1, 1, -1}>
{
    flat = Flatten<axis = 1>(pixels)
    logits = MatMul(flat, weight)
}
"""
TWO_OUTPUTS = """
<ir_version: 10, opset_import: ["": 21]>
pair (float[N,2] left, int64[N,2] right) => (float[N,2] up, int64[N,2] down)
{
    up = Neg(left)
    down = Neg(right)
}
"""

Adapter = Callable[[Path], Engine]


@pytest.fixture(params=["onnxruntime", "tensorrt-double", "tensorrt-gpu"])
def adapter(request: pytest.FixtureRequest, tmp_path: Path) -> Adapter:
    """Opens an ONNX file in each runtime; for TensorRT a plan is built from it first."""
    runtime, _, machine = request.param.partition("-")
    if runtime == "onnxruntime":
        return lambda path: OnnxRuntimeEngine(path, threads=1)
    make_plan = plan_maker(request, machine, tmp_path)

    def open_plan(path: Path) -> Engine:
        built = make_plan(path)
        return TensorRtEngine(built.plan, built.key)

    return open_plan


def saved(text: str, path: Path) -> Path:
    onnx.save(onnx.parser.parse_model(text), path)
    return path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return saved(TINY, tmp_path / "tiny.onnx")


def test_an_engine_computes_what_the_graph_says(adapter: Adapter, tiny: Path) -> None:
    """Logits are those worked out by hand, for any batch size."""
    pixels = np.arange(8, dtype=np.float32).reshape(2, 1, 2, 2)
    with adapter(tiny) as engine:
        np.testing.assert_array_equal(engine.run({"pixels": pixels})["logits"], [[6, -6], [22, -22]])
        np.testing.assert_array_equal(engine.answer(pixels[:1]), [[6, -6]])


def test_an_open_engine_tells_its_inputs_and_outputs(adapter: Adapter, tiny: Path) -> None:
    """Names, dtypes and shapes come from the model; a symbolic size is None."""
    with adapter(tiny) as engine:
        assert engine.inputs == (TensorInfo(name="pixels", dtype=np.dtype(np.float32), shape=(None, 1, 2, 2)),)
        assert engine.outputs == (TensorInfo(name="logits", dtype=np.dtype(np.float32), shape=(None, 2)),)


def test_every_output_comes_back_under_its_name(adapter: Adapter, tmp_path: Path) -> None:
    """A model with two inputs and two outputs keeps them apart."""
    with adapter(saved(TWO_OUTPUTS, tmp_path / "pair.onnx")) as engine:
        answer = engine.run({"right": np.array([[3, 4]]), "left": np.array([[1, 2]], np.float32)})
    np.testing.assert_array_equal(answer["up"], [[-1, -2]])
    np.testing.assert_array_equal(answer["down"], [[-3, -4]])


def test_answer_is_for_classifiers_only(adapter: Adapter, tmp_path: Path) -> None:
    """A model with two inputs has no single answer."""
    with (
        adapter(saved(TWO_OUTPUTS, tmp_path / "pair.onnx")) as engine,
        pytest.raises(EngineError, match="2 inputs and 2 outputs"),
    ):
        engine.answer(np.zeros((1, 2), np.float32))


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        ({}, r"names \[\]; the model's inputs are \['pixels'\]"),
        ({"image": np.zeros((1, 1, 2, 2), np.float32)}, r"names \['image'\]"),
        (
            {"pixels": np.zeros((1, 1, 2, 2), np.float32), "more": np.zeros(1, np.float32)},
            r"names \['more', 'pixels'\]",
        ),
        ({"pixels": np.zeros((1, 1, 2, 2))}, r"'pixels' is float64\[1, 1, 2, 2\].* float32\[any, 1, 2, 2\]"),
        ({"pixels": np.zeros((1, 1, 2, 3), np.float32)}, r"float32\[1, 1, 2, 3\]"),
        ({"pixels": np.zeros((1, 2, 2), np.float32)}, r"float32\[1, 2, 2\]"),
    ],
    ids=["nothing", "wrong name", "one too many", "dtype", "size", "rank"],
)
def test_a_feed_that_does_not_fit_is_refused(
    adapter: Adapter, tiny: Path, feed: dict[str, np.ndarray], message: str
) -> None:
    """Names, dtypes and shapes are checked before the runtime sees them."""
    with adapter(tiny) as engine, pytest.raises(EngineError, match=message):
        engine.run(feed)


def test_an_engine_runs_only_while_it_is_open(adapter: Adapter, tiny: Path) -> None:
    """Before enter and after exit there is nothing to run."""
    engine = adapter(tiny)
    pixels = np.zeros((1, 1, 2, 2), np.float32)
    with pytest.raises(EngineError, match="not open"):
        engine.answer(pixels)
    with engine:
        engine.answer(pixels)
    with pytest.raises(EngineError, match="not open"):
        engine.answer(pixels)


@pytest.mark.parametrize("damage", ["missing", "folder", "empty", "text", "truncated"])
def test_a_file_that_is_no_model_is_named(adapter: Adapter, tiny: Path, damage: str) -> None:
    """A missing, truncated or foreign file gives one clear error."""
    whole = tiny.read_bytes()
    tiny.unlink()
    if damage == "folder":
        tiny.mkdir()
    elif damage != "missing":
        tiny.write_bytes({"empty": b"", "text": b"not a model", "truncated": whole[: len(whole) // 2]}[damage])
    with pytest.raises(EngineError, match=r"tiny\.onnx"), adapter(tiny):
        pass


def test_a_version_and_options_are_recorded_as_text(adapter: Adapter, tiny: Path) -> None:
    """What decides an engine's speed beside the file can be stored."""
    engine = adapter(tiny)
    assert engine.version()
    assert engine.options
    assert all(isinstance(value, str) for value in engine.options.values())
