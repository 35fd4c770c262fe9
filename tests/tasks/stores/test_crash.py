"""The server is killed in the middle of a publication, again and again."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tasks.contracts.release import Candidate, Release
from tasks.stores.base import open_store
from tasks.stores.registry import champion, numbers, promote, publish, read_release, verify
from tests.tasks.stores.releases import NAME, a_run
from tests.tasks.stores.s3_server import S3Server

KILLS = 5


def test_a_release_is_whole_or_absent_when_the_server_is_killed(
    s3_server: S3Server, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client tries again by itself, and the run is released once."""
    monkeypatch.setenv("REQUANT_S3_CONNECT_TIMEOUT_S", "2")
    monkeypatch.setenv("REQUANT_S3_MAX_ATTEMPTS", "10")  # five can be over in two seconds; a gateway may take longer
    store, chance, met = open_store(s3_url), random.Random(0), 0
    store.compare_and_set()

    def release(candidate: Candidate) -> Release:
        new = publish(store, candidate)
        promote(store, NAME, new.number)
        return new

    for turn in range(KILLS):
        candidate = a_run(store, tmp_path, f"run{turn}")
        with ThreadPoolExecutor(1) as pool:
            pending = pool.submit(release, candidate)
            time.sleep(chance.uniform(0, 0.15))
            s3_server.kill_gateway()
            met += not pending.done()
            s3_server.start_gateway()
            for number in numbers(store, NAME):
                verify(store, NAME, number)
            new = pending.result(timeout=120)
        assert verify(store, NAME, new.number).release == new
        assert champion(store, NAME).release == new.number
        runs = [read_release(store, NAME, number).release.run for number in numbers(store, NAME)]
        assert sorted(runs) == sorted({f"run{number}" for number in range(turn + 1)})
    assert met, "no kill has met a publication"
