"""Start a command once the Prefect server answers: python -m flows.after_server prefect worker start …

A worker that starts before its server goes on without the stream of events: what happens to its runs is told to nobody,
and a cancellation is seen minutes later.
"""

from __future__ import annotations

import os
import sys
import time
from urllib.error import URLError
from urllib.request import urlopen


def main() -> None:
    """Become the command, so that signals reach it. Its server is the one at PREFECT_API_URL."""
    url = f"{os.environ['PREFECT_API_URL']}/health"
    while not answers(url):
        time.sleep(1)
    os.execvp(sys.argv[1], sys.argv[1:])  # noqa: S606 - the command is the caller's own


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as response:  # noqa: S310 - the operator's own address
            return bool(response.status == 200)
    except (URLError, TimeoutError, ConnectionError):
        return False


if __name__ == "__main__":
    main()
