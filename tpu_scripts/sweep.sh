#!/usr/bin/env bash
# A sweep on several slices: each is a worker of its own, see docs/sweeps.md.
: "${NAME:=sae}"  # of the sweep; its slices are NAME-0, NAME-1, ...
: "${SLICES:=2}"  # how many slices work at it
: "${BY:=queued_resource.sh}"  # script that gets each slice
: "${BUCKET:=}"  # gs://... in the region of ZONE
: "${STORE:=${BUCKET:+$BUCKET/store}}"  # activations; several by commas
: "${WORKDIR:=${BUCKET:+$BUCKET/sweeps/$NAME}}"  # of the sweep
: "${SWEEP_FLAGS:=}"  # flags for sae-sweep, quoted as for a shell
: "${RESULTS:=runs/$NAME}"  # where fetch puts what the runs came to
set -euo pipefail

FOLDER=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

usage() {
  cat <<USAGE
Usage: [SETTING=value ...] tpu_scripts/sweep.sh [--dry-run] ACTION

Runs sae-sweep on SLICES slices at once. They share WORKDIR: whoever is free takes
the next runs, and what a slice that is lost had begun another goes on with.

Actions:
  resume   get the slices, and keep them at work until the sweep is done
  status   say what each slice and its worker are doing
  stop     end the workers, keep the TPUs
  fetch    copy what the runs came to, WORKDIR/cells, to RESULTS/cells
  delete   delete the TPUs of all slices

--dry-run prints the commands and runs none.

Settings (environment variables) and their defaults, beside those of BY:
USAGE
  sed -n 's/^: "${\([A-Z_]*\):=\(.*\)}"  # \(.*\)$/  \1=\2\n      \3/p' "$0"
}

# An action of BY for one slice, or for none in particular.
slice() {
  local flags=()
  if ((dry_run)); then flags=(--dry-run); fi
  NAME=$1 BUCKET=$BUCKET STORE=$STORE COMMAND=$command \
    "$FOLDER/$BY" "${flags[@]}" "${@:2}"
}

each() {
  local number
  for ((number = 0; number < SLICES; number++)); do
    slice "$NAME-$number" "$1"
  done
}

# All slices at once, as each waits for its own TPUs. One that gives up leaves
# its runs to the others.
resume() {
  local number code=0 workers=()
  if ((dry_run)); then
    each resume
    return
  fi
  trap 'kill "${workers[@]}" 2>/dev/null; exit 130' INT TERM
  for ((number = 0; number < SLICES; number++)); do
    slice "$NAME-$number" resume &
    workers+=($!)
  done
  for number in "${!workers[@]}"; do
    wait "${workers[$number]}" || {
      code=$?
      printf '%s-%s ended with exit code %s\n' "$NAME" "$number" "$code" >&2
    }
  done
  return "$code"
}

dry_run=0 action=''
for argument in "$@"; do
  case $argument in
    --help | -h)
      usage
      exit 0
      ;;
    --dry-run) dry_run=1 ;;
    resume | status | stop | fetch | delete)
      [[ -z $action ]] || fail "one action at a time, not $action and $argument"
      action=$argument
      ;;
    *) fail "$argument is not an action: tpu_scripts/sweep.sh --help lists them" ;;
  esac
done
[[ -n $action ]] || fail 'no action: tpu_scripts/sweep.sh --help lists them'
[[ $SLICES =~ ^[1-9][0-9]{0,2}$ ]] ||
  fail "SLICES=$SLICES is not a number of slices from 1 to 999"
[[ -n $BUCKET ]] || fail 'BUCKET is not set: BUCKET=gs://NAME, a bucket in the region of ZONE'
[[ -x $FOLDER/$BY && $BY != */* ]] || fail "BY=$BY is none of the scripts: queued_resource.sh, instance_group.sh or gke.sh"
printf -v command 'sae-sweep --coordinator=auto --store=%q --workdir=%q%s' \
  "$STORE" "$WORKDIR" "${SWEEP_FLAGS:+ $SWEEP_FLAGS}"
case $action in
  resume) resume ;;
  fetch) WORKDIR=$WORKDIR/cells RESULTS=$RESULTS/cells slice "$NAME" fetch ;;
  *) each "$action" ;;
esac
