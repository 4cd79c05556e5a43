#!/usr/bin/env bash
# Fills a folder (default dist/gpu) with what bench/gpu.sh installs on a CUDA machine that has no network: prefkern built
# from this checkout, the peers of the benchmark and pytest, all in the versions of constraints.txt, for Python 3.12 on
# x86-64 Linux. That machine's own torch, Triton, transformers, accelerate, numpy, pandas and pyarrow are used.
#
#     bash bench/fetch_wheels.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-dist/gpu}

# trl imports datasets (which imports dill, multiprocess and xxhash); the last line is for pytest -m gpu
packages=(
  trl liger-kernel
  datasets dill multiprocess xxhash
  pytest iniconfig pluggy packaging pygments hypothesis sortedcontainers
)

make --no-print-directory wheel
mkdir -p "$folder"
rm -f "$folder"/*.whl
cp "$(ls -t dist/prefkern-*.whl | head -1)" "$folder"/

pinned=()
for package in "${packages[@]}"; do
  pinned+=("$(grep -i "^$package==" constraints.txt)")
done
platforms=()
for glibc in 2_34 2_28 2_27 2_24 2_17 2_12 2_5; do
  platforms+=(--platform "manylinux_${glibc}_x86_64")
done
.venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --python-version 3.12 --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 \
  --dest "$folder" "${pinned[@]}"
du -sh "$folder"
