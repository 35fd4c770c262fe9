from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest

from tasks.contracts import errors
from tasks.contracts.errors import GateRejected, RequantError, StoreError, TransientStoreError


def kinds(root: type[RequantError]) -> Iterator[type[RequantError]]:
    yield root
    for kind in root.__subclasses__():
        yield from kinds(kind)


@pytest.mark.parametrize("kind", list(kinds(RequantError)))
def test_an_error_survives_being_rebuilt(kind: type[RequantError]) -> None:
    """Workers and Prefect rebuild errors elsewhere; kind, problem and remedy come through."""
    error = kind("The disk is full.", remedy="Free some space.")
    rebuild, arguments = error.__reduce__()[:2]
    assert callable(rebuild)
    assert isinstance(arguments, tuple)
    for twin in (rebuild(*arguments), copy.copy(error)):
        assert type(twin) is kind
        assert (twin.problem, twin.remedy) == ("The disk is full.", "Free some space.")
        assert str(twin) == str(error) == "The disk is full. Free some space."


def test_a_remedy_may_be_absent() -> None:
    """Then the message is the problem alone."""
    error = GateRejected("Too slow.")
    assert str(error) == "Too slow."
    assert str(copy.copy(error)) == "Too slow."


def test_the_tree_is_the_one_at_the_top_of_the_file() -> None:
    """The docstring names every kind, and only these."""
    named = {word for word in (errors.__doc__ or "").replace("─", " ").split() if word in vars(errors)}
    assert named == {kind.__name__ for kind in kinds(RequantError)}


def test_what_may_pass_is_a_kind_of_store_error() -> None:
    """Who catches StoreError catches both; who retries looks for the transient one."""
    assert issubclass(TransientStoreError, StoreError)
