from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tasks.contracts.errors import ExportError
from tasks.contracts.spec import SchemeName
from tasks.graph.lint import RULES, Finding, lint, refuse_findings

Changes = dict[str, str]


def ones(count: int) -> str:
    return "{" + ", ".join(["1"] * count) + "}"


def zeros(count: int) -> str:
    return "{" + ", ".join(["0"] * count) + "}"


def steps(outputs: int, inputs: int) -> str:
    """Weights of which one in each output channel is at the end of INT8."""
    return "{" + ", ".join(["127" + ", 1" * (inputs - 1)] * outputs) + "}"


def head(channels: int) -> str:
    """Two convolutions, the second with a skip around it, pooling and a classifier. Steps are 0.5, of weights 0.25."""
    return f"""
<ir_version: 10, opset_import: ["": 20]>
classifier (float[batch, 3, 8, 8] input) => (float[batch, {channels}] logits)
<
  float s = {{0.5}}, float s2 = {{2.0}},
  float[{channels}] ws = {{{", ".join(["0.25"] * channels)}}}, int8[{channels}] wz = {zeros(channels)},
  int8[{channels}, 3, 3, 3] w1 = {steps(channels, 27)},
  int8[{channels}, {channels}, 3, 3] w2 = {steps(channels, 9 * channels)},
  int8[{channels}, {channels}] w3 = {steps(channels, channels)},
"""


WEIGHTS = """
  [w1_d] w1_d = DequantizeLinear<axis = 0>(w1, ws, wz)
  [w2_d] w2_d = DequantizeLinear<axis = 0>(w2, ws, wz)
  [w3_d] w3_d = DequantizeLinear<axis = 0>(w3, ws, wz)
"""
CLEAN: dict[SchemeName, str] = {
    "onnxruntime": f"""{head(8)}
  int32[8] b = {ones(8)}, float[8] bs = {{{", ".join(["0.125"] * 8)}}}, int32[8] bz = {zeros(8)}, uint8 z = {{3}}
> {{
  {WEIGHTS}
  [b1_d] b1_d = DequantizeLinear<axis = 0>(b, bs, bz)
  [b2_d] b2_d = DequantizeLinear<axis = 0>(b, bs, bz)
  [b3_d] b3_d = DequantizeLinear<axis = 0>(b, bs, bz)
  [q0] q0 = QuantizeLinear(input, s, z)
  [d0] d0 = DequantizeLinear(q0, s, z)
  [conv1] c1 = Conv<pads = [1, 1, 1, 1]>(d0, w1_d, b1_d)
  [relu1] r1 = Relu(c1)
  [q1] q1 = QuantizeLinear(r1, s, z)
  [d1] d1 = DequantizeLinear(q1, s, z)
  [conv2] c2 = Conv<pads = [1, 1, 1, 1]>(d1, w2_d, b2_d)
  [q2] q2 = QuantizeLinear(c2, s, z)
  [d2] d2 = DequantizeLinear(q2, s, z)
  [add] a = Add(d2, d1)
  [q3] q3 = QuantizeLinear(a, s2, z)
  [d3] d3 = DequantizeLinear(q3, s2, z)
  [pool] p = GlobalAveragePool(d3)
  [q4] q4 = QuantizeLinear(p, s, z)
  [d4] d4 = DequantizeLinear(q4, s, z)
  [flat] f = Flatten(d4)
  [q5] q5 = QuantizeLinear(f, s, z)
  [d5] d5 = DequantizeLinear(q5, s, z)
  [fc] logits = Gemm<transB = 1>(d5, w3_d, b3_d)
}}""",
    "tensorrt": f"""{head(32)}
  float[32] b = {ones(32)}, int8 z = {{0}}
> {{
  {WEIGHTS}
  [q0] q0 = QuantizeLinear(input, s, z)
  [d0] d0 = DequantizeLinear(q0, s, z)
  [conv1] c1 = Conv<pads = [1, 1, 1, 1]>(d0, w1_d, b)
  [relu1] r1 = Relu(c1)
  [q1] q1 = QuantizeLinear(r1, s, z)
  [d1] d1 = DequantizeLinear(q1, s, z)
  [conv2] c2 = Conv<pads = [1, 1, 1, 1]>(d1, w2_d, b)
  [add] a = Add(c2, d1)
  [relu2] r2 = Relu(a)
  [q3] q3 = QuantizeLinear(r2, s2, z)
  [d3] d3 = DequantizeLinear(q3, s2, z)
  [pool] p = GlobalAveragePool(d3)
  [flat] f = Flatten(p)
  [q5] q5 = QuantizeLinear(f, s, z)
  [d5] d5 = DequantizeLinear(q5, s, z)
  [fc] logits = Gemm<transB = 1>(d5, w3_d, b)
}}""",
}
ORT: SchemeName = "onnxruntime"
TRT: SchemeName = "tensorrt"


def graph(scheme: SchemeName, changes: Changes | None = None) -> onnx.ModelProto:
    """The clean graph of a scheme, with each old text replaced by the new one."""
    text = CLEAN[scheme]
    for old, new in (changes or {}).items():
        assert old in text
        text = text.replace(old, new)
    return onnx.parser.parse_model(text)


def constant(declaration: str) -> Changes:
    """One more constant."""
    return {"float s2": f"{declaration}, float s2"}


def node(line: str, *, before: str) -> Changes:
    """One more node."""
    return {f"  [{before}]": f"  {line}\n  [{before}]"}


@pytest.mark.parametrize("scheme", list(RULES))
def test_a_clean_graph_has_no_findings(scheme: SchemeName) -> None:
    """Whoever keeps all rules is told plain facts at most."""
    findings = lint(graph(scheme), scheme)
    facts = {
        ORT: [],
        TRT: [
            ("L18", "info", "operators beside Q/DQ: 8 in FLOAT"),
            ("L23", "info", "100.0% of 0.6 million multiply-accumulates in INT8"),
        ],
    }
    assert [(finding.rule, finding.severity, finding.found) for finding in findings] == facts[scheme]


W1 = "{" + ", ".join(["31.75" + ", 0.25" * 26] * 32) + "}"  # as float
ERRORS: list[tuple[SchemeName, str, str, str, Changes]] = [
    (ORT, "L01", "classifier", "nowhere", {"Relu(c1)": "Relu(nowhere)"}),
    (ORT, "L01", "classifier", "opset 21", {'"": 20': '"": 21'}),
    (TRT, "L01", "classifier", "IR version 11", {"ir_version: 10": "ir_version: 11"}),
    (TRT, "L01", "classifier", "2 opsets of domain ai.onnx", {'"": 20': '"": 20, "ai.onnx": 20'}),
    (  # FP16 scales came with opset 19; the checker knows
        TRT,
        "L01",
        "classifier",
        "unsupported type: tensor(float16)",
        {'"": 20': '"": 18', **constant("float16 h = {14336}"), "(q0, s, z)": "(q0, h, z)"},
    ),
    (
        ORT,
        "L02",
        "relu1",
        "Relu of domain com.microsoft",
        {'"": 20': '"": 20, "com.microsoft": 1', "Relu(c1)": "com.microsoft.Relu(c1)"},
    ),
    (TRT, "L02", "dyn", "DynamicQuantizeLinear", node("[dyn] y, ys, yz = DynamicQuantizeLinear(input)", before="q0")),
    (
        TRT,
        "L02",
        "branch",
        "a graph inside the graph",
        {
            **constant("bool yes = {1}"),
            "[relu1] r1 = Relu(c1)": "[branch] r1 = If(yes) <then_branch = then () => (float[batch, 32, 8, 8] t)"
            " { t = Relu(c1) }, else_branch = other () => (float[batch, 32, 8, 8] e) { e = Abs(c1) }>",
        },
    ),
    (ORT, "L03", "q0", "no zero point", {"(input, s, z)": "(input, s)", "(q0, s, z)": "(q0, s)"}),
    (ORT, "L03", "q0", "type INT8, not UINT8", {"uint8 z = {3}": "int8 z = {0}"}),
    (ORT, "L03", "w1_d", "other than 0", {"int8[8] wz = {0, ": "int8[8] wz = {1, "}),
    (ORT, "L03", "w1_d", "other than 0", {f"int8[8] wz = {zeros(8)}": f"int8[8] wz = {zeros(8).replace('0', '-1')}"}),
    (
        ORT,
        "L03",
        "d3",
        "computed zero point",
        {**node("[max] zc = Max(z, z)", before="q3"), "(a, s2, z)": "(a, s2, zc)", "(q3, s2, z)": "(q3, s2, zc)"},
    ),
    (TRT, "L03", "q0", "type UINT8, not INT8", {"int8 z = {0}": "uint8 z = {0}"}),
    (TRT, "L03", "d0", "other than 0", {"int8 z = {0}": "int8 z = {1}"}),
    (TRT, "L03", "q3", "shape [1], unlike its scale", {**constant("int8[1] z1 = {0}"), ", s2, z)": ", s2, z1)"}),
    (TRT, "L04", "q3", "from 0.0 to 0.0", {"s2 = {2.0}": "s2 = {0.0}"}),
    (TRT, "L04", "d3", "from -2.0 to -2.0", {"s2 = {2.0}": "s2 = {-2.0}"}),
    (TRT, "L04", "d3", "from inf to inf", {"s2 = {2.0}": "s2 = {inf}"}),
    (TRT, "L04", "d3", "from nan to nan", {"s2 = {2.0}": "s2 = {nan}"}),
    (
        TRT,
        "L04",
        "q3",
        "a computed scale",
        {**node("[abs] sc = Abs(s2)", before="q3"), "(r2, s2, z)": "(r2, sc, z)", "(q3, s2, z)": "(q3, sc, z)"},
    ),
    (
        TRT,
        "L04",
        "d3",
        "an FP16 scale of 6e-05",
        {
            **constant("float16 h = {1007}"),
            **node("[to] r3 = Cast<to = 10>(r2)", before="q3"),
            "(r2, s2, z)": "(r3, h, z)",
            "(q3, s2, z)": "(q3, h, z)",
            "Flatten(p)": "Cast<to = 1>(p)\n  [flatter] f2 = Flatten(f)",
            "(f, s, z)": "(f2, s, z)",
        },
    ),
    (
        TRT,
        "L05",
        "q3",
        "32 scales on an activation",
        {"float s2 = {2.0},": "", "(r2, s2, z)": "<axis = 1>(r2, ws, wz)", "(q3, s2, z)": "<axis = 1>(q3, ws, wz)"},
    ),
    (TRT, "L05", "w2_d", "axis 1, and the channels of Conv", {"<axis = 0>(w2,": "<axis = 1>(w2,"}),
    (TRT, "L05", "w3_d", "axis None", {"<axis = 0>(w3,": "(w3,"}),
    (TRT, "L05", "w3_d", "axis 0, and the channels of Gemm", {"<transB = 1>": ""}),
    (
        TRT,
        "L05",
        "w1_d",
        "shape [1] for axis 0 of [32, 3, 3, 3]",
        {**constant("float[1] w1s = {0.25}, int8[1] w1z = {0}"), "(w1, ws, wz)": "(w1, w1s, w1z)"},
    ),
    (ORT, "L06", "conv1", "bias bf is not INT32", {**constant(f"float[8] bf = {ones(8)}"), "w1_d, b1_d": "w1_d, bf"}),
    (ORT, "L06", "b1_d", "input scale times weight scale", {"bs = {0.125,": "bs = {0.1250002,"}),
    (ORT, "L06", "conv2", "a sum that may reach 2,147,5", {"int32[8] b = {1,": "int32[8] b = {-2147483647,"}),
    (ORT, "L06", "b1_d", "zero point other than 0", {"int32[8] bz = {0,": "int32[8] bz = {1,"}),
    (
        ORT,
        "L06",
        "extra",
        "no integer layer adds",
        node("[extra] e = DequantizeLinear<axis = 0>(b, bs, bz)", before="q0"),
    ),
    (
        TRT,
        "L06",
        "b_d",
        "an INT32 constant bi",
        {
            **constant(f"int32[32] bi = {ones(32)}, int32[32] bz = {zeros(32)}"),
            **node("[b_d] b_d = DequantizeLinear<axis = 0>(bi, ws, bz)", before="q0"),
            "w1_d, b)": "w1_d, b_d)",
        },
    ),
    (TRT, "L07", "q3", "Clip clip reads", {**node("[clip] k = Clip(q3)", before="d3"), "(q3, s2, z)": "(k, s2, z)"}),
    (TRT, "L07", "w1_d", "integers from Clip", {**node("[k] k = Clip(w1)", before="w1_d"), "(w1, ws": "(k, ws"}),
    (ORT, "L07", "q3", "Abs abs reads", {**node("[abs] k = Abs(q3)", before="d3"), "(q3, s2, z)": "(k, s2, z)"}),
    (
        ORT,
        "L07",
        "q3",
        "Clip twice reads",
        {**node("[once] j = Clip(q3)\n  [twice] k = Clip(j)", before="d3"), "(q3, s2, z)": "(k, s2, z)"},
    ),
    (TRT, "L07", "d3", "another scale or zero point than q3", {"(q3, s2, z)": "(q3, s, z)"}),
    (TRT, "L08", "conv1", "an INT8 weight and a float input", {"(d0, w1_d": "(input, w1_d"}),
    (
        TRT,
        "L10",
        "conv2",
        "Transpose between",
        {**node("[t] w2_t = Transpose<perm = [1, 0, 2, 3]>(w2_d)", before="conv2"), "(d1, w2_d": "(d1, w2_t"},
    ),
    (
        TRT,
        "L09",
        "w2_d",
        "a weight that Add and Conv read",
        {"Relu(a)": "Relu(e)", **node("[extra] w = Add(w2_d, w2_d)\n  [two] e = Add(a, s)", before="relu2")},
    ),
    (TRT, "L09", "w3_d", "leaves the graph", {"logits)\n<": "logits, float[32, 32] w3_d)\n<"}),
    (TRT, "L10", "fc", "Clip between", {**node("[t] w3_t = Clip(w3_d)", before="fc"), "(d5, w3_d": "(d5, w3_t"}),
    (TRT, "L20", "input", "FLOAT [batch, 3, height, 8]", {"[batch, 3, 8, 8] input": "[batch, 3, height, 8] input"}),
    (TRT, "L20", "classifier", "2 inputs", {"8] input)": "8] input, float[batch, 1] other)"}),
    (TRT, "L20", "mask", "BOOL [batch, 1]", {"8] input)": "8] input, bool[batch, 1] mask)"}),
    (TRT, "L20", "logits", "FLOAT [batch, classes]", {"[batch, 32] logits": "[batch, classes] logits"}),
    (
        TRT,
        "L11",
        "bn",
        "batch norm behind conv1",
        {**node("[bn] n = BatchNormalization(c1, b, b, b, b)", before="relu1"), "Relu(c1)": "Relu(n)"},
    ),
    (TRT, "L24", "lost", "4,100 bytes", constant(f"float[1025] lost = {ones(1025)}")),
    (
        TRT,
        "L26",
        "w1_q",
        "constant w1f stored before it is quantized",
        {
            f"int8[32, 3, 3, 3] w1 = {steps(32, 27)}": f"float[32, 3, 3, 3] w1f = {W1}",
            **node("[w1_q] w1 = QuantizeLinear<axis = 0>(w1f, ws, wz)", before="w1_d"),
        },
    ),
]
FLOAT_W1 = constant(f"float[32, 3, 3, 3] w1f = {W1}")
W2F = f"float[32, 32, 3, 3] w2f = {ones(9216)}"
AGAIN = node("[q6] q6 = QuantizeLinear(r1, s2, z)\n  [d6] d6 = DequantizeLinear(q6, s2, z)", before="conv2")
W2 = f"int8[32, 32, 3, 3] w2 = {steps(32, 288)}"
NARROW = """
  [half] h1 = Cast<to = 10>(f)
  [narrow] h2 = Relu(h1)
  [wide] h3 = Cast<to = 1>(h2)"""
GATE = """
  [w4_d] w4_d = DequantizeLinear<axis = 0>(w4, ws, wz)
  [gap] g1 = GlobalAveragePool(r1)
  [gap_q] g2 = QuantizeLinear(g1, s, z)
  [gap_d] g3 = DequantizeLinear(g2, s, z)
  [gate] g4 = Conv(g3, w4_d, b)
  [sigmoid] g5 = Sigmoid(g4)
  [scale] m = Mul(r1, g5)
"""
WARNINGS: list[tuple[SchemeName, str, str, str, Changes]] = [
    (TRT, "L01", "classifier", "opset 21", {'"": 20': '"": 21'}),
    (TRT, "L08", "conv1", "an INT8 input and a float weight", {**FLOAT_W1, "(d0, w1_d": "(d0, w1f"}),
    (
        TRT,
        "L11",
        "q6",
        "between Conv conv1 and its Relu",
        {
            **node("[q6] q6 = QuantizeLinear(c1, s, z)\n  [d6] d6 = DequantizeLinear(q6, s, z)", before="relu1"),
            "Relu(c1)": "Relu(d6)",
        },
    ),
    (
        TRT,
        "L11",
        "add",
        "both operands quantized",
        {
            **node("[q6] q6 = QuantizeLinear(c2, s, z)\n  [d6] d6 = DequantizeLinear(q6, s, z)", before="add"),
            "Add(c2": "Add(d6",
        },
    ),
    (TRT, "L12", "add", "skip operand is float", {"Add(c2, d1)": "Add(c2, r1)"}),
    (TRT, "L13", "q6", "r1 quantized with another scale than by q1", {**AGAIN, "Add(c2, d1)": "Add(c2, d6)"}),
    (
        TRT,
        "L13",
        "q6",
        "integers of d1 quantized anew",
        {key: value.replace("(r1, s2", "(d1, s2") for key, value in AGAIN.items()} | {"Add(c2, d1)": "Add(c2, d6)"},
    ),
    (TRT, "L14", "add", "1 of 2 inputs quantized", {"Add(c2, d1)": "Concat<axis = 2>(c2, d1)"}),
    (
        TRT,
        "L14",
        "add",
        "inputs with several scales",
        {
            **node("[q6] q6 = QuantizeLinear(c2, s2, z)\n  [d6] d6 = DequantizeLinear(q6, s2, z)", before="add"),
            "Add(c2, d1)": "Concat<axis = 2>(d6, d1)",
        },
    ),
    (
        TRT,
        "L15",
        "conv2",
        "Conv of 32 x 8 x 1 x 1 in INT8, 4 groups",
        {W2: f"int8[32, 8, 1, 1] w2 = {steps(32, 8)}", "Conv<pads = [1, 1, 1, 1]>(d1": "Conv<group = 4>(d1"},
    ),
    (
        TRT,
        "L16",
        "gap",
        "GlobalAveragePool of a squeeze-excite",
        {
            **constant(f"int8[32, 32, 1, 1] w4 = {steps(32, 32)}"),
            "  [q1] q1 = QuantizeLinear(r1,": f"{GATE}  [q1] q1 = QuantizeLinear(m,",
        },
    ),
    (ORT, "L17", "conv2", "a float output", {"Add(d2, d1)": "Add(c2, d1)"}),
    (ORT, "L17", "conv1", "a float output", {"Relu(c1)": "HardSwish(c1)"}),
    (
        TRT,
        "L17",
        "conv1",
        "AveragePool pool1 before the next QuantizeLinear",
        {**node("[pool1] v = AveragePool<kernel_shape = [3, 3]>(r1)", before="q1"), "(r1, s, z)": "(v, s, z)"},
    ),
    (TRT, "L18", "k", "a Cast between d3", {**node("[k] k = Cast<to = 1>(d3)", before="pool"), "Pool(d3)": "Pool(k)"}),
    (
        TRT,
        "L19",
        "clip",
        "a hard-sigmoid written out",
        {
            **constant("float three = {3}, float zero = {0}, float six = {6}"),
            "[relu1] r1 = Relu(c1)": "[plus] t1 = Add(c1, three)\n  [clip] t2 = Clip(t1, zero, six)\n"
            "  [times] r1 = Mul(c1, t2)",
        },
    ),
    (
        TRT,
        "L19",
        "times",
        "a hard-swish written out",
        {"[relu1] r1 = Relu(c1)": "[hard] t = HardSigmoid<alpha = 0.1666667>(c1)\n  [times] r1 = Mul(c1, t)"},
    ),
    (TRT, "L22", "w3_d", "32 of 32 scales over 4 times", {f"w3 = {steps(32, 32)}": f"w3 = {ones(1024)}"}),
    (
        TRT,
        "L22",
        "w3_d",
        "97% of the weights at the ends",
        {f"w3 = {steps(32, 32)}": f"w3 = {ones(1024).replace('1', '127')}"},
    ),
    (
        TRT,
        "L22",
        "q1",
        "reaches 63.5 where Clip ends at 6",
        {**constant("float zero = {0}, float six = {6}"), "Relu(c1)": "Clip(c1, zero, six)"},
    ),
    (
        TRT,
        "L23",
        "classifier",
        "none of 3 layers in INT8",
        {
            **constant(f"float[32, 3, 3, 3] w1f = {W1}, {W2F}, float[32, 32] w3f = {ones(1024)}"),
            "(d0, w1_d": "(input, w1f",
            "(d1, w2_d": "(r1, w2f",
            "(d5, w3_d": "(f, w3f",
        },
    ),
    (ORT, "L24", "lost", "4 bytes", constant("float lost = {1}")),
    (ORT, "L24", "same", "Identity", {**node("[same] i = Identity(d4)", before="flat"), "Flatten(d4)": "Flatten(i)"}),
    (
        TRT,
        "L26",
        "again",
        "the same 4,100 bytes as once",
        {
            **constant(f"float[1025] once = {ones(1025)}, float[1025] again = {ones(1025)}"),
            **node("[sum] total = Add(once, again)", before="q0"),
        },
    ),
]
FACTS: list[tuple[SchemeName, str, str, str, Changes]] = [
    (
        TRT,
        "L15",
        "conv2",
        "channels that are no multiple of 32",
        {
            W2: f"int8[24, 32, 3, 3] w2 = {steps(24, 288)}, float[24] ws2 = {ones(24)}, int8[24] wz2 = {zeros(24)},"
            f" float[24] b2 = {ones(24)}",
            "(w2, ws, wz)": "(w2, ws2, wz2)",
            "w2_d, b)": "w2_d, b2)",
            "Add(c2, d1)": "Concat<axis = 1>(c2, c2)",
            f"int8[32, 32] w3 = {steps(32, 32)}": f"int8[32, 48] w3 = {steps(32, 48)}",
        },
    ),
    (
        TRT,
        "L16",
        "conv2",
        "a depthwise convolution",
        {W2: f"int8[32, 1, 3, 3] w2 = {steps(32, 9)}", "1]>(d1": "1], group = 32>(d1"},
    ),
    (
        TRT,
        "L17",
        "conv1",
        "a float output, which float Conv conv2 reads",
        {
            **constant(W2F),
            "  [q1] q1 = QuantizeLinear(r1, s, z)\n  [d1] d1 = DequantizeLinear(q1, s, z)\n": "",
            "(d1, w2_d": "(r1, w2f",
            "Add(c2, d1)": "Add(c2, c2)",
        },
    ),
    (
        TRT,
        "L18",
        "conv2",
        "FLOAT in a graph that computes in FLOAT16",
        {"[q5] q5 = QuantizeLinear(f,": f"{NARROW.strip()}\n  [q5] q5 = QuantizeLinear(h3,"},
    ),
    (
        TRT,
        "L18",
        "classifier",
        "8 in FLOAT, 1 in FLOAT16",
        {"[flat] f = Flatten(p)": "[flat] f = Flatten(p)\n  [head] h1 = Cast<to = 10>(f)\n  [same] h2 = Identity(h1)"},
    ),
    (
        TRT,
        "L23",
        "classifier",
        "99.8% of 0.6 million multiply-accumulates in INT8; float: fc (0.2%)",
        {**constant(f"float[32, 32] w3f = {ones(1024)}"), "(d5, w3_d": "(f, w3f"},
    ),
    (TRT, "L24", "lost", "4 bytes", constant("float lost = {1}")),
    (TRT, "L24", "same", "Identity", {**node("[same] i = Identity(p)", before="flat"), "Flatten(p)": "Flatten(i)"}),
    (TRT, "L24", "drop", "Dropout", {**node("[drop] i = Dropout(p)", before="flat"), "Flatten(p)": "Flatten(i)"}),
    (
        TRT,
        "L24",
        "drop",
        "Dropout in training mode",
        {
            **constant("bool yes = {1}"),
            **node("[drop] i = Dropout(p, s, yes)", before="flat"),
            "Flatten(p)": "Flatten(i)",
        },
    ),
    (
        TRT,
        "L24",
        "q6",
        "the same as q1",
        {key: value.replace("s2, z)", "s, z)") for key, value in AGAIN.items()} | {"Add(c2, d1)": "Add(c2, d6)"},
    ),
]


def broken_id(case: object) -> str | None:
    return case if isinstance(case, str) else None


CASES = [
    *(
        (*case, severity)
        for severity, cases in (("error", ERRORS), ("warning", WARNINGS), ("info", FACTS))
        for case in cases
    )
]


@pytest.mark.parametrize(("scheme", "rule", "culprit", "found", "changes", "severity"), CASES, ids=broken_id)
def test_a_finding_names_its_rule_node_and_fault(
    scheme: SchemeName, rule: str, culprit: str, found: str, changes: Changes, severity: str
) -> None:
    """The finding says which node has the fault, and no other rule is broken as badly or worse."""
    findings = lint(graph(scheme, changes), scheme)
    assert any(found in finding.found for finding in findings if (finding.rule, finding.node) == (rule, culprit)), (
        findings
    )
    if severity != "info":
        severities = ("error",) if severity == "error" else ("error", "warning")
        assert {(finding.rule, finding.severity) for finding in findings if finding.severity in severities} == {
            (rule, severity)
        }


def test_only_errors_refuse() -> None:
    """What is slow or superfluous is said, and the graph is taken."""
    for scheme, *_, changes in (*WARNINGS, *FACTS):
        refuse_findings(lint(graph(scheme, changes), scheme), path_name="int8.onnx")


def test_every_rule_is_broken_by_a_test() -> None:
    """A rule that nothing here breaks could be blind; the clean graphs count for what is always told."""
    rules = {(scheme, rule.name, rule.remedy) for scheme, rules in RULES.items() for rule in rules}
    broken = {
        (scheme, finding.rule, finding.remedy)
        for scheme, *_, changes, _ in CASES
        for finding in lint(graph(scheme, changes), scheme)
    }
    common = {(other, *rest) for _, *rest in broken for other in RULES}
    assert rules <= common


WIDE = f"""
<ir_version: 10, opset_import: ["": 20]>
classifier (float[batch, 70000] input) => (float[batch, 8] logits)
<
  float s = {{0.5}}, uint8 z = {{3}}, float[8] ws = {{{", ".join(["0.25"] * 8)}}},
  int32[8] b = {ones(8)}, float[8] bs = {{{", ".join(["0.125"] * 8)}}}, int32[8] bz = {zeros(8)}
> {{
  [q] q = QuantizeLinear(input, s, z)
  [d] d = DequantizeLinear(q, s, z)
  [w_d] w_d = DequantizeLinear<axis = 0>(w, ws, wz)
  [b_d] b_d = DequantizeLinear<axis = 0>(b, bs, bz)
  [fc] logits = Gemm<transB = 1>(d, w_d, b_d)
}}"""


@pytest.mark.parametrize(("step", "zero_point", "culprits"), [(120, 0, []), (121, 0, ["fc"]), (-121, -1, [])])
def test_a_sum_overflows_by_the_weights_it_has(step: int, zero_point: int, culprits: list[str]) -> None:
    """255 x 120 x 70,000 fits int32, and 255 x 121 x 70,000 does not; one channel is enough."""
    wide = onnx.parser.parse_model(WIDE)
    weight_OI = np.zeros((8, 70000), np.int8) + np.int8(zero_point)
    weight_OI[3] = step
    for name, array in (("w", weight_OI), ("wz", np.full(8, zero_point, np.int8))):
        wide.graph.initializer.append(numpy_helper.from_array(array, name))
    found = [finding for finding in lint(wide, ORT) if finding.rule == "L06"]
    assert [finding.node for finding in found] == culprits
    assert all("quant.keep_float" in finding.remedy for finding in found)


def test_a_graph_that_is_not_onnx_is_not_read_any_further() -> None:
    """A node without its inputs would only confuse the other rules."""
    headless = graph(TRT)
    del headless.graph.node[-1].input[:], headless.graph.node[0].input[:]
    assert [(found.rule, found.node) for found in lint(headless, TRT)] == [("L01", "classifier")]


def test_weights_that_were_not_read_are_an_error() -> None:
    """No other rule could look at them."""
    outside = graph(TRT)
    outside.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    assert [(found.rule, found.severity, found.node) for found in lint(outside, TRT)] == [("L21", "error", "s")]


def test_the_page_tells_of_every_rule() -> None:
    """Each with its severity, and those that need a file or a runtime too."""
    page = (Path(__file__).parents[3] / "docs" / "tensorrt.md").read_text()
    told = {(name, severity) for name, severity in re.findall(r"^\| (L\d\d) \| (\w+) \|", page, re.M)}
    assert told == {(rule.name, rule.severity) for rule in RULES[TRT]} | {("L21", "error"), ("L25", "error")}


def faults(model: onnx.ModelProto) -> list[tuple[str, str]]:
    """Rule and node of what is worse than a plain fact."""
    return [(finding.rule, finding.node) for finding in lint(model, TRT) if finding.severity != "info"]


def test_integers_that_leave_the_graph_are_an_error() -> None:
    """A caller would get INT8 where float was agreed; the type of the output is wrong too."""
    leaving = graph(TRT, {"[batch, 32] logits)": "[batch, 32] logits, int8[batch, 32, 8, 8] q3)"})
    assert sorted(faults(leaving)) == [("L07", "q3"), ("L20", "q3")]


def test_a_constant_operand_is_no_skip() -> None:
    """Adding a constant behind a convolution is a bias, not a residual."""
    offset = {**constant("float offset = {1}"), "Add(c2, d1)": "Add(c2, offset)"}
    assert faults(graph(TRT, offset)) == []


def test_weights_of_a_transposed_convolution_have_their_channels_on_axis_1() -> None:
    """[inputs, outputs, height, width], unlike a convolution's."""
    transposed = {"Conv<pads = [1, 1, 1, 1]>(d1": "ConvTranspose<pads = [1, 1, 1, 1]>(d1"}
    assert ("L05", "w2_d") in faults(graph(TRT, transposed))
    inputs_first = {
        W2: f"int8[32, 32, 3, 3] w2 = {ones(9216).replace('1', '127', 288)}",
        "<axis = 0>(w2,": "<axis = 1>(w2,",
    }
    assert faults(graph(TRT, {**transposed, **inputs_first})) == []


def test_constant_nodes_are_constants() -> None:
    """A scale is as constant in a Constant node as in an initializer."""
    as_node = {"float s2 = {2.0},": "", **node("[c] s2 = Constant<value = float {2.0}>()", before="q3")}
    assert faults(graph(TRT, as_node)) == []


def finding(number: int, severity: str = "error") -> Finding:
    return Finding(rule="L04", severity=severity, node=f"conv{number}", found="zero", remedy="Calibrate again.")  # type: ignore[arg-type]


def test_a_refusal_names_the_first_errors_and_counts_the_rest() -> None:
    """Long lists are cut, never hidden."""
    with pytest.raises(ExportError) as refusal:
        refuse_findings([finding(0, "warning"), *map(finding, range(1, 8))], path_name="int8.onnx")
    assert refusal.value.problem == (
        "int8.onnx breaks the rules of its target: L04 conv1: zero; L04 conv2: zero; L04 conv3: zero; "
        "L04 conv4: zero; L04 conv5: zero; and 2 more."
    )
    assert refusal.value.remedy == "Calibrate again."


def test_a_refusal_of_few_errors_names_them_all() -> None:
    """No count of more where there is no more."""
    with pytest.raises(ExportError, match=r"target: L04 conv3: zero\. Calibrate again\.$"):
        refuse_findings([finding(3)], path_name="int8.onnx")
