"""From the name of an architecture to a float model without weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from types import ModuleType
from typing import Any

import torchvision
from torch import nn

from tasks.contracts.errors import ModelError
from tasks.contracts.spec import ModelSpec
from tasks.models.origin import TORCHVISION, working_folder_on_path

AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}
"""Tensors of the classifiers that help training only. They are left out: a quantized model has one output."""


def build_model(spec: ModelSpec, num_classes: int) -> nn.Module:
    """The architecture with `num_classes` outputs and arbitrary weights, in inference mode.

    Raises:
        ModelError: if there is no such architecture, or it does not take the arguments.
    """
    home, _, name = spec.architecture.partition(":")
    factory = find_architecture(spec.architecture)
    arguments = _torchvision_arguments(name, spec.arguments) if home == TORCHVISION else dict(spec.arguments)
    try:
        model = factory(num_classes=num_classes, **arguments)
    except Exception as error:
        raise ModelError(
            f"{spec.architecture} cannot be built with num_classes={num_classes} and {arguments}: {_said(error)}.",
            remedy="Mend model.arguments, or the factory.",
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{spec.architecture} returned {type(model).__name__}, not a torch.nn.Module.",
            remedy="Let the factory return the model.",
        )
    return model.eval()


def num_outputs(spec: ModelSpec, class_names: Sequence[str]) -> int:
    """One for each class of the data: more would be answers that no class can be.

    Raises:
        ModelError: if the spec wants another number.
    """
    if spec.num_classes not in (None, len(class_names)):
        raise ModelError(
            f"The model has {spec.num_classes} outputs and the data {len(class_names)} classes.",
            remedy="Give data with the model's classes, in the same order, or leave model.num_classes out.",
        )
    return len(class_names)


def find_architecture(architecture: str) -> Callable[..., Any]:
    """The factory behind a name, not yet called: cheap enough to ask before any image is read.

    Raises:
        ModelError: if there is none.
    """
    home, _, name = architecture.partition(":")
    return _torchvision_factory(name) if home == TORCHVISION else _own_factory(home, name)


def _torchvision_factory(name: str) -> Callable[..., Any]:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ModelError(
            f"torchvision {torchvision.__version__} has no classifier {name!r}{_close(name, known)}.",
            remedy="Set model.architecture to torchvision:<name>, or to module:factory for your own.",
        )
    builder: Callable[..., Any] = torchvision.models.get_model_builder(name)
    return builder


def _torchvision_arguments(name: str, arguments: dict[str, bool | int | float | str]) -> dict[str, Any]:
    if name not in AUXILIARY:
        return {"weights": None, **arguments}
    if "transform_input" not in arguments:
        raise ModelError(
            f"torchvision:{name} does not say how its input is normalised.",
            remedy="Set transform_input in model.arguments: true for weights that come from torchvision's own, "
            "false for weights trained from scratch.",
        )
    if arguments.get("aux_logits", False):
        raise ModelError(
            f"torchvision:{name} has auxiliary outputs, which only serve training.",
            remedy="Take aux_logits out of model.arguments.",
        )
    return {"weights": None, "init_weights": False, **arguments, "aux_logits": False}


def _own_factory(module_name: str, name: str) -> Callable[..., Any]:
    module = _own_module(module_name)
    factory = getattr(module, name, None)
    if not callable(factory):
        known = [key for key, value in vars(module).items() if callable(value)]
        raise ModelError(
            f"Module {module_name} ({module.__file__}) has no factory {name!r}{_close(name, known)}.",
            remedy="Set model.architecture to module:factory.",
        )
    return factory  # type: ignore[no-any-return]


def _own_module(name: str) -> ModuleType:
    """Imported like `python -m` would: the working directory counts, behind everything installed."""
    here = working_folder_on_path()
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ModelError(
            f"Module {name} cannot be imported: {_said(error)}.",
            remedy=f"Install it, or start in the folder that holds it (now {here}).",
        ) from error


def _close(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, list(known))
    return f" (close: {', '.join(close)})" if close else ""


def _said(error: Exception) -> str:
    """A foreign error in one line."""
    return f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(".: ")
