from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from torch import Tensor

from tasks.contracts.errors import ExportError
from tasks.contracts.spec import QuantSpec
from tasks.engines.onnxruntime import OnnxRuntimeEngine
from tasks.graph.export import INPUT, export_onnx
from tasks.graph.half import HEADROOM, LARGEST, LONGEST_SUM, SMALLEST, half_from, largest_values
from tasks.graph.lint import lint
from tasks.graph.parity import Feed
from tasks.models.digits import digits_net
from tasks.quant.calibrate import calibrate
from tasks.quant.capture import capture, fold_batch_norm
from tasks.quant.schemes import SCHEMES
from tasks.quant.simulate import convert, simulate
from tests.tasks.graph.rounded import rounded

FLOAT, FLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16


def parse(
    nodes: str, constants: str = "", *, takes: str = "batch, 4, 8, 8", gives: str = "batch, 4, 8, 8", opset: int = 20
) -> onnx.ModelProto:
    return onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": {opset}]> g (float[{takes}] input) => (float[{gives}] logits)'
        f"<{constants}> {{ {nodes} }}"
    )


def ones(*shape: int, value: float = 1) -> str:
    """Of a constant of this shape."""
    return f"float[{', '.join(map(str, shape))}] {{}} = {{{', '.join([str(value)] * int(np.prod(shape)))}}}"


WEIGHT = f"float[4, 4, 1, 1] w = {{{', '.join(['0.1'] * 16)}}}"


def types(model: onnx.ModelProto) -> dict[str, str]:
    """Type of each tensor that a node gives, as ONNX infers it without hints."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]
    graph = onnx.shape_inference.infer_shapes(bare, strict_mode=True).graph
    return {
        value.name: TensorProto.DataType.Name(value.type.tensor_type.elem_type)
        for value in (*graph.value_info, *graph.output)
    }


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def casts(model: onnx.ModelProto) -> list[str]:
    """What is cast, in order."""
    return [node.input[0] for node in model.graph.node if node.op_type == "Cast"]


def run(path: Path, feed: Feed) -> Feed:
    with OnnxRuntimeEngine(path, threads=1) as engine:
        return engine.run(feed)


def answer(model: onnx.ModelProto, images_NCHW: np.ndarray, folder: Path) -> np.ndarray:
    """Operator by operator: ONNX Runtime's optimizer would make integers of biases, in steps too small for float16."""
    onnx.save(model, folder / "answered.onnx")
    with OnnxRuntimeEngine(folder / "answered.onnx", threads=1, optimise=False) as engine:
        return engine.answer(images_NCHW)


@dataclass(frozen=True)
class Exported:
    """The digits model, whose parts are all that the scheme treats in its own way."""

    images_NCHW: np.ndarray
    float_model: onnx.ModelProto
    int8_model: onnx.ModelProto


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    images_NCHW: Tensor = torch.randn(16, 1, 32, 32)
    network = digits_net().train()
    with torch.no_grad():
        for _ in range(10):
            network(images_NCHW)
    folded = capture(network.eval(), images_NCHW[:2])
    fold_batch_norm(folded)
    simulation = simulate(folded, SCHEMES["tensorrt"], frozenset())
    calibrate(simulation, lambda: [images_NCHW], QuantSpec(ranges="minmax"))
    models, path = [], tmp_path_factory.mktemp("exported") / "model.onnx"
    for graph in (folded, convert(simulation)):
        export_onnx(graph, images_NCHW[:2], path, integer_bias=False)
        models.append(onnx.load(path))
    return Exported(images_NCHW.numpy(), *models)


@pytest.mark.parametrize("kind", ["float_model", "int8_model"])
def test_an_exported_model_is_float16_but_for_its_ends(kind: str, exported: Exported) -> None:
    """Same operators, same names, same ends; every float tensor in between is float16."""
    model = getattr(exported, kind)
    before = model.SerializeToString()
    half, notes = half_from(model)
    assert model.SerializeToString() == before
    assert notes == ()
    onnx.checker.check_model(half, full_check=True)
    assert (half.graph.input, half.graph.output) == (model.graph.input, model.graph.output)
    assert Counter(operators(half)) - Counter(operators(model)) == Counter(Cast=len(casts(half)))
    expected = {name: "FLOAT16" if kind == "FLOAT" else kind for name, kind in types(model).items()}
    found = types(half)
    assert {**expected, "logits": "FLOAT"} == {name: found[name] for name in expected}
    at_input = [
        node.input[1] for node in half.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == INPUT
    ]
    assert [name for name, array in constants(half).items() if array.dtype == np.float32] == at_input


def test_casts_stand_at_the_ends_alone(exported: Exported) -> None:
    """A float graph casts its input; an INT8 graph quantizes it as it comes. Both cast their logits."""
    float_half, int8_half = half_from(exported.float_model)[0], half_from(exported.int8_model)[0]
    assert casts(float_half) == ["input", "logits_float16"]
    assert casts(int8_half) == ["logits_float16"]
    assert [node.op_type for node in int8_half.graph.node if INPUT in node.input] == ["QuantizeLinear"]


def test_integers_stay_and_scales_move_by_a_rounding(exported: Exported) -> None:
    """INT8 weights and zero points are the same bytes; a tensor is quantized and dequantized with one value."""
    half, _ = half_from(exported.int8_model)
    before, after = constants(exported.int8_model), constants(half)
    assert before.keys() == after.keys() - {name for name in after if name not in before}
    for name, array in before.items():
        if array.dtype == np.int8:
            np.testing.assert_array_equal(after[name], array)
            assert after[name].dtype == np.int8
        elif array.dtype == np.float32:
            np.testing.assert_allclose(after[name].astype(np.float32), array, rtol=2**-11, atol=6e-8)
    quantizing = {node.output[0]: node for node in half.graph.node if node.op_type == "QuantizeLinear"}
    pairs = [(quantizing[node.input[0]], node) for node in half.graph.node if node.input[0] in quantizing]
    assert pairs
    for quantize, dequantize in pairs:
        assert dequantize.op_type == "DequantizeLinear"
        assert float(after[quantize.input[1]]) == float(after[dequantize.input[1]])


def test_the_lint_has_nothing_against_it(exported: Exported) -> None:
    """TensorRT's rules hold for the types too."""
    findings = lint(half_from(exported.int8_model)[0], "tensorrt")
    assert [finding for finding in findings if finding.severity != "info"] == []


@pytest.mark.parametrize(("kind", "tolerance"), [("float_model", 0.001), ("int8_model", 0.005)])
def test_the_logits_stay(kind: str, tolerance: float, exported: Exported, tmp_path: Path) -> None:
    """With each float16 tensor rounded; a few integers tip over, hence more tolerance for INT8."""
    model = getattr(exported, kind)
    exact_NC = answer(model, exported.images_NCHW, tmp_path)
    half, _ = half_from(model)
    for as_run in (half, rounded(half)):
        error_NC = answer(as_run, exported.images_NCHW, tmp_path) - exact_NC
        assert 0 < np.sqrt(np.square(error_NC).mean()) < tolerance * exact_NC.std()


def test_rounding_is_done_where_the_graph_says(tmp_path: Path) -> None:
    """The measure itself: 1 + 2^-11 lies between two float16 values, and only `rounded` gives one of them."""
    half, _ = half_from(parse("a = Relu(input) b = Add(a, a) logits = Neg(b)"))
    fine = np.full((1, 4, 8, 8), 3 + 2**-9, np.float32)
    assert answer(rounded(half), fine, tmp_path).flat[0] == -2 * np.float32(np.float16(3 + 2**-9))


def int8_layer(scales: list[float], *, steps: int = 100, activation: float = 0.02) -> onnx.ModelProto:
    """A 1x1 convolution of 4 channels with these weight scales, between quantized tensors."""
    return parse(
        """q = QuantizeLinear(input, s, z)
        d = DequantizeLinear(q, s, z)
        wd = DequantizeLinear<axis = 0>(w, ws, wz)
        [conv] x = Conv(d, wd, b)
        [relu] y = Relu(x)
        p = QuantizeLinear(y, t, z)
        [last] logits = DequantizeLinear(p, t, z)""",
        f"""float s = {{{activation}}}, int8 z = {{0}}, float t = {{0.05}},
        float[4] ws = {{{", ".join(map(str, scales))}}},
        int8[4] wz = {{0, 0, 0, 0}}, float[4] b = {{0.1, 0.2, 0.3, 0.4}},
        int8[4, 4, 1, 1] w = {{{", ".join([str(steps)] * 16)}}}""",
    )


def test_a_scale_that_is_too_small_is_raised() -> None:
    """Its channel is quantized anew: 100 steps of 1.2e-5 are 20 of 6.1e-5. Other channels keep their integers."""
    half, (note,) = half_from(int8_layer([0.01, 1.2e-5, 0.02, 0.01]))
    after = constants(half)
    np.testing.assert_array_equal(after["ws"], np.array([0.01, SMALLEST, 0.02, 0.01], np.float16))
    np.testing.assert_array_equal(after["w"][:, 0, 0, 0], np.array([100, 20, 100, 100], np.int8))
    assert note == "w: 1 of 4 scales (1; smallest 1.2e-05) raised to 6.1e-05, and their weights quantized anew"
    assert not [array for name, array in after.items() if name not in ("s", "t") and array.dtype == np.float32]


@settings(max_examples=50)
@given(st.lists(st.floats(1e-9, 6e-5), min_size=3, max_size=3), st.integers(-128, 127))
def test_no_raised_weight_moves_by_more_than_half_a_step(scales: list[float], steps: int) -> None:
    """In steps of float16's smallest scale."""
    model = int8_layer([1.0, *scales], steps=steps or 1)
    half, _ = half_from(model)
    before, after = constants(model), constants(half)
    exact = before["w"].astype(np.float64) * before["ws"].reshape(4, 1, 1, 1)
    found = after["w"].astype(np.float64) * after["ws"].astype(np.float64).reshape(4, 1, 1, 1)
    assert np.abs(found - exact).max() <= 0.5001 * SMALLEST


def test_a_layer_that_would_lose_its_weights_stays_float32() -> None:
    """With all that follows up to the next quantized tensor: no Cast comes near an integer."""
    model = int8_layer([1e-6, 1e-6, 1e-6, 1.1e-6])
    half, (note,) = half_from(model)
    assert note == "conv stays float32: float16 cannot hold w (off by 20 %)"
    assert casts(half) == []
    assert operators(half) == operators(model)
    for name in ("w", "ws", "b"):
        np.testing.assert_array_equal(constants(half)[name], constants(model)[name])
        assert constants(half)[name].dtype == constants(model)[name].dtype


def test_an_activation_with_a_tiny_scale_stays_float32() -> None:
    """Its integers cannot be moved; neither Q nor what reads it computes in float16."""
    half, notes = half_from(int8_layer([0.01] * 4, activation=1e-6))
    assert notes == (
        "q stays float32: scale s is 1e-06",
        "conv stays float32: scale s is 1e-06",
    )
    assert constants(half)["s"] == np.float32(1e-6)
    assert casts(half) == []


def test_an_integer_tensor_for_both_types_is_dequantized_twice() -> None:
    """A long mean reads float32 and the layer float16, and no Cast stands behind a DequantizeLinear."""
    half, (note,) = half_from(
        parse(
            """q = QuantizeLinear(input, s, z)
            d = DequantizeLinear(q, s, z)
            [pool] m = GlobalAveragePool(d)
            [conv] x = Conv(m, w)
            logits = Mul(d, x)""",
            f"float s = {{0.02}}, int8 z = {{0}}, {WEIGHT}",
            takes="batch, 4, 17, 17",
            gives="batch, 4, 17, 17",
        )
    )
    assert note == "pool stays float32: it sums 289 values"
    found = types(half)
    dequantized = [node.output[0] for node in half.graph.node if node.op_type == "DequantizeLinear"]
    assert sorted(found[name] for name in dequantized) == ["FLOAT", "FLOAT16"]
    assert casts(half) == ["m", "logits_float16"]
    assert not set(casts(half)) & set(dequantized)


@pytest.mark.parametrize(("side", "kind"), [(16, "FLOAT16"), (17, "FLOAT")])
@pytest.mark.parametrize(
    "node",
    [
        "m = GlobalAveragePool(input)",
        "m = ReduceMean<keepdims = 1>(input, axes)",
        "m = AveragePool<kernel_shape = [{side}, {side}]>(input)",
    ],
)
def test_a_mean_over_many_values_stays_float32(node: str, side: int, kind: str) -> None:
    """16 x 16 values are few enough."""
    nodes = f"r = Conv(input, w) {node.format(side=side).replace('input', 'r')} logits = Conv(m, w)"
    size = f"batch, 4, {side}, {side}"
    half, _ = half_from(parse(nodes, f"{WEIGHT}, int64[2] axes = {{2, 3}}", takes=size, gives="batch, 4, 1, 1"))
    assert types(half)["m"] == kind


def test_a_mean_of_unknown_size_stays_float32() -> None:
    """It may be large."""
    nodes = "r = Conv(input, w) [logits] logits = GlobalAveragePool(r)"
    half, (note,) = half_from(parse(nodes, WEIGHT, takes="batch, 4, h, w", gives="batch, 4, 1, 1"))
    assert note == "logits stays float32: it may sum any number of values"
    assert types(half)["logits"] == "FLOAT"


def test_what_a_running_sum_in_float16_costs() -> None:
    """The figures beside LONGEST_SUM: relative error of a mean, root of the mean square and at worst."""
    random = np.random.default_rng(0)

    def errors(count: int) -> np.ndarray:
        values_MN = np.abs(random.standard_normal((2000, count))).astype(np.float16)
        sum_M = np.zeros(len(values_MN), np.float16)
        for column in values_MN.T:
            sum_M = (sum_M + column).astype(np.float16)
        exact_M = values_MN.astype(np.float64).mean(1)
        return np.asarray(np.abs(sum_M.astype(np.float64) / count / exact_M - 1))

    assert np.sqrt(np.square(errors(LONGEST_SUM)).mean()) < 0.0025
    assert errors(LONGEST_SUM).max() < 1 / 127
    assert np.sqrt(np.square(errors(3136)).mean()) > 0.03


def test_softmax_stays_float32_to_the_end() -> None:
    """And with it what follows: one Cast before it, none behind."""
    half, (note,) = half_from(
        parse(
            "x = Conv(input, w) f = Flatten(x) [soft] p = Softmax(f) logits = Identity(p)", WEIGHT, gives="batch, 256"
        )
    )
    assert note == "soft stays float32: Softmax leaves float16's range on the way"
    assert casts(half) == ["input", "f"]
    assert types(half)["p"] == "FLOAT"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("1e5", r"shift stays float32: float16 cannot hold c$"),
        ("1e-9", r"shift stays float32: float16 cannot hold c$"),
        ("1.0001e-6", r"shift stays float32: float16 cannot hold c \(off by .* %\)$"),
    ],
    ids=["overflow", "underflow", "digits"],
)
def test_a_constant_that_float16_cannot_hold(value: str, text: str) -> None:
    """Too large, too small, or with too few digits: the node that reads it stays float32."""
    nodes = "x = Conv(input, w) [shift] y = Add(x, c) logits = Conv(y, w)"
    half, (note,) = half_from(parse(nodes, f"{WEIGHT}, float c = {{{value}}}"))
    assert re.search(text, note)
    assert types(half)["y"] == "FLOAT"
    assert constants(half)["c"].dtype == np.float32


def test_infinite_bounds_are_held() -> None:
    """Float16 has infinity too."""
    model = parse("x = Conv(input, w) logits = Clip(x, low, high)", f"{WEIGHT}, float low = {{0}}, float high = {{1}}")
    high = next(tensor for tensor in model.graph.initializer if tensor.name == "high")
    high.CopyFrom(numpy_helper.from_array(np.array(np.inf, np.float32), "high"))
    half, notes = half_from(model)
    assert notes == ()
    assert constants(half)["high"] == np.float16(np.inf)


def test_a_constant_for_both_types_is_kept_in_both() -> None:
    """The layer reads float16, the other float32."""
    nodes = "x = Conv(input, w) [shift] y = Add(x, c) z = Mul(y, k) v = Conv(z, w) logits = Mul(v, k)"
    half, _ = half_from(parse(nodes, f"{WEIGHT}, float c = {{1e5}}, float k = {{2}}"))
    assert {name: array.dtype.name for name, array in constants(half).items()} == {
        "w": "float16", "c": "float32", "k": "float32", "k_float16": "float16",
    }  # fmt: skip


def test_values_that_come_near_the_largest_stay_float32(tmp_path: Path) -> None:
    """Observed on images: what gives or reads the tensor stays float32, and the rest does not."""
    large = LARGEST / HEADROOM
    model = parse(
        "[a] x = Conv(input, w) [b] y = Mul(x, c) [d] v = Mul(y, e) logits = Conv(v, w)",
        f"{WEIGHT}, float c = {{1000}}, float e = {{0.001}}",
    )
    onnx.save(model, tmp_path / "model.onnx")
    images_NCHW = np.full((2, 4, 8, 8), 30, np.float32)
    largest = largest_values(tmp_path / "model.onnx", images_NCHW, run, tmp_path)
    assert largest == pytest.approx({"x": 12, "y": 12_000, "v": 12, "logits": 4.8}, rel=1e-5)
    assert largest["y"] > large
    half, notes = half_from(model, largest)
    assert notes == ("b stays float32: y reaches 12,000", "d stays float32: y reaches 12,000")
    found = types(half)
    assert [found[name] for name in ("x", "y", "v")] == ["FLOAT16", "FLOAT", "FLOAT"]
    assert half_from(model, {"y": float("nan")})[1] != ()
    assert half_from(model)[1] == ()


def test_what_onnx_has_no_float16_for() -> None:
    """Resize takes its factors in float32, and a generated constant has the type that it was made with."""
    half, notes = half_from(
        parse(
            """x = Conv(input, w)
            r = Resize<mode = "nearest">(x, , factors)
            n = Shape(r)
            [filled] f = ConstantOfShape<value = float[1] {0.5}>(n)
            y = Add(r, f)
            logits = Conv(y, w)""",
            f"{WEIGHT}, float[4] factors = {{1, 1, 2, 2}}",
            gives="batch, 4, 16, 16",
        )
    )
    assert constants(half)["factors"].dtype == np.float32
    assert types(half)["r"] == types(half)["y"] == "FLOAT16"
    assert notes == ("filled stays float32: ONNX has no float16 for it",)
    assert casts(half) == ["input", "f", "logits_float16"]


def test_constants_in_nodes_and_casts_of_integers() -> None:
    """A Constant becomes an initializer; an integer is cast to float16 at once."""
    half, _ = half_from(
        parse(
            """x = Conv(input, w)
            k = Constant<value = float {0.5}>()
            n = Constant<value_ints = [3]>()
            i = Cast<to = 1>(n)
            y = Mul(x, k)
            z = Mul(y, i)
            logits = Conv(z, w)""",
            WEIGHT,
        )
    )
    assert "Constant" not in operators(half)
    assert types(half)["i"] == "FLOAT16"
    assert casts(half) == ["input", "n", "logits_float16"]


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (parse("logits = Relu(input)", opset=18), "opset 18.*opset 20"),
        (parse("d = Cast<to = 11>(input) e = Relu(d) logits = Cast<to = 1>(e)"), "d at Cast d is DOUBLE.*in float32"),
        (parse("h = Cast<to = 10>(input) e = Relu(h) logits = Cast<to = 1>(e)"), "h at Cast h is FLOAT16.*in float32"),
        (
            parse("s = ReduceMax<keepdims = 0>(input) q = QuantizeLinear(input, s, z)"
                  " logits = DequantizeLinear(q, s, z)", "int8 z = {0}"),
            "QuantizeLinear q has a computed scale",
        ),
        (
            parse("[bias] b = DequantizeLinear(i, s) logits = Conv(input, w, b)",
                  f"{WEIGHT}, int32[4] i = {{1, 2, 3, 4}}, float s = {{0.5}}"),
            "bias holds an INT32 bias.*float biases",
        ),
        (
            parse("[weight] d = DequantizeLinear(i, s, z) logits = Conv(input, d)",
                  f"int8[4, 4, 1, 1] i = {{{', '.join(['1'] * 16)}}}, float s = {{0.5}}, int8 z = {{3}}"),
            "weight has a zero point other than 0",
        ),
        (
            onnx.parser.parse_model(
                '<ir_version: 10, opset_import: ["": 20]> g (float[n] input, bool c) => (float[n] logits) {'
                " logits = If<then_branch = a () => (float[n] y) { y = Relu(input) },"
                " else_branch = b () => (float[n] z) { z = Neg(input) }>(c) }"
            ),
            "If logits is not a plain ONNX operator",
        ),
    ],
    ids=["opset", "double", "half", "scale", "bias", "zero point", "subgraph"],
)  # fmt: skip
def test_what_cannot_be_written_so_is_refused(model: onnx.ModelProto, text: str) -> None:
    """The node is named, and what to do."""
    with pytest.raises(ExportError, match=text):
        half_from(model)


def test_a_float16_graph_is_not_converted_again(exported: Exported) -> None:
    """Whoever does that has taken the wrong file."""
    half, _ = half_from(exported.float_model)
    with pytest.raises(ExportError, match="is FLOAT16"):
        half_from(half)
