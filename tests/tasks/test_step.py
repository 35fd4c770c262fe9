"""What every step is wrapped in."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.objects import State

from tasks.contracts.errors import DataError, ModelError, RequantError, StoreError, TransientStoreError
from tasks.contracts.records import ArtifactRef, Record
from tasks.contracts.settings import Settings
from tasks.contracts.spec import DataSpec, ModelSpec, PreprocessSpec, RunSpec
from tasks.load_model import load_model
from tasks.models.digits import digits_net
from tasks.models.weights import save_weights
from tasks.prepare_data import prepare_data
from tasks.score_float import score_float
from tasks.step import Progress, disk_errors, everything, remember, step, the_device, the_store
from tasks.stores.base import Store

pytestmark = pytest.mark.usefixtures("prefect_server")


class Length(Record):
    length: int
    file: ArtifactRef


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUANT_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("REQUANT_SCRATCH", str(tmp_path / "scratch"))


@pytest.fixture
def log() -> Iterator[list[str]]:
    """Everything that runs and their tasks log, with tracebacks."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler = Keep()
    logging.getLogger("prefect").addHandler(handler)
    yield lines
    logging.getLogger("prefect").removeHandler(handler)


def measure(text: str) -> Length:
    """A step that stores a file and how long it is."""

    def compute(store: Store, work: Path) -> Length:
        path = work / "text.txt"
        path.write_text(text)
        return Length(length=len(text), file=store.put(path, kind="texts"))

    return remember("measure", __name__, {"text": text}, Length, compute)


def in_a_flow(body: Callable[[], Any]) -> State[Any]:
    """The flow's last state, with `body` as its only step. Retries do not wait."""
    task = step("tried")(body).with_options(retry_delay_seconds=0)

    @flow(name="trial")
    def trial() -> Any:
        return task()

    return cast(State[Any], trial(return_state=True))


@pytest.fixture(autouse=True)
def known_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test's source is not below `tasks`, so its own steps have no digest of their own."""
    monkeypatch.setattr("tasks.step.code_digest", lambda module: f"code of {module}")
    monkeypatch.setattr("tasks.step.imports_of", lambda module: frozenset({"torch", "numpy"}))


def test_a_step_is_computed_once_and_then_remembered(log: list[str], tmp_path: Path) -> None:
    """The second time its record is taken from the store, and the log says so."""
    states = [in_a_flow(lambda: measure("four")) for _ in range(2)]
    assert [state.result().length for state in states] == [4, 4]
    told = [line for line in log if line.startswith("measure: ")]
    assert told[0].startswith("measure: done in ")
    assert told[1:] == ["measure: nothing has changed, so the stored result is taken"]
    assert the_store().list("steps/measure/") == the_store().list("steps/")
    assert list((tmp_path / "scratch").iterdir()) == []  # the work folder is gone


def test_everything_that_decides_is_in_a_steps_key() -> None:
    """Inputs, code and the versions of those libraries that it imports."""
    key = everything("tasks.quantize_model", {"seed": 1})
    assert key["seed"] == 1
    assert key["code"] == "code of tasks.quantize_model"
    libraries = key["libraries"]
    assert isinstance(libraries, dict)
    assert libraries["torch"] == torch.__version__.partition("+")[0]
    assert libraries.keys() == {"torch", "numpy"}


def test_a_minute_without_a_store_is_survived() -> None:
    """Even if every wait comes out as short as its jitter allows."""
    task = step("tried")(lambda: None)
    assert task.retry_jitter_factor is not None
    shortest = [delay * (1 - task.retry_jitter_factor) for delay in task.retry_delay_seconds]
    assert task.retries == len(shortest)
    assert sum(shortest) >= 60


def test_trouble_that_can_pass_is_tried_again() -> None:
    """A store that answers the third time is good enough."""
    calls: list[int] = []

    def body() -> str:
        calls.append(1)
        if len(calls) < 3:
            raise TransientStoreError("The store is busy.")
        return "done"

    assert in_a_flow(body).result() == "done"
    assert len(calls) == 3


@pytest.mark.parametrize("error", [StoreError("The disk is full."), ModelError("They do not fit."), ValueError("oh")])
def test_what_cannot_pass_is_final_at_once(error: Exception) -> None:
    """Trying again would only cost time."""
    calls: list[int] = []

    def body() -> None:
        calls.append(1)
        raise error

    state = in_a_flow(body)
    assert state.is_failed()
    assert len(calls) == 1


def test_a_refusal_is_one_line_of_the_log(log: list[str]) -> None:
    """With its remedy and without a traceback; the run's state says the same."""

    def body() -> None:
        raise ModelError("They do not fit.", remedy="Take others.")

    state = in_a_flow(body)
    assert [line for line in log if "They do not fit." in line] == ["ModelError: They do not fit. Take others."]
    assert "Traceback" not in "\n".join(log)
    assert "They do not fit. Take others." in (state.message or "")


def test_any_other_error_keeps_its_traceback(log: list[str]) -> None:
    """It is a fault of the program, and someone has to find it."""

    def body() -> None:
        raise ZeroDivisionError("division by zero")

    in_a_flow(body)
    assert "Traceback" in "\n".join(log)
    assert "in body" in "\n".join(log)


def test_an_error_of_the_disk_names_file_and_both_folders(tmp_path: Path) -> None:
    """Also when the system does not say which file it was."""
    with pytest.raises(StoreError) as caught, disk_errors():
        raise OSError(errno.ENOSPC, "No space left on device", "weights.bin")
    assert caught.value.problem == "weights.bin cannot be written or read: No space left on device."
    assert str(tmp_path / "store") in caught.value.remedy
    assert str(tmp_path / "scratch") in caught.value.remedy
    with pytest.raises(StoreError, match="A file cannot be written or read: 5 requested and 3 written"), disk_errors():
        raise OSError("5 requested and 3 written")  # what numpy makes of a full disk


def test_images_that_arrive_during_a_run_are_not_scored_as_its_own(tmp_path: Path) -> None:
    """They move others from split to split. Nothing is stored then; without them the run's own answer is."""
    folder, random = tmp_path / "pets", np.random.default_rng(0)

    def arrive(name: str) -> None:
        for kind in ("cat", "dog"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            for number in range(20):
                pixels_HWC = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels_HWC).save(folder / kind / f"{name}{number}.png")

    arrive("first")
    save_weights(digits_net(num_classes=2), tmp_path / "pets.safetensors")
    preprocess = PreprocessSpec(resize=32, mean=(0.5,), std=(0.5,))
    spec = RunSpec(
        name="pets",
        model=ModelSpec(architecture="tasks.models.digits:digits_net", weights=str(tmp_path / "pets.safetensors")),
        data=DataSpec(source=str(folder), calibration=10, preprocess=preprocess),
    )
    data = in_a_flow(lambda: prepare_data.fn(spec)).result()
    model = in_a_flow(lambda: load_model.fn(spec, data)).result()
    arrive("late")
    state = in_a_flow(lambda: score_float.fn(spec, data, model))
    error = state.result(raise_on_failure=False)
    assert isinstance(error, DataError)
    assert error.problem.startswith(f"{folder} has changed since this run prepared it: there are 80 images of digest ")
    assert error.problem.endswith(f"expected 40 images of digest {data.digest[:12]}.")
    assert error.remedy.startswith("Run again when nothing writes there")
    assert the_store().list("steps/score_float/") == []
    for path in folder.glob("*/late*"):
        path.unlink()
    accuracy = in_a_flow(lambda: score_float.fn(spec, data, model)).result()
    assert accuracy.num_images == data.counts["gate"]
    assert len(the_store().list("steps/score_float/")) == 1


def test_the_device_is_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU always, CUDA only if it is there, and auto takes CUDA if it can."""
    available = torch.cuda.is_available()
    assert Settings().device == "auto"
    assert the_device().type == ("cuda" if available else "cpu")
    monkeypatch.setenv("REQUANT_DEVICE", "cpu")
    assert the_device().type == "cpu"
    monkeypatch.setenv("REQUANT_DEVICE", "cuda")
    if available:
        assert the_device().type == "cuda"
    else:
        with pytest.raises(RequantError, match="finds no CUDA device"):
            the_device()


def test_long_work_shows_in_the_log_and_as_a_bar(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """From time to time, and at the end only if it was shown before."""
    clock = iter([0.0, 1.0, 6.0, 7.0, 8.0])  # made, then four calls
    monkeypatch.setattr("tasks.step.time", SimpleNamespace(monotonic=lambda: next(clock)))

    def body() -> None:
        progress = Progress("counting sheep")
        for done in (1, 2, 3, 4):
            progress(done, 4)

    assert in_a_flow(body).is_completed()
    assert [line for line in log if "sheep" in line] == ["counting sheep: 50 %", "counting sheep: 100 %"]
    assert bars("counting-sheep") == [100.0]


def test_short_work_is_not_shown(log: list[str]) -> None:
    """Below five seconds nobody needs a bar."""

    def body() -> None:
        progress = Progress("counting goats")
        progress(1, 1)

    in_a_flow(body)
    assert not [line for line in log if "goats" in line]
    assert bars("counting-goats") == []


def bars(key: str) -> list[float]:
    """Where progress artifacts of that name stand."""
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))
    return [float(str(artifact.data)) for artifact in found if artifact.type == "progress"]
