"""The TensorRT adapter: on host memory, with doubles of NVIDIA's libraries, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from tasks.contracts.errors import EngineError
from tasks.contracts.spec import TensorRtSpec
from tasks.engines.inspector import audit
from tasks.engines.tensorrt import TensorRtEngine
from tasks.engines.tensorrt_build import BuiltPlan
from tasks.graph.count import count_layers
from tasks.scoring.gpu_latency import Effort, measure_gpu_speed
from tasks.scoring.nvml import Unwatched
from tests.tasks.engines.conftest import MakePlan, plan_maker

SCALED = """
<ir_version: 9, opset_import: ["": 19]>
scaled (float[N,1,2,2] pixels) => (float[N,2] logits)
<float[4,2] weight = {1, -1, 1, -1, 1, -1, 1, -1}>
{
    flat = Flatten<axis = 1>(pixels)
    [fc] logits = MatMul(flat, weight)
}
"""
SPEC = TensorRtSpec(batch=(1, 2, 4))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx.save(onnx.parser.parse_model(SCALED), tmp_path / "scaled.onnx")
    return tmp_path / "scaled.onnx"


@pytest.fixture
def built(make_plan: MakePlan, model: Path) -> BuiltPlan:
    return make_plan(model, SPEC)


@pytest.fixture
def engine(built: BuiltPlan) -> Iterator[TensorRtEngine]:
    with TensorRtEngine(built.plan, built.key) as opened:
        yield opened


@pytest.fixture
def on_doubles(doubles: Any, request: pytest.FixtureRequest, model: Path, tmp_path: Path) -> BuiltPlan:
    """A plan for what can be tried out with doubles alone: faults, and what is left in memory."""
    plan: BuiltPlan = plan_maker(request, "double", tmp_path)(model, SPEC)
    return plan


def pixels(batch: int, value: float = 1.0) -> dict[str, np.ndarray]:
    return {"pixels": np.full((batch, 1, 2, 2), value, np.float32)}


def test_any_batch_of_the_profile_runs_and_one_outside_is_refused(engine: TensorRtEngine) -> None:
    """The GPU never sees a batch that the plan was not built for."""
    for batch in (4, 1, 3):
        np.testing.assert_array_equal(engine.run(pixels(batch))["logits"], [[4, -4]] * batch)
    with pytest.raises(EngineError, match=r"'pixels' is \[5, 1, 2, 2\].*\[1, 1, 2, 2\] to \[4, 1, 2, 2\].*Split"):
        engine.run(pixels(5))
    with pytest.raises(EngineError, match=r"\[0, 1, 2, 2\]"):
        engine.run(pixels(0))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(engine: TensorRtEngine, value: float) -> None:
    """What INT8 makes of NaN is not defined, so it gets no answer."""
    feed = pixels(2)
    feed["pixels"][1, 0, 0, 1] = value
    with pytest.raises(EngineError, match=r"'pixels' holds 1 of 8 values that are NaN or infinite.*preprocessing"):
        engine.run(feed)


def test_an_answer_is_not_overwritten_by_the_next(engine: TensorRtEngine) -> None:
    """The buffers are used again; what was handed out is not one of them."""
    first = engine.run(pixels(1))["logits"]
    engine.run(pixels(1, 5.0))
    np.testing.assert_array_equal(first, [[4, -4]])


def test_an_array_in_another_order_of_memory_is_taken_as_it_reads(engine: TensorRtEngine) -> None:
    """A transposed view is copied value by value."""
    values = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)
    view = np.asfortranarray(np.broadcast_to(values, (3, 1, 2, 2)))
    np.testing.assert_array_equal(engine.run({"pixels": view})["logits"], [[6, -6]] * 3)


@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
@pytest.mark.parametrize("transfers", [False, True], ids=["compute alone", "with transfers"])
def test_timing_splits_an_inference(engine: TensorRtEngine, *, graph: bool, transfers: bool) -> None:
    """Four figures; a copy that was not made took no time."""
    feed = pixels(4)
    for _ in range(3):
        timing = engine.time(feed, transfers=transfers, graph=graph)
        assert timing.compute_ms > 0
        assert timing.enqueue_ms > 0
        assert (timing.h2d_ms > 0, timing.d2h_ms > 0) == (transfers, transfers)


def test_engines_are_measured_in_turns(built: BuiltPlan) -> None:
    """The whole protocol, in little: two engines, two batch sizes, four ways to run them."""
    effort = Effort(warmup_s=0, measure_s=0, measure_runs=10)
    with TensorRtEngine(built.plan, built.key) as first, TensorRtEngine(built.plan, built.key) as second:
        speed, latencies = measure_gpu_speed(
            {"int8": first, "float32": second}, {1: pixels(1), 4: pixels(4)}, Unwatched("not asked."), effort=effort
        )
    assert len(speed.timings) == 2 * 2 * 4
    assert all(timing.compute.min > 0 and timing.num_iterations == 10 for timing in speed.timings)
    assert all((timing.h2d.min > 0) == timing.transfers for timing in speed.timings)
    assert [latency.batch_size for latency in latencies] == [1, 4]


def test_the_audit_reads_what_a_build_leaves(built: BuiltPlan, model: Path) -> None:
    """The inspector was asked with shapes set, without which it tells no data types."""
    found = audit(built.layers.read_text(), count_layers(onnx.load(model), (1, 1, 2, 2)))
    assert found.macs == {"int8": 0, "float16": 0, "float32": 8, "unknown": 0}


def test_a_graph_answers_as_plain_kernels_do(built: BuiltPlan) -> None:
    """Also after the shapes have changed and changed back."""
    with TensorRtEngine(built.plan, built.key, graph=True) as engine:
        for batch, value in ((2, 1.0), (4, 2.0), (2, 3.0), (2, 4.0)):
            np.testing.assert_array_equal(engine.run(pixels(batch, value))["logits"], [[4 * value, -4 * value]] * batch)
        assert engine.options["cuda_graph"] == "1"


def test_many_can_be_started_before_one_waits(engine: TensorRtEngine) -> None:
    """For throughput: prepare once, enqueue often, wait at the end."""
    with pytest.raises(EngineError, match="Nothing is prepared"):
        engine.enqueue(graph=False)
    engine.prepare(pixels(2))
    for _ in range(5):
        engine.enqueue(graph=True)
    engine.synchronize()


def test_two_engines_are_open_in_one_process(built: BuiltPlan) -> None:
    """Each has its own stream and buffers; closing one leaves the other whole."""
    with TensorRtEngine(built.plan, built.key) as first:
        with TensorRtEngine(built.plan, built.key) as second:
            np.testing.assert_array_equal(second.answer(pixels(1)["pixels"]), [[4, -4]])
        np.testing.assert_array_equal(first.answer(pixels(1)["pixels"]), [[4, -4]])


def test_threads_take_turns(engine: TensorRtEngine) -> None:
    """Eight threads, each with a value and a batch of its own, get their own answers."""

    def ask(number: int) -> bool:
        answer = engine.run(pixels(1 + number % 4, float(number)))["logits"]
        return bool((answer == [[4.0 * number, -4.0 * number]]).all())

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(ask, range(64)))


def test_an_engine_opened_in_one_thread_closes_in_another(built: BuiltPlan) -> None:
    """Prefect does not promise a thread."""
    engine = TensorRtEngine(built.plan, built.key)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        one.submit(engine.__enter__).result()
        np.testing.assert_array_equal(other.submit(engine.answer, pixels(1)["pixels"]).result(), [[4, -4]])
        other.submit(engine.__exit__, None, None, None).result()
    with pytest.raises(EngineError, match="not open"):
        engine.run(pixels(1))


@pytest.mark.parametrize("damage", ["truncated", "tampered", "missing"])
def test_a_plan_that_is_not_the_one_built_is_never_loaded(built: BuiltPlan, damage: str) -> None:
    """A plan is native code: its digest is compared before TensorRT sees it."""
    whole = built.plan.read_bytes()
    built.plan.write_bytes(whole[:-1] if damage == "truncated" else whole[:-1] + bytes([whole[-1] ^ 1]))
    if damage == "missing":
        built.plan.unlink()
    with (
        pytest.raises(EngineError, match="is not a file" if damage == "missing" else r"is not loaded.*build it again"),
        TensorRtEngine(built.plan, built.key),
    ):
        pass


def test_a_plan_of_another_machine_is_refused_with_what_differs(built: BuiltPlan) -> None:
    """Before it is loaded, and with the remedy."""
    machine = built.key.machine.model_copy(update={"tensorrt": "9.1.2.3", "gpu": "GPU of long ago"})
    key = built.key.model_copy(update={"machine": machine})
    with (
        pytest.raises(EngineError, match=r"TensorRT 9\.1\.2\.3, and this is .*GPU of long ago.*Build the plan again"),
        TensorRtEngine(built.plan, key),
    ):
        pass


FAULTS = {
    "runtime": r"starting its runtime: ERROR: CUDA initialization failure with error: 35.*Install an NVIDIA driver",
    "deserialize": r"loading model\.plan: ERROR: The engine plan file is not compatible.*Build the plan again",
    "context": r"making a context for model\.plan, which needs 3 MiB, with 512 of 1024.*OutOfMemory.*lower target",
    "location": r"'pixels' of model\.plan is FLOAT in HOST memory",
    "infer": r"loading model\.plan, by inferShapes: a bug",
    "unknown": r"inferring shapes of model\.plan; unknown are those of pixels",
    "shape": r"setting 'pixels' of model\.plan to \[4, 1, 2, 2\]: ERROR: setInputShape",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_to_open_is_explained_and_leaves_nothing_on_the_gpu(
    on_doubles: BuiltPlan, doubles: Any, fault: str
) -> None:
    """None and False become an error with TensorRT's own reason."""
    doubles.tensorrt.TROUBLE.add(fault)
    try:
        with pytest.raises(EngineError, match=FAULTS[fault]), TensorRtEngine(on_doubles.plan, on_doubles.key):
            pass
    finally:
        doubles.tensorrt.TROUBLE.clear()
    assert +doubles.cuda.LIVING == {}
    assert doubles.cuda.stack() == []


def test_no_gpu_is_one_clear_error(on_doubles: BuiltPlan, doubles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the driver says, and what to do."""
    monkeypatch.setattr(doubles.cuda, "TROUBLE", {"init"})
    with (
        pytest.raises(EngineError, match=r"no CUDA-capable device is detected.*Run where a GPU is visible"),
        TensorRtEngine(on_doubles.plan, on_doubles.key),
    ):
        pass


def test_a_gpu_without_room_for_buffers_is_one_clear_error(
    on_doubles: BuiltPlan, doubles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was taken before is given back."""
    monkeypatch.setattr(doubles.cuda, "TROUBLE", {"memory"})
    with (
        pytest.raises(EngineError, match=r"loading model\.plan: cuMemAlloc failed: out of memory.*other processes"),
        TensorRtEngine(on_doubles.plan, on_doubles.key),
    ):
        pass
    assert +doubles.cuda.LIVING == {}


def test_another_index_than_there_are_gpus_is_refused(on_doubles: BuiltPlan) -> None:
    """The setting is named."""
    with (
        pytest.raises(EngineError, match=r"There is no GPU 1; CUDA sees 1\. Set REQUANT_GPU"),
        TensorRtEngine(on_doubles.plan, on_doubles.key, gpu=1),
    ):
        pass


@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
def test_a_failed_enqueue_is_explained_and_the_engine_still_closes(
    on_doubles: BuiltPlan, doubles: Any, *, graph: bool
) -> None:
    """False is not overlooked: TensorRT would leave zeros in the outputs."""
    with TensorRtEngine(on_doubles.plan, on_doubles.key, graph=graph) as engine:
        doubles.tensorrt.TROUBLE.add("enqueue")
        try:
            with pytest.raises(EngineError, match=r"running model\.plan: ERROR: IExecutionContext::enqueueV3"):
                engine.run(pixels(1))
        finally:
            doubles.tensorrt.TROUBLE.clear()
        np.testing.assert_array_equal(engine.run(pixels(1))["logits"], [[4, -4]])
    assert +doubles.cuda.LIVING == {}


def test_a_fault_of_cuda_ends_with_its_own_error(
    on_doubles: BuiltPlan, doubles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an illegal access nothing works; closing does not hide why."""
    engine = TensorRtEngine(on_doubles.plan, on_doubles.key)
    engine.__enter__()
    monkeypatch.setattr(doubles.cuda, "TROUBLE", {"fault"})
    with pytest.raises(EngineError, match=r"illegal memory access.*Start a new process"):
        engine.run(pixels(1))
    engine.__exit__(None, None, None)
    assert doubles.cuda.stack() == []


def test_everything_is_given_back_in_order(on_doubles: BuiltPlan, doubles: Any) -> None:
    """Execution context, engine, runtime, buffers, events, stream, the GPU's context."""
    engine = TensorRtEngine(on_doubles.plan, on_doubles.key, graph=True)
    with engine:
        engine.run(pixels(1))
        doubles.cuda.FREED.clear()
    order = list(dict.fromkeys(doubles.cuda.FREED))
    assert order == ["execution", "engine", "runtime", "device memory", "host memory", "event", "stream", "context"]
    assert +doubles.cuda.LIVING == {}
    assert doubles.graphs.LIVING == []


def test_a_graph_is_captured_once_for_each_change_of_shape(on_doubles: BuiltPlan, doubles: Any) -> None:
    """A graph is good only for the shapes that its context had; the same shapes again need no new one."""
    with TensorRtEngine(on_doubles.plan, on_doubles.key, graph=True) as engine:
        captures = []
        for batch in (1, 1, 2, 1):
            engine.run(pixels(batch))
            captures.append(len(doubles.graphs.CAPTURES))
    assert captures == [1, 1, 2, 3]


def test_the_same_feed_is_uploaded_once_for_many_timings(
    on_doubles: BuiltPlan, doubles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two measurements of compute there is nothing else to do; a run in between takes its buffers."""
    with TensorRtEngine(on_doubles.plan, on_doubles.key) as engine:
        uploads: list[int] = []
        real = doubles.cuda.memcpy_htod_async

        def count(target: int, source: np.ndarray, stream: object) -> None:
            uploads.append(source.nbytes)
            real(target, source, stream)

        monkeypatch.setattr(doubles.cuda, "memcpy_htod_async", count)
        feed = pixels(1)
        for _ in range(3):
            engine.time(feed, transfers=False, graph=False)
        assert uploads == [16]
        engine.run(pixels(2))
        engine.time(feed, transfers=False, graph=False)
        assert uploads == [16, 32, 16]
