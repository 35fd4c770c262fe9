"""What NVIDIA's libraries say when they fail, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from tasks.contracts.errors import EngineError

# The first that matches counts. The messages are no interface: one that is not known here is still shown in full.
REMEDIES: tuple[tuple[str, str], ...] = (
    (
        r"out ?of ?memory|failed to allocate|CUDA_ERROR_OUT_OF_MEMORY",
        "End other processes on the GPU, lower target.tensorrt.batch or workspace_mib, or take another by REQUANT_GPU.",
    ),
    (
        r"could not find any implementation",
        "Raise target.tensorrt.workspace_mib, or name the layer in quant.keep_float.",
    ),
    (r"could not fuse|could not infer output types", "Name the layer in quant.keep_float."),
    (
        r"initialization failure with error:? 100\b|no CUDA-capable device",
        "Run where a GPU is visible: see nvidia-smi.",
    ),
    (
        r"initialization failure with error:? (?:35|803)\b|driver version is insufficient|driver mismatch",
        "Install an NVIDIA driver that is new enough: r535 for CUDA 12, r580 for CUDA 13.",
    ),
    (
        r"not compatible with this version of TensorRT|incompatible device|magic ?tag|serialization assertion",
        "Build the plan again on this machine.",
    ),
    (
        r"illegal (?:memory access|address)|unspecified launch failure|misaligned|assert(?:ion)? triggered",
        "Start a new process: CUDA cannot be used in this one any more.",
    ),
)
EXTRAS = "Install requant[tensorrt] for the CUDA of this machine, as docs/tensorrt.md says."


def remedy_for(said: str, otherwise: str = "") -> str:
    """What helps against a vendor's message."""
    return next((remedy for pattern, remedy in REMEDIES if re.search(pattern, said, re.IGNORECASE)), otherwise)


@contextmanager
def vendor_imports() -> Iterator[None]:
    """TensorRT, PyCUDA and cuda-python are loaded where they are needed; what keeps them from it is one clear error."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise EngineError(f"TensorRT engines need {error.name}, which is not installed.", remedy=EXTRAS) from error
    except (ImportError, OSError) as error:
        text = str(error)
        if "libcuda.so" in text:
            remedy = "Install the NVIDIA driver, or run where a GPU is visible."
        elif "pycuda" in text or "_driver" in text or "libcurand" in text:
            remedy = (
                "Build PyCUDA again for the CUDA of this machine: pip install --no-cache-dir --force-reinstall pycuda."
            )
        else:
            remedy = EXTRAS
        raise EngineError(f"A library of TensorRT engines does not load: {text}.", remedy=remedy) from error
