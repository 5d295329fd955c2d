#!/usr/bin/env bash
# Runs tests/unit, and tests of meshes, on the newest Python from 3.12 on that
# is found here.
set -euo pipefail
venv=${VENV:-.venv-newest}

runs() { "$1" -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; }

found=
for name in python3.14 python3.13 python3.12 python3 \
  "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do
  if command -v "$name" >/dev/null && runs "$name"; then
    found=$name
    break
  fi
done
if [ -z "$found" ]; then
  echo 'newest: no Python 3.12 or later here, ran nothing'
  exit 0
fi

stamp=$venv/.installed
if [ ! -e "$stamp" ] || [ setup.cfg -nt "$stamp" ]; then
  "$found" -m venv "$venv"
  "$venv/bin/pip" --disable-pip-version-check --quiet install --editable '.[test]'
  touch "$stamp"
fi
"$venv/bin/python" - <<'PY'
import platform
import jax
print(f'newest: Python {platform.python_version()}, jax {jax.__version__}')
PY
pytest=("$venv/bin/python" -m pytest -n 2 --dist=loadfile -q)
"${pytest[@]}" tests/unit
"${pytest[@]}" tests/mesh/test_mesh.py tests/mesh/test_sparse.py \
  tests/mesh/test_step.py
