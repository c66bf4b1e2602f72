# speculators on a CPU: to inspect, convert, validate, compare, export and publish drafts.
#
#     docker build -t speculators .
#     docker run --rm -v "$PWD:/data" speculators inspect ./draft
#
# docs/installation.md says more. PyTorch's CPU build has an index of its own; from the usual one,
# torch comes with several gigabytes for GPUs.
FROM python:3.12-slim AS build

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

WORKDIR /source
RUN python -m venv /opt/speculators
ENV PATH=/opt/speculators/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN pip install torch==2.13.0 --index-url "$TORCH_INDEX"
COPY constraints.txt hatch_build.py pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install --constraint constraints.txt .

FROM python:3.12-slim

COPY --from=build /opt/speculators /opt/speculators
ENV PATH=/opt/speculators/bin:$PATH HF_HOME=/cache
# Whoever runs it with --user can use the cache, too.
RUN useradd --uid 1000 speculators && mkdir --mode 1777 /cache && install --owner 1000 --directory /data
USER speculators
WORKDIR /data
RUN speculators doctor
ENTRYPOINT ["speculators"]
CMD ["--help"]
