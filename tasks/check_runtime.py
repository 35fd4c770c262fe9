"""Step: whether the target's runtime can be had, before an hour is spent on what it would refuse in the end."""

from __future__ import annotations

from prefect import get_run_logger

from tasks.contracts.settings import Settings
from tasks.contracts.spec import RunSpec
from tasks.engines.hardware import hardware
from tasks.engines.runtimes import require_provider
from tasks.engines.tensorrt import this_machine
from tasks.step import step, the_gpu


@step("check runtime")
def check_runtime(spec: RunSpec) -> None:
    """Nothing is asked where a worker builds: what it lacks only it can tell.

    Raises:
        EngineError: if there is no GPU, TensorRT or provider of ONNX Runtime, and the target needs it.
    """
    target, logger = spec.target, get_run_logger()
    place = Settings().build_on.get(target.runtime)
    if place is not None:
        logger.info("%s engines are built by %s", target.runtime, place)
    elif target.runtime == "tensorrt":
        logger.info("building for %s", this_machine(the_gpu()))
    else:
        require_provider(target)
        logger.info("building for %s", f"GPU {the_gpu()}" if target.needs_gpu else hardware())
