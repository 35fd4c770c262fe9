"""What to produce: one frozen model that is the YAML file, the flow's parameter and the command line at once.

Everything here changes the result, so every section that a step depends on is part of that step's key.
Accuracy limits and drops are in percentage points.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tasks.contracts.errors import SpecError

SchemeName = Literal["onnxruntime", "tensorrt"]
Runtime = Literal["onnxruntime", "onnxruntime-cuda", "onnxruntime-tensorrt", "tensorrt"]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Side = Annotated[int, Field(ge=1, le=8192)]
ModelName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=80)]


class Section(BaseModel):
    """A part of the spec: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


S = TypeVar("S", bound=Section)


class ModelSpec(Section):
    """The float classifier."""

    architecture: str = Field(
        "torchvision:mobilenet_v3_small",
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description="torchvision:NAME, or module:factory for your own; the factory takes num_classes.",
    )
    weights: str | None = Field(
        None,
        description="A .safetensors or .pth file, also s3://…, or a torchvision weights name such as DEFAULT.",
    )
    num_classes: Count | None = Field(None, description="Outputs of the model; taken from the data when not given.")
    class_names: tuple[str, ...] | None = Field(
        None, description="The model's classes in the order of its outputs; the data's own, sorted, when not given."
    )
    arguments: dict[str, bool | int | float | str] = Field(
        default_factory=dict, description="Further keyword arguments of the factory."
    )

    @model_validator(mode="after")
    def _classes_agree(self) -> Self:
        names = self.class_names
        if names is not None and (len(set(names)) < len(names) or self.num_classes not in (None, len(names))):
            raise ValueError(f"class_names has {len(set(names))} different names for {self.num_classes} outputs")
        return self


class PreprocessSpec(Section):
    """From a decoded image to the model's input: resize, centre crop, scale to 0..1, normalise."""

    resize: Side | tuple[Side, Side] | None = Field(
        None, description="Short side in pixels, or height and width; nothing keeps the size."
    )
    crop: Side | tuple[Side, Side] | None = Field(None, description="Centre crop: side, or height and width.")
    interpolation: Literal["nearest", "bilinear", "bicubic"] = Field("bilinear", description="How images are resized.")
    mean: tuple[float, ...] = Field((0.485, 0.456, 0.406), description="Per channel, of values in 0..1.")
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field((0.229, 0.224, 0.225), description="Per channel.")

    @model_validator(mode="after")
    def _channels_agree(self) -> Self:
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise ValueError(
                f"mean has {len(self.mean)} and std has {len(self.std)} values; both need 3 (colour) or 1 (grey)"
            )
        return self


class Limit(Section):
    """The range that a number must keep, how many images must keep it, and what a breach means."""

    low: float | None = Field(None, description="Smallest that is allowed.")
    high: float | None = Field(None, description="Largest that is allowed.")
    share: float = Field(1.0, ge=0, le=1, description="Share of images that must keep it.")
    severity: Literal["critical", "warning", "off"] = Field(
        "warning", description="Critical fails the run; a warning is shown."
    )

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.low is None and self.high is None:
            raise ValueError("a limit needs low or high; severity: off switches it off")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low {self.low:g} is above high {self.high:g}")
        return self


class ChecksSpec(Section):
    """The data contract. That every image decodes, and has one label that the model knows, is always asked.

    Of a limit only what differs from the default needs to be given, such as `sharpness: {low: 5}`.
    """

    correlation: Limit = Field(
        Limit(low=0.2, severity="critical"), description="Of neighbouring pixels: 0 in noise, near 1 in photographs."
    )
    contrast: Limit = Field(Limit(low=1.0, severity="critical"), description="Largest channel deviation, in 0..255.")
    short_side: Limit = Field(Limit(low=8), description="In pixels, as stored.")
    aspect: Limit = Field(Limit(low=0.35, share=0.98), description="Short side over long side.")
    plain_mode: Limit = Field(Limit(low=1, share=0.98), description="1 if stored as colour or grey, else 0.")
    num_frames: Limit = Field(Limit(high=1), description="Pictures in the file; only the first is used.")
    upright: Limit = Field(Limit(low=1, share=0.9), description="1 if stored as seen, 0 if EXIF turns it.")
    unique: Limit = Field(Limit(low=1, share=0.99), description="0 for a copy of another image, by pixels.")
    distinct: Limit = Field(Limit(low=1, share=0.98), description="0 for an image that looks like another.")
    brightness: Limit = Field(Limit(low=0.08, high=0.95, share=0.98), description="Mean luma, in 0..1.")
    entropy: Limit = Field(Limit(low=1.5, share=0.99), description="Of the grey levels, in bits.")
    sharpness: Limit = Field(Limit(low=12, share=0.95), description="Deviation of the edges, in 0..255.")

    num_calibration: Limit = Field(Limit(low=128, severity="critical"), description="Calibration images.")
    missing_classes: Limit = Field(
        Limit(high=0, severity="critical"), description="Classes without an image, over all splits that are used."
    )
    imbalance: Limit = Field(Limit(high=10), description="Largest class over smallest, in calibration.")
    shared: Limit = Field(Limit(high=0, severity="critical"), description="Images in two splits, by pixels.")
    alike: Limit = Field(Limit(high=0), description="Images that look like one of another split.")
    offset: Limit = Field(Limit(high=1.0, severity="critical"), description="Largest normalised channel mean.")
    spread: Limit = Field(
        Limit(low=0.4, high=2.0, severity="critical"), description="Normalised channel deviation farthest from 1."
    )
    drift_psi: Limit = Field(
        Limit(high=0.25), description="Worst population stability index of calibration properties against the gate."
    )
    drift_ks: Limit = Field(Limit(high=0.2), description="The same by Kolmogorov and Smirnov's distance.")
    past_psi: Limit = Field(Limit(high=0.25), description="drift_psi against the data of the last accepted run.")
    past_ks: Limit = Field(Limit(high=0.2), description="drift_ks against the data of the last accepted run.")
    feature_ks: Limit = Field(Limit(high=0.2), description="drift_ks of the float model's features.")
    answer_psi: Limit = Field(Limit(high=0.25), description="drift_psi of how often each class is the model's answer.")

    @model_validator(mode="before")
    @classmethod
    def _over_defaults(cls, values: Any) -> Any:
        """What is not said of a limit stays as it is by default."""
        if not isinstance(values, dict):
            return values
        return {
            name: {**cls.model_fields[name].default.model_dump(), **given}
            if name in cls.model_fields and isinstance(given, dict)
            else given
            for name, given in values.items()
        }


class DataSpec(Section):
    """Where the images come from, and how they are split.

    Train, calibration, selection and gate never share an image, compared by decoded pixels.
    """

    source: str = Field(
        "digits",
        description="Folder with one sub-folder per class, a .csv or .parquet manifest (columns path, label), "
        "torchvision:<dataset>, or digits (bundled). Folders and manifests may lie in S3: s3://bucket/prefix.",
    )
    root: str | None = Field(
        None,
        description="What a manifest's paths start from (default: its own folder); where torchvision keeps data.",
    )
    gate_source: str | None = Field(
        None, description="A source of its own for the gate split; otherwise the gate is taken from the source."
    )
    calibration: Count = Field(512, description="Images that ranges are measured on.")
    choice: Literal["stratified", "coverage"] = Field(
        "stratified",
        description="Calibration images: a fair draw of each class, or those that cover the float model's features.",
    )
    draws: int = Field(
        0, ge=0, le=20, description="Other draws to calibrate on, to show what the choice does to accuracy."
    )
    selection: Count | Share = Field(0.15, description="Images for choices during quantization: a number or a share.")
    gate: Count | Share = Field(0.25, description="Images that judge the result once: a number or a share.")
    checks: ChecksSpec = ChecksSpec()
    preprocess: PreprocessSpec | None = Field(
        None, description="For torchvision models their own recipe when not given; needed for a module of your own."
    )


class QatSpec(Section):
    """Quantization-aware training: learned scales, taught by the float model."""

    epochs: Count = Field(4, description="Passes over the train split.")
    batch_size: Count = Field(64, description="Images per step.")
    learning_rate: float = Field(5e-5, gt=0, description="Peak of the cosine schedule, for weights.")
    scale_learning_rate: float = Field(2e-3, gt=0, description="The same for scales, relative to each scale.")
    weight_decay: float = Field(0.0, ge=0, description="Of the weights, by AdamW.")
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of all steps over which the rates rise.")
    distillation: float = Field(1.0, ge=0, le=1, description="Weight of the float model's answers against the labels.")
    temperature: float = Field(2.0, gt=0, description="Softens both answers in distillation.")
    ema_decay: float = Field(0.99, ge=0, lt=1, description="Of the moving average of the weights; 0 turns it off.")
    patience: Count = Field(3, description="Epochs without a better selection score before training stops.")
    gradient_clip: float = Field(1.0, gt=0, description="Largest global norm of the gradient.")
    drop: float = Field(
        0.5, ge=0, lt=1, description="Share of the activations that a step leaves exact, others each time."
    )
    mirror: bool = Field(True, description="Train on mirrored images too; not for text or digits.")
    views: Count = Field(4, description="Ways to look at each image; the float model answers each once, beforehand.")
    shift: int = Field(
        4, ge=0, le=256, description="Train on images moved by up to so many pixels; their edges repeat."
    )


class QuantSpec(Section):
    """How the model becomes INT8."""

    method: Literal["ptq", "qat"] = Field("ptq", description="Calibrate only, or train with quantization simulated.")
    ranges: Literal["minmax", "percentile", "mse"] = Field("mse", description="How activation ranges are chosen.")
    percentile: float = Field(99.99, gt=50, le=100, description="Share of values kept by ranges: percentile.")
    search: bool = Field(True, description="Search the ranges of the few tensors that cost most, by the logits' error.")
    bias_correction: bool = Field(True, description="Move each layer's bias by the mean error that rounding adds.")
    keep_float: tuple[str, ...] = Field((), description="Globs of layer names that stay float, such as features.0.*.")
    float_budget: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Share of multiply-accumulates that may stay float besides, in layers that cost most accuracy.",
    )
    qat: QatSpec = QatSpec()


class TensorRtSpec(Section):
    """How TensorRT builds its engine; read by the runtimes tensorrt and onnxruntime-tensorrt alone."""

    batch: tuple[Count, Count, Count] = Field(
        (1, 8, 64), description="Smallest, tuned and largest batch of the optimization profile."
    )
    remainder: Literal["float16", "float32"] = Field(
        "float16", description="Type of all that is not INT8. A strongly typed engine computes in no other."
    )
    optimization_level: int = Field(3, ge=0, le=5, description="How long TensorRT looks for fast kernels.")
    workspace_mib: Count | None = Field(None, description="Scratch memory of kernels; all of the GPU's if not given.")
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = Field(
        "none", description="Other GPUs that the plan must run on; costs speed."
    )
    version_compatible: bool = Field(False, description="The plan also runs on newer TensorRT; may cost speed.")

    @model_validator(mode="after")
    def _batch_rises(self) -> Self:
        if not self.batch[0] <= self.batch[1] <= self.batch[2]:
            raise ValueError(f"batch is {list(self.batch)}; smallest, tuned and largest must not fall")
        return self


class TargetSpec(Section):
    """What the engine is built for."""

    runtime: Runtime = Field(
        "onnxruntime", description="The runtime that the engine is built for; all but onnxruntime need a GPU."
    )
    scheme: SchemeName | None = Field(None, description="Quantization scheme; the runtime's own when not given.")
    threads: Count = Field(1, description="Threads of the runtime, inside one inference on the CPU.")
    tensorrt: TensorRtSpec = TensorRtSpec()

    @property
    def scheme_name(self) -> SchemeName:
        return self.scheme or ("onnxruntime" if self.runtime == "onnxruntime" else "tensorrt")

    @property
    def needs_gpu(self) -> bool:
        return self.runtime != "onnxruntime"

    @model_validator(mode="after")
    def _scheme_suits_runtime(self) -> Self:
        if "tensorrt" in self.runtime and self.scheme_name != "tensorrt":
            raise ValueError(f"{self.runtime} takes scheme tensorrt alone: TensorRT is symmetric")
        return self


class EvaluationSpec(Section):
    """How scores are measured."""

    batch_size: Count = Field(64, description="Images per inference while accuracy is scored.")
    latency_batch_sizes: tuple[Count, ...] = Field((1, 8, 32), min_length=1, description="The first one is gated.")
    latency_rounds: Annotated[int, Field(ge=10)] = Field(
        50, description="Timed inferences per model and batch size; float and INT8 take turns."
    )


class GatesSpec(Section):
    """Limits that a release must keep. Null switches a gate off; whatever is on must have been measured."""

    max_top1_drop: float | None = Field(1.0, description="Float minus engine top-1, in points.")
    max_top5_drop: float | None = Field(1.0, description="Float minus engine top-5, in points.")
    max_champion_drop: float | None = Field(
        1.0, description="Champion minus engine top-1 on the same images, in points; judged if they can be compared."
    )
    max_class_drop: float | None = Field(None, description="The worst class's loss of recall, in points.")
    min_agreement: float | None = Field(95.0, ge=0, le=100, description="Same answer as the float model, in percent.")
    min_parity: float | None = Field(97.0, ge=0, le=100, description="Same answer as the simulation, in percent.")
    min_compression: float | None = Field(3.0, gt=0, description="Float file size over INT8 file size.")
    min_speedup: float | None = Field(1.0, gt=0, description="Float latency over INT8 latency, medians.")
    max_latency_ms: float | None = Field(None, gt=0, description="Median of one inference, in milliseconds.")
    max_memory_mib: float | None = Field(None, gt=0, description="Peak memory of a process that runs the engine.")
    min_int8_macs: float | None = Field(
        None, ge=0, le=100, description="Multiply-accumulates that the compiled engine runs in INT8, in percent."
    )


class RunSpec(Section):
    """One run: the float model that comes in, the INT8 engine that goes out, and what it must keep."""

    name: ModelName = Field(..., description="Name under which releases appear.")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Of every draw: splits, calibration, training.")
    model: ModelSpec = ModelSpec()
    data: DataSpec = DataSpec()
    quant: QuantSpec = QuantSpec()
    target: TargetSpec = TargetSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    gates: GatesSpec = GatesSpec()

    @model_validator(mode="after")
    def _batches_fit_profile(self) -> Self:
        low, _, high = self.target.tensorrt.batch
        sizes = (*self.evaluation.latency_batch_sizes, self.evaluation.batch_size)
        outside = [size for size in sizes if not low <= size <= high]
        if "tensorrt" in self.target.runtime and outside:
            raise ValueError(f"evaluation uses batches of {outside}, and target.tensorrt.batch allows {low} to {high}")
        return self


def spec_from(values: Any, *, origin: str) -> RunSpec:
    """A checked spec; see `checked`."""
    return checked(RunSpec, values, origin=origin)


def checked(kind: type[S], values: Any, *, origin: str, remedy: str = "Mend these keys.") -> S:
    """Check `values` and say every mistake at once, each with the path of its key.

    Raises:
        SpecError: if a key is unknown or a value does not fit.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        mistakes = [_mistake(detail, kind) for detail in error.errors()]
        raise SpecError(f"{origin}: " + "; ".join(mistakes) + ".", remedy=remedy) from error


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice: YAML's readers keep the last, and a gate would be gone."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set[str]()
        for key, _ in node.value:
            if key.value in keys:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            keys.add(key.value)
        return super().construct_mapping(node, deep)


def read_spec(path: Path, *, remedy: str = "Start with `name:`.") -> dict[str, Any]:
    """The mapping in a YAML file, not yet checked.

    Raises:
        SpecError: if the file is missing, is not YAML, or holds no mapping.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 it is a SafeLoader
    except OSError as error:
        raise SpecError(f"{path}: {error.strerror}.", remedy="Name a spec file that can be read.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} is not YAML: {error}.", remedy="Mend the file.") from error
    if not isinstance(values, dict):
        raise SpecError(f"{path} holds {type(values).__name__}, not a mapping.", remedy=remedy)
    return values


def _mistake(detail: Any, kind: type[Section]) -> str:
    key = ".".join(str(part) for part in detail["loc"]) or ("spec" if kind is RunSpec else kind.__name__.lower())
    if detail["type"] == "extra_forbidden":
        return f"{key} is not a key ({_neighbours(detail['loc'], kind)})"
    if detail["type"] == "missing":
        return f"{key} is missing"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{key}: {message[:1].lower()}{message[1:]} (found {detail['input']!r})"


def _neighbours(location: tuple[int | str, ...], section: type[BaseModel]) -> str:
    """The keys that exist beside a misspelt one."""
    for part in location[:-1]:
        if isinstance(part, int):
            continue  # an item of a list, whose type was looked at with the list
        annotation = section.model_fields[part].annotation
        below = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
        sections = [kind for kind in below if issubclass(kind, BaseModel)]
        if not sections:
            return "no key of that name exists there"
        (section,) = sections
    return "known: " + ", ".join(section.model_fields)
