"""ONNX to plan: the part that talks to TensorRT, inside the process of `tensorrt_build`.

One code path for 10.x and 11.x: strongly typed networks, whose types are those of the graph, and explicit Q/DQ.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, SupportsInt, cast

import tensorrt as trt

from tasks.contracts.errors import EngineError
from tasks.contracts.records import PlanKey
from tasks.contracts.spec import TensorRtSpec
from tasks.engines.child import Progress
from tasks.engines.cuda import check_free_memory, cuda_errors, on_gpu
from tasks.engines.faults import remedy_for
from tasks.engines.tensorrt_api import LOG, failed, make_builder, make_runtime, sizes, tensorrt_errors, this_machine
from tasks.engines.tensorrt_build import BuiltPlan, Request

if TYPE_CHECKING:
    from typing_extensions import Buffer

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # smallest, tuned, largest
TIMINGS_PER_KERNEL = 8  # their mean chooses; TensorRT's own tool takes 8 too, its library 1
COMPATIBILITY = {
    "none": trt.HardwareCompatibilityLevel.NONE,
    "ampere_plus": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
    "same_compute_capability": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
}


def build(request: Request, folder: Path, progress: Progress) -> BuiltPlan:
    """Leave plan, timing cache and the inspector's JSON in `folder`.

    Raises:
        EngineError: with TensorRT's own reason.
    """
    started, mark = time.monotonic(), LOG.mark()
    task = f"building {request.onnx.name}"
    with cuda_errors(task), on_gpu(request.gpu), tensorrt_errors(task):
        check_free_memory(request.gpu, request.free_mib)
        plan, profile = compile_plan(request, folder, progress)
        device_memory = inspect(plan, profile, request, folder)
    (folder / "model.plan").write_bytes(plan)
    return BuiltPlan(
        plan=folder / "model.plan",
        key=PlanKey(
            machine=this_machine(request.gpu),
            hardware_compatibility=request.spec.hardware_compatibility,
            version_compatible=request.spec.version_compatible,
            profile=profile,
            onnx_sha256=hashlib.sha256(request.onnx.read_bytes()).hexdigest(),
            plan_sha256=hashlib.sha256(plan).hexdigest(),
        ),
        timing_cache=folder / "timing.cache",
        layers=folder / "layers.json",
        plan_bytes=len(plan),
        device_memory_bytes=device_memory,
        seconds=time.monotonic() - started,
        warnings=LOG.since(mark),
    )


def compile_plan(request: Request, folder: Path, progress: Progress) -> tuple[bytes, dict[str, Shapes]]:
    """The plan and its profile. A function of its own, so that TensorRT's objects go while the GPU is current."""
    name = request.onnx.name
    builder = make_builder()
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, LOG)  # owns the weights, so it is kept until the plan is there
    if not parser.parse_from_file(str(request.onnx)):
        raise parse_error(name, parser)
    config = builder.create_builder_config()
    configure(config, request.spec, tf32=request.tf32)
    profile = add_profile(builder, network, config, request.spec, name)
    use_timing_cache(config, (folder / "timing.cache").read_bytes())
    monitor = Monitor(progress)  # kept here, as TensorRT does not
    config.progress_monitor = monitor
    mark = LOG.mark()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise failed(f"building {name}", mark)
    cache = config.get_timing_cache()
    if cache is not None:
        (folder / "timing.cache").write_bytes(as_bytes(cache.serialize()))
    return as_bytes(plan), profile


def parse_error(name: str, parser: trt.OnnxParser) -> EngineError:
    """All that the parser found, each with its node."""
    found = [parser.get_error(index) for index in range(parser.num_errors)]
    listed = "; ".join(
        f"node {error.node_name() or error.node()} ({error.node_operator() or 'no operator'}): {error.desc()}"
        for error in found
    )
    return EngineError(
        f"TensorRT cannot take {name}: {listed or 'its parser gave no reason'}.",
        remedy=remedy_for(listed, "Name the layer in quant.keep_float, or export the model with other operators."),
    )


def configure(config: trt.IBuilderConfig, spec: TensorRtSpec, *, tf32: bool) -> None:
    config.builder_optimization_level = spec.optimization_level
    config.avg_timing_iterations = TIMINGS_PER_KERNEL
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the inspector knows names alone
    config.hardware_compatibility_level = COMPATIBILITY[spec.hardware_compatibility]
    if spec.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, spec.workspace_mib * 2**20)
    if spec.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if not tf32:
        config.clear_flag(trt.BuilderFlag.TF32)


def add_profile(
    builder: trt.Builder, network: trt.INetworkDefinition, config: trt.IBuilderConfig, spec: TensorRtSpec, name: str
) -> dict[str, Shapes]:
    """The shapes of each input that the plan is built for. Only a network with a dynamic batch takes a profile.

    Raises:
        EngineError: if more than the batch is dynamic, or TensorRT refuses the profile.
    """
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    shapes = {tensor.name: shapes_of(tensor.name, sizes(tensor.shape), spec) for tensor in inputs}
    if not any(-1 in sizes(tensor.shape) for tensor in inputs):
        return shapes
    profile, mark = builder.create_optimization_profile(), LOG.mark()
    for tensor_name, (low, tuned, high) in shapes.items():
        profile.set_shape(tensor_name, trt.Dims(low), trt.Dims(tuned), trt.Dims(high))
    if not profile or config.add_optimization_profile(profile) < 0:
        raise failed(f"taking batches of {list(spec.batch)} for {name}", mark, "Mend target.tensorrt.batch.")
    return shapes


def shapes_of(name: str, shape: tuple[int, ...], spec: TensorRtSpec) -> Shapes:
    """A dynamic batch by the spec, anything else as it is."""
    if -1 in shape[1:]:
        raise EngineError(f"Input {name!r} is {list(shape)}; only the batch may be dynamic, which is -1 here.")
    low, tuned, high = ((batch if shape[0] == -1 else shape[0], *shape[1:]) for batch in spec.batch)
    return low, tuned, high


def use_timing_cache(config: trt.IBuilderConfig, earlier: bytes) -> None:
    """Kernel times of an earlier build, if they fit; TensorRT says in the log why they do not."""
    cache = config.create_timing_cache(earlier)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        LOG.log(trt.ILogger.Severity.WARNING, "The timing cache does not fit this machine; an empty one is taken")
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def inspect(plan: bytes, profile: dict[str, Shapes], request: Request, folder: Path) -> int:
    """Load the plan once, to prove that it can be; keep what the inspector says; give its device memory in bytes."""
    mark = LOG.mark()
    runtime = make_runtime()
    runtime.engine_host_code_allowed = request.spec.version_compatible
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise failed(f"loading the plan of {request.onnx.name} that it has just built", mark)
    context = engine.create_execution_context()
    if context is None or not all(context.set_input_shape(name, tuned) for name, (_, tuned, _) in profile.items()):
        raise failed(f"setting the shapes of {request.onnx.name} that it is tuned for", mark)
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context  # without shapes it tells no data types
    layers = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    (folder / "layers.json").write_text(layers, encoding="utf-8")
    return int(engine.device_memory_size_v2)


def as_bytes(memory: trt.IHostMemory) -> bytes:
    """It has the buffer protocol, which its type stubs do not say."""
    return bytes(cast("Buffer", memory))


class Monitor(trt.IProgressMonitor):
    """TensorRT's nested phases as one share of the whole, in thousandths, that never falls.

    Names of phases are no interface; only their nesting and steps are used. Builder threads may call at once.
    """

    def __init__(self, progress: Progress) -> None:
        trt.IProgressMonitor.__init__(self)
        self._progress, self._lock = progress, Lock()
        self._phases: dict[str, tuple[str | None, int, int]] = {}  # parent, steps, steps done
        self._shown = 0

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: SupportsInt) -> None:
        with self._lock:
            self._phases[phase_name] = (parent_phase, max(int(num_steps), 1), 0)

    def step_complete(self, phase_name: str, step: SupportsInt) -> bool:
        with self._lock:
            if phase_name in self._phases:
                parent, steps, _ = self._phases[phase_name]
                self._phases[phase_name] = (parent, steps, int(step) + 1)
            done = max(self._shown, int(1000 * self._share(None)))
            self._shown = min(done, 1000)
            self._progress(self._shown, 1000)
        return True  # anything else would cancel the build

    def phase_finish(self, phase_name: str) -> None:
        with self._lock:
            self._phases.pop(phase_name, None)

    def _share(self, parent: str | None) -> float:
        """What the phases below `parent` have done, each as a share of itself."""
        return sum(
            min((done + self._share(name)) / steps, 1.0)
            for name, (above, steps, done) in tuple(self._phases.items())
            if above == parent
        )
