# Build:  docker build -t dpo_dist .
# Run:    docker run --rm --gpus all --ipc=host -v "$PWD/output:/workspace/output" dpo_dist \
#             accelerate launch -m dpo_dist.train +experiment=qwen7b
#
# The development image, because DeepSpeed compiles kernels at their first use. Its CUDA version is the one
# that the pinned torch is built for.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        g++ git python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

# Dependencies first: a change of the program does not install them again.
WORKDIR /src
COPY constraints.txt pyproject.toml ./
RUN python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
        > requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt

# Compiled from source, which takes long; without it attention runs on torch's own kernels.
ARG FLASH_ATTN=0
RUN if [ "$FLASH_ATTN" = 1 ]; then \
        pip install --constraint constraints.txt packaging setuptools wheel \
        && pip install --constraint constraints.txt --no-build-isolation flash-attn; \
    fi

COPY README.md ./
COPY conf conf
COPY dpo_dist dpo_dist
RUN pip install --no-deps .

# The owner of what is written to mounted folders: --build-arg USER_ID=$(id -u)
ARG USER_ID=1000
RUN useradd --create-home --non-unique --uid "$USER_ID" trainer \
    && install --directory --owner=trainer /workspace
USER trainer
WORKDIR /workspace

CMD ["python", "-m", "dpo_dist.train", "--help"]
