from __future__ import annotations

import onnx
import pytest

from tasks.contracts.errors import ExportError
from tasks.contracts.spec import SchemeName
from tasks.graph.lint import RULES, Finding, lint, refuse_findings

Changes = dict[str, str]


def ones(count: int) -> str:
    return "{" + ", ".join(["1"] * count) + "}"


def zeros(count: int) -> str:
    return "{" + ", ".join(["0"] * count) + "}"


# Two convolutions, the second with a skip around it, pooling and a classifier. Input steps are 0.5, weight steps 0.25.
HEAD = f"""
<ir_version: 10, opset_import: ["": 20]>
classifier (float[batch, 3, 8, 8] input) => (float[batch, 8] logits)
<
  float s = {{0.5}}, float s2 = {{2.0}},
  float[8] ws = {{{", ".join(["0.25"] * 8)}}}, int8[8] wz = {zeros(8)},
  int8[8, 3, 3, 3] w1 = {ones(216)}, int8[8, 8, 3, 3] w2 = {ones(576)}, int8[8, 8] w3 = {ones(64)},
"""
WEIGHTS = """
  [w1_d] w1_d = DequantizeLinear<axis = 0>(w1, ws, wz)
  [w2_d] w2_d = DequantizeLinear<axis = 0>(w2, ws, wz)
  [w3_d] w3_d = DequantizeLinear<axis = 0>(w3, ws, wz)
"""
CLEAN: dict[SchemeName, str] = {
    "onnxruntime": f"""{HEAD}
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
    "tensorrt": f"""{HEAD}
  float[8] b = {ones(8)}, int8 z = {{0}}
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
    """Whoever keeps all rules hears nothing."""
    assert lint(graph(scheme), scheme) == ()


ERRORS: list[tuple[SchemeName, str, str, str, Changes]] = [
    (ORT, "L01", "classifier", "nowhere", {"Relu(c1)": "Relu(nowhere)"}),
    (ORT, "L01", "classifier", "opset 21", {'"": 20': '"": 21'}),
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
            "[relu1] r1 = Relu(c1)": "[branch] r1 = If(yes) <then_branch = then () => (float[batch, 8, 8, 8] t)"
            " { t = Relu(c1) }, else_branch = other () => (float[batch, 8, 8, 8] e) { e = Abs(c1) }>",
        },
    ),
    (ORT, "L03", "q0", "no zero point", {"(input, s, z)": "(input, s)", "(q0, s, z)": "(q0, s)"}),
    (ORT, "L03", "q0", "type INT8, not UINT8", {"uint8 z = {3}": "int8 z = {0}"}),
    (ORT, "L03", "w1_d", "other than 0", {"int8[8] wz = {0, ": "int8[8] wz = {1, "}),
    (
        ORT,
        "L03",
        "d3",
        "computed zero point",
        {**node("[max] zc = Max(z, z)", before="q3"), "(a, s2, z)": "(a, s2, zc)", "(q3, s2, z)": "(q3, s2, zc)"},
    ),
    (TRT, "L03", "q0", "type UINT8, not INT8", {"int8 z = {0}": "uint8 z = {0}"}),
    (TRT, "L03", "d0", "other than 0", {"int8 z = {0}": "int8 z = {1}"}),
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
        "L05",
        "q3",
        "8 scales on an activation",
        {"float s2 = {2.0},": "", "(r2, s2, z)": "<axis = 1>(r2, ws, wz)", "(q3, s2, z)": "<axis = 1>(q3, ws, wz)"},
    ),
    (TRT, "L05", "w2_d", "axis 1, and the channels of Conv", {"<axis = 0>(w2,": "<axis = 1>(w2,"}),
    (TRT, "L05", "w3_d", "axis None", {"<axis = 0>(w3,": "(w3,"}),
    (TRT, "L05", "w3_d", "axis 0, and the channels of Gemm", {"<transB = 1>": ""}),
    (
        TRT,
        "L05",
        "w1_d",
        "shape [1] for axis 0 of [8, 3, 3, 3]",
        {**constant("float[1] w1s = {0.25}, int8[1] w1z = {0}"), "(w1, ws, wz)": "(w1, w1s, w1z)"},
    ),
    (ORT, "L06", "conv1", "bias bf is not INT32", {**constant(f"float[8] bf = {ones(8)}"), "w1_d, b1_d": "w1_d, bf"}),
    (ORT, "L06", "b1_d", "input scale times weight scale", {"bs = {0.125,": "bs = {0.1250002,"}),
    (ORT, "L06", "b2_d", "can overflow", {"int32[8] b = {1,": "int32[8] b = {-2147483647,"}),
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
            **constant(f"int32[8] bi = {ones(8)}, int32[8] bz = {zeros(8)}"),
            **node("[b_d] b_d = DequantizeLinear<axis = 0>(bi, ws, bz)", before="q0"),
            "w1_d, b)": "w1_d, b_d)",
        },
    ),
    (TRT, "L07", "q3", "Clip clip reads", {**node("[clip] k = Clip(q3)", before="d3"), "(q3, s2, z)": "(k, s2, z)"}),
    (TRT, "L07", "w1_d", "integers from Clip", {**node("[k] k = Clip(w1)", before="w1_d"), "(w1, ws": "(k, ws"}),
    (TRT, "L07", "d3", "another scale or zero point than q3", {"(q3, s2, z)": "(q3, s, z)"}),
    (TRT, "L08", "conv1", "an INT8 weight and a float input", {"(d0, w1_d": "(input, w1_d"}),
    (
        TRT,
        "L10",
        "conv2",
        "Transpose between",
        {**node("[t] w2_t = Transpose<perm = [1, 0, 2, 3]>(w2_d)", before="conv2"), "(d1, w2_d": "(d1, w2_t"},
    ),
    (TRT, "L10", "fc", "Clip between", {**node("[t] w3_t = Clip(w3_d)", before="fc"), "(d5, w3_d": "(d5, w3_t"}),
    (
        TRT,
        "L11",
        "bn",
        "batch norm behind conv1",
        {**node("[bn] n = BatchNormalization(c1, b, b, b, b)", before="relu1"), "Relu(c1)": "Relu(n)"},
    ),
    (TRT, "L20", "input", "FLOAT [batch, 3, height, 8]", {"[batch, 3, 8, 8] input": "[batch, 3, height, 8] input"}),
    (TRT, "L20", "mask", "BOOL [batch, 1]", {"8] input)": "8] input, bool[batch, 1] mask)"}),
    (TRT, "L20", "logits", "FLOAT [batch, classes]", {"[batch, 8] logits": "[batch, classes] logits"}),
    (TRT, "L24", "lost", "4,100 bytes", constant(f"float[1025] lost = {ones(1025)}")),
    (
        TRT,
        "L26",
        "w1_q",
        "constant w1f stored before it is quantized",
        {
            f"int8[8, 3, 3, 3] w1 = {ones(216)}": f"float[8, 3, 3, 3] w1f = {ones(216)}",
            **node("[w1_q] w1 = QuantizeLinear<axis = 0>(w1f, ws, wz)", before="w1_d"),
        },
    ),
]
WARNINGS: list[tuple[SchemeName, str, str, str, Changes]] = [
    (
        TRT,
        "L08",
        "conv1",
        "an INT8 input and a float weight",
        {**constant(f"float[8, 3, 3, 3] w1f = {ones(216)}"), "(d0, w1_d": "(d0, w1f"},
    ),
    (TRT, "L12", "add", "skip operand is float", {"Add(c2, d1)": "Add(c2, r1)"}),
    (ORT, "L17", "conv2", "a float output", {"Add(d2, d1)": "Add(c2, d1)"}),
    (ORT, "L17", "conv1", "a float output", {"Relu(c1)": "HardSwish(c1)"}),
    (TRT, "L24", "lost", "4 bytes", constant("float lost = {1}")),
    (TRT, "L24", "same", "Identity", {**node("[same] i = Identity(p)", before="flat"), "Flatten(p)": "Flatten(i)"}),
    (TRT, "L24", "drop", "Dropout", {**node("[drop] i = Dropout(p)", before="flat"), "Flatten(p)": "Flatten(i)"}),
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


def broken_id(case: object) -> str | None:
    return case if isinstance(case, str) else None


@pytest.mark.parametrize(("scheme", "rule", "culprit", "found", "changes"), ERRORS, ids=broken_id)
def test_an_error_names_its_rule_node_and_fault(
    scheme: SchemeName, rule: str, culprit: str, found: str, changes: Changes
) -> None:
    """One fault breaks one rule and no other, and the finding says which node has it."""
    findings = lint(graph(scheme, changes), scheme)
    assert {(finding.rule, finding.severity) for finding in findings} == {(rule, "error")}
    assert any(finding.node == culprit and found in finding.found for finding in findings), findings


@pytest.mark.parametrize(("scheme", "rule", "culprit", "found", "changes"), WARNINGS, ids=broken_id)
def test_a_warning_names_its_rule_node_and_fault(
    scheme: SchemeName, rule: str, culprit: str, found: str, changes: Changes
) -> None:
    """What is slow or superfluous is said once, and refuses nothing."""
    (finding,) = findings = lint(graph(scheme, changes), scheme)
    assert (finding.rule, finding.severity, finding.node) == (rule, "warning", culprit)
    assert found in finding.found
    refuse_findings(findings, path_name="int8.onnx")


def test_every_rule_is_broken_by_a_test() -> None:
    """A rule that nothing here breaks could be blind."""
    rules = {rule.remedy for rules in RULES.values() for rule in rules}
    assert rules <= {found.remedy for case in (*ERRORS, *WARNINGS) for found in lint(graph(case[0], case[-1]), case[0])}


def test_a_graph_that_is_not_onnx_is_not_read_any_further() -> None:
    """A node without its inputs would only confuse the other rules."""
    headless = graph(TRT)
    del headless.graph.node[-1].input[:], headless.graph.node[0].input[:]
    assert [(found.rule, found.node) for found in lint(headless, TRT)] == [("L01", "classifier")]


def test_integers_that_leave_the_graph_are_an_error() -> None:
    """A caller would get INT8 where float was agreed; the type of the output is wrong too."""
    findings = lint(graph(TRT, {"[batch, 8] logits)": "[batch, 8] logits, int8[batch, 8, 8, 8] q3)"}), TRT)
    assert [(finding.rule, finding.node) for finding in findings] == [("L07", "q3"), ("L20", "q3")]


def test_a_constant_operand_is_no_skip() -> None:
    """Adding a constant behind a convolution is a bias, not a residual."""
    offset = {**constant("float offset = {1}"), "Add(c2, d1)": "Add(c2, offset)"}
    assert lint(graph(TRT, offset), TRT) == ()


def test_weights_of_a_transposed_convolution_have_their_channels_on_axis_1() -> None:
    """[inputs, outputs, height, width], unlike a convolution's."""
    transposed = {"Conv<pads = [1, 1, 1, 1]>(d1": "ConvTranspose<pads = [1, 1, 1, 1]>(d1"}
    assert [finding.rule for finding in lint(graph(TRT, transposed), TRT)] == ["L05"]
    assert lint(graph(TRT, {**transposed, "<axis = 0>(w2,": "<axis = 1>(w2,"}), TRT) == ()


def test_constant_nodes_are_constants() -> None:
    """A scale is as constant in a Constant node as in an initializer."""
    as_node = {"float s2 = {2.0},": "", **node("[c] s2 = Constant<value = float {2.0}>()", before="q3")}
    assert lint(graph(TRT, as_node), TRT) == ()


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
