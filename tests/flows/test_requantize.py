"""The whole flow, on networks that train in seconds."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import StateType

from tasks.contracts.errors import DataRejected, GateRejected
from tasks.contracts.records import SPLITS
from tasks.engines.onnxruntime import OnnxRuntimeEngine
from tasks.report.content import RunReport
from tasks.stores.local import LocalStore
from tasks.stores.registry import read_release
from tasks.stores.steps import refs_in

if TYPE_CHECKING:
    from tests.flows.conftest import Place, Run

TAKEN = "nothing has changed, so the stored result is taken"
EPOCHS = 30  # enough that a signal comes before the last one, on a busy machine too
STEPS = (
    "check_data", "prepare_data", "load_model", "score_float", "choose_calibration", "quantize_model", "export_model",
    "build_engine", "score_engine", "measure_engine", "check_parity",
)  # fmt: skip
FILES_OF_A_RUN = {"data.html", "record.json", "report.html", "report.md"}


def steps_done(run: Run) -> tuple[str, ...]:
    """Steps that computed, in order."""
    return tuple(line.partition(":")[0] for line in run.log if ": done in" in line)


def steps_taken(run: Run) -> tuple[str, ...]:
    """Steps whose stored result was taken, in order."""
    return tuple(line.partition(":")[0] for line in run.log if line.endswith(TAKEN))


def runs_in(place: Place, name: str) -> dict[str, set[str]]:
    """Files of each run of a model."""
    folders = sorted((place.store / "models" / name / "runs").iterdir())
    return {folder.name: {file.name for file in folder.iterdir()} for folder in folders}


def test_a_run_ends_completed_under_the_name_of_its_model(first: tuple[Place, Run]) -> None:
    """Every step has computed once, in order, and Prefect knows the run as done."""
    _, run = first
    assert run.state.is_completed()
    assert steps_done(run) == STEPS
    with get_client(sync_client=True) as client:
        flow_run = client.read_flow_run(run.state.state_details.flow_run_id)  # type: ignore[arg-type]
    assert flow_run.state_type == StateType.COMPLETED
    assert re.fullmatch(r"plain by hand \d{4}-\d\d-\d\d", flow_run.name)


def test_the_record_in_the_store_is_the_whole_run(first: tuple[Place, Run]) -> None:
    """It reads back as what the flow returned, and every file that it names is there with its digest."""
    place, run = first
    assert runs_in(place, "plain") == {run.report.run_id: FILES_OF_A_RUN}
    folder = place.store / "models" / "plain" / "runs" / run.report.run_id
    assert RunReport.model_validate_json((folder / "record.json").read_text()) == run.report
    refs = {ref.key for ref in refs_in(run.report)}
    released = read_release(LocalStore(place.store), "plain", 1).release
    assert refs | {released.record.key, released.report.key} == place.stored("objects").keys()
    for ref in refs_in(run.report):
        LocalStore(place.store).fetch(ref, place.scratch / "fetched")
    assert run.report.float_accuracy.top1 > 80  # the network has learnt: agreeing with it means something
    assert "Passed all 5 gates" in (folder / "report.md").read_text()
    assert "Passed all 5 gates" in (folder / "report.html").read_text()
    assert place.leftovers() == []


def test_the_engine_file_is_int8_and_answers(first: tuple[Place, Run]) -> None:
    """What is to be released opens by itself and answers as many images as it is given."""
    place, run = first
    path = LocalStore(place.store).local_path(run.report.engine.engine)
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(path).graph.node}
    with OnnxRuntimeEngine(path, threads=1) as engine:
        assert engine.answer(np.zeros((3, 1, 32, 32), np.float32)).shape == (3, 10)
    assert path.stat().st_size == run.report.export.compression.int8_bytes


def test_every_gate_that_is_on_has_a_verdict(first: tuple[Place, Run]) -> None:
    """A gate set to null is off; the others are judged, each with what was measured."""
    _, run = first
    on = {name: limit for name, limit in run.report.spec.gates.model_dump().items() if limit is not None}
    assert {verdict.gate: verdict.limit for verdict in run.report.decision.verdicts} == on
    assert "min_speedup" not in on
    assert all(verdict.passed and verdict.measured is not None for verdict in run.report.decision.verdicts)


def test_no_image_is_in_two_splits(first: tuple[Place, Run]) -> None:
    """By the list in the store: pixels in one split are in no other, and every split has its number."""
    place, run = first
    members = pq.read_table(LocalStore(place.store).local_path(run.report.data.members)).to_pandas()
    pixels = {split: set(members.pixels[members.split == split]) for split in SPLITS}
    assert {split: len(of_split) for split, of_split in pixels.items()} == run.report.data.counts
    assert run.report.data.counts["calibration"] == 64
    assert all(pixels[one].isdisjoint(pixels[other]) for one, other in combinations(SPLITS, 2))


def test_the_prefect_page_of_a_run_shows_gates_report_and_picture(first: tuple[Place, Run]) -> None:
    """Three artifacts, which a browser can read."""
    _, run = first
    chosen = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.flow_run_id]))
    with get_client(sync_client=True) as client:
        artifacts = {artifact.key: artifact for artifact in client.read_artifacts(artifact_filter=chosen)}
    kinds = {key: artifact.type for key, artifact in artifacts.items() if artifact.type != "progress"}  # if it was slow
    assert kinds == {
        "gates-plain": "table",
        "report-plain": "markdown",
        "data-plain": "markdown",
        "picture-plain": "image",
    }
    rows = json.loads(str(artifacts["gates-plain"].data))
    assert len(rows) == len(run.report.decision.verdicts)
    assert str(artifacts["report-plain"].data).startswith("# ")
    assert str(artifacts["picture-plain"].data).startswith("data:image/png;base64,")


def test_reports_are_linked_to_where_browsers_reach_the_store(
    after_first: Place, plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the picture comes from there too: a data URL is shown in full below it."""
    monkeypatch.setenv("REQUANT_REPORT_URL", "https://reports.example/requant/")
    run = after_first.run(plain, gates={"min_agreement": 91.0})
    chosen = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.flow_run_id]))
    with get_client(sync_client=True) as client:
        artifacts = {artifact.key: str(artifact.data) for artifact in client.read_artifacts(artifact_filter=chosen)}
    place = f"models/plain/runs/{run.report.run_id}"
    assert f"(https://reports.example/requant/{place}/report.html)" in artifacts["page-plain"]
    assert artifacts["picture-plain"] == f"https://reports.example/requant/{place}/picture.svg"
    assert (after_first.store / place / "picture.svg").read_text().startswith("<?xml")


def test_a_second_identical_run_computes_nothing_and_says_so(after_first: Place, plain: dict[str, Any]) -> None:
    """Where the note of what decided the first one is lost, every step still finds its own record."""
    (after_first.store / "models/plain/settled").unlink()
    before = after_first.stored()
    run = after_first.run(plain)
    assert run.state.is_completed()
    assert steps_taken(run) == STEPS
    assert steps_done(run) == ()
    new = after_first.stored().items() - before.items()
    assert {Path(key).parent.name for key, _ in new} == {run.report.run_id, "plain"}  # the latter has the note again
    assert len(runs_in(after_first, "plain")) == 2


def test_poisoned_data_end_the_run_before_anything_else(after_first: Place, mobile: dict[str, Any]) -> None:
    """No model is loaded; the report with the offenders is in the store and on the run's page."""
    for number in range(5):
        Image.new("RGB", (40, 40), "grey").save(after_first.path / f"shapes/disc/grey{number}.png")
    run = after_first.run(mobile)
    assert isinstance(run.error, DataRejected)
    assert steps_done(run) == ("check_data",)
    assert runs_in(after_first, "mobile").popitem()[1] == {"data.html"}
    chosen = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.flow_run_id]))
    with get_client(sync_client=True) as client:
        artifacts = {artifact.key: artifact for artifact in client.read_artifacts(artifact_filter=chosen)}
    text = str(artifacts["data-mobile"].data)
    assert text.startswith("# ✗ mobile: Rejected: the data break ")
    assert "disc/grey0.png" in text
    assert "![](data:image/jpeg;base64," in text


def test_calibration_images_that_cover_and_other_draws(after_first: Place, plain: dict[str, Any]) -> None:
    """The chosen ones are on record, nothing before is done again, and the spread over draws is reported."""
    run = after_first.run(plain, data={"choice": "coverage", "draws": 2}, quant={"search": False})
    assert run.state.is_completed()
    assert steps_taken(run) == ("load_model", "score_float")
    choice, draws = run.report.choice, run.report.draws
    chosen = pq.read_table(LocalStore(after_first.store).local_path(choice.images)).to_pandas()
    members = pq.read_table(LocalStore(after_first.store).local_path(run.report.data.members)).to_pandas()
    home = members.set_index("pixels")["split"][chosen["pixels"]]
    assert len(set(chosen["pixels"])) == 64
    assert set(home) == {"calibration", "train"}
    assert choice.num_candidates == 16 * 64
    assert draws is not None
    assert len(draws.top1) == 2
    assert all(draws.chosen_top1 - 10 < top1 <= 100 for top1 in draws.top1)
    assert "on 2 other draws it is" in "\n".join(path.read_text() for path in after_first.store.rglob("report.md"))


def test_other_gates_only_judge_anew(after_first: Place, plain: dict[str, Any]) -> None:
    """No step computes, and the new limits are judged."""
    steps = after_first.stored("steps")
    run = after_first.run(plain, gates={"min_agreement": 91.0, "max_memory_mib": 1e6})
    assert steps_taken(run) == STEPS
    assert after_first.stored("steps") == steps
    limits = {verdict.gate: verdict.limit for verdict in run.report.decision.verdicts}
    assert (limits["min_agreement"], limits["max_memory_mib"]) == (91.0, 1e6)


def test_other_quantization_starts_from_quantizing(after_first: Place, plain: dict[str, Any]) -> None:
    """The float model's score is taken, one epoch is trained with the rounding in place, and it pays off or not."""
    objects = after_first.stored("objects")
    run = after_first.run(plain, quant={"method": "qat"})
    assert run.state.is_completed()
    assert steps_taken(run) == STEPS[:5]
    after_scoring = STEPS.index("score_engine") + 1  # where the first run, which is champion now, had none beside it
    assert steps_done(run) == (*STEPS[5:after_scoring], "score_champion", *STEPS[after_scoring:])
    assert run.report.quantized.method == "qat"
    assert [epoch.epoch for epoch in run.report.quantized.epochs] == [1]
    assert objects.items() <= after_first.stored("objects").items()
    assert not list((after_first.scratch / "training").glob("*"))
    assert after_first.leftovers() == []


def test_a_breached_gate_fails_the_run_after_everything_is_stored(after_first: Place, plain: dict[str, Any]) -> None:
    """The state tells the numbers, record and report say what was measured, and the earlier run is untouched."""
    before = after_first.stored()
    run = after_first.run(plain, gates={"min_compression": 50.0, "max_memory_mib": 1.0})
    assert run.state.is_failed()
    assert isinstance(run.error, GateRejected)
    assert re.fullmatch(
        r"2 of 6 gates failed: compression 1\.\d+, at least 50 x; memory \d+(\.\d+)?, at most 1 MiB\.",
        run.error.problem,
    )
    assert run.error.remedy
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(run.state.state_details.flow_run_id).state  # type: ignore[arg-type]
    assert state is not None
    assert state.type == StateType.FAILED
    assert run.error.problem in (state.message or "")

    assert before.items() <= after_first.stored().items()
    earlier, rejected = runs_in(after_first, "plain").items()
    assert (earlier[1], rejected[1]) == (FILES_OF_A_RUN, FILES_OF_A_RUN)
    folder = after_first.store / "models" / "plain" / "runs" / rejected[0]
    record = RunReport.model_validate_json((folder / "record.json").read_text())
    assert not record.decision.passed
    assert {verdict.gate for verdict in record.decision.verdicts if not verdict.passed} == {
        "min_compression",
        "max_memory_mib",
    }
    assert "Rejected by 2 of 6 gates" in (folder / "report.md").read_text()
    assert after_first.leftovers() == []


def test_a_folder_of_images_by_the_rules_of_tensorrt(place: Place, mobile: dict[str, Any]) -> None:
    """Squeeze-and-excitation, hard-swish and depthwise layers end as symmetric INT8 that keeps its gates."""
    run = place.run(mobile)
    assert run.state.is_completed()
    assert run.report.quantized.scheme == "tensorrt"
    assert run.report.data.class_names == ("disc", "square", "stripes")
    assert run.report.float_accuracy.top1 > 80
    graph = onnx.load(LocalStore(place.store).local_path(run.report.export.int8_onnx)).graph
    zero_points = {node.input[2] for node in graph.node if node.op_type == "QuantizeLinear"}
    values = [onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.name in zero_points]
    assert values
    assert all(value.dtype == np.int8 and not value.any() for value in values)


def test_training_goes_on_after_a_kill_and_after_an_interrupt(after_first: Place, prefect_server: str) -> None:
    """Finished epochs are never trained again, and the last of three equal commands ends well."""
    command = (
        "run", "plain.yaml", "--set", "quant.method=qat", "--set", "quant.search=false",
        "--set", f"quant.qat.epochs={EPOCHS}", "--set", f"quant.qat.patience={EPOCHS}",
    )  # fmt: skip
    killed = after_first.start(*command, PREFECT_API_URL=prefect_server)  # as its own server would live on
    wait_for_epochs(after_first, 1, killed)
    killed.kill()
    assert after_first.end(killed).status == -signal.SIGKILL
    (after_kill,) = trained(after_first)

    interrupted = after_first.start(*command)
    wait_for_epochs(after_first, len(after_kill) + 1, interrupted)
    os.killpg(interrupted.pid, signal.SIGINT)  # as Ctrl-C does: to the command and to the server that it started
    end = after_first.end(interrupted)
    (after_interrupt,) = trained(after_first)
    assert end.status == 130
    assert "Stopped. The same command goes on from the last finished step and epoch." in end.stderr.splitlines()
    assert "Traceback" not in end.stdout + end.stderr
    assert after_interrupt[: len(after_kill)] == after_kill
    assert len(after_kill) < len(after_interrupt) < EPOCHS

    last = after_first.call(*command, PREFECT_API_URL=prefect_server)
    assert last.status == 0, last.stderr
    *_, newest = runs_in(after_first, "plain")
    record = json.loads((after_first.store / "models/plain/runs" / newest / "record.json").read_text())
    epochs = record["quantized"]["epochs"]
    assert [epoch["epoch"] for epoch in epochs] == list(range(1, EPOCHS + 1))
    assert epochs[: len(after_interrupt)] == after_interrupt  # with the seconds that they took, to the last digit
    assert trained(after_first) == []


def trained(place: Place) -> list[list[dict[str, float]]]:
    """The epochs in each training that has not ended."""
    checkpoints = (place.scratch / "training").glob("*/checkpoint.pt")
    return [torch.load(path, weights_only=True)["history"] for path in checkpoints]


def wait_for_epochs(place: Place, number: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 100
    while not any(len(history) >= number for history in trained(place)):
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"the command has not trained {number} epochs: {place.end(process)}")
        time.sleep(0.02)
