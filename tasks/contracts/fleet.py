"""What runs in production: one frozen YAML file that `requant deploy` makes a Prefect server agree with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self
from zoneinfo import ZoneInfo

from pydantic import Field, model_validator

from tasks.contracts.errors import SpecError
from tasks.contracts.spec import RunSpec, Section, checked, read_spec, spec_from

WorkerType = Literal["process", "docker", "kubernetes"]
MONTH_S = 31 * 24 * 3600.0  # the longest that an alarm waits; what is infinite no clock can count
Minutes = Annotated[float, Field(gt=0, le=MONTH_S / 60)]


class FleetModel(Section):
    """One model."""

    spec: str = Field(..., description="Its spec file; relative paths start from the fleet file.")
    cron: str | None = Field(None, description="When its night is; the fleet's if not given.")


class AlarmsSpec(Section):
    """When to tell somebody, and how. Without a block only what mends itself is on: a dead run is marked crashed."""

    block: str | None = Field(
        None,
        pattern=r"^[a-z0-9-]+/[a-z0-9-]+$",
        description="A Prefect block as type/name, such as slack-webhook/ops; webhook/… gets JSON. "
        "Its address never stands in a file: it is in the block, or in REQUANT_ALARM_URL when you deploy.",
    )
    dead_after_s: float = Field(
        180, ge=90, le=MONTH_S, description="Seconds without a heartbeat (one each 30 s) until a run counts as crashed."
    )
    late_minutes: Minutes = Field(15, description="A run that should have started so long ago is late.")
    pending_minutes: Minutes = Field(15, description="A run that a worker took and did not start for so long is stuck.")
    idle_days: float = Field(7, gt=0, le=36500, description="A model whose last good run is older is named every day.")


class Fleet(Section):
    """All models, and where and when they run."""

    models: tuple[FleetModel, ...]
    cron: str | None = Field(None, description="When nights are, such as 0 2 * * *; without one only by event or hand.")
    timezone: str = Field("UTC", description="Of all crons, such as Europe/Berlin.")
    workers: WorkerType = Field("process", description="Type of the work pools cpu and gpu.")
    image: str | None = Field(None, description="Container image of Docker and Kubernetes workers.")
    directory: str | None = Field(
        None,
        description="Folder on the workers that relative paths in specs start from; "
        "for process workers the fleet file's own if not given, in containers the image's.",
    )
    gpus: int = Field(1, ge=1, description="Runs that may use GPUs at once, over all GPU workers.")
    alarms: AlarmsSpec = AlarmsSpec()

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        try:
            ZoneInfo(self.timezone)
        except (KeyError, ValueError, OSError):
            raise ValueError(f"{self.timezone!r} is not a time zone; write it as in Europe/Berlin") from None
        if self.workers != "process" and self.image is None:
            raise ValueError(f"{self.workers} workers need an image")
        return self


def read_fleet(path: Path, workers: WorkerType | None = None) -> tuple[Fleet, dict[str, RunSpec]]:
    """The fleet, and its specs by name in the file's order.

    Args:
        workers: over what the file says.

    Raises:
        SpecError: if a file is missing, a key is unknown, a value does not fit, or two specs have one name.
    """
    values = read_spec(path, remedy="Start with `models:`.")
    if workers is not None:
        values["workers"] = workers
    fleet = checked(Fleet, values, origin=str(path))
    specs: dict[str, RunSpec] = {}
    for model in fleet.models:
        file = path.parent / model.spec
        spec = spec_from(read_spec(file), origin=str(file))
        if spec.name in specs:
            raise SpecError(f"{path}: {file} is the second spec of {spec.name}.", remedy="Give it a name of its own.")
        specs[spec.name] = spec
    return fleet, specs
