"""A sweep on several slices: each runs its worker, one that is lost too."""

import shlex

import pytest

WORKER = [
  '--coordinator=auto',
  '--store=gs://b/store',
  '--workdir=gs://b/sweeps/sae',
  '--grid=k=16,32',
]


def settings(**others):
  return {'SWEEP_FLAGS': '--grid=k=16,32'} | others


def test_every_slice_is_made_and_works_until_the_sweep_is_done(cloud):
  done = cloud.ok('sweep.sh', 'resume', **settings())
  assert sorted(cloud.state['queued']) == ['sae-0', 'sae-1']
  for name in ('sae-0', 'sae-1'):
    assert f'{name}: the run has finished' in done.err
  # Two hosts a slice.
  assert cloud.trained() == [WORKER] * 4
  # A slice that is lost comes back, and its worker with it.
  cloud.preempt()
  cloud.ok('sweep.sh', 'resume', **settings(SLICES='3'))
  assert sorted(cloud.state['queued']) == ['sae-0', 'sae-1', 'sae-2']
  assert cloud.trained()[-1] == WORKER
  status = cloud.ok('sweep.sh', 'status', **settings(SLICES='3')).err
  assert [f'sae-{i}: the slice is' in status for i in range(3)] == [True] * 3
  cloud.ok('sweep.sh', 'delete', **settings(SLICES='3'))
  assert not cloud.state['queued'] and not cloud.state['nodes']


def test_what_the_runs_came_to_is_fetched(cloud):
  cloud.ok('sweep.sh', 'fetch', **settings())
  fetched = cloud.root / 'results' / 'cells' / 'fetched'
  assert fetched.read_text() == 'gs://b/sweeps/sae/cells'


def test_a_slice_that_gives_up_leaves_its_runs_to_the_others(cloud):
  cloud.fault(
    'queued-resources create sae-1',
    "ERROR: RESOURCE_EXHAUSTED: Quota limit 'TPUS' has been exceeded.",
    times=9,
  )
  done = cloud.run('sweep.sh', 'resume', **settings())
  assert done.returncode == 2
  assert 'sae-0: the run has finished' in done.err
  assert 'sae-1 ended with exit code 2' in done.err
  assert cloud.trained() == [WORKER] * 2


def test_a_dry_run_names_every_slice_and_runs_nothing(cloud):
  dry = cloud.ok('sweep.sh', '--dry-run', 'resume', **settings()).out
  calls = [shlex.split(line) for line in dry.splitlines()]
  created = [call[5] for call in calls if 'create' in call]
  assert created == ['sae-0', 'sae-1']
  assert 'sae-sweep' in dry and cloud.calls() == []


@pytest.mark.parametrize(
  ('arguments', 'changes', 'message'),
  [
    ([], {}, 'no action'),
    (['walk'], {}, 'walk is not an action'),
    (['stop', 'delete'], {}, 'one action at a time, not stop and delete'),
    (['stop'], {'SLICES': '0'}, 'SLICES=0 is not a number of slices'),
    (['stop'], {'BUCKET': None}, 'BUCKET is not set'),
    (['stop'], {'BY': 'sh'}, 'BY=sh is none of the scripts'),
  ],
)
def test_wrong_settings_are_one_line(cloud, arguments, changes, message):
  done = cloud.run('sweep.sh', *arguments, **settings(**changes))
  assert done.returncode == 2 and message in done.err
  assert len(done.err.splitlines()) == 1
  assert cloud.calls() == []


def test_help_lists_actions_and_settings(cloud):
  text = cloud.ok('sweep.sh', '--help').out
  for word in ('resume', 'fetch', 'SLICES=2', 'BY=queued_resource.sh'):
    assert word in text
