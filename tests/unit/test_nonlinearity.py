"""The registry of nonlinearities: files that say all, and names that last."""

import inspect
import pathlib

import jax
import numpy as np
import pytest

from sae_jax import autoencoder, checkpoint
from sae_jax.autoencoder import nonlinearity, SaeConfig
from sae_jax.training import objective, train
from sae_jax.training.objective import registry
from tests.support import planted

PARAMETERS = {
  'w_enc_ND', 'w_dec_ND', 'b_lat_N', 'b_pre_D', 'data_mean_D', 'data_scale',
}  # fmt: skip
EXTRA = {
  'topk': set(),
  'batchtopk': {'threshold'},
  'gated': {'r_mag_N', 'b_mag_N'},
  'groupmax': set(),
  'jumprelu': {'log_threshold_N'},
  'relu': set(),
}


def make(name):
  config = SaeConfig(d_model=8, n_latents=16, k=2, activation=name)
  return autoencoder.init_weights(config, jax.random.key(0))


def test_names_are_the_files_and_the_default_is_first():
  folder = pathlib.Path(nonlinearity.__file__).parent
  files = {path.stem for path in folder.glob('*.py')} - {'__init__'}
  assert set(nonlinearity.NAMES) == files == set(EXTRA)
  assert nonlinearity.NAMES[0] == SaeConfig().activation == 'topk'
  text = SaeConfig.__dataclass_fields__['activation'].metadata['help']
  for name in nonlinearity.NAMES:
    assert f'{name}: {nonlinearity.summary(name)}' in text


@pytest.mark.parametrize('name', nonlinearity.NAMES)
def test_a_module_and_its_objective_define_what_is_asked_of_them(name):
  pairs = (
    (nonlinearity.Nonlinearity, nonlinearity.of(name)),
    (registry.Method, objective.of(name)),
  )
  for protocol, module in pairs:
    for constant in protocol.__annotations__:
      assert hasattr(module, constant), constant
    for function, wanted in inspect.getmembers(protocol, inspect.isfunction):
      if function.startswith('_'):
        continue
      given = inspect.signature(getattr(module, function)).parameters
      asked = list(inspect.signature(wanted).parameters)[1:]
      assert len(given) == len(asked), function


@pytest.mark.parametrize('name', nonlinearity.NAMES)
def test_arrays_have_flat_names_that_last(name):
  sae = make(name)
  arrays = autoencoder.to_dict(sae)
  assert set(arrays) == PARAMETERS | EXTRA[name]
  again = autoencoder.from_dict(arrays)
  assert jax.tree.structure(again) == jax.tree.structure(sae)
  # Whatever is trained is there, and what is not trained is trained by none.
  fixed = {'data_mean_D', 'data_scale'} | EXTRA[name]
  fixed -= set(nonlinearity.of(name).TRAINED)
  assert set(autoencoder.trained(sae)) == set(arrays) - fixed
  doubled = {n: 2 * a for n, a in arrays.items()}
  other = autoencoder.with_arrays(sae, doubled)
  for got, want in zip(jax.tree.leaves(other), jax.tree.leaves(sae)):
    np.testing.assert_array_equal(got, 2 * want)


def test_a_checkpoint_of_jumprelu_has_its_thresholds_where_they_were(
  store, tmp_path
):
  workdir = str(tmp_path / 'run')
  config = planted.train_config(
    sae=SaeConfig(d_model=16, n_latents=64, k=4, activation='jumprelu'),
    steps=2,
    mesh_latent=1,
  )
  state = train.train(config, store, workdir)
  with checkpoint.open_checkpointer(workdir) as checkpointer:
    saved = checkpointer.checkpointables_metadata(2).metadata
  assert set(saved['sae']) == PARAMETERS | {'log_threshold_N'}
  trained = set(autoencoder.trained(state.sae))
  assert 'log_threshold_N' in trained
  for moments in (
    saved['adam']['mu'],
    saved['adam']['nu'],
    saved['ema']['ema'],
  ):
    assert set(moments) == trained
  loaded = checkpoint.load(workdir, average=False)
  np.testing.assert_array_equal(
    loaded.sae.extra['log_threshold_N'], state.sae.extra['log_threshold_N']
  )
