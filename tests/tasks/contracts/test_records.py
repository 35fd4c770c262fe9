from __future__ import annotations

import inspect
import math
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from pydantic import ValidationError

from tasks.contracts import records
from tasks.contracts.records import Accuracy, ArtifactRef, Latency, QuantizedRecord, Record, Verdict
from tasks.contracts.spec import PreprocessSpec

REF = ArtifactRef(key="objects/engine/ab.onnx", sha256="ab", size_bytes=3)
KINDS = [kind for _, kind in inspect.getmembers(records, inspect.isclass) if issubclass(kind, Record)]


st.register_type_strategy(PreprocessSpec, st.just(PreprocessSpec()))  # has a rule that drawn values would break


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.settings(max_examples=15, suppress_health_check=[hypothesis.HealthCheck.too_slow])
@hypothesis.given(drawn=st.data())
def test_every_record_survives_json(kind: type[Record], drawn: st.DataObject) -> None:
    """Any record that can be made is equal to what is read back, NaN and infinity included."""
    record = drawn.draw(st.builds(kind))
    again = kind.model_validate_json(record.model_dump_json())
    assert repr(again) == repr(record)  # NaN is not equal to itself, but looks the same


def test_nan_is_still_nan_for_the_gate() -> None:
    """A measurement that failed is seen as such after it was stored."""
    verdict = Verdict(gate="g", metric="m", unit="", limit=math.inf, measured=math.nan, passed=False)
    again = Verdict.model_validate_json(verdict.model_dump_json())
    assert again.measured is not None
    assert math.isnan(again.measured)
    assert again.limit == math.inf


def test_nested_tuples_and_references_come_back_as_such() -> None:
    """Lists of JSON become tuples again, at every depth."""
    accuracy = Accuracy(
        num_images=2, top1=50.0, top1_interval=(1.0, 2.0), top5=100.0, top5_interval=(3.0, 4.0),
        recall=(None, 50.0), confusion=((1, 0), (1, 0)), predictions=REF,
    )  # fmt: skip
    assert Accuracy.model_validate_json(accuracy.model_dump_json()) == accuracy


@pytest.mark.parametrize(
    "values",
    [
        {"key": "a", "sha256": "b"},
        {"key": "a", "sha256": "b", "size_bytes": 3, "colour": "red"},
        {"key": "a", "sha256": "b", "size_bytes": "three"},
    ],
)
def test_a_record_of_another_form_is_refused(values: dict[str, Any]) -> None:
    """A missing, unknown or mistyped field is never guessed."""
    with pytest.raises(ValidationError):
        ArtifactRef.model_validate(values)


def test_records_are_frozen() -> None:
    """What was measured stays."""
    with pytest.raises(ValidationError, match="frozen"):
        REF.sha256 = "cd"  # type: ignore[misc]


@pytest.mark.parametrize("kind", [Latency, QuantizedRecord])
def test_no_field_has_a_default(kind: type[Record]) -> None:
    """A step that forgets to measure fails at once."""
    assert all(field.is_required() for field in kind.model_fields.values())
