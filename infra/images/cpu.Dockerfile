# The Prefect server, the CPU worker and the command line. From the repository's root:
#   docker build -f infra/images/cpu.Dockerfile -t requant-cpu:0.1.0 .
# A registry of your own comes as a secret: --secret id=pip.conf,src=pip.conf
# The base is named by an exact tag. What can never change is a digest: --build-arg BASE=python:3.12.12-slim-bookworm@sha256:…
ARG BASE=python:3.12.12-slim-bookworm

FROM ${BASE} AS builder
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV PATH=/srv/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /srv/requant
COPY requirements.lock ./
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python -m venv /srv/venv && pip install --require-hashes --no-deps -r requirements.lock
COPY . ./
# The lock holds the tools of development too. They go again, and what stays must be whole.
RUN pip install --no-deps --no-build-isolation --editable . \
    && python infra/images/extra.py dev | xargs pip uninstall --yes \
    && pip check

FROM ${BASE}
RUN useradd --uid 10001 --create-home --home-dir /var/lib/requant --shell /usr/sbin/nologin requant
COPY --from=builder /srv /srv
# What is written goes to the home and to the temporary folder, so the rest may be mounted read-only.
ENV PATH=/srv/venv/bin:$PATH PYTHONUNBUFFERED=1 DO_NOT_TRACK=1 \
    PREFECT_HOME=/var/lib/requant/prefect PREFECT_SERVER_ANALYTICS_ENABLED=false \
    REQUANT_STORE=/var/lib/requant/store REQUANT_SCRATCH=/var/lib/requant/scratch \
    PREFECT_UI_STATIC_DIRECTORY=/tmp/requant-ui MPLCONFIGDIR=/tmp/matplotlib HEALTH_URL=http://127.0.0.1:8080/health
USER 10001:10001
WORKDIR /var/lib/requant
# A server that a run starts by itself finds its SQLite database migrated: ten seconds less.
RUN prefect server database upgrade --yes
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(os.environ['HEALTH_URL'], timeout=5)"]
CMD ["python", "-m", "flows.after_server", "prefect", "worker", "start", "--with-healthcheck", \
     "--type", "process", "--pool", "cpu", "--limit", "2"]
