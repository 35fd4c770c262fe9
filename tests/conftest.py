from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from uuid import uuid4

import hypothesis
import pytest

from tests.tasks.stores.s3_server import BUCKET, NoServerError, S3Server
from tests.tasks.stores.s3_server import s3_server as start_s3_server

# How long an example takes says nothing: the machine may be busy.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")


def pytest_configure() -> None:
    """What tests start can be interrupted, also where a shell runs them in its background, which ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
        prefect_test_harness(server_startup_timeout=600),
        temporary_settings(without_heartbeat),
    ):
        yield PREFECT_API_URL.value()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real server for all tests of a session, or a skip that says why there is none."""
    with ExitStack() as running:
        try:
            server = running.enter_context(start_s3_server())
        except NoServerError as error:
            pytest.skip(f"no S3 server: {error}")
        server.client().create_bucket(Bucket=BUCKET)
        yield server


@pytest.fixture
def s3_url(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty place on the server, which the environment of this process and its children leads to."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "REQUANT_S3_"))]:
        monkeypatch.delenv(name)
    for name, value in {**s3_server.user.environment, "REQUANT_S3_ENDPOINT": s3_server.url}.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{uuid4().hex}"
