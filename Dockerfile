# Build:  docker build -t dpo_dist --build-arg USER_ID=$(id -u) .
#         --build-arg FLASH_ATTN=1 adds flash-attn; --build-arg EXTRAS="quantization liger" adds optional packages.
# Run:    mkdir -p output "$HOME/.cache/huggingface"   # else docker makes these folders, and root owns them
#         docker run --rm --gpus all --ipc=host --ulimit memlock=-1 \
#             -v "$PWD/output:/workspace/output" -v "$HOME/.cache/huggingface:/home/trainer/.cache/huggingface" \
#             dpo_dist accelerate launch -m dpo_dist.train +experiment=qwen7b
#         For local models and data add -v /shared:/shared; for InfiniBand between nodes, --device=/dev/infiniband --network=host.
# Check:  train a part of the demo on the CPU, from the root of the checkout (not a HEALTHCHECK, which would train again
#         and again beside the run):
#         docker run --rm --env DS_ACCELERATOR=cpu -v "$PWD/examples:/workspace/examples:ro" dpo_dist sh -c \
#             'python -m examples.demo.make output/demo &&
#             torchrun --nproc_per_node 2 -m dpo_dist.train +experiment=demo_warmup trainer.max_steps=10'
#
# The development image, because DeepSpeed compiles kernels when they are first used. Its CUDA version must be the one
# for which the pinned torch is built.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

# Without libibverbs NCCL cannot use InfiniBand and RoCE cards, and falls back to TCP.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        g++ git python3 python3-dev python3-venv \
        ibverbs-providers libibverbs1 rdma-core \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

# Dependencies before the program, so that a change of the program does not install them again.
WORKDIR /src
COPY constraints.txt pyproject.toml ./
RUN python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
        > requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt

# Without flash-attn, attention runs on torch's own kernels. Compiling it takes long; the version is pinned because a newer one
# may not compile with this torch and CUDA. MAX_JOBS compilers run at once, and each takes gigabytes of memory.
# FLASH_ATTN_CUDA_ARCHS: 80 for A100, 90 for H100, 100 for B200; flash-attn does not read TORCH_CUDA_ARCH_LIST.
ARG FLASH_ATTN=0
ARG FLASH_ATTN_VERSION=2.8.3.post1
ARG FLASH_ATTN_CUDA_ARCHS="80;90"
ARG MAX_JOBS=4
RUN if [ "$FLASH_ATTN" = 1 ]; then \
        pip install --constraint constraints.txt packaging setuptools wheel \
        && pip install --constraint constraints.txt --no-build-isolation "flash-attn==$FLASH_ATTN_VERSION"; \
    fi

# Optional dependencies of pyproject.toml in EXTRAS, such as quantization (bitsandbytes) and liger.
ARG EXTRAS=
RUN for extra in $EXTRAS; do \
        python -c 'import sys, tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]], sep="\n")' \
                "$extra" > extra.txt \
        && pip install --constraint constraints.txt --requirement extra.txt || exit 1; \
    done

COPY LICENSE NOTICE README.md ./
COPY docs docs
COPY conf conf
COPY dpo_dist dpo_dist
RUN pip install --no-deps .

# The user who owns files in mounted folders: --build-arg USER_ID=$(id -u)
ARG USER_ID=1000
RUN useradd --create-home --non-unique --uid "$USER_ID" trainer \
    && install --directory --owner=trainer /workspace /workspace/output \
    && install --directory --owner=trainer /home/trainer/.cache /home/trainer/.cache/huggingface
USER trainer
WORKDIR /workspace

CMD ["python", "-m", "dpo_dist.train", "--help"]
