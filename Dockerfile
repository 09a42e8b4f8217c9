# One file, two images:
#   docker build -t jointseg:cuda .
#   docker build -t jointseg:cpu --build-arg TORCH_INDEX=<PyTorch's index of CPU wheels> .
# Both run as any user, with a read-only root, without network and without a home:
#   docker run --rm -u "$(id -u):$(id -g)" -v BIDS:/bids:ro -v OUT:/out jointseg:cpu \
#       /bids /out participant

FROM debian:bookworm-slim AS build
ARG TORCH_INDEX=
# Debian's stable release is the pin; its exact versions disappear with each security update.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/jointseg
WORKDIR /src
COPY constraints.txt ./
# torch first and alone: by far the largest layer, and it seldom changes.
RUN /opt/jointseg/bin/pip install --no-cache-dir -c constraints.txt \
        ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch
COPY . .
RUN /opt/jointseg/bin/pip install --no-cache-dir -c constraints.txt \
        ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} . bids-validator-deno \
    # Headers serve compilers only, and there is none.
    && rm -rf /opt/jointseg/lib/python3*/site-packages/torch/include

FROM debian:bookworm-slim
LABEL org.opencontainers.image.title="jointseg" \
      org.opencontainers.image.description="Joint segmentation of brain tissue and white-matter lesions: a BIDS App" \
      org.opencontainers.image.licenses="Apache-2.0 AND CC-BY-NC-4.0"
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/jointseg /opt/jointseg
# Everything that a library wants to cache goes where any user may write.
ENV PATH=/opt/jointseg/bin:$PATH \
    HOME=/tmp \
    XDG_CACHE_HOME=/tmp/.cache \
    XDG_CONFIG_HOME=/tmp/.config \
    TEMPLATEFLOW_HOME=/tmp/.cache/templateflow \
    DENO_DIR=/tmp/.cache/deno \
    NO_ET=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONNOUSERSITE=1
# A number, so that orchestrators which refuse root can tell.
USER 1000:1000
WORKDIR /tmp
ENTRYPOINT ["/opt/jointseg/bin/jointseg"]
