from __future__ import annotations

import math
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from tasks.contracts.errors import ModelError
from tasks.models.origin import weights_digest, weights_file
from tasks.models.weights import load_weights, save_weights

NAME = "mine:net"


def a_net(num_classes: int = 3, *, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, num_classes)).eval()


def same(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight


@pytest.mark.parametrize("make", [a_net, Tied, lambda: torchvision.models.get_model("mobilenet_v3_small")])
def test_saved_weights_come_back(tmp_path: Path, make: type[nn.Module]) -> None:
    """Saving and loading gives the same tensors, shared ones too."""
    model, other = make(), make()
    save_weights(model, tmp_path / "w.safetensors")
    load_weights(other, str(tmp_path / "w.safetensors"), NAME)
    assert same(model, other)


def test_equal_models_give_equal_bytes(tmp_path: Path) -> None:
    """The file's digest says whether the weights changed."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        save_weights(a_net(seed=seed), tmp_path / f"{name}.safetensors")
    digests = [weights_digest(str(tmp_path / f"{name}.safetensors")) for name in "abc"]
    assert digests[0] == digests[1] != digests[2]


def test_tensors_laid_out_in_another_order_are_saved(tmp_path: Path) -> None:
    """Channels-last and transposed tensors have a file like any other."""
    model = a_net().to(memory_format=torch.channels_last)
    model[3].weight = nn.Parameter(torch.randn(8, 3).t())
    save_weights(model, tmp_path / "w.safetensors")
    other = a_net(seed=1)
    load_weights(other, str(tmp_path / "w.safetensors"), NAME)
    assert same(model, other)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}},
        lambda state: {"model": state, "args": None},
        lambda state: {"model_state_dict": state},
        lambda state: {"ema": state},
        lambda state: {"ema": {"module": state, "updates": 5}},
        lambda state: {"module." + key: value for key, value in state.items()},
        lambda state: {"_orig_mod." + key: value for key, value in state.items()},
        lambda state: {"model": {"_orig_mod.module." + key: value for key, value in state.items()}},
        lambda state: {"n_averaged": torch.tensor(7)} | {"module." + key: value for key, value in state.items()},
        lambda state: {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")},
    ],
    ids=[
        "plain", "state_dict", "model", "model_state_dict", "ema", "ema.module",
        "parallel", "compiled", "compiled and parallel", "averaged", "before counters",
    ],
)  # fmt: skip
def test_what_training_scripts_wrap_around_is_taken_off(tmp_path: Path, wrap: type[dict[str, object]]) -> None:
    """Checkpoints of the usual forms give the model's own tensors."""
    model, other = a_net(), a_net(seed=1)
    torch.save(wrap(model.state_dict()), tmp_path / "w.pth")
    load_weights(other, str(tmp_path / "w.pth"), NAME)
    assert same(model, other)


def test_a_real_wrapper_of_torch_is_taken_off(tmp_path: Path) -> None:
    """AveragedModel saves what the reference scripts of torchvision save as model_ema."""
    model, other = a_net(), a_net(seed=1)
    torch.save({"model": torch.optim.swa_utils.AveragedModel(model).state_dict()}, tmp_path / "w.pth")
    load_weights(other, str(tmp_path / "w.pth"), NAME)
    assert same(model, other)


def test_a_model_whose_own_layer_is_called_module_loads(tmp_path: Path) -> None:
    """A prefix is taken off only from names that the model does not have."""
    model, other = (nn.Sequential() for _ in range(2))
    for each in (model, other):
        each.add_module("module", nn.Linear(2, 2))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    load_weights(other, str(tmp_path / "w.pth"), NAME)
    assert same(model, other)


def test_a_densenet_file_with_its_old_names_loads(tmp_path: Path) -> None:
    """Torchvision publishes DenseNet with norm.1 where the model says norm1."""
    model, other = (torchvision.models.get_model("densenet121", num_classes=2) for _ in range(2))
    state = model.state_dict()
    old = {key.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): value for key, value in state.items()}
    assert old.keys() != state.keys()
    torch.save(old, tmp_path / "w.pth")
    load_weights(other, str(tmp_path / "w.pth"), "torchvision:densenet121")
    assert same(model, other)


def test_the_auxiliary_tensors_of_a_file_are_left_out(tmp_path: Path) -> None:
    """Torchvision's file holds classifiers that serve training only; the model is built without them."""
    full = torchvision.models.get_model("googlenet", num_classes=2, init_weights=False)
    model = torchvision.models.get_model("googlenet", num_classes=2, init_weights=False, aux_logits=False)
    torch.save(full.state_dict(), tmp_path / "w.pth")
    load_weights(model, str(tmp_path / "w.pth"), "torchvision:googlenet")
    assert torch.equal(model.fc.weight, full.fc.weight)


def test_half_precision_is_loaded_as_the_models(tmp_path: Path) -> None:
    """The model keeps its own type."""
    model = a_net()
    torch.save(a_net(seed=1).half().state_dict(), tmp_path / "w.pth")
    load_weights(model, str(tmp_path / "w.pth"), NAME)
    assert model[0].weight.dtype == torch.float32


def test_a_file_url_names_a_file(tmp_path: Path) -> None:
    """file:// with percent-encoding is the same as the path."""
    path = tmp_path / "my weights.safetensors"
    model, other = a_net(), a_net(seed=1)
    save_weights(model, path)
    load_weights(other, path.as_uri(), NAME)
    assert same(model, other)
    assert weights_digest(path.as_uri()) == weights_digest(str(path))


def test_no_weights_are_refused() -> None:
    """A model without weights has nothing to preserve."""
    with pytest.raises(ModelError, match=r"mine:net has no weights.*Set model\.weights"):
        load_weights(a_net(), None, NAME)


def refusal(path: Path, stored: object, model: nn.Module | None = None) -> str:
    """What is said about a file, after which the model must be untouched."""
    torch.save(stored, path)
    model = a_net() if model is None else model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError) as caught:
        load_weights(model, str(path), NAME)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return str(caught.value)


def test_another_architecture_is_recognised(tmp_path: Path) -> None:
    """Missing and unknown tensors are both counted, and the first are named."""
    message = refusal(tmp_path / "w.pth", nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).state_dict())
    assert "4 of 9 tensors are missing (1.running_mean, 1.running_var, 3.weight, ...)" in message
    assert "2 differ in shape (0.weight is 2x2, not 2x1x3x3, 1.weight is 2x2, not 2)" in message
    assert "weights for another architecture" in message


def test_unknown_tensors_are_named(tmp_path: Path) -> None:
    """Nothing in the file is dropped silently."""
    message = refusal(tmp_path / "w.pth", {**a_net().state_dict(), "head.weight": torch.zeros(1)})
    assert "1 of 10 are unknown to it (head.weight)" in message


def test_another_number_of_classes_is_recognised(tmp_path: Path) -> None:
    """Only the last layer differs, so the message speaks of classes."""
    message = refusal(tmp_path / "w.pth", a_net(5).state_dict())
    assert "2 differ in shape (3.weight is 5x8, not 3x8, 3.bias is 5, not 3)" in message
    assert "check model.num_classes" in message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    """The tensor is named: a run that diverged is not worth quantizing."""
    state = {name: tensor.clone() for name, tensor in a_net().state_dict().items()}
    state["1.running_var"][1] = value
    assert "1.running_var in" in refusal(tmp_path / "w.pth", state)


def test_a_value_too_large_for_the_model_is_refused(tmp_path: Path) -> None:
    """A float64 that becomes infinite in float32 is as bad as an infinite one."""
    state: Mapping[str, Tensor] = {name: tensor.double() for name, tensor in a_net().state_dict().items()}
    state["3.bias"][0] = 1e300
    assert "3.bias in" in refusal(tmp_path / "w.pth", state)


@pytest.mark.parametrize("stored", [[1, 2], {}, torch.zeros(3), {"epoch": 3}, {"state_dict": {"a": "b"}}])
def test_a_file_without_tensors_by_name_is_refused(tmp_path: Path, stored: object) -> None:
    """The message says what was found instead."""
    assert "Save model.state_dict()" in refusal(tmp_path / "w.pth", stored)


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("form", ["torch", "torch before 1.6", "pickle"])
def test_a_file_that_runs_code_is_refused_and_runs_nothing(tmp_path: Path, form: str) -> None:
    """The code inside would create a file."""
    target, path = tmp_path / "executed", tmp_path / "w.pth"
    bomb = {"state_dict": Bomb(target)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(bomb))
    else:
        torch.save(bomb, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(ModelError, match=r"cannot be read as tensors alone.*never run"):
        load_weights(a_net(), str(path), NAME)
    assert not target.exists()
    if form == "pickle":  # the bomb is live: plain pickle sets it off
        pickle.loads(path.read_bytes())
        assert target.exists()


def test_a_whole_pickled_model_is_refused(tmp_path: Path) -> None:
    """torch.save(model) stores code by reference."""
    torch.save(a_net(), tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"save model\.state_dict\(\)"):
        load_weights(a_net(), str(tmp_path / "w.pth"), NAME)


@pytest.mark.parametrize("name", ["w.pth", "old.pth", "w.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_file_cut_short_is_refused(tmp_path: Path, name: str, share: float) -> None:
    """Wherever the file ends too early, the message is ours."""
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_weights(a_net(), path)
    else:
        torch.save(a_net().state_dict(), path, _use_new_zipfile_serialization=name == "w.pth")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ModelError, match=f"{name} cannot be read as tensors alone"):
        load_weights(a_net(), str(path), NAME)


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    """Text, an archive and one format under the other's name."""
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    with zipfile.ZipFile(tmp_path / "archive.pth", "w") as archive:
        archive.writestr("a.txt", "hello")
    safetensors.torch.save_file(a_net().state_dict(), tmp_path / "safe.pth")
    torch.save(a_net().state_dict(), tmp_path / "torch.safetensors")
    for path in tmp_path.iterdir():
        with pytest.raises(ModelError, match=f"{path.name} cannot be read as tensors alone"):
            load_weights(a_net(), str(path), NAME)


@pytest.mark.parametrize("name", ["gone.pth", "gone.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    """The path and the setting are in the message."""
    for action in (lambda path: load_weights(a_net(), path, NAME), weights_digest):
        with pytest.raises(ModelError, match=rf"{name}: No such file.*Set model\.weights"):
            action(str(tmp_path / name))


def test_a_folder_is_no_weights_file(tmp_path: Path) -> None:
    """The reason of the system is in the message."""
    for name in ("a.safetensors", "a.pth"):
        (tmp_path / name).mkdir()
        with pytest.raises(ModelError, match=name):
            load_weights(a_net(), str(tmp_path / name), NAME)


@pytest.mark.parametrize("url", ["https://example.org/w.pth", "gs://bucket/w.pth"])
def test_other_urls_are_not_fetched(url: str) -> None:
    """Weights from elsewhere are downloaded by the user, who knows whom to trust."""
    with pytest.raises(ModelError, match=r"is not loaded from there.*Download it"):
        load_weights(a_net(), url, NAME)


def test_a_name_that_torchvision_does_not_know_is_refused() -> None:
    """The names that exist are listed."""
    with pytest.raises(ModelError, match=r"no weights of that name.*IMAGENET1K_V1, IMAGENET1K_V2"):
        load_weights(a_net(), "IMAGENET1K_V3", "torchvision:resnet50")
    with pytest.raises(ModelError, match="mine:net has no weights by name"):
        load_weights(a_net(), "IMAGENET1K_V1", NAME)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torchvision keeps downloads; empty, with a network that answers nothing."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_without_a_network_a_file_is_asked_for(hub: Path) -> None:
    """A download that fails says what to do instead."""
    model = torchvision.models.get_model("squeezenet1_1")
    with pytest.raises(ModelError, match=r"cannot be downloaded.*set model\.weights to the file"):
        load_weights(model, "DEFAULT", "torchvision:squeezenet1_1")
    assert list(hub.iterdir()) == []


def test_weights_by_name_are_loaded_from_torchvisions_own_folder(hub: Path) -> None:
    """DEFAULT and the member's name give the tensors of the downloaded file."""
    published = torchvision.models.get_model("squeezenet1_1")
    url = torchvision.models.get_model_weights("squeezenet1_1")["DEFAULT"].url
    torch.save(published.state_dict(), hub / Path(url).name)
    for name in ("DEFAULT", "IMAGENET1K_V1"):
        model = torchvision.models.get_model("squeezenet1_1")
        load_weights(model, name, "torchvision:squeezenet1_1")
        assert same(model, published)


def test_a_name_is_not_a_file_unless_it_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare word means torchvision's weights; a file of that name goes first."""
    monkeypatch.chdir(tmp_path)
    assert weights_file("DEFAULT") is None
    assert weights_file("DEFAULT.pth") == Path("DEFAULT.pth")
    (tmp_path / "DEFAULT").write_bytes(b"")
    assert weights_file("DEFAULT") == Path("DEFAULT")
