#!/usr/bin/env bash
# Fuzzes the Rust core with libFuzzer under AddressSanitizer: bash tools/fuzz.sh [SECONDS [TARGET]]; targets are advantages
# and batches. It needs a C++ compiler, and no nightly toolchain: RUSTC_BOOTSTRAP lets the stable compiler take the
# sanitizer's flag, for this build alone.
set -euo pipefail
cd "$(dirname "$0")/../fuzz"
export RUSTC_BOOTSTRAP=1
export RUSTFLAGS="--cfg fuzzing -Zsanitizer=address -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1"
target=x86_64-unknown-linux-gnu
name="${2:-advantages}"
cargo build --quiet --release --jobs 1 --target "$target"
mkdir -p "corpus/$name" artifacts
exec "target/$target/release/$name" -max_total_time="${1:-300}" -max_len=4096 -timeout=30 \
    -len_control=0 -artifact_prefix=artifacts/ -print_final_stats=1 "corpus/$name"
