"""A small world to run whole flows in: two networks, their weights, and images that they tell apart."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from prefect import Flow
from prefect.client.schemas.objects import State
from torch.nn import functional

from flows.requantize import requantize, requantize_retrained
from tasks.contracts.spec import RunSpec, spec_from
from tasks.data.images import prepare_images
from tasks.models.architectures import build_model
from tasks.models.weights import save_weights
from tasks.report.content import RunReport
from tests.flows.prefect_server import Installation, installation

if TYPE_CHECKING:
    from tests.flows.production import Production

NETWORKS = '''
"""Two classifiers that train in seconds."""

from torch import nn


def plain(num_classes: int) -> nn.Module:
    return nn.Sequential(
        *conv(1, 8, stride=2), *conv(8, 16, stride=2), *conv(16, 32, stride=2), *head(32, num_classes)
    )


def mobile(num_classes: int) -> nn.Module:
    """What MobileNetV3 is made of."""
    return nn.Sequential(
        *conv(3, 16, stride=2, activation=nn.Hardswish),
        *conv(16, 16, groups=16),
        SqueezeExcite(16),
        *conv(16, 32, stride=2, activation=nn.Hardswish),
        *head(32, num_classes),
    )


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        gate = nn.Conv2d(channels, 8, 1), nn.ReLU(), nn.Conv2d(8, channels, 1), nn.Hardsigmoid()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), *gate)

    def forward(self, inner):
        return inner * self.gate(inner)


def conv(inputs, outputs, *, stride=1, groups=1, activation=nn.ReLU):
    kernel = nn.Conv2d(inputs, outputs, 3, stride, padding=1, groups=groups, bias=False)
    return kernel, nn.BatchNorm2d(outputs), activation()


def head(channels, num_classes):
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)


def branching(num_classes: int) -> nn.Module:
    return Branching(num_classes)


class Branching(nn.Module):
    """Takes its way by the values in its input, which no graph can hold."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layers = plain(num_classes)

    def forward(self, images):
        if images.mean() > 0.5:
            return self.layers(-images)
        return self.layers(images)
'''

FEW = {"num_calibration": {"low": 32}}  # so that a run takes seconds
PLAIN: dict[str, Any] = {
    "name": "plain",
    "model": {"architecture": "networks:plain", "weights": "plain.safetensors"},
    "data": {
        "source": "digits",
        "calibration": 64,
        "selection": 64,
        "gate": 128,
        "checks": FEW,
        "preprocess": {"resize": 32, "mean": [0.3], "std": [0.3]},
    },
    "quant": {"qat": {"epochs": 1, "mirror": False}},
    "evaluation": {"latency_batch_sizes": [1, 4], "latency_rounds": 10},
    "gates": {  # of these, a network this small and a clock this busy keep only what is about correctness
        "max_top1_drop": 5.0,
        "max_top5_drop": 5.0,
        "max_champion_drop": None,
        "min_agreement": 90.0,
        "min_parity": 95.0,
        "min_compression": 1.2,
        "min_speedup": None,
    },
}
MOBILE: dict[str, Any] = {
    **PLAIN,
    "name": "mobile",
    "model": {"architecture": "networks:mobile", "weights": "mobile.safetensors"},
    "data": {
        "source": "shapes",
        "calibration": 48,
        "selection": 24,
        "gate": 48,
        "checks": FEW,
        "preprocess": {"resize": 32},
    },
    "target": {"scheme": "tensorrt"},
}


@dataclass(frozen=True)
class Run:
    """One run of the flow in this process."""

    state: State[Any]
    log: tuple[str, ...]

    @property
    def report(self) -> RunReport:
        report: RunReport = self.state.result()
        return report

    @property
    def error(self) -> Exception:
        error = self.state.result(raise_on_failure=False)
        assert isinstance(error, Exception), f"the run has not failed: {self.state}"
        return error

    @property
    def flow_run_id(self) -> str:
        return str(self.state.state_details.flow_run_id)


@dataclass(frozen=True)
class Ended:
    """One command in a process of its own."""

    status: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Place:
    """A folder with the networks, their weights and images, and a store and a scratch folder of its own."""

    path: Path
    store: Path
    scratch: Path
    prefect_home: Path  # of commands; with a database that is made once
    store_url: str = ""  # where the store is, if not in the folder `store`

    @property
    def environment(self) -> dict[str, str]:
        return {
            "REQUANT_STORE": self.store_url or str(self.store),
            "REQUANT_SCRATCH": str(self.scratch),
            "PREFECT_HOME": str(self.prefect_home),
            "OMP_NUM_THREADS": "1",
        }

    def stored(self, below: str = "") -> dict[str, int]:
        """Every file of the store and when it was written."""
        files = [path for path in (self.store / below).rglob("*") if path.is_file()]
        return {path.relative_to(self.store).as_posix(): path.stat().st_mtime_ns for path in files}

    def records(self) -> list[str]:
        """Of runs that got to their end; what the data contract found is told before."""
        return [key for key in self.stored("models") if not key.endswith("/data.html")]

    def leftovers(self) -> list[str]:
        """What a run must take away with it, however it ends."""
        names = (path.name for root in (self.store, self.scratch) for path in root.rglob("*"))
        return [name for name in names if name.endswith(".partial") or name.startswith("work-")]

    def run(self, values: Mapping[str, Any], **sections: Mapping[str, Any]) -> Run:
        """Run the flow in this process; `sections` go over `values`."""
        merged = {key: {**values.get(key, {}), **changes} for key, changes in sections.items()}
        return self._run(requantize, {**values, **merged})

    def night(self, values: Mapping[str, Any]) -> Run:
        """The same as a schedule starts it."""
        return self._run(requantize, values, trigger="nightly")

    def retrain(self, values: Mapping[str, Any], weights: Path) -> Run:
        """The same after an announcement."""
        news = {"id": str(uuid4()), "model": values["name"], "payload": {"weights": str(weights)}}
        return self._run(requantize_retrained, values, announcement=news)

    def _run(self, flow: Flow[..., Any], values: Mapping[str, Any], **parameters: Any) -> Run:
        spec = spec_from(values, origin="test")
        with self._entered(), _kept_log() as lines:
            state: Any = flow(spec, **parameters, return_state=True)
        return Run(state, tuple(lines))

    @contextmanager
    def _entered(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.path)
            patch.setattr(sys, "path", [*sys.path])  # a network's home is added
            for name, value in self.environment.items():
                patch.setenv(name, value)
            yield

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """`requant …` in a session of its own, so that it can be signalled as a terminal does."""
        command = [str(Path(sys.executable).with_name("requant")), *arguments]
        return subprocess.Popen(
            command, cwd=self.path, env={**os.environ, **self.environment, **environment}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def call(self, *arguments: str, **environment: str) -> Ended:
        return self.end(self.start(*arguments, **environment))

    def end(self, process: subprocess.Popen[str]) -> Ended:
        """The outcome of a started command, of which nothing stays behind."""
        try:
            stdout, stderr = process.communicate(timeout=120)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return Ended(process.returncode, stdout, stderr)


@contextmanager
def _kept_log() -> Iterator[list[str]]:
    """What Prefect's loggers write, each entry with its traceback if it has one."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler, logger = Keep(), logging.getLogger("prefect")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """A server and a worker for all tests that kill one, or what it runs."""
    with installation(tmp_path_factory.mktemp("installation")) as place:
        yield place


@pytest.fixture(scope="session")
def plain() -> dict[str, Any]:
    """Digits, for ONNX Runtime."""
    return PLAIN


@pytest.fixture(scope="session")
def mobile() -> dict[str, Any]:
    """A folder of PNG files, quantized by TensorRT's rules."""
    return MOBILE


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> Place:
    """Where all places are copied from."""
    path = tmp_path_factory.mktemp("world")
    place = Place(path, path / "store", path / "scratch", tmp_path_factory.mktemp("home"))
    (path / "networks.py").write_text(NETWORKS)
    _draw_shapes(path / "shapes")
    with place._entered():
        for values, epochs in ((PLAIN, 6), (MOBILE, 12)):
            _train(spec_from(values, origin="test"), place.scratch, epochs)
    for values in (PLAIN, MOBILE):
        (path / f"{values['name']}.yaml").write_text(yaml.safe_dump(values))
    return place


@pytest.fixture
def place(world: Place, tmp_path: Path) -> Place:
    """Nothing stored yet, and no image decoded."""
    return _copied(world, tmp_path / "place", without=("store", "scratch"))


@pytest.fixture(scope="session")
def first(world: Place, tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, Run]:
    """A run that has ended well, and its place, which stays as it is."""
    place = _copied(world, tmp_path_factory.mktemp("first") / "place")
    return place, place.run(PLAIN)


@pytest.fixture
def after_first(first: tuple[Place, Run], tmp_path: Path) -> Place:
    """A copy of the place in which one run has ended well."""
    return _copied(first[0], tmp_path / "place")


@pytest.fixture(scope="session")
def fleet(first: tuple[Place, Run], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Production]:
    """A server and a worker for all tests of a session, beside a place in which one run has ended well."""
    from tests.flows.production import production

    folder = tmp_path_factory.mktemp("fleet")
    with production(_copied(first[0], folder / "place"), folder) as running:
        yield running


def _copied(place: Place, path: Path, *, without: tuple[str, ...] = ()) -> Place:
    shutil.copytree(place.path, path, ignore=shutil.ignore_patterns(*without))
    return Place(path, path / "store", path / "scratch", place.prefect_home)


def _draw_shapes(folder: Path) -> None:
    """Discs, squares and stripes of any colour, place and size, as PNG files."""
    random = np.random.default_rng(0)
    row_HW, column_HW = np.mgrid[:40, :40]
    for name in ("disc", "square", "stripes"):
        (folder / name).mkdir(parents=True)
        for index in range(80):
            (row, column), radius = random.integers(14, 26, 2), random.integers(7, 12)
            distance_HW = np.stack([abs(row_HW - row), abs(column_HW - column)]).astype(float)
            inside = {
                "disc": np.hypot(*distance_HW) < radius,
                "square": distance_HW.max(0) < radius,
                "stripes": (row_HW + index) // 3 % 2 == 0,
            }
            pixels_HWC = random.integers(0, 60, (40, 40, 3)) + 195 * inside[name][..., None]
            Image.fromarray(pixels_HWC.astype(np.uint8)).save(folder / name / f"{index:02}.png")


def _train(spec: RunSpec, scratch: Path, epochs: int) -> None:
    """Weights where `spec` looks for them, trained on its own train split."""
    assert spec.model.weights is not None
    images = prepare_images(spec.model, spec.data, spec.seed, scratch)
    torch.manual_seed(0)
    model = build_model(spec.model, len(images.class_names)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pixels_NCHW, labels_N = (
        torch.from_numpy(np.concatenate(parts)) for parts in zip(*images.split("train").batches(64), strict=True)
    )
    for rows in (rows for _ in range(epochs) for rows in torch.split(torch.randperm(len(labels_N)), 32)):
        loss = functional.cross_entropy(model(pixels_NCHW[rows]), labels_N[rows])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    save_weights(model.eval(), Path(spec.model.weights))
