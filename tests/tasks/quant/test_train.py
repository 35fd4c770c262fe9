"""As a program, `test_train.py FOLDER` trains there and kills itself; with --together it trains beside others."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tasks.contracts.errors import QuantizeError
from tasks.contracts.records import Epoch
from tasks.contracts.spec import PreprocessSpec, QatSpec, QuantSpec
from tasks.data.images import ImageSet
from tasks.data.preprocess import normalise
from tasks.quant.calibrate import Progress, calibrate
from tasks.quant.capture import capture, fold_batch_norm
from tasks.quant.fake_quantize import FakeQuantizer, Mode
from tasks.quant.group import Group, joined
from tasks.quant.schemes import SCHEMES
from tasks.quant.simulate import Simulation, simulate
from tasks.quant.train import Feed, Views, answers, distillation_loss, schedule, train

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
PREPROCESS = PreprocessSpec(mean=(0.5,), std=(0.25,))
SPEC = QatSpec(epochs=3, batch_size=16, learning_rate=1e-3, scale_learning_rate=1e-2, shift=2, ema_decay=0.5)
STEPS = 4  # in an epoch


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums come out the same in this process and in the one that is killed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def image_set(count: int, *, seed: int, wrong: bool = False) -> ImageSet:
    """Grey noise with a bright stripe whose place is the class."""
    random = np.random.default_rng(seed)
    labels_N = random.integers(0, 4, count)
    pixels_NHWC = random.integers(0, 128, (count, 16, 16, 1), np.uint8)
    for pixels_HWC, label in zip(pixels_NHWC, labels_N, strict=True):
        pixels_HWC[4 * label : 4 * label + 4] += 100
    return ImageSet(pixels_NHWC, np.arange(count), (labels_N + wrong) % 4, PREPROCESS, ("a", "b", "c", "d"))


TRAIN, SELECTION = image_set(STEPS * 16 + 5, seed=1), image_set(40, seed=2)


@functools.cache
def teacher() -> GraphModule:
    """A small float graph; its weights are random, which is all that distillation needs."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish(),
        nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.AdaptiveAvgPool2d((4, 1)), nn.Flatten(), nn.Linear(32, 4),
    ).train()  # fmt: skip
    for _ in range(5):
        model(tensors_of(TRAIN))
    graph = capture(model, torch.zeros(2, 1, 16, 16))
    fold_batch_norm(graph)
    return graph


def tensors_of(images: ImageSet) -> Tensor:
    return torch.from_numpy(normalise(images.pixels(slice(None)), images.preprocess))


def badly_calibrated() -> Simulation:
    """A tenth of all values is cut off, so that there is something to learn."""
    simulation = simulate(teacher(), SCHEMES["onnxruntime"], frozenset())
    calibrate(simulation, lambda: [tensors_of(TRAIN)], QuantSpec(ranges="percentile", percentile=90))
    return simulation


def trained(
    folder: Path,
    spec: QatSpec = SPEC,
    *,
    seed: int = 0,
    images: ImageSet = TRAIN,
    selection: ImageSet = SELECTION,
    progress: Progress | None = None,
) -> tuple[Simulation, tuple[Epoch, ...]]:
    simulation = badly_calibrated()
    history = train(
        simulation, teacher(), images, selection, spec, seed=seed, device=CPU, folder=folder, progress=progress
    )
    return simulation, history


def state_of(simulation: Simulation) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in simulation.graph.state_dict().items()}


def is_equal(one: Simulation, other: Simulation) -> bool:
    return all(torch.equal(tensor, state_of(other)[name]) for name, tensor in state_of(one).items())


def without_times(history: tuple[Epoch, ...]) -> list[Epoch]:
    return [epoch.model_copy(update={"seconds": 0.0}) for epoch in history]


@torch.no_grad()
def logits(graph: GraphModule, images: ImageSet) -> Tensor:
    answer: Tensor = graph(tensors_of(images))
    return answer


def distance(simulation: Simulation) -> float:
    """From the teacher, on the selection images as they are."""
    with simulation.mode(Mode.SIMULATE) as graph:
        found = logits(graph, SELECTION)
    return float((found - logits(teacher(), SELECTION)).square().mean())


def test_training_brings_the_simulation_to_its_teacher(tmp_path: Path) -> None:
    """Weights and every scale but the image's learn, the loss falls, and the teacher stays as it was."""
    before, teacher_before = badly_calibrated(), copy.deepcopy(teacher().state_dict())
    spec = SPEC.model_copy(update={"epochs": 8})
    simulation, history = trained(tmp_path, spec)
    assert distance(simulation) < distance(before) / 2
    assert history[-1].selection_loss < history[0].selection_loss
    learnt = {name for name, tensor in state_of(simulation).items() if not torch.equal(tensor, state_of(before)[name])}
    all_names = {name for name, tensor in state_of(simulation).items() if tensor.is_floating_point()}
    assert all_names - learnt == {"activation_post_process_0.log_scale"}
    assert all(torch.equal(tensor, teacher_before[name]) for name, tensor in teacher().state_dict().items())
    assert {quantizer.mode for quantizer in simulation.quantizers()} == {Mode.SIMULATE}


class Volume(nn.Module):
    """A Conv3d on what a Conv2d gives."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.deep, self.head = nn.Conv2d(1, 4, 3, 2), nn.Conv3d(4, 4, (1, 3, 3)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.deep(self.flat(x).relu().unsqueeze(2)).relu()
        return self.head(y.mean((2, 3, 4)))  # type: ignore[no-any-return]


def test_three_dimensional_convolutions_are_trained(tmp_path: Path) -> None:
    """Channels last is a layout of images and their kernels alone."""
    torch.manual_seed(0)
    graph = capture(Volume(), torch.zeros(2, 1, 16, 16))
    simulation = simulate(graph, SCHEMES["onnxruntime"], frozenset())
    calibrate(simulation, lambda: [tensors_of(TRAIN)], QuantSpec(ranges="percentile", percentile=90))
    before = {name: tensor.clone() for name, tensor in state_of(simulation).items()}
    train(simulation, graph, TRAIN, SELECTION, SPEC, seed=0, device=CPU, folder=tmp_path)
    learnt = {name for name, tensor in state_of(simulation).items() if not torch.equal(tensor, before[name])}
    assert {"flat.weight", "deep.weight", "head.weight"} <= learnt
    assert simulation.graph.get_parameter("flat.weight").is_contiguous(memory_format=torch.channels_last)


def test_scale_behind_relu6_never_covers_more_than_it(tmp_path: Path) -> None:
    """Wherever training would like to have it."""
    simulation = badly_calibrated()
    limited = [quantizer for quantizer in simulation.quantizers() if quantizer.largest_scale < float("inf")]
    for quantizer in simulation.activations():
        quantizer.set_range(torch.zeros(1), torch.full((1,), 100.0))
    train(simulation, teacher(), TRAIN, SELECTION, SPEC, seed=0, device=CPU, folder=tmp_path)
    assert len(limited) == 1
    tops = [quantizer.covered()[1] for quantizer in simulation.activations()]
    assert sorted(tops)[0] == limited[0].covered()[1] <= 6.00001
    assert sorted(tops)[1] > 50


def test_history_tells_each_epoch(tmp_path: Path) -> None:
    """Numbered from one, the rate as scheduled, and progress told step by step."""
    told: list[tuple[int, int]] = []
    _, history = trained(tmp_path, progress=lambda done, total: told.append((done, total)))
    assert [epoch.epoch for epoch in history] == [1, 2, 3]
    assert told == [(step + 1, 3 * STEPS) for step in range(3 * STEPS)]
    for epoch in history:
        last = epoch.epoch * STEPS - 1
        assert epoch.learning_rate == pytest.approx(1e-3 * schedule(last / (3 * STEPS), SPEC.warmup))
        assert 0 <= epoch.selection_top1 <= 100


def test_same_seed_gives_the_same_bits(tmp_path: Path) -> None:
    """And another seed does not."""
    first, first_history = trained(tmp_path / "first")
    second, second_history = trained(tmp_path / "second")
    other, _ = trained(tmp_path / "other", seed=1)
    assert without_times(first_history) == without_times(second_history)
    assert is_equal(first, second)
    assert not is_equal(first, other)


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_each_step_leaves_other_activations_exact(drop: float, tmp_path: Path) -> None:
    """As many as asked in every step, and none where the epoch is judged."""
    simulation = badly_calibrated()
    activations, seen, steps = simulation.activations(), list[FakeQuantizer](), list[frozenset[int]]()
    exact = list[FakeQuantizer]()
    for quantizer in activations:
        quantizer.register_forward_hook(
            lambda module, _inputs, _output: (seen if module.mode is Mode.SIMULATE else exact).append(module)
        )

    def progress(_done: int, _of: int) -> None:
        steps.append(frozenset(map(id, exact)))
        exact.clear()
        seen.clear()

    spec = SPEC.model_copy(update={"epochs": 1, "drop": drop})
    train(simulation, teacher(), TRAIN, SELECTION, spec, seed=0, device=CPU, folder=tmp_path, progress=progress)
    assert [len(step) for step in steps] == [int(drop * len(activations))] * STEPS
    assert (len(set(steps)) > 1) == bool(drop)
    assert set(seen) == set(activations)  # after the last step, in scoring
    assert not exact


def test_killed_training_goes_on_where_it_was(tmp_path: Path) -> None:
    """Killed for real in the second epoch, then finished: bit for bit what it would have been."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, __file__, str(tmp_path / "killed")], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "killed").glob(".*.partial")] == []
    told: list[int] = []
    resumed, resumed_history = trained(tmp_path / "killed", progress=lambda done, _: told.append(done))
    whole, whole_history = trained(tmp_path / "whole")
    assert told[0] == STEPS + 1  # the first epoch is not done again
    assert without_times(resumed_history) == without_times(whole_history)
    assert is_equal(resumed, whole)


def test_finished_training_is_not_done_again(tmp_path: Path) -> None:
    """A step that was killed after the last epoch takes the best one and is done."""
    first, history = trained(tmp_path)
    told: list[int] = []
    again, again_history = trained(tmp_path, progress=lambda done, _: told.append(done))
    assert told == []
    assert again_history == history
    assert is_equal(first, again)


def test_training_stops_early_and_takes_the_best_epoch(tmp_path: Path) -> None:
    """Selection images with wrong labels: the better the training, the worse their loss."""
    spec = SPEC.model_copy(update={"distillation": 0.0, "learning_rate": 3e-3, "epochs": 20, "patience": 2})
    wrong = image_set(40, seed=2, wrong=True)
    simulation, history = trained(tmp_path, spec, selection=wrong)
    losses = [epoch.selection_loss for epoch in history]
    best = losses.index(min(losses))
    assert len(history) == best + 1 + spec.patience < spec.epochs
    with simulation.mode(Mode.SIMULATE) as graph:
        found = nn.functional.cross_entropy(logits(graph, wrong), torch.from_numpy(wrong.labels))
    assert float(found) == pytest.approx(min(losses), rel=1e-4)
    assert float(found) != pytest.approx(losses[-1], rel=1e-4)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_average_of_the_weights_follows_its_decay(decay: float, tmp_path: Path) -> None:
    """Without decay it is the weights themselves; with it, it lags behind."""
    trained(tmp_path, SPEC.model_copy(update={"ema_decay": decay}))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    pairs = list(zip(state["average"], state["parameters"], strict=True))
    assert all(torch.equal(average, parameter) for average, parameter in pairs) == (decay == 0.0)


@pytest.mark.parametrize("change", [{"learning_rate": 3e38}, {"scale_learning_rate": 1e4}])
def test_loss_that_is_not_finite_is_refused(change: dict[str, float], tmp_path: Path) -> None:
    """With what to lower; the broken epoch is not stored."""
    with pytest.raises(QuantizeError, match=r"loss of epoch 1 is .*(nan|inf)") as caught:
        trained(tmp_path, SPEC.model_copy(update=change))
    assert "learning_rate" in caught.value.remedy
    assert not (tmp_path / "checkpoint.pt").exists()


def test_fewer_images_than_a_batch_are_refused(tmp_path: Path) -> None:
    """There would be no step."""
    with pytest.raises(QuantizeError, match="Training has 15 images and one batch takes 16"):
        trained(tmp_path, images=image_set(15, seed=1))
    assert list(tmp_path.iterdir()) == []


def test_answers_are_the_teachers_for_each_view(tmp_path: Path) -> None:
    """In half precision: the image as it is, its mirror, and so on, as the student will see them."""
    answers_VNC = answers(teacher(), SELECTION, Feed(PREPROCESS, CPU), SPEC, tmp_path / "own.npy", num_views=3)
    assert answers_VNC.dtype == np.float16
    for number, answers_NC in enumerate(answers_VNC):
        seen_NHWC = Views.make(number, len(SELECTION), SPEC).of(SELECTION.pixels(slice(None)))
        np.testing.assert_allclose(answers_NC, logits(teacher(), replaced(seen_NHWC)), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(answers_VNC[0], logits(teacher(), SELECTION), rtol=1e-3, atol=1e-3)


def replaced(pixels_NHWC: np.ndarray) -> ImageSet:
    return dataclasses.replace(SELECTION, pixels_NHWC=pixels_NHWC)


def test_teacher_is_asked_once(tmp_path: Path) -> None:
    """What is stored is read, whoever asks."""
    feed, path = Feed(PREPROCESS, CPU), tmp_path / "deep" / "answers.npy"
    stored_VNC = np.array(answers(teacher(), SELECTION, feed, SPEC, path, num_views=2))
    nobody = torch.fx.symbolic_trace(nn.Identity())
    np.testing.assert_array_equal(answers(nobody, SELECTION, feed, SPEC, path, num_views=2), stored_VNC)


def test_views_mirror_and_move_pixels() -> None:
    """Down and right by whole pixels; the edge repeats where nothing comes in."""
    pixels_HWC = np.arange(9, dtype=np.uint8).reshape(3, 3, 1)
    views = Views(np.array([False, True, False, True]), np.array([[0, 0], [0, 0], [1, -1], [-2, 1]]))
    seen_NHW = views.of(np.stack([pixels_HWC] * 4))[..., 0]
    assert seen_NHW.tolist() == [
        [[0, 1, 2], [3, 4, 5], [6, 7, 8]],
        [[2, 1, 0], [5, 4, 3], [8, 7, 6]],
        [[1, 2, 2], [1, 2, 2], [4, 5, 5]],
        [[7, 6, 6], [7, 6, 6], [7, 6, 6]],
    ]
    assert views[1:3].of(np.stack([pixels_HWC] * 2))[..., 0].tolist() == seen_NHW[1:3].tolist()


def test_views_are_made_as_the_spec_says() -> None:
    """The first as it is, every other one mirrored, all moved by up to the shift, and the same at each call."""
    first, mirrored, moved = (Views.make(number, 500, SPEC) for number in range(3))
    assert not first.mirrored_N.any()
    assert not first.moves_N2.any()
    assert mirrored.mirrored_N.all()
    assert not moved.mirrored_N.any()
    for views in (mirrored, moved):
        assert set(np.unique(views.moves_N2)) == {-2, -1, 0, 1, 2}
    assert not np.array_equal(mirrored.moves_N2, moved.moves_N2)
    np.testing.assert_array_equal(moved.moves_N2, Views.make(2, 500, SPEC).moves_N2)
    still = Views.make(1, 500, SPEC.model_copy(update={"mirror": False, "shift": 0}))
    assert not still.mirrored_N.any()
    assert not still.moves_N2.any()


def test_feed_is_the_preprocessing_of_everything_else() -> None:
    """The same numbers as inference sees, channels last."""
    colour = PreprocessSpec()
    pixels_NHWC = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), np.uint8)
    fed_NCHW = Feed(colour, CPU)(pixels_NHWC)
    np.testing.assert_allclose(fed_NCHW.numpy(), normalise(pixels_NHWC, colour), rtol=1e-5, atol=1e-6)
    assert fed_NCHW.is_contiguous(memory_format=torch.channels_last)


def test_loss_is_zero_for_the_teachers_own_answer() -> None:
    """And grows with the distance; labels count by what distillation leaves."""
    answers_NC, labels_N = torch.randn(8, 5), torch.randint(5, (8,))
    near_NC, far_NC = answers_NC + 0.1 * torch.randn(8, 5), answers_NC + torch.randn(8, 5)
    pure = QatSpec(distillation=1.0)
    assert float(distillation_loss(answers_NC + 3, answers_NC, labels_N, pure)) == pytest.approx(0, abs=1e-6)
    near, far = (float(distillation_loss(logits_NC, answers_NC, labels_N, pure)) for logits_NC in (near_NC, far_NC))
    assert 0 < near < far / 10
    labels_only = QatSpec(distillation=0.0)
    entropy = float(nn.functional.cross_entropy(far_NC, labels_N))
    assert float(distillation_loss(far_NC, answers_NC, labels_N, labels_only)) == pytest.approx(entropy)
    mixed = float(distillation_loss(far_NC, answers_NC, labels_N, QatSpec(distillation=0.25)))
    assert mixed == pytest.approx(0.25 * far + 0.75 * entropy, rel=1e-5)


def test_loss_is_the_divergence_at_the_temperature() -> None:
    """By definition, in float64."""
    student_C, teacher_C = np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, 3.0])
    p, q = (np.exp(logits_C / 4) / np.exp(logits_C / 4).sum() for logits_C in (teacher_C, student_C))
    found = distillation_loss(
        torch.tensor(student_C)[None], torch.tensor(teacher_C)[None], torch.tensor([0]), QatSpec(temperature=4)
    )
    assert float(found) == pytest.approx(16 * (p * np.log(p / q)).sum())


def test_rate_rises_and_falls() -> None:
    """A line up to the peak, half a cosine down to nothing."""
    assert [schedule(progress, 0.1) for progress in (0, 0.05, 0.1)] == pytest.approx([0, 0.5, 1])
    assert [schedule(progress, 0.1) for progress in (0.55, 1)] == pytest.approx([0.5, 0])
    assert schedule(0, 0) == 1


def test_two_processes_train_what_one_would(tmp_path: Path) -> None:
    """Real processes, gradients averaged: the same parameters up to the order of float sums, in both of them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, __file__, str(tmp_path / "two"), "--together"], check=True, env=environment, cwd=ROOT)
    one, history = trained(tmp_path / "one")
    alone = {name: tensor for name, tensor in state_of(one).items() if tensor.is_floating_point()}
    for rank in range(2):
        found = torch.load(tmp_path / "two" / f"{rank}.pt", weights_only=True)
        for name, tensor in alone.items():
            torch.testing.assert_close(found["state"][name], tensor, rtol=1e-4, atol=1e-5)
        assert found["losses"] == pytest.approx([epoch.selection_loss for epoch in history], rel=1e-4)
    assert not torch.equal(*(tensor_of(state_of(simulation)) for simulation in (one, badly_calibrated())))


def tensor_of(state: dict[str, Tensor]) -> Tensor:
    """Everything in one."""
    return torch.cat([tensor.flatten().float() for tensor in state.values()])


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    """Before anything is trained."""
    with pytest.raises(QuantizeError, match="16 images cannot be shared by 3 processes"):
        train(
            badly_calibrated(), teacher(), TRAIN, SELECTION, SPEC,
            seed=0, device=CPU, folder=tmp_path, group=Group(rank=0, size=3),
        )  # fmt: skip


def together(folder: Path) -> None:
    """One of several processes; each leaves what it has in the end."""
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    with joined(CPU) as group:
        simulation = badly_calibrated()
        history = train(
            simulation, teacher(), TRAIN, SELECTION, SPEC, seed=0, device=CPU, folder=folder, group=group
        )  # fmt: skip
        found = {"state": state_of(simulation), "losses": [epoch.selection_loss for epoch in history]}
        torch.save(found, folder / f"{group.rank}.pt")


def main(folder: Path) -> None:
    """Train until the middle of the second epoch, then die without a word."""

    def kill(done: int, _total: int) -> None:
        if done == STEPS + 2:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    folder.mkdir()
    trained(folder, progress=kill)


if __name__ == "__main__":
    (together if "--together" in sys.argv else main)(Path(sys.argv[1]))
