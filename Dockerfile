# docker build -t quickchange .
# docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/adapters:/adapters" -e QUICKCHANGE_API_KEY=A-SECRET-OF-YOUR-OWN quickchange
# The server listens on all addresses of the container, and so needs a key: QUICKCHANGE_API_KEY, or a file of keys as
# QUICKCHANGE_API_KEYS. QUICKCHANGE_ALLOW_UNAUTHENTICATED=true does without, where only this machine reaches the port.

FROM python:3.11-slim AS build
# PyTorch's index of CPU builds; empty takes torch from PyPI.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
RUN python -m venv /opt/venv
COPY pyproject.toml constraints.txt hatch_build.py ./
COPY deploy/install-torch deploy/install-torch
RUN deploy/install-torch /opt/venv/bin/python
COPY LICENSE README.md ./
COPY micro_base micro_base
COPY adapters adapters
COPY adapter_format adapter_format
COPY base_files base_files
COPY cpu_kernels cpu_kernels
COPY trainer trainer
COPY server server
# The slim image has no C compiler: the build hook brings one, which stays in this stage.
RUN /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check -c constraints.txt .

FROM python:3.11-slim
RUN useradd --uid 10001 --create-home quickchange && install --directory --owner=quickchange /adapters /cache /state
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache \
    XDG_DATA_HOME=/cache \
    QUICKCHANGE_HOST=0.0.0.0 \
    QUICKCHANGE_ADAPTERS_DIR=/adapters
USER quickchange
WORKDIR /home/quickchange
VOLUME ["/adapters", "/cache", "/state"]
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["quickchange"]
CMD ["serve"]
