from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.contracts.records import ArtifactRef, Record
from tasks.stores.base import Store, open_store
from tasks.stores.steps import (
    JSON,
    SOURCES,
    _reach,
    code_digest,
    imports_of,
    installed_versions,
    library_versions,
    once,
    refs_in,
    step_key,
)


class Inner(Record):
    parts: dict[str, tuple[ArtifactRef, ...]]


class Result(Record):
    score: float
    inner: Inner | None = None


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def counting(result: Result) -> tuple[Callable[[], Result], list[int]]:
    calls: list[int] = []

    def compute() -> Result:
        calls.append(1)
        return result

    return compute, calls


def with_artifact(store: Store, tmp_path: Path) -> Result:
    (tmp_path / "a.bin").write_bytes(b"12345")
    return Result(score=1.0, inner=Inner(parts={"x": (store.put(tmp_path / "a.bin", kind="engine"),)}))


def test_a_second_identical_step_is_not_computed(store: Store, tmp_path: Path) -> None:
    """The same step with the same inputs is found, and equal to what was computed."""
    result = with_artifact(store, tmp_path)
    compute, calls = counting(result)
    assert once(store, "score", {"a": 1, "b": [2]}, Result, compute) == (result, False)
    assert once(store, "score", {"b": [2], "a": 1}, Result, compute) == (result, True)
    assert len(calls) == 1


def test_a_step_is_computed_again_if_that_is_asked(store: Store) -> None:
    """What it gives takes the place of what was stored."""
    once(store, "score", {}, Result, lambda: Result(score=1.0))
    assert once(store, "score", {}, Result, lambda: Result(score=2.0), redo=True) == (Result(score=2.0), False)
    assert once(store, "score", {}, Result, lambda: Result(score=3.0)) == (Result(score=2.0), True)


@pytest.mark.parametrize(("step", "inputs"), [("other", {"a": 1}), ("score", {"a": 2}), ("score", {"a": 1, "b": None})])
def test_another_step_or_input_is_computed(store: Store, step: str, inputs: dict[str, int | None]) -> None:
    """Any difference makes another record."""
    compute, calls = counting(Result(score=1.0))
    once(store, "score", {"a": 1}, Result, compute)
    assert once(store, step, inputs, Result, compute)[1] is False
    assert len(calls) == 2


@pytest.mark.parametrize("damage", ["gone", "short"])
def test_a_record_whose_artifact_is_not_whole_is_computed_again(store: Store, tmp_path: Path, damage: str) -> None:
    """An artifact at any depth of the record that is missing or cut short makes the step run."""
    result = with_artifact(store, tmp_path)
    compute, calls = counting(result)
    once(store, "score", {}, Result, compute)
    (artifact,) = refs_in(result)
    stored = tmp_path / "store" / artifact.key
    if damage == "gone":
        stored.unlink()
    else:
        stored.write_bytes(b"1234")
    assert once(store, "score", {}, Result, compute)[1] is False
    assert len(calls) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"record": {"score": "high"}}', '{"record": {"unknown": 1}}'])
def test_a_record_that_cannot_be_read_is_computed_again(store: Store, text: str) -> None:
    """A spoilt document is replaced by a good one."""
    compute, _ = counting(Result(score=1.0))
    once(store, "score", {}, Result, compute)
    (key,) = store.list("steps/")
    store.write_text(key, text)
    assert once(store, "score", {}, Result, compute)[1] is False
    assert once(store, "score", {}, Result, compute)[1] is True


def test_a_failed_step_leaves_no_record(store: Store) -> None:
    """The error comes through and the next run tries again."""

    def fail() -> Result:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        once(store, "score", {}, Result, fail)
    assert store.list("") == []


def test_the_inputs_are_kept_for_diagnosis(store: Store) -> None:
    """The document says by what inputs it was reached."""
    once(store, "score", {"a": [1, {"b": "ä"}]}, Result, lambda: Result(score=1.0))
    (key,) = store.list("steps/score/")
    document = json.loads(store.read_text(key) or "")
    assert document == {
        "step": "score",
        "inputs": {"a": [1, {"b": "ä"}]},
        "record": {"score": 1.0, "inner": None},
    }
    assert key == f"steps/score/{step_key('score', {'a': [1, {'b': 'ä'}]})}.json"


def test_nan_survives_the_store(store: Store) -> None:
    """A metric that could not be measured is found again as NaN, and infinity as itself."""
    for value in (math.nan, math.inf, -math.inf):
        inputs = {"value": str(value)}
        once(store, "score", inputs, Result, lambda value=value: Result(score=value))  # type: ignore[misc]
        found, is_found = once(store, "score", inputs, Result, lambda: Result(score=0.0))
        assert is_found
        assert repr(found.score) == repr(value)


def test_keys_tell_apart_what_differs() -> None:
    """True is not 1, 1 is not 1.0, and a step's name is not part of its inputs."""
    inputs: list[dict[str, JSON]] = [{"a": True}, {"a": 1}, {"a": 1.0}, {"a": "1"}, {"a": [1]}, {"a": None}, {}]
    assert len({step_key("s", each) for each in inputs} | {step_key("t", {})}) == len(inputs) + 1
    with pytest.raises(ValueError, match="not JSON compliant"):
        step_key("s", {"a": math.nan})


def test_keys_do_not_change_between_versions() -> None:
    """A pinned key: a change of the form would silently redo every step of every store."""
    assert step_key("score", {"b": 1.5, "a": ["x", None]}) == (
        "7dd9aa5971b8dcbc1d78b1b8b19eb540482dc63ee9bfdccca37ab581134f41d3"
    )


MODULES = {
    "tasks/__init__.py": "",
    "tasks/top.py": "import os\nimport tasks.mid\nfrom tasks.noun import helper\n",
    "tasks/mid.py": "def f():\n    from tasks.late import g\n    return g()\n",
    "tasks/late.py": "from .cycle import x\n\ndef g(): return x\n",
    "tasks/cycle.py": "import tasks.late\nx = 1\n",
    "tasks/noun/__init__.py": "",
    "tasks/noun/helper.py": "from . import beside\nfrom ..relative import y as z\n",
    "tasks/noun/beside.py": "",
    "tasks/relative.py": "y = 1\n",
    "tasks/alone.py": "raise SystemExit('never executed')\n",
    "flows/__init__.py": "",
    "flows/flow.py": "import tasks.alone\n",
}


def digest_with(folder: Path, module: str, changed: str | None = None) -> str:
    shutil.rmtree(folder, ignore_errors=True)
    for name, text in MODULES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + ("# changed\n" if name == changed else ""))
    _reach.cache_clear()
    return code_digest(module, sources=folder)


@pytest.mark.parametrize(
    ("module", "depends_on"),
    [
        ("tasks.top", {"top", "mid", "late", "cycle", "noun/__init__", "noun/helper", "noun/beside", "relative"}),
        ("tasks.mid", {"mid", "late", "cycle"}),
        ("tasks.noun", {"noun/__init__"}),
        ("tasks.alone", {"alone"}),
    ],
)
def test_a_digest_changes_with_exactly_the_modules_imported(tmp_path: Path, module: str, depends_on: set[str]) -> None:
    """Plain, relative, aliased, cyclic and late imports count; other modules do not."""
    before = digest_with(tmp_path / "tree", module)
    changing = {name for name in MODULES if digest_with(tmp_path / "tree", module, changed=name) != before}
    assert changing == {f"tasks/{name}.py" for name in depends_on}


def test_flows_count_as_ours(tmp_path: Path) -> None:
    """A module of flows is followed into tasks."""
    before = digest_with(tmp_path / "tree", "flows.flow")
    assert digest_with(tmp_path / "tree", "flows.flow", changed="tasks/alone.py") != before


def test_a_digest_is_the_same_in_another_folder(tmp_path: Path) -> None:
    """Where the code lies does not count."""
    assert digest_with(tmp_path / "one", "tasks.top") == digest_with(tmp_path / "two", "tasks.top")


def test_what_is_imported_from_elsewhere_is_told(tmp_path: Path) -> None:
    """Of the module and of all that it imports; ours are not among it."""
    digest_with(tmp_path / "tree", "tasks.top")
    assert imports_of("tasks.top", sources=tmp_path / "tree") == {"os"}
    assert imports_of("tasks.alone", sources=tmp_path / "tree") == set()


def test_a_new_runtime_is_no_reason_to_quantize_again() -> None:
    """Only what opens an engine imports its runtime."""
    ours = {name: "onnxruntime" in imports_of(f"tasks.{name}") for name in ("quantize_model", "score_engine")}
    assert ours == {"quantize_model": False, "score_engine": True}


def test_an_unknown_module_is_refused(tmp_path: Path) -> None:
    """A typo must not give the digest of nothing."""
    with pytest.raises(ModuleNotFoundError, match=r"tasks\.nope"):
        code_digest("tasks.nope")


def test_our_own_modules_are_read_and_not_imported() -> None:
    """The digest of a module that loads torch does not load torch."""
    program = (
        "import sys; from tasks.stores.steps import code_digest; "
        "code_digest('tasks.models.weights'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=SOURCES, timeout=60)
    assert code_digest("tasks.contracts.spec") != code_digest("tasks.contracts.errors")


def test_what_is_not_installed_has_no_version() -> None:
    """And is no error where that is allowed."""
    assert installed_versions("pytest", "no-such-distribution") == library_versions("pytest")


def test_library_versions_are_those_installed() -> None:
    """Versions come by distribution name."""
    assert library_versions("pydantic", "PyYAML").keys() == {"pydantic", "PyYAML"}
    assert library_versions("pydantic")["pydantic"].startswith("2.")
