"""What the cloud refuses, and what the scripts make of it."""

import pytest

from tests.support.cloud.scripts import (
  CREATE,
  hold,
  installed,
  NO_CAPACITY,
  ON_HOSTS,
  QUOTA,
  release,
  SCRIPTS,
  TRY_LATER,
)

DESCRIBE = {
  'queued_resource.sh': 'queued-resources describe',
  'instance_group.sh': 'managed describe',
  'gke.sh': 'clusters describe',
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
