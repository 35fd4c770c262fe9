from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from tasks.contracts.errors import ExportError
from tasks.contracts.records import LayerCost
from tasks.graph.count import compression, count_layers
from tasks.graph.half import half_from


def ones(count: int) -> str:
    return "{" + ", ".join(["1"] * count) + "}"


def graph(constants: str, nodes: str, *, takes: str = "batch, 4, 8, 8", gives: str = "batch, 5") -> onnx.ModelProto:
    return onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 20]> g (float[{takes}] input) => (float[{gives}] logits)'
        f"<{constants}> {{ {nodes} }}"
    )


def only_layer(model: onnx.ModelProto, *, shape: tuple[int, ...] = (1, 4, 8, 8)) -> LayerCost:
    (layer,) = count_layers(model, shape)
    return layer


FLOAT = graph(
    f"float[6, 4, 3, 3] w = {ones(216)}, float[6] b = {ones(6)}, float[5, 6] v = {ones(30)}, float[5] c = {ones(5)}",
    """[conv] x = Conv<strides = [2, 2], pads = [1, 1, 1, 1]>(input, w, b)
    p = GlobalAveragePool(x)
    f = Flatten(p)
    [fc] logits = Gemm<transB = 1>(f, v, c)""",
)
INT8 = graph(
    f"""float s = {{1}}, uint8 z = {{0}}, int8[6, 4, 3, 3] w = {ones(216)}, int32[6] b = {ones(6)},
    float[6] ws = {ones(6)}, int8[6] wz = {ones(6)}, int32[6] bz = {ones(6)}, float[6] bs = {ones(6)},
    float[5, 6] v = {ones(30)}, float[5] c = {ones(5)}, int64[2] flat = {{0, -1}}""",
    """q = QuantizeLinear(input, s, z)
    d = DequantizeLinear(q, s, z)
    wd = DequantizeLinear<axis = 0>(w, ws, wz)
    bd = DequantizeLinear<axis = 0>(b, bs, bz)
    [conv] x = Conv<strides = [2, 2], pads = [1, 1, 1, 1]>(d, wd, bd)
    p = GlobalAveragePool(x)
    f = Reshape(p, flat)
    [fc] logits = Gemm<transB = 1>(f, v, c)""",
)


def test_a_strided_convolution_and_a_classifier() -> None:
    """16 outputs of 6 channels over 4 x 3 x 3 inputs; 5 classes of 6 features; biases are parameters."""
    assert count_layers(FLOAT, (1, 4, 8, 8)) == (
        LayerCost(layer="conv", op_type="Conv", parameters=216 + 6, macs=16 * 6 * 36, precision="float32"),
        LayerCost(layer="fc", op_type="Gemm", parameters=30 + 5, macs=30, precision="float32"),
    )


def test_quantized_layers_cost_the_same_in_int8() -> None:
    """Q/DQ changes the precision, not the counts; a float layer among them stays float."""
    counted = zip(count_layers(FLOAT, (1, 4, 8, 8)), count_layers(INT8, (1, 4, 8, 8)), strict=True)
    assert [(before.macs == after.macs, before.parameters == after.parameters) for before, after in counted] == [
        (True, True),
        (True, True),
    ]
    assert [layer.precision for layer in count_layers(INT8, (1, 4, 8, 8))] == ["int8", "float32"]


def test_the_batch_does_not_count() -> None:
    """Costs are of one image, whatever batch the shape names and even if the graph's is fixed."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(INT8)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 16
    assert count_layers(fixed, (16, 4, 8, 8)) == count_layers(INT8, (7, 4, 8, 8)) == count_layers(INT8, (1, 4, 8, 8))


def test_the_model_stays_as_it_was() -> None:
    """Counting fixes the batch of a copy."""
    before = INT8.SerializeToString()
    count_layers(INT8, (1, 4, 8, 8))
    assert INT8.SerializeToString() == before


def test_a_grouped_convolution() -> None:
    """Each of the 8 x 64 outputs sees the 2 channels of its group; no bias."""
    model = graph(
        f"float[8, 2, 3, 3] w = {ones(144)}",
        "[dw] logits = Conv<group = 2, pads = [1, 1, 1, 1]>(input, w)",
        gives="batch, 8, 8, 8",
    )
    assert (only_layer(model).parameters, only_layer(model).macs) == (144, 8 * 64 * 2 * 9)


def test_a_transposed_convolution() -> None:
    """Each of the 4 x 64 inputs is spread over 3 channels of 2 x 2 outputs."""
    model = graph(
        f"float[4, 3, 2, 2] w = {ones(48)}",
        "[up] logits = ConvTranspose<strides = [2, 2]>(input, w)",
        gives="batch, 3, 16, 16",
    )
    assert (only_layer(model).parameters, only_layer(model).macs) == (48, 4 * 64 * 12)


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_gemm_by_either_layout(transposed: int) -> None:
    """7 features to 5 classes is 35 products, however the weight is stored."""
    shape = "5, 7" if transposed else "7, 5"
    node = f"[fc] logits = Gemm<transB = {transposed}>(input, w)"
    model = graph(f"float[{shape}] w = {ones(35)}", node, takes="batch, 7")
    assert (only_layer(model, shape=(1, 7)).macs, only_layer(model, shape=(1, 7)).parameters) == (35, 35)


def test_a_matmul_over_many_rows() -> None:
    """4 x 8 rows of 8 values to 3 values each."""
    model = graph(f"float[8, 3] w = {ones(24)}", "[mix] logits = MatMul(input, w)", gives="batch, 4, 8, 3")
    assert (only_layer(model).macs, only_layer(model).parameters) == (4 * 8 * 8 * 3, 24)


def test_a_product_of_activations_is_no_layer() -> None:
    """Without a constant weight there are no parameters to quantize."""
    assert count_layers(graph("", "logits = MatMul(input, input)", gives="batch, 4, 8, 8"), (1, 4, 8, 8)) == ()


def test_an_unnamed_layer_is_called_by_its_output() -> None:
    """The report needs some name."""
    model = graph(f"float[2, 4, 1, 1] w = {ones(8)}", "logits = Conv(input, w)", gives="batch, 2, 8, 8")
    assert only_layer(model).layer == "logits"


def test_only_eight_bits_count_as_int8() -> None:
    """An INT8 weight at a float input is computed in float."""
    weight_only = onnx.ModelProto()
    weight_only.CopyFrom(INT8)
    (conv,) = (node for node in weight_only.graph.node if node.op_type == "Conv")
    conv.input[0] = "input"
    assert count_layers(weight_only, (1, 4, 8, 8))[0].precision == "float32"


def test_float16_around_int8() -> None:
    """A layer's precision is that of its weight as it is read; INT8 stays INT8 whatever its scales are."""
    int8 = onnx.ModelProto()
    int8.CopyFrom(INT8)
    del int8.graph.node[3]  # the INT32 bias, which float16 cannot go with
    conv = next(node for node in int8.graph.node if node.op_type == "Conv")
    del conv.input[2]
    weight_zero = next(tensor for tensor in int8.graph.initializer if tensor.name == "wz")
    weight_zero.CopyFrom(onnx.numpy_helper.from_array(np.zeros(6, np.int8), "wz"))
    half, _ = half_from(int8)
    assert [layer.precision for layer in count_layers(half, (1, 4, 8, 8))] == ["int8", "float16"]
    assert [layer.precision for layer in count_layers(half_from(FLOAT)[0], (1, 4, 8, 8))] == ["float16", "float16"]
    assert [layer.macs for layer in count_layers(half, (1, 4, 8, 8))] == [3456, 30]


def test_float16_counts_two_bytes(tmp_path: Path) -> None:
    """257 parameters of 16 bits; the float file is the one that is compared with."""
    paths = tmp_path / "float.onnx", tmp_path / "half.onnx"
    for path, model in zip(paths, (FLOAT, half_from(FLOAT)[0]), strict=True):
        onnx.save(model, path)
    saved = compression(*paths, (1, 4, 8, 8))
    assert (saved.bits_per_weight, saved.parameters, saved.int8_macs) == (16, 257, 0)


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (4, 8, 8), (1, 4, 8, 9)])
def test_a_foreign_shape_is_refused(shape: tuple[int, ...]) -> None:
    """Counting at a shape that the graph does not take would count another model."""
    with pytest.raises(ExportError, match=r"takes \['batch', 4, 8, 8\], not \[1"):
        count_layers(FLOAT, shape)


def test_a_graph_that_does_not_compute_is_refused() -> None:
    """The chained error says where the shapes clash."""
    model = graph(f"float[5, 7] w = {ones(35)}", "f = Flatten(input) [fc] logits = Gemm<transB = 1>(f, w)")
    with pytest.raises(ExportError, match=r"does not compute on \[1, 4, 8, 8\]") as refusal:
        count_layers(model, (1, 4, 8, 8))
    assert isinstance(refusal.value.__cause__, onnx.shape_inference.InferenceError)


def test_an_unknown_shape_is_refused() -> None:
    """A layer behind a data-dependent size has no fixed cost."""
    nodes = "n = NonZero(input) r = Cast<to = 1>(n) t = Transpose(r) [fc] logits = MatMul(t, w)"
    with pytest.raises(ExportError, match=r"shape of 't' at MatMul fc is not known"):
        count_layers(graph(f"float[4, 5] w = {ones(20)}", nodes, gives="n, 5"), (1, 4, 8, 8))


def test_a_graph_without_input_is_refused() -> None:
    """An empty file is a valid, empty model."""
    with pytest.raises(ExportError, match="has 0 inputs"):
        count_layers(onnx.ModelProto(), (1, 4, 8, 8))


def test_compression_counts_files_and_bits(tmp_path: Path) -> None:
    """257 parameters are stored as weights, biases, scales and zero points; a Reshape's shape is none of them."""
    float_path, int8_path = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    onnx.save(FLOAT, float_path)
    onnx.save(INT8, int8_path)
    saved = compression(float_path, int8_path, (1, 4, 8, 8))
    assert saved.parameters == 216 + 6 + 30 + 5
    convolution, classifier, activation = 216 + 6 * 4 + 6 * (4 + 1 + 4 + 4), 35 * 4, 4 + 1  # bytes
    assert saved.bits_per_weight == pytest.approx(8 * (convolution + classifier + activation) / 257)
    assert (saved.float_bytes, saved.int8_bytes) == (float_path.stat().st_size, int8_path.stat().st_size)
    assert saved.ratio == saved.float_bytes / saved.int8_bytes
    assert (saved.macs, saved.int8_macs) == (3456 + 30, 3456)
    assert saved.layers == count_layers(INT8, (1, 4, 8, 8))


def test_a_float_file_without_parameters_is_refused(tmp_path: Path) -> None:
    """Bits per weight of nothing would be infinite."""
    empty, int8_path = tmp_path / "empty.onnx", tmp_path / "int8.onnx"
    onnx.save(graph("float s = {1}", "x = Mul(input, s) logits = Flatten(x)", gives="batch, 256"), empty)
    onnx.save(INT8, int8_path)
    with pytest.raises(ExportError, match=r"empty\.onnx holds no float parameters"):
        compression(empty, int8_path, (1, 4, 8, 8))


@pytest.mark.parametrize("content", [None, b"not a model"], ids=["missing", "foreign"])
def test_an_unreadable_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    """The file is named, and the cause is chained."""
    path = tmp_path / "float.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ExportError, match=r"float\.onnx cannot be read") as refusal:
        compression(path, path, (1, 4, 8, 8))
    assert refusal.value.__cause__ is not None
