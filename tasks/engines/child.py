"""A process of its own for work that may hang, crash or take the machine's memory with it; files go in and come out."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel

from tasks.contracts.errors import EngineError, RequantError
from tasks.contracts.lifetime import die_with
from tasks.stores.workspace import replacing

Progress = Callable[[int, int], None]
ROOT = Path(__file__).resolve().parents[2]
POLL_S = 0.25
TAIL = 2000  # characters of what it said last


class Refusal(BaseModel):
    """An error of ours on its way out of the process."""

    problem: str
    remedy: str


def run_child(
    command: Sequence[str], folder: Path, *, doing: str, limit_s: float, progress: Progress | None = None
) -> None:
    """Run to the end. The process finds its input in `folder`, and leaves its output there.

    Raises:
        EngineError: if it refuses, dies, or takes longer than `limit_s`: then it is killed with all that it started.
    """
    said, seen = folder / "log.txt", None
    deadline = time.monotonic() + limit_s
    with (
        said.open("wb") as log,
        subprocess.Popen(  # noqa: S603 - our own module, no shell
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        ) as child,
    ):
        try:
            while child.poll() is None:
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"{doing} took longer than {limit_s / 60:g} minutes and was ended.",
                        remedy="Raise REQUANT_BUILD_LIMIT_MINUTES, or lower target.tensorrt.optimization_level.",
                    )
                with suppress(subprocess.TimeoutExpired):
                    child.wait(POLL_S)
                if progress and (now := _progress(folder)) != seen and now:
                    seen = now
                    progress(*now)
        except BaseException:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
            raise
    if child.returncode:
        raise _failure(doing, child.returncode, folder)


def _failure(doing: str, code: int, folder: Path) -> EngineError:
    refused = folder / "refused.json"
    if refused.exists():
        refusal = Refusal.model_validate_json(refused.read_text(encoding="utf-8"))
        return EngineError(refusal.problem, remedy=refusal.remedy)
    tail = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")[-TAIL:].strip() or "nothing"
    how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    remedy = "See whether the machine ran out of memory." if code == -signal.SIGKILL else ""
    return EngineError(f"{doing} {how}. It last said: {tail}", remedy=remedy)


def _progress(folder: Path) -> tuple[int, int] | None:
    file = folder / "progress"
    if not file.exists():
        return None
    done, total = map(int, file.read_text(encoding="utf-8").split())
    return done, total


def serve(folder: Path, parent: int, work: Callable[[Progress], None]) -> int:
    """The other side: do `work` in this process and give its exit code. `work` is told how to report progress."""
    die_with(parent)
    try:
        work(ProgressFile(folder))
    except RequantError as error:
        (folder / "refused.json").write_text(
            Refusal(problem=error.problem, remedy=error.remedy).model_dump_json(), encoding="utf-8"
        )
        return 1
    return 0


class ProgressFile:
    """Progress as a file that the parent looks at. Whole at any time, written twice a second at most."""

    def __init__(self, folder: Path) -> None:
        self._file, self._last = folder / "progress", 0.0

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._last > 2 * POLL_S:
            with replacing(self._file) as partial:
                partial.write_text(f"{done} {total}", encoding="utf-8")
            self._last = time.monotonic()
