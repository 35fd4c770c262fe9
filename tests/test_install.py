"""What is installed from: images, compose file, manifests, units. Checked without a daemon, a cluster or a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import prefect.settings
import pytest
import yaml

from tasks.contracts.settings import S3Settings, Settings
from tasks.contracts.spec import Runtime
from tests.test_architecture import locked_blocks

INFRA = Path(__file__).resolve().parents[1] / "infra"
DOCKERFILES = sorted(INFRA.glob("images/*.Dockerfile"))
MANIFESTS = sorted(INFRA.glob("kubernetes/*.yaml"))
COMPOSE = yaml.safe_load((INFRA / "compose.yaml").read_text())
KUSTOMIZATION = yaml.safe_load((INFRA / "kustomization.yaml").read_text())
EXACT_TAG = re.compile(r".+:[\w.-]*\d+\.\d+[\w.-]*")
KUBERNETES = ("1.30", "1.37")  # the oldest and the newest that the manifests are checked for


def tool(name: str) -> str:
    """A checker of the dev extra or of the system, or a skip that says what is missing."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*command: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60, check=False)


def env_file(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


# images


def instructions(path: Path) -> list[tuple[str, str]]:
    """Of a Dockerfile: each with its arguments."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE))
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_have_no_findings(path: Path) -> None:
    """hadolint, with shellcheck inside."""
    ended = run(tool("hadolint"), path)
    assert ended.returncode == 0, ended.stdout


def test_the_linter_finds_what_it_is_for() -> None:
    """A linter that is silent for any input would prove nothing."""
    found = run(tool("hadolint"), "-", stdin="FROM debian:latest\nRUN cd /tmp && sudo apt-get install x\n")
    assert found.returncode == 1
    assert {"DL3007", "DL3004"} <= set(re.findall(r"DL\d+", found.stdout))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_are_small_in_rights_and_pinned(path: Path) -> None:
    """Bases by exact tag, packages by hash, a user without rights, and a question that tells whether it lives."""
    lines = instructions(path)
    names = dict(arguments.split("=", 1) for name, arguments in lines if name == "ARG")
    bases = [arguments.split()[0] for name, arguments in lines if name == "FROM"]
    assert len(bases) == 2
    assert all(EXACT_TAG.fullmatch(names[base.strip("${}")]) for base in bases), names
    assert [arguments for name, arguments in lines if name == "USER"][-1] == "10001:10001"
    assert [name for name, _ in lines][-2:] == ["HEALTHCHECK", "CMD"]
    installs = [
        part for name, arguments in lines if name == "RUN" for part in re.findall(r"pip install[^&]*", arguments)
    ]
    assert installs
    assert all("--require-hashes" in part or "--editable ." in part for part in installs), installs
    assert all("--no-deps" in part for part in installs), installs
    copied = [name for what, files in lines if what == "COPY" and "--from" not in files for name in files.split()[:-1]]
    assert all((INFRA.parent / name).exists() for name in copied), copied


def pins(lock: Path) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)(?:\[[^]]*\])?==([^\s;\\]+)", lock.read_text(), re.MULTILINE))


def test_the_gpu_image_agrees_with_the_lock() -> None:
    """One version of each package, each with hashes, and one major version of CUDA."""
    main, gpu = pins(INFRA.parent / "requirements.lock"), pins(INFRA / "images/gpu.lock")
    assert "pycuda" in gpu
    assert {name: main[name] for name in main.keys() & gpu.keys()} == {
        name: gpu[name] for name in main.keys() & gpu.keys()
    }
    blocks = locked_blocks(INFRA / "images/gpu.lock")
    assert len(blocks) == len(gpu)
    assert all(any("--hash=sha256:" in line for line in block) for block in blocks)
    cuda = set(re.findall(r"cuda:(\d+)|\+cuda(\d+)", (INFRA / "images/gpu.Dockerfile").read_text()))
    assert {number for pair in cuda for number in pair if number} == {main["cuda-toolkit"].partition(".")[0]}


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_lose_the_tools_of_development_and_nothing_else(path: Path) -> None:
    """What an image removes after installing the locks is the dev extra, without what a lock of its own holds."""
    text = path.read_text()
    (arguments,) = re.findall(r"python (infra/images/extra\.py [^|]+)", text)
    said = subprocess.run(
        [sys.executable, *arguments.split()], cwd=INFRA.parent, capture_output=True, text=True, check=True
    ).stdout.split()
    assert {"pytest", "mypy", "ruff", "boto3-stubs"} <= set(said)
    assert not {"torch", "prefect", "numpy"} & set(said)
    own = set(re.findall(r"-r (\S+\.lock)", text)) - {"requirements.lock"}
    assert not {name for lock in own for name in pins(INFRA / "images" / lock)} & set(said)


# settings


@pytest.mark.parametrize("name", ["server.env", "worker.env"])
def test_settings_are_known_to_prefect(name: str) -> None:
    """Prefect passes over a misspelt one without a word."""
    for variable in env_file(INFRA / name):
        assert variable == "DO_NOT_TRACK" or hasattr(prefect.settings, variable), variable


# compose


def test_the_compose_file_fits_its_schema() -> None:
    """That of the Compose specification."""
    ended = run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", INFRA / "compose.yaml")
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_the_schema_finds_a_misspelt_key(tmp_path: Path) -> None:
    """A schema that lets everything through would prove nothing."""
    wrong = tmp_path / "compose.yaml"
    wrong.write_text("services: {server: {image: x, mem_limits: 1g}}")
    ended = run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", wrong)
    assert ended.returncode == 1, ended.stdout


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_services_are_confined(name: str) -> None:
    """No rights, nothing written but in volumes and memory, limits, a restart, and a pinned image."""
    service = COMPOSE["services"][name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert service["restart"] in ("unless-stopped", "on-failure:3")
    assert service["mem_limit"]
    assert EXACT_TAG.fullmatch(service["image"])
    assert {"inner"} <= set(service["networks"]) <= COMPOSE["networks"].keys()
    assert not [port for port in service.get("ports", ()) if not port.startswith("${PREFECT_BIND:-127.0.0.1}:")]
    for volume in service.get("volumes", ()):
        source = volume.split(":")[0]
        assert source in COMPOSE["volumes"] or source.startswith("${REQUANT_FLEET"), volume
    for file in service.get("env_file", ()):
        assert (INFRA / file).is_file()
    if "build" in service:
        assert (INFRA / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    for other in service.get("depends_on", ()):
        assert "healthcheck" in COMPOSE["services"][other] or "build" in COMPOSE["services"][other]  # the image's own


def test_variables_of_the_compose_file_are_explained() -> None:
    """Each stands in the example, and secrets have no default."""
    text = (INFRA / "compose.yaml").read_text()
    services = COMPOSE["services"].values()
    passed_on = {
        name for service in services for name, value in service.get("environment", {}).items() if value is None
    }
    used = passed_on | set(re.findall(r"(?<!\$)\$\{(\w+)", text))
    explained = set(re.findall(r"^#?(\w+)=", (INFRA / "compose.env.example").read_text(), re.MULTILINE))
    assert used == explained
    for secret in ("POSTGRES_PASSWORD", "PREFECT_AUTH"):
        assert f"${{{secret}:?" in text
        assert f"${{{secret}:-" not in text


def test_filled_in_secrets_cannot_be_committed() -> None:
    """git ignores what the example is copied to."""
    assert run("git", "-C", INFRA, "check-ignore", "--quiet", "compose.env").returncode == 0


def client_settings() -> dict[str, dict[str, str | None]]:
    """What workers get, by size of installation."""
    return {
        "compose": COMPOSE["x-client"],
        "Kubernetes": env_file(INFRA / "kubernetes/settings.env"),
    }


@pytest.mark.parametrize("size", ["compose", "Kubernetes"])
def test_workers_are_given_settings_that_are_ours(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read without an error, and those that are not set stay so. An empty URL, say, would be refused."""
    for name in [name for name in os.environ if name.startswith("REQUANT_")]:
        monkeypatch.delenv(name)
    for name, value in client_settings()[size].items():
        if value is not None:
            monkeypatch.setenv(name, re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value))
    settings, _ = Settings(), S3Settings()
    assert settings.build_on == dict.fromkeys(set(get_args(Runtime)) - {"onnxruntime"}, "build/gpu")
    known = {f"REQUANT_{name}".upper() for name in Settings.model_fields}
    known |= {f"REQUANT_S3_{name}".upper() for name in S3Settings.model_fields}
    assert {name for name in client_settings()[size] if name.startswith("REQUANT_")} <= known


# Kubernetes


def documents() -> list[dict[str, Any]]:
    return [document for path in MANIFESTS for document in yaml.safe_load_all(path.read_text())]


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    for document in documents():
        if "template" in document.get("spec", {}):
            yield document["metadata"]["name"], document["spec"]["template"]["spec"]


PODS = dict(pods())


@pytest.mark.parametrize("version", KUBERNETES)
def test_manifests_fit_kubernetes_schemas(version: str, tmp_path: Path) -> None:
    """Strictly: a key that Kubernetes does not know fails, as the misspelt one here shows."""
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(yaml.safe_dump_all(documents()))  # with anchors written out, as kubectl sends them
    bad.write_text(good.read_text().replace("readOnlyRootFilesystem:", "readOnlyRootFileSystem:", 1))
    check = (tool("kubernetes-validate"), "--strict", "--kubernetes-version", version)
    ended = run(*check, good)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert run(*check, bad).returncode != 0


def test_kustomize_builds_what_the_files_say() -> None:
    """All of it, with names of generated ConfigMaps and tags of images filled in."""
    ended = run(tool("kubectl"), "kustomize", INFRA)
    assert ended.returncode == 0, ended.stderr
    built = list(yaml.safe_load_all(ended.stdout))
    names = {(document["kind"], document["metadata"]["name"]) for document in documents()}
    assert names <= {(document["kind"], document["metadata"]["name"]) for document in built}
    assert all(document["metadata"].get("namespace", "requant") == "requant" for document in built)
    maps = {document["metadata"]["name"] for document in built if document["kind"] == "ConfigMap"}
    referred = set(re.findall(r"configMapRef:\s+name: (\S+)", ended.stdout))
    assert referred
    assert referred <= maps
    images = set(re.findall(r"image: (\S+)", ended.stdout))
    assert images == {f"{image['name']}:{image['newTag']}" for image in KUSTOMIZATION["images"]}
    assert all(EXACT_TAG.fullmatch(image) for image in images)


def test_every_manifest_is_applied() -> None:
    """A file that the kustomization leaves out would be dead."""
    listed = {INFRA / name for name in KUSTOMIZATION["resources"]}
    assert listed == set(MANIFESTS)


@pytest.mark.parametrize("name", PODS)
def test_pods_are_confined(name: str) -> None:
    """What the namespace's level `restricted` asks, and a read-only root, no token, and limits."""
    pod = PODS[name]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in [*pod.get("initContainers", ()), *pod["containers"]]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
        assert container["resources"]["limits"]["memory"]
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
    if name != "deploy":  # a job: it ends
        (container,) = pod["containers"]
        assert {"startupProbe", "livenessProbe"} <= container.keys()


def test_secrets_are_referred_to_and_never_written() -> None:
    """Their names are those that the guide has made."""
    guide = (INFRA.parent / "docs/install.md").read_text()
    referred = set()
    for pod in PODS.values():
        for container in [*pod.get("initContainers", ()), *pod["containers"]]:
            for variable in container.get("env", ()):
                if re.search("PASSWORD|AUTH|CONNECTION_URL", variable["name"]):
                    assert "value" not in variable
                    key = variable["valueFrom"]["secretKeyRef"]
                    referred.add((key["name"], key["key"]))
            referred |= {
                (source["secretRef"]["name"], "AWS_ACCESS_KEY_ID")
                for source in container.get("envFrom", ())
                if "secretRef" in source
            }
    assert len(referred) == 4
    for name, key in referred:
        assert re.search(rf"create secret generic {name}\b(?:.|\\\n)*--from-literal={key}=", guide), (name, key)
    assert not [document for document in documents() if document["kind"] == "Secret"]


def test_a_gpu_worker_has_one_gpu() -> None:
    """Requested and limited, as Kubernetes wants both equal; nothing else has one."""
    for name, pod in PODS.items():
        resources = pod["containers"][0]["resources"]
        wanted = 1 if name == "worker-gpu" else None
        assert resources["limits"].get("nvidia.com/gpu") == resources["requests"].get("nvidia.com/gpu") == wanted


def test_both_sizes_with_containers_have_the_same_images() -> None:
    """One build serves compose and Kubernetes."""
    ours = {service["image"] for service in COMPOSE["services"].values() if service["image"].startswith("requant")}
    assert ours == {f"{i['name']}:{i['newTag']}" for i in KUSTOMIZATION["images"] if i["name"].startswith("requant")}


# systemd


def test_the_unit_is_understood_by_systemd(tmp_path: Path) -> None:
    """systemd warns of every key that it does not know, and fails on a program that is not there."""
    text = (INFRA / "systemd/requant.service").read_text()
    assert "ExecStart=%h/requant/.venv/bin/supervisord " in text
    for name, unit in {"good": text, "bad": text.replace("Restart=", "Restrat=")}.items():
        path = tmp_path / f"{name}.service"
        path.write_text(unit.replace("%h/requant/.venv/bin/supervisord", sys.executable))
        ended = run(tool("systemd-analyze"), "verify", "--man=no", path)
        assert (f"{name}.service" in ended.stderr) == (name == "bad"), ended.stderr
