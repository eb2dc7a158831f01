# Softcue with its demo base. Point SOFTCUE_BASE_PATH at a real base model, mounted read-only, and keep /var/lib/softcue.
#
#   docker build -t softcue .                                     torch for the CPU
#   docker build --build-arg TORCH_BACKEND=cu130 -t softcue .     torch for CUDA 13.0
#   docker run -p 8000:8000 -v softcue:/var/lib/softcue softcue
ARG BASE_IMAGE=python:3.12-slim
FROM ${BASE_IMAGE}

ARG TORCH_BACKEND=cpu
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --create-home --home-dir /home/softcue softcue \
    && install -d -o softcue -g softcue /var/lib/softcue

WORKDIR /opt/softcue
COPY constraints.txt pyproject.toml README.md LICENSE softcue.py ./
COPY prompt_store prompt_store
COPY service service
COPY training training
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir uv \
    && UV_NO_CACHE=1 /opt/venv/bin/uv pip install --python /opt/venv/bin/python --torch-backend "${TORCH_BACKEND}" \
        -c constraints.txt torch . \
    && /opt/venv/bin/pip uninstall -y uv
COPY examples examples

ENV PATH=/opt/venv/bin:$PATH \
    SOFTCUE_SERVER_HOST=0.0.0.0 \
    SOFTCUE_STORE_URL=/var/lib/softcue/softcue.db \
    HF_HUB_OFFLINE=1
USER softcue
VOLUME /var/lib/softcue
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/ready', timeout=2)"]
CMD ["softcue", "serve", "--config", "examples/softcue.toml"]
