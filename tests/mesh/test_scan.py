"""The scan on meshes, broken off and gone on with, and in two processes."""

import pathlib
import pickle

import jax
import numpy as np
import pytest

from sae_jax import store
from sae_jax.probing.scan import codes as codes_lib
from tests.support import processes, runs, scans

MESHES = [(1, 1), (8, 1), (1, 8), (2, 4)]


@pytest.fixture(scope='module', autouse=True)
def _shards():
  """Codes of 900 rows are in four shards."""
  with pytest.MonkeyPatch.context() as patch:
    scans.small_shards(patch)
    yield


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  return scans.data(tmp_path_factory.mktemp('store'))


def run(data, workdir, shape, scan_config=None, **kwargs):
  return scans.scan(
    scan_config or scans.config(),
    scans.trained(data),
    data,
    workdir,
    shape,
    controls={'other': scans.trained(data, 3, n_latents=32)},
    **kwargs,
  )


@pytest.fixture(scope='module')
def whole(data, tmp_path_factory):
  """A scan on 2 x 4 devices that nothing broke off, and its workdir."""
  workdir = tmp_path_factory.mktemp('whole')
  return run(data, workdir, (2, 4)), workdir


def read_codes(result):
  codes = codes_lib.open_codes(result.codes)
  return codes.read(0, codes.n_rows)


@pytest.mark.parametrize('shape', [m for m in MESHES if m != (2, 4)])
def test_every_mesh_gives_the_same(data, whole, tmp_path, shape):
  result = run(data, tmp_path, shape)
  want, _ = whole
  scans.assert_same(scans.numbers(result), scans.numbers(want), 2e-6)
  for got, of_want in zip(read_codes(result), read_codes(want)):
    np.testing.assert_allclose(got, of_want, atol=1e-6)


def files(workdir):
  """The bytes of all files of the codes."""
  folder = pathlib.Path(workdir, 'codes')
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file()
  }


def test_one_that_was_stopped_and_killed_ends_with_the_same_bytes(
  data, whole, tmp_path
):
  want, workdir = whole
  assert run(data, tmp_path, (2, 4), asked=lambda done: done == 2) is None
  done_in_all = []

  def killed(done):
    done_in_all.append(done)
    if done == 4:
      raise runs.Stop

  # It has saved after the third of its batches, and does the fourth again.
  often = scans.config(save_every_rows=3 * 128)
  with pytest.raises(runs.Stop):
    run(data, tmp_path, (2, 4), often, asked=killed)
  assert not (tmp_path / 'codes' / 'codes.json').exists()
  result = run(data, tmp_path, (2, 4), asked=done_in_all.append)
  # Two, three that were saved, one that was lost, and the rest.
  batches = 10
  assert done_in_all == [1, 2, 3, 4, *range(1, batches - 2 - 3 + 1)]
  runs.assert_same_bits(scans.numbers(result), scans.numbers(want))
  assert files(tmp_path) == files(workdir)
  # The results of a scan that was done are there at once.
  done_in_all.clear()
  again = run(data, tmp_path, (2, 4), asked=done_in_all.append)
  assert done_in_all == []
  runs.assert_same_bits(scans.numbers(again), scans.numbers(want))


def test_one_of_other_inputs_begins_again(data, whole, tmp_path):
  want, _ = whole
  run(data, tmp_path, (2, 4), asked=lambda done: done == 2, made_from='others')
  result = run(data, tmp_path, (2, 4))
  runs.assert_same_bits(scans.numbers(result), scans.numbers(want))


def test_a_state_that_is_not_merged_over_data_is_seen(
  data, tmp_path, monkeypatch
):
  """A control: examples of one data shard are not those of all."""
  monkeypatch.setattr(
    'sae_jax.probing.scan.result._tree',
    lambda merge, state: jax.tree.map(lambda a: a[0], state),
  )
  result = run(data, tmp_path / 'first', (2, 4))
  monkeypatch.undo()
  want = run(data, tmp_path / 'all', (2, 4))
  columns = scans.columns(result), scans.columns(want)
  for name in ('count', 'top_rows', 'near_rows', 'random_rows'):
    assert (columns[0][name] != columns[1][name]).any()


def scan_in_a_process(folder):
  """Scans as one of two processes, and keeps what it has."""
  folder = pathlib.Path(folder)
  scans.small_shards(pytest.MonkeyPatch())
  data = store.open_store(str(folder.parent / 'store'))
  result = run(data, folder.parent / 'scan', (2, 4))
  quality = {name: vars(of) for name, of in result.quality.items()}
  parts = [
    (*part, result.columns(*part))
    for part in result.held_latents[jax.process_index()]
  ]
  folder.write_bytes(pickle.dumps((quality, parts)))


def test_two_processes_give_what_one_does(data, whole, tmp_path):
  want, _ = whole
  scans.data(tmp_path)
  code = 'import sys; from tests.mesh import test_scan as t; '
  code += 't.scan_in_a_process(sys.argv[1])'
  processes.run_two(code, [tmp_path / '0', tmp_path / '1'])
  found = [pickle.loads((tmp_path / name).read_bytes()) for name in '01']
  for quality, parts in found:
    # The two are shards of the rows, and each has all latents.
    assert [part[0] for part in parts] == [0, 16, 32, 48]
    for first, stop, columns in parts:
      scans.assert_same(columns, want.columns(first, stop), 2e-6)
    for name, of in quality.items():
      np.testing.assert_allclose(of['nmse'], want.quality[name].nmse, rtol=1e-6)
  got = codes_lib.open_codes(str(tmp_path / 'scan' / 'codes')).read(0, 900)
  for a, b in zip(got, read_codes(want)):
    np.testing.assert_allclose(a, b, atol=1e-6)
