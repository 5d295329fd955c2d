"""Programs that stand in for the cloud's tools and for what hosts install."""

# Stands in for gcloud, xpk and kubectl, as the name it is called by says. Keeps
# what exists in state.json, notes each call, and knows the flags of the
# reference pages (gcloud) and of the parser of xpk 1.16.
STAND_IN = r'''
import fcntl, json, os, pathlib, re, shutil, subprocess, sys

root = pathlib.Path(__file__).resolve().parent.parent
tool, argv = os.path.basename(sys.argv[0]), sys.argv[1:]

INSTANCES = 'compute instance-groups managed'
GCLOUD = {
  'compute tpus queued-resources create': """zone runtime-version
    accelerator-type topology type node-id node-count node-prefix async
    boot-disk data-disk description guaranteed internal-ips labels metadata
    metadata-from-file network range reserved scopes service-account
    shielded-secure-boot spot subnetwork tags valid-after-duration
    valid-after-time valid-until-duration valid-until-time
    reservation-host-folder reservation-host-organization
    reservation-host-project""",
  'compute tpus queued-resources describe': 'zone',
  'compute tpus queued-resources delete': 'zone async force',
  'compute tpus tpu-vm describe': 'zone',
  'compute tpus tpu-vm ssh': """zone command output-directory worker dry-run
    force-key-file-overwrite internal-ip plain ssh-flag ssh-key-file
    strict-host-key-checking ssh-key-expiration ssh-key-expire-after""",
  'compute tpus tpu-vm scp': """zone worker compress dry-run recurse scp-flag
    force-key-file-overwrite internal-ip plain ssh-key-file
    strict-host-key-checking ssh-key-expiration ssh-key-expire-after""",
  'compute ssh': """zone command container dry-run internal-ip plain ssh-flag
    force-key-file-overwrite ssh-key-file strict-host-key-checking
    tunnel-through-iap ssh-key-expiration ssh-key-expire-after""",
  'compute scp': """zone compress dry-run internal-ip plain port recurse
    force-key-file-overwrite scp-flag ssh-key-file strict-host-key-checking
    tunnel-through-iap ssh-key-expiration ssh-key-expire-after""",
  'compute resource-policies create workload-policy': """type region
    accelerator-topology accelerator-topology-mode description
    max-topology-distance""",
  'compute resource-policies delete': 'region',
  'compute instance-templates create': """machine-type image-family image
    image-project maintenance-policy boot-disk-size boot-disk-type scopes
    service-account provisioning-model instance-termination-action network
    subnet no-address metadata tags labels max-run-duration reservation
    reservation-affinity instance-template-region""",
  'compute instance-templates delete': 'region',
  INSTANCES + ' create': """size template zone region base-instance-name
    default-action-on-vm-failure description target-size-policy-mode
    workload-policy initial-delay health-check zones""",
  INSTANCES + ' describe': 'zone region',
  INSTANCES + ' delete': 'zone region',
  INSTANCES + ' list-instances': 'zone region filter limit sort-by uri',
  INSTANCES + ' list-errors': 'zone region filter limit sort-by uri page-size',
  'container clusters describe': 'location zone region',
  'container clusters get-credentials': """location zone region internal-ip
    dns-endpoint""",
  'artifacts repositories create': """location repository-format description
    async labels""",
  'builds submit': 'tag region async config machine-type timeout no-cache',
  'storage rsync': 'recursive dry-run delete-unmatched-destination-objects',
}
XPK_SHARED = """cluster project project-number zone namespace dry-run quiet
  skip-validation sandbox-kubeconfig dependency-auto-download """
XPK = {
  'cluster create': XPK_SHARED + """tpu-type device-type num-slices on-demand
    spot flex reservation force gke-version custom-cluster-arguments
    custom-tpu-nodepool-arguments enable-workload-identity private
    default-pool-cpu-machine-type default-pool-cpu-num-nodes""",
  'cluster delete': XPK_SHARED + 'force cluster-state-gcs-bucket',
  'workload create': XPK_SHARED + """tpu-type device-type workload command
    docker-image docker-name base-docker-image script-dir max-restarts
    restart-on-exit-codes num-slices priority env env-file storage scheduler
    ttl-seconds-after-finished termination-grace-period-seconds""",
  'workload delete': XPK_SHARED + """workload filter-by-job filter-by-status
    force""",
}
KUBECTL = {
  'get configmap': 'ignore-not-found output',
  'get jobset': 'ignore-not-found output',
  'logs': 'follow tail container selector',
}
TABLE = {'gcloud': GCLOUD, 'xpk': XPK, 'kubectl': KUBECTL}[tool]
WIDE = {'gcloud': 'project quiet format'.split()}.get(tool, [])

lock = open(root / 'lock', 'w')
fcntl.flock(lock, fcntl.LOCK_EX)
state = json.loads((root / 'state.json').read_text())
with open(root / 'calls.jsonl', 'a') as calls:
  calls.write(json.dumps([tool, *argv]) + '\n')


def save():
  (root / 'state.json').write_text(json.dumps(state))


def fail(text, code=1):
  print(text, file=sys.stderr)
  save()
  sys.exit(code)


words = []
for word in argv:
  if word.startswith('-'):
    break
  words.append(word)
for length in range(len(words), 0, -1):
  command = ' '.join(words[:length])
  if command in TABLE:
    break
else:
  fail(f'ERROR: ({tool}) Invalid choice: {" ".join(words)!r}.', 2)
me = f'ERROR: ({tool}.{command.replace(" ", ".")})'
allowed = {*TABLE[command].split(), *WIDE}
flags, names = {}, []
for word in argv[length:]:
  if not word.startswith('--'):
    names.append(word)
    continue
  flag, _, value = word[2:].partition('=')
  if flag not in allowed:
    fail(f'{me} unrecognized arguments: {word}', 2)
  flags[flag] = value

for fault in state['faults']:
  if fault['times'] and fault['match'] in ' '.join([tool, *argv]):
    fault['times'] -= 1
    fail(fault['stderr'].replace('ERROR:', me), fault['code'])


def found(kind, name, text='The resource {} was not found'):
  if name not in state[kind]:
    fail(f'{me} Could not fetch resource:\n - ' + text.format(repr(name)))
  return state[kind][name]


def get(tree, path):
  """A path of a gcloud format: a.b[0].c, and a.basename()."""
  for part in re.findall(r'\w+\(\)|\w+', path):
    if part == 'basename()':
      tree = str(tree or '').rsplit('/', 1)[-1]
    elif part.isdigit():
      tree = tree[int(part)] if tree else None
    else:
      tree = (tree or {}).get(part)
  return '' if tree is None else str(tree)


def show(tree):
  paths = re.fullmatch(r'value\((.*)\)', flags['format'])[1].split(',')
  print('\t'.join(get(tree, path) for path in paths))


def home(host):
  return root / 'hosts' / host


def boot(hosts):
  for host in hosts:
    home(host).mkdir(parents=True)


def halt(prefix):
  for path in (root / 'hosts').glob(prefix + '-*'):
    pid = path / 'sae_jax_run' / 'pid'
    if pid.exists():
      subprocess.run(['bash', '-c', f'kill -KILL -- -{pid.read_text()}'],
                     stderr=subprocess.DEVNULL)
    shutil.rmtree(path)


def log_in(hosts):
  """Runs the command as sshd does: by the user's shell, in the home."""
  save()
  fcntl.flock(lock, fcntl.LOCK_UN)
  code = 0
  for i, host in enumerate(hosts):
    if not home(host).exists():
      print(f'ssh: connect to host {host}: Connection refused\n'
            f'{me} [/usr/bin/ssh] exited with return code [255].',
            file=sys.stderr)
      sys.exit(255)
    code = subprocess.run(
      ['bash', '-c', flags['command']], cwd=home(host), env={
        'HOME': str(home(host)), 'TPU_WORKER_ID': str(i),
        'PATH': f'{root}/host_bin:' + os.environ['PATH']}).returncode or code
  sys.exit(code)


def copy(hosts, target):
  for host in hosts:
    shutil.copy(names[0], home(host) / target)


def workers(name):
  return [f'{name}-{i}' for i in range(state['n_hosts'])]


if command.startswith('compute tpus'):
  name = names[0] if names else ''
  kind = 'nodes' if 'tpu-vm' in command else 'queued'
  if command.endswith(('ssh', 'scp')):
    name = names[-1].split(':')[0]
    hosts = workers(name)
    if flags['worker'] != 'all':
      hosts = [hosts[int(flags['worker'])]]
  if command.endswith('create'):
    if name in state['queued']:
      fail(f"{me} ALREADY_EXISTS: Resource '{name}' already exists")
    state['queued'][name] = {
      'state': {'state': state['granted']}, 'tpu': {'nodeSpec': [
        {'node': {'acceleratorType': flags['accelerator-type']}}]}}
    if state['granted'] == 'ACTIVE':
      state['nodes'][name] = {'state': 'READY'}
      boot(workers(name))
  elif name not in state[kind]:
    fail(f"{me} NOT_FOUND: Resource '{name}' was not found")
  elif command.endswith('describe'):
    show(state[kind][name])
  elif command.endswith('delete'):
    if state['queued'][name]['state']['state'] == 'ACTIVE':
      assert 'force' in flags
    del state['queued'][name]
    state['nodes'].pop(name, None)
    halt(name)
  elif state['nodes'][name]['state'] != 'READY':
    fail(f'{me} FAILED_PRECONDITION: this command cannot be run on a TPU in '
         f'state {state["nodes"][name]["state"]}')
  elif command.endswith('scp'):
    copy(hosts, names[1].split(':')[1])
  else:
    log_in(hosts)
elif command in ('compute ssh', 'compute scp'):
  host = names[-1].split(':')[0]
  found('hosts', host)
  if command.endswith('scp'):
    copy([host], names[1].split(':')[1])
  else:
    log_in([host])
elif command.startswith('compute resource-policies'):
  if 'create' in command:
    if names[0] in state['policies']:
      fail(f"{me} Could not fetch resource:\n - The resource '{names[0]}' "
           'already exists')
    assert flags['type'] == 'HIGH_THROUGHPUT'
    state['policies'][names[0]] = flags['accelerator-topology']
  else:
    found('policies', names[0])
    del state['policies'][names[0]]
elif command.startswith('compute instance-templates'):
  if 'create' in command:
    if names[0] in state['templates']:
      fail(f"{me} Could not fetch resource:\n - The resource '{names[0]}' "
           'already exists')
    state['templates'][names[0]] = flags
  else:
    found('templates', names[0])
    del state['templates'][names[0]]
elif command.startswith(INSTANCES):
  name = names[0]
  if command.endswith(' create'):
    if name in state['groups']:
      fail(f"{me} Could not fetch resource:\n - The resource '{name}' "
           'already exists')
    found('templates', flags['template'])
    policy = flags.get('workload-policy', '')
    if policy:
      if not policy.startswith('projects/'):
        fail(f'{me} The URL is malformed.')
      found('policies', policy.rsplit('/', 1)[-1])
      if flags.get('target-size-policy-mode') != 'bulk':
        fail(f'{me} MIGs with TPU accelerator topology require BULK mode in '
             'target size policy')
    state['groups'][name] = {
      'targetSize': int(flags['size']),
      'instanceTemplate': 'https://x/' + flags['template'],
      'resourcePolicies': {'workloadPolicy': policy or None}}
    hosts = [f'{name}-{i:04d}' for i in range(int(flags['size']))]
    running = state['granted'] == 'ACTIVE'
    for host in hosts:
      state['hosts'][host] = {
        'name': host, 'instanceStatus': 'RUNNING' if running else 'PENDING'}
    if running:
      boot(hosts)
  else:
    group = found('groups', name)
    if command.endswith('describe'):
      show(group)
    elif command.endswith('list-instances'):
      for host in sorted(state['hosts']):
        show(state['hosts'][host])
    elif command.endswith('list-errors'):
      for error in state['errors']:
        show({'error': error})
    else:
      del state['groups'][name]
      state['hosts'].clear()
      halt(name)
elif command.startswith('container clusters'):
  if names[0] not in state['clusters']:
    fail(f'{me} ResponseError: code=404, message=Not found: '
         f'projects/p/locations/l/clusters/{names[0]}.')
  if command.endswith('describe'):
    show({'status': 'RUNNING'})
elif command == 'artifacts repositories create':
  if names[0] in state['repositories']:
    fail(f'{me} ALREADY_EXISTS: the repository already exists')
  state['repositories'].append(names[0])
elif command == 'builds submit':
  listing = subprocess.run(['tar', '-tzf', names[0]], text=True, check=True,
                           capture_output=True).stdout.split()
  assert {'Dockerfile', 'setup.cfg', 'sae_jax/__init__.py'} <= set(listing)
  state['images'].append(flags['tag'])
elif command == 'storage rsync':
  pathlib.Path(names[1], 'fetched').write_text(names[0])
elif command == 'cluster create':
  state['clusters'][flags['cluster']] = flags['tpu-type']
elif command == 'cluster delete':
  del state['clusters'][flags['cluster']]
  state['jobsets'].clear()
elif command == 'workload create':
  if flags['workload'] in state['jobsets']:
    fail('[XPK] already exists, do you want to overwrite it? (y/N): EOFError')
  assert flags['docker-image'] in state['images'], 'no such image'
  job = {'metadata': {'name': flags['workload']}, 'status': {}}
  state['jobsets'][flags['workload']] = job
  left = int(flags.get('max-restarts', 0))
  if '\n' in flags['command']:
    fail('error converting YAML to JSON: could not find expected ":"')
  # The container's script of xpk 1.16, and its rule for exit codes.
  script = ('(%s) & PID=$!\nwait $PID\n' % flags['command'])
  pod = root / 'pod'
  pod.mkdir(exist_ok=True)
  while not state['hold']:
    code = subprocess.run(['bash', '-c', script], cwd=pod, env={
      'HOME': str(pod),
      'PATH': f'{root}/image_bin:' + os.environ['PATH']}).returncode
    again = [42, *range(127, 256)]
    again += map(int, flags.get('restart-on-exit-codes', '').split(','))
    if not code:
      job['status'] = {'terminalState': 'Completed'}
    elif code in again and left:
      left -= 1
      continue
    else:
      job['status'] = {'terminalState': 'Failed', 'why': 'ReachedMaxRestarts'
        if code in again else 'FailJobSetFailurePolicyAction'}
    break
elif command == 'workload delete':
  del state['jobsets'][flags['workload']]
elif command == 'get configmap':
  cluster = names[0].removesuffix('-resources-configmap')
  if state['clusters'].get(cluster):
    print(json.dumps({state['clusters'][cluster]: '2'}), end='')
elif command == 'get jobset':
  job = state['jobsets'].get(names[0])
  if job:
    assert '.status.terminalState' in flags['output']
    status = job['status']
    print(':'.join([names[0], status.get('terminalState', ''),
                    status.get('why', '')]), end='')
elif command == 'logs':
  assert 'xpk.google.com/workload=' in flags['selector']
  print((root / 'pod' / 'trained.jsonl').read_text())
save()
'''

# What installing puts on a host, and a sae-train that notes how it was called.
UV = r"""
import pathlib, shutil, sys
here = pathlib.Path(__file__).resolve().parent
with open(pathlib.Path.home() / 'uv.log', 'a') as log:
  log.write(' '.join(sys.argv[1:]) + '\n')
if sys.argv[1] == 'venv':
  bin_dir = pathlib.Path(sys.argv[-1]) / 'bin'
  bin_dir.mkdir(parents=True)
  (bin_dir / 'python').write_text('#!/bin/sh\necho sae_jax 0, jax 0\n')
  (bin_dir / 'python').chmod(0o755)
  for program in ('sae-train', 'sae-sweep'):
    shutil.copy(here / 'train', bin_dir / program)
"""
TRAIN = r"""
import json, pathlib, sys, time
home = pathlib.Path.home()
root = pathlib.Path({root!r})
with open(home / 'trained.jsonl', 'a') as log:
  log.write(json.dumps(sys.argv[1:]) + '\n')
print('step 1', flush=True)
while (root / 'hold').exists():
  time.sleep(0.02)
codes = root / 'codes'
left = codes.read_text().split() if codes.exists() else []
codes.write_text(' '.join(left[1:]))
sys.exit(int(left[0]) if left else 0)
"""
