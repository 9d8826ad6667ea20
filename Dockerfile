# The image of the TorchX jobs. CPU by default; docs/clusters.md has the arguments of the GPU image.
FROM python:3.11-slim-bookworm

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1

# libgomp: OpenMP of FAISS, torch and FBGEMM
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/*

# The stand-in brings FBGEMM's CPU build (docs/install.md) and must be in the same pip call as the package.
ARG STANDIN=./standin
ARG EXTRA=
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

WORKDIR /source
COPY . .
RUN python -m pip install --extra-index-url "${TORCH_INDEX}" ${STANDIN} ".${EXTRA}" \
    && python -m pip check

RUN useradd --create-home friendrec
USER friendrec
WORKDIR /home/friendrec

# a smoke check: the image is of no use where this fails
RUN friendrec --help

CMD ["friendrec", "--help"]
