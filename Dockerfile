# docker build -t bertology-serve .                  (CPU; --build-arg EXTRAS=gpu,grpc for CUDA's ONNX Runtime)
# docker run -p 8000:8000 -v ./deltas:/deltas:ro -v ./encoder:/encoder:ro bertology-serve
FROM python:3.12-slim

ARG EXTRAS=cpu,demo,grpc,route
# Torch's wheels for CPU lie in an index of their own; for CUDA: --build-arg TORCH_INDEX=https://pypi.org/simple
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

WORKDIR /src
COPY . .
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" -c constraints.txt ".[$EXTRAS]" && rm -rf /src/*

RUN useradd --system --uid 999 --create-home server
USER server
WORKDIR /home/server
ENV HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
EXPOSE 8000 8001
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=3)"]
ENTRYPOINT ["bertology-serve", "serve", "--host", "0.0.0.0", "--port", "8000", "--grpc-port", "8001", "--log-format", "json"]
CMD ["--backbone", "minilm", "--deltas", "/deltas", "--drain-seconds", "5"]
