"""What a run refuses: one clear error with its remedy, and nothing half-written.

Most runs are made in this process, where the error is at hand; a few real commands show what a person sees.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from tasks.contracts.errors import (
    DataError,
    DataRejected,
    ModelError,
    QuantizeError,
    RequantError,
    SpecError,
    StoreError,
)
from tests.disks import mounted

if TYPE_CHECKING:
    from tests.flows.conftest import Ended, Place

Sections = Mapping[str, Mapping[str, Any]]


class Bomb:
    """Makes a folder called `burst` when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("burst",)


def no_images(place: Place) -> Sections:
    for path in (place.path / "shapes").rglob("*.png"):
        path.unlink()
    return {}


def one_class(place: Place) -> Sections:
    shutil.rmtree(place.path / "shapes" / "disc")
    shutil.rmtree(place.path / "shapes" / "square")
    return {}


def a_class_of_two(place: Place) -> Sections:
    for path in sorted((place.path / "shapes" / "disc").iterdir())[2:]:
        path.unlink()
    return {}


def spoilt_files(place: Place) -> Sections:
    first, second, third, *_ = sorted((place.path / "shapes" / "disc").iterdir())
    first.write_bytes(first.read_bytes()[:200])
    second.write_bytes(b"")
    third.write_text("<html>404</html>")
    return {}


def noise(place: Place) -> Sections:
    random = np.random.default_rng(0)
    for path in (place.path / "shapes" / "disc").iterdir():
        Image.fromarray(random.integers(0, 256, (40, 40, 3), np.uint8)).save(path)
    return {}


def pickle_bomb(place: Place) -> Sections:
    (place.path / "bomb.pth").write_bytes(pickle.dumps({"0.weight": Bomb()}))
    return {"model": {"weights": "bomb.pth"}}


def zipped_bomb(place: Place) -> Sections:
    torch.save({"0.weight": Bomb()}, place.path / "bomb.pth")
    return {"model": {"weights": "bomb.pth"}}


def cut_short(place: Place) -> Sections:
    path = place.path / "mobile.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    return {}


def not_a_number(place: Place) -> Sections:
    path = place.path / "mobile.safetensors"
    state = safetensors.torch.load_file(path)
    state["0.weight"][0, 0, 0, 0] = np.nan
    safetensors.torch.save_file(state, path)
    return {}


def branching(place: Place) -> Sections:
    path = place.path / "plain.safetensors"
    state = safetensors.torch.load_file(path)
    of_three_classes = {
        name: tensor[:3].clone() if name.startswith("11.") else tensor for name, tensor in state.items()
    }
    safetensors.torch.save_file({f"layers.{name}": tensor for name, tensor in of_three_classes.items()}, path)
    return {
        "model": {"architecture": "networks:branching", "weights": "plain.safetensors"},
        "data": {"preprocess": {"resize": 32, "mean": [0.5], "std": [0.5]}},
    }


def asked(**sections: Mapping[str, Any]) -> Callable[[Place], Sections]:
    return lambda _: sections


CASES: dict[str, tuple[Callable[[Place], Sections], type[RequantError], str]] = {
    "no images": (no_images, DataError, "shapes holds no images in 3 sub-folders"),
    "no folder": (asked(data={"source": "nowhere"}), DataError, "There is no folder nowhere"),
    "one class": (one_class, DataError, r"shapes holds one class only \(stripes\)"),
    "a class missing in a split": (
        a_class_of_two,
        DataRejected,
        r"missing_classes is 1, not at most 0: train: disc \(no image\), selection: disc",
    ),
    "fewer images than calibration": (
        asked(data={"calibration": 5000}),
        DataError,
        r"ask for 5072 images \(48 gate \+ 24 selection \+ 5000 calibration\), but shapes has 240",
    ),
    "spoilt files": (
        spoilt_files,
        DataRejected,
        r"decodes is 98.75 % of 240 images, not true of all images: disc/00.png \(.*02.png \(is no JPEG",
    ),
    "noise": (noise, DataRejected, r"correlation is 66.67 % of 240 images, not at least 0.2 .*disc/00.png \("),
    "a class that the model has not": (
        asked(model={"class_names": ["disc", "square", "ring"]}),
        DataRejected,
        r"labelled is 66.67 % of 240 images, .*stripes/00.png \(stripes\)",
    ),
    "a forgotten normalisation": (
        asked(data={"preprocess": {"resize": 32, "mean": [127, 127, 127], "std": [50, 50, 50]}}),
        DataRejected,
        "offset is .*; spread is",
    ),
    "crop above the images": (asked(data={"preprocess": {"crop": 64}}), DataError, "less than the crop of 64x64"),
    "no preprocessing": (asked(data={"preprocess": None}), SpecError, "Nothing says how images become the input"),
    "no weights": (asked(model={"weights": None}), ModelError, "model.weights is not given"),
    "missing weights": (asked(model={"weights": "lost.pth"}), ModelError, "lost.pth: No such file"),
    "weights of another network": (
        asked(model={"weights": "plain.safetensors"}),
        ModelError,
        r"plain.safetensors does not fit networks:mobile: \d+ of \d+ tensors are missing",
    ),
    "fewer outputs than classes": (asked(model={"num_classes": 2}), ModelError, "2 outputs and the data 3 classes"),
    "more outputs than classes": (asked(model={"num_classes": 4}), ModelError, "4 outputs and the data 3 classes"),
    "weights cut short": (cut_short, ModelError, "mobile.safetensors cannot be read as tensors alone"),
    "weights with code, pickled": (pickle_bomb, ModelError, "bomb.pth cannot be read as tensors alone"),
    "weights with code, zipped": (zipped_bomb, ModelError, "bomb.pth cannot be read as tensors alone"),
    "weights with NaN": (not_a_number, ModelError, "0.weight in mobile.safetensors holds NaN"),
    "no such network": (asked(model={"architecture": "networks:mobil"}), ModelError, r"close: mobile"),
    "no such module": (asked(model={"architecture": "network:mobile"}), ModelError, "network cannot be imported"),
    "grey images for a colour network": (
        asked(data={"preprocess": {"resize": 32, "mean": [0.5], "std": [0.5]}}),
        ModelError,
        "fails on images of 1x32x32",
    ),
    "a network that cannot be captured": (branching, ModelError, r"cannot capture Branching.*if images.mean\(\) > 0.5"),
    "a layer that is not there": (
        asked(quant={"keep_float": ["features.0.*"]}),
        SpecError,
        r"quant.keep_float: 'features\.0\.\*' matches none of the 6 layers",
    ),
    "a batch above all images": (
        asked(quant={"method": "qat", "search": False, "qat": {"batch_size": 500}}),
        QuantizeError,
        "120 images and one batch takes 500",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_refuses(case: str, place: Place, mobile: dict[str, Any]) -> None:
    """The error is of the right kind, names what is wrong and what to do, and leaves nothing half-done."""
    spoil, kind, words = CASES[case]
    run = place.run(mobile, **spoil(place))
    assert run.state.is_failed()
    assert type(run.error) is kind, run.error
    assert re.search(words, run.error.problem, re.DOTALL)
    assert run.error.remedy
    assert run.state.message is not None
    assert run.error.problem in run.state.message
    assert len([line for line in run.log if run.error.problem in line]) == 1
    assert "Traceback" not in "\n".join(run.log)
    assert place.leftovers() == []
    assert place.records() == []
    assert not (place.path / "burst").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_not_replaced(
    place: Place, mobile: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for CUDA, the run does not fall back to the CPU."""
    monkeypatch.setenv("REQUANT_DEVICE", "cuda")
    run = place.run(mobile)
    assert run.state.is_failed()
    assert "REQUANT_DEVICE is cuda" in str(run.error)
    assert place.records() == []


@pytest.mark.parametrize(
    ("folder", "options", "words"),
    [
        ("store", "size=16k", "No space left on device"),
        ("store", "size=64k", "No space left on device"),
        ("scratch", "size=64k", "No space left on device"),
        ("scratch", "size=800k", "No space left on device"),
        ("store", "ro", "Read-only file system"),
        ("scratch", "ro", "Read-only file system"),
    ],
)
def test_a_disk_that_cannot_be_written_is_one_clear_error(
    folder: str, options: str, words: str, place: Place, mobile: dict[str, Any]
) -> None:
    """Wherever in the run it is met; and the run starts again on a disk with room."""
    with mounted(place.path / folder, options):
        run = place.run(mobile)
        assert run.state.is_failed()
        assert isinstance(run.error, StoreError)
        assert words in run.error.problem
        assert re.search("REQUANT_STORE|REQUANT_SCRATCH|[Cc]heck", run.error.remedy)
        assert "Traceback" not in "\n".join(run.log)
        assert place.leftovers() == []
        assert place.records() == []


def test_a_store_that_is_a_file_is_refused(place: Place, mobile: dict[str, Any]) -> None:
    """The message says that a folder is needed."""
    place.store.write_text("")
    run = place.run(mobile)
    assert isinstance(run.error, StoreError)
    assert "folder" in run.error.remedy


def refusal(end: Ended) -> tuple[str, str]:
    """The one error on standard error, and what stands below it: its remedy."""
    assert "Traceback" not in end.stdout + end.stderr
    (error,) = re.finditer(r"^(?:\w+Error|Rejected): .+$", end.stderr, re.MULTILINE)
    return error.group(), end.stderr[error.end() :]


@pytest.mark.parametrize(
    ("spec", "arguments", "words", "remedy"),
    [
        ("", ("--set", "quant.metod=qat"), "quant.metod is not a key (known: method, ranges,", "Mend"),
        ("", ("--set", "gates.max_top3_drop=1"), "gates.max_top3_drop is not a key (known: max_top1_drop,", "Mend"),
        ("", ("--set", "quant.qat.epochs=many"), "quant.qat.epochs: input should be a valid integer", "Mend"),
        ("", ("--set", "quant.method"), "--set quant.method has no value", "--set key=value"),
        ("", ("--set", "quant.method=[qat"), "[qat is not YAML", "spec file"),
        ("", ("--set", "name.first=x"), "name is not a section", "requant schema"),
        ("", ("--target", "coreml"), "target.runtime: input should be 'onnxruntime'", "Mend"),
        ("", ("--name", "Not/A/Name"), "name: string should match pattern", "Mend"),
        ("name: [", (), "is not YAML", "Mend the file"),
        ("- name", (), "holds list, not a mapping", "name:"),
        ("model: {weights: x.pth}", (), "name is missing", "Mend"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_starts(
    spec: str, arguments: tuple[str, ...], words: str, remedy: str, place: Place
) -> None:
    """Status 1, the key that is wrong, what would be right, and no folder made."""
    if spec:
        (place.path / "plain.yaml").write_text(spec)
    end = place.call("run", "plain.yaml", *arguments)
    error, what_to_do = refusal(end)
    assert end.status == 1
    assert error.startswith("SpecError: ")
    assert words in error
    assert remedy in what_to_do
    assert not place.store.exists()
    assert not place.scratch.exists()


def test_a_setting_that_does_not_fit_is_refused(place: Place) -> None:
    """The environment variable is named as it is written."""
    end = place.call("run", "plain.yaml", REQUANT_DEVICE="gpu")
    error, _ = refusal(end)
    assert end.status == 1
    assert "REQUANT_DEVICE: Input should be 'auto', 'cpu' or 'cuda' (found 'gpu')" in error


def test_a_command_that_fails_in_a_step_ends_with_one_error(place: Place, prefect_server: str) -> None:
    """Status 1; the reason stands last, after Prefect's log."""
    end = place.call("run", "plain.yaml", "--weights", "mobile.safetensors", PREFECT_API_URL=prefect_server)
    error, remedy = refusal(end)
    assert end.status == 1
    assert error.startswith("ModelError: mobile.safetensors does not fit networks:plain")
    assert "another architecture" in remedy
    assert end.stdout == ""
    assert place.leftovers() == []
    assert place.records() == []


def test_a_command_that_a_gate_rejects_ends_with_status_3(after_first: Place, prefect_server: str) -> None:
    """The numbers are in the message, and the report is there to be read."""
    end = after_first.call("run", "plain.yaml", "--set", "gates.min_compression=50", PREFECT_API_URL=prefect_server)
    error, remedy = refusal(end)
    assert end.status == 3
    assert re.fullmatch(r"Rejected: 1 of 5 gates failed: compression 1\.\d+, at least 50 x\.", error)
    assert "report" in remedy
    assert len(list((after_first.store / "models" / "plain" / "runs").glob("*/report.html"))) == 2


def test_a_prefect_server_that_does_not_answer_is_one_error(place: Place) -> None:
    """A server that was configured is not silently replaced by another."""
    end = place.call("run", "plain.yaml", PREFECT_API_URL="http://127.0.0.1:9/api")
    error, remedy = refusal(end)
    assert end.status == 1
    assert "No Prefect server answers" in error
    assert "PREFECT_API_URL" in remedy
