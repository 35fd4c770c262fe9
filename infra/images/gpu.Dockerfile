# The GPU worker: TensorRT, and PyCUDA built against the same CUDA. From the repository's root:
#   docker build -f infra/images/gpu.Dockerfile -t requant-gpu:0.1.0 .
# A registry of your own comes as a secret: --secret id=pip.conf,src=pip.conf
# CUDA is that of PyTorch in requirements.lock by its major version; the driver must be 580 or newer. Tags are exact; what
# can never change is a digest: --build-arg RUNTIME=nvidia/cuda:13.0.1-runtime-ubuntu24.04@sha256:…
ARG DEVEL=nvidia/cuda:13.0.1-devel-ubuntu24.04
ARG RUNTIME=nvidia/cuda:13.0.1-runtime-ubuntu24.04

FROM ${DEVEL} AS builder
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV PATH=/srv/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /srv/requant
COPY requirements.lock infra/images/gpu.lock ./
# The system's packages are seen, as TensorRT's bindings are one of them. PyCUDA is compiled here, with what is locked.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python3 -m venv --system-site-packages /srv/venv \
    && pip install --require-hashes --no-deps -r requirements.lock \
    && pip install --require-hashes --no-deps --no-build-isolation -r gpu.lock
COPY . ./
# The lock holds the tools of development too. They go again, but for what gpu.lock has, and what stays must be whole.
RUN pip install --no-deps --no-build-isolation --editable . \
    && python infra/images/extra.py dev infra/images/gpu.lock | xargs pip uninstall --yes \
    && pip check

FROM ${RUNTIME}
# As NVIDIA's apt repository for this Ubuntu and this CUDA has it: apt-cache madison libnvinfer10
ARG TENSORRT=10.13.3.9-1+cuda13.0
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 "libnvinfer10=${TENSORRT}" \
       "libnvinfer-plugin10=${TENSORRT}" "libnvonnxparsers10=${TENSORRT}" "python3-libnvinfer=${TENSORRT}" \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --home-dir /var/lib/requant --shell /usr/sbin/nologin requant
COPY --from=builder /srv /srv
# What is written goes to the home and to the temporary folder, so the rest may be mounted read-only.
ENV PATH=/srv/venv/bin:$PATH PYTHONUNBUFFERED=1 DO_NOT_TRACK=1 \
    PREFECT_HOME=/var/lib/requant/prefect PREFECT_SERVER_ANALYTICS_ENABLED=false \
    REQUANT_STORE=/var/lib/requant/store REQUANT_SCRATCH=/var/lib/requant/scratch \
    PREFECT_UI_STATIC_DIRECTORY=/tmp/requant-ui MPLCONFIGDIR=/tmp/matplotlib HEALTH_URL=http://127.0.0.1:8080/health
USER 10001:10001
WORKDIR /var/lib/requant
# A server that a run starts by itself finds its SQLite database migrated: ten seconds less. No GPU is needed for this.
RUN prefect server database upgrade --yes && python -c "import tensorrt"
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(os.environ['HEALTH_URL'], timeout=5)"]
CMD ["python", "-m", "flows.after_server", "prefect", "worker", "start", "--with-healthcheck", \
     "--type", "process", "--pool", "gpu", "--limit", "1"]
