"""Training and building on a worker of another work pool: real server, real worker, and the store between them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName

from tasks import send_to_worker
from tasks.contracts.errors import EngineError, StoreError
from tasks.contracts.records import ArtifactRef
from tests.flows.prefect_server import end

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

    from tests.flows.conftest import Place

PREFECT = str(Path(sys.executable).with_name("prefect"))
POOL = "elsewhere"


@pytest.fixture(scope="module")
def client(prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SyncPrefectClient]:
    """Both children deployed to a pool of processes."""
    folder = str(tmp_path_factory.mktemp("empty"))  # every run begins with a copy of it
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        for name in ("build", "train"):
            flow = client.create_flow_from_name(name)
            client.create_deployment(
                flow, name=POOL, entrypoint=f"flows.build.{name}", path=folder, work_pool_name=POOL
            )
        yield client


@pytest.fixture
def worker(client: SyncPrefectClient, after_first: Place, prefect_server: str, tmp_path: Path) -> Iterator[None]:
    """A worker that shares the store with the run that sends it work, and has a scratch folder of its own."""
    environment = {
        **os.environ, **after_first.environment, "PREFECT_API_URL": prefect_server, "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_HOME": str(tmp_path / "prefect"), "REQUANT_SCRATCH": str(tmp_path / "scratch"),
        "PYTHONPATH": os.pathsep.join([str(after_first.path), *sys.path]),
    }  # fmt: skip
    with (tmp_path / "worker.log").open("w") as log:
        process = subprocess.Popen(
            [PREFECT, "worker", "start", "--pool", POOL], cwd=after_first.path, env=environment,
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            yield
        finally:
            end(process)


def elsewhere(monkeypatch: pytest.MonkeyPatch, **settings: str) -> None:
    build_on = json.dumps(dict.fromkeys(("onnxruntime", "onnxruntime-cuda"), f"build/{POOL}"))
    values = {"BUILD_ON": build_on, "TRAIN_ON": f"train/{POOL}", **settings}
    for name, value in values.items():
        monkeypatch.setenv(f"REQUANT_{name}", value)


def children(client: SyncPrefectClient) -> list[FlowRun]:
    """Runs of both deployments, in the order of their start."""
    named = DeploymentFilter(name=DeploymentFilterName(any_=[POOL]))
    return sorted(client.read_flow_runs(deployment_filter=named), key=lambda run: str(run.created))


def test_a_run_has_its_model_trained_and_its_engine_built_elsewhere(
    client: SyncPrefectClient, worker: None, after_first: Place, plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sender does every other step; what the worker found out is the report's, and its runs are children."""
    elsewhere(monkeypatch)
    run = after_first.run(plain, quant={"method": "qat"})
    done = [line.partition(":")[0] for line in run.log if ": done in" in line]
    assert run.report.quantized.method == "qat"
    assert set(done).isdisjoint({"quantize_model", "build_engine", "score_engine", "measure_engine"})
    assert {"export_model", "check_parity"} <= set(done)
    assert run.report.decision.passed
    train, build = children(client)
    assert (train.name, build.name) == ("plain training", "plain for onnxruntime")
    assert train.state_type == build.state_type == "COMPLETED"
    assert None not in (train.parent_task_run_id, build.parent_task_run_id)

    # What the worker refuses is refused by the run, in the same words.
    refused = after_first.run(plain, target={"runtime": "onnxruntime-cuda"})
    assert isinstance(refused.error, EngineError)
    assert "no GPU that PyTorch can use" in str(refused.error)
    assert children(client)[-1].state_type == "FAILED"

    # A child that takes too long is cancelled.
    elsewhere(monkeypatch, WORKER_MINUTES="0.001")
    late = after_first.run({**plain, "seed": 1})
    assert isinstance(late.error, EngineError)
    assert "after 0.001 minutes and was cancelled" in str(late.error)
    assert str(children(client)[-1].state_type) in ("StateType.CANCELLING", "StateType.CANCELLED")


def test_a_deployment_that_does_not_exist_is_named(
    after_first: Place, plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch, prefect_server: str
) -> None:
    """With the command that makes it."""
    elsewhere(monkeypatch, TRAIN_ON="train/nowhere")
    error = after_first.run(plain, quant={"method": "qat"}).error
    assert isinstance(error, EngineError)
    assert "has no deployment train/nowhere" in error.problem
    assert "requant deploy" in error.remedy


def test_a_pool_without_a_worker_is_not_waited_for_in_vain(
    client: SyncPrefectClient, after_first: Place, plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is queued that nobody would do."""
    monkeypatch.setattr(send_to_worker, "WORKER_S", 0.0)
    client.create_work_pool(WorkPoolCreate(name="empty", type="process"))
    flow = client.create_flow_from_name("train")
    client.create_deployment(flow, name="empty", entrypoint="flows.build.train", work_pool_name="empty")
    elsewhere(monkeypatch, TRAIN_ON="train/empty")
    error = after_first.run(plain, quant={"method": "qat"}).error
    assert isinstance(error, EngineError)
    assert "needs a worker of work pool empty, which is NOT_READY" in error.problem


def test_an_answer_that_cannot_be_stored_is_not_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's own failure to write is its failure, not silence."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REQUANT_STORE", str(tmp_path / "file"))
    with pytest.raises(StoreError):
        send_to_worker.answer("models/m/runs/r/build.json", lambda: ArtifactRef(key="k", sha256="0", size_bytes=1))


def test_two_processes_train_what_one_does(
    place: Place, plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torchrun on this machine, from the same spec: the same losses, but for sums that tip over to another step."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(place.path), *sys.path]))
    monkeypatch.setenv("REQUANT_TORCHRUN", "--standalone --nproc-per-node=2")
    # Labels too: how far a trained student is from the float model is the noise of those few sums alone.
    quant = {"method": "qat", "qat": plain["quant"]["qat"] | {"distillation": 0.5}}
    together = place.run(plain, quant=quant).report.quantized
    monkeypatch.delenv("REQUANT_TORCHRUN")
    shutil.rmtree(place.store)
    alone = place.run(plain, quant=quant).report.quantized
    assert [epoch.selection_loss for epoch in together.epochs] == pytest.approx(
        [epoch.selection_loss for epoch in alone.epochs], rel=1e-2
    )
    assert together.state != alone.state  # they are not the same bits: both did train


def test_options_that_torchrun_does_not_take_are_refused(
    place: Place, plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, before anything is trained."""
    monkeypatch.setenv("REQUANT_TORCHRUN", "--sideways")
    error = place.run(plain, quant={"method": "qat"}).error
    assert "torchrun" in str(error)
    assert "REQUANT_TORCHRUN" in str(error)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    ("runtime", "problem"),
    [
        ("tensorrt", "no GPU that PyTorch can use"),
        ("onnxruntime-cuda", "no CUDAExecutionProvider"),
        ("onnxruntime-tensorrt", "no TensorrtExecutionProvider"),
    ],
)
def test_a_runtime_that_is_not_here_ends_the_run_at_once(
    place: Place, plain: dict[str, Any], runtime: str, problem: str
) -> None:
    """Before an image is looked at."""
    run = place.run(plain, target={"runtime": runtime}, evaluation={"batch_size": 4, "latency_batch_sizes": [1]})
    assert isinstance(run.error, EngineError)
    assert problem in run.error.problem
    assert run.error.remedy
    assert not any("check_data" in line for line in run.log)
