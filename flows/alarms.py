"""What Prefect watches by itself: automations that tell somebody, and one that ends runs whose process is gone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from prefect.client.schemas.objects import StateType
from prefect.events.actions import ActionTypes, CallWebhook, ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

from tasks.contracts.fleet import AlarmsSpec

PREFIX = "requant:"  # of the names of all automations and limits that requant makes
OF_RUNS = {"prefect.resource.role": "tag", "prefect.resource.id": "prefect.tag.requant"}
ANY = {"prefect.flow-run.*"}

Notify = Callable[[str, "Text"], ActionTypes]


@dataclass(frozen=True)
class Text:
    """Jinja expressions for what an alarm says: who it is about, and what is known of it."""

    about: str
    details: str
    url: str


RUN = Text("flow_run.name", "flow_run.state.message or flow_run.state.name", "flow_run | ui_url")
TRIGGER = Text("event.resource.name", "event.payload.reason", "event.resource.id")


def through(block_type: str, block_id: UUID) -> Notify:
    """A notification block of Prefect's, or a plain webhook, which gets JSON."""

    def webhook(alarm: str, text: Text) -> ActionTypes:
        fields = {"about": text.about, "message": text.details, "url": text.url}
        parts = [f'"alarm": "{alarm}"', *(f'"{key}": {{{{ ({value}) | tojson }}}}' for key, value in fields.items())]
        return CallWebhook(block_document_id=block_id, payload=f"{{{', '.join(parts)}}}")

    def notification(alarm: str, text: Text) -> ActionTypes:
        body = f"{{{{ {text.about} }}}}: {{{{ {text.details} }}}}\n{{{{ {text.url} }}}}"
        return SendNotification(block_document_id=block_id, subject=f"requant: {alarm}", body=body)

    return webhook if block_type == "webhook" else notification


def alarms(spec: AlarmsSpec, notify: Notify | None) -> list[AutomationCore]:
    """All automations but those that start runs. Without `notify` only the one that ends dead runs."""
    dead = AutomationCore(
        name=f"{PREFIX} dead run is crashed",
        description=f"A run that sent no heartbeat for {spec.dead_after_s:g} s becomes Crashed.",
        trigger=_no_more_after("prefect.flow-run.heartbeat", timedelta(seconds=spec.dead_after_s)),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED, message=f"No heartbeat for {spec.dead_after_s:g} s: the process is gone."
            )
        ],
    )
    if notify is None:
        return [dead]
    late, pending = timedelta(minutes=spec.late_minutes), timedelta(minutes=spec.pending_minutes)
    kinds = [
        ("failed", "Gates, data, announcements, models without a good run.", _on("Failed", "TimedOut"), RUN),
        ("crashed", "A process or machine that ended unasked.", _on("Crashed"), RUN),
        (
            "late",
            f"Not started {late} after its time: no worker, or none free.",
            _no_more_after("prefect.flow-run.Late", late),
            RUN,
        ),
        (
            "stuck",
            f"Taken by a worker {pending} ago and not running.",
            _no_more_after("prefect.flow-run.Pending", pending),
            RUN,
        ),
        ("trigger failed", "An announcement that started no run.", _failed_trigger(), TRIGGER),
    ]
    return [
        dead,
        *(
            AutomationCore(name=f"{PREFIX} {alarm}", description=says, trigger=trigger, actions=[notify(alarm, text)])
            for alarm, says, trigger, text in kinds
        ),
    ]


def _on(*states: str) -> EventTrigger:
    return EventTrigger(
        match={"prefect.resource.id": "prefect.flow-run.*"}, match_related=OF_RUNS,
        expect={f"prefect.flow-run.{state}" for state in states}, for_each={"prefect.resource.id"},
        posture=Posture.Reactive, threshold=1, within=timedelta(0),
    )  # fmt: skip


def _no_more_after(event: str, within: timedelta) -> EventTrigger:
    """Nothing more is heard of a run in that time."""
    return EventTrigger(
        match={"prefect.resource.id": "prefect.flow-run.*"}, match_related=OF_RUNS,
        after={event}, expect=ANY, for_each={"prefect.resource.id"},
        posture=Posture.Proactive, threshold=1, within=within,
    )  # fmt: skip


def _failed_trigger() -> EventTrigger:
    """Of automations that start runs. One about alarms would raise an alarm when an alarm fails, and so on."""
    return EventTrigger(
        match={"prefect.resource.id": "prefect.automation.*", "prefect.resource.name": f"{PREFIX} run *"},
        expect={"prefect.automation.action.failed"},
        posture=Posture.Reactive, threshold=1, within=timedelta(0),
    )  # fmt: skip
