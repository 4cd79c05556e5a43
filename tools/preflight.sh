#!/usr/bin/env bash
# Says in one sentence each what the machine lacks to build prefkern, and how to get it.
set -u
python=${PYTHON:-python3}
missing=0
need() { echo "prefkern needs $1: $2" >&2; missing=1; }

if ! command -v "$python" >/dev/null; then
  need "Python 3.11 or newer" "install it (Debian: apt install python3 python3-venv), or name one with make PYTHON=/path/to/python3.12"
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  need "Python 3.11 or newer" "$python is $("$python" -V 2>&1); name a newer one with make PYTHON=/path/to/python3.12"
elif ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
  need "Python's venv module" "on Debian and Ubuntu: apt install python3-venv"
fi
command -v cargo >/dev/null || need "cargo (Rust 1.89 or newer)" "install Rust from https://rustup.rs"
command -v cc >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null ||
  need "a C toolchain" "on Debian and Ubuntu: apt install build-essential; on macOS: xcode-select --install"
exit $missing
