#!/usr/bin/env bash
# A slice by `gcloud compute tpus queued-resources`: v4, v5e, v5p, v6e.
: "${ACCELERATOR_TYPE:=v6e-16}"  # v4-16, v5litepod-16, v5p-16, v6e-16, ...
: "${RUNTIME_VERSION:=}"  # image of the hosts; empty for the generation's
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

DESCRIPTION='A training run on a TPU slice from the Cloud TPU API (v4, v5e, v5p, v6e).'
CREATES='ask for the slice as a queued resource'
INSTALLS='install this checkout with Python 3.12 and jax[tpu] on all hosts'
where=(--project="$PROJECT" --zone="$ZONE")

check_accelerator() {
  local version
  case $ACCELERATOR_TYPE in
    v6e-*) version=v2-alpha-tpuv6e ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v4-*) version=tpu-ubuntu2204-base ;;
    v5e-*) fail 2 "ACCELERATOR_TYPE=$ACCELERATOR_TYPE: the API calls it v5litepod-${ACCELERATOR_TYPE#*-}" ;;
    tpu7x-*) fail 2 "ACCELERATOR_TYPE=$ACCELERATOR_TYPE is not in the Cloud TPU API: use instance_group.sh or gke.sh" ;;
    *) fail 2 "ACCELERATOR_TYPE=$ACCELERATOR_TYPE is not known: v4-*, v5litepod-*, v5p-* or v6e-*" ;;
  esac
  : "${RUNTIME_VERSION:=$version}"
}

need_tools() {
  need_gcloud
}

find_slice() {
  local assumed=ACTIVE type why
  if [[ $assume == lost ]]; then assumed=SUSPENDED; fi
  if ! ask "$assumed"$'\t'"$ACCELERATOR_TYPE" \
    gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" \
    --format='value(state.state,tpu.nodeSpec[0].node.acceleratorType,state.failedData.error.message)'; then
    state=absent detail=
    return
  fi
  read -r detail type why <<<"$answer"
  if [[ -n $type && $type != "$ACCELERATOR_TYPE" ]]; then
    fail 2 "$NAME exists as $type, not $ACCELERATOR_TYPE: choose another NAME or $SCRIPT delete"
  fi
  case $detail in
    ACTIVE) find_node ;;
    FAILED)
      state=lost reason=$why
      classify "$why"
      if [[ $kind == quota ]]; then give_up gcloud; fi
      detail+=": $why"
      ;;
    SUSPENDING | SUSPENDED | DELETING) state=lost ;;
    *) state=waiting ;;
  esac
}

# The queued resource of a preempted spot slice stays ACTIVE for a while.
find_node() {
  state=lost
  if ask READY gcloud compute tpus tpu-vm describe "$NAME" "${where[@]}" \
    --format='value(state)'; then
    detail=$answer
    case $answer in
      READY) state=ready ;;
      PREEMPTED | TERMINATED | STOPPED | STOPPING | DELETING) ;;
      *) state=waiting ;;
    esac
  else
    detail='without its node'
  fi
}

request_slice() {
  local flags=()
  if ((SPOT)); then flags+=(--spot); fi
  if [[ -n $SERVICE_ACCOUNT ]]; then flags+=(--service-account="$SERVICE_ACCOUNT"); fi
  make gcloud compute tpus queued-resources create "$NAME" "${where[@]}" \
    --node-id="$NAME" --accelerator-type="$ACCELERATOR_TYPE" \
    --runtime-version="$RUNTIME_VERSION" --quiet "${flags[@]}" "${create_flags[@]}"
}

remove_slice() {
  remove gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" \
    --force --quiet
}

copy_to_all() {
  run gcloud compute tpus tpu-vm scp "$1" "$NAME:$2" "${where[@]}" \
    --worker=all --quiet "${ssh_flags[@]}"
}

on_all() {
  run gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all \
    --quiet "${ssh_flags[@]}" --command="$1"
}

follow() {
  local command=(gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}"
    --worker="$WORKER" --quiet "${ssh_flags[@]}" --command="$1")
  if ((dry_run)); then show "${command[@]}"; else "${command[@]}"; fi
}

main "$@"
