"""Runs of a few training steps on a mesh, and when two are the same."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np

from sae_jax import autoencoder, mesh
from sae_jax.ops import varying
from sae_jax.training import state as state_lib
from sae_jax.training import step
from tests.support import planted

STEPS = 20
ROWS = planted.activations(3000)


def config():
  """A run with AuxK and clipping taking part."""
  made = planted.train_config(steps=STEPS)
  return dataclasses.replace(
    made,
    # Dead after a few steps; k_aux is more than a shard of 1x8 has latents.
    objective=dataclasses.replace(
      made.objective, dead_after_tokens=3 * 64, k_aux=20
    ),
    optimizer=dataclasses.replace(made.optimizer, clip_norm=0.25),
  )


def batches(config, rows):
  for i in range(config.steps):
    start = i * config.batch_size
    yield rows[start : start + config.batch_size]


def make_mesh(data, latent):
  return jax.make_mesh(
    (data, latent),
    mesh.AXES,
    axis_types=(AxisType.Auto,) * 2,
    devices=jax.devices()[: data * latent],
  )


def selection(config, made):
  """A jitted function to which latents a state selects for each token."""

  def chosen(sae, x_BD):
    vals_BK, idx_BK = autoencoder.encode(config.sae, sae, x_BD, axis='latent')
    rows_B1 = jnp.arange(x_BD.shape[0])[:, None]
    none_BN = varying.zeros(
      (x_BD.shape[0], sae.w_enc_ND.shape[0]), bool, vals_BK
    )
    return none_BN.at[rows_B1, idx_BK].max(vals_BK > 0)

  specs = mesh.specs(state_lib.abstract_sae(config.sae))
  rule = mesh.RULES.spec
  shards = jax.shard_map(
    chosen, mesh=made, in_specs=(specs, rule('BD')), out_specs=rule('BN')
  )

  def select(sae, raw_BD):
    x_BD, _ = autoencoder.preprocess(config.sae, sae, raw_BD)
    return shards(sae, x_BD)

  return jax.jit(select, out_shardings=mesh.sharding(made, ''))


def run(config, shape, rows=ROWS, implementation=None):
  """A few steps on a mesh: values, selected latents, silence, last state."""
  made = make_mesh(*shape)
  state = state_lib.init_state(config, made, rows[:500])
  do = step.make_step(config, made, implementation)
  select = selection(config, made)
  values, selected, silent = [], [], []
  whole = jax.jit(lambda a: a, out_shardings=mesh.sharding(made, ''))
  for raw_BD in batches(config, rows):
    placed = jax.make_array_from_callback(
      raw_BD.shape, mesh.sharding(made, 'BD'), lambda i, a=raw_BD: a[i]
    )
    selected.append(np.asarray(select(state.sae, placed)))
    state, found = do(state, placed)
    values.append({name: float(v) for name, v in found.items()})
    silent.append(np.asarray(whole(state.silent_N)))
  return values, np.array(selected), np.array(silent), state


def assert_same_run(got, want):
  """The same latents exactly, the same values to rounding."""
  np.testing.assert_array_equal(got[1], want[1])
  np.testing.assert_array_equal(got[2], want[2])
  for a, b in zip(got[0], want[0], strict=True):
    for name in b:
      np.testing.assert_allclose(
        a[name], b[name], rtol=1e-5, atol=1e-12, err_msg=name
      )
