"""Damaged checkpoints: named, or the same bits are read."""

import dataclasses
import logging
import os
import random
import shutil
import types

import jax
import numpy as np
import pytest

from sae_jax import checkpoint, errors
from sae_jax.storage import orbax as orbax_lib
from sae_jax.storage import saved_arrays
from sae_jax.training import saver as saver_lib
from tests.support import runs
from tests.support.checkpoints import (
  as_in_a_bucket,
  contents,
  METADATA,
  save,
  without_digests,
)

FLIPS = int(os.environ.get('SAE_JAX_FLIPS', 8))
SAVED = contents(d_model=16, n_latents=64)


@pytest.fixture(scope='module', params=['disk', 'bucket'])
def saved(request, tmp_path_factory):
  """A workdir with a checkpoint, laid out as on disk or in a bucket."""
  workdir = tmp_path_factory.mktemp(request.param) / 'run'
  with pytest.MonkeyPatch.context() as patch:
    if request.param == 'bucket':
      as_in_a_bucket(patch)
    save(str(workdir), SAVED)
  return workdir


@pytest.fixture
def in_files(tmp_path, monkeypatch):
  """A workdir with checkpoints of steps 7 and 9, a file for each chunk."""
  as_in_a_bucket(monkeypatch)
  for step in (7, 9):
    save(str(tmp_path / 'run'), SAVED, step=step)
  return tmp_path / 'run'


def read(workdir):
  """What resuming reads, and what probing does."""
  with checkpoint.open_checkpointer(str(workdir)) as checkpointer:
    metadata = checkpoint.read_metadata(checkpointer, 7)
    resumed = checkpoint.read(checkpointer, 7, SAVED)
  probed = checkpoint.load(str(workdir))
  return resumed.parts(), probed.sae, metadata, probed.metadata


def flip(workdir, rng):
  """Flips a bit of one byte; returns where, and a function that undoes it."""
  files = sorted(p for p in workdir.rglob('*') if p.is_file())
  path = rng.choices(files, [p.stat().st_size for p in files])[0]
  whole = path.read_bytes()
  at = rng.randrange(len(whole))
  bit = 1 << rng.randrange(8)
  path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
  return f'{path.relative_to(workdir)}[{at}]', lambda: path.write_bytes(whole)


def test_a_flipped_bit_is_named_or_without_effect(saved):
  right, rng, counts = read(saved), random.Random(0), [0, 0]
  for _ in range(FLIPS):
    place, undo = flip(saved, rng)
    try:
      got = read(saved)
    except errors.UserError as error:
      assert str(saved) in str(error) and len(str(error)) < 1000, place
      counts[0] += 1
    else:
      runs.assert_same_bits(got[:2], right[:2])
      assert got[2:] == right[2:], place
      counts[1] += 1
    undo()
  print('named, without effect:', counts)
  assert counts[0]
  runs.assert_same_bits(read(saved)[0], right[0])


def spoil(path):
  """Flips a bit of a number, which zstd keeps as it is."""
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def chunk(workdir, step, array='sae/w_dec_ND'):
  return workdir / 'checkpoints' / str(step) / array / 'c/0/0'


def test_damage_names_the_array_and_the_checkpoint_before(in_files):
  spoil(chunk(in_files, 9))
  folder = in_files / 'checkpoints' / '9'
  with pytest.raises(errors.UserError) as error:
    checkpoint.load(str(in_files), average=False)
  assert str(error.value).startswith(
    f'array sae/w_dec_ND of {folder} is damaged ('
  )
  assert str(error.value).endswith(
    f': delete {folder}, and the same command goes on from the checkpoint of '
    'step 7'
  )
  shutil.rmtree(folder)
  assert checkpoint.load(str(in_files)).step == 7


def test_only_what_is_used_is_read(in_files):
  """The average of some arrays, the last of others; damage elsewhere is not."""
  saved = dataclasses.replace(
    SAVED, ema={'count': SAVED.ema['count'], 'ema': dict(SAVED.ema['ema'])}
  )
  del saved.ema['ema']['w_enc_ND']
  save(str(in_files), saved, step=11)
  right = {a: checkpoint.load(str(in_files), average=a) for a in (True, False)}
  used = {
    'sae/w_dec_ND': {False}, 'ema/ema.w_dec_ND': {True},
    'sae/w_enc_ND': {True, False}, 'adam/mu.w_dec_ND': set(),
  }  # fmt: skip
  for name, by in used.items():
    path = chunk(in_files, 11, name)
    whole = path.read_bytes()
    spoil(path)
    for average in (True, False):
      if average in by:
        with pytest.raises(errors.UserError, match=f'array {name} of'):
          checkpoint.load(str(in_files), average=average)
      else:
        got = checkpoint.load(str(in_files), average=average)
        runs.assert_same_bits(got.sae, right[average].sae)
    path.write_bytes(whole)


def test_control_without_digests_damage_is_read(tmp_path, monkeypatch):
  as_in_a_bucket(monkeypatch)
  without_digests(monkeypatch)
  save(str(tmp_path), SAVED)
  right = checkpoint.load(str(tmp_path), average=False).sae.w_dec_ND
  np.testing.assert_array_equal(right, SAVED.sae.w_dec_ND)
  spoil(chunk(tmp_path, 7))
  wrong = checkpoint.load(str(tmp_path), average=False).sae.w_dec_ND
  assert (wrong != right).sum() == 1


def test_verify_reads_every_array(in_files, monkeypatch):
  spoil(chunk(in_files, 9, 'adam/mu.w_enc_ND'))
  shutil.rmtree(in_files / 'checkpoints/9/ema/count')
  without_digests(monkeypatch)
  save(str(in_files), SAVED, step=11)
  reports = list(checkpoint.verify(str(in_files)))
  steps = in_files / 'checkpoints'
  by_place = {report.place: report for report in reports}
  # That of step 7 is gone, as two are kept.
  assert (
    len(by_place) == len(reports) == 2 * len(jax.tree.leaves(SAVED.parts()))
  )
  damaged = {report.place for report in reports if not report.sound}
  assert damaged == {f'{steps}/9/adam/mu.w_enc_ND', f'{steps}/9/ema/count'}
  assert by_place[f'{steps}/9/ema/count'].text == 'damaged: count is not there'
  whole = by_place[f'{steps}/9/sae/w_dec_ND']
  assert whole.text == 'float32 [64, 16], 4,096 bytes, as saved'
  old = by_place[f'{steps}/11/sae/w_dec_ND']
  assert old.text.endswith('it carries no digest, an older version saved it')


def test_json_that_would_crash_a_parser_is_named(in_files):
  for name in ('adam/count/zarr.json', 'sae/_sharding', 'ema/_METADATA'):
    path = in_files / 'checkpoints/9' / name
    whole = path.read_bytes()
    path.write_bytes(b'[' * 200_000)
    with pytest.raises(errors.UserError, match=f'{name} is not JSON .* deep'):
      checkpoint.load(str(in_files))
    path.write_bytes(whole)
  # Of another checkpoint than that which is read: the folder must go.
  path = in_files / 'checkpoints/7/_CHECKPOINT_METADATA'
  path.write_bytes(b'[' * 200_000)
  with pytest.raises(errors.UserError, match=r'delete .*7, and .* step 9'):
    checkpoint.load(str(in_files))


@pytest.mark.parametrize(
  'old, new, part',
  [
    (b'"mse_of_mean": 2.5', b'"mse_of_mean": 3.5', 'its digest is another'),
    (b'"commit_timestamp_nsecs": 1', b'"commit_timestamp_nsecs": 1e99', ''),
    (b'"custom_metadata"', b'"custom_metadat4"', ''),
  ],
)
def test_what_a_checkpoint_says_is_compared(in_files, old, new, part):
  path = in_files / 'checkpoints/9/_CHECKPOINT_METADATA'
  data = path.read_bytes()
  assert old in data
  path.write_bytes(data.replace(old, new))
  with pytest.raises(errors.UserError, match=f'checkpoints/9.*{part}.* step 7'):
    checkpoint.load(str(in_files))


def test_the_first_checkpoint_is_looked_at(tmp_path):
  def save_and_lose(checkpointer, step):
    saving = checkpoint.save(checkpointer, step, SAVED, METADATA)
    saving.result()
    lost = tmp_path / f'checkpoints/{step}/adam/manifest.ocdbt'
    lost.unlink(missing_ok=step > 7)
    return saving

  with saver_lib.Saver(str(tmp_path)) as saver:
    saver.save(7, lambda checkpointer: save_and_lose(checkpointer, 7))
    with pytest.raises(errors.UserError, match='7 was saved, but could not be'):
      saver.save(8, lambda checkpointer: save_and_lose(checkpointer, 8))
    # Once: a look at each would cost a reading of each.
    saver.finish(8, lambda checkpointer: None)


def test_a_warning_is_left_out_of_buckets_alone(caplog):
  orbax_lib.context('/a')
  for name in ('absl', None):
    for place, shown in (('/a/b', 1), ('gs://a/b', 0)):
      caplog.clear()
      logging.getLogger(name).warning('Skipping merge of OCDBT in %s', place)
      assert len(caplog.records) == shown


def test_a_codec_without_a_configuration_gets_a_checksum():
  """TensorStore leaves the configuration out where it is all defaults."""
  codecs = [{'name': 'bytes'}, {'name': 'zstd'}]
  spec = {'base': {'metadata': {'codecs': codecs}}}
  stored = types.SimpleNamespace(
    spec=lambda: types.SimpleNamespace(to_json=lambda: spec['base'])
  )
  assert not saved_arrays.has_digests(stored)
  saved_arrays.add_digests(spec)
  assert codecs[1]['configuration'] == {'checksum': True}
  assert saved_arrays.has_digests(stored)
