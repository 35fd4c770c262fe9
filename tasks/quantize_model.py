"""Step: from the float model to a simulation of INT8, calibrated or trained."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

from tasks.choose_calibration import chosen_images
from tasks.contracts.records import Choice, DataRecord, Epoch, ModelRecord, QuantizedRecord
from tasks.contracts.settings import Settings
from tasks.contracts.spec import RunSpec
from tasks.data.images import ImageSet
from tasks.load_model import float_model
from tasks.quant.calibrate import calibrate, correct_biases, search_ranges
from tasks.quant.capture import capture, fold_batch_norm, fold_error
from tasks.quant.fake_quantize import Mode
from tasks.quant.keep_float import layers_better_float
from tasks.quant.schemes import SCHEMES, layers_kept_float
from tasks.quant.simulate import Simulation, fit_biases, predictions, simulate
from tasks.quant.train import train
from tasks.step import Progress, everything, remember, step, the_device
from tasks.stores.base import Store
from tasks.stores.steps import JSON, step_key

_SEARCH_IMAGES = 128  # judge a range in the search
_BIAS_IMAGES = 512  # held in memory at once, with every activation that is alive
_BIAS_PIXELS = 512 * 64 * 64  # and not more pixels than these, which keeps 224 x 224 under 2 GiB
_FOLD_IMAGES = 64


@step("quantize model")
def quantize_model(spec: RunSpec, data: DataRecord, model: ModelRecord, choice: Choice) -> QuantizedRecord:
    """Fold batch norm, place and calibrate INT8 for the target's scheme, and train if the spec says so."""
    device = the_device()
    inputs: dict[str, JSON] = {
        "images": data.digest,
        "calibration": choice.digest,
        "model": model.model_dump(mode="json"),
        "quant": spec.quant.model_dump(mode="json", exclude=set() if spec.quant.method == "qat" else {"qat"}),
        "scheme": spec.target.scheme_name,
        "seed": spec.seed,
        "device": device.type,
    }

    key = step_key("quantize_model", everything(__name__, inputs))
    training = Settings().scratch / "training" / key

    def compute(store: Store, work: Path) -> QuantizedRecord:
        images = chosen_images(spec, data, choice, work)
        network = float_model(model, work)
        prepared, calibration = prepare_simulation(spec, data, network), images.split("calibration")
        proof = fold_error(network, prepared.folded, inputs_of(calibration, _FOLD_IMAGES, limit=_FOLD_IMAGES))
        prepared = calibrated(prepared, calibration, spec)
        simulation = prepared.simulation
        epochs: tuple[Epoch, ...] = ()
        if spec.quant.method == "qat":
            progress = Progress("training with INT8 simulated")
            if Settings().torchrun:
                epochs = _trained_together(spec, data, model, choice, prepared, key, progress, store, work)
            else:
                training.mkdir(parents=True, exist_ok=True)
                epochs = train(
                    simulation,
                    prepared.folded,
                    images.split("train"),
                    images.split("selection"),
                    spec.quant.qat,
                    seed=spec.seed,
                    device=device,
                    folder=training,
                    progress=progress,
                )
                simulation.graph.cpu()
        fit_biases(simulation)
        state = work / "state.safetensors"
        simulation.save(state)
        return QuantizedRecord(
            state=store.put(state, kind="simulations"),
            method=spec.quant.method,
            scheme=spec.target.scheme_name,
            num_quantized=len(simulation.layers),
            kept_float=tuple(sorted(prepared.kept_float)),
            fold_error=proof,
            selection_top1=simulated_top1(simulation, images.split("selection"), spec.evaluation.batch_size),
            epochs=epochs,
        )

    record = remember("quantize_model", __name__, inputs, QuantizedRecord, compute)
    shutil.rmtree(training, ignore_errors=True)  # what a killed training would have gone on from
    return record


def _trained_together(
    spec: RunSpec,
    data: DataRecord,
    model: ModelRecord,
    choice: Choice,
    prepared: Prepared,
    name: str,
    progress: Progress,
    store: Store,
    work: Path,
) -> tuple[Epoch, ...]:
    from tasks.train_together import Request, launch  # here, as it imports this module

    state = work / "calibrated.safetensors"
    prepared.simulation.save(state)
    request = Request(
        spec=spec,
        data=data,
        model=model,
        choice=choice,
        kept_float=tuple(sorted(prepared.kept_float)),
        calibrated=store.put(state, kind="simulations"),
    )
    return launch(request, prepared.simulation, name, progress, work)


@dataclass(frozen=True)
class Prepared:
    """The float graph and its simulation, before any range is chosen."""

    folded: GraphModule
    simulation: Simulation
    kept_float: frozenset[str]


def prepare_simulation(
    spec: RunSpec, data: DataRecord, network: torch.nn.Module, kept_float: frozenset[str] | None = None
) -> Prepared:
    """Capture and fold `network`, and place fake quantizers by the target's scheme.

    Args:
        kept_float: the layers that stay float; those that the spec names when not given.
    """
    folded = capture(network, torch.zeros(2, data.channels, data.height, data.width))
    fold_batch_norm(folded)
    if kept_float is None:
        kept_float = layers_kept_float(folded, spec.quant.keep_float)
    return Prepared(folded, simulate(folded, SCHEMES[spec.target.scheme_name], kept_float), kept_float)


def calibrated(prepared: Prepared, calibration: ImageSet, spec: RunSpec) -> Prepared:
    """Ranges, layers that are better left float, range search and bias correction, as the spec says."""

    def batches() -> Iterator[Tensor]:
        return inputs_of(calibration, spec.evaluation.batch_size)

    few_NCHW = _together(calibration, _SEARCH_IMAGES)
    calibrate(prepared.simulation, batches, spec.quant, Progress("calibrating"))
    if spec.quant.float_budget:
        kept_float = layers_better_float(
            prepared.folded, prepared.simulation, few_NCHW, prepared.kept_float, spec.quant.float_budget
        )
        if kept_float != prepared.kept_float:
            simulation = simulate(prepared.folded, prepared.simulation.scheme, kept_float)
            prepared = Prepared(prepared.folded, simulation, kept_float)
            calibrate(simulation, batches, spec.quant, Progress("calibrating with layers float"))
    simulation = prepared.simulation
    if spec.quant.search:
        search_ranges(simulation, few_NCHW, Progress("searching ranges"))
    if spec.quant.bias_correction:
        pixels = calibration.pixels_NHWC[0, ..., 0].size
        correct_biases(simulation, _together(calibration, min(_BIAS_IMAGES, max(1, _BIAS_PIXELS // pixels))))
    return prepared


def inputs_of(images: ImageSet, batch_size: int, *, limit: int | None = None) -> Iterator[Tensor]:
    """Model inputs as tensors, without labels."""
    return (torch.from_numpy(batch_NCHW) for batch_NCHW, _ in images.batches(batch_size, limit=limit))


def _together(images: ImageSet, count: int) -> Tensor:
    return torch.cat(list(inputs_of(images, count, limit=count)))


def simulated_top1(simulation: Simulation, selection: ImageSet, batch_size: int) -> float:
    with simulation.mode(Mode.SIMULATE) as graph:
        answers = predictions(graph, inputs_of(selection, batch_size))
    return 100.0 * float((answers.numpy() == selection.labels).mean())
