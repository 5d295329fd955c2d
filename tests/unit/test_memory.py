"""Runs that cannot be in memory are refused before they begin."""

import dataclasses

import jax
import pytest

from sae_jax import errors, mesh
from sae_jax.autoencoder import SaeConfig
from sae_jax.harvesting.config import HarvestConfig
from sae_jax.probing.examples import FeatureConfig
from sae_jax.training import memory, state
from tests.support import binaries, planted, runs

GIB = 2**30


def config(n_latents, **changes):
  sae = SaeConfig(d_model=1024, n_latents=n_latents, k=8)
  return planted.train_config(sae=sae, **changes)


def of(data, latent):
  return mesh.make_mesh(data, latent, jax.devices()[: data * latent])


@pytest.mark.parametrize(
  ('activation', 'freeze'),
  [('topk', 'encoder'), ('batchtopk', 'decoder'), ('jumprelu', 'none')],
)
def test_a_state_has_the_bytes_of_its_arrays(activation, freeze):
  made = config(4096)
  made = dataclasses.replace(
    made,
    sae=dataclasses.replace(made.sae, activation=activation),
    optimizer=dataclasses.replace(made.optimizer, freeze=freeze),
  )
  arrays = jax.tree.leaves(state.abstract_state(made, of(1, 1)))
  size = sum(array.size * array.dtype.itemsize for array in arrays)
  assert 0.999 * size < memory.state_bytes(made) <= size


@pytest.mark.parametrize(
  ('configs', 'fits'),
  [
    # 4 x 2 x 8 KiB for each latent.
    ([config(2**17)], False),
    ([config(2**16 - 2**10)], True),
    # All states of a sweep at once.
    ([config(2**16 - 2**10)] * 2, False),
    ([config(2**10, batch_size=2**21)], False),
    ([config(2**10, batch_size=2**19)], True),
  ],
)
def test_states_and_batch_must_fit(configs, fits, monkeypatch):
  monkeypatch.setattr(memory, 'device_bytes', lambda mesh: 2 * GIB)
  if fits:
    memory.check(configs, of(1, 1))
    return
  with pytest.raises(errors.UserError, match=r'device, which has 2\.00 GiB'):
    memory.check(configs, of(1, 1))


def test_what_is_not_known_is_not_refused(monkeypatch):
  monkeypatch.setattr(memory, 'device_bytes', lambda mesh: None)
  memory.check([config(2**31 - 1)], of(1, 1))


def test_a_host_has_the_memory_that_its_container_may_use(tmp_path):
  physical = memory.host_bytes(str(tmp_path / 'none'))
  assert physical > GIB / 4
  assert memory.device_bytes(of(1, 1)) == memory.host_bytes()
  limit = tmp_path / 'limit'
  for text, want in (
    ('max', physical),
    ('1048576', 2**20),
    ('9' * 19, physical),
  ):
    limit.write_text(text + '\n')
    assert memory.host_bytes(str(limit)) == want


@pytest.mark.parametrize(
  ('flag', 'part'),
  [
    ('n_latents=1e12', 'n_latents 1000000000000 must be 2147483647 or less'),
    ('n_latents=2e9', 'the state of the run takes 983.48 GiB and a batch'),
    ('batch_size=1e12', 'batch_size 1000000000000 must be 2147483647 or less'),
  ],
)
def test_sizes_beyond_everything_are_one_line(flag, part, store, tmp_path):
  flags = runs.flags(store, str(tmp_path / 'run'))
  found = binaries.run('sae-train', *flags, f'--{flag}')
  (line,) = found.stderr.splitlines()
  assert found.returncode == 2 and part in line
  assert not (tmp_path / 'run').exists()


def test_a_shard_has_an_index_that_can_be_in_memory():
  with pytest.raises(errors.UserError, match=r'must be 2147483648 or less'):
    HarvestConfig(shard_rows=10**12)


@pytest.mark.parametrize(
  'name',
  [
    'top_examples', 'random_examples', 'window_before', 'window_after',
    'votes', 'neighbours',
  ],
)  # fmt: skip
def test_a_feature_table_has_a_size_before_anything_is_scored(name):
  with pytest.raises(errors.UserError, match=f'{name} .* must be 10000 or les'):
    FeatureConfig(**{name: 10**12})
