# shellcheck shell=bash
# Sourced by the three scripts: settings, output, errors, and everything that
# queued resources and instance groups do alike once their hosts are there.
set -euo pipefail

if ((BASH_VERSINFO[0] < 4 || (BASH_VERSINFO[0] == 4 && BASH_VERSINFO[1] < 4))); then
  echo "error: bash $BASH_VERSION is too old, 4.4 is needed (macOS: brew install bash)" >&2
  exit 2
fi

: "${PROJECT:=}"  # Google Cloud project, required
: "${ZONE:=us-east5-a}"  # zone with the TPUs
: "${NAME:=sae}"  # of the slice and of the run
: "${SPOT:=0}"  # 1 for spot TPUs: cheaper, may be taken away
: "${SERVICE_ACCOUNT:=}"  # of the hosts; empty for the project's default
: "${CREATE_FLAGS:=}"  # more flags for the create command, e.g. --network=N
: "${SSH_FLAGS:=}"  # more flags for ssh and scp, e.g. --internal-ip
: "${BUCKET:=}"  # gs://... in the region of ZONE
: "${STORE:=${BUCKET:+$BUCKET/store}}"  # activations to train on
: "${WORKDIR:=${BUCKET:+$BUCKET/runs/$NAME}}"  # checkpoints and metrics
: "${TRAIN_FLAGS:=}"  # more flags for sae-train, quoted as for a shell
: "${COMMAND:=}"  # what to run; empty for sae-train with the above
: "${RESULTS:=runs/$NAME}"  # where fetch puts WORKDIR
: "${WORKER:=0}"  # whose log tail shows
: "${WAIT_MINUTES:=120}"  # longest wait for TPUs
: "${POLL_SECONDS:=30}"  # between two looks
: "${MAX_RETRIES:=0}"  # restarts by resume; 0 for as many as it takes
: "${EXCLUDE_NEWER:=}"  # no packages after this date; empty for HEAD's

# sysexits' EX_TEMPFAIL: the same command may succeed later.
readonly TRY_LATER=75
readonly HOST_SCRIPT=sae_jax/tpu_scripts/host.sh
readonly SOURCE_ARCHIVE=${TMPDIR:-/tmp}/sae_jax-$NAME.tar.gz
SCRIPT=tpu_scripts/$(basename "$0")
FOLDER=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
REGION=${ZONE%-*}

dry_run=0
# What --dry-run takes the slice to be: absent, ready or lost.
assume=ready
# What the functions below find out.
state='' detail='' status='' kind='' reason=''
# The captured output of `ask` must not swallow what --dry-run prints.
exec 3>&1

# --- Output and errors ---

say() {
  ((dry_run)) ||
    printf '%s %s: %s\n' "$(date -u +%FT%TZ)" "$NAME" "$*" >&2
}

fail() {
  printf 'error: %s\n' "${*:2}" >&2
  exit "$1"
}

show() {
  local line
  printf -v line '%q ' "$@"
  printf '%s\n' "${line% }" >&3
}

# Sets kind to what an error is. The texts are gcloud's, kubectl's and ssh's.
classify() {
  case $1 in
    *ALREADY_EXISTS* | *'already exists'*) kind=exists ;;
    *'gcloud auth login'* | *UNAUTHENTICATED* | *invalid_grant*) kind=auth ;;
    *SERVICE_DISABLED* | *'has not been used in project'*) kind=service ;;
    # Before capacity: the API calls both RESOURCE_EXHAUSTED.
    *[Qq]uota* | *QUOTA_EXCEEDED*) kind=quota ;;
    *'no more capacity'* | *nsufficient*capacity* | *RESOURCE_POOL_EXHAUSTED* | \
      *'not have enough resources'* | *STOCKOUT* | *RESOURCE_EXHAUSTED*) kind=capacity ;;
    *PERMISSION_DENIED* | *"Required '"*permission*) kind=permission ;;
    *NOT_FOUND* | *'was not found'* | *'code=404'*) kind=absent ;;
    *UNAVAILABLE* | *DEADLINE_EXCEEDED* | *'Connection re'* | *'timed out'* | \
      *'code [255]'* | *'Service Unavailable'*) kind=transient ;;
    *) kind=other ;;
  esac
}

# Runs a command; on failure sets kind and reason. Retries what is transient.
attempt() {
  local errors=$scratch/errors.$BASHPID code tries=0 delay
  while true; do
    code=0
    "$@" </dev/null 2>"$errors" || code=$?
    ((code)) || return 0
    # gcloud puts what happened on the line after its own error.
    reason=$(grep -m 1 -A 2 -E 'ERROR|[Ee]rror' "$errors" || tail -n 1 "$errors")
    reason=$(tr -s '\n ' '  ' <<<"${reason:0:600}")
    reason=${reason% }
    classify "$(<"$errors")"
    if ((code == 255)); then kind=transient; fi
    if [[ $kind != transient ]] || ((++tries > 5)); then
      return "$code"
    fi
    delay=$((POLL_SECONDS << (tries - 1)))
    say "${reason:-exit code $code}: trying again in $delay s"
    sleep "$delay"
  done
}

give_up() {
  case $kind in
    auth) fail 2 "not authenticated: gcloud auth login" ;;
    permission) fail 2 "$reason: ask the owner of $PROJECT for the role" ;;
    quota) fail 2 "$reason: ask for quota in $PROJECT, or choose another ZONE or a smaller slice" ;;
    service) fail 2 "$reason: gcloud services enable tpu.googleapis.com compute.googleapis.com container.googleapis.com --project=$PROJECT" ;;
    absent) fail 2 "$reason: $SCRIPT create makes it" ;;
    transient) fail "$TRY_LATER" "$reason: not mended by trying again" ;;
    capacity) fail "$TRY_LATER" "$reason: no capacity in $ZONE, try later, another ZONE, or SPOT=$((!SPOT))" ;;
    *) fail 1 "${reason:-no message} ($1 failed)" ;;
  esac
}

run() {
  if ((dry_run)); then
    show "$@"
    return
  fi
  attempt "$@" || give_up "$1"
}

# For output that is wanted while it comes; errors may be on stdout too.
run_shown() {
  if ((dry_run)); then
    show "$@"
    return
  fi
  attempt both_streams "$@" || give_up "$1"
}

both_streams() {
  "$@" 2>&1 | tee -a /dev/stderr
}

# Sets answer to a command's output; --dry-run takes the first argument for it.
# False if the thing asked about is not there.
ask() {
  if ((dry_run)); then
    show "${@:2}"
    answer=$1 kind=absent
    [[ $assume != absent ]]
    return
  fi
  local output=$scratch/output.$BASHPID
  if attempt "${@:2}" >"$output"; then
    # shellcheck disable=SC2034  # Read by the scripts that source this.
    answer=$(<"$output")
  elif [[ $kind == absent ]]; then
    return 1
  else
    give_up "$2"
  fi
}

# True if something was made, false if it was there.
make() {
  if ((dry_run)); then
    show "$@"
  elif ! attempt "$@"; then
    [[ $kind == exists ]] || give_up "$1"
    say "$reason"
    return 1
  fi
}

# True if something was deleted, false if it was not there.
remove() {
  if ((dry_run)); then
    show "$@"
  elif ! attempt "$@"; then
    [[ $kind == absent ]] || give_up "$1"
    return 1
  fi
}

need() {
  ((dry_run)) || command -v "$1" >/dev/null ||
    fail 2 "$1 is not installed: $2"
}

need_gcloud() {
  need gcloud https://cloud.google.com/sdk/docs/install
}

# --- The command and the package ---

train_command() {
  if [[ -n $COMMAND ]]; then
    printf '%s' "$COMMAND"
    return
  fi
  [[ -n $STORE && -n $WORKDIR ]] || need_bucket
  printf 'sae-train --coordinator=auto --store=%q --workdir=%q' "$STORE" "$WORKDIR"
  printf '%s' "${TRAIN_FLAGS:+ $TRAIN_FLAGS}"
}

need_bucket() {
  fail 2 "BUCKET is not set: BUCKET=gs://NAME, a bucket in $REGION"
}

pack_source() {
  run tar -czf "$SOURCE_ARCHIVE" -C "$FOLDER/.." \
    --exclude=__pycache__ setup.cfg pyproject.toml README.md LICENSE \
    sae_jax tpu_scripts -C "$FOLDER" Dockerfile
}

# Hosts that replace preempted ones must get the same versions of everything.
package_date() {
  if [[ -n $EXCLUDE_NEWER ]]; then
    printf '%s' "$EXCLUDE_NEWER"
  else
    git -C "$FOLDER" log -1 --format=%cI 2>/dev/null || true
  fi
}

# --- Actions on hosts that are reached by ssh ---
#
# The script that sources this defines: find_slice (sets state to absent,
# waiting, ready or lost, and detail), request_slice, remove_slice, copy_to_all,
# on_all and follow.

wait_for_slice() {
  local until=$((SECONDS + WAIT_MINUTES * 60)) last=
  while true; do
    find_slice
    case $state in
      ready) return ;;
      lost) fail "$TRY_LATER" "$NAME is $detail: $SCRIPT resume" ;;
    esac
    if [[ ${detail:=not there yet} != "$last" ]]; then
      say "waiting: $detail"
      last=$detail
    fi
    if ((SECONDS >= until)); then
      fail "$TRY_LATER" "no capacity in $ZONE: $NAME is still $detail after $WAIT_MINUTES minutes; $SCRIPT create goes on waiting, $SCRIPT delete gives up, another ZONE or SPOT=$((!SPOT)) may be faster"
    fi
    sleep "$POLL_SECONDS"
  done
}

create_slice() {
  find_slice
  case $state in
    ready | waiting) say "exists already: $detail" ;;
    lost) fail 2 "$NAME is $detail: $SCRIPT resume, or $SCRIPT delete first" ;;
    absent) if request_slice; then say 'requested'; fi ;;
  esac
  assume=ready
  wait_for_slice
  say "ready: $detail"
}

action_create() {
  assume=absent
  create_slice
  say "next: $SCRIPT install"
}

action_install() {
  local command
  pack_source
  copy_to_all "$SOURCE_ARCHIVE" sae_jax-source.tar.gz
  printf -v command 'mkdir -p sae_jax && tar -xzf sae_jax-source.tar.gz -C sae_jax && bash %s install %q' \
    "$HOST_SCRIPT" "$(package_date)"
  on_all "$command"
  say 'installed on all hosts'
}

# Sets status to the first of these that any host has, else to finished.
find_status() {
  local lines first
  lines=$(on_all "[ ! -e $HOST_SCRIPT ] && echo sae-run: not installed || bash $HOST_SCRIPT status")
  status=finished
  for first in running 'not installed' none failed; do
    if [[ $lines == *"sae-run: $first"* ]]; then
      status=$(grep -m 1 -o "$first.*" <<<"$lines")
      return
    fi
  done
}

action_status() {
  find_slice
  if [[ $state != ready ]]; then
    say "$state${detail:+: $detail}"
    return
  fi
  find_status
  say "the slice is $detail, the run: $status"
}

start() {
  local command
  command=$(train_command)
  on_all "bash $HOST_SCRIPT start $(printf %q "$command")"
  say "started: $command"
}

action_run() {
  train_command >/dev/null
  find_status
  case $status in
    running) fail 2 "a run is going on $NAME: $SCRIPT tail shows it, $SCRIPT stop ends it" ;;
    'not installed') fail 2 "sae_jax is not installed on $NAME: $SCRIPT install" ;;
  esac
  start
  say "next: $SCRIPT tail"
}

action_tail() {
  follow "bash $HOST_SCRIPT tail"
}

action_stop() {
  on_all "bash $HOST_SCRIPT stop"
  say 'stopped'
}

# Brings slice and run back to where the command is running.
start_again() {
  if [[ $state == lost ]]; then
    remove_slice || true
    state=absent
  fi
  assume=absent
  if [[ $state != ready ]]; then
    create_slice
    status='not installed'
  fi
  if [[ $status == 'not installed' ]]; then
    action_install
  else
    # A host whose peers died may hang where they left it.
    action_stop
  fi
  start
}

action_resume() {
  local retries=0 code happened
  train_command >/dev/null
  if ((dry_run)); then assume=lost; fi
  while true; do
    find_slice
    happened="slice $state${detail:+ ($detail)}"
    if [[ $state == ready ]]; then
      # A subshell here and below, so that a slice that is lost meanwhile ends
      # one try and not the loop.
      status=$(find_status && echo "$status") || status=unknown
      case $status in
        running)
          sleep "$POLL_SECONDS"
          continue
          ;;
        finished)
          say 'the run has finished'
          return
          ;;
        'failed 2') fail 2 "the command ended with exit code 2, which trying again does not mend: $SCRIPT tail" ;;
      esac
      happened="run $status"
    fi
    count_retry "$happened"
    code=0
    (start_again) || code=$?
    if ((code == 2)); then exit 2; fi
    assume=ready
    if ((code)); then sleep "$POLL_SECONDS"; fi
  done
}

count_retry() {
  if ((MAX_RETRIES && retries >= MAX_RETRIES)); then
    fail 1 "$1, and MAX_RETRIES=$MAX_RETRIES are used up: $SCRIPT resume goes on"
  fi
  retries=$((retries + 1))
  say "$1: start $retries"
}

action_fetch() {
  [[ -n $WORKDIR ]] || need_bucket
  run mkdir -p "$RESULTS"
  run_shown gcloud storage rsync --recursive "$WORKDIR" "$RESULTS"
  say "$WORKDIR is in $RESULTS"
}

action_delete() {
  if remove_slice; then
    say 'deleted; the bucket keeps the results'
  else
    say 'is not there: nothing to delete'
  fi
}

# --- The command line ---

usage() {
  cat <<USAGE
Usage: [SETTING=value ...] $SCRIPT [--dry-run] ACTION

$DESCRIPTION

Actions:
  create   $CREATES, and wait for it
  install  $INSTALLS
  run      start the command on all hosts, detached
  tail     follow the log of host WORKER
  status   say what the slice and the run are doing
  stop     end the run, keep the TPUs
  resume   watch the run; start it again until it is finished
  fetch    copy WORKDIR to RESULTS
  delete   delete the TPUs

--dry-run prints the commands and runs none.

Settings (environment variables) and their defaults:
USAGE
  sed -n 's/^: "${\([A-Z_]*\):=\(.*\)}"  # \(.*\)$/  \1=\2\n      \3/p' \
    "$0" "${BASH_SOURCE[0]}"
}

main() {
  local action='' argument
  for argument in "$@"; do
    case $argument in
      --help | -h)
        usage
        exit 0
        ;;
      --dry-run) dry_run=1 ;;
      -*) fail 2 "$argument is not a flag: $SCRIPT --help lists them" ;;
      *)
        [[ -z $action ]] || fail 2 "one action at a time, not $action and $argument"
        action=$argument
        ;;
    esac
  done
  [[ -n $action ]] || fail 2 "no action: $SCRIPT --help lists them"
  declare -F "action_$action" >/dev/null ||
    fail 2 "$action is not an action: $SCRIPT --help lists them"
  check_settings
  scratch=/dev/null
  if ((!dry_run)); then
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
  fi
  need_tools
  "action_$action"
}

check_settings() {
  local setting
  [[ -n $PROJECT ]] || fail 2 "PROJECT is not set: PROJECT=your-project $SCRIPT"
  [[ -z $BUCKET || $BUCKET == gs://* ]] || fail 2 "BUCKET=$BUCKET is not a bucket's URL: gs://$BUCKET"
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    fail 2 "NAME=$NAME is not a name: at most 40 of a-z, 0-9 and -, a letter first"
  [[ $SPOT == [01] ]] || fail 2 "SPOT=$SPOT is neither 0 nor 1"
  for setting in WORKER WAIT_MINUTES POLL_SECONDS MAX_RETRIES; do
    [[ ${!setting} =~ ^[0-9]+$ ]] || fail 2 "$setting=${!setting} is not a whole number"
  done
  check_accelerator
  # shellcheck disable=SC2034  # Read by the scripts that source this.
  read -ra create_flags <<<"$CREATE_FLAGS"
  # shellcheck disable=SC2034  # Read by the scripts that source this.
  read -ra ssh_flags <<<"$SSH_FLAGS"
}
