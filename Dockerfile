# Softcue with its demo base. Point SOFTCUE_BASE_PATH at a real base model, mounted read-only, and keep /var/lib/softcue.
#
#   docker build -t softcue .                                     torch for the CPU
#   docker build --build-arg TORCH_BACKEND=cu130 -t softcue .     torch for CUDA 13.0
#   docker run -p 127.0.0.1:8000:8000 -v softcue:/var/lib/softcue softcue
#
# gcc is there because the engine compiles its kernels for the processor that it meets, at the first start.
# Podman and buildah keep the health check with --format docker only.
ARG BASE_IMAGE=python:3.12-slim

FROM ${BASE_IMAGE} AS build
ARG TORCH_BACKEND=cpu
ENV UV_NO_CACHE=1
RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir uv && python3 -m venv --without-pip /opt/venv
WORKDIR /src
COPY constraints.txt ./
RUN /opt/uv/bin/uv pip install --python /opt/venv/bin/python --torch-backend "${TORCH_BACKEND}" -c constraints.txt torch
COPY pyproject.toml README.md LICENSE softcue.py ./
COPY prompt_store prompt_store
COPY service service
COPY training training
RUN /opt/uv/bin/uv pip install --python /opt/venv/bin/python --torch-backend "${TORCH_BACKEND}" -c constraints.txt '.[postgres]'

FROM ${BASE_IMAGE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 softcue \
    && useradd --uid 10001 --gid softcue --create-home softcue \
    && install -d -o softcue -g softcue /var/lib/softcue
WORKDIR /opt/softcue
COPY --from=build /opt/venv /opt/venv
COPY LICENSE ./
COPY examples examples
ENV PATH=/opt/venv/bin:$PATH \
    SOFTCUE_SERVER_HOST=0.0.0.0 \
    SOFTCUE_STORE_URL=/var/lib/softcue/softcue.db \
    SOFTCUE_RUNS=/var/lib/softcue/runs \
    HF_HUB_OFFLINE=1
USER 10001:10001
VOLUME /var/lib/softcue
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('SOFTCUE_SERVER_PORT', '8000')), timeout=2); c.request('GET', '/health/ready'); sys.exit(c.getresponse().status != 200)"]
CMD ["softcue", "serve", "--config", "examples/softcue.toml"]
