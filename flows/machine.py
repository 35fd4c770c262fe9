"""One machine: a Prefect server, its database and the workers, as ordinary processes under supervisord.

supervisord starts, restarts and stops them and keeps their logs. Here is what it does not know: which processes, a
database that fits, when all of it answers, and that nothing stays behind.
"""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Literal, get_args

import httpx
import psutil
import yaml

from flows.after_server import answers
from tasks.contracts.errors import RequantError, SpecError
from tasks.contracts.settings import S3Settings, Settings
from tasks.contracts.spec import Runtime
from tasks.stores.base import open_store

ROOT = Path(__file__).resolve().parents[1]
Database = Literal["auto", "postgresql", "sqlite"]  # what keeps Prefect's record of runs
MARK = "REQUANT_STARTED_FROM"  # in the environment of all that is started here, so that it is known again
START_S, STOP_S = 300.0, 90.0
OF_COMMAND = {"REQUANT_ALARM_URL", "REQUANT_REDO"}  # for one command: a secret that only deploying needs, and a wish
PORT = 4200  # Prefect's own
FLEET_FILE = "fleet-file"  # of the state: where the fleet was read that is deployed
EMPTY_FLEET = "fleet.yaml"  # of the state: for want of any
LONGEST_SOCKET = 107  # bytes that Linux allows in the path of a Unix socket

CONF = """\
; Written by `requant up`; changes are overwritten.
[supervisord]
{user}directory={root}
pidfile={state}/supervisord.pid
logfile={state}/logs/supervisord.log
childlogdir={state}/logs
nocleanup=true
[unix_http_server]
file={state}/supervisor.sock
chmod=0700
[supervisorctl]
serverurl=unix://{state}/supervisor.sock
[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
"""
PROGRAM = """
[program:{name}]
command={command}
environment={environment}
{user}priority={priority}
stopsignal={stopsignal}
stopwaitsecs=30
killasgroup=true
autorestart=true
startsecs=5
; each try waits a second longer than the one before: eight minutes until it is given up
startretries=30
redirect_stderr=true
stdout_logfile={state}/logs/{name}.log
stdout_logfile_maxbytes=20MB
stdout_logfile_backups=3
"""


@dataclass(frozen=True, kw_only=True)
class Program:
    """One process that is kept running. Those of lower priority start first and end last."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    priority: int
    stopsignal: str = "TERM"
    user: str | None = None


def up(state: Path, *, fleet: Path | None, port: int | None, database: Database, num_runs: int) -> Iterator[str]:
    """Start what does not run yet, deploy the fleet, and say where things are.

    Args:
        state: folder of the database, logs and sockets.
        fleet: file that says what runs in production; if not given, that of last time, or fleet.yaml if there is one.
        port: of the Prefect server, which listens on loopback alone; if not given, that of last time, or PORT.
        num_runs: at once, on the CPU.

    Raises:
        SpecError: if requant is not installed from a checkout, or something in the fleet's files does not fit.
        RequantError: if something does not start; what has started goes on until `down`.
    """
    if not (ROOT / "infra").is_dir():
        raise SpecError(f"There is no {ROOT}/infra.", remedy="Start from a checkout of requant: it is not installed.")
    state, gpus, store = state.absolute(), _gpus(), Settings().store
    _check(state)
    if "://" not in store:
        store = str(Path(store).absolute())
    open_store(store).list("models/")  # better refused here than in the first night
    (state / "logs").mkdir(parents=True, exist_ok=True)
    if len(os.fsencode(longest := state / "postgres-socket/.s.PGSQL.5432")) > LONGEST_SOCKET:
        raise RequantError(
            f"{longest} is longer than the {LONGEST_SOCKET} bytes that the path of a socket may have.",
            remedy="Give a shorter folder with --state.",
        )
    with _alone(state):
        known = _known_port(state)
        port = port or known or PORT
        url = f"http://127.0.0.1:{port}/api"
        where = {**_settings(store), "PREFECT_API_URL": url, "PREFECT_HOME": str(state / "prefect")}
        is_running = _supervisor(state, "pid").returncode == 0
        if not is_running:
            _end(_ours(state))  # of a supervisord that was killed
        if not is_running or port != known:
            _check_port(port)
        postgres = _postgres(state, database)
        programs = [*postgres, _server(state, port, bool(postgres)), *_workers(where, num_runs, gpus)]
        _write_conf(state, programs)
        if is_running:
            _supervisor(state, "update")  # restarts what has changed
            _supervisor(state, "start", "all")  # and what was given up
        else:
            _start(state)
        # What answers must be ours: another server would lose its fleet to this one.
        _await(state, lambda: _listens(state, port) and answers(f"{url}/health"), "the server")
        os.environ.update(where)  # Prefect reads it when it is imported
        from flows.deploy import deploy

        file = _fleet(state, fleet)
        yield from deploy(file, workers="process")
        if file != state / EMPTY_FLEET:
            (state / FLEET_FILE).write_text(str(file))
        _await(state, lambda: _are_ready(url, {"cpu", "gpu"} if gpus else {"cpu"}), "the workers")
    yield f"database  {'PostgreSQL' if postgres else 'SQLite'}, in {state}"
    yield f"store     {store}"
    yield f"logs      {state / 'logs'}"
    yield f"runs      http://127.0.0.1:{port}"
    yield ""
    yield "Here, `requant run` and `prefect` reach this server after"
    yield f"  export PREFECT_API_URL={url} REQUANT_STORE={shlex.quote(store)}"


def status(state: Path) -> tuple[list[str], bool]:
    """A line for each process, and whether all of them run."""
    state = state.absolute()
    _check(state)
    said = _supervisor(state, "status")
    if said.returncode in (0, 3):  # 3: some do not run
        return said.stdout.splitlines(), said.returncode == 0
    if left := _ours(state):
        pids = ", ".join(str(process.pid) for process in left)
        return [f"supervisord was killed and left {pids}; `requant up` starts anew, `requant down` ends them."], False
    return [f"Nothing runs from {state}."], False


def down(state: Path) -> Iterator[str]:
    """Stop everything, workers first."""
    state = state.absolute()
    _check(state)
    if not state.is_dir():
        raise RequantError(f"There is no {state}.", remedy="Give the --state that `requant up` was given.")
    with _alone(state):
        if _supervisor(state, "shutdown").returncode == 0:
            _await_end(state)
        _end(_ours(state))
    yield f"Stopped. Database and logs stay in {state}."


def _settings(store: str) -> dict[str, str]:
    """Our settings as they are here, for processes that start in another folder, and without those of one command."""
    settings = Settings()
    names = {f"REQUANT_{name}".upper() for name in Settings.model_fields}
    names |= {f"REQUANT_S3_{name}".upper() for name in S3Settings.model_fields}
    found = {name: os.environ[name] for name in (names - OF_COMMAND) & os.environ.keys()}
    found |= {"REQUANT_STORE": store, "REQUANT_SCRATCH": str(settings.scratch.absolute())}
    if settings.signing_key:
        found["REQUANT_SIGNING_KEY"] = str(settings.signing_key.absolute())
    if settings.trusted_keys:
        found["REQUANT_TRUSTED_KEYS"] = os.pathsep.join(str(key.absolute()) for key in settings.trusted_keys)
    return found


def _check(state: Path) -> None:
    if find_spec("supervisor") is None:
        raise RequantError("supervisord is not installed.", remedy="pip install 'requant[machine]'")
    if state.is_dir() and not os.access(state, os.W_OK):
        remedy = "Do this as the user who ran `requant up`, or give another --state."
        raise RequantError(f"{state} belongs to another user.", remedy=remedy)


@contextmanager
def _alone(state: Path) -> Iterator[None]:
    """Two at once would start everything twice."""
    with (state / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequantError(f"Another `up` or `down` works on {state}.", remedy="Wait until it has ended.") from None
        yield


def _postgres(state: Path, wanted: Database) -> list[Program]:
    """PostgreSQL with a data folder of its own, or nothing for SQLite. What was begun is kept."""
    data, sockets = state / "postgres", state / "postgres-socket"
    version = (data / "PG_VERSION").read_text().strip() if (data / "PG_VERSION").exists() else None
    begun = "postgresql" if version else "sqlite" if (state / "prefect/prefect.db").exists() else None
    if begun and wanted not in ("auto", begun):
        raise RequantError(
            f"{state} has its runs in {begun}, and {wanted} is asked for.",
            remedy="Leave --database out, or give another --state.",
        )
    binaries = _postgres_binaries(version)
    if "sqlite" in (begun, wanted) or (not begun and wanted == "auto" and binaries is None):
        return []
    if binaries is None:
        raise RequantError(
            f"PostgreSQL{f' {version}' if version else ''} is not installed: initdb is neither on PATH nor below "
            "/usr/lib/postgresql.",
            remedy="Install it (apt install postgresql), or give --database sqlite with a new --state.",
        )
    account = _make_folders(data, sockets)
    if not version:
        made = subprocess.run(
            [binaries / "initdb", "--pgdata", data, "--username=prefect", "--encoding=UTF8", "--locale=C.UTF-8",
             "--auth-local=trust", "--auth-host=reject"],
            capture_output=True, text=True, cwd="/", check=False,
            user=account, group=account and pwd.getpwnam(account).pw_gid, extra_groups=[] if account else None,
        )  # fmt: skip
        if made.returncode:
            raise RequantError(f"initdb cannot make {data}: {made.stderr.strip()}", remedy="Or give --database sqlite.")
    # Reached by a socket in a folder that only its owner may enter, so it needs no password and no port.
    options = ("-c", "listen_addresses=", "-c", f"unix_socket_directories={sockets}")
    command = (str(binaries / "postgres"), "-D", str(data), *options)
    return [Program(name="postgres", command=command, environment={}, priority=10, stopsignal="INT", user=account)]


def _postgres_binaries(version: str | None) -> Path | None:
    """The folder of initdb: of this major version, or of the newest."""
    folders = set(Path("/usr/lib/postgresql").glob("*/bin"))
    if on_path := shutil.which("initdb"):
        folders.add(Path(on_path).resolve().parent)
    majors = {_major(folder): folder for folder in folders if (folder / "initdb").exists()}
    return majors.get(int(version)) if version else majors[max(majors)] if majors else None


def _major(folder: Path) -> int:
    said = subprocess.run([folder / "initdb", "--version"], capture_output=True, text=True, check=True).stdout
    (number,) = re.findall(r"\d+", said)[:1]
    return int(number)


def _make_folders(*folders: Path) -> str | None:
    """For PostgreSQL, which refuses to run as root: then the account that it runs as, which owns them."""
    account = None
    if os.geteuid() == 0:
        account = "postgres" if any(entry.pw_name == "postgres" for entry in pwd.getpwall()) else "nobody"
    for folder in folders:
        folder.mkdir(mode=0o700, exist_ok=True)
        if account:
            shutil.chown(folder, account)
            if subprocess.run(["test", "-w", folder], user=account, extra_groups=[], cwd="/", check=False).returncode:
                raise RequantError(
                    f"PostgreSQL does not run as root, and {account} cannot enter {folder}.",
                    remedy="Start as another user, give a --state that all may reach, or --database sqlite.",
                )
    return account


def _server(state: Path, port: int, postgres: bool) -> Program:
    environment = {**read_env("server.env"), "PREFECT_HOME": str(state / "prefect")}
    if postgres:
        url = f"postgresql+asyncpg://prefect@/postgres?host={state / 'postgres-socket'}"
        environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = url
    command = (sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port))
    return Program(name="server", command=command, environment=environment, priority=20)


def _workers(where: Mapping[str, str], num_runs: int, gpus: Sequence[str]) -> Iterator[Program]:
    """One for the CPU; one per GPU, with that GPU and one run at a time."""
    environment = {**read_env("worker.env"), **where}

    def worker(name: str, pool: str, limit: int, **more: str) -> Program:
        command = (
            sys.executable, "-m", "flows.after_server",
            sys.executable, "-m", "prefect", "worker", "start", "--type", "process", "--pool", pool,
            "--name", f"{name}@{socket.gethostname()}", "--limit", str(limit),
        )  # fmt: skip
        return Program(name=name, command=command, environment={**environment, **more}, priority=30)

    runtimes = [runtime for runtime in get_args(Runtime) if runtime != "onnxruntime"]
    to_gpus = {"REQUANT_BUILD_ON": json.dumps(dict.fromkeys(runtimes, "build/gpu")), "REQUANT_TRAIN_ON": "train/gpu"}
    yield worker("worker-cpu", "cpu", num_runs, **({**to_gpus, **where} if gpus else {}))
    for number, gpu in enumerate(gpus):
        yield worker(f"worker-gpu-{number}", "gpu", 1, CUDA_VISIBLE_DEVICES=gpu)


def _gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls them: those that it names already, or all."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        named = takewhile(lambda gpu: not gpu.startswith("-"), map(str.strip, visible.split(",")))  # as CUDA reads it
        return [gpu for gpu in named if gpu]
    if shutil.which("nvidia-smi") is None:
        return []
    query = ("nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader")
    said = subprocess.run(query, capture_output=True, text=True, check=False)
    if said.returncode:
        raise RequantError(
            f"nvidia-smi is there and cannot list the GPUs: {(said.stdout + said.stderr).strip()}",
            remedy="Mend the driver, or export CUDA_VISIBLE_DEVICES= to go without GPUs.",
        )
    return said.stdout.split()


def read_env(name: str) -> dict[str, str]:
    """What all sizes of installation have in common."""
    lines = (ROOT / "infra" / name).read_text().splitlines()
    return {line.partition("=")[0]: line.partition("=")[2] for line in lines if line and not line.startswith("#")}


def _write_conf(state: Path, programs: Sequence[Program]) -> None:
    user = "user=root\n" if os.geteuid() == 0 else ""  # otherwise it warns
    parts = [CONF.format(user=user, root=_escaped(ROOT), state=_escaped(state))]
    for program in programs:
        environment = {**program.environment, MARK: str(state)}
        parts.append(
            PROGRAM.format(
                name=program.name,
                command=_escaped(shlex.join(program.command)),
                environment=",".join(f"{name}={_quoted(value)}" for name, value in sorted(environment.items())),
                user=f"user={program.user}\n" if program.user else "",
                priority=program.priority,
                stopsignal=program.stopsignal,
                state=_escaped(state),
            )
        )
    partial = state / "supervisord.conf.partial"
    partial.touch(mode=0o600)
    partial.write_text("".join(parts))
    partial.replace(state / "supervisord.conf")


def _escaped(value: object) -> str:
    """As supervisord reads it: % begins a variable."""
    return str(value).replace("%", "%%")


def _quoted(value: str) -> str:
    """As supervisord reads a value of an environment; it knows no way to write every text."""
    mark = "'" if '"' in value else '"'
    if mark in value or value.strip("'\"") != value or "\n" in value:
        raise RequantError(f"supervisord cannot be given {value!r}.", remedy="Use a value without quotation marks.")
    return f"{mark}{_escaped(value)}{mark}"


def _supervisor(state: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "supervisor.supervisorctl", "-c", str(state / "supervisord.conf"), *arguments)
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _known_port(state: Path) -> int | None:
    """That of last time, as the server's command has it."""
    conf = state / "supervisord.conf"
    found = re.search(r"^command=.* server start .*--port (\d+)$", conf.read_text(), re.M) if conf.exists() else None
    return int(found[1]) if found else None


def _listens(state: Path, port: int) -> bool:
    """Whether it is a process of ours that does."""
    for process in _ours(state):
        with suppress(psutil.Error):  # has ended
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                    return True
    return False


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server will: what has ended is no matter
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise RequantError(f"Port {port} cannot be had: {error.strerror}.", remedy="Give another --port.") from None


def _start(state: Path) -> None:
    command = (sys.executable, "-m", "supervisor.supervisord", "-c", str(state / "supervisord.conf"))
    environment = {name: value for name, value in os.environ.items() if name.upper() not in OF_COMMAND}
    log = state / "logs/supervisord.out"  # no pipe: what it leaves running would hold it open
    with log.open("w") as output:
        started = subprocess.run(
            command, cwd=state, env={**environment, MARK: str(state)}, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    if started.returncode:
        raise RequantError(f"supervisord does not start: {log.read_text().strip()}")


def _await(state: Path, is_done: Callable[[], bool], what: str) -> None:
    """Until it is done.

    Raises:
        RequantError: with the end of a log, if a process was given up or the time is over.
    """
    deadline = time.monotonic() + START_S
    while not is_done():
        said = _supervisor(state, "status").stdout
        given_up = [line.split()[0] for line in said.splitlines() if " FATAL " in line]
        if given_up or time.monotonic() > deadline:
            log = state / f"logs/{given_up[0] if given_up else 'server'}.log"
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:]) if log.exists() else ""
            raise RequantError(f"{what.capitalize()} cannot be reached.\n{said}{tail}", remedy=f"Read {log}.")
        time.sleep(0.5)


def _await_end(state: Path) -> None:
    """Until supervisord has stopped the others and itself."""
    deadline = time.monotonic() + STOP_S
    while _supervisor(state, "pid").returncode == 0 and time.monotonic() < deadline:
        time.sleep(0.5)


def _are_ready(url: str, pools: set[str]) -> bool:
    """Each pool has a worker that has lately told the server so."""
    found = httpx.post(f"{url}/work_pools/filter", json={}, timeout=30).raise_for_status().json()
    return pools <= {pool["name"] for pool in found if pool["status"] == "READY"}


def _fleet(state: Path, given: Path | None) -> Path:
    """The fleet's file: that of last time if none is given, as `deploy` removes what a fleet no longer has."""
    known = state / FLEET_FILE
    if given is None and known.exists():
        given = Path(known.read_text())
    fleet = (given or Path("fleet.yaml")).absolute()
    if given is None and not fleet.exists():
        none = state / EMPTY_FLEET
        none.write_text(yaml.safe_dump({"models": [], "directory": str(Path.cwd())}))
        return none
    return fleet


def _ours(state: Path) -> list[psutil.Process]:
    """All that was started from `state` and still runs, runs of workers too; by its mark, as pids are used again."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # has ended, or is another user's
            if process.environ().get(MARK) == str(state) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _end(processes: Sequence[psutil.Process]) -> None:
    """What does not end when asked is killed."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(processes, timeout=15)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=15)
