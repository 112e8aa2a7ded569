# The server with its bundled models, without torch. Build: docker build -t ganserve .
FROM python:3.11-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY client client
COPY server server
COPY trainer trainer
RUN python -m venv /opt/ganserve && /opt/ganserve/bin/pip install --no-cache-dir '.[server,tracing]'

FROM python:3.11-slim-bookworm
LABEL org.opencontainers.image.title="ganserve" \
      org.opencontainers.image.description="Serves images from GAN generators over gRPC" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/ganserve /opt/ganserve
ENV PATH=/opt/ganserve/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    GANSERVE_SERVER_ADDRESS=0.0.0.0:50051 \
    GANSERVE_SERVER_METRICS_ADDRESS=0.0.0.0:9464
USER 10001:10001
EXPOSE 50051 9464
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s CMD ["ganserve", "models", "--address", "127.0.0.1:50051"]
ENTRYPOINT ["ganserve-server"]
