"""`requant …`: parses and calls."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from uuid import UUID

import typer
import yaml
from pydantic import ValidationError
from pydantic_settings import SettingsError
from rich.console import Console
from rich.text import Text

from tasks.contracts.errors import DataRejected, GateRejected, RequantError, SpecError
from tasks.contracts.fleet import WorkerType, read_fleet
from tasks.contracts.settings import Settings
from tasks.contracts.spec import RunSpec, SchemeName, read_spec, spec_from

if TYPE_CHECKING:
    from flows.registry import Registry

app = typer.Typer(
    help="Re-quantize vision models: a float classifier in, a gated INT8 engine out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
PREFECT_DEFAULTS = {  # of the server that a run starts for itself; what infra/server.env has too is the same there
    "DO_NOT_TRACK": "1",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # a fleet's server counts silent runs as crashed
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # a cold start takes 20
    # Stopped in the middle of writing events it says so by a traceback. What fails reaches the run as the API's answer.
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    # Events are written in batches: one by one they lock SQLite, for ten seconds of a demo.
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_READ_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "100",
}
SpecFile = Annotated[Path | None, typer.Argument(help="A YAML spec: model, data, quant, target, evaluation, gates.")]


def main() -> None:
    """Run the command line.

    Exit status: 0 done, 1 refused, 2 wrong usage, 3 rejected by a gate or the data contract, 130 or 143 stopped.
    """
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao 0.18 with torch 2.15, of no consequence
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by default nothing would end the server that a run starts
    try:
        app()
    except (DataRejected, GateRejected) as error:
        _say("Rejected", error)
        sys.exit(3)
    except RequantError as error:
        _say(type(error).__name__, error)
        sys.exit(1)
    except SystemExit as end:
        if end.code in (130, 143):  # Typer makes the first of an interrupt, without a word
            Console(stderr=True).print("Stopped. The same command goes on from the last finished step and epoch.")
        raise


def _say(title: str, error: RequantError) -> None:
    console = Console(stderr=True, soft_wrap=True)
    console.print(f"[bold red]{title}:[/] ", end="")
    console.print(error.problem, markup=False, highlight=False)
    if error.remedy:
        console.print(f"  {error.remedy}", markup=False, highlight=False)


ModelOption = Annotated[str | None, typer.Option("--model", help="torchvision:<name> or module:factory.")]
WeightsOption = Annotated[
    str | None, typer.Option("--weights", help="A .safetensors or .pth file, or a torchvision name.")
]
DataOption = Annotated[
    str | None, typer.Option("--data", help="Image folder, manifest, torchvision:<dataset> or digits.")
]
NameOption = Annotated[str | None, typer.Option("--name", help="Name under which releases appear.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Any key of the spec: --set quant.method=qat; may be repeated.")
]


@app.command()
def run(
    spec: SpecFile = None,
    model: ModelOption = None,
    weights: WeightsOption = None,
    data: DataOption = None,
    target: Annotated[str | None, typer.Option(help="The runtime to build for.")] = None,
    name: NameOption = None,
    assign: SetOption = None,
) -> None:
    """Re-quantize one model. Options go over what the spec file says."""
    short = {"model.architecture": model, "model.weights": weights, "data.source": data, "name": name}
    _run(_spec(spec, {**short, "target.runtime": target}, assign))


@app.command()
def run_all(
    fleet: Annotated[Path, typer.Argument(help="The file of `requant deploy`.")] = Path("fleet.yaml"),
    at_once: Annotated[int, typer.Option(help="How many models at the same time, on workers.", min=1)] = 2,
) -> None:
    """Re-quantize every model of a fleet: on the workers of PREFECT_API_URL, or without it here, in turn."""
    _, specs = read_fleet(fleet)
    with _prefect():
        from prefect import tags
        from prefect.settings import PREFECT_API_URL

        from flows.fleet import requantize_many
    with tags("requant"):
        requantize_many(tuple(specs.values()), at_once, on_workers=PREFECT_API_URL.value() is not None)
    Console().print(f"All {len(specs)} models are done", style="bold green")


@app.command()
def check_data(
    spec: SpecFile = None,
    model: ModelOption = None,
    weights: WeightsOption = None,
    data: DataOption = None,
    name: NameOption = None,
    assign: SetOption = None,
    report: Annotated[Path | None, typer.Option(help="Where the page goes; by default into the store.")] = None,
) -> None:
    """Judge the images by the data contract, and nothing else. Exit status 3 if a critical rule is broken."""
    _check_settings()
    from flows.check_data import check_and_report, lines_of

    short = {"model.architecture": model, "model.weights": weights, "data.source": data, "name": name}
    checked, place = check_and_report(_spec(spec, short, assign), report)
    console = Console(soft_wrap=True)
    for line in lines_of(checked):
        console.print(line, markup=False, highlight=False)
    console.print(f"report: {place}", markup=False, highlight=False)
    if checked.breaches:
        sys.exit(3)


@app.command()
def lint(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="Any ONNX file with Q/DQ.")],
    target: Annotated[SchemeName, typer.Option(help="Whose rules.")] = "tensorrt",
    data: Annotated[
        Path | None, typer.Option(help="A .npy file of preprocessed images, float32 [N, C, H, W], to judge scales by.")
    ] = None,
) -> None:
    """What keeps a graph from running, or from running fast, on its target. Exit status 3 if there are errors."""
    from flows.lint import lines_of, lint_file

    findings = lint_file(model, target, data)
    for line in lines_of(findings, f"{model.name} for {target}"):
        typer.echo(line)
    if any(finding.severity == "error" for finding in findings):
        sys.exit(3)


@app.command()
def demo() -> None:
    """Train a small digits classifier, then re-quantize it: no download, no set-up, a few minutes."""
    with _prefect():
        from flows.demo import demo_spec
    _run(demo_spec())


@app.command()
def doctor() -> None:
    """What this machine can do."""
    _check_settings()
    from flows.doctor import findings

    console = Console()
    for what, found, so in findings():
        line = Text.assemble((f"{what:<20}", "bold"), found, (f"  {so}" if so else "", "dim"))
        console.print(line, soft_wrap=True)  # a table would cut paths to the width of the screen


State = Annotated[Path, typer.Option(envvar="REQUANT_UP", help="Folder of its database, logs and sockets.")]


@app.command()
def up(
    fleet: Annotated[
        Path | None, typer.Argument(help="As for deploy; by default that of last time, or fleet.yaml if there is one.")
    ] = None,
    state: State = Path(".requant/up"),
    port: Annotated[
        int | None, typer.Option(help="Of the server, on loopback: that of last time, or 4200.", min=1, max=65535)
    ] = None,
    database: Annotated[
        Literal["auto", "postgresql", "sqlite"], typer.Option(help="auto: PostgreSQL where it is installed.")
    ] = "auto",
    runs: Annotated[int, typer.Option(help="On the CPU at once; they disturb each other's latency.", min=1)] = 2,
) -> None:
    """Start a Prefect server and workers on this machine, and deploy the fleet. Again is harmless."""
    _check_settings()
    from flows.machine import up

    _print(up(state, fleet=fleet, port=port, database=database, num_runs=runs))


@app.command()
def status(state: State = Path(".requant/up")) -> None:
    """What runs of what `requant up` started. Exit status 3 if something does not."""
    from flows.machine import status

    lines, all_run = status(state)
    _print(iter(lines))
    if not all_run:
        sys.exit(3)


@app.command()
def down(state: State = Path(".requant/up")) -> None:
    """Stop what `requant up` started. A run under way ends, and goes on from its last finished step when repeated."""
    from flows.machine import down

    _print(down(state))


@app.command()
def deploy(
    fleet: Annotated[Path, typer.Argument(help="A YAML file: models, nights, alarms.")] = Path("fleet.yaml"),
    workers: Annotated[WorkerType | None, typer.Option("--type", help="Of workers, over what the file says.")] = None,
) -> None:
    """Make the Prefect server at PREFECT_API_URL agree with a fleet file: pools, deployments, limits, alarms."""
    _check_settings()
    from flows.deploy import deploy

    _print(deploy(fleet, workers))


@app.command()
def announce(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Its name, as in its spec.")],
    weights: Annotated[str, typer.Option(help="Where the new weights are; workers must reach them.")],
    data: Annotated[str | None, typer.Option(help="A new source of images.")] = None,
    id: Annotated[  # noqa: A002
        UUID | None, typer.Option(help="Of the event; by default from name, data and the content of the weights.")
    ] = None,
) -> None:
    """Tell the server that a model was retrained. The same again starts no second run."""
    _check_settings()
    from flows.announce import announce

    _print(announce(model, weights, data, id))


Model = Annotated[str, typer.Argument(metavar="NAME", help="Name of the model, as in its spec.")]
Number = Annotated[int, typer.Argument(metavar="N", help="Number of a release.", min=1)]
SomeNumber = Annotated[int | None, typer.Argument(metavar="[N]", help="Release; the champion by default.", min=1)]


@app.command()
def releases(name: Model) -> None:
    """All releases of a model."""
    _print(_registry().releases(name))


@app.command()
def history(
    name: Model,
    plot: Annotated[Path | None, typer.Option(help="Draw accuracy, size and latency: a .png or .html file.")] = None,
    last: Annotated[int, typer.Option(help="How many runs.", min=1)] = 100,
) -> None:
    """The runs of a model over time, rejected ones too, and who was champion, when and why."""
    _print(_registry().history(name, last=last, plot=plot))


@app.command()
def show(name: Model, number: SomeNumber = None) -> None:
    """A release: scores, engines, and what it was made from."""
    _print(_registry().show(name, number))


@app.command()
def compare(name: Model, one: Number, other: Number) -> None:
    """What differs between two releases."""
    _print(_registry().compare(name, one, other))


@app.command()
def promote(name: Model, number: Number) -> None:
    """Make a release the champion, once it is verified."""
    _print(_registry().promote(name, number))


@app.command()
def rollback(name: Model) -> None:
    """Make the champion before this one the champion again."""
    _print(_registry().rollback(name))


@app.command()
def verify(
    target: Annotated[str, typer.Argument(metavar="NAME|DIR", help="A model, or a folder that was pulled.")],
    number: SomeNumber = None,
) -> None:
    """Signature and digests of a release in the store, or of a pulled folder without it."""
    _print(_registry().verify(target, number))


@app.command()
def pull(
    name: Model,
    to: Annotated[Path, typer.Option(help="A new folder, which appears whole or not at all.")],
    release: Annotated[int | None, typer.Option(help="The champion by default.", min=1)] = None,
    hardware: Annotated[str | None, typer.Option(help="Part of the name of what the engine was built for.")] = None,
) -> None:
    """Fetch a verified engine, and what serving it needs."""
    _print(_registry().pull(name, to=to, number=release, hardware=hardware))


@app.command()
def gc(
    delete: Annotated[bool, typer.Option("--delete", help="Delete it; otherwise it is only listed.")] = False,
    keep_releases: Annotated[int, typer.Option(help="Newest ones, and as many champions before this one.", min=1)] = 5,
    keep_days: Annotated[float, typer.Option(help="Younger releases and runs are kept.", min=0, max=36500)] = 90,
) -> None:
    """Old releases and runs, and the artifacts that nothing else refers to."""
    _print(_registry().collect(keep_releases=keep_releases, keep_days=keep_days, delete=delete))


@app.command()
def keygen(
    path: Annotated[Path, typer.Argument(help="The private key; the public one gets .pub behind.")] = Path(
        "requant-signing-key.pem"
    ),
) -> None:
    """A key pair to sign releases with."""
    from flows.registry import keygen

    _print(keygen(path))


@app.command()
def schema() -> None:
    """The spec's JSON schema, for editors."""
    typer.echo(yaml.safe_dump(RunSpec.model_json_schema(), sort_keys=False))


def _registry() -> Registry:
    _check_settings()
    from flows.registry import open_registry

    return open_registry()


def _print(lines: Iterator[str]) -> None:
    for line in lines:
        typer.echo(line)


def _spec(file: Path | None, short: Mapping[str, str | None], assign: list[str] | None) -> RunSpec:
    """What the file, options of a name of their own and --set say together; the later ones win."""
    values = read_spec(file) if file else {}
    for key, value in short.items():
        if value is not None:
            _assign(values, key, value)
    for text in assign or []:
        key, equals, value = text.partition("=")
        if not equals:
            raise SpecError(f"--set {text} has no value.", remedy="Write --set key=value.")
        _assign(values, key, _value(text, value))
    if "name" not in values and (model := short["model.architecture"]):
        values["name"] = model.rpartition(":")[2].lower()
    return spec_from(values, origin=str(file) if file else "command line")


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise SpecError(f"{key}: {section} is not a section.", remedy="See `requant schema`.")
    values[leaf] = value


def _value(text: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SpecError(f"--set {text}: {value} is not YAML.", remedy="Write it as in a spec file.") from error


def _run(spec: RunSpec) -> None:
    with _prefect():
        from prefect import tags

        from flows.requantize import requantize
        from tasks.find_changes import is_unchanged
        from tasks.report.content import headline
        from tasks.report.gpu import gpu_lines
        from tasks.step import run_prefix

        if not is_unchanged(spec):
            import tasks.check_data
            import tasks.check_parity
            import tasks.publish_report  # noqa: F401 - with PyTorch and all that the steps take seconds to load

    with tags("requant", f"model:{spec.name}", f"runtime:{spec.target.runtime}"):  # to filter by, on a server
        report = requantize(spec)
    store, console = Settings().store, Console(soft_wrap=True)
    console.print(headline(report.decision), style="bold green")
    for line in gpu_lines(report.gpu) if report.gpu else ():
        console.print(line, markup=False, highlight=False)
    console.print(f"engine: {store}/{report.engine.engine.key}", markup=False, highlight=False)
    console.print(f"report: {store}/{run_prefix(spec.name, report.run_id)}/report.html", markup=False, highlight=False)


@contextmanager
def _prefect() -> Iterator[None]:
    """Prefect with defaults that suit a command line. At the end of the block its server answers.

    A server that was configured is used. Otherwise one starts while the block imports what takes seconds to import.

    Raises:
        SpecError: if a setting does not fit.
        RequantError: if no server can be reached, or it asks for a password that is not there.
    """
    _check_settings()
    for name, value in PREFECT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    import prefect.server.api.server  # noqa: F401 - here, as two threads must not import the same modules at once
    from httpx import HTTPError, codes
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError

    def reach() -> Exception | None:
        # The server takes the mask over: Ctrl-C must not end it before it is told that the run was stopped.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with get_client(sync_client=True) as client:
                if error := client.api_healthcheck():
                    return error
                client.hello()  # health asks for no password
        except (RuntimeError, HTTPError) as error:
            return error
        return None

    with ThreadPoolExecutor(1) as pool:
        reached = pool.submit(reach)
        yield
        error = reached.result()
    if isinstance(error, PrefectHTTPStatusError) and error.response.status_code == codes.UNAUTHORIZED:
        from flows.server import refusal

        raise refusal(error) from error
    if error is not None:
        raise RequantError(
            f"No Prefect server answers: {error}.",
            remedy="Mend PREFECT_API_URL, or unset it to start one with each run.",
        ) from error


def _check_settings() -> None:
    try:
        Settings()
    except SettingsError as error:  # of the only one that is JSON, before the others are looked at
        raise SpecError(
            f"REQUANT_BUILD_ON is not JSON (found {os.environ.get('REQUANT_BUILD_ON')!r}).",
            remedy="""Write it as in '{"tensorrt": "build/gpu"}'.""",
        ) from error
    except ValidationError as error:
        mistakes = "; ".join(_mistake(str(detail["loc"][0]), detail) for detail in error.errors())
        raise SpecError(f"{mistakes}.", remedy="Mend these environment variables.") from error


def _mistake(setting: str, detail: Mapping[str, Any]) -> str:
    found = "" if setting == "report_url" else f" (found {detail['input']!r})"  # it may hold a password
    return f"REQUANT_{setting.upper()}: {detail['msg']}{found}"
