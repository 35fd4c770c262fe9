"""A run that is cancelled in the UI stops, with all its processes, and can be gone on with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.flows.prefect_server import Installation, processes_of, wait_for
from tests.flows.test_crash import QAT
from tests.flows.test_requantize import trained

if TYPE_CHECKING:
    from tests.flows.conftest import Place


def test_a_cancelled_run_leaves_no_process_and_no_rubbish(
    installed: Installation, after_first: Place, plain: dict[str, Any]
) -> None:
    """In the middle of training; the epochs that were trained stay for the next attempt."""
    run = installed.run({**plain, "quant": QAT}, after_first.path, after_first.environment)
    wait_for(lambda: any(trained(after_first)), "an epoch")
    assert processes_of(run)
    installed.cancel(run)
    assert installed.wait(run)["state_type"] == "CANCELLED"
    wait_for(lambda: not processes_of(run), "its processes to end", limit_s=30)
    assert trained(after_first)
    assert after_first.leftovers() == []
    assert len(list((after_first.store / "models").rglob("record.json"))) == 1  # of the run before
