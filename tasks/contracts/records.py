"""What the steps hand to one another and what is stored: small, frozen, JSON. Tensors and files go by reference.

Accuracies, drops and agreements are in percent and percentage points.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from tasks.contracts.announcement import News
from tasks.contracts.spec import PreprocessSpec

SplitName = Literal["train", "calibration", "selection", "gate"]
SPLITS: tuple[SplitName, ...] = ("train", "calibration", "selection", "gate")
Precision = Literal["int8", "float16", "float32"]
LayerPrecision = Literal[Precision, "unknown"]  # a kernel's; another type, or one that cannot be told, is unknown


class Record(BaseModel):
    """Frozen data with a lossless JSON form. NaN survives it, so that a gate can see it."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class ArtifactRef(Record):
    """A stored file, named by its content."""

    key: str
    sha256: str
    size_bytes: int


class Offender(Record):
    """An image, or a class of a split, that breaks a rule."""

    path: str  # below its source; `gate:` in front says the gate's own one
    found: str


class Finding(Record):
    """What came of one rule of the data contract."""

    rule: str
    says: str
    severity: Literal["critical", "warning"]
    passed: bool
    observed: str
    limit: str
    num_offenders: int
    offenders: tuple[Offender, ...]  # the first of them
    remedy: str


class DataCheck(Record):
    """What the data contract found, and the manifest that it was found in."""

    source: str
    num_images: int
    digest: str  # of names, labels and files
    reference: str | None  # the accepted run whose data this one was compared with
    findings: tuple[Finding, ...]
    manifest: ArtifactRef  # Parquet, a row per image

    @property
    def breaches(self) -> tuple[Finding, ...]:
        """Critical rules that are broken."""
        return tuple(finding for finding in self.findings if not finding.passed and finding.severity == "critical")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if not finding.passed and finding.severity == "warning")


class DataRecord(Record):
    """Images decoded once, and who belongs to which split."""

    source: str
    class_names: tuple[str, ...]
    counts: dict[SplitName, int]
    duplicates_dropped: int
    preprocess: PreprocessSpec
    height: int
    width: int
    channels: int
    digest: str  # of pixels, labels, classes, splits and preprocessing, wherever the files lie
    members: ArtifactRef  # Parquet: row, path, label, split, pixels (digest)


class Choice(Record):
    """The calibration images, and what the float model sees in them."""

    method: Literal["stratified", "coverage"]
    num_candidates: int
    radius: float  # mean distance of a candidate to the nearest chosen one, over that to the mean of all
    findings: tuple[Finding, ...]  # of the data contract, through the float model
    digest: str
    images: ArtifactRef  # Parquet: path, label, pixels (digest)


class ModelRecord(Record):
    """A float model that loads: its weights as safetensors."""

    architecture: str
    arguments: dict[str, bool | int | float | str]
    num_classes: int
    num_parameters: int
    weights: ArtifactRef


class Accuracy(Record):
    """Of one model on one split. Intervals are 95 % (Wilson)."""

    num_images: int
    top1: float
    top1_interval: tuple[float, float]
    top5: float
    top5_interval: tuple[float, float]
    recall: tuple[float | None, ...]  # per class; None for a class without images
    confusion: tuple[tuple[int, ...], ...] | None  # rows are labels; None above 100 classes
    predictions: ArtifactRef  # npz: labels [N], top [N, 5]


class Comparison(Record):
    """Engine against float model on the same images. The interval is 95 % and paired."""

    top1_drop: float
    top1_drop_interval: tuple[float, float]
    top5_drop: float
    class_drop: float  # the worst class
    worst_class: str
    agreement: float
    only_float_right: int
    only_engine_right: int
    p_value: float  # McNemar, exact


class Epoch(Record):
    """One epoch of training."""

    epoch: int
    loss: float
    selection_loss: float
    selection_top1: float
    learning_rate: float
    seconds: float


class QuantizedRecord(Record):
    """Weights and quantization parameters of the simulated INT8 model, as safetensors."""

    state: ArtifactRef
    method: Literal["ptq", "qat"]
    scheme: str
    num_quantized: int
    kept_float: tuple[str, ...]
    fold_error: float  # largest difference of any logit by folding batch norm, over the logits' spread
    selection_top1: float  # of the simulation
    epochs: tuple[Epoch, ...]


class Draws(Record):
    """What the choice of calibration images does: top-1 of simulations on the selection split, calibrated only."""

    chosen_top1: float
    top1: tuple[float, ...]  # of other draws
    num_images: int


class LayerError(Record):
    """How far one layer's runtime output is from the simulation's, both fed the simulation's input."""

    layer: str
    op_type: str
    max_steps: float  # largest difference, in quantization steps of its output
    sqnr_db: float  # signal over quantization noise, INT8 against float, each on its own input


class LayerCost(Record):
    """Parameters and multiply-accumulates of one layer for one image."""

    layer: str
    op_type: str
    parameters: int
    macs: int
    precision: Precision


class Compression(Record):
    """What INT8 saves."""

    float_bytes: int
    int8_bytes: int
    ratio: float
    parameters: int
    bits_per_weight: float
    macs: int
    int8_macs: int
    layers: tuple[LayerCost, ...]


class Parity(Record):
    """Simulation against runtime on the same images."""

    num_images: int
    agreement: float
    simulation_top1: float
    runtime_top1: float
    layers: tuple[LayerError, ...]


class ExportRecord(Record):
    """The float and the INT8 graph, linted."""

    float_onnx: ArtifactRef
    half_onnx: ArtifactRef | None = None  # the float graph in float16, for TensorRT alone
    int8_onnx: ArtifactRef  # what is not INT8 is float32, or float16 where the target asks for that
    opset: int
    warnings: tuple[str, ...] = ()  # of the lint; what is worse is refused
    half_notes: tuple[str, ...] = ()  # what float16 did not simply round, in the engine's graph
    compression: Compression


class EngineLayer(Record):
    """One layer that the compiler made, often of several layers of the graph."""

    name: str
    kind: str  # in the compiler's words
    role: Literal["compute", "reformat", "quantize"]  # quantize: a Q or DQ that was not fused into its neighbour
    precision: LayerPrecision  # that it computes in
    reads: str  # data types of its inputs
    writes: str
    tactic: str
    layers: tuple[str, ...]  # of the graph, whose products are formed here
    macs: int  # theirs, for one image


class PrecisionAudit(Record):
    """Which precision each layer of the compiled engine really runs in."""

    layers: tuple[EngineLayer, ...]
    macs: dict[LayerPrecision, int]  # for one image; all layers of the graph
    unplaced: tuple[str, ...]  # layers of the graph that no layer of the engine names, or that several contradict

    def percent(self, precision: LayerPrecision) -> float | None:
        """Share of the multiply-accumulates; None where there are none."""
        total = sum(self.macs.values())
        return 100 * self.macs.get(precision, 0) / total if total else None


class Tensor(Record):
    """An input or an output of an engine; None is a dimension of any size, such as that of the batch."""

    name: str
    dtype: str  # as NumPy names it
    shape: tuple[int | None, ...]


class Machine(Record):
    """The GPU and the software that a TensorRT plan is compiled on."""

    gpu: str
    compute_capability: str  # such as 9.0
    driver: str  # of the GPU; a plan is not bound to it
    cuda_driver: str  # newest CUDA that the driver takes
    cuda_runtime: str  # CUDA that TensorRT's package was made for, as far as it says
    tensorrt: str
    platform: str  # operating system and processor


class PlanKey(Record):
    """What a plan was built from and for, compared with the machine before the plan is loaded: it is native code."""

    machine: Machine
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"]
    version_compatible: bool
    profile: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]  # smallest, tuned, largest shape
    onnx_sha256: str
    plan_sha256: str


class EngineRecord(Record):
    """What is released: the file that the runtime loads, and how it was told to load it."""

    runtime: str
    version: str
    engine: ArtifactRef
    options: dict[str, str]
    hardware: str
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    plan: PlanKey | None = None  # of TensorRT's engine, which runs on machines like this alone
    device_memory_bytes: int | None = None  # activations and scratch of one context, where the runtime tells
    audit: PrecisionAudit | None = None  # where the runtime tells what it compiled


class Latency(Record):
    """Float and INT8 in turns, one batch size. Where float was built in two types, the faster one is the baseline."""

    batch_size: int
    rounds: int
    baseline: Literal["float32", "float16"]  # what `float` means here
    float_ms: dict[str, float]  # median, p95, p99
    int8_ms: dict[str, float]
    float_images_per_second: float
    int8_images_per_second: float
    speedup: float  # ratio of medians
    speedup_quartiles: tuple[float, float]  # of the ratios of neighbours in time


class Memory(Record):
    """Peak resident memory of a fresh process that loads one model and runs it; on a GPU, what it holds there."""

    float_mib: float
    int8_mib: float


class Verdict(Record):
    """One gate."""

    gate: str
    metric: str
    unit: str
    limit: float
    measured: float | None
    passed: bool


class Decision(Record):
    """All gates at once."""

    verdicts: tuple[Verdict, ...]
    passed: bool


class EngineScore(Record):
    """The engine on the gate images."""

    accuracy: Accuracy
    comparison: Comparison


class ChampionScore(Record):
    """The champion on the same gate images. The comparison is of the challenger with it: a drop is a loss to it."""

    release: int
    accuracy: Accuracy
    comparison: Comparison
    bytes: int


class Spread(Record):
    """What many measurements came to. A percentile is trtexec's: one of the values, none in between."""

    mean: float
    median: float
    p90: float
    p95: float
    p99: float
    min: float
    max: float
    variation: float  # standard deviation over mean, in percent


class GpuTiming(Record):
    """One engine, one batch size, one way to run it. Spreads are in milliseconds."""

    precision: Precision
    batch_size: int
    transfers: bool  # input and output cross the bus
    graph: bool  # launched as one CUDA graph
    num_iterations: int
    latency: Spread  # all that follows but enqueue, of one inference
    h2d: Spread
    compute: Spread
    d2h: Spread
    enqueue: Spread  # the host's time to launch it
    images_per_second: float  # by the host's clock, one inference after the other
    notes: tuple[str, ...]


class GpuEnergy(Record):
    """One engine alone on the GPU, one inference after the other. Energy is of the whole board, idle power included."""

    precision: Precision
    batch_size: int
    num_inferences: int
    seconds: float
    joules_per_image: float
    watts: float
    source: Literal["energy counter", "power samples"]


class GpuState(Record):
    """The GPU at one moment; None is what the driver does not tell."""

    name: str
    driver: str
    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    temperature_c: int | None
    power_w: float | None
    memory_used_mib: float | None
    persistence: bool | None
    slowdowns: tuple[str, ...] | None  # why the clocks are lower than they could be
    processes: tuple[int, ...] | None  # that compute on it, this one included


class GpuSpeed(Record):
    """Engines in turns on a GPU, with all that the numbers depend on."""

    timings: tuple[GpuTiming, ...]
    energies: tuple[GpuEnergy, ...]
    memory_mib: dict[Precision, float]  # device memory that an open engine takes; empty where it was not asked for
    before: GpuState | None
    after: GpuState | None
    notes: tuple[str, ...]


class EngineSpeed(Record):
    """The engine on the clock, beside the float model in the same runtime."""

    latencies: tuple[Latency, ...]
    memory: Memory
    gpu: GpuSpeed | None = None


class Built(Record):
    """The engine, and what it is worth where it runs."""

    engine: EngineRecord
    score: EngineScore
    champion: ChampionScore | None
    speed: EngineSpeed


class Inputs(Record):
    """All that decides a run, as digests that are known before anything is loaded."""

    data: str  # names, sizes and times of files; ETags in S3
    weights: str
    code: str  # of the steps, and of the architecture
    runtime: str  # versions of libraries, device and hardware
    spec: str


class Settled(Record):
    """The last run of a model that passed its gates: what decided it, and the champion that it left."""

    run: str
    inputs: Inputs
    champion: int
    news: News | None = None  # the retraining that it took in, which the model's spec does not know of
    replaced: str = ""  # digest of the spec's own data and weights at that time
