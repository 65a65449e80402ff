# Sourced by demo.sh and test.sh: a virtual environment in .venv of the checkout (or $SWIFTLITE_VENV), made or brought up to date.
# usage: source scripts/env.sh [EXTRA]      EXTRA: one of setup.py's extras, e.g. test
# torch comes first and pinned, so that the CPU build is taken where one is at hand instead of gigabytes of CUDA.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${SWIFTLITE_VENV:-$root/.venv}
extra=${1:-}

wanted=$(cat "$root/setup.py" "$root"/requirements/*.txt | cksum)" $root"
stamp=$venv/.swiftlite${extra:+-$extra}
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "setting up $venv (once; a minute or two) ..." >&2
  [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
  pip="$venv/bin/python -m pip install --quiet --disable-pip-version-check"
  $pip torch==2.13.0 2> >(grep -v WARNING >&2) && $pip -e "$root${extra:+[$extra]}" 2> >(grep -v WARNING >&2) || { echo "set-up failed: see pip's message above" >&2; exit 1; }
  echo "$wanted" > "$stamp"
fi
# Small models on a shared machine: a thread that waits gives its core away instead of spinning.
export PATH="$venv/bin:$PATH" TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
