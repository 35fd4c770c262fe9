from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tasks.contracts.errors import EngineError
from tasks.contracts.records import EngineLayer, LayerCost, LayerPrecision, PrecisionAudit
from tasks.engines.inspector import audit

Layer = dict[str, Any]
INT8_KERNEL = "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs_tilesize64x64x64_stage3"
INT8_TO_FLOAT_KERNEL = "sm80_xmma_fprop_implicit_gemm_indexed_i8f32_i8i32_f32_nhwckrsc_nhwc_tilesize128x128x64_stage4"
HALF_KERNEL = "sm80_xmma_gemm_f16f16_f16f16_f16_nn_n_tilesize32x32x64_stage6_warpsize2x2x1_tensor16x8x16"
FLOAT_KERNEL = "sm80_xmma_fprop_implicit_gemm_f32f32_tf32f32_f32_nhwckrsc_nhwc_tilesize128x32x32_stage4"
FORMATS_10 = {
    "int8": "Thirty-two wide channel vectorized row major Int8 format",
    "float16": "Channel major FP16 format where channel % 8 == 0",
    "float32": "Row major linear FP32",
    "bfloat16": "Row major linear BF16",
    "unset": "N/A due to dynamic shapes",
}
FORMATS_11 = {
    "int8": ("Thirty-two wide channel vectorized row major format (kCHW32)", "Int8"),
    "float16": ("Channel major format where channel % 8 == 0 (kHWC8)", "Half"),
    "float32": ("Row major linear format (kLINEAR)", "Float"),
    "bfloat16": ("Row major linear format (kLINEAR)", "BFloat16"),
    "unset": ("N/A due to dynamic shapes", "N/A due to dynamic shapes"),
}


def tensor_10(kind: str) -> Layer:
    return {"Name": "374", "Location": "Device", "Dimensions": [8, 32, 56, 56], "Format/Datatype": FORMATS_10[kind]}


def tensor_11(kind: str) -> Layer:
    form, datatype = FORMATS_11[kind]
    return {"Name": "374", "Location": "Device", "Dimensions": [8, 32, 56, 56], "Format": form, "Datatype": datatype}


def engine_layer(name: str, kind: str, reads: str, writes: str, *, nodes: str = "", **more: object) -> Layer:
    """As the inspector writes it, but for the tensors, which are named by their data types."""
    metadata = "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes.split())
    return {
        "Name": name, "LayerType": kind, "Inputs": reads.split(), "Outputs": writes.split(),
        "TacticValue": "0x0", "StreamId": 0, "Metadata": metadata, **more,
    }  # fmt: skip


def convolution(name: str, reads: str, writes: str, weights: str, tactic: str = "", nodes: str = "") -> Layer:
    return engine_layer(
        name, "CaskConvolution" if tactic else "CudaDepthwiseConvolution", reads, writes, nodes=nodes,
        ParameterType="Convolution", Kernel=[3, 3], Groups=1, Weights={"Type": weights, "Count": 864},
        Bias={"Type": "Float", "Count": 32}, HasSparseWeights=0, Activation="RELU", TacticName=tactic,
    )  # fmt: skip


def written(layers: list[Layer], tensor: Callable[[str], Layer], **ends: object) -> str:
    return json.dumps(
        {
            "Layers": [
                {**layer, **{side: [tensor(kind) for kind in layer[side]] for side in ("Inputs", "Outputs")}}
                for layer in layers
            ],
            **ends,
        }
    )


def as_10(layers: list[Layer]) -> str:
    return written(layers, tensor_10, Bindings=["input", "logits"])


def as_11(layers: list[Layer]) -> str:
    ends = [{"Name": name, "IOMode": mode, "DataType": "Float", "Dimensions": [8, 10], "Location": "Device",
             "IsShapeInferenceIO": False, "ProfileInfo": []}
            for name, mode in (("input", "Input"), ("logits", "Output"))]  # fmt: skip
    return written(layers, tensor_11, **{"I/O Tensors": ends})


def graph(**macs: int) -> tuple[LayerCost, ...]:
    """Layers by name, `_` for the dots."""
    return tuple(
        LayerCost(layer=name.replace("_", "."), op_type="Conv", parameters=1, macs=count, precision="int8")
        for name, count in macs.items()
    )


def only(found: PrecisionAudit) -> EngineLayer:
    (layer,) = found.layers
    return layer


# A residual network as TensorRT 10 and 11 compile it: fused names, a residual sum inside a convolution, a depthwise
# kernel without a name, siblings side by side, a classifier in two parts, and copies between them.
GRAPH = graph(stem=100, block_dw=20, block_project=300, left=40, right=50, fc=10)
NETWORK = [
    engine_layer(
        "node_quantize_per_tensor", "Reformat", "float32", "int8", ParameterType="Reformat", Origin="QDQ",
    ),
    convolution("stem.weight + node_quantize_per_channel + stem + stem_1", "int8", "int8", "Int8", INT8_KERNEL,
                nodes="stem stem_1 node_dequantize_per_tensor"),
    convolution("block.dw.weight + node_quantize_per_channel_1 + block.dw + PWN(block.act)", "int8", "float16", "Int8"),
    engine_layer("Reformatting CopyNode for Input Tensor 0 to block.project + block.add", "Reformat", "float16",
                 "int8", ParameterType="Reformat", Origin="REFORMAT"),
    convolution("block.project + block.add", "int8 float16", "float32", "Int8", INT8_TO_FLOAT_KERNEL),
    convolution("left + PWN(left.act) || right + PWN(right.act)", "float32", "float16", "Float", FLOAT_KERNEL),
    engine_layer("fc.bias", "Constant", "", "float16", nodes="fc"),
    engine_layer("fc_myl0_7", "gemm", "float16", "float16", TacticName=HALF_KERNEL, nodes="fc"),
    engine_layer("__myl_AddCast_myl0_8", "kgen", "float16 float16", "float32", nodes="fc",
                 TacticName="__myl_AddCast_0xf2543c36"),
]  # fmt: skip


@pytest.mark.parametrize("form", [as_10, as_11], ids=["10.x", "11.x"])
def test_a_network_in_both_forms(form: Callable[[list[Layer]], str]) -> None:
    """Every multiply-accumulate is found once, by what its kernel multiplies."""
    found = audit(form(NETWORK), GRAPH)
    assert found.macs == {"int8": 420, "float16": 10, "float32": 90, "unknown": 0}
    assert found.unplaced == ()
    assert [(layer.role, layer.precision, layer.macs) for layer in found.layers] == [
        ("quantize", "float32", 0),
        ("compute", "int8", 100),
        ("compute", "int8", 20),
        ("reformat", "float16", 0),
        ("compute", "int8", 300),
        ("compute", "float32", 90),
        ("compute", "unknown", 0),
        ("compute", "float16", 10),
        ("compute", "float16", 0),
    ]
    assert found.layers[4].reads == "int8, float16"
    assert found.layers[4].writes == "float32"
    assert found.layers[5].layers == ("left", "right")
    assert found.percent("int8") == pytest.approx(100 * 420 / 520)


@pytest.mark.parametrize(
    ("layer", "precision"),
    [
        (convolution("stem", "int8", "int8", "Int8"), "int8"),
        (
            convolution("stem", "int8", "float16", "Int8", "turing_fp16_i8816cudnn_int8_128x128_nt_v1"),
            "int8",
        ),
        (convolution("stem", "float16", "float16", "Half"), "float16"),
        (convolution("stem", "float32", "float32", "Float", FLOAT_KERNEL), "float32"),
        (convolution("stem", "float16", "float16", "Int8"), "unknown"),
        (convolution("stem", "int8", "float16", "Half"), "unknown"),
        (convolution("stem", "bfloat16", "bfloat16", "BFloat16"), "unknown"),
        (engine_layer("stem", "gemm", "float16", "float16", TacticName=INT8_TO_FLOAT_KERNEL), "int8"),
    ],
    ids=["int8", "int8 to half", "half", "tf32", "weight only", "data only", "bfloat16", "by its kernel"],
)
def test_what_a_layer_computes_in(layer: Layer, precision: LayerPrecision) -> None:
    """The kernel's name, then the types of data and weight; where they disagree, nothing is claimed."""
    for form in (as_10, as_11):
        found = audit(form([layer]), graph(stem=7))
        assert only(found).precision == precision
        assert found.macs[precision] == 7


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        ("block_project_myl0_7", ""),
        ("other+block_project+more_myl3_12", ""),
        ("__myl_Fc_myl0_3", "block.project"),
        ("{ForeignNode[block.dw...block.last]}", ""),
        ("PWN(PWN(block.project), add)", ""),
    ],
    ids=["suffix", "joined", "metadata", "foreign", "pointwise"],
)
def test_names_of_fused_layers_are_found(name: str, nodes: str) -> None:
    """Myelin writes _ for dots and numbers its kernels; a foreign node names its ends."""
    layers = graph(block_dw=1, block_project=5, block_last=2, fc=9)
    found = audit(as_10([engine_layer(name, "kgen", "float16", "float16", nodes=nodes)]), layers)
    assert "block.project" in only(found).layers
    assert "block.project" not in found.unplaced
    assert "fc" in found.unplaced
    assert found.macs["float16"] + found.macs["unknown"] == 17


def test_a_name_is_matched_whole() -> None:
    """Layer 1 is not layer 10, a weight is not its layer, and a copy is not what it is made for."""
    names = ["features.10", "features.1.weight + node_quantize_1", "features.1_clone_0"]
    layers = [convolution(name, "int8", "int8", "Int8", INT8_KERNEL) for name in names]
    copy = engine_layer("Reformatting CopyNode for Input Tensor 0 to features.1", "Reformat", "int8", "float16")
    found = audit(as_10([*layers, copy]), graph(features_1=3))
    assert found.unplaced == ("features.1",)
    assert found.macs == {"int8": 0, "float16": 0, "float32": 0, "unknown": 3}


def test_contradicting_layers_are_not_counted_as_int8() -> None:
    """Two kernels that form the same products in two precisions."""
    layers = [
        convolution("stem", "int8", "int8", "Int8", INT8_KERNEL),
        convolution("stem_part", "float16", "float16", "Half", HALF_KERNEL, nodes="stem"),
    ]
    found = audit(as_11(layers), graph(stem=8))
    assert (found.unplaced, found.macs["unknown"], found.macs["int8"]) == (("stem",), 8, 0)


def test_a_graph_without_products_has_no_share() -> None:
    """Zero of zero is not all."""
    assert audit(as_10(NETWORK), ()).percent("int8") is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not JSON"),
        ("[]", "names no layers"),
        ('{"Layers": []}', "names no layers"),
        ('{"Layers": ["stem + relu", "fc"], "Bindings": ["input"]}', "2 layers by their names only"),
        (as_10([convolution("stem", "unset", "unset", "Int8", INT8_KERNEL)]), "no data type for any of 1 layers"),
        (as_11([convolution("stem", "unset", "unset", "Int8", INT8_KERNEL)]), "no data type for any of 1 layers"),
    ],
    ids=["empty", "list", "no layers", "names only", "dynamic 10.x", "dynamic 11.x"],
)
def test_too_little_detail_is_refused(text: str, says: str) -> None:
    """An audit that cannot see would pass as one that found nothing; the remedy says how to build and read."""
    with pytest.raises(EngineError, match=says) as refusal:
        audit(text, GRAPH)
    assert "DETAILED" in refusal.value.remedy or "execution context" in refusal.value.remedy
