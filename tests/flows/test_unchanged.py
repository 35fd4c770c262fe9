"""A night with nothing to do is over at once, and one with something does what depends on it and no more."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import StateType

from tasks.stores.local import LocalStore
from tasks.stores.registry import read_release
from tasks.stores.signing import write_key_pair

if TYPE_CHECKING:
    from tests.flows.conftest import Place, Run

HEAVY = {"torch", "torchvision", "torchao", "onnx", "onnxruntime", "pandas", "scipy", "sklearn", "matplotlib",
         "great_expectations"}  # fmt: skip
TAKEN = "nothing has changed, so the stored result is taken"
BEFORE_MODEL = ("check_data", "prepare_data")
AFTER_MODEL = (
    "score_float", "choose_calibration", "quantize_model", "export_model", "build_engine", "score_engine",
    "score_champion", "measure_engine", "check_parity",
)  # fmt: skip

# One run in a process of its own; what it has loaded is told on standard output.
NIGHT = """
import json, sys
from pathlib import Path
from flows.requantize import requantize
from tasks.contracts.spec import read_spec, spec_from
state = requantize(spec_from(read_spec(Path(sys.argv[1])), origin="test"), return_state=True)
print(json.dumps([state.name, state.message, sorted(name for name in sys.modules if "." not in name)]))
"""


def done(run: Run) -> tuple[str, ...]:
    """Steps that computed, in order."""
    return tuple(line.partition(":")[0] for line in run.log if ": done in" in line)


def taken(run: Run) -> tuple[str, ...]:
    """Steps whose stored result was taken, in order."""
    return tuple(line.partition(":")[0] for line in run.log if line.endswith(TAKEN))


def reason(run: Run) -> str:
    """What the run says of changes."""
    (line,) = (line for line in run.log if "changed" in line and "since run" in line)
    return line


def changed(run: Run) -> set[str]:
    """Which of the inputs."""
    _, _, listed = reason(run).partition(": ")
    return {part.split(" ")[0] for part in listed.split(", ")}


def scale_weights(place: Place, factor: float, to: str) -> Path:
    """Other weights than those that the spec names, written to that name or another."""
    state = safetensors.torch.load_file(place.path / "plain.safetensors")
    safetensors.torch.save_file({name: tensor * factor for name, tensor in state.items()}, place.path / to)
    return place.path / to


def test_a_night_with_no_change_is_over_at_once(
    first: tuple[Place, Run], after_first: Place, plain: dict[str, Any]
) -> None:
    """Completed, with the reason in its state; the caller has the last report; no step ran and nothing was stored."""
    before = after_first.stored()
    run = after_first.run(plain)
    assert (run.state.type, run.state.name) == (StateType.COMPLETED, "Unchanged")
    assert run.report == first[1].report
    message = run.state.message or ""
    assert message.startswith(f"nothing changed since run {run.report.run_id}: data ")
    assert all(f"{name} " in message for name in ("data", "weights", "code", "runtime", "spec"))
    assert message.endswith("are the same; release 1 stays champion")
    assert done(run) == taken(run) == ()
    after = after_first.stored()
    assert after.keys() == before.keys()
    assert {key for key in after if after[key] != before[key]} == {"models/plain/settled"}  # its age is news

    chosen = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.flow_run_id]))
    with get_client(sync_client=True) as client:
        flow_run = client.read_flow_run(run.state.state_details.flow_run_id)  # type: ignore[arg-type]
        (table,) = client.read_artifacts(artifact_filter=chosen)
    assert (flow_run.state_name, flow_run.state and flow_run.state.message) == ("Unchanged", message)
    rows = json.loads(str(table.data))
    assert [(row["decided by"], row["same"]) for row in rows] == [
        ("data", True), ("weights", True), ("code", True), ("runtime", True), ("spec", True)
    ]  # fmt: skip


def test_nothing_heavy_is_loaded_for_it(after_first: Place, prefect_server: str) -> None:
    """It takes longer to import than such a night lasts."""
    environment = {**os.environ, **after_first.environment, "PREFECT_API_URL": prefect_server}
    ended = subprocess.run(
        [sys.executable, "-c", NIGHT, "plain.yaml"], cwd=after_first.path, env=environment, text=True,
        capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    name, message, loaded = json.loads(ended.stdout)
    assert (name, message.partition(" since ")[0]) == ("Unchanged", "nothing changed")
    assert HEAVY.isdisjoint(loaded)


def test_other_weights_start_from_the_model(after_first: Place, plain: dict[str, Any]) -> None:
    """The data are not judged or decoded again; what the model decides is done; and the night after is quiet."""
    scale_weights(after_first, 1.001, "plain.safetensors")
    run = after_first.run(plain)
    assert changed(run) == {"weights"}
    assert taken(run) == BEFORE_MODEL
    assert done(run) == ("load_model", *AFTER_MODEL)
    assert after_first.run(plain).state.name == "Unchanged"


def test_a_night_keeps_a_retraining(after_first: Place, plain: dict[str, Any]) -> None:
    """It does not bring back the weights that its spec names, until there are others."""
    new = scale_weights(after_first, 1.001, "retrained.safetensors")
    assert after_first.retrain(plain, new).state.name == "Completed"
    for _ in range(2):
        night = after_first.night(plain)
        assert night.state.name == "Unchanged"
        assert night.report.spec.model.weights == str(new)
    assert read_release(LocalStore(after_first.store), "plain", 2).release.number == 2

    scale_weights(after_first, 1.002, "plain.safetensors")
    night = after_first.night(plain)
    assert changed(night) == {"weights", "spec"}
    assert night.report.spec.model.weights == plain["model"]["weights"]
    assert after_first.night(plain).state.name == "Unchanged"


def test_a_run_by_hand_takes_its_spec_as_it_is(after_first: Place, plain: dict[str, Any]) -> None:
    """After a retraining too; and the nights after it keep what it made."""
    new = scale_weights(after_first, 1.001, "retrained.safetensors")
    assert after_first.retrain(plain, new).state.name == "Completed"
    assert changed(after_first.run(plain)) == {"weights", "spec"}
    night = after_first.night(plain)
    assert night.state.name == "Unchanged"
    assert night.report.spec.model.weights == plain["model"]["weights"]


def test_a_new_file_in_a_folder_is_looked_at(place: Place, mobile: dict[str, Any]) -> None:
    """The data are judged anew, and the model is not loaded again."""
    assert place.run(mobile).state.is_completed()
    assert place.run(mobile).state.name == "Unchanged"
    shutil.copy(place.path / "shapes/disc/00.png", place.path / "shapes/disc/again.png")
    run = place.run(mobile)
    assert changed(run) == {"data"}
    assert done(run)[0] == "check_data"
    assert "load_model" in taken(run)


def test_a_new_runtime_is_measured_and_nothing_is_quantized_again(
    after_first: Place, plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Python sees it when another version of its distribution is installed."""
    metadata = tmp_path / "newer" / "onnxruntime-99.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: onnxruntime\nVersion: 99.0\n")
    monkeypatch.syspath_prepend(str(tmp_path / "newer"))
    run = after_first.run(plain)
    assert changed(run) == {"runtime"}
    assert taken(run) == (*BEFORE_MODEL, "load_model", "score_float", "choose_calibration", "quantize_model")
    assert done(run) == ("export_model", "build_engine", "score_engine", "measure_engine", "check_parity")


def test_new_code_of_the_network_starts_from_the_model(after_first: Place, prefect_server: str) -> None:
    """Even if what it computes is the same; in a process of its own, as source does not change under a running one."""
    with (after_first.path / "networks.py").open("a") as file:
        file.write("# changed\n")
    ended = after_first.call("run", "plain.yaml", PREFECT_API_URL=prefect_server)
    assert ended.status == 0, ended.stderr
    assert "changed since run" in ended.stderr
    assert "code (" in ended.stderr
    computed = [line.split(" - ")[-1].partition(":")[0] for line in ended.stderr.splitlines() if ": done in" in line]
    assert computed[0] == "load_model"


def another_champion(place: Place, patch: pytest.MonkeyPatch) -> str:
    LocalStore(place.store).delete("models/plain/champion")
    return "release None is champion, where the run left 1"


def an_engine_lost(place: Place, patch: pytest.MonkeyPatch) -> str:
    engine = read_release(LocalStore(place.store), "plain", 1).release.engines[0].engine
    LocalStore(place.store).delete(engine.key)
    return f"{engine.key} is no longer held in full"


def no_record(place: Place, patch: pytest.MonkeyPatch) -> str:
    for path in (place.store / "models/plain/runs").glob("*/record.json"):
        path.unlink()
    return "its record is gone or of another version"


def a_key_to_trust(place: Place, patch: pytest.MonkeyPatch) -> str:
    public, _ = write_key_pair(place.path / "key.pem")
    patch.setenv("REQUANT_SIGNING_KEY", str(place.path / "key.pem"))
    patch.setenv("REQUANT_TRUSTED_KEYS", str(public))
    return "unsigned"


@pytest.mark.parametrize("spoil", [another_champion, an_engine_lost, no_record, a_key_to_trust])
def test_what_the_last_run_left_must_still_be_so(
    spoil: Callable[[Place, pytest.MonkeyPatch], str], after_first: Place, plain: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Otherwise the run goes through its steps, mends it, and the night after is quiet."""
    words = spoil(after_first, monkeypatch)
    run = after_first.run(plain)
    assert run.state.name == "Completed"
    assert words in reason(run)
    assert after_first.run(plain).state.name == "Unchanged"


def test_everything_is_done_again_if_that_is_asked(
    after_first: Place, plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By REQUANT_REDO, though nothing has changed."""
    monkeypatch.setenv("REQUANT_REDO", "1")
    run = after_first.run(plain)
    assert reason(run).endswith("but REQUANT_REDO asks for all steps again")
    assert taken(run) == ()
    assert done(run)[: len(BEFORE_MODEL) + 1] == (*BEFORE_MODEL, "load_model")


def test_a_rejected_run_is_not_what_the_next_is_compared_with(after_first: Place, plain: dict[str, Any]) -> None:
    """It fails every night until something changes; what passed before is still what counts."""
    for _ in range(2):
        run = after_first.run(plain, gates={"min_compression": 50.0})
        assert run.state.is_failed()
        assert changed(run) == {"spec"}
    assert after_first.run(plain).state.name == "Unchanged"
