# The server with its bundled models; targets `server` (the default: computes on the CPU), `gpu` and `trainer`.
# docs/deployment.md says what is in them. A release names its base by digest: --build-arg BASE=…/python:TAG@sha256:…
ARG BASE=docker.io/library/python:3.11-slim-bookworm

# What installs, and the wheel of this project; neither is in an image.
FROM ${BASE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY requirements/build.lock requirements/
RUN python -m venv /opt/tools && /opt/tools/bin/pip install --require-hashes -r requirements/build.lock \
 && python -m venv --without-pip /opt/ganserve
COPY requirements/*.lock requirements/

FROM build AS program
COPY pyproject.toml README.md LICENSE ./
COPY client client
COPY server server
COPY trainer trainer
RUN /opt/tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /dist . \
 && /opt/tools/bin/pip --python /opt/ganserve/bin/python install --no-deps /dist/*.whl

FROM build AS server-libraries
RUN /opt/tools/bin/pip --python /opt/ganserve/bin/python install --require-hashes -r requirements/server.lock \
 && find /opt/ganserve/lib -depth -type d \( -name tests -o -path '*/onnx/backend/test' \) -exec rm -rf {} +

FROM build AS gpu-libraries
RUN /opt/tools/bin/pip --python /opt/ganserve/bin/python install --require-hashes -r requirements/gpu.lock

FROM build AS trainer-libraries
RUN /opt/tools/bin/pip --python /opt/ganserve/bin/python install --require-hashes -r requirements/trainer.lock

# The libraries are a layer of their own: a new version of the program is a small download.
FROM ${BASE} AS common
ENV PATH=/opt/ganserve/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
ARG VERSION=unknown
ARG REVISION=unknown
ARG SOURCE=""
LABEL org.opencontainers.image.title="ganserve" \
      org.opencontainers.image.description="Serves images from GAN generators over gRPC" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}"
USER 10001:10001

FROM common AS serving
# A temporary folder is needed to measure the memory of an image; /dev/shm is there even where the root is read-only.
ENV GANSERVE_SERVER_ADDRESS=0.0.0.0:50051 \
    GANSERVE_SERVER_METRICS_ADDRESS=0.0.0.0:9464 \
    TMPDIR=/dev/shm
EXPOSE 50051 9464
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["ganserve-server", "health"]
ENTRYPOINT ["dumb-init", "--single-child", "ganserve-server"]

FROM common AS trainer
ENV HOME=/tmp
COPY --from=trainer-libraries /opt/ganserve /opt/ganserve
COPY --from=program /opt/ganserve /opt/ganserve
ENTRYPOINT ["dumb-init", "--single-child", "ganserve-trainer"]

FROM serving AS gpu
ENV GANSERVE_SERVER_PROVIDER=cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=gpu-libraries /opt/ganserve /opt/ganserve
COPY --from=program /opt/ganserve /opt/ganserve

FROM serving AS server
COPY --from=server-libraries /opt/ganserve /opt/ganserve
COPY --from=program /opt/ganserve /opt/ganserve
