#!/usr/bin/env bash
# Sets up what it needs and runs the tests. usage: scripts/test.sh [pytest arguments]
# Two workers with one thread each: the tests are many small models, not one large one.
set -euo pipefail
source "$(dirname "$0")/env.sh" test
cd "$root"
if ! command -v chromium >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "installing chromium for the browser test ..." >&2
  (apt-get update && apt-get install -y --no-install-recommends chromium fonts-noto-cjk) >/dev/null 2>&1 ||
    echo "chromium could not be installed: the browser test will be skipped" >&2
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [ $# -gt 0 ]; then exec python -m pytest "$@"; fi
exec python -m pytest -n 2 --dist loadfile
