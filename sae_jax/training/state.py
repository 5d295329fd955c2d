"""The state of training, which a step reads and writes, on a mesh."""

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
import numpy as np

from sae_jax import autoencoder, errors
from sae_jax import mesh as mesh_lib
from sae_jax.training import given
from sae_jax.training import optimizer as optimizer_lib
from sae_jax.training.config import TrainConfig
from sae_jax.training.optimizer import OptimizerState


@flax.struct.dataclass
class TrainState:
  """Everything a step reads and writes.

  Attributes:
    sae: parameters.
    optimizer: moments and moving average.
    silent_N: tokens since each latent last fired, over the global batch.
    mse_of_mean: the constant that NMSE divides by.
    step: number of steps done.
    skipped: number of those that were skipped as not finite.
  """

  sae: autoencoder.Sae
  optimizer: OptimizerState
  silent_N: jax.Array
  mse_of_mean: jax.Array
  step: jax.Array
  skipped: jax.Array


def abstract_sae(config: autoencoder.SaeConfig) -> autoencoder.Sae:
  return jax.eval_shape(
    lambda: autoencoder.init_weights(config, jax.random.key(0))
  )


def _before_the_first_step(
  config: TrainConfig, sae: autoencoder.Sae, mse_of_mean: jax.Array
) -> TrainState:
  return TrainState(
    sae=sae,
    optimizer=optimizer_lib.init(config.optimizer, sae),
    silent_N=jnp.zeros((config.sae.n_latents,), jnp.int32),
    mse_of_mean=mse_of_mean,
    step=jnp.zeros((), jnp.int32),
    skipped=jnp.zeros((), jnp.int32),
  )


def init_state(
  config: TrainConfig, mesh: Mesh, sample_BD: np.ndarray
) -> TrainState:
  """The state before the first step, made shard by shard on the mesh.

  The autoencoder is a fresh one, or that of `config.from_checkpoint`.

  Args:
    config: the run.
    mesh: where the state lies; its values do not depend on it.
    sample_BD: raw activations from the start of the run.

  Raises:
    UserError: if they are all equal but for rounding, or not finite, or fewer
      than a decoder that starts from them has latents.
  """
  if config.from_checkpoint:
    return _from_checkpoint(config, mesh, sample_BD)
  sae_config = config.sae

  def weights(key):
    return autoencoder.init_weights(sae_config, key)

  sae_shapes = abstract_sae(sae_config)
  sae = jax.jit(weights, out_shardings=mesh_lib.shardings(sae_shapes, mesh))(
    jax.random.key(config.seed)
  )
  specs = mesh_lib.specs(sae_shapes)
  fit = jax.shard_map(
    lambda sae, sample_BD, start: autoencoder.fit_inputs(
      sae_config, sae, sample_BD, start, axis='latent'
    ),
    mesh=mesh,
    in_specs=(specs, PartitionSpec(), PartitionSpec()),
    out_specs=(specs, PartitionSpec()),
  )

  def build(sae, sample_BD, start):
    return _before_the_first_step(config, *fit(sae, sample_BD, start))

  start = None
  if sae_config.decoder_init == 'data':
    start = autoencoder.data_start(sae_config, sample_BD, config.seed)
  out = mesh_lib.shardings(jax.eval_shape(build, sae, sample_BD, start), mesh)
  state = jax.jit(build, out_shardings=out)(sae, sample_BD, start)
  _check_varies(state, len(sample_BD))
  return state


def _from_checkpoint(
  config: TrainConfig, mesh: Mesh, sample_BD: np.ndarray
) -> TrainState:
  """The state of a run that begins with an autoencoder that there is."""
  sae = given.sae(config, mesh)
  mse_of_mean = given.mse_of_mean(config.sae, sae, sample_BD)

  def build(sae, mse_of_mean):
    return _before_the_first_step(config, sae, mse_of_mean)

  out = mesh_lib.shardings(jax.eval_shape(build, sae, mse_of_mean), mesh)
  state = jax.jit(build, out_shardings=out, donate_argnums=0)(sae, mse_of_mean)
  _check_varies(state, len(sample_BD))
  return state


def _check_varies(state: TrainState, rows: int) -> None:
  if not float(state.mse_of_mean) > 0:
    raise errors.UserError(
      f'the variance of the first {rows} rows is '
      f'{float(state.mse_of_mean):g}: there is nothing to learn, or they are '
      'not finite; use another store'
    )


def abstract_state(config: TrainConfig, mesh: Mesh) -> TrainState:
  """Shapes, dtypes and shardings of a state, without making one."""

  def build():
    sae = autoencoder.init_weights(config.sae, jax.random.key(0))
    mse_of_mean = jnp.zeros((), jnp.float32)
    return _before_the_first_step(config, sae, mse_of_mean)

  shapes = jax.eval_shape(build)
  return jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
    shapes,
    mesh_lib.shardings(shapes, mesh),
  )
