"""Everything that requant refuses, as one tree.

RequantError
├── SpecError        the request is wrong                     mend the spec
├── DataError        the images cannot be used                mend the data
│   └── DataRejected          they break the data contract     not a fault: read the findings
├── ModelError       architecture or weights do not fit       mend the model
├── QuantizeError    the model cannot be made INT8 as asked   see the message
├── ExportError      the graph breaks a rule of its target    see the message
├── EngineError      a compiler or runtime failed             see the chained vendor error
├── StoreError       storage misbehaved
│   └── TransientStoreError   may pass: the step is retried
├── ReleaseError     a release is missing, incomplete, or not to be trusted
└── GateRejected     the engine is worse than agreed          not a fault: read the verdicts
"""

from __future__ import annotations


class RequantError(Exception):
    """One clear refusal: what is wrong with which object, and what to do about it."""

    def __init__(self, problem: str, *, remedy: str = "") -> None:
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{problem} {remedy}".strip())

    def __reduce__(self) -> tuple[object, ...]:
        return _restore, (type(self), self.problem, self.remedy)


def _restore(kind: type[RequantError], problem: str, remedy: str) -> RequantError:
    return kind(problem, remedy=remedy)


class SpecError(RequantError):
    """The request is wrong."""


class DataError(RequantError):
    """The images cannot be used."""


class DataRejected(DataError):
    """The images break a critical rule of the data contract."""


class ModelError(RequantError):
    """The architecture or the weights do not fit."""


class QuantizeError(RequantError):
    """The model cannot be made INT8 as asked."""


class ExportError(RequantError):
    """The exported graph breaks a rule of its target."""


class EngineError(RequantError):
    """A compiler or a runtime failed."""


class StoreError(RequantError):
    """Storage misbehaved."""


class TransientStoreError(StoreError):
    """Storage misbehaved in a way that can pass by itself."""


class ReleaseError(RequantError):
    """A release is missing, incomplete, or not to be trusted."""


class GateRejected(RequantError):
    """The engine is worse than agreed. Everything measured is stored."""
