# Build:  docker build -t dpo_dist --build-arg USER_ID=$(id -u) .
#         --build-arg FLASH_ATTN=1 adds flash-attn, --build-arg EXTRAS="quantization liger" optional packages.
# Run:    mkdir -p output "$HOME/.cache/huggingface"   # a folder that docker makes belongs to root
#         docker run --rm --gpus all --ipc=host --ulimit memlock=-1 \
#             -v "$PWD/output:/workspace/output" -v "$HOME/.cache/huggingface:/home/trainer/.cache/huggingface" \
#             dpo_dist accelerate launch -m dpo_dist.train +experiment=qwen7b
#         Local models and data: -v /shared:/shared. Between nodes with InfiniBand: --device=/dev/infiniband --network=host.
# Check:  a part of the demo on the CPU, from the root of the checkout. It is no HEALTHCHECK: those are for servers, and
#         would train again and again beside the run.
#         docker run --rm --env DS_ACCELERATOR=cpu -v "$PWD/examples:/workspace/examples:ro" dpo_dist sh -c \
#             'python -m examples.demo.make output/demo &&
#             torchrun --nproc_per_node 2 -m dpo_dist.train +experiment=demo_warmup trainer.max_steps=10'
#
# The development image, because DeepSpeed compiles kernels at their first use. Its CUDA version is the one
# that the pinned torch is built for.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

# NCCL reaches InfiniBand and RoCE cards through libibverbs, and without it uses TCP.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        g++ git python3 python3-dev python3-venv \
        ibverbs-providers libibverbs1 rdma-core \
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

# Without it attention runs on torch's own kernels. Compiled from source, which takes long: the version is pinned, as a newer one
# may not compile with this torch and CUDA. MAX_JOBS compilers run at a time, each of them in gigabytes of memory.
# FLASH_ATTN_CUDA_ARCHS: 80 for A100, 90 for H100, 100 for B200; flash-attn does not read TORCH_CUDA_ARCH_LIST.
ARG FLASH_ATTN=0
ARG FLASH_ATTN_VERSION=2.8.3.post1
ARG FLASH_ATTN_CUDA_ARCHS="80;90"
ARG MAX_JOBS=4
RUN if [ "$FLASH_ATTN" = 1 ]; then \
        pip install --constraint constraints.txt packaging setuptools wheel \
        && pip install --constraint constraints.txt --no-build-isolation "flash-attn==$FLASH_ATTN_VERSION"; \
    fi

# Optional dependencies of pyproject.toml: those of the tools, and by EXTRAS quantization (bitsandbytes), liger.
ARG EXTRAS=
RUN for extra in tools $EXTRAS; do \
        python -c 'import sys, tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]], sep="\n")' \
                "$extra" > extra.txt \
        && pip install --constraint constraints.txt --requirement extra.txt || exit 1; \
    done

COPY LICENSE README.md ./
COPY conf conf
COPY dpo_dist dpo_dist
RUN pip install --no-deps .

# The owner of what is written to mounted folders: --build-arg USER_ID=$(id -u)
ARG USER_ID=1000
RUN useradd --create-home --non-unique --uid "$USER_ID" trainer \
    && install --directory --owner=trainer /workspace /workspace/output \
    && install --directory --owner=trainer /home/trainer/.cache /home/trainer/.cache/huggingface
USER trainer
WORKDIR /workspace

CMD ["python", "-m", "dpo_dist.train", "--help"]
