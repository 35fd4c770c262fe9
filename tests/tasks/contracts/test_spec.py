from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from tasks.contracts.errors import SpecError
from tasks.contracts.spec import ChecksSpec, DataSpec, Limit, RunSpec, read_spec, spec_from

ORIGIN = "resnet.yaml"


def refusal(values: Any) -> str:
    with pytest.raises(SpecError) as caught:
        spec_from(values, origin=ORIGIN)
    message = str(caught.value)
    assert message.startswith(f"{ORIGIN}: ")
    assert message.endswith("Mend these keys.")
    return message


def test_a_name_is_all_that_is_needed() -> None:
    """Everything else has a default."""
    spec = spec_from({"name": "digits"}, origin=ORIGIN)
    assert spec.data.source == "digits"
    assert spec.target.scheme_name == spec.target.runtime


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"name": "a", "quant": {"metod": "qat"}}, ["quant.metod is not a key", "known: method, ranges"]),
        ({"name": "a", "gates": {"max_top_drop": 1}}, ["gates.max_top_drop is not a key", "max_top1_drop"]),
        ({"name": "a", "qunat": {}}, ["qunat is not a key", "known: name, seed, model, data, quant"]),
        ({"name": "a", "quant": {"qat": {"epoch": 1}}}, ["quant.qat.epoch is not a key", "known: epochs"]),
        ({"name": "a", "data": {"preprocess": {"size": 3}}}, ["data.preprocess.size is not a key"]),
        ({}, ["name is missing"]),
        ({"name": "a", "seed": "many"}, ["seed: ", "integer", "'many'"]),
        ({"name": "a", "seed": -1}, ["seed: ", "-1"]),
        ({"name": "a", "quant": {"method": "qta"}}, ["quant.method: ", "'ptq' or 'qat'", "'qta'"]),
        ({"name": "a", "quant": 3}, ["quant: ", "3"]),
        ({"name": "Not A Name"}, ["name: ", "'Not A Name'"]),
        ({"name": "../up"}, ["name: "]),
        ({"name": "a", "model": {"architecture": "resnet50"}}, ["model.architecture: ", "'resnet50'"]),
        ({"name": "a", "data": {"preprocess": {"mean": [0.5]}}}, ["data.preprocess: mean has 1 and std has 3 values"]),
        ({"name": "a", "data": {"gate": 1.5}}, ["data.gate"]),
        ({"name": "a", "evaluation": {"latency_batch_sizes": []}}, ["evaluation.latency_batch_sizes: "]),
        ([], ["spec: "]),
        (None, ["spec: "]),
    ],
)
def test_a_mistake_is_named_with_its_key(values: Any, said: list[str]) -> None:
    """The message has the path of the key, what was found and what could stand there."""
    message = refusal(values)
    assert [part for part in said if part not in message] == [], message


def test_all_mistakes_are_said_at_once() -> None:
    """A user mends a file once, not once per mistake."""
    message = refusal({"seed": "x", "quant": {"metod": 1}, "data": {"calibration": 0}})
    assert all(part in message for part in ("name is missing", "seed: ", "quant.metod", "data.calibration: "))


@pytest.mark.parametrize(
    "values", [{"name": "a"}, {"name": "a", "gates": {"min_speedup": None, "max_memory_mib": 300}, "seed": 7}]
)
def test_a_spec_survives_json_and_yaml(values: dict[str, Any]) -> None:
    """The flow's parameter, the file and the stored record are one thing."""
    spec = spec_from(values, origin=ORIGIN)
    assert RunSpec.model_validate_json(spec.model_dump_json()) == spec
    assert spec_from(yaml.safe_load(yaml.safe_dump(spec.model_dump(mode="json"))), origin=ORIGIN) == spec


def test_a_spec_is_frozen() -> None:
    """A step cannot change what the next one reads."""
    spec = spec_from({"name": "a"}, origin=ORIGIN)
    with pytest.raises(ValidationError, match="frozen"):
        spec.quant.method = "qat"  # type: ignore[misc]


def test_every_key_describes_itself_or_is_known() -> None:
    """The form in the Prefect UI and the reference are made of these descriptions."""
    sections = [
        field.annotation for field in RunSpec.model_fields.values() if hasattr(field.annotation, "model_fields")
    ]
    assert len(sections) == 6
    gates = RunSpec.model_fields["gates"].annotation
    assert gates is not None
    assert all(field.description for field in gates.model_fields.values())


def test_a_file_is_read_as_a_mapping(tmp_path: Path) -> None:
    """What is in it is checked by `spec_from`."""
    (tmp_path / "a.yaml").write_text("name: a\nquant: {method: qat}\n")
    assert read_spec(tmp_path / "a.yaml") == {"name": "a", "quant": {"method": "qat"}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"name: [a", r"is not YAML.*Mend the file"),
        (b"name: a\n\tb: c", r"is not YAML"),
        (b"\xff\xfe\x00name", r"is not YAML"),
        (b"gates: {min_speedup: 2}\nname: a\ngates: {}\n", r"is not YAML: gates is given twice"),
        (b"gates: {min_speedup: 2, min_speedup: 1}", r"is not YAML: min_speedup is given twice"),
        (b"- a\n- b\n", r"holds list, not a mapping.*Start with `name:`"),
        (b"", r"holds NoneType, not a mapping"),
        (b"digits", r"holds str, not a mapping"),
        (b"!!python/object/apply:os.system ['true']", r"is not YAML"),
    ],
)
def test_a_file_that_is_no_spec_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    """The message names the file, and no tag in it is ever executed."""
    path = tmp_path / "spec.yaml"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=rf"(?s)spec\.yaml {said}"):
        read_spec(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """A folder is no file either."""
    with pytest.raises(SpecError, match=r"gone\.yaml: No such file.*Name a spec file"):
        read_spec(tmp_path / "gone.yaml")
    with pytest.raises(SpecError, match="Is a directory"):
        read_spec(tmp_path)


def test_what_is_not_said_of_a_limit_stays() -> None:
    """In a file one writes only what differs."""
    given = {"aspect": {"share": 0.5}, "contrast": {"severity": "off"}, "num_calibration": {"low": 7}}
    checks = spec_from({"name": "x", "data": {"checks": given}}, origin="spec").data.checks
    assert checks.aspect == Limit(low=0.35, share=0.5)
    assert (checks.contrast.low, checks.contrast.severity) == (1.0, "off")
    assert (checks.num_calibration.low, checks.num_calibration.severity) == (7, "critical")
    assert checks.entropy == ChecksSpec().entropy
    assert DataSpec.model_validate_json(DataSpec(checks=checks).model_dump_json()).checks == checks


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sharpnes": {"low": 1}}, r"data.checks.sharpnes is not a key \(known: correlation,"),
        ({"unique": {"low": None}}, "data.checks.unique: a limit needs low or high"),
        ({"spread": {"low": 3}}, "data.checks.spread: low 3 is above high 2"),
        ({"aspect": {"share": 2}}, "data.checks.aspect.share: input should be less than or equal to 1"),
        ({"aspect": {"lowest": 2}}, "data.checks.aspect.lowest is not a key"),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused(given: dict[str, Any], words: str) -> None:
    """By its key."""
    with pytest.raises(SpecError, match=words):
        spec_from({"name": "x", "data": {"checks": given}}, origin="spec")


def test_class_names_are_as_many_as_outputs_and_differ() -> None:
    for model in ({"class_names": ["a", "b"], "num_classes": 3}, {"class_names": ["a", "a"]}):
        with pytest.raises(SpecError, match="class_names has"):
            spec_from({"name": "x", "model": model}, origin="spec")
