from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tasks.contracts.records import DataCheck
from tasks.contracts.spec import DataSpec, ModelSpec, PreprocessSpec, RunSpec
from tasks.data.contract import Past, check_contract, digest_of, last_accepted, rejection, take_manifest, thumbnails
from tasks.data.images import prepare_images
from tasks.stores.local import LocalStore

WriteFolder = Callable[..., Path]
FEW: dict[str, Any] = {"num_calibration": {"low": 16}, "alike": {"severity": "off"}, "distinct": {"severity": "off"}}


@pytest.fixture
def folder(write_folder: WriteFolder) -> Path:
    return write_folder({"cat": 60, "dog": 60})


def spec_of(folder: Path, *, model: ModelSpec | None = None, **data: Any) -> RunSpec:
    checks = {**FEW, **data.pop("checks", {})}
    return RunSpec(
        name="pets",
        model=model or ModelSpec(),
        data=DataSpec.model_validate(
            {
                "source": str(folder),
                "calibration": 40,
                "preprocess": PreprocessSpec(resize=32),
                "checks": checks,
                **data,
            }
        ),
    )


def judged(spec: RunSpec, tmp_path: Path, past: Past | None = None) -> DataCheck:
    scratch, work = tmp_path / "scratch", tmp_path / "work"
    work.mkdir(exist_ok=True)
    return check_contract(
        spec,
        take_manifest(spec.data, scratch),
        lambda: prepare_images(spec.model, spec.data, spec.seed, scratch),
        past,
        LocalStore(tmp_path / "store"),
        work,
    )


def manifest_of(check: DataCheck, tmp_path: Path) -> pd.DataFrame:
    return pd.read_parquet(LocalStore(tmp_path / "store").fetch(check.manifest, tmp_path / "fetched"))


def test_clean_data_keep_the_contract_and_their_manifest_is_stored(folder: Path, tmp_path: Path) -> None:
    """A row per image, with its split, and the digests by which a later run knows it."""
    check = judged(spec_of(folder), tmp_path)
    assert check.breaches == ()
    assert check.num_images == 120
    frame = manifest_of(check, tmp_path)
    assert frame["split"].value_counts().to_dict() == {"train": 32, "calibration": 40, "selection": 18, "gate": 30}
    prepared = prepare_images(ModelSpec(), spec_of(folder).data, 0, tmp_path / "scratch")
    gate = frame[frame["split"] == "gate"]["path"]
    assert set(gate) == {prepared.images.names[row] for row in prepared.splits.rows["gate"]}
    assert {"sha256", "pixels", "phash", "format", "mode", "width", "mean_r", "sharpness", "label"} <= set(
        frame.columns
    )


def test_a_critical_image_ends_it_before_anything_is_split(folder: Path, tmp_path: Path) -> None:
    """The splits could not be made, and nothing is decoded for them."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    Image.fromarray(noise).save(folder / "cat/noise.png")
    (folder / "dog/broken.png").write_bytes(b"no image")
    check = judged(spec_of(folder), tmp_path)
    assert [finding.rule for finding in check.breaches] == ["decodes", "correlation"]
    assert not any(finding.rule == "num_calibration" for finding in check.findings)
    assert manifest_of(check, tmp_path)["split"].isna().all()
    assert not (tmp_path / "scratch/images").exists()
    error = rejection(check)
    assert "decodes is 99.18 % of 122 images, not true of all images" in error.problem
    assert "cat/noise.png (" in error.problem
    assert "Mend or remove these files." in error.remedy


def test_the_gates_own_source_is_judged_too_and_told_apart(
    folder: Path, write_folder: WriteFolder, tmp_path: Path
) -> None:
    """Equal names in both do not clash; what is wrong in the gate's is named as its."""
    gate = write_folder({"cat": 20, "dog": 20}, name="gate", first_seed=500)
    (gate / "cat/000.png").write_bytes(b"")
    check = judged(spec_of(folder, gate_source=str(gate)), tmp_path)
    (finding,) = check.breaches
    assert [(offender.path, offender.found) for offender in finding.offenders] == [("gate:cat/000.png", "is empty")]
    (gate / "cat/000.png").write_bytes((folder / "cat/000.png").read_bytes())
    check = judged(spec_of(folder, gate_source=str(gate)), tmp_path)
    assert check.breaches == ()
    frame = manifest_of(check, tmp_path).set_index("path")
    assert frame["split"]["gate:cat/000.png"] == "gate"
    assert pd.isna(frame["split"]["cat/000.png"])  # its copy is used there
    assert (frame["split"] == "gate").sum() == 40


def test_a_label_that_is_not_the_models(folder: Path, tmp_path: Path) -> None:
    """Whether a class too many, or one that the model's names lack."""
    check = judged(spec_of(folder, model=ModelSpec(class_names=("cat", "bird"))), tmp_path)
    (finding,) = check.breaches
    assert (finding.rule, finding.num_offenders) == ("labelled", 60)
    assert finding.offenders[0].found == "dog"


def test_classes_of_the_model_that_the_data_lack(folder: Path, tmp_path: Path) -> None:
    """Critical, unless the spec says otherwise; labels then count as the model's outputs do."""
    model = ModelSpec(class_names=("dog", "bird", "cat"))
    (finding,) = judged(spec_of(folder, model=model), tmp_path).breaches
    assert finding.rule == "missing_classes"
    assert finding.offenders[0].path == "train: bird"
    allowed = spec_of(folder, model=model, checks={"missing_classes": {"high": 1}})
    assert judged(allowed, tmp_path).breaches == ()
    prepared = prepare_images(model, allowed.data, 0, tmp_path / "scratch")
    assert prepared.class_names == ("dog", "bird", "cat")
    assert set(prepared.split("gate").labels.tolist()) == {0, 2}


def test_pictures_of_offenders(folder: Path, write_folder: WriteFolder, tmp_path: Path) -> None:
    """Small, whatever the source, and none of what does not decode."""
    Image.new("RGB", (400, 300), "grey").save(folder / "cat/flat.png")
    (folder / "dog/broken.png").write_bytes(b"no image")
    gate = write_folder({"cat": 2, "dog": 2}, name="gate", first_seed=500)
    Image.new("L", (300, 300)).save(gate / "cat/flat.png")
    spec = spec_of(folder, gate_source=str(gate))
    pictures = thumbnails(spec.data, judged(spec, tmp_path).findings)
    assert {"cat/flat.png", "gate:cat/flat.png"} <= set(pictures)
    assert "dog/broken.png" not in pictures
    head, _, content = pictures["cat/flat.png"].partition(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (96, 72)


def test_the_digest_follows_names_labels_and_files(folder: Path, tmp_path: Path) -> None:
    """And nothing else: the same data elsewhere have the same one."""
    spec, scratch = spec_of(folder), tmp_path / "scratch"
    before = digest_of(take_manifest(spec.data, scratch))
    (folder / "cat/000.png").touch()
    assert digest_of(take_manifest(spec.data, scratch)) == before
    (folder / "cat/000.png").rename(folder / "dog/000b.png")
    assert digest_of(take_manifest(spec.data, scratch)) != before


def test_data_are_compared_with_those_of_the_last_accepted_run(folder: Path, tmp_path: Path) -> None:
    """Rejected runs, other models, and what cannot be read or is not stored any more do not count."""
    store = LocalStore(tmp_path / "store")
    first = judged(spec_of(folder), tmp_path)
    gone = first.manifest.model_copy(update={"key": first.manifest.key.replace("objects/", "objects/other-")})

    def record(model: str, run: str, passed: bool, check: DataCheck | None) -> None:
        values = {"decision": {"passed": passed}} | (
            {} if check is None else {"check": json.loads(check.model_dump_json())}
        )
        store.write_text(f"models/{model}/runs/{run}/record.json", json.dumps(values))

    assert last_accepted(store, "pets") is None
    record("pets", "20260101", True, first)
    record("pets", "20260102", False, first)
    record("pets", "20260103", True, None)
    record("cars", "20260104", True, first)
    past = last_accepted(store, "pets")
    assert past == Past("20260101", first.digest, first.manifest)

    record("pets", "20260105", True, first.model_copy(update={"manifest": gone}))
    newer = json.loads(first.model_dump_json()) | {"of_a_newer_version": 1}
    for run, text in (
        ("20260106", json.dumps({"decision": {"passed": True}, "check": newer})), ("20260107", "{"), ("20260108", "[]"),
    ):  # fmt: skip
        store.write_text(f"models/pets/runs/{run}/record.json", text)
    assert last_accepted(store, "pets") == past

    for path in folder.rglob("*.png"):
        with Image.open(path) as image:
            image.point(lambda value: value // 3 + 40).save(path)
    check = judged(spec_of(folder), tmp_path, past)
    assert check.reference == "20260101"
    assert {"past_psi", "past_ks"} <= {finding.rule for finding in check.warnings}
