"""Processes that train one model together, each on its share of every batch (data parallel).

All hold the same parameters and, with their gradients averaged, take the same steps; so what they train is what one
process would have trained, up to the order of float sums.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """A process among `size` of them; alone by default."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those on this machine

    def share(self, rows_N: np.ndarray) -> np.ndarray:
        """Every `size`-th of the rows, so that a part of each share is a part of the whole; N divides by `size`."""
        return rows_N[self.rank :: self.size]

    def average(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its mean over all processes, in one message."""
        if self.size > 1:
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            dist.all_reduce(flat)
            means = torch.split(flat.div_(self.size), [tensor.numel() for tensor in tensors])
            for tensor, mean in zip(tensors, means, strict=True):
                tensor.copy_(mean.view(tensor.shape))

    def total(self, numbers: list[float], device: torch.device) -> list[float]:
        """Sums over all processes, the same in each."""
        values = torch.tensor(numbers, dtype=torch.float64, device=device)
        if self.size > 1:
            dist.all_reduce(values)
        return [float(value) for value in values]

    def from_first(self, path: Path, device: torch.device) -> bytes | None:
        """The file as the first process has it, which may be the only one that does; None if it has none."""
        content = path.read_bytes() if self.rank == 0 and path.exists() else None
        if self.size == 1:
            return content
        length = torch.tensor(-1 if content is None else len(content), device=device)
        dist.broadcast(length, 0)
        if length < 0:
            return None
        received = torch.empty(int(length), dtype=torch.uint8, device=device)
        if content is not None:
            received.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        dist.broadcast(received, 0)
        return received.cpu().numpy().tobytes()

    @contextmanager
    def first_here_first(self) -> Iterator[None]:
        """One process of each machine goes through the block before the others do."""
        if self.size > 1 and self.local_rank > 0:
            dist.barrier()
        yield
        if self.size > 1 and self.local_rank == 0:
            dist.barrier()


@contextmanager
def joined(device: torch.device) -> Iterator[Group]:
    """The processes that torchrun has started, this one among them."""
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Group(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))
    finally:
        dist.destroy_process_group()
