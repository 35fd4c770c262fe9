"""What a run releases, and the commands about releases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.engines.onnxruntime import OnnxRuntimeEngine
from tasks.stores.base import sha256_of
from tasks.stores.loader import pull
from tasks.stores.local import LocalStore
from tasks.stores.registry import champion, numbers, rollback, verify
from tasks.stores.signing import NO_KEYS

if TYPE_CHECKING:
    from tests.flows.conftest import Place, Run


def test_a_run_that_passes_releases_its_engine(first: tuple[Place, Run]) -> None:
    """As champion, complete and verified, with the numbers and the provenance of its record."""
    place, run = first
    store, report = LocalStore(place.store), run.report
    assert "release 1 of plain is champion (was none)" in run.log
    found = verify(store, "plain", 1)
    release = found.release
    assert champion(store, "plain").release == 1
    assert found.signature == "unsigned"
    assert release.run == report.run_id
    assert release.engines == (report.engine,)
    assert release.decision == report.decision
    folder = place.store / "models/plain/runs" / report.run_id
    assert release.record.sha256 == sha256_of(folder / "record.json")
    assert release.report.sha256 == sha256_of(folder / "report.html")
    assert release.scores.int8_top1 == report.engine_accuracy.top1
    assert release.scores.int8_ms == report.latencies[0].int8_ms["median"]
    assert release.provenance.weights == report.model.weights.sha256
    assert release.provenance.libraries == report.versions
    assert len({release.provenance.spec, release.provenance.code, release.provenance.data}) == 3


def test_what_is_pulled_serves(first: tuple[Place, Run], tmp_path: Path) -> None:
    """`model.json` says all that is needed to feed the engine and to read its answer."""
    place, run = first
    pulled = pull("plain", to=tmp_path / "engine", store=LocalStore(place.store), keys=NO_KEYS)
    serving = json.loads((pulled.folder / "model.json").read_text())["serving"]
    assert serving["labels"] == list(run.report.data.class_names)
    assert serving["preprocess"]["mean"] == [0.3]
    assert (serving["input"]["dtype"], serving["input"]["shape"][1:]) == ("float32", [1, 32, 32])
    with OnnxRuntimeEngine(pulled.engine, threads=int(pulled.model.options["intra_op_num_threads"])) as engine:
        assert engine.options == pulled.model.options
        answers = engine.run({serving["input"]["name"]: np.zeros((2, 1, 32, 32), np.float32)})
    assert answers[serving["output"]["name"]].shape == (2, len(serving["labels"]))


def test_only_a_new_engine_is_a_new_release(after_first: Place, plain: dict[str, Any]) -> None:
    """An identical run says that it brings nothing new; another is champion; one rolled back stays rolled back."""
    store, other = LocalStore(after_first.store), {"quant": {"ranges": "minmax", "search": False}}
    before = after_first.stored("objects")
    store.delete("models/plain/settled")  # otherwise the run would be over before
    same = after_first.run(plain)
    assert "nothing has changed: release 1 of plain stays champion" in same.log
    assert after_first.stored("objects") == before

    changed = after_first.run(plain, **other)
    assert "release 2 of plain is champion (was 1)" in changed.log
    assert verify(store, "plain", 2).release.parent == 1
    rollback(store, "plain")

    again = after_first.run(plain, **other)
    assert again.state.is_completed()
    (said,) = (line for line in again.log if "rolled back" in line)
    assert "this is release 2 of plain, which was rolled back: release 1 stays champion" in said
    assert numbers(store, "plain") == [1, 2]
    assert champion(store, "plain").release == 1
    assert after_first.leftovers() == []


def test_the_champion_is_scored_on_the_same_images(after_first: Place, plain: dict[str, Any]) -> None:
    """A challenger that loses more to it than was agreed is rejected, however it does against the float model."""
    other = {"quant": {"ranges": "minmax", "search": False, "bias_correction": False}}
    rejected = after_first.run(plain, **other, gates={"max_champion_drop": -50.0})
    assert "1 of 6 gates failed: champion_drop" in str(rejected.error)
    assert champion(LocalStore(after_first.store), "plain").release == 1

    run = after_first.run(plain, **other, gates={"max_champion_drop": 50.0})
    rival, report = run.report.champion, run.report
    assert rival is not None
    assert rival.release == 1
    (verdict,) = (verdict for verdict in report.decision.verdicts if verdict.gate == "max_champion_drop")
    assert verdict.measured == rival.comparison.top1_drop
    lost = rival.accuracy.top1 - report.engine_accuracy.top1
    assert abs(rival.comparison.top1_drop - lost) < 1e-9
    assert "release 2 of plain is champion (was 1)" in run.log


def test_a_rejected_run_releases_nothing(after_first: Place, plain: dict[str, Any]) -> None:
    """The champion stays."""
    run = after_first.run(plain, gates={"min_compression": 50.0}, quant={"ranges": "minmax", "search": False})
    assert run.state.is_failed()
    assert numbers(LocalStore(after_first.store), "plain") == [1]
    assert champion(LocalStore(after_first.store), "plain").release == 1


def test_releases_are_handled_by_commands(after_first: Place, plain: dict[str, Any]) -> None:
    """Each says in plain lines what it did, and refuses in one."""
    place = after_first
    place.run(plain, quant={"ranges": "minmax", "search": False})

    first, second = place.call("releases", "plain").stdout.splitlines()
    assert first.startswith("1  20")
    assert "top-1 " in first
    assert "champion" not in first
    assert second.endswith("  champion")
    assert "release 2 of plain, " in place.call("show", "plain").stdout
    differences = place.call("compare", "plain", "1", "2").stdout
    assert "engines.0.engine.sha256: " in differences
    assert "provenance.spec: " in differences
    assert "provenance.code: " not in differences

    assert place.call("rollback", "plain").stdout == "release 1 of plain is champion (was 2)\n"
    assert place.call("promote", "plain", "2").stdout == "release 2 of plain is champion (was 1)\n"
    assert place.call("promote", "plain", "2").stdout == "release 2 of plain is champion already\n"
    told = place.call("history", "plain", "--plot", "nights.html").stdout.splitlines()
    (_, *runs, good), (*lines, plot) = told[: told.index("")], told[told.index("") + 1 :]
    assert [run.split()[-2:] for run in runs] == [["1", "released"], ["2", "released"]]
    assert good.startswith("last good run, or night with nothing changed: 20")
    assert plot == "plot: nights.html"
    assert "<svg" not in (page := (place.path / "nights.html").read_text())
    assert page.count("data:image/svg+xml;base64,") == 2
    moves = [line.split("  ")[2:] for line in lines]
    assert moves == [
        ["promote", "release 1 (was none)"],
        ["promote", "release 2 (was 1)"],
        ["rollback", "release 1 (was 2)"],
        ["promote", "release 2 (was 1)"],
    ]

    assert place.call("verify", "plain", "1").stdout == "release 1 of plain: all artifacts complete, unsigned\n"
    pulled = place.call("pull", "plain", "--to", "engine")
    assert pulled.stdout == f"{place.path / 'engine'}: release 2 of plain, engine.onnx, unsigned\n"
    assert place.call("verify", "engine").stdout == "engine: release 2 of plain, engine complete, unsigned\n"
    (place.path / "engine/engine.onnx").write_bytes(b"")
    for arguments, message in (
        (("verify", "engine"), "ReleaseError: engine/engine.onnx is damaged.\n  Pull it again.\n"),
        (("history", "plain", "--plot", "nights.pdf"), "SpecError: A plot cannot be written as nights.pdf.\n  Name "),
        (("promote", "plain", "7"), "ReleaseError: plain has no release 7 in "),
        (("pull", "cats", "--to", "cats"), "ReleaseError: cats has no champion in "),
        (("verify", "./nowhere"), "ReleaseError: nowhere holds no whole release: No such file or directory."),
        (("show", "../plain"), "ReleaseError: '../plain' is not the name of a model."),
    ):
        end = place.call(*arguments)
        assert end.status == 1
        assert end.stderr.startswith(message)
        assert len(end.stderr.splitlines()) == 2

    before = place.stored()
    would = place.call("gc", "--keep-days", "0", "--keep-releases", "1")
    assert would.stdout.splitlines()[-1].startswith("would be deleted with --delete: 0 keys, ")
    assert "half-done uploads and writes removed: 0" in place.call("gc", "--delete").stdout
    assert place.stored() == before


def test_signed_releases_are_asked_for_by_settings(after_first: Place, plain: dict[str, Any]) -> None:
    """A key pair from the command line; then what is unsigned is refused, and what is signed is named so."""
    place = after_first
    made = place.call("keygen", "key.pem")
    assert made.status == 0, made.stderr
    key_id = made.stdout.rpartition("key id: ")[2].strip()
    assert place.call("keygen", "key.pem").status == 1
    trusting = {"REQUANT_TRUSTED_KEYS": "key.pem.pub"}
    refused = place.call("pull", "plain", "--to", "engine", **trusting)
    assert refused.status == 1
    assert "is refused. It is unsigned." in refused.stderr
    assert not (place.path / "engine").exists()

    place_with_key = {**trusting, "REQUANT_SIGNING_KEY": "key.pem"}
    end = place.call(
        "run", "plain.yaml", "--set", "quant.ranges=minmax", "--set", "quant.search=false", **place_with_key
    )
    assert end.status == 0, end.stderr
    assert f"signed by {key_id}, which is trusted" in place.call("verify", "plain", **trusting).stdout
    wrong = place.call("verify", "plain", REQUANT_TRUSTED_KEYS="key.pem")
    assert wrong.stderr.startswith("ReleaseError: REQUANT_TRUSTED_KEYS names a file that holds no public Ed25519 key")
    assert "Traceback" not in refused.stderr + end.stderr + wrong.stderr
