"""Checkpoints: what they hold, and what reading one takes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import checkpoint, errors
from sae_jax.storage import orbax as orbax_lib
from sae_jax.storage import saved_arrays
from tests.support import runs
from tests.support.checkpoints import CONFIG, contents, METADATA, save


@pytest.mark.parametrize('activation', ['topk', 'jumprelu'])
def test_all_that_is_saved_is_read(tmp_path, activation):
  saved = contents(activation)
  save(str(tmp_path), saved)
  with checkpoint.open_checkpointer(str(tmp_path)) as checkpointer:
    assert checkpoint.read_metadata(checkpointer, 7) == METADATA
    got = checkpoint.read(checkpointer, 7, saved)
  runs.assert_same_bits(got.parts(), saved.parts())
  # Control: arrays of another shape are refused.
  wide = dataclasses.replace(
    saved, progress=saved.progress | {'silent_N': jnp.arange(9)}
  )
  with (
    checkpoint.open_checkpointer(str(tmp_path)) as checkpointer,
    pytest.raises(errors.UserError, match='7 cannot be read'),
  ):
    checkpoint.read(checkpointer, 7, wide)


def test_load_takes_shapes_and_decay_from_the_checkpoint(tmp_path):
  saved = contents()
  save(str(tmp_path), saved)
  last = checkpoint.load(str(tmp_path), average=False)
  runs.assert_same_bits(last.sae, saved.sae)
  assert (last.config, last.step, last.mse_of_mean) == (CONFIG, 7, 2.5)
  assert last.metadata.sample_rows == 9
  # As those have no field of it that are older.
  assert last.metadata.freeze == 'none'
  average = checkpoint.load(str(tmp_path))
  for name, sums in saved.ema['ema'].items():
    np.testing.assert_allclose(
      getattr(average.sae, name), sums / (1 - 0.75**2), rtol=1e-6
    )
  # Control: another decay is another correction.
  other = METADATA.train_config | {'optimizer': {'ema_decay': 0.5}}
  save(
    str(tmp_path / 'other'),
    saved,
    dataclasses.replace(METADATA, train_config=other),
  )
  wrong = checkpoint.load(str(tmp_path / 'other'))
  assert (wrong.sae.w_dec_ND != average.sae.w_dec_ND).any()


@pytest.mark.parametrize('decay, count', [(0.0, 2), (0.75, 0)])
def test_without_an_average_the_last_parameters_are_it(tmp_path, decay, count):
  """The sums, which are no numbers here, are not read."""
  saved = contents()
  sums = {name: jnp.nan * a for name, a in saved.ema['ema'].items()}
  saved = dataclasses.replace(
    saved, ema={'count': jnp.array(count), 'ema': sums}
  )
  config = METADATA.train_config | {'optimizer': {'ema_decay': decay}}
  metadata = dataclasses.replace(METADATA, train_config=config)
  save(str(tmp_path), saved, metadata)
  runs.assert_same_bits(checkpoint.load(str(tmp_path)).sae, saved.sae)


def test_large_arrays_are_saved_in_chunks(tmp_path, monkeypatch):
  """Whoever wants a part reads no more than the chunks that it touches."""
  monkeypatch.setattr(orbax_lib, '_CHUNK_BYTES', 2**10)
  saved = contents(d_model=16, n_latents=64)
  save(str(tmp_path), saved)
  folder = str(tmp_path / 'checkpoints/7/sae')
  for name, rows in (('w_dec_ND', 16), ('b_lat_N', 64)):
    array = saved_arrays.open_array(folder, name)
    assert array.chunk_layout.read_chunk.shape[0] == rows
    assert saved_arrays.has_digests(array)
  got = checkpoint.load(str(tmp_path), average=False)
  runs.assert_same_bits(got.sae, saved.sae)


def test_a_parameter_saved_as_none_is_absent(tmp_path, monkeypatch):
  """As checkpoints of version 0.1.0 have the thresholds that TopK has not."""
  saved = contents()
  parts = saved.parts()
  parts['sae']['log_threshold_N'] = None
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.Contents, 'parts', lambda self: parts)
    save(str(tmp_path), saved)
  runs.assert_same_bits(
    checkpoint.load(str(tmp_path), average=False).sae, saved.sae
  )
  with checkpoint.open_checkpointer(str(tmp_path)) as checkpointer:
    got = checkpoint.read(checkpointer, 7, saved)
  runs.assert_same_bits(got.parts(), saved.parts())


def test_metadata_that_is_damaged_or_newer_is_refused(tmp_path):
  for number, (change, message) in enumerate(
    (
      (lambda values: values.pop('train_config'), 'no train_config'),
      (lambda values: values.update(colour=1), 'has no field colour'),
    )
  ):
    workdir = str(tmp_path / str(number))
    values = dataclasses.asdict(METADATA)
    change(values)
    with checkpoint.open_checkpointer(workdir) as checkpointer:
      checkpointer.save_checkpointables_async(
        7, contents().parts(), custom_metadata=values
      ).result()
      with pytest.raises(errors.UserError, match=message):
        checkpoint.read_metadata(checkpointer, 7)
