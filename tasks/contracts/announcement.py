"""News of retrained weights, as an event brings it: `model.retrained` about the resource `requant.model.<name>`."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid5

from pydantic import Field

from tasks.contracts.spec import ModelName, RunSpec, Section, checked

EVENT = "model.retrained"
RESOURCE = "requant.model."  # the model's name follows
_NAMESPACE = UUID("f1a9e3c2-0d0f-5a5e-9b52-1d6f0a7d3b5e")


class News(Section):
    """The event's payload."""

    weights: str = Field(..., min_length=1, description="Where the new weights are; the worker must reach them.")
    data: str | None = Field(None, min_length=1, description="A new source of images; the spec's own if not given.")

    def applied_to(self, spec: RunSpec) -> RunSpec:
        """The model's spec with what is new."""
        changed: dict[str, Any] = {"model": spec.model.model_copy(update={"weights": self.weights})}
        if self.data is not None:
            changed["data"] = spec.data.model_copy(update={"source": self.data})
        return spec.model_copy(update=changed)


class Announcement(Section):
    """The event, as the trigger hands it over."""

    id: UUID
    model: ModelName
    payload: News

    @property
    def cause(self) -> str:
        """For logs and the report."""
        data = f", data {self.payload.data}" if self.payload.data else ""
        return f"event {self.id}: {self.model} was retrained, weights {self.payload.weights}{data}"


def read_announcement(values: Any) -> Announcement:
    """What the event says, checked.

    Raises:
        SpecError: if something is missing, unknown or of the wrong type.
    """
    return checked(
        Announcement, values, origin="announcement", remedy="Announce again: `requant announce MODEL --weights URI`."
    )


def event_id(model: str, news: News, weights_digest: str) -> UUID:
    """The same for the same news, so that Prefect starts one run however often it is sent."""
    return uuid5(_NAMESPACE, "\n".join((model, weights_digest, news.data or "")))
