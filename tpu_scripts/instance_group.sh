#!/usr/bin/env bash
# A slice as a Compute Engine managed instance group: v5p, v6e, tpu7x.
: "${GENERATION:=v6e}"  # v5p, v6e or tpu7x
: "${TOPOLOGY:=4x4}"  # of the chips, four on a host: 4x4, 2x2x4, ...
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

DESCRIPTION='A training run on a TPU slice from Compute Engine (v5p, v6e, tpu7x).'
CREATES='make the managed instance group'
INSTALLS='install this checkout with Python 3.12 and jax[tpu] on all hosts'
where=(--project="$PROJECT" --zone="$ZONE")

check_accelerator() {
  local side
  case $GENERATION in
    v5p) machine=ct5p-hightpu-4t image=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e ;;
    v6e) machine=ct6e-standard-4t image=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e ;;
    tpu7x) machine=tpu7x-standard-4t image=ubuntu-accel-2404-amd64-tpu-tpu7x ;;
    v4 | v5e) fail 2 "GENERATION=$GENERATION is not in Compute Engine: use queued_resource.sh" ;;
    *) fail 2 "GENERATION=$GENERATION is not known: v5p, v6e or tpu7x" ;;
  esac
  [[ $TOPOLOGY =~ ^[0-9]+(x[0-9]+){1,2}$ ]] ||
    fail 2 "TOPOLOGY=$TOPOLOGY is not of the form 4x4 or 2x2x4"
  chips=1
  for side in ${TOPOLOGY//x/ }; do chips=$((chips * side)); done
  if ((chips == 0 || chips % 4)); then
    fail 2 "TOPOLOGY=$TOPOLOGY has $chips chips, not a multiple of the 4 on a host"
  fi
  hosts_wanted=$((chips / 4))
  template=$NAME-$machine
  if ((SPOT)); then template+=-spot; fi
  # One host has no links to others, and no policy that places them.
  policy=
  if ((hosts_wanted > 1)); then policy=$NAME-$TOPOLOGY; fi
}

need_tools() {
  need_gcloud
}

find_slice() {
  local size found_template found_policy found wanted
  wanted="$hosts_wanted hosts of $template${policy:+ in $policy}"
  if ! ask "$hosts_wanted"$'\t'"$template"$'\t'"$policy" \
    gcloud compute instance-groups managed describe "$NAME" "${where[@]}" \
    --format='value(targetSize,instanceTemplate.basename(),resourcePolicies.workloadPolicy.basename())'; then
    state=absent detail=
    return
  fi
  read -r size found_template found_policy <<<"$answer"
  found="$size hosts of $found_template${found_policy:+ in $found_policy}"
  if [[ $found != "$wanted" ]]; then
    fail 2 "$NAME exists as $found, not $wanted: choose another NAME or $SCRIPT delete"
  fi
  find_hosts
  judge_hosts
}

# Sets hosts to their names and statuses to what they do.
find_hosts() {
  local assumed='' i line
  for ((i = 0; i < hosts_wanted; i++)); do
    assumed+=$(printf '%s-%04d\t%s' "$NAME" "$i" "$([[ $assume == lost ]] && echo STOPPED || echo RUNNING)")$'\n'
  done
  ask "$assumed" gcloud compute instance-groups managed list-instances "$NAME" \
    "${where[@]}" --sort-by=name --format='value(name,instanceStatus)' ||
    fail 2 "$NAME is not there: $SCRIPT create"
  hosts=() statuses=
  while read -r line; do
    if [[ -n $line ]]; then
      hosts+=("${line%%[[:space:]]*}")
      statuses+=" ${line##*[[:space:]]}"
    fi
  done <<<"$answer"
}

judge_hosts() {
  local running=0 status
  for status in $statuses; do
    if [[ $status == RUNNING ]]; then running=$((running + 1)); fi
  done
  detail="$running of $hosts_wanted hosts running"
  if ((running == hosts_wanted)); then
    state=ready
  # All hosts come at once, so some of them mean that others have gone.
  elif [[ $statuses =~ STOP|TERMINATED|SUSPEND|DEPROVISIONING|PREEMPTED ]] ||
    ((running && ${#hosts[@]} < hosts_wanted)); then
    state=lost
    detail+=" (${statuses# })"
  else
    state=waiting
    find_error
  fi
}

find_error() {
  ask '' gcloud compute instance-groups managed list-errors "$NAME" \
    "${where[@]}" --limit=1 --format='value(error.code,error.message)' || return 0
  [[ -n $answer ]] || return 0
  reason=$(tr '\t\n' '  ' <<<"$answer")
  classify "$reason"
  # Waiting mends a lack of capacity and nothing else.
  if [[ $kind != capacity ]]; then give_up gcloud; fi
  detail+=", $reason"
}

request_slice() {
  local place=() model=() disk=()
  if [[ -n $policy ]]; then
    make gcloud compute resource-policies create workload-policy "$policy" \
      --project="$PROJECT" --region="$REGION" --type=HIGH_THROUGHPUT \
      --accelerator-topology="$TOPOLOGY" --quiet || true
    place=(--workload-policy="projects/$PROJECT/regions/$REGION/resourcePolicies/$policy"
      --target-size-policy-mode=bulk)
  fi
  if ((SPOT)); then
    model=(--provisioning-model=SPOT --instance-termination-action=STOP)
  fi
  if [[ -n $SERVICE_ACCOUNT ]]; then model+=(--service-account="$SERVICE_ACCOUNT"); fi
  if [[ $GENERATION == tpu7x ]]; then disk=(--boot-disk-type=hyperdisk-balanced); fi
  make gcloud compute instance-templates create "$template" \
    --project="$PROJECT" --machine-type="$machine" --image-family="$image" \
    --image-project=ubuntu-os-accelerator-images --maintenance-policy=TERMINATE \
    --boot-disk-size=100GB --scopes=cloud-platform --quiet \
    "${disk[@]}" "${model[@]}" "${create_flags[@]}" || true
  # A single host that is replaced would leave its slice.
  make gcloud compute instance-groups managed create "$NAME" "${where[@]}" \
    --size="$hosts_wanted" --template="$template" \
    --default-action-on-vm-failure=do-nothing --quiet "${place[@]}"
}

remove_slice() {
  local there=0
  remove gcloud compute instance-groups managed delete "$NAME" "${where[@]}" \
    --quiet || there=1
  remove gcloud compute instance-templates delete "$template" \
    --project="$PROJECT" --quiet || true
  if [[ -n $policy ]]; then
    remove gcloud compute resource-policies delete "$policy" \
      --project="$PROJECT" --region="$REGION" --quiet || true
  fi
  return "$there"
}

# Calls a function with every host. The first one alone, since it may have to
# make the ssh key that the others use.
on_each_host() {
  local host process processes=() worst=0
  find_hosts
  ((${#hosts[@]})) || fail 2 "$NAME has no hosts: $SCRIPT create"
  "$1" "${hosts[0]}" "${@:2}"
  for host in "${hosts[@]:1}"; do
    if ((dry_run)); then
      "$1" "$host" "${@:2}"
    else
      "$1" "$host" "${@:2}" &
      processes+=($!)
    fi
  done
  for process in "${processes[@]}"; do
    wait "$process" || worst=$?
  done
  if ((worst)); then exit "$worst"; fi
}

copy_to_host() {
  run gcloud compute scp "$2" "$1:$3" "${where[@]}" --quiet "${ssh_flags[@]}"
}

on_host() {
  run gcloud compute ssh "$1" "${where[@]}" --quiet "${ssh_flags[@]}" \
    --command="$2"
}

copy_to_all() {
  on_each_host copy_to_host "$@"
}

on_all() {
  on_each_host on_host "$@"
}

follow() {
  find_hosts
  ((WORKER < ${#hosts[@]})) || fail 2 "WORKER=$WORKER, but $NAME has ${#hosts[@]} hosts, counted from 0"
  local command=(gcloud compute ssh "${hosts[WORKER]}" "${where[@]}" --quiet
    "${ssh_flags[@]}" --command="$1")
  if ((dry_run)); then show "${command[@]}"; else "${command[@]}"; fi
}

main "$@"
