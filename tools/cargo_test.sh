#!/usr/bin/env bash
# Runs the Rust unit tests; they link against libpython, which may live outside the loader's default path.
set -euo pipefail
libdir=$("${PYO3_PYTHON:-python3}" -c 'import sysconfig; print(sysconfig.get_config_var("LIBDIR") or "")')
export LD_LIBRARY_PATH="$libdir${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
exec cargo test --quiet
