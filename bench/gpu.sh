#!/usr/bin/env bash
# Tests and benchmarks in one go on a bare CUDA machine: torch 2.11 or later, Triton 3.6 or later, Python 3.11 or later,
# no network. Ends in under 9 minutes, whatever happens; always prints a summary; fails if any part failed.
#
#     bash bench/gpu.sh
#
#   WHEELS   folder of wheels to install (default dist/gpu; bench/fetch_wheels.sh fills it)
#   OUT      folder for logs, bench.json and bench.png (default bench/results/gpu)
#   PYTHON   the python that has torch (default python3)
#   REHEARSE 1: the same on a machine without a GPU: tests are only collected, the benchmark is quick and on the CPU
#
# It installs into a temporary folder and leaves the device's settings alone.
set -uo pipefail
cd "$(dirname "$0")/.."
SECONDS=0
LIMIT=525
WHEELS=${WHEELS:-dist/gpu}
OUT=${OUT:-bench/results/gpu}
PYTHON=${PYTHON:-python3}
REHEARSE=${REHEARSE:-0}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
SITE=$(mktemp -d)
trap 'rm -rf "$SITE"' EXIT
export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1  # only what the tests need, not what else the machine has

names=() codes=() times=()
part() { # NAME SECONDS COMMAND...: runs with a time limit, output to NAME.log
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  echo "== $name (at most $limit s)"
  timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1
  codes+=($?) names+=("$name") times+=($((SECONDS - start)))
}
left() { # AT_MOST RESERVE: seconds that a part may take
  local rest=$((LIMIT - SECONDS - $2))
  echo $((rest < 1 ? 1 : rest < $1 ? rest : $1))
}
has() { "$PYTHON" -c "import $1" 2>/dev/null; }

if [ "$REHEARSE" = 1 ]; then
  test_options=(--collect-only -q)
  bench_options=(--quick)
else
  test_options=(-m gpu -q --maxfail=20)
  bench_options=(--device cuda)
  if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "bench/gpu.sh: $PYTHON has no torch that sees a CUDA device (REHEARSE=1 goes through the motions without one)"
    exit 2
  fi
fi
has matplotlib && bench_options+=(--plot)
has xdist && test_options+=(-p xdist.plugin -n 6)  # most of the tests' time is compilation

part install 60 "$PYTHON" -m pip install --no-index --no-deps --no-compile --no-cache-dir --target "$SITE" "$WHEELS"/*.whl
part tests "$(left 200 180)" "$PYTHON" -m pytest -p no:cacheprovider --continue-on-collection-errors \
  "${test_options[@]}"
# the gate and the imports come before the benchmark's own budget
budget=$(left 180 150)
part bench "$(left 330 45)" "$PYTHON" -m prefkern bench "${bench_options[@]}" --json --output "$OUT" --budget-s "$budget"
part doctor "$(left 60 0)" "$PYTHON" -m prefkern doctor

failed=0
{
  echo "== the end of each log (all of it in $OUT)"
  for index in "${!names[@]}"; do
    echo "-- ${names[$index]}"
    tail -n "$([ "${names[$index]}" = bench ] && echo 45 || echo 12)" "$OUT/${names[$index]}.log" | cut -c -160
  done
  echo "== summary"
  for index in "${!names[@]}"; do
    printf '%-8s exit %-3s %4s s\n' "${names[$index]}" "${codes[$index]}" "${times[$index]}"
    [ "${codes[$index]}" -eq 0 ] || failed=1
  done
  echo "total $SECONDS s; $([ $failed = 0 ] && echo passed || echo FAILED)"
} | tee "$OUT/summary.txt"
for code in "${codes[@]}"; do
  [ "$code" -eq 0 ] || exit 1
done
