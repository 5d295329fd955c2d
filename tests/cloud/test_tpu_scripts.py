"""tpu_scripts/: from nothing to results, settings, dry runs."""

import re
import shlex
import subprocess

import pytest

from tests.support.cloud.scripts import installed, SCRIPTS
from tests.support.cloud.stand_in import FOLDER

# In the order of a run; status and stop lie beside it.
ACTIONS = ('create', 'install', 'run', 'tail', 'resume', 'fetch', 'delete')


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
