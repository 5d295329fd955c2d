"""Runs on hosts: installed, followed, resumed."""

import os
import re
import time

import pytest

from tests.support.cloud.scripts import (
  call,
  CREATE,
  hold,
  installed,
  NO_CAPACITY,
  ON_HOSTS,
  QUOTA,
  release,
  SCRIPTS,
)


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
  before = len(cloud.calls())
  watching = cloud.start(script, 'resume', POLL_SECONDS='1')
  while len(cloud.calls()) == before:
    time.sleep(0.02)
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
