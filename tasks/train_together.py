"""Training by several processes, on this machine or on several: torchrun starts them, the store is what they share.

`launch` starts the first machine's part. Another machine joins by the same options of torchrun, and the same store:

    torchrun OPTIONS -m tasks.train_together KEY
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import torch
from prefect import get_run_logger

from tasks.choose_calibration import chosen_images
from tasks.contracts.errors import SpecError
from tasks.contracts.records import ArtifactRef, Choice, DataRecord, Epoch, ModelRecord, Record
from tasks.contracts.settings import Settings
from tasks.contracts.spec import RunSpec
from tasks.engines.child import Progress, run_child, serve
from tasks.load_model import float_model
from tasks.quant.group import joined
from tasks.quant.simulate import Simulation
from tasks.quant.train import train
from tasks.quantize_model import prepare_simulation
from tasks.step import the_device, the_store
from tasks.stores.workspace import workspace


class Request(Record):
    """What is to be trained: all that decides it, by reference."""

    spec: RunSpec
    data: DataRecord
    model: ModelRecord
    choice: Choice
    kept_float: tuple[str, ...]
    calibrated: ArtifactRef  # state of the simulation


class Trained(Record):
    """What came of it."""

    state: ArtifactRef
    epochs: tuple[Epoch, ...]


def launch(request: Request, simulation: Simulation, name: str, progress: Progress, work: Path) -> tuple[Epoch, ...]:
    """Train `simulation`, whose state the request has, in the processes that REQUANT_TORCHRUN asks for.

    Args:
        name: of the folder below scratch that a killed training goes on from.

    Raises:
        SpecError: if torchrun does not understand its options.
        RequantError: what a process refuses, or how it ended.
    """
    store, options = the_store(), Settings().torchrun
    key, folder = _key(name), _folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    store.write_text(key, request.model_dump_json(indent=1))
    get_run_logger().info("training by several processes: torchrun %s", options)
    command = [sys.executable, "-m", __name__, "--agent", key, str(os.getpid()), *map(str, _gpu())]
    run_child(command, folder, doing="Training together", limit_s=float("inf"), progress=progress)
    said = store.read_text(_answer(key))
    assert said is not None  # the first process wrote it before it ended well
    trained = Trained.model_validate_json(said)
    simulation.graph.cpu()
    simulation.load(store.fetch(trained.state, work))
    return trained.epochs


def agent(key: str, parent: int, gpu: list[str]) -> int:
    """Torchrun itself, in a process that ends with the one that trains."""

    def work(_progress: Progress) -> None:
        from torch.distributed.run import main as torchrun

        try:
            torchrun([*shlex.split(Settings().torchrun), "-m", __spec__.name, key, *gpu])
        except SystemExit as error:  # of its parser, which has printed why
            raise SpecError(
                f"torchrun does not take {Settings().torchrun!r}.", remedy="Mend REQUANT_TORCHRUN; see torchrun --help."
            ) from error

    return serve(_folder(Path(key).stem), parent, work)


def member(key: str, gpu: list[str]) -> int:
    """One of the processes. The first of this machine takes over the GPU that the run has reserved."""
    folder = _folder(Path(key).stem)
    folder.mkdir(parents=True, exist_ok=True)

    def work(progress: Progress) -> None:
        first_here = os.environ["LOCAL_RANK"] == "0"
        device = torch.device("cuda", int(gpu[0])) if gpu and first_here else the_device()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        _train(key, folder, device, progress)

    return serve(folder, os.getppid(), work)


def _train(key: str, folder: Path, device: torch.device, progress: Progress) -> None:
    store = the_store()
    request = Request.model_validate_json(store.read_text(key) or "")
    spec = request.spec
    with workspace(Settings().scratch) as work, joined(device) as group:
        images = chosen_images(spec, request.data, request.choice, work)
        prepared = prepare_simulation(
            spec, request.data, float_model(request.model, work), frozenset(request.kept_float)
        )
        prepared.simulation.load(store.fetch(request.calibrated, work))
        epochs = train(
            prepared.simulation,
            prepared.folded,
            images.split("train"),
            images.split("selection"),
            spec.quant.qat,
            seed=spec.seed,
            device=device,
            folder=folder,
            group=group,
            progress=progress if group.rank == 0 else None,
        )
        if group.rank == 0:
            state = work / "trained.safetensors"
            prepared.simulation.save(state)
            trained = Trained(state=store.put(state, kind="simulations"), epochs=epochs)
            store.write_text(_answer(key), trained.model_dump_json(indent=1))


def _key(name: str) -> str:
    return f"training/{name}.json"


def _answer(key: str) -> str:
    return key.replace(".json", ".trained.json")


def _folder(name: str) -> Path:
    return Settings().scratch / "training" / name


def _gpu() -> tuple[int, ...]:
    index = the_device().index
    return () if index is None else (index,)


if __name__ == "__main__":
    if sys.argv[1] == "--agent":
        sys.exit(agent(sys.argv[2], int(sys.argv[3]), sys.argv[4:]))
    sys.exit(member(sys.argv[1], sys.argv[2:]))
