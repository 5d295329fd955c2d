"""Checkpoints that are read onto meshes, and their fingerprints there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import autoencoder, checkpoint, errors, mesh
from tests.support import processes, runs
from tests.support.checkpoints import contents, METADATA, save

SHAPES = [(1, 1), (8, 1), (1, 8), (2, 4)]


def make_mesh(data, latent):
  return mesh.make_mesh(data, latent, jax.devices()[: data * latent])


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A checkpoint with a parameter of its own, and a decoder that is frozen."""
  workdir = str(tmp_path_factory.mktemp('run'))
  whole = contents('jumprelu', d_model=16, n_latents=64)
  # The values in it are no multiples of the weights' sum, so that they round.
  average = {n: a * jnp.pi for n, a in whole.ema['ema'].items()}
  del average['w_dec_ND']
  ema = {'count': jnp.array(5), 'ema': average}
  whole = dataclasses.replace(whole, ema=ema)
  save(workdir, whole)
  return workdir, whole


@pytest.mark.parametrize('average', [True, False])
@pytest.mark.parametrize('shape', SHAPES)
def test_a_mesh_changes_no_bit(saved, shape, average):
  workdir, whole = saved
  alone = checkpoint.load(workdir, average=average)
  want = whole.sae
  if average:
    want = autoencoder.averaged(want, whole.ema['ema'], jnp.array(5), 0.75)
  runs.assert_same_bits(alone.sae, want)
  made = make_mesh(*shape)
  got = checkpoint.load(workdir, mesh=made, average=average)
  runs.assert_same_bits(got.sae, want)
  placed = mesh.shardings(got.sae, made)
  assert jax.tree.map(lambda a: a.sharding, got.sae) == placed
  rows = got.sae.w_dec_ND.addressable_shards[0].data.shape[0]
  assert (
    rows == got.sae.extra['log_threshold_N'].addressable_shards[0].data.size
  )
  assert rows == 64 // shape[1]
  assert checkpoint.fingerprint(got.sae) == checkpoint.fingerprint(want)
  # Control: the one is not the other.
  other = checkpoint.load(workdir, mesh=made, average=not average)
  assert checkpoint.fingerprint(other.sae) != checkpoint.fingerprint(want)


def test_latents_that_a_mesh_does_not_divide_are_refused(tmp_path):
  saved = contents(n_latents=12)
  sizes = METADATA.train_config['sae'] | {'n_latents': 12}
  config = METADATA.train_config | {'sae': sizes}
  save(str(tmp_path), saved, dataclasses.replace(METADATA, train_config=config))
  with pytest.raises(errors.UserError) as error:
    checkpoint.load(str(tmp_path), mesh=make_mesh(1, 8))
  assert str(error.value) == (
    f'the 12 latents of {tmp_path} are no multiple of the latent axis (8) of '
    'the mesh: use --mesh_latent=4'
  )
  got = checkpoint.load(str(tmp_path), mesh=make_mesh(2, 4), average=False)
  runs.assert_same_bits(got.sae, saved.sae)


def load_parts(workdir):
  """Loads on a mesh of all processes, and says what this one has of it."""
  got = checkpoint.load(workdir, mesh=mesh.make_mesh(1, 8))
  parts = got.sae.w_enc_ND.addressable_shards
  rows = sum(len(part.data) for part in parts)
  print(rows, 'rows,', checkpoint.fingerprint(got.sae))


def test_two_processes_read_a_half_each(saved):
  workdir, _ = saved
  code = (
    'import sys; from tests.mesh import test_checkpoint as t; '
    't.load_parts(sys.argv[1])'
  )
  sae = checkpoint.load(workdir).sae
  want = f'32 rows, {checkpoint.fingerprint(sae)}'
  for printed in processes.run_two(code, [workdir] * 2):
    assert want in printed.splitlines()


def test_a_shard_in_another_place_is_another_autoencoder():
  """Nothing but the place of each part tells these arrays apart."""
  made = make_mesh(1, 8)
  rows_ND = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
  placed = mesh.sharding(made, 'ND')
  turned = [np.roll(rows_ND, n, axis=0) for n in range(0, 64, 8)]
  seen = {
    checkpoint.fingerprint({'w_ND': jax.device_put(a, placed)}) for a in turned
  }
  assert len(seen) == len(turned)
