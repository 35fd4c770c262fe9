"""Real processes: what they report, how they fail, and that none outlives its time or its parent."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tasks.contracts.errors import EngineError
from tasks.engines.child import ROOT, run_child

SERVE = """
import os, sys, time
from pathlib import Path
from tasks.contracts.errors import EngineError
from tasks.engines.child import serve
folder = Path(sys.argv[1])
def work(progress):
    {work}
sys.exit(serve(folder, int(sys.argv[2]), work))
"""


def command(work: str, folder: Path) -> list[str]:
    return [sys.executable, "-c", SERVE.format(work=work), str(folder), str(os.getpid())]


def wait_until_gone(pid: int) -> None:
    end = time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, f"{pid} lives on"
        time.sleep(0.05)


def test_progress_arrives_while_it_works(tmp_path: Path) -> None:
    """The parent sees how far the child is, before it has ended."""
    seen: list[tuple[int, int]] = []
    work = (
        "for n in (1, 2, 3):\n"
        "        while not (folder / f'seen{n}').exists():\n"
        "            progress(n, 4)\n"
        "            time.sleep(0.05)\n"
        "    (folder / 'out').write_text('made')"
    )

    def note(done: int, total: int) -> None:
        seen.append((done, total))
        (tmp_path / f"seen{done}").touch()

    run_child(command(work, tmp_path), tmp_path, doing="Work", limit_s=300, progress=note)
    assert seen == [(1, 4), (2, 4), (3, 4)]
    assert (tmp_path / "out").read_text() == "made"


def test_what_outlasts_its_limit_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    """Not asked to end, as TensorRT would not listen, but killed: the whole group."""
    work = (
        "import subprocess; child = subprocess.Popen(['sleep', '600']); "
        "(folder / 'pids').write_text(f'{os.getpid()} {child.pid}'); time.sleep(600)"
    )
    with pytest.raises(EngineError, match=r"Work took longer than 0\.05 minutes.*REQUANT_BUILD_LIMIT_MINUTES"):
        run_child(command(work, tmp_path), tmp_path, doing="Work", limit_s=3)
    for pid in (tmp_path / "pids").read_text().split():
        wait_until_gone(int(pid))


def test_a_refusal_comes_back_as_it_was(tmp_path: Path) -> None:
    """Problem and remedy cross the process."""
    work = "raise EngineError('It is blue.', remedy='Paint it.')"
    with pytest.raises(EngineError) as caught:
        run_child(command(work, tmp_path), tmp_path, doing="Work", limit_s=60)
    assert (caught.value.problem, caught.value.remedy) == ("It is blue.", "Paint it.")


@pytest.mark.parametrize(
    ("work", "message"),
    [
        ("print('last words', file=sys.stderr); os.abort()", "Work died of SIGABRT. It last said: .*last words"),
        ("os.kill(os.getpid(), 9)", "Work died of SIGKILL. It last said: nothing See whether .* out of memory"),
        ("raise ValueError('a bug')", "Work ended with exit code 1. It last said: .*ValueError: a bug"),
    ],
    ids=["crash", "killed from outside", "bug"],
)
def test_a_death_is_explained(tmp_path: Path, work: str, message: str) -> None:
    """How it died, and what it said last."""
    with pytest.raises(EngineError, match=f"(?s){message}"):
        run_child(command(work, tmp_path), tmp_path, doing="Work", limit_s=60)


def test_an_error_of_the_parent_ends_the_child(tmp_path: Path) -> None:
    """A cancelled run leaves nothing running: here the progress callback raises."""

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    work = "(folder / 'pids').write_text(str(os.getpid())); progress(1, 2); time.sleep(600)"
    with pytest.raises(KeyboardInterrupt):
        run_child(command(work, tmp_path), tmp_path, doing="Work", limit_s=60, progress=stop)
    wait_until_gone(int((tmp_path / "pids").read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's notice of a parent's death is Linux's")
def test_a_killed_parent_takes_its_child_along(tmp_path: Path) -> None:
    """A worker that is killed leaves no build on the GPU."""
    work = "(folder / 'pids').write_text(str(os.getpid())); time.sleep(600)"
    parent = f"""
import os, sys
from pathlib import Path
from tasks.engines.child import run_child
child = [sys.executable, "-c", {SERVE.format(work=work)!r}, {str(tmp_path)!r}, str(os.getpid())]
run_child(child, Path({str(tmp_path)!r}), doing="Work", limit_s=600)
"""
    with subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT) as process:
        pids = tmp_path / "pids"
        end = time.monotonic() + 30
        while not (pids.exists() and pids.read_text()):
            assert time.monotonic() < end
            time.sleep(0.05)
        process.kill()
    wait_until_gone(int(pids.read_text()))
