#!/usr/bin/env bash
# Runs on every host of a slice: host.sh install|start|status|tail|stop.
set -euo pipefail

venv=${SAE_JAX_VENV:-$HOME/sae_jax_venv}
run=$HOME/sae_jax_run
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Not the id alone: after a reboot it may be another process's.
running() {
  [[ -e $run/pid ]] &&
    tr '\0' ' ' 2>/dev/null <"/proc/$(<"$run/pid")/cmdline" |
    grep -q 'host.sh supervise'
}

refuse_while_running() {
  if running; then
    echo "error: a run is going on $(hostname)" >&2
    exit 2
  fi
}

# Google's images come with Python 3.10.
install() {
  local newest=()
  refuse_while_running
  if [[ -n ${1:-} ]]; then newest=(--exclude-newer="$1"); fi
  PATH=$HOME/.local/bin:$PATH
  if ! command -v uv >/dev/null; then
    curl -LsSf https://astral.sh/uv/install.sh | sh
  fi
  [[ -x $venv/bin/python ]] || uv venv --quiet --python=3.12 "$venv"
  # The version stays the same while the source changes.
  uv pip install --quiet --python="$venv/bin/python" \
    --reinstall-package=sae-jax "${newest[@]}" 'jax[tpu]' "$checkout"
  "$venv/bin/python" -c 'import jax, sae_jax; print(f"sae_jax {sae_jax.__version__}, jax {jax.__version__}")'
}

# Detached and a process group of its own: it outlives ssh, and ends as one.
start() {
  local i
  refuse_while_running
  mkdir -p "$run"
  rm -f "$run/exit_code"
  setsid bash "${BASH_SOURCE[0]}" supervise "$1" </dev/null >>"$run/log" 2>&1 &
  echo $! >"$run/pid"
  # Until it has become what `running` looks for.
  for ((i = 0; i < 100; i++)); do
    if running || [[ -e $run/exit_code ]]; then return; fi
    sleep 0.1
  done
}

supervise() {
  local code=0
  # A handler, unlike ignoring, is not inherited: the command gets the signal.
  trap : TERM
  echo "# $(date -u +%FT%TZ) $(hostname): $1"
  PATH=$venv/bin:$PATH
  cd "$HOME"
  bash -c "$1" || code=$?
  echo "# $(date -u +%FT%TZ) exit code $code"
  echo "$code" >"$run/exit_code.new"
  mv "$run/exit_code.new" "$run/exit_code"
}

status() {
  local code
  if running; then
    echo 'sae-run: running'
  elif [[ ! -e $run/pid ]]; then
    echo 'sae-run: none'
  else
    # Without a code it was killed, or the host was restarted.
    code=$(cat "$run/exit_code" 2>/dev/null || echo 137)
    if ((code)); then echo "sae-run: failed $code"; else echo 'sae-run: finished'; fi
  fi
}

follow() {
  if [[ ! -e $run/pid ]]; then
    echo "error: nothing was run on $(hostname)" >&2
    exit 2
  fi
  tail -n 100 -F --pid="$(<"$run/pid")" "$run/log"
  status
}

stop() {
  local i
  running || return 0
  kill -TERM -- "-$(<"$run/pid")"
  for ((i = 0; i < 300; i++)); do
    running || return 0
    sleep 0.1
  done
  kill -KILL -- "-$(<"$run/pid")"
}

case ${1:-} in
  install) install "${2:-}" ;;
  start) start "$2" ;;
  supervise) supervise "$2" ;;
  status) status ;;
  tail) follow ;;
  stop) stop ;;
  *)
    echo 'error: host.sh install|start|status|tail|stop' >&2
    exit 2
    ;;
esac
