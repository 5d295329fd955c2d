#!/usr/bin/env bash
# Runs what new releases can break on the newest Python from 3.12 on that is
# found here.
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
  "$venv/bin/pip" --disable-pip-version-check --quiet install uv
  "$venv/bin/uv" --quiet pip install --python "$venv/bin/python" --editable '.[test]'
  touch "$stamp"
fi
"$venv/bin/python" - <<'PY'
import platform
import jax
print(f'newest: Python {platform.python_version()}, jax {jax.__version__}')
PY
# What a newer jax, flax, optax, Orbax or TensorStore can break: a file for each
# use of them.
pytest=("$venv/bin/python" -m pytest -n 2 --dist=loadfile -q)
"${pytest[@]}" tests/unit/test_{adam_rows,autoencoder,batchtopk,checkpoint}.py \
  tests/unit/test_{encode_kernel,feed,gather_kernels,metrics,objective}.py \
  tests/unit/test_{optimizer,raw,sparse,store,subject_transformer}.py \
  tests/unit/test_{text_to_page,top_k_kernel,train}.py
"${pytest[@]}" tests/mesh/test_{mesh,sparse,step}.py
