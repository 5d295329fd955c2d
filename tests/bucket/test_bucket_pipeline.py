"""Harvest, training, probing and page in a bucket that fails: as on a disk."""

import re

from etils import epath
import numpy as np
from orbax.checkpoint import v1 as ocp
import pytest

from sae_jax import checkpoint, errors
from sae_jax import store as store_lib
from sae_jax.feed import from_store
from sae_jax.store import reader
from sae_jax.training import saver, train
from tests.support import pipeline, planted, runs
from tests.support.gcs import gcs_faults
from tests.support.gcs.served import bucket


@pytest.mark.parametrize('rate', [0.0, 0.1])
def test_every_stage_in_a_bucket_is_that_on_disk(on_disk, monkeypatch, rate):
  texts, root = on_disk
  faults = gcs_faults.Faults(0, rate, gcs_faults.ALL_KINDS)
  with bucket(monkeypatch, faults) as server:
    pipeline.run(texts, 'gs://bucket/deep')
    print(server.table())
    state = runs.saved_state('gs://bucket/deep/run')
  # Those that are stale are left: no stage writes over an object on condition.
  met = set(server.faults_met) - {'stale'}
  assert met == (set(gcs_faults.KINDS) if rate else set())
  found = {
    name.removeprefix('deep/'): o.data
    for name, o in server.objects['bucket'].items()
  }
  pipeline.assert_as_on_disk(found, state, root)


def epoch_in_bucket(store, monkeypatch, rate):
  """Reads all batches of an epoch of a store that is copied into a bucket.

  Returns:
    The server; requests at the least: one for each shard's index and one for
    each inner chunk; bytes at the least: those of the rows.
  """
  with bucket(monkeypatch) as server:
    for name, content in pipeline.files(store).items():
      server.put('bucket', f'store/{name}', content, {})
    data = store_lib.open_store('gs://bucket/store')
    order = from_store.train_order(data, 0, 4)
    server.faults = gcs_faults.Faults(0, rate, gcs_faults.ALL_KINDS)
    server.reset_counts()
    server.log.clear()
    steps = order.n_rows // pipeline.BATCH
    for _ in from_store.StoreFeed(data, order, pipeline.BATCH).iterate(
      0, steps
    ):
      pass
  shards = int(np.searchsorted(data.starts, order.n_rows))
  print(
    f'an epoch of {steps} batches, {order.n_chunks} chunks of {shards} shards'
  )
  print(server.table(per=steps))
  return server, (shards, order.n_chunks), order.n_rows * 16 * 4


@pytest.mark.parametrize('rate', [0.0, 0.1])
def test_a_feed_reads_each_index_and_each_chunk_once(
  on_disk, monkeypatch, rate
):
  server, (shards, chunks), n_bytes = epoch_in_bucket(
    on_disk[1] / 'store', monkeypatch, rate
  )
  # No metadata, no listing, nothing whole.
  (found,) = server.counts().values()
  assert server.counts().keys() == {('GET', 'range read')}
  asked = {(path.partition('?')[0], part) for _, path, part in server.log}
  indices = {(path, part) for path, part in asked if '=-' in part}
  assert (len(indices), len(asked)) == (shards, shards + chunks)
  assert found.requests >= shards + chunks
  if not rate:
    assert found.requests == shards + chunks
  # A tenth again, and a tenth of those; more by chance.
  assert found.requests < 1.25 * (shards + chunks)
  # 4 bytes of checksum a chunk and 20 of the index, and the last chunk of a
  # shard, which is seldom full, is stored whole.
  assert n_bytes < found.sent < 1.1 * n_bytes


def test_a_cache_that_is_too_small_costs_an_index_a_chunk_at_most(
  on_disk, monkeypatch
):
  # As where chunks are of megabytes: they push the indices out.
  monkeypatch.setattr(reader, 'CACHE_BYTES', 4096)
  server, (shards, chunks), n_bytes = epoch_in_bucket(
    on_disk[1] / 'store', monkeypatch, 0.0
  )
  (found,) = server.counts().values()
  assert 1.5 * (shards + chunks) < found.requests <= 2 * chunks
  assert found.sent < 1.2 * n_bytes


def run_that_is_refused(monkeypatch, refused, times):
  """A run whose commits of some steps are answered 403 so many times.

  Returns:
    Steps whose checkpoints are whole, the error or None, and the last state
    that was saved.
  """
  left, error = [times], None

  def forbids(method, what, target):
    hit = what == 'write' and any(
      target.endswith(f'/checkpoints/{step}/commit_success.txt')
      for step in refused
    )
    left[0] -= hit
    return hit and left[0] >= 0

  with bucket(monkeypatch) as server:
    planted.write_store('gs://bucket/store')
    server.forbids = forbids
    try:
      train.train(
        planted.train_config(), 'gs://bucket/store', 'gs://bucket/run'
      )
    except errors.UserError as found:
      error = str(found)
    server.forbids = lambda *_: False
    steps = sorted(
      int(name.split('/')[2])
      for name in server.objects['bucket']
      if re.fullmatch(r'run/checkpoints/\d+/commit_success.txt', name)
    )
    state = runs.saved_state('gs://bucket/run')
  return steps, error, state


@pytest.fixture(scope='module')
def planted_run(tmp_path_factory):
  """The folder of the same run on a disk."""
  root = tmp_path_factory.mktemp('planted')
  planted.write_store(str(root / 'store'))
  train.train(planted.train_config(), str(root / 'store'), str(root / 'run'))
  return root / 'run'


@pytest.mark.parametrize(
  ('refused', 'times', 'left', 'warnings'),
  [
    # The next one takes its place.
    ([20], 1, [10, 30], 1),
    # The last one is made again, and again.
    ([30], 2, [20, 30], 2),
    ([20, 30], 4, [10, 30], 4),
  ],
)
def test_a_checkpoint_that_fails_is_saved_again(
  planted_run, monkeypatch, caplog, refused, times, left, warnings
):
  steps, error, state = run_that_is_refused(monkeypatch, refused, times)
  assert error is None
  assert steps == left
  said = [m for m in caplog.messages if 'gs://bucket/run was not saved' in m]
  assert len(said) == warnings and all('Forbidden' in m for m in said)
  runs.assert_same_bits(state, runs.saved_state(str(planted_run)))


def test_a_bucket_that_refuses_for_good_ends_the_run_in_one_line(
  monkeypatch, caplog
):
  steps, error, state = run_that_is_refused(monkeypatch, [20, 30], 99)
  assert steps == [10] and int(state.step) == 10
  assert caplog.text.count('was not saved') == saver._TRIES
  assert 'checkpoints of gs://bucket/run (that of step 10 is good)' in error
  assert 'Forbidden' in error and 'your access' in error
  assert '\n' not in error


def test_control_without_another_try_a_refusal_ends_the_run(monkeypatch):
  monkeypatch.setattr(saver, '_TRIES', 0)
  steps, error, _ = run_that_is_refused(monkeypatch, [20], 1)
  assert steps == [10]
  assert 'Forbidden' in error


def lose_answers(monkeypatch, seed):
  """What ends a run half of whose writes are not answered, or None."""
  faults = gcs_faults.Faults(seed, 0.5, ('drop-after',))
  with bucket(monkeypatch) as server:
    planted.write_store('gs://bucket/store')
    server.faults = faults
    try:
      train.train(
        planted.train_config(steps=10), 'gs://bucket/store', 'gs://bucket/run'
      )
    except errors.UserError as error:
      return str(error)
    return None


def test_control_transactions_take_their_own_write_for_another_s(monkeypatch):
  monkeypatch.setattr(saver, '_TRIES', 0)
  assert lose_answers(monkeypatch, 0) is None

  def with_ocdbt(workdir, keep=2):
    folder = epath.Path(workdir) / 'checkpoints'
    return ocp.training.Checkpointer(folder)

  monkeypatch.setattr(checkpoint, 'open_checkpointer', with_ocdbt)
  assert 'ALREADY_EXISTS' in lose_answers(monkeypatch, 0)
