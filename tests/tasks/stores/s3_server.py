"""A real S3 server on loopback: Ceph's object gateway from Debian's packages, with one monitor and one OSD.

The packages are downloaded by apt and unpacked in a cache folder (260 MB), so the system stays as it is and no root is
needed. A server has a folder of its own, takes 8 s to start and 240 MB of memory, and is gone with its folder.
"""

from __future__ import annotations

import fcntl
import os
import platform
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.request import urlopen
from uuid import uuid4

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PACKAGES = ("ceph-mon", "ceph-osd", "radosgw")
START_S = 60.0
BUCKET, REGION, KMS_KEY = "requant", "us-east-1", "test-key"

CONF = """
[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:{mon_port}/0]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_msgr1 = false
keyring = {home}/keyring
run_dir = {home}
crash_dir = {home}
admin_socket =
log_file = {home}/$name.log
mon_data = {home}/mon
mon_cluster_log_file = {home}/cluster.log
mon_data_avail_warn = 1
mon_data_avail_crit = 0
mon_allow_pool_size_one = true
auth_allow_insecure_global_id_reclaim = false
# with the default of 1 s each new pool would wait 2 s
paxos_propose_interval = 0.05
paxos_min_wait = 0.02
plugin_dir = {libraries}/ceph
erasure_code_dir = {libraries}/ceph/erasure-code
osd_class_dir = {libraries}/rados-classes
osd_data = {home}/osd
osd_memory_target = 1073741824
osd_crush_chooseleaf_type = 0
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 2
osd_pool_default_pgp_num = 2
osd_pool_default_pg_autoscale_mode = off
# a sparse file
bluestore_block_size = {size_bytes}

[client.rgw]
rgw_data = {home}
# without tcp_nodelay each answer with a body takes 40 ms longer
rgw_frontends = beast tcp_nodelay=1 {frontends}
rgw_enable_apis = s3
rgw_thread_pool_size = 64
rgw_rados_pool_pg_num_min = 2
rgw_override_bucket_index_max_shards = 1
rgw_dynamic_resharding = false
# a key of its own in place of a key server, for objects encrypted with aws:kms
rgw_crypt_require_ssl = false
rgw_crypt_s3_kms_backend = testing
rgw_crypt_s3_kms_encryption_keys = {kms_key}=YmluCmJvb3N0CmJvb3N0LWJ1aWxkCmNlcGguY29uZgo=
# its workers would sleep through a stop
rgw_enable_lc_threads = false
"""

KEYS = {  # what each part may do
    "mon.": ["mon", "allow *"],
    "client.admin": ["mon", "allow *", "osd", "allow *"],
    "client.rgw": ["mon", "allow rw", "osd", "allow rwx"],
    "osd.0": ["mon", "allow profile osd", "osd", "allow *"],
}


class NoServerError(Exception):
    """No S3 server can be had on this machine. The message says why."""


@dataclass(frozen=True)
class User:
    """Keys of one account."""

    access_key: str
    secret_key: str
    name: str = ""

    @property
    def environment(self) -> dict[str, str]:
        """What boto3 reads, and nothing else of this machine."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }


class S3Server:
    """A running server; `user` owns what is made with its keys."""

    def __init__(self, root: Path, home: Path, size_bytes: int) -> None:
        self._root, self._home = root, home
        self._libraries = root / "usr/lib" / f"{platform.machine()}-linux-gnu"
        mon_port, self.port, self._tls_port = _free_ports(3)
        self._environment = os.environ | {
            "CEPH_CONF": str(home / "ceph.conf"),
            "LD_LIBRARY_PATH": os.pathsep.join(
                map(str, (self._libraries, self._libraries / "ceph", root / "lib" / self._libraries.name))
            ),
            "PYTHONPATH": str(root / "usr/lib/python3/dist-packages"),
        }
        self._fsid, self._mon_port = str(uuid4()), mon_port
        (home / "ceph.conf").write_text(
            CONF.format(
                fsid=self._fsid, mon_port=mon_port, home=home, libraries=self._libraries, size_bytes=size_bytes,
                kms_key=KMS_KEY, frontends=f"endpoint=127.0.0.1:{self.port} ssl_endpoint=127.0.0.1:{self._tls_port} "
                f"ssl_certificate={home}/cert.pem ssl_private_key={home}/key.pem",
            )
        )  # fmt: skip

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def tls_url(self) -> str:
        """Trusted by who knows `certificate`."""
        return f"https://127.0.0.1:{self._tls_port}"

    @property
    def certificate(self) -> Path:
        return self._home / "cert.pem"

    @contextmanager
    def running(self) -> Iterator[S3Server]:
        """Started at the beginning, stopped at the end: the gateway first, as it would wait for its store."""
        with ExitStack() as daemons:
            self._call("monmaptool", "--create", "--fsid", self._fsid, "--addv", "a",
                       f"[v2:127.0.0.1:{self._mon_port}]", "monmap")  # fmt: skip
            self._make_keyring()
            _run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
                 "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(self._home / "key.pem"),
                 "-out", str(self.certificate))  # fmt: skip
            self._call("ceph-mon", "-i", "a", "--mkfs", "--monmap", "monmap", "--keyring", "keyring")
            daemons.enter_context(self._daemon("ceph-mon", "-i", "a", "-f"))
            osd_uuid = str(uuid4())
            self._call("/usr/bin/python3", str(self._root / "usr/bin/ceph"), "osd", "new", osd_uuid, "0")
            (self._home / "osd").mkdir()
            self._call("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_uuid)
            daemons.enter_context(self._daemon("ceph-osd", "-i", "0", "-f"))
            self.user = self.new_user()
            self._daemons = daemons
            self.start_gateway()
            yield self

    def start_gateway(self) -> None:
        """At the beginning, and after `kill_gateway`."""
        self._gateway = self._daemons.enter_context(self._daemon("radosgw", "-n", "client.rgw", "-f"))
        self._await_answer(self._gateway)

    def kill_gateway(self) -> None:
        """As a crash does: requests under way get no answer, and what was stored stays."""
        self._gateway.kill()
        self._gateway.wait()

    def new_user(self) -> User:
        """Another account, with no rights on what others own."""
        user = User(secrets.token_hex(10), secrets.token_hex(20), f"user{secrets.token_hex(4)}")
        self._call("radosgw-admin", "-n", "client.rgw", "user", "create",
                   f"--uid={user.name}", f"--display-name={user.name}",
                   f"--access-key={user.access_key}", f"--secret-key={user.secret_key}")  # fmt: skip
        return user

    def client(self) -> S3Client:
        """Plain boto3, to look behind the store."""
        import boto3

        return boto3.client(
            "s3", endpoint_url=self.url, region_name=REGION,
            aws_access_key_id=self.user.access_key, aws_secret_access_key=self.user.secret_key,
        )  # fmt: skip

    def _make_keyring(self) -> None:
        for number, (name, rights) in enumerate(KEYS.items()):
            caps = [argument for what, right in zip(rights[::2], rights[1::2], strict=True)
                    for argument in ("--cap", what, right)]  # fmt: skip
            self._call("ceph-authtool", *(() if number else ("-C",)), "keyring", "-n", name, "--gen-key", *caps)

    def _call(self, program: str, *arguments: str) -> None:
        ended = subprocess.run(
            [str(self._root / "usr/bin" / program), *arguments], cwd=self._home, env=self._environment,
            capture_output=True, text=True, timeout=START_S, check=False,
        )  # fmt: skip
        if ended.returncode:
            raise NoServerError(f"{program} ended with {ended.returncode}: {ended.stderr[-400:]}")

    @contextmanager
    def _daemon(self, program: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """A process that also ends if this one is killed."""
        with (self._home / f"{program}.out").open("wb") as output:
            daemon = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", str(self._root / "usr/bin" / program), *arguments],
                cwd=self._home, env=self._environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        try:
            yield daemon
        finally:
            daemon.terminate()
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _await_answer(self, gateway: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and gateway.poll() is None:
            with suppress(OSError), urlopen(self.url, timeout=5):
                return
            time.sleep(0.1)
        raise NoServerError(f"the gateway does not answer: {(self._home / 'radosgw.out').read_text()[-400:]}")


@contextmanager
def s3_server(*, size_bytes: int = 4 * 2**30) -> Iterator[S3Server]:
    """A server for the length of the block.

    Raises:
        NoServerError: if the packages cannot be had or the server does not start.
    """
    root = installed()
    with tempfile.TemporaryDirectory(prefix="s3-server-") as home:
        _check_direct_io(Path(home))
        with S3Server(root, Path(home), size_bytes).running() as server:
            yield server


def installed() -> Path:
    """The folder that the packages are unpacked in; what is there is used again."""
    for tool in ("apt-get", "dpkg-deb", "setpriv", "openssl", "/usr/bin/python3"):
        if shutil.which(tool) is None:
            raise NoServerError(f"the S3 server comes from Debian's packages, and there is no {tool}")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "requant" / "ceph"
    root, unpacked = cache / "root", cache / "unpacked"
    (cache / "archives" / "partial").mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.is_dir():
            shutil.rmtree(unpacked, ignore_errors=True)
            for package in _download(cache):
                _run("dpkg-deb", "--extract", str(package), str(unpacked))
            unpacked.rename(root)
            shutil.rmtree(cache / "archives")
    return root


def _download(cache: Path) -> list[Path]:
    """The packages, and those of their dependencies that the system lacks."""
    own_lists = ("-o", f"Dir::State::lists={cache / 'lists'}")  # a slim image has none, and only root could renew them
    fetch = ("install", "--yes", "--no-install-recommends", "--download-only", *PACKAGES)
    try:
        _apt(cache, *fetch)
    except NoServerError:
        (cache / "lists" / "partial").mkdir(parents=True, exist_ok=True)
        _apt(cache, *own_lists, "update")
        _apt(cache, *own_lists, *fetch)
    return sorted((cache / "archives").glob("*.deb"))


def _apt(cache: Path, *arguments: str) -> None:
    own = ("-o", f"Dir::Cache::archives={cache / 'archives'}", "-o", f"Dir::Cache::pkgcache={cache / 'pkgcache.bin'}",
           "-o", f"Dir::Cache::srcpkgcache={cache / 'srcpkgcache.bin'}", "-o", "Debug::NoLocking=true")  # fmt: skip
    _run("apt-get", "-q", *own, *arguments)


def _run(*command: str) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if ended.returncode:
        raise NoServerError(f"{' '.join(command[:1])} ended with {ended.returncode}: {ended.stderr[-400:]}")


def _check_direct_io(home: Path) -> None:
    """The OSD needs it; tmpfs has it since Linux 6.6."""
    try:
        os.close(os.open(home / "probe", os.O_CREAT | os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        raise NoServerError(f"{home} has no direct I/O, which the server needs: set TMPDIR to a disk") from error


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
