#!/usr/bin/env bash
# A slice in a GKE cluster, the run a JobSet: `xpk` does both.
: "${ACCELERATOR_TYPE:=v6e-16}"  # v5litepod-16, v5p-16, v6e-16, tpu7x-16, ...
: "${CLUSTER:=}"  # GKE cluster; empty for NAME
: "${IMAGE:=}"  # to build and run; empty for one in Artifact Registry
: "${MAX_RESTARTS:=100}"  # of the JobSet by GKE, this computer on or off
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

DESCRIPTION='A training run as a JobSet on TPUs in GKE, by XPK.'
CREATES='make the cluster with its TPUs'
INSTALLS='build the image of this checkout, with Python 3.12 and jax[tpu]'
: "${CLUSTER:=$NAME}"
image_repository=$REGION-docker.pkg.dev/$PROJECT/sae-jax
: "${IMAGE:=$image_repository/$NAME}"
where=(--project="$PROJECT" --zone="$ZONE")
location=(--project="$PROJECT" --location="$REGION")

check_accelerator() {
  if [[ $ACCELERATOR_TYPE == v5e-* ]]; then
    fail 2 "ACCELERATOR_TYPE=$ACCELERATOR_TYPE: XPK calls it v5litepod-${ACCELERATOR_TYPE#*-}"
  fi
  [[ $MAX_RESTARTS =~ ^[0-9]+$ ]] || fail 2 "MAX_RESTARTS=$MAX_RESTARTS is not a whole number"
}

need_tools() {
  need_gcloud
  need kubectl 'gcloud components install kubectl gke-gcloud-auth-plugin'
  need xpk 'pip install xpk'
}

find_cluster() {
  ask RUNNING gcloud container clusters describe "$CLUSTER" "${location[@]}" \
    --format='value(status)'
}

connect() {
  find_cluster || fail 2 "cluster $CLUSTER is not there: $SCRIPT create"
  run gcloud container clusters get-credentials "$CLUSTER" "${location[@]}" \
    --dns-endpoint
}

action_create() {
  local capacity=--on-demand
  assume=absent
  if find_cluster; then
    connect
    # XPK writes this last, so without it the cluster is half made.
    ask '' kubectl get configmap "$CLUSTER-resources-configmap" \
      --ignore-not-found '--output=jsonpath={.data}'
    if [[ -n $answer && $answer != *"\"$ACCELERATOR_TYPE\""* ]]; then
      fail 2 "$CLUSTER exists with $(tr -d '{}"' <<<"$answer"), not $ACCELERATOR_TYPE: choose another CLUSTER or $SCRIPT delete"
    fi
    if [[ -n $answer ]]; then
      say "exists already: $CLUSTER with $ACCELERATOR_TYPE"
      return
    fi
  fi
  if ((SPOT)); then capacity=--spot; fi
  if [[ $CREATE_FLAGS == *--reservation* ]]; then capacity=; fi
  run_shown xpk cluster create --cluster="$CLUSTER" "${where[@]}" \
    --tpu-type="$ACCELERATOR_TYPE" --num-slices=1 ${capacity:+"$capacity"} \
    "${create_flags[@]}"
  say "next: $SCRIPT install"
}

action_install() {
  pack_source
  if [[ $IMAGE == "$image_repository"/* ]]; then
    make gcloud artifacts repositories create sae-jax "${location[@]}" \
      --repository-format=docker --quiet || true
  fi
  run_shown gcloud builds submit "$SOURCE_ARCHIVE" --project="$PROJECT" \
    --tag="$IMAGE" --quiet
  say "$IMAGE is built"
}

# Sets status to not there, running, finished or failed, and detail.
find_status() {
  local name ended why
  status='not there' detail=
  ask "$NAME:Completed:" kubectl get jobset "$NAME" --ignore-not-found \
    '--output=jsonpath={.metadata.name}:{.status.terminalState}:{.status.conditions[?(@.type=="Failed")].reason}' ||
    return 0
  IFS=: read -r name ended why <<<"$answer"
  if [[ -n $name ]]; then
    case $ended in
      '') status=running ;;
      Completed) status=finished ;;
      *) status=failed detail=${why:-$ended} ;;
    esac
  fi
}

# The other hosts of one that was lost end with 1, and wrong flags with 2.
submit() {
  local command
  command=$(train_command)
  if [[ $status != 'not there' ]]; then remove_workload; fi
  run_shown xpk workload create --cluster="$CLUSTER" --workload="$NAME" \
    "${where[@]}" --tpu-type="$ACCELERATOR_TYPE" --docker-image="$IMAGE" \
    --max-restarts="$MAX_RESTARTS" --restart-on-exit-codes=1 \
    --command="bash -c $(printf %q "$command")"
  say "started: $command"
}

remove_workload() {
  run_shown xpk workload delete --cluster="$CLUSTER" --workload="$NAME" \
    "${where[@]}" --quiet
}

action_run() {
  train_command >/dev/null
  connect
  if ((dry_run)); then assume=absent; fi
  find_status
  if [[ $status == running ]]; then
    fail 2 "a run is going on $CLUSTER: $SCRIPT tail shows it, $SCRIPT stop ends it"
  fi
  submit
  say "next: $SCRIPT tail"
}

action_tail() {
  local command=(kubectl logs --follow --tail=100 --container=jax-tpu
    --selector="xpk.google.com/workload=$NAME,batch.kubernetes.io/job-completion-index=$WORKER")
  connect
  if ((dry_run)); then show "${command[@]}"; else "${command[@]}"; fi
}

action_status() {
  connect
  find_status
  say "the run: $status${detail:+ ($detail)}"
}

action_stop() {
  connect
  find_status
  if [[ $status == 'not there' ]]; then
    say 'nothing to stop'
  else
    remove_workload
    say 'stopped'
  fi
}

# GKE brings preempted nodes back and the JobSet restarts; this is for what is
# beyond them: restarts used up, a JobSet deleted.
action_resume() {
  local retries=0
  train_command >/dev/null
  if ((dry_run)); then assume=lost; fi
  connect
  if ((dry_run)); then assume=absent; fi
  while true; do
    find_status
    case $status in
      finished)
        say 'the run has finished'
        return
        ;;
      running) sleep "$POLL_SECONDS" ;;
      *)
        if [[ $detail == FailJobSetFailurePolicyAction ]]; then
          fail 2 "the command ended with an exit code that trying again does not mend: $SCRIPT tail"
        fi
        count_retry "run $status${detail:+ ($detail)}"
        submit
        assume=ready
        ;;
    esac
  done
}

action_delete() {
  if ! find_cluster; then
    say 'is not there: nothing to delete'
    return
  fi
  run_shown xpk cluster delete --cluster="$CLUSTER" "${where[@]}" --quiet
  say 'deleted; the bucket keeps the results, Artifact Registry the image'
}

main "$@"
