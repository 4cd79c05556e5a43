#!/usr/bin/env bash
# Runs the Rust unit tests: of all but the bindings, so that no Python is needed to build or run them.
set -euo pipefail
exec cargo test --quiet --no-default-features
