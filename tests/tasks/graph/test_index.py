from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from tasks.contracts.errors import ExportError
from tasks.graph.index import LARGEST_BYTES, Graph, external_tensors, read_onnx


@pytest.fixture
def model() -> onnx.ModelProto:
    """One convolution, with weights that are worth a file of their own."""
    text = """<ir_version: 10, opset_import: ["": 20]>
    net (float[batch, 4, 8, 8] input) => (float[batch, 8, 6, 6] logits) { logits = Conv(input, w) }"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(numpy_helper.from_array(np.ones((8, 4, 3, 3), np.float32), "w"))
    return model


def save_apart(model: onnx.ModelProto, path: Path) -> None:
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)


def test_weights_in_another_file_are_read(model: onnx.ModelProto, tmp_path: Path) -> None:
    """From beside the file, wherever the process stands."""
    save_apart(model, tmp_path / "net.onnx")
    read = read_onnx(tmp_path / "net.onnx")
    assert list(external_tensors(read)) == []
    assert np.array_equal(Graph(read).value("w"), np.ones((8, 4, 3, 3), np.float32))


@pytest.mark.parametrize("harm", ["missing", "short"])
def test_weights_that_are_not_there_are_one_error(harm: str, model: onnx.ModelProto, tmp_path: Path) -> None:
    """The file that was asked for is named, and the other one."""
    save_apart(model, tmp_path / "net.onnx")
    weights = tmp_path / "weights.bin"
    weights.unlink() if harm == "missing" else weights.write_bytes(b"1234")
    with pytest.raises(ExportError, match=r"Weights that \S+net\.onnx stores outside itself .*") as refusal:
        read_onnx(tmp_path / "net.onnx")
    assert refusal.value.__cause__ is not None


def test_a_file_that_points_out_of_its_folder_is_refused(model: onnx.ModelProto, tmp_path: Path) -> None:
    """A graph from a stranger must not read what lies elsewhere."""
    inner = tmp_path / "inner"
    inner.mkdir()
    save_apart(model, inner / "net.onnx")
    (inner / "weights.bin").rename(tmp_path / "weights.bin")
    stored = onnx.load(inner / "net.onnx", load_external_data=False)
    next(
        entry for entry in stored.graph.initializer[0].external_data if entry.key == "location"
    ).value = "../weights.bin"
    (inner / "net.onnx").write_bytes(stored.SerializeToString())
    with pytest.raises(ExportError, match="stores outside itself cannot be read"):
        read_onnx(inner / "net.onnx")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "cannot be read: No such file"),
        (b"<html>404</html>", "cannot be read: it is not ONNX"),
        (b"", "holds no ONNX graph"),
    ],
    ids=["missing", "foreign", "empty"],
)
def test_what_is_no_onnx_file_is_one_error(content: bytes | None, found: str, tmp_path: Path) -> None:
    """With the file and the fault."""
    path = tmp_path / "net.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ExportError, match=rf"net\.onnx {found}"):
        read_onnx(path)


def test_a_folder_is_one_error(tmp_path: Path) -> None:
    """As a missing file is."""
    with pytest.raises(ExportError, match="cannot be read: Is a directory"):
        read_onnx(tmp_path)


def test_more_than_two_gib_is_refused_before_it_is_read(model: onnx.ModelProto, tmp_path: Path) -> None:
    """In the file, or in what it refers to; neither takes memory."""
    path = tmp_path / "large.onnx"
    path.touch()
    os.truncate(path, LARGEST_BYTES + 1)  # sparse
    with pytest.raises(ExportError, match=r"large\.onnx holds 2\.0 GiB"):
        read_onnx(path)
    tensor = model.graph.initializer[0]
    tensor.CopyFrom(TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2**20, 2**10, 1, 1]))
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match=r"large\.onnx holds 4\.0 GiB"):
        read_onnx(path)


def test_numbers_in_constant_nodes_are_constants() -> None:
    """However the node gives them; text is none."""
    text = """<ir_version: 10, opset_import: ["": 20]> net (float[batch, 4] input) => (float[batch, 4] logits) {
      a = Constant<value_float = 0.5>()
      b = Constant<value_ints = [3, 4]>()
      c = Constant<value_string = "c">()
      logits = Mul(input, a)
    }"""
    graph = Graph(onnx.parser.parse_model(text))
    assert graph.number("a") == 0.5
    assert graph.value("b").tolist() == [3, 4]
    assert graph.number("b") is None
    assert "c" not in graph.constants
