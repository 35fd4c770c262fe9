"""Which precision a compiled engine really runs in: TensorRT's engine inspector, read against the layers of our graph.

The inspector's JSON is for people and changes with TensorRT. Both known forms are read: 10.x names format and type of a
tensor in one string (`Format/Datatype`), 11.x in two (`Format`, `Datatype`). What cannot be told is `unknown`, never
guessed. Engine layers are matched to ONNX nodes by the metadata that TensorRT keeps of them, and by their own names,
which are those of the fused nodes.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from tasks.contracts.errors import EngineError
from tasks.contracts.records import EngineLayer, LayerCost, LayerPrecision, PrecisionAudit

Raw = Mapping[str, Any]
Role = Literal["compute", "reformat", "quantize"]

DETAILED = "Build with ProfilingVerbosity.DETAILED, and read the JSON form through an execution context."
DATATYPES = {
    "int8": "int8", "half": "float16", "fp16": "float16", "float16": "float16", "float": "float32", "fp32": "float32",
    "float32": "float32", "bf16": "bfloat16", "bfloat16": "bfloat16", "fp8": "float8", "int4": "int4", "fp4": "float4",
    "uint8": "uint8", "int32": "int32", "int64": "int64", "bool": "bool",
}  # fmt: skip
INDICES = ("int32", "int64", "bool")  # types of shapes and masks
DATATYPE = re.compile(rf"\bk?({'|'.join(DATATYPES)})\b", re.IGNORECASE)
KERNEL_TYPES: dict[str, LayerPrecision] = {"i8": "int8", "f16": "float16", "f32": "float32", "tf32": "float32"}
OPERANDS = re.compile(r"_(?P<data>i8|f16|f32|tf32)(?:i8|i32|f16|f32)_(?P<weight>i8|f16|f32|tf32)(?:i32|f16|f32)(?:_|$)")
MULTIPLIES = re.compile(r"conv|gemm|matmul|matrixmultiply|fullyconnected|fprop|[hix]mma|_fc", re.IGNORECASE)
IDLE = ("Constant", "NoOp", "Shuffle", "Signal", "Wait")  # layer types that cannot multiply
ONNX_NODE = re.compile(r"\[ONNX Layer: (.*?)\]")
FOREIGN = re.compile(r"ForeignNode\[(?P<first>.+?)\.{3}(?P<last>[^.].*?)\]")
MYELIN_SUFFIX = re.compile(r"_myl\d+_\d+$")
BETWEEN_NAMES = re.compile(r"[+(),{}\[\]\s]|\|\||\.{3}")  # of `a + PWN(b)`, `a || b` and `{ForeignNode[a...b]}`


def audit(inspector_json: str, layers: Sequence[LayerCost]) -> PrecisionAudit:
    """What the engine's layers compute in, and the share of the graph's multiply-accumulates in each precision.

    Args:
        inspector_json: of `EngineInspector.get_engine_information`, the whole engine.
        layers: of the graph that was compiled, in its order.

    Raises:
        EngineError: if the text is no inspector's JSON, or was not built or read in enough detail.
    """
    raw_layers = _raw_layers(inspector_json)
    claims = _claims(raw_layers, layers)
    placed: dict[int, list[LayerCost]] = defaultdict(list)
    macs: dict[LayerPrecision, int] = {"int8": 0, "float16": 0, "float32": 0, "unknown": 0}
    unplaced = []
    for layer in layers:
        claimants = claims[layer.layer]
        found = {_precision(raw_layers[index]) for index in claimants}
        if len(found) == 1:
            placed[claimants[0]].append(layer)  # the others do the rest of it, such as adding up what was split
            macs[found.pop()] += layer.macs
        else:
            unplaced.append(layer.layer)
            macs["unknown"] += layer.macs
    return PrecisionAudit(
        layers=tuple(_engine_layer(raw, placed[index]) for index, raw in enumerate(raw_layers)),
        macs=macs,
        unplaced=tuple(unplaced),
    )


def _raw_layers(inspector_json: str) -> list[Raw]:
    try:
        content = json.loads(inspector_json)
    except json.JSONDecodeError as error:
        raise EngineError(f"The engine inspector's text is not JSON: {error}.", remedy=DETAILED) from error
    found = content.get("Layers") if isinstance(content, dict) else None
    if not isinstance(found, list) or not found:
        raise EngineError("The engine inspector names no layers.", remedy=DETAILED)
    if not all(isinstance(raw, dict) for raw in found):
        raise EngineError(f"The engine inspector gives {len(found)} layers by their names only.", remedy=DETAILED)
    if not any(_datatype(tensor) for raw in found for tensor in (*_tensors(raw, "Inputs"), *_tensors(raw, "Outputs"))):
        raise EngineError(
            f"The engine inspector gives no data type for any of {len(found)} layers, as with shapes that are not set.",
            remedy="Give it an execution context whose input shapes are set.",
        )
    return found


def _claims(raw_layers: Sequence[Raw], layers: Sequence[LayerCost]) -> dict[str, list[int]]:
    """For each layer of the graph, the engine layers that may form its products.

    A Gemm can become a kernel and a bias addition that both name it: where one that multiplies is among them, the
    others are left out. Copies never compute, though they are named after what they copy for.
    """
    order = [layer.layer for layer in layers]
    claims: dict[str, list[int]] = {name: [] for name in order}
    for index, raw in enumerate(raw_layers):
        if _role(raw) == "compute" and raw.get("LayerType") not in IDLE:
            for name in _nodes_of(raw, order):
                claims[name].append(index)
    return {
        name: [index for index in indices if _multiplies(raw_layers[index])] or indices
        for name, indices in claims.items()
    }


def _nodes_of(raw: Raw, order: Sequence[str]) -> set[str]:
    """Layers of the graph that an engine layer names."""
    text = MYELIN_SUFFIX.sub("", _text(raw, "Name"))
    parts = {*BETWEEN_NAMES.split(text), *ONNX_NODE.findall(_text(raw, "Metadata"))}
    nodes = {name for name in order if name in parts}
    if "_myl" in _text(raw, "Name"):  # Myelin writes _ for the dots of a name
        nodes |= {name for name in order if name.replace(".", "_") in parts}
    for foreign in FOREIGN.finditer(text):  # names its first and last node, not those between
        if {foreign["first"], foreign["last"]} <= set(order):
            nodes |= set(order[order.index(foreign["first"]) : order.index(foreign["last"]) + 1])
    return nodes


def _precision(raw: Raw) -> LayerPrecision:
    """By the operands in the kernel's name; where it has none, by the types of the data and the weight."""
    operands = OPERANDS.search(_text(raw, "TacticName"))
    if operands:
        data, weight = KERNEL_TYPES[operands["data"]], KERNEL_TYPES[operands["weight"]]
        return data if data == weight else "unknown"
    types = (kind for kind in map(_datatype, _tensors(raw, "Inputs")) if kind not in ("", *INDICES))
    data_type = next(types, "")
    stored = raw.get("Weights")
    weight_type = _datatype_in(str(stored.get("Type"))) if isinstance(stored, dict) else ""
    if weight_type and (data_type == "int8") != (weight_type == "int8"):
        return "unknown"  # integers on one side only: what was converted is not said
    return next((known for known in KERNEL_TYPES.values() if known == data_type), "unknown")


def _role(raw: Raw) -> Role:
    kind, origin, name = _text(raw, "LayerType"), _text(raw, "Origin"), _text(raw, "Name")
    nodes = ONNX_NODE.findall(_text(raw, "Metadata")) or [part for part in BETWEEN_NAMES.split(name) if part]
    if origin == "QDQ" or (nodes and all("quantize" in node.lower() for node in nodes)):
        return "quantize"
    return "reformat" if kind == "Reformat" or name.startswith("Reformatting CopyNode") else "compute"


def _multiplies(raw: Raw) -> bool:
    return any(MULTIPLIES.search(_text(raw, key)) for key in ("LayerType", "ParameterType", "TacticName"))


def _engine_layer(raw: Raw, placed: Sequence[LayerCost]) -> EngineLayer:
    return EngineLayer(
        name=_text(raw, "Name"),
        kind=_text(raw, "LayerType"),
        role=_role(raw),
        precision=_precision(raw),
        reads=_types(raw, "Inputs"),
        writes=_types(raw, "Outputs"),
        tactic=_text(raw, "TacticName"),
        layers=tuple(layer.layer for layer in placed),
        macs=sum(layer.macs for layer in placed),
    )


def _types(raw: Raw, side: str) -> str:
    return ", ".join(dict.fromkeys(_datatype(tensor) or "unknown" for tensor in _tensors(raw, side)))


def _tensors(raw: Raw, side: str) -> Iterator[Raw]:
    found = raw.get(side)
    return (tensor for tensor in (found if isinstance(found, list) else ()) if isinstance(tensor, dict))


def _datatype(tensor: Raw) -> str:
    """Such as "float16"; empty if the inspector does not say."""
    fields = (tensor.get(key) for key in ("Datatype", "DataType", "Format/Datatype", "Format"))
    return next(filter(None, (_datatype_in(field) for field in fields if isinstance(field, str))), "")


def _datatype_in(text: str) -> str:
    found = DATATYPE.search(text)
    return DATATYPES[found[1].lower()] if found else ""


def _text(raw: Raw, key: str) -> str:
    return str(raw.get(key, ""))
