from __future__ import annotations

import pytest

from tasks.contracts.errors import EngineError
from tasks.engines.faults import remedy_for, vendor_imports


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("ERROR: [defaultAllocator.cpp] Error Code 1: Cuda Runtime (out of memory)", "lower target.tensorrt.batch"),
        ("Error Code 2: OutOfMemory (no further information)", "End other processes"),
        ("cuMemAlloc failed: out of memory", "REQUANT_GPU"),
        ("Error Code 10: Could not find any implementation for node {ForeignNode[a...b]}", "workspace_mib"),
        ("Could not fuse 2nd input (kernel weights) of CONVOLUTION", "keep_float"),
        ("CUDA initialization failure with error: 100", "Run where a GPU is visible"),
        ("cuInit failed: no CUDA-capable device is detected", "nvidia-smi"),
        ("CUDA initialization failure with error: 35", "r580 for CUDA 13"),
        (
            "The engine plan file is not compatible with this version of TensorRT, expecting library",
            "Build the plan again",
        ),
        ("The engine plan file is generated on an incompatible device, expecting compute 8.9", "Build the plan again"),
        ("cuStreamSynchronize failed: an illegal memory access was encountered", "Start a new process"),
        ("something else", "the remedy of the step"),
    ],
)
def test_a_known_message_has_a_remedy(said: str, remedy: str) -> None:
    """Messages as TensorRT and CUDA write them in users' reports."""
    assert remedy in remedy_for(said, "the remedy of the step")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ModuleNotFoundError("No module named 'pycuda'", name="pycuda"),
            r"need pycuda, which is not installed.*\[tensorrt\]",
        ),
        (ImportError("libcuda.so.1: cannot open shared object file"), r"libcuda\.so\.1.*Install the NVIDIA driver"),
        (
            ImportError("pycuda/_driver.so: undefined symbol: cuEventElapsedTime_v2"),
            "undefined symbol.*Build PyCUDA again",
        ),
        (ImportError("libcurand.so.10: cannot open shared object file"), "Build PyCUDA again"),
        (OSError("libnvinfer.so.10: cannot open shared object file"), r"libnvinfer\.so\.10.*requant\[tensorrt\]"),
    ],
    ids=["missing", "no driver", "another CUDA", "another toolkit", "half installed"],
)
def test_a_library_that_does_not_load_is_named_with_its_remedy(error: Exception, message: str) -> None:
    """Missing, without a driver, or built for another CUDA: one clear error each."""
    with pytest.raises(EngineError, match=message) as caught, vendor_imports():
        raise error
    assert caught.value.__cause__ is error
