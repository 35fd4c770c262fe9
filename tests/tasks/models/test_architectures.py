from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from tasks.contracts.errors import ModelError
from tasks.contracts.spec import ModelSpec
from tasks.models.architectures import build_model
from tasks.models.origin import architecture_digest

OWN = """
import torch
from own_blocks import WIDTH

NOT_CALLABLE = 3

def net(num_classes, width=WIDTH):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(width, num_classes)).train()

def table(num_classes):
    return {"classes": num_classes}

def broken(num_classes):
    return 1 / 0
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a module of the user's own."""
    before = list(sys.path)
    (tmp_path / "own_net.py").write_text(OWN)
    (tmp_path / "own_blocks.py").write_text("WIDTH = 4\n")
    (tmp_path / "own_spoilt.py").write_text("import not_installed_anywhere\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.path[:] = before
    for name in ("own_net", "own_blocks", "own_spoilt"):
        sys.modules.pop(name, None)


def spec(architecture: str, **arguments: bool | float | str) -> ModelSpec:
    return ModelSpec(architecture=architecture, arguments=arguments)


def outputs(model: nn.Module, side: int = 64) -> torch.Size:
    with torch.no_grad():
        shape: torch.Size = model(torch.zeros(1, 3, side, side)).shape
    return shape


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1"])
def test_a_torchvision_classifier_has_the_classes_asked_for(name: str) -> None:
    """The last layer is sized by num_classes, and the model is in inference mode."""
    model = build_model(spec(f"torchvision:{name}"), 7)
    assert outputs(model) == (1, 7)
    assert not model.training


def test_arguments_reach_the_factory() -> None:
    """What the spec says beside the classes is handed on."""
    model = build_model(spec("torchvision:mobilenet_v2", width_mult=0.35), 3)
    assert sum(parameter.numel() for parameter in model.parameters()) < 500_000


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_classifiers_are_left_out(name: str) -> None:
    """In training mode too the model has one output, and nothing is asked of the user but the normalisation."""
    model = build_model(spec(f"torchvision:{name}", transform_input=True), 5).train()
    assert model(torch.zeros(2, 3, 96, 96)).shape == (2, 5)
    assert not [key for key in model.state_dict() if key.lower().startswith("aux")]


def test_an_input_normalisation_that_is_not_said_is_refused() -> None:
    """Torchvision's own weights of these two want another one than the model's default."""
    with pytest.raises(ModelError, match=r"does not say how its input is normalised.*transform_input"):
        build_model(spec("torchvision:googlenet"), 5)
    with pytest.raises(ModelError, match=r"auxiliary outputs.*Take aux_logits out"):
        build_model(spec("torchvision:inception_v3", transform_input=True, aux_logits=True), 5)


def test_an_unknown_name_brings_close_ones() -> None:
    """A typo is answered with what was probably meant."""
    with pytest.raises(ModelError, match=r"no classifier 'resnet5' \(close: .*resnet50.*\)"):
        build_model(spec("torchvision:resnet5"), 5)


def test_a_detector_is_no_classifier() -> None:
    """Torchvision's other models are unknown here."""
    with pytest.raises(ModelError, match="no classifier 'fasterrcnn_resnet50_fpn'"):
        build_model(spec("torchvision:fasterrcnn_resnet50_fpn"), 5)


@pytest.mark.parametrize("arguments", [{"widht": 2}, {"weights": "DEFAULT"}, {"groups": 7}])
def test_arguments_that_are_not_taken_are_named(arguments: dict[str, int | str]) -> None:
    """The factory's own words are part of the error."""
    with pytest.raises(ModelError, match=r"torchvision:resnet18 cannot be built .*Mend model\.arguments"):
        build_model(spec("torchvision:resnet18", **arguments), 5)


def test_an_own_factory_is_found_in_the_working_directory(folder: Path) -> None:
    """A module beside the user's spec can be named without installing it."""
    model = build_model(spec("own_net:net"), 6)
    assert model(torch.zeros(1, 4)).shape == (1, 6)
    assert not model.training
    assert build_model(spec("own_net:net", width=9), 6)(torch.zeros(1, 9)).shape == (1, 6)


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ("own_nett:net", r"Module own_nett cannot be imported: .*No module named 'own_nett'.*start in the folder"),
        ("own_spoilt:net", r"Module own_spoilt cannot be imported: .*No module named 'not_installed_anywhere'"),
        ("own_net:nett", r"Module own_net .* has no factory 'nett' \(close: net\)"),
        ("own_net:NOT_CALLABLE", r"Module own_net .* has no factory 'NOT_CALLABLE'"),
        ("own_net:table", r"own_net:table returned dict, not a torch\.nn\.Module"),
        ("own_net:broken", r"own_net:broken cannot be built with num_classes=5 and \{\}: ZeroDivisionError"),
    ],
)
def test_an_own_factory_that_cannot_be_used_is_named(folder: Path, architecture: str, said: str) -> None:
    """Each way to be wrong has its own message."""
    with pytest.raises(ModelError, match=said):
        build_model(spec(architecture), 5)


def test_an_own_factory_that_refuses_arguments_is_named(folder: Path) -> None:
    """The argument is in the message."""
    with pytest.raises(ModelError, match=r"own_net:net cannot be built .*unexpected keyword argument 'depth'"):
        build_model(spec("own_net:net", depth=3), 5)


def test_the_digest_follows_the_source_of_an_own_factory(folder: Path) -> None:
    """A change in the module, or in one beside it that it imports, makes another digest."""
    from tasks.stores.steps import _reach

    digests = [architecture_digest("own_net:net")]
    for changed in ("own_net.py", "own_blocks.py", "own_spoilt.py"):
        with (folder / changed).open("a") as file:
            file.write("# changed\n")
        _reach.cache_clear()
        digests.append(architecture_digest("own_net:net"))
    assert len(set(digests)) == 3
    assert digests[2] == digests[3]


def test_the_digest_of_torchvision_is_its_version() -> None:
    """Its code changes with its release alone."""
    assert architecture_digest("torchvision:resnet18").startswith("torchvision 0.")


def test_a_factory_of_ours_has_a_digest() -> None:
    """An installed package is found as well as the working directory."""
    assert len(architecture_digest("tasks.models.digits:digits_net")) == 64
