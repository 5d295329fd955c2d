"""Tensors that are saved as arrays, and saved arrays read as tensors."""

import dataclasses
import json
import pathlib
import shutil
import time

import jax
import numpy as np
import pytest

from sae_jax import checkpoint, errors
from sae_jax.storage import orbax as orbax_lib
from sae_jax.storage import saved_arrays, saved_tensors, tensors
from tests.support import runs
from tests.support.checkpoints import as_in_a_bucket, contents, METADATA, save

# Five chunks of each matrix, the last one as long as the others.
SAVED = contents(d_model=16, n_latents=80)
_CHUNK_BYTES = 16 * 16 * 4


@pytest.fixture(autouse=True, scope='module')
def _registered():
  saved_tensors.register()


def as_tensors(sae, change=lambda name, values: values):
  """The arrays as tensors; and the sizes of all parts that are asked for."""
  sizes = []

  def tensor(path, array):
    held = tensors.from_array(change(path[-1], np.asarray(array)))

    def part(ranges):
      values = held.part(ranges)
      sizes.append(np.size(values))
      return values

    return dataclasses.replace(held, part=part)

  return jax.tree_util.tree_map_with_path(tensor, sae), sizes


@pytest.fixture(name='layout', params=['disk', 'bucket'])
def layout_fixture(request, monkeypatch):
  monkeypatch.setattr(orbax_lib, '_CHUNK_BYTES', _CHUNK_BYTES)
  if request.param == 'bucket':
    as_in_a_bucket(monkeypatch)


def described(workdir):
  """What lies beside the values of all arrays."""
  folder = pathlib.Path(workdir, 'checkpoints/7/sae')
  arrays = {
    name: saved_arrays.open_array(str(folder), name)
    for name in saved_arrays.names(str(folder))
  }
  assert all(map(saved_arrays.has_digests, arrays.values()))
  chunks = json.loads((folder / 'array_metadatas/process_0').read_text())
  return (
    {
      name: array.spec().to_json()['metadata'] for name, array in arrays.items()
    },
    json.loads((folder / '_METADATA').read_text()),
    chunks,
  )


def test_a_tensor_is_saved_as_an_array_is(layout, tmp_path):
  arrays, lazy, wrong = (str(tmp_path / name) for name in 'abc')
  save(arrays, SAVED)
  sae, sizes = as_tensors(SAVED.sae)
  save(lazy, dataclasses.replace(SAVED, sae=sae))
  assert described(lazy) == described(arrays)
  assert max(sizes) == 16 * 16 and sizes.count(16 * 16) == 2 * 5
  want = checkpoint.load(arrays, average=False)
  got = checkpoint.load(lazy, average=False)
  runs.assert_same_bits(got.sae, want.sae)
  with checkpoint.open_checkpointer(lazy) as checkpointer:
    resumed = checkpoint.read(checkpointer, 7, SAVED)
  runs.assert_same_bits(resumed.parts(), SAVED.parts())

  # Control: the last value of one array is another one.
  def change(key, values):
    if str(key) != '.b_pre_D':
      return values
    return np.append(values[:-1], np.nextafter(values[-1], np.float32(9)))

  sae, _ = as_tensors(SAVED.sae, change)
  save(wrong, dataclasses.replace(SAVED, sae=sae))
  with pytest.raises(AssertionError):
    runs.assert_same_bits(checkpoint.load(wrong, average=False).sae, want.sae)


def test_nothing_is_left_of_a_tensor_that_cannot_be_read(tmp_path):
  def part(ranges):
    raise errors.UserError('the file ends too early: get it again')

  sae, _ = as_tensors(SAVED.sae)
  sae = sae.replace(w_dec_ND=dataclasses.replace(sae.w_dec_ND, part=part))
  with pytest.raises(errors.UserError, match='ends too early: get it again'):
    save(str(tmp_path / 'a'), dataclasses.replace(SAVED, sae=sae))
  with pytest.raises(errors.UserError, match='no finished checkpoint'):
    checkpoint.opened(str(tmp_path / 'a'))


def test_a_save_may_take_as_long_as_it_is_said(tmp_path):
  sae, _ = as_tensors(SAVED.sae)
  whole = sae.b_pre_D.part

  def part(ranges):
    time.sleep(1.5)
    return whole(ranges)

  slow = sae.replace(b_pre_D=dataclasses.replace(sae.b_pre_D, part=part))
  held = dataclasses.replace(SAVED, sae=slow)

  def save_within(timeout_s):
    with checkpoint.open_checkpointer(
      str(tmp_path / str(timeout_s)), timeout_s=timeout_s
    ) as checkpointer:
      checkpoint.save(checkpointer, 7, held, METADATA).result()

  save_within(60)
  with pytest.raises(TimeoutError):
    save_within(1)


def test_a_checkpoint_is_read_as_tensors(layout, tmp_path):
  workdir = str(tmp_path / 'run')
  save(workdir, SAVED)
  opened, loaded = checkpoint.opened(workdir), checkpoint.load(workdir)
  assert (opened.config, opened.metadata) == (loaded.config, loaded.metadata)
  read = jax.tree.map(lambda tensor: tensor.read(), opened.sae)
  runs.assert_same_bits(read, loaded.sae)
  with pytest.raises(AssertionError):
    runs.assert_same_bits(read, checkpoint.load(workdir, average=False).sae)
  matrix = opened.sae.w_enc_ND
  assert matrix.chunk == (16, 16)
  part_ND = matrix.part(((10, 40), (3, 9)))
  np.testing.assert_array_equal(part_ND, loaded.sae.w_enc_ND[10:40, 3:9])
  # Blocks end where chunks do, if they are as large as one.
  assert [len(b) for b in matrix.blocks(40 * 64)] == [32, 32, 16]
  assert len(list(matrix.blocks(12 * 64))) == 7


def test_damage_of_what_is_read_as_tensors_is_named(tmp_path, monkeypatch):
  as_in_a_bucket(monkeypatch)
  workdir = tmp_path / 'run'
  save(str(workdir), SAVED)
  opened = checkpoint.opened(str(workdir))
  # The average is read, not the last parameters.
  for place, is_read in (('sae/w_dec_ND', 0), ('ema/ema.w_dec_ND', 1)):
    path = workdir / 'checkpoints/7' / place / 'c/0/0'
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    if not is_read:
      opened.sae.w_dec_ND.read()
      continue
    with pytest.raises(
      errors.UserError, match=r'ema\.w_dec_ND of .* is damaged'
    ):
      opened.sae.w_dec_ND.read()
  shutil.rmtree(workdir / 'checkpoints/7')
  with pytest.raises(errors.UserError, match='no finished checkpoint'):
    checkpoint.opened(str(workdir))


def test_chunks_of_the_other_order_are_read_once(monkeypatch):
  """Each block would have a part of every chunk."""
  array = np.random.default_rng(0).normal(size=(300, 40)).astype('f')
  held, read = tensors.from_array(array), []

  def part(ranges):
    read.append(held.part(ranges))
    return read[-1]

  stored = dataclasses.replace(held, part=part, chunk=(30, 40))
  assert tensors.by_rows(stored.T).part is not None
  monkeypatch.setattr(tensors, '_BLOCK', 60 * 40 * 4)
  turned = tensors.by_rows(stored.T)
  assert turned.chunk is None and tensors.by_rows(stored) is stored
  np.testing.assert_array_equal(
    np.concatenate(list(turned.blocks(5 * 300 * 4))), array.T
  )
  assert sum(values.nbytes for values in read) == array.nbytes
  # Control: without the copy each block reads again.
  read.clear()
  list(stored.T.blocks(5 * 300 * 4))
  assert len(read) == 8
