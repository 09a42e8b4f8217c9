# One file, two images:
#   docker build -t jointseg:cuda .
#   docker build -t jointseg:cpu --build-arg TORCH_INDEX=<PyTorch's index of CPU wheels> .
# Both run as any user, with a read-only root, without network and without a home:
#   docker run --rm -u "$(id -u):$(id -g)" -v BIDS_DIR:/bids:ro -v OUT_DIR:/out jointseg:cpu \
#       /bids /out participant
# docs/container.md says what is pinned and how to verify it.

FROM debian:bookworm-slim AS build
ARG TORCH_INDEX=
# Debian's stable release is the pin; its exact versions disappear with each security update.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/jointseg
WORKDIR /src
# The locks name everything, so pip resolves nothing, and takes no file whose hash is not there.
# torch comes first and alone: by far the largest layer, and it seldom changes.
COPY container/torch-*.lock container/
RUN build=cuda; [ -z "$TORCH_INDEX" ] || build=cpu; \
    /opt/jointseg/bin/pip install --no-cache-dir --no-deps --require-hashes \
        ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r "container/torch-$build.lock"
# What comes as source is built by the setuptools that came with torch.
COPY container/requirements.lock container/
RUN /opt/jointseg/bin/pip install --no-cache-dir --no-deps --require-hashes \
        --no-build-isolation --use-pep517 -r container/requirements.lock
COPY . .
RUN /opt/jointseg/bin/pip install --no-cache-dir --no-deps --no-index --no-build-isolation . \
    && /opt/jointseg/bin/pip check \
    && /opt/jointseg/bin/pip uninstall -y pip
# No run needs the tests of libraries, or what only compilers read: there is none.
WORKDIR /opt/jointseg/lib
RUN find . -depth -type d \( -name tests -o -path '*/torch/test' \) -exec rm -r {} + \
    && find . -type f -path '*/torch/bin/*' ! -name torch_shm_manager -delete \
    && find . -type f -regex '.*\.\(h\|hpp\|cuh\|inl\|c\|cc\|cpp\|cu\|pyx\|pxd\|a\)' -delete \
    && find . -depth -type d -empty -delete

FROM debian:bookworm-slim
LABEL org.opencontainers.image.title="jointseg" \
      org.opencontainers.image.description="Joint segmentation of brain tissue and white-matter lesions: a BIDS App" \
      org.opencontainers.image.licenses="Apache-2.0 AND CC-BY-NC-4.0"
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/*
COPY --from=build /opt/jointseg /opt/jointseg
RUN --mount=type=bind,source=container/sbom.py,target=/sbom.py \
    /opt/jointseg/bin/python /sbom.py >/opt/jointseg/sbom.cdx.json
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
