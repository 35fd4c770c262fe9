"""What a Q/DQ graph must keep for its target, as a table of small rules over one index of the graph.

Ids are stable, and rules of one subject share one. "T" marks what is asked for TensorRT alone:

    L01 valid ONNX, opset           L10 between weight and layer  T L18 float types
    L02 plain operators             L11 between layer and act.    T L19 hard-swish in one piece
    L03 zero points                 L12 residual sums             L20 inputs and outputs
    L04 scales                    T L13 one scale per tensor      L21 weights in other files
    L05 axes                      T L14 concatenations          T L22 scales that fit the values
    L06 biases                    T L15 channels                T L23 share of INT8
    L07 integer tensors           T L16 squeeze-excite            L24 leftovers
    L08 half quantized layers       L17 layers with float output  L25 runs, finite (`tasks.graph.trial`)
  T L09 weights read once                                         L26 weights stored twice
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx

from tasks.contracts.errors import ExportError
from tasks.contracts.spec import SchemeName
from tasks.graph.index import Graph, external_tensors
from tasks.graph.rules import Rule, Severity
from tasks.graph.rules_onnxruntime import ONNXRUNTIME
from tasks.graph.rules_tensorrt import TENSORRT

RULES: dict[SchemeName, tuple[Rule, ...]] = {"onnxruntime": ONNXRUNTIME, "tensorrt": TENSORRT}
SHOWN = 5  # errors named in a refusal


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One broken rule at one node."""

    rule: str
    severity: Severity
    node: str
    found: str
    remedy: str


def lint(model: onnx.ModelProto, scheme: SchemeName) -> tuple[Finding, ...]:
    """All findings, in the order of the rules. A graph that is not whole or not valid ONNX is not read any further."""
    outside = list(external_tensors(model))
    if outside:
        found, remedy = "values in another file that was not read", "Read the model with its external data."
        return tuple(
            Finding(rule="L21", severity="error", node=tensor.name, found=found, remedy=remedy) for tensor in outside
        )
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        found = " ".join(str(error).split())
        return (Finding(rule="L01", severity="error", node=model.graph.name, found=found, remedy="Export it anew."),)
    graph = Graph(model)
    return tuple(
        Finding(rule=rule.name, severity=rule.severity, node=node, found=found, remedy=rule.remedy)
        for rule in RULES[scheme]
        for node, found in rule.check(graph)
    )


def refuse_findings(findings: Iterable[Finding], *, path_name: str) -> None:
    """Refuse a graph that breaks a rule; warnings pass.

    Raises:
        ExportError: if one of the findings is an error.
    """
    errors = [finding for finding in findings if finding.severity == "error"]
    if not errors:
        return
    shown = "; ".join(f"{error.rule} {error.node}: {error.found}" for error in errors[:SHOWN])
    more = f"; and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
    raise ExportError(
        f"{path_name} breaks the rules of its target: {shown}{more}.",
        remedy=" ".join(dict.fromkeys(error.remedy for error in errors[:SHOWN])),
    )
