"""Which layers are better left float: the few that cost most accuracy, within a budget of computation.

A greedy search. Layers differ widely in what INT8 costs them (Dong et al., HAWQ, ICCV 2019); what decides here is the
error of the logits with a layer float and all others INT8, on calibration images. Where no layer saves enough, two are
tried together: what lies between them is INT8 as long as one of them is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import combinations

import torch
from torch import Tensor
from torch.fx import GraphModule

from tasks.quant.calibrate import costly_tensors
from tasks.quant.capture import WEIGHTED, layer_of, read_tensor
from tasks.quant.fake_quantize import FakeQuantizer, Mode
from tasks.quant.simulate import SimulatedLayer, Simulation, simulate

_GAIN = 0.25  # of the squared error that is left: what each layer must save to stay float
_TOGETHER = 2  # layers that are tried at once where one alone does not save enough
_ENOUGH = 0.003  # of the logits' variance: an error that flips about one answer in a hundred


@torch.no_grad()
def layers_better_float(
    folded: GraphModule, simulation: Simulation, images_NCHW: Tensor, kept: frozenset[str], budget: float
) -> frozenset[str]:
    """`kept` and the layers that should stay float with them.

    Args:
        folded: what `simulation` was made from, with the layers in `kept` float.
        images_NCHW: calibration images; `simulation` is calibrated.
        budget: share of all multiply-accumulates that the added layers may have together.
    """
    macs = macs_of(folded)
    room = budget * macs.total()
    with simulation.mode(Mode.PASS) as exact:
        logits = exact(images_NCHW)
    costly = set(costly_tensors(simulation, images_NCHW))
    candidates = {layer.name for layer in simulation.layers if costly & _beside(simulation, layer)}
    with simulation.mode(Mode.SIMULATE) as simulated:

        def error_without(names: frozenset[str]) -> float:
            for quantizer in _gone(simulation, simulate(folded, simulation.scheme, names)):
                quantizer.mode = Mode.PASS
            error = float((simulated(images_NCHW) - logits).square().mean())
            simulation.set_mode(Mode.SIMULATE)
            return error

        error, size = error_without(kept), 1
        while error > _ENOUGH * float(logits.var()) and size <= _TOGETHER:
            groups = map(frozenset, combinations(sorted(candidates - kept), size))
            trials = {group: error_without(kept | group) for group in groups if _sum(macs, group) <= room}
            best = min(trials, key=trials.__getitem__, default=None)
            if best is None or trials[best] > (1 - _GAIN) ** size * error:
                size += 1
            else:
                kept, error, room, size = kept | best, trials[best], room - _sum(macs, best), 1
    return kept


def _sum(macs: Counter[str], names: frozenset[str]) -> int:
    return sum(macs[name] for name in names)


def macs_of(graph: GraphModule) -> Counter[str]:
    """Multiply-accumulates of each layer for one image."""
    macs: Counter[str] = Counter()
    (images,) = graph.graph.find_nodes(op="placeholder")
    batch = images.meta["val"].shape[0]
    for node in graph.graph.nodes:
        if node.target in WEIGHTED:
            weight = read_tensor(graph, node.args[1])
            outputs = node.meta["val"].numel() // batch  # tokens and windows may stand before the batch, or in one axis
            macs[layer_of(node)] += int(outputs) * weight[0].numel()
    return macs


def _beside(simulation: Simulation, layer: SimulatedLayer) -> set[FakeQuantizer]:
    """The quantizers of what a layer reads and of what it writes."""
    found = {layer.input_quantizer}
    waiting = list(layer.node.users)
    while waiting:
        node = waiting.pop()
        module = simulation.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, FakeQuantizer):
            found.add(module)
        elif node.target not in WEIGHTED:
            waiting += node.users
    return found


def _gone(simulation: Simulation, smaller: Simulation) -> list[FakeQuantizer]:
    """The quantizers of `simulation` that `smaller` has no need of."""
    left = dict(_by_source(smaller))
    return [quantizer for source, quantizer in _by_source(simulation) if source not in left]


def _by_source(simulation: Simulation) -> Iterator[tuple[str, FakeQuantizer]]:
    for node in simulation.graph.graph.nodes:
        module = simulation.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, FakeQuantizer):
            yield node.args[0].name, module
