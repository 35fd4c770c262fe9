"""Quantization-aware training: the simulated model learns from the float model's answers, scales included.

The graph is the inference graph with batch norm folded, so what is trained is what is exported; there is no batch norm
to freeze and no dropout. Distillation follows Hinton et al., Distilling the Knowledge in a Neural Network (2015). Steps
leave some activations exact: whole tensors, where Wei et al., QDrop (ICLR 2022), draw single values.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name that everyone gives it
from torch import Tensor, nn
from torch.fx import GraphModule

from tasks.contracts.errors import QuantizeError
from tasks.contracts.records import Epoch
from tasks.contracts.spec import PreprocessSpec, QatSpec
from tasks.quant.capture import read_tensor
from tasks.quant.fake_quantize import Mode, floored_together, left_exact, simulated_together
from tasks.quant.group import Group
from tasks.quant.simulate import Simulation
from tasks.stores.workspace import replacing

Progress = Callable[[int, int], None]
_CHECKPOINT = "checkpoint.pt"


class Images(Protocol):
    """What training needs of a split."""

    @property
    def preprocess(self) -> PreprocessSpec: ...
    def __len__(self) -> int: ...
    def batches_uint8(
        self, batch_size: int, *, order: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]: ...


def train(
    simulation: Simulation,
    teacher: GraphModule,
    images: Images,
    selection: Images,
    spec: QatSpec,
    *,
    seed: int,
    device: torch.device,
    folder: Path,
    group: Group | None = None,
    progress: Progress | None = None,
) -> tuple[Epoch, ...]:
    """Train a calibrated simulation in place and leave it at its best epoch, judged by the loss on `selection`.

    Args:
        teacher: the float graph.
        folder: keeps the teacher's answers and the state after each epoch; a killed training goes on from there.
        group: the processes that train together, each of which calls this; the first one's folder has the state.
        progress: is told steps done of all steps.

    Raises:
        QuantizeError: if there is nothing to train on, the processes cannot share a batch, or the loss is not finite.
    """
    group = group or Group()
    if spec.batch_size % group.size:
        raise QuantizeError(
            f"A batch of {spec.batch_size} images cannot be shared by {group.size} processes.",
            remedy="Make quant.qat.batch_size a multiple of their number.",
        )
    if len(images) < spec.batch_size:
        raise QuantizeError(
            f"Training has {len(images)} images and one batch takes {spec.batch_size}.",
            remedy="Give more data, lower quant.qat.batch_size, or use quant.method: ptq.",
        )
    trainer = Trainer(simulation, teacher, images, selection, spec, seed, device, folder, group)
    with simulation.mode(Mode.SIMULATE):
        while not trainer.finished:
            trainer.run_epoch(progress)
    trainer.take_best()
    return tuple(trainer.history)


class Trainer:
    """One training; everything that must survive a kill is in `state`."""

    def __init__(
        self,
        simulation: Simulation,
        teacher: GraphModule,
        images: Images,
        selection: Images,
        spec: QatSpec,
        seed: int,
        device: torch.device,
        folder: Path,
        group: Group | None = None,
    ) -> None:
        self._group = group or Group()
        self._graph = simulation.graph.to(device)
        for parameter in self._graph.parameters():
            if parameter.dim() == 4:  # of all of a module's tensors, torch would do it to those of Conv3d too, and fail
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self._images, self._selection, self._spec, self._seed = images, selection, spec, seed
        self._feed = Feed(images.preprocess, device)
        self._folder = folder
        num_views = spec.views if spec.mirror or spec.shift else 1
        self._views = [Views.make(number, len(images), spec) for number in range(num_views)]
        path = folder / "selection.npy"
        with self._group.first_here_first():
            self._answers_VNC = answers(teacher, images, self._feed, spec, folder / "train.npy", num_views=num_views)
            self._selection_answers_VNC = answers(teacher, selection, self._feed, spec, path, num_views=num_views)
        named = list(self._graph.named_parameters())
        self._scales: list[Tensor] = [parameter for name, parameter in named if name.endswith("log_scale")]
        self._weights: list[Tensor] = [parameter for name, parameter in named if not name.endswith("log_scale")]
        self._parameters: list[Tensor] = [*self._weights, *self._scales]
        self._quantized = {
            layer.weight_quantizer: read_tensor(self._graph, layer.weight) for layer in simulation.layers
        }
        weight_scales = {id(quantizer.log_scale) for quantizer in self._quantized}
        owners = simulation.quantizers()
        self._activation_scales = [scale for scale in self._scales if id(scale) not in weight_scales]
        self._activations = simulation.activations()
        limited = [owner for owner in owners if owner.largest_scale < math.inf]
        self._limited: list[Tensor] = [owner.log_scale for owner in limited]
        self._highest = [math.log(owner.largest_scale) for owner in limited]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": self._weights, "peak": spec.learning_rate, "weight_decay": spec.weight_decay},
                {"params": self._scales, "peak": spec.scale_learning_rate, "weight_decay": 0.0},
            ],
            fused=True,
        )
        self._average = [parameter.detach().clone() for parameter in self._parameters]
        self._best = [parameter.detach().clone() for parameter in self._parameters]
        self.history: list[Epoch] = []
        self._resume()

    @property
    def finished(self) -> bool:
        losses = [epoch.selection_loss for epoch in self.history]
        since_best = len(losses) - 1 - losses.index(min(losses)) if losses else 0
        return len(losses) >= self._spec.epochs or since_best >= self._spec.patience

    def run_epoch(self, progress: Progress | None) -> None:
        started, number, group = time.monotonic(), len(self.history), self._group
        random = np.random.default_rng([self._seed, number])  # so a resumed epoch sees what it would have seen
        order = random.permutation(len(self._images))
        steps = len(order) // self._spec.batch_size  # a short last batch would weigh its images more
        order = order[: steps * self._spec.batch_size]
        view_N = group.share(random.integers(len(self._views), size=len(order)))
        order, batch_size = group.share(order), self._spec.batch_size // group.size
        mirrored_N = np.array([views.mirrored_N for views in self._views])[view_N, order]
        views = Views(mirrored_N, np.array([views.moves_N2 for views in self._views])[view_N, order])
        losses: list[Tensor] = []
        for step, (pixels_NHWC, labels_N) in enumerate(self._images.batches_uint8(batch_size, order=order)):
            part = slice(step * batch_size, (step + 1) * batch_size)
            rate = schedule((number * steps + step) / (self._spec.epochs * steps), self._spec.warmup)
            answers_NC = self._answers_VNC[view_N[part], order[part]]
            losses.append(self.step(views[part].of(pixels_NHWC), labels_N, answers_NC, rate, random))
            if progress:
                progress(number * steps + step + 1, self._spec.epochs * steps)
        with self._swapped(self._average):
            selection_loss, top1 = self._score_selection()
        (loss,) = group.total([float(torch.stack(losses).mean()) / group.size], self._feed.device)
        if not math.isfinite(loss + selection_loss):
            raise QuantizeError(
                f"The loss of epoch {number + 1} is {loss}, and {selection_loss} on the selection images.",
                remedy="Lower quant.qat.learning_rate or scale_learning_rate.",
            )
        if all(selection_loss < epoch.selection_loss for epoch in self.history):
            self._best = [tensor.clone() for tensor in self._average]
        self.history.append(
            Epoch(
                epoch=number + 1,
                loss=loss,
                selection_loss=selection_loss,
                selection_top1=top1,
                learning_rate=self._spec.learning_rate * rate,
                seconds=time.monotonic() - started,
            )
        )
        self._save()

    def step(
        self,
        pixels_NHWC: np.ndarray,
        labels_N: np.ndarray,
        answers_NC: np.ndarray,
        rate: float,
        random: np.random.Generator,
    ) -> Tensor:
        """Learn from one batch at `rate` of the peak rates, and give its loss, which stays on the device.

        Args:
            random: draws the activations that stay exact, the same in each process.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        order = random.permutation(len(self._activations))
        drawn = [self._activations[number] for number in order]
        num_exact = int(self._spec.drop * len(drawn))
        floored = [quantizer for quantizer in drawn[num_exact:] if quantizer.is_floored]
        with simulated_together(self._quantized), left_exact(drawn[:num_exact]), floored_together(floored):
            loss = self._loss(self._feed(pixels_NHWC), labels_N, answers_NC)
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self._average_gradients()
        nn.utils.clip_grad_norm_(self._parameters, self._spec.gradient_clip)
        self._optimizer.step()
        with torch.no_grad():
            if self._limited:
                torch._foreach_clamp_max_(self._limited, self._highest)
            torch._foreach_lerp_(self._average, self._parameters, 1.0 - self._spec.ema_decay)
        return loss.detach()

    def _average_gradients(self) -> None:
        """What one process would have had for the whole batch."""
        self._group.average([parameter.grad for parameter in self._parameters if parameter.grad is not None])
        if self._group.size > 1:  # each was shrunk for the values of its own share (LSQ, section 2.2)
            gradients = [scale.grad for scale in self._activation_scales if scale.grad is not None]
            torch._foreach_mul_(gradients, self._group.size**-0.5)

    def _loss(
        self, images_NCHW: Tensor, labels_N: np.ndarray, answers_NC: np.ndarray, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        device = images_NCHW.device
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits_NC = self._graph(images_NCHW)
        return distillation_loss(
            logits_NC.to(dtype),
            torch.from_numpy(np.array(answers_NC)).to(device, dtype),
            torch.from_numpy(labels_N).to(device),
            self._spec,
        )

    @torch.no_grad()
    def _score_selection(self) -> tuple[float, float]:
        """Loss and top-1 in percent."""
        loss, right, start = 0.0, 0, 0
        mine = self._group.share(np.arange(len(self._selection)))
        for pixels_NHWC, labels_N in self._selection.batches_uint8(self._spec.batch_size, order=mine):
            answers_NC = self._selection_answers_VNC[0, mine[start : start + len(labels_N)]]
            images_NCHW = self._feed(pixels_NHWC)
            # Near the teacher the loss is a small difference of large numbers: float32 has few digits of it.
            loss += float(self._loss(images_NCHW, labels_N, answers_NC, torch.float64)) * len(labels_N)
            right += int((self._graph(images_NCHW).argmax(1).cpu().numpy() == labels_N).sum())
            start += len(labels_N)
        loss, top1 = self._group.total([loss, 100.0 * right], self._feed.device)
        return loss / len(self._selection), top1 / len(self._selection)

    @contextmanager
    def _swapped(self, values: list[Tensor]) -> Iterator[None]:
        """The parameters hold `values` for as long as the block lasts."""
        before = [parameter.detach().clone() for parameter in self._parameters]
        self._write(values)
        yield
        self._write(before)

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        torch._foreach_copy_(self._parameters, values)

    def take_best(self) -> None:
        self._write(self._best)

    def _save(self) -> None:
        if self._group.rank > 0:
            return
        state = {
            "parameters": [parameter.detach() for parameter in self._parameters],
            "average": self._average,
            "best": self._best,
            "optimizer": self._optimizer.state_dict(),
            "history": [epoch.model_dump() for epoch in self.history],
        }
        buffer = io.BytesIO()  # a full disk is an OSError when we write, and an unreadable one when torch does
        torch.save(state, buffer)
        with replacing(self._folder / _CHECKPOINT) as partial:
            partial.write_bytes(buffer.getbuffer())

    def _resume(self) -> None:
        device = self._average[0].device
        stored = self._group.from_first(self._folder / _CHECKPOINT, device)
        if stored is None:
            return
        state = torch.load(io.BytesIO(stored), weights_only=True, map_location=device)
        self._write(state["parameters"])
        self._average, self._best = state["average"], state["best"]
        self._optimizer.load_state_dict(state["optimizer"])
        self.history = [Epoch.model_validate(epoch) for epoch in state["history"]]


@dataclass(frozen=True)
class Views:
    """How each of some images is looked at: one of a few ways, the first of which is as it is."""

    mirrored_N: np.ndarray  # bool
    moves_N2: np.ndarray  # pixels down and right

    @classmethod
    def make(cls, number: int, count: int, spec: QatSpec) -> Views:
        """The same at every call, so that the teacher and the student see the same."""
        if number == 0:
            return cls(np.zeros(count, bool), np.zeros((count, 2), int))
        random = np.random.default_rng([number, count])
        mirrored_N = np.full(count, spec.mirror and number % 2 == 1)
        return cls(mirrored_N, random.integers(-spec.shift, spec.shift, (count, 2), endpoint=True))

    def __getitem__(self, part: slice) -> Views:
        return Views(self.mirrored_N[part], self.moves_N2[part])

    def of(self, pixels_NHWC: np.ndarray) -> np.ndarray:
        """The images so seen, uint8 NHWC; what moves in repeats the edge."""
        height, width = pixels_NHWC.shape[1:3]
        seen_NHWC = np.empty_like(pixels_NHWC)
        views = zip(pixels_NHWC, self.mirrored_N, self.moves_N2, strict=True)
        for number, (pixels_HWC, mirrored, (down, right)) in enumerate(views):
            rows = np.clip(np.arange(height) - down, 0, height - 1)
            columns = np.clip(np.arange(width) - right, 0, width - 1)
            seen_NHWC[number] = pixels_HWC[rows][:, columns[::-1] if mirrored else columns]
        return seen_NHWC


@dataclass(frozen=True)
class Feed:
    """Pixels to model inputs on the training device, channels last."""

    preprocess: PreprocessSpec
    device: torch.device

    def __call__(self, pixels_NHWC: np.ndarray) -> Tensor:
        images_NCHW = torch.from_numpy(pixels_NHWC).to(self.device).permute(0, 3, 1, 2).float().div_(255.0)
        mean, std = (
            torch.tensor(values, device=self.device).reshape(-1, 1, 1)
            for values in (self.preprocess.mean, self.preprocess.std)
        )
        return images_NCHW.sub_(mean).div_(std)


@torch.no_grad()
def answers(
    teacher: GraphModule, images: Images, feed: Feed, spec: QatSpec, path: Path, *, num_views: int
) -> np.ndarray:
    """The teacher's logits for each view of each image, float16 [V, N, C], on disk.

    Computed once, so that distillation costs a training step nothing.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        teacher = teacher.to(feed.device)
        all_views = [Views.make(number, len(images), spec) for number in range(num_views)]
        parts: list[np.ndarray] = []
        start = 0
        for pixels_NHWC, labels_N in images.batches_uint8(spec.batch_size):
            part = slice(start, start + len(labels_N))
            logits_VNC = torch.stack([teacher(feed(views[part].of(pixels_NHWC))) for views in all_views])
            parts.append(logits_VNC.half().cpu().numpy())
            start += len(labels_N)
        with replacing(path) as unfinished, unfinished.open("wb") as file:
            np.save(file, np.concatenate(parts, axis=1), allow_pickle=False)
    stored: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return stored


def distillation_loss(logits_NC: Tensor, answers_NC: Tensor, labels_N: Tensor, spec: QatSpec) -> Tensor:
    """Divergence from the teacher at a temperature, and cross entropy with the labels, by their weights."""
    soft = F.kl_div(
        F.log_softmax(logits_NC / spec.temperature, 1),
        F.log_softmax(answers_NC / spec.temperature, 1),
        reduction="batchmean",
        log_target=True,
    )
    loss = spec.distillation * spec.temperature**2 * soft
    if spec.distillation < 1.0:
        loss = loss + (1.0 - spec.distillation) * F.cross_entropy(logits_NC, labels_N)
    return loss


def schedule(progress: float, warmup: float) -> float:
    """Share of the peak rate: a linear rise over `warmup`, then half a cosine down to zero."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (progress - warmup) / (1.0 - warmup)))
