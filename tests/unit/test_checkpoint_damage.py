"""Damaged checkpoints: named, or the same bits are read."""

import os
import random

import pytest

from sae_jax import checkpoint, errors
from tests.support import runs
from tests.support.checkpoints import as_in_a_bucket, contents, save

FLIPS = int(os.environ.get('SAE_JAX_FLIPS', 12))
SAVED = contents(d_model=16, n_latents=64)


@pytest.fixture(scope='module', params=['disk', 'bucket'])
def saved(request, tmp_path_factory):
  """A workdir with a checkpoint, laid out as on disk or in a bucket."""
  with pytest.MonkeyPatch.context() as patch:
    if request.param == 'bucket':
      as_in_a_bucket(patch)
    workdir = tmp_path_factory.mktemp(request.param) / 'run'
    save(str(workdir), SAVED)
    yield workdir


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
