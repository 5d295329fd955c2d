"""The binaries in this process: flags, errors of one line, sweeps."""

import os
import shutil

import pytest

from tests.support import binaries, planted, runs


def one_line(found, code, *parts):
  """The run failed with this code and one line that holds the parts."""
  assert found.returncode == code, found.stderr
  assert found.stdout == ''
  lines = [line for line in found.stderr.splitlines() if line]
  # Log lines of what went before may stand above.
  assert lines[-1].startswith('error: ')
  assert 'Traceback' not in found.stderr
  for part in parts:
    assert part in lines[-1]
  return lines


@pytest.mark.parametrize(
  ('flags', 'part'),
  [
    (['--bogus=1'], "Unknown command line flag 'bogus'"),
    (['--k=many'], "flag --k=many: 'many' is not an integer: write"),
    (['--num_processes=1.5'], "'1.5' is not an integer"),
    (['--store=s'], '--workdir is required'),
    (['--store=s', '--workdir=w', 'extra'], "'extra' is not a flag"),
    (['--store=s', '--workdir=w', '--preprocessing=x'], 'should be one of'),
    (['--store=s', '--workdir=w', '--k=9999'], 'k 9999 exceeds n_latents 4096'),
  ],
)
def test_wrong_flags_exit_with_2_in_one_line(flags, part):
  lines = one_line(binaries.run('sae-train', *flags), 2, part)
  assert len(lines) == 1


def test_missing_and_misfitting_input_exit_with_2(tmp_path):
  text = tmp_path / 'text.txt'
  text.write_text('A text.')
  store, workdir = str(tmp_path / 'store'), str(tmp_path / 'run')
  one_line(
    binaries.run('sae-train', f'--store={store}', f'--workdir={workdir}'),
    2,
    'is not a finished store',
  )
  planted.write_store(store)
  common = [f'--store={store}', f'--workdir={workdir}']
  one_line(
    binaries.run(
      'sae-train', *common, '--d_model=24', '--n_latents=64', '--k=4'
    ),
    2,
    'd_model 24 is not the width 16',
  )
  one_line(
    binaries.run('sae-probe', *common, f'--checkpoint={workdir}'),
    2,
    'no checkpoint',
  )
  one_line(
    binaries.run('sae-browse', f'--probe={workdir}', f'--workdir={workdir}'),
    2,
    'has no finished.json',
  )
  one_line(
    binaries.run(
      'sae-harvest',
      f'--store={store}2',
      f'--sources={text}',
      '--subject=gpt-9',
    ),
    2,
    "subject 'gpt-9' is not known",
  )
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('flags', 'part'),
  [
    ([], '--store is required, or --stream'),
    (['--stream', '--store=s'], '--store and --stream are both given'),
    (['--store=s', '--n_tokens=1e6'], 'n_tokens is for --stream: give --str'),
    (['--store=s', '--sources=a.txt'], 'sources is for --stream: give'),
    (['--stream', '--n_tokens=-1'], 'n_tokens -1 must be 0 or more'),
    (['--stream', '--n_tokens=1e6'], 'no checkpoints under'),
  ],
)
def test_a_store_or_a_stream_is_probed(tmp_path, flags, part):
  where = [f'--checkpoint={tmp_path}/run', f'--workdir={tmp_path}/probe']
  one_line(binaries.run('sae-probe', *where, *flags), 2, part)
  assert not (tmp_path / 'probe').exists()


def test_urls_are_expanded_or_refused(tmp_path):
  store = f'--store={tmp_path}/none'
  one_line(
    binaries.run('sae-train', store, '--workdir='), 2, 'workdir is empty'
  )
  one_line(
    binaries.run('sae-train', store, '--workdir=az://b/run'),
    2,
    'workdir az://b/run is no URL that is known: use a local path or a '
    'gs:// or s3:// URL',
  )
  one_line(
    binaries.run('sae-train', '--store=~/no_such_store', '--workdir=w'),
    2,
    os.path.expanduser('~/no_such_store'),
  )


def test_a_workdir_that_cannot_be_made_is_one_line(tmp_path):
  planted.write_store(str(tmp_path / 'store'))
  (tmp_path / 'file').write_text('')
  found = binaries.run(
    'sae-train', f'--store={tmp_path}/store', f'--workdir={tmp_path}/file/run',
    '--n_latents=64', '--k=4', '--batch_size=64', '--steps=2',
  )  # fmt: skip
  one_line(found, 2, 'check the path, free space and your access')


def test_debug_shows_the_traceback(tmp_path):
  found = binaries.run(
    'sae-train', f'--store={tmp_path}', '--workdir=w', '--debug'
  )
  assert found.returncode != 0
  assert 'Traceback' in found.stderr


@pytest.mark.parametrize(
  ('sweep', 'part'),
  [
    (['colour=1,2'], '--sweep=colour=1,2 is not a field of its own'),
    (['store=a,b'], 'a run has no field store to sweep: use some of'),
    (['k'], '--sweep=k is not a field of its own and its values'),
    (['k='], '--sweep=k= is not a field'),
    (['k=1,2', 'k=3'], '--sweep=k=3 is not a field of its own'),
    (['k=1,many'], "--sweep=k=1,many: 'many' is not an integer"),
    (['k=1,'], "--sweep=k=1,: '' is not an integer"),
    (['learning_rate=fast'], 'could not convert string to float'),
    (['activation=sine'], 'should be one of'),
    (['k=2,9999'], 'k 9999 exceeds n_latents 64'),
    (['batch_size=64,128'], 'batch_size differs between runs'),
  ],
)
def test_a_wrong_sweep_is_refused_in_one_line(store, tmp_path, sweep, part):
  flags = runs.flags(store, str(tmp_path / 'run'))
  flags += [f'--sweep={some}' for some in sweep]
  lines = one_line(binaries.run('sae-train', *flags), 2, part)
  assert len(lines) == 1
  assert not (tmp_path / 'run').exists()


@pytest.fixture(scope='module')
def swept(tmp_path_factory):
  """A store, the folder of a sweep over it, and what the sweep said."""
  folder = tmp_path_factory.mktemp('sweep')
  store, workdir = str(folder / 'store'), folder / 'runs'
  planted.write_store(store)
  flags = runs.flags(store, str(workdir))
  flags += ['--sweep=seed=0,1', '--sweep=activation=topk,relu']
  found = binaries.run('sae-train', *flags)
  assert found.returncode == 0, found.stderr
  return store, workdir, found.stdout


def test_a_sweep_trains_all_combinations(swept, tmp_path):
  store, workdir, out = swept
  names = [
    f'seed={seed}_activation={activation}'
    for seed in (0, 1)
    for activation in ('topk', 'relu')
  ]
  assert sorted(path.name for path in workdir.iterdir()) == sorted(names)
  assert out.splitlines() == [
    f'{workdir / name}: trained to step 30' for name in names
  ]
  alone = str(tmp_path / 'alone')
  binaries.run('sae-train', *runs.flags(store, alone, seed=1))
  runs.assert_same_run(str(workdir / 'seed=1_activation=topk'), alone)


def test_a_run_that_is_longer_than_asked_is_left_alone(swept):
  store, workdir, _ = swept
  one = str(workdir / 'seed=1_activation=topk')
  found = binaries.run('sae-train', *runs.flags(store, one, seed=1, steps=20))
  assert found.stdout == f'{one}: trained to step 30\n'


def test_verify_prints_a_line_for_each_array(swept, tmp_path):
  _, workdir, _ = swept
  ended = binaries.run('sae-train', '--verify', f'--workdir={workdir}')
  assert ended.returncode == 0, ended.stderr
  lines = ended.stdout.splitlines()
  assert all(line.endswith(' bytes, as saved') for line in lines)
  places = {line.rpartition(': ')[0] for line in lines}
  assert len(places) == len(lines)
  for name in ('seed=0_activation=topk', 'seed=1_activation=relu'):
    assert f'{workdir / name}/checkpoints/30/sae/w_enc_ND' in places
  run = tmp_path / 'run'
  shutil.copytree(workdir / 'seed=0_activation=topk', run)
  (run / 'checkpoints/30/adam/manifest.ocdbt').unlink()
  ended = binaries.run('sae-train', '--verify', f'--workdir={run}')
  assert ended.returncode == 2
  assert f'{run}/checkpoints/30/adam/count: damaged: ' in ended.stdout
  assert f'{run}/checkpoints/30/ema/count: int32 [], 4 bytes' in ended.stdout
  last = ended.stderr.splitlines()[-1]
  assert last.startswith('error: ') and 'delete the folder of such a' in last
  one_line(
    binaries.run('sae-train', '--verify', f'--workdir={tmp_path / "none"}'),
    2,
    'no checkpoints under',
  )
  one_line(
    binaries.run('sae-train', f'--workdir={run}'), 2, '--store is required'
  )


def test_debug_nans_stops_where_one_is_made(tmp_path):
  store = str(tmp_path / 'store')
  runs.write_spoilt_store(store)
  flags = runs.flags(store, str(tmp_path / 'run'), sample_rows=50)
  found = binaries.run('sae-train', *flags, '--debug_nans')
  # JAX tells on its output that it looks for the operation.
  assert found.returncode == 1 and 'Traceback' not in found.stderr
  last = found.stderr.splitlines()[-1]
  assert last.startswith('error: invalid value (nan) encountered in sub')
  # Control: without it the step is named and no operation.
  last = one_line(binaries.run('sae-train', *flags), 1)[-1]
  assert last.startswith('error: loss nan') and 'encountered' not in last


def test_debug_nans_changes_no_metric(swept, tmp_path):
  store, workdir, _ = swept
  debugged = str(tmp_path / 'run')
  flags = runs.flags(store, debugged, seed=1)
  binaries.run('sae-train', *flags, '--debug_nans')
  assert runs.log(debugged) == runs.log(workdir / 'seed=1_activation=topk')
