# syntax=docker/dockerfile:1
# chat and adapters: no torch. Build from the root of the repository:
#   docker build -f deploy/docker/control.Dockerfile -t slipstream-control:0.1.0 .
ARG BASE_IMAGE=python:3.12-slim

FROM ${BASE_IMAGE} AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY protos/slipstream protos/slipstream
COPY clients/python clients/python
COPY services services
ARG EXTRAS=server,postgres,s3
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/slipstream \
    && /opt/slipstream/bin/pip install --disable-pip-version-check ".[${EXTRAS}]"

FROM ${BASE_IMAGE}
COPY --from=build /opt/slipstream /opt/slipstream
COPY deploy/docker/healthcheck.py /opt/slipstream/healthcheck.py
# /data is what must survive. Everything else may be read-only, except /tmp.
RUN groupadd --gid 10001 slipstream \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin slipstream \
    && install --directory --owner=10001 --group=10001 /data
ENV PATH=/opt/slipstream/bin:${PATH} \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    SLIPSTREAM_DATA_DIR=/data \
    SLIPSTREAM_HOST=0.0.0.0 \
    SLIPSTREAM_LOG_FORMAT=json
USER 10001:10001
WORKDIR /tmp
VOLUME /data
# Which ports: chat 50052, adapters 50054; metrics 1000 above, health 2000.
EXPOSE 50052 51052 52052 50054 51054 52054
STOPSIGNAL SIGTERM
# chat's; adapters: HEALTH_PORT=52054.
ENV HEALTH_PORT=52052
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["python3", "/opt/slipstream/healthcheck.py"]
ENTRYPOINT ["slipstream", "serve"]
CMD ["chat"]
