# syntax=docker/dockerfile:1
# inference: the front and its workers. Build from the root of the repository:
#   docker build -f deploy/docker/inference.Dockerfile -t slipstream-inference:0.1.0 .
# The default torch brings CUDA's libraries along: the machine needs only the driver. Builds of torch for CPUs alone, or for
# another CUDA, lie in indexes of their own: --build-arg TORCH_INDEX=URL. For another base, with or without Python 3.11 or newer of its own:
#   --build-arg BASE_IMAGE=nvidia/cuda:13.0.1-runtime-ubuntu24.04
ARG BASE_IMAGE=python:3.12-slim

FROM ${BASE_IMAGE} AS base
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN command -v python3 >/dev/null \
    || { apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*; }

FROM base AS build
ARG TORCH="torch>=2.11,<2.14"
# Empty: pip's own.
ARG TORCH_INDEX=
# By itself and first: gigabytes that change seldom.
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/slipstream \
    && /opt/slipstream/bin/pip install --disable-pip-version-check ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} "${TORCH}"
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY protos/slipstream protos/slipstream
COPY clients/python clients/python
COPY services services
ARG EXTRAS=worker,media
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/slipstream/bin/pip install --disable-pip-version-check ".[${EXTRAS}]"

FROM base
COPY --from=build /opt/slipstream /opt/slipstream
COPY deploy/docker/healthcheck.py /opt/slipstream/healthcheck.py
# /data is what must survive, /cache what was downloaded. Everything else may be read-only, except /tmp.
RUN groupadd --gid 10001 slipstream \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin slipstream \
    && install --directory --owner=10001 --group=10001 /data /cache
ENV PATH=/opt/slipstream/bin:${PATH} \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface \
    SLIPSTREAM_HOME=/cache/slipstream \
    SLIPSTREAM_DATA_DIR=/data \
    SLIPSTREAM_HOST=0.0.0.0 \
    SLIPSTREAM_LOG_FORMAT=json \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /tmp
VOLUME /data /cache
EXPOSE 50051 51051 52051
STOPSIGNAL SIGTERM
ENV HEALTH_PORT=52051
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 CMD ["python3", "/opt/slipstream/healthcheck.py"]
ENTRYPOINT ["slipstream", "serve"]
CMD ["inference"]
