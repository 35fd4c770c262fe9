"""`requant history` of many nights on a real S3 server: `python tests/benchmarks/bench_history.py [--nights 365]`.

The records are those of a report with 50 layers and 10 classes. Each round reads them one after the other and then side
by side. The server is on this machine, so `--delay-ms` adds to each request what a network would.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from tasks.report.history import nights_of
from tasks.stores.base import Texts, open_store
from tasks.stores.s3 import S3Store
from tests.tasks.report.conftest import build_report
from tests.tasks.stores.s3_server import BUCKET, s3_server

ROUNDS = 5


class Times(NamedTuple):
    """Seconds of one round."""

    in_turn: float
    side_by_side: float


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nights", type=int, default=365)
    parser.add_argument("--delay-ms", type=float, default=10.0)
    given = parser.parse_args()
    with s3_server() as server:
        os.environ.update(server.user.environment, REQUANT_S3_ENDPOINT=server.url)
        server.client().create_bucket(Bucket=BUCKET)
        store = open_store(f"s3://{BUCKET}")
        text, first = build_report(drop=0.0).model_dump_json(indent=1), datetime(2026, 1, 1, 2, tzinfo=UTC)
        for night in range(given.nights):
            run = f"{first + timedelta(days=night):%Y%m%dT%H%M%S}-{night:08x}"
            store.write_text(f"models/birds/runs/{run}/record.json", text)
        print(f"{given.nights} records of {len(text) / 1024:.0f} KiB, {given.delay_ms:g} ms added to each request")
        rounds = [_round(given.nights, given.delay_ms / 1000) for _ in range(ROUNDS)]
    print(f"in turn       {statistics.median(one.in_turn for one in rounds):.2f} s")
    print(f"side by side  {statistics.median(one.side_by_side for one in rounds):.2f} s")
    print(f"ratio         {statistics.median(one.in_turn / one.side_by_side for one in rounds):.1f}")


def _round(nights: int, delay_s: float) -> Times:
    class Far(S3Store):
        def _read(self, key: str) -> tuple[bytes, str] | None:
            time.sleep(delay_s)
            return super()._read(key)

    class InTurn(Far):
        def read_texts(self, keys: object) -> Texts:
            return [self.read_text(key) for key in keys]  # type: ignore[attr-defined]

    return Times(*(_seconds(kind, nights) for kind in (InTurn, Far)))


def _seconds(kind: type[S3Store], nights: int) -> float:
    store = kind(BUCKET, "", open_store(f"s3://{BUCKET}")._settings)  # type: ignore[attr-defined]
    start = time.perf_counter()
    assert len(nights_of(store, "birds", nights)) == nights
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
