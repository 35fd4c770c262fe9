"""Weights in and out of a model. What comes in is checked as a whole before the model is touched."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from tasks.contracts.errors import ModelError
from tasks.models.architectures import AUXILIARY
from tasks.models.origin import TORCHVISION, unreadable, weights_file
from tasks.stores.workspace import replacing

WRAPPERS = ("state_dict", "model_state_dict", "model", "ema")  # the first that is there is taken
_PREFIX = re.compile(r"^(module\.|_orig_mod\.)+")  # of DistributedDataParallel, AveragedModel and torch.compile
_OLD_DENSENET = re.compile(r"(\.denselayer\d+\.(?:norm|conv))\.(\d\.)")  # torchvision's files say norm.1 for norm1
_COUNTERS = ("num_batches_tracked", "n_averaged")  # older files lack the first, averaging adds the second
_NUM_NAMED = 3


def load_weights(model: nn.Module, weights: str | None, architecture: str) -> None:
    """Fill `model` from a .safetensors or .pth file, or from torchvision's weights of that name.

    Raises:
        ModelError: if there are none, they cannot be read as tensors alone, do not fit, or are not finite.
    """
    if weights is None:
        raise ModelError(
            f"{architecture} has no weights, so there is nothing to preserve.",
            remedy="Set model.weights to a .safetensors or .pth file, or to a torchvision weights name.",
        )
    path = weights_file(weights)
    stored = _torchvision_state(architecture, weights) if path is None else _read(path)
    expected = model.state_dict()
    state = _renamed(_unwrapped(stored, weights), expected, architecture)
    problems = "; ".join(_misfits(state, expected))
    if problems:
        raise ModelError(f"{weights} does not fit {architecture}: {problems}.", remedy=_hint(state, expected))
    for name, tensor in state.items():
        if not torch.isfinite(tensor.to(expected[name].dtype)).all():
            raise ModelError(f"{name} in {weights} holds NaN or infinity.", remedy="Take an earlier checkpoint.")
    model.load_state_dict(state, strict=False)  # counters aside, all names were compared above


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the model's tensors as safetensors. Equal models give equal bytes; shared tensors are written twice."""
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
    with replacing(path) as partial:
        safetensors.torch.save_file(state, partial)


def _read(path: Path) -> object:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, weights_only=True, map_location="cpu")
    except OSError as error:
        raise unreadable(path, error) from error
    except Exception as error:  # a spoilt file makes the unpickler fail in any way
        raise ModelError(
            f"{path} cannot be read as tensors alone: {str(error).partition(chr(10))[0]}",
            remedy="It is cut short, or holds other objects, which are never run; "
            "save model.state_dict() with torch.save or safetensors.",
        ) from error


def _torchvision_state(architecture: str, weights: str) -> Mapping[str, Tensor]:
    home, _, name = architecture.partition(":")
    if home != TORCHVISION:
        raise ModelError(
            f"There is no file {weights}, and {architecture} has no weights by name.",
            remedy="Set model.weights to a .safetensors or .pth file.",
        )
    known = [member.name for member in torchvision.models.get_model_weights(name)]
    if weights not in [*known, "DEFAULT"]:
        raise ModelError(
            f"There is no file {weights}, and {architecture} has no weights of that name.",
            remedy=f"Set model.weights to a file, or to one of {', '.join(known)}.",
        )
    try:
        state: Mapping[str, Tensor] = torchvision.models.get_model(name, weights=weights, progress=False).state_dict()
    except (OSError, RuntimeError) as error:  # no network; a download whose digest is wrong
        raise ModelError(
            f"{weights} of {architecture} cannot be downloaded: {error}.",
            remedy="Download it elsewhere and set model.weights to the file.",
        ) from error
    return state


def _unwrapped(stored: object, weights: str) -> dict[str, Tensor]:
    """The tensors by name, out of what training scripts put around them."""
    while isinstance(stored, Mapping):
        inner = next((stored[key] for key in (*WRAPPERS, "module") if isinstance(stored.get(key), Mapping)), None)
        if inner is None:
            break
        stored = inner
    if not isinstance(stored, Mapping) or not stored:
        raise ModelError(
            f"{weights} holds {type(stored).__name__}, not tensors by name.", remedy="Save model.state_dict()."
        )
    for name, value in stored.items():
        if not isinstance(value, Tensor):
            raise ModelError(
                f"{weights} holds {type(value).__name__} under {name!r}, not a tensor; "
                f"tensors are looked for at the top and under {', '.join(WRAPPERS)}.",
                remedy="Save model.state_dict().",
            )
    return dict(stored)


def _renamed(state: dict[str, Tensor], expected: Mapping[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """The names that the model uses, without what no model needs."""
    unused = AUXILIARY.get(architecture.removeprefix(f"{TORCHVISION}:"), ())
    renamed = {name if name in expected else _own_name(name): tensor for name, tensor in state.items()}
    return {
        name: tensor
        for name, tensor in renamed.items()
        if name in expected or not (name.startswith(unused) or name.endswith(_COUNTERS))
    }


def _own_name(name: str) -> str:
    return _OLD_DENSENET.sub(r"\1\2", _PREFIX.sub("", name))


def _misfits(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Iterator[str]:
    missing = [name for name in expected if name not in state and not name.endswith(_COUNTERS)]
    unexpected = [name for name in state if name not in expected]
    reshaped = [
        f"{name} is {_shape(state[name])}, not {_shape(expected[name])}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    if missing:
        yield f"{len(missing)} of {len(expected)} tensors are missing ({_first(missing)})"
    if unexpected:
        yield f"{len(unexpected)} of {len(state)} are unknown to it ({_first(unexpected)})"
    if reshaped:
        yield f"{len(reshaped)} differ in shape ({_first(reshaped)})"


def _hint(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Only the last layer differs when the classes do."""
    reshaped = [name for name in expected if name in state and state[name].shape != expected[name].shape]
    if state.keys() == expected.keys() and len({name.rpartition(".")[0] for name in reshaped}) == 1:
        return "They were trained on another number of classes: check model.num_classes and the data."
    return "They look like weights for another architecture or other model.arguments."


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _first(names: list[str]) -> str:
    return ", ".join(names[:_NUM_NAMED]) + (", ..." if len(names) > _NUM_NAMED else "")
