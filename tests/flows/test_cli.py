"""The command line: what it makes of its options, and what it says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from typer.testing import CliRunner

from flows import cli
from flows.machine import read_env
from tasks.contracts.errors import RequantError
from tasks.contracts.spec import RunSpec
from tests.flows.prefect_server import Installation
from tests.flows.production import free_port

if TYPE_CHECKING:
    from tests.flows.conftest import Place


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[RunSpec]:
    """The specs that commands would have run."""
    specs: list[RunSpec] = []
    monkeypatch.setattr(cli, "_run", specs.append)
    return specs


def call(*arguments: str) -> None:
    result = CliRunner().invoke(cli.app, ["run", *arguments])
    if isinstance(result.exception, RequantError):
        raise result.exception
    assert result.exit_code == 0, result.output


def test_options_go_over_the_file_and_set_goes_over_both(asked: list[RunSpec], tmp_path: Path) -> None:
    """What no option names stays as the file says."""
    file = tmp_path / "spec.yaml"
    file.write_text(
        "name: filed\n"
        "seed: 7\n"
        "model: {architecture: 'torchvision:resnet18', weights: a.pth}\n"
        "data: {source: images, calibration: 100}\n"
    )
    call(str(file), "--weights", "b.pth", "--data", "others", "--set", "data.calibration=9", "--set", "name=last")
    (spec,) = asked
    assert (spec.name, spec.seed) == ("last", 7)
    assert (spec.model.architecture, spec.model.weights) == ("torchvision:resnet18", "b.pth")
    assert (spec.data.source, spec.data.calibration) == ("others", 9)


def test_a_run_starts_its_server_with_the_settings_of_an_installation() -> None:
    """They are written twice, as infra/ is not installed with the package."""
    installed = read_env("server.env").items() | read_env("worker.env").items()
    shared = {name for name, _ in installed} & cli.PREFECT_DEFAULTS.keys()
    assert {(name, cli.PREFECT_DEFAULTS[name]) for name in shared} <= installed
    assert {name for name, _ in installed if "_SERVICES_" in name and "BATCH" in name} <= shared


def test_set_takes_yaml(asked: list[RunSpec]) -> None:
    """Numbers, lists, null, mappings and text with an equals sign in it."""
    call(
        "--name", "x", "--set", "quant.keep_float=[features.0.*, classifier]", "--set", "gates.max_top1_drop=null",
        "--set", "data.preprocess={resize: [48, 64], mean: [0.5], std: [0.25]}", "--set", "quant.search=false",
        "--set", "model.weights=a=b.pth", "--set", "quant.qat.learning_rate=2.0e-5",
    )  # fmt: skip
    (spec,) = asked
    assert spec.quant.keep_float == ("features.0.*", "classifier")
    assert spec.gates.max_top1_drop is None
    assert spec.data.preprocess is not None
    assert (spec.data.preprocess.resize, spec.data.preprocess.std) == ((48, 64), (0.25,))
    assert spec.quant.search is False
    assert spec.model.weights == "a=b.pth"
    assert spec.quant.qat.learning_rate == 2e-5


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("--model", "torchvision:ResNet18"), "resnet18"),
        (("--model", "my.nets:tiny_net"), "tiny_net"),
        (("--model", "torchvision:resnet18", "--name", "mine"), "mine"),
        (("--model", "torchvision:resnet18", "--set", "name=mine"), "mine"),
    ],
)
def test_a_run_without_a_name_is_called_like_its_model(
    arguments: tuple[str, ...], name: str, asked: list[RunSpec]
) -> None:
    """The factory's name, in small letters; a name that is given stands."""
    call(*arguments)
    assert asked[0].name == name


def test_every_mistake_is_told_at_once() -> None:
    """Two wrong keys are one message."""
    with pytest.raises(RequantError, match=r"quant\.methods is not a key.*gates\.min_parity"):
        call("--name", "x", "--set", "quant.methods=qat", "--set", "gates.min_parity=high")


def test_schema_is_the_specs_own(place: Place) -> None:
    """What editors are given is the schema that specs are checked by."""
    end = place.call("schema")
    assert end.status == 0
    assert yaml.safe_load(end.stdout) == RunSpec.model_json_schema()


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(("--help",), 0), (("run", "--help"), 0), ((), 2), (("walk",), 2), (("run", "--wieghts", "x"), 2)],
)
def test_wrong_usage_ends_with_status_2(arguments: tuple[str, ...], status: int, place: Place) -> None:
    """Help is no error; a command or an option that does not exist is one."""
    end = place.call(*arguments)
    assert end.status == status
    assert "Traceback" not in end.stderr
    assert ("Usage" in end.stdout) is (status == 0 or not arguments)


def test_a_folder_of_images_needs_no_file_but_its_preprocessing(place: Place, mobile: dict[str, Any]) -> None:
    """Given with --set, which the refusal of a run without it tells; the run starts a Prefect server of its own."""
    refused = place.run(mobile, data={"preprocess": None})
    assert "--set data.preprocess.resize=224" in refused.log[-2]

    command = (
        "run", "--model", "networks:mobile", "--weights", "mobile.safetensors", "--data", "shapes",
        "--target", "onnxruntime", "--set", "data.calibration=48", "--set", "quant.search=false",
        "--set", "data.checks.num_calibration.low=32",
        "--set", f"evaluation={mobile['evaluation']}", "--set", f"gates={mobile['gates']}".replace("None", "null"),
    )  # fmt: skip
    end = place.call(*command, "--set", "data.preprocess.resize=32")
    assert end.status == 0, end.stderr
    first, engine, report = end.stdout.splitlines()
    assert first == "Passed all 5 gates"
    assert Path(engine.removeprefix("engine: ")).suffix == ".onnx"
    assert Path(engine.removeprefix("engine: ")).is_file()
    assert Path(report.removeprefix("report: ")).is_file()
    assert "/models/mobile/runs/" in report
    assert "Traceback" not in end.stderr
    assert place.leftovers() == []


def test_data_are_checked_by_themselves(place: Place) -> None:
    """Without Prefect; what fails CI has a status of its own, and the page lies where it was asked for."""
    clean = place.call("check-data", "mobile.yaml")
    assert clean.status == 0, clean.stderr
    assert clean.stdout.splitlines()[0].startswith("The data keep all ")
    assert (place.store / "models/mobile/data.html").is_file()

    (place.path / "shapes/disc/00.png").write_text("<html>404</html>")
    end = place.call("check-data", "mobile.yaml", "--report", "data.html", "--set", "model.num_classes=4")
    assert end.status == 3  # whether the model fits can be told of good data only
    assert "critical  decodes: decodes completely" in end.stdout
    assert "    disc/00.png (is no JPEG, PNG" in end.stdout
    assert end.stdout.rstrip().endswith("report: data.html")
    assert "found 99.58 % of 240 images, limit true of all images. Mend or remove" in end.stdout
    assert "disc/00.png" in (place.path / "data.html").read_text()

    (place.path / "shapes/disc/00.png").unlink()
    end = place.call("check-data", "mobile.yaml", "--set", "model.num_classes=4")
    assert end.status == 1
    assert "ModelError: The model has 4 outputs and the data 3 classes." in end.stderr

    end = place.call("check-data", "mobile.yaml", "--report", "nowhere/data.html")
    assert end.status == 1
    assert "StoreError: nowhere/data.html cannot be written" in end.stderr
    assert "Traceback" not in clean.stderr + end.stderr
    assert place.leftovers() == []


@pytest.mark.parametrize(
    ("command", "name", "value", "said"),
    [
        ("run plain.yaml", "REQUANT_BUILD_ON", "build/gpu", "REQUANT_BUILD_ON is not JSON (found 'build/gpu')"),
        ("doctor", "REQUANT_GPU", "first", "REQUANT_GPU: Input should be a valid integer"),
        ("releases plain", "REQUANT_REPORT_URL", "https://me:secret-word@host", "REQUANT_REPORT_URL: String"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(place: Place, command: str, name: str, value: str, said: str) -> None:
    """By its variable's name; what may hold a password is not shown."""
    end = place.call(*command.split(), **{name: value})
    assert (end.status, end.stdout) == (1, "")
    assert said in end.stderr
    assert "Traceback" not in end.stderr
    assert "secret-word" not in end.stderr


def test_a_server_with_a_password_is_told(place: Place, tmp_path: Path) -> None:
    """Its health needs none, and everything else does: by commands that run something and by those that ask."""
    (place.path / "fleet.yaml").write_text("models: [{spec: plain.yaml}]")
    password = {"PREFECT_SERVER_API_AUTH_STRING": "admin:secret-word", "PREFECT_HOME": str(tmp_path)}
    server = Installation(tmp_path, free_port(), {**os.environ, **read_env("server.env"), **password})
    try:
        server.start_server()
        for command in (("run", "plain.yaml"), ("run-all",), ("deploy",)):
            end = place.call(*command, PREFECT_API_URL=server.url)
            assert end.status == 1
            assert "was refused (401)" in end.stderr
            assert "Set PREFECT_API_AUTH_STRING" in end.stderr
            assert "Traceback" not in end.stderr
    finally:
        server.stop("server")


def test_ages_that_no_calendar_has_are_wrong_usage(place: Place) -> None:
    """They are refused before anything is looked at."""
    end = place.call("gc", "--keep-days", "1e12")
    assert end.status == 2
    assert "Traceback" not in end.stderr
