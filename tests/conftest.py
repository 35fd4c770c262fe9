from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Prefect server for all tests of a session: starting one takes ten seconds."""
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        PREFECT_HOME,
        PREFECT_LOGGING_TO_API_ENABLED,
        PREFECT_SERVER_ANALYTICS_ENABLED,
        temporary_settings,
    )
    from prefect.testing.utilities import prefect_test_harness

    alone = {
        PREFECT_HOME: tmp_path_factory.mktemp("prefect"),
        PREFECT_LOGGING_TO_API_ENABLED: False,
        PREFECT_SERVER_ANALYTICS_ENABLED: False,
    }
    without_heartbeat = {PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}  # a flow waits up to a second for its last beat
    with (
        temporary_settings(alone),
        prefect_test_harness(server_startup_timeout=120),
        temporary_settings(without_heartbeat),
    ):
        yield PREFECT_API_URL.value()
