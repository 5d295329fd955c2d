"""Rows computed from text on meshes and in two processes."""

import pathlib
import pickle

import jax
import numpy as np
import pytest

from sae_jax import store as store_lib
from sae_jax.feed import device_window
from tests.support import processes, scans, streamed, streams, toy


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """A store of some thousand rows of text, a rule on norms with it."""
  folder = tmp_path_factory.mktemp('made')
  return streams.harvested(
    toy.write_texts(folder), folder / 'store', n_tokens=1200
  )


@pytest.fixture(scope='module', autouse=True)
def _shards():
  with pytest.MonkeyPatch.context() as patch:
    scans.small_shards(patch)
    yield


def scan(of, rows, workdir, shape):
  """What a scan gives, and its codes' own numbers."""
  scan_config = scans.config(eval_rows=60)
  return scans.numbers(
    scans.scan(scan_config, of, rows, workdir / 'scan', shape)
  )


def assert_same(got, want):
  """But for the rounding of the activations, by the subject's mesh."""
  scans.assert_same(got, want, 2e-6, but=['skew', 'std'])
  # Differences of sums of powers, of fewer digits than the sums.
  for name in {'skew', 'std'} & got.keys():
    np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('shape', [(8, 1), (1, 8), (2, 4)])
def test_a_mesh_changes_nothing(data, tmp_path, shape):
  """Batches of four contexts are as many as eight devices need."""
  rows = streamed.opened(data, tmp_path / 'text', shape, batch_rows=128)
  np.testing.assert_array_equal(rows.stream_index(), data.stream_index())
  n_rows = data.manifest.n_rows
  want_RD = data.read_rows(0, n_rows)
  np.testing.assert_allclose(
    rows.finite_rows(0, n_rows), want_RD, rtol=1e-5, atol=1e-5
  )
  raw_BD = rows.on_devices(300, 420, 128)
  assert raw_BD.sharding.shard_shape(raw_BD.shape) == (128 // shape[0], 16)


@pytest.fixture(scope='module')
def want(data, tmp_path_factory):
  """The scan of the store."""
  of = scans.trained(data)
  return scan(of, data, tmp_path_factory.mktemp('want'), (2, 4))


def test_a_scan_gives_what_that_of_the_store_does(data, want, tmp_path):
  rows = streamed.opened(data, tmp_path / 'text', (2, 4), batch_rows=128)
  got = scan(scans.trained(data), rows, tmp_path, (2, 4))
  assert_same(got, want)


def test_rows_of_one_data_shard_alone_are_seen(
  data, want, tmp_path, monkeypatch
):
  """A control: slots of the second shard are taken for the first one's."""
  whole = device_window.DeviceWindow.first_slots
  monkeypatch.setattr(
    device_window.DeviceWindow,
    'first_slots',
    lambda self: whole(self) % self._shard_rows,
  )
  rows = streamed.opened(data, tmp_path / 'text', (2, 4), batch_rows=128)
  got = scan(scans.trained(data), rows, tmp_path, (2, 4))
  assert (got['count'] != want['count']).any()


def scan_in_a_process(folder):
  """Scans as one of two processes, and keeps what it has."""
  folder = pathlib.Path(folder)
  scans.small_shards(pytest.MonkeyPatch())
  data = store_lib.open_store(str(folder.parent / 'store'))
  rows = streamed.opened(data, folder.parent / 'text', (2, 4), batch_rows=128)
  result = scans.scan(
    scans.config(eval_rows=60),
    scans.trained(data),
    rows,
    folder.parent / 'scan',
    (2, 4),
  )
  assert jax.process_count() == 2
  parts = [
    (*part, result.columns(*part))
    for part in result.held_latents[jax.process_index()]
  ]
  folder.write_bytes(pickle.dumps((result.metrics.fvu, parts)))


def test_two_processes_give_what_one_does(data, want):
  folder = pathlib.Path(data.url).parent
  code = 'import sys; from tests.mesh import test_text_rows as t; '
  code += 't.scan_in_a_process(sys.argv[1])'
  processes.run_two(code, [folder / '0', folder / '1'])
  found = [pickle.loads((folder / name).read_bytes()) for name in '01']
  assert found[0][0] == found[1][0]
  # The two are shards of the rows, and each has all latents.
  for _, parts in found:
    assert [start for start, _, _ in parts] == list(range(0, 64, 16))
    got = {
      name: np.concatenate([columns[name] for *_, columns in parts])
      for name in parts[0][2]
    }
    assert_same(got, {name: want[name] for name in got})
