"""One training step: its state, and the step under jit."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
import numpy as np

from sae_jax import autoencoder, metrics, objective, optimizer, sparse
from sae_jax import config as config_lib
from sae_jax import mesh as mesh_lib
from sae_jax.optimizer import OptimizerState
from sae_jax.train_config import TrainConfig


@flax.struct.dataclass
class TrainState:
  """Everything a step reads and writes.

  Attributes:
    sae: parameters.
    optimizer: moments and moving average.
    silent_N: tokens since each latent last fired, over the global batch.
    mse_of_mean: the constant that NMSE divides by.
    step: steps done.
    skipped: those of them that were skipped, not being finite.
  """

  sae: autoencoder.Sae
  optimizer: OptimizerState
  silent_N: jax.Array
  mse_of_mean: jax.Array
  step: jax.Array
  skipped: jax.Array


# Fields whose names do not end in their axes.
_SCALARS = ('data_scale', 'mse_of_mean', 'step', 'skipped', 'count')


def _letters(path: tuple[Any, ...]) -> str:
  """The axes of a leaf of the state, from its name."""
  key = path[-1]
  name = str(getattr(key, 'name', getattr(key, 'key', key)))
  return '' if name in _SCALARS else name.rsplit('_', 1)[1]


def _specs(tree: Any) -> Any:
  return jax.tree_util.tree_map_with_path(
    lambda path, _: mesh_lib.RULES.spec(_letters(path)), tree
  )


def _shardings(tree: Any, mesh: Mesh) -> Any:
  return jax.tree_util.tree_map_with_path(
    lambda path, _: mesh_lib.sharding(mesh, _letters(path)), tree
  )


def _abstract_sae(config: autoencoder.SaeConfig) -> autoencoder.Sae:
  return jax.eval_shape(
    lambda: autoencoder.init_weights(config, jax.random.key(0))
  )


def init_state(
  config: TrainConfig, mesh: Mesh, sample_BD: np.ndarray
) -> TrainState:
  """A fresh state, made shard by shard on the mesh.

  Args:
    config: the run.
    mesh: where the state lies; its values do not depend on it.
    sample_BD: raw activations from the start of the run.

  Raises:
    UserError: if they are all equal, or not finite.
  """
  sae_config = config.sae

  def weights(key):
    return autoencoder.init_weights(sae_config, key)

  sae_shapes = _abstract_sae(sae_config)
  sae = jax.jit(weights, out_shardings=_shardings(sae_shapes, mesh))(
    jax.random.key(config.seed)
  )
  specs = _specs(sae_shapes)
  fit = jax.shard_map(
    lambda sae, sample_BD: autoencoder.fit_inputs(
      sae_config, sae, sample_BD, axis='latent'
    ),
    mesh=mesh,
    in_specs=(specs, PartitionSpec()),
    out_specs=(specs, PartitionSpec()),
  )

  def build(sae, sample_BD):
    sae, mse_of_mean = fit(sae, sample_BD)
    return TrainState(
      sae=sae,
      optimizer=optimizer.init(config.optimizer, sae),
      silent_N=jnp.zeros((sae_config.n_latents,), jnp.int32),
      mse_of_mean=mse_of_mean,
      step=jnp.zeros((), jnp.int32),
      skipped=jnp.zeros((), jnp.int32),
    )

  out = _shardings(jax.eval_shape(build, sae, sample_BD), mesh)
  state = jax.jit(build, out_shardings=out)(sae, sample_BD)
  if not float(state.mse_of_mean) > 0:
    raise config_lib.UserError(
      f'the variance of the first {len(sample_BD)} rows is '
      f'{float(state.mse_of_mean):g}: there is nothing to learn, or they are '
      'not finite; use another store'
    )
  return state


def abstract_state(config: TrainConfig, mesh: Mesh) -> TrainState:
  """Shapes, dtypes and shardings of a state, without making one."""

  def build():
    sae = autoencoder.init_weights(config.sae, jax.random.key(0))
    return TrainState(
      sae=sae,
      optimizer=optimizer.init(config.optimizer, sae),
      silent_N=jnp.zeros((config.sae.n_latents,), jnp.int32),
      mse_of_mean=jnp.zeros((), jnp.float32),
      step=jnp.zeros((), jnp.int32),
      skipped=jnp.zeros((), jnp.int32),
    )

  shapes = jax.eval_shape(build)
  return jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
    shapes,
    _shardings(shapes, mesh),
  )


def make_step(
  config: TrainConfig, mesh: Mesh, implementation: str | None = None
) -> Callable[[TrainState, jax.Array], tuple[TrainState, dict]]:
  """The jitted training step.

  Runs that differ in nothing but seed and learning rate share one program.

  Args:
    config: the run.
    mesh: axes ("data", "latent").
    implementation: of the sparse products, see `sparse.decode`.

  Returns:
    A function of a state, which is donated, and raw_BD sharded over "data",
    to the new state and a dict of scalars: loss, nmse, aux, l0,
    dead_fraction, learning_rate, grad_norm, finite, with Multi-TopK multi,
    with a baseline penalty, with kernels redone (the share of tokens that were
    encoded twice) and, where the top-k is approximate, expected_recall, and
    skipped if such steps are.
  """
  peak = optimizer.peak_rate(config.optimizer, config.sae.n_latents)
  rate = jax.make_array_from_callback(
    (),
    mesh_lib.sharding(mesh, ''),
    lambda _: np.asarray(peak, jnp.result_type(float)),
  )
  do = _program(
    _without_seed_and_rate(config),
    mesh,
    implementation,
    jax.config.jax_debug_nans,
  )
  return lambda state, raw_BD: do(state, raw_BD, rate)


def lowered(
  config: TrainConfig, mesh: Mesh, implementation: str | None = None
) -> jax.stages.Lowered:
  """The training step, ready to be compiled; no array is made.

  Args:
    config: the run, with d_model set.
    mesh: axes ("data", "latent"); of TPUs that are not here too, see `aot`.
    implementation: of the sparse products, see `sparse.decode`.

  Returns:
    The program of a state, a batch of bfloat16 activations and the peak
    learning rate.
  """
  do = _program(_without_seed_and_rate(config), mesh, implementation, False)
  raw_BD = jax.ShapeDtypeStruct(
    (config.batch_size, config.sae.d_model),
    jnp.bfloat16,
    sharding=mesh_lib.sharding(mesh, 'BD'),
  )
  rate = jax.ShapeDtypeStruct(
    (), jnp.float32, sharding=mesh_lib.sharding(mesh, '')
  )
  with jax.set_mesh(mesh):
    return do.lower(abstract_state(config, mesh), raw_BD, rate)


def _without_seed_and_rate(config):
  optimizer_config = dataclasses.replace(config.optimizer, learning_rate=0.0)
  return dataclasses.replace(config, seed=0, optimizer=optimizer_config)


@functools.lru_cache(maxsize=16)
def _program(config, mesh, implementation, debug_nans):
  share = optimizer.schedule(config.optimizer, config.steps)
  specs = _specs(_abstract_sae(config.sae))
  latents, tokens = mesh_lib.RULES.spec('N'), mesh_lib.RULES.spec('BD')
  none = PartitionSpec()
  terms_specs = objective.Terms(
    nmse=none,
    aux=none,
    multi=none,
    penalty=none,
    l0=none,
    redone=none,
    recall=none,
    fired_N=latents,
  )

  on_tpu = mesh.devices.flat[0].platform == 'tpu'
  gradients = jax.shard_map(
    lambda *args: objective.value_and_grad(
      *args,
      config.sae,
      config.objective,
      micro_batches=config.micro_batches,
      data_axis='data',
      latent_axis='latent',
      implementation=implementation,
    ),
    mesh=mesh,
    in_specs=(specs, tokens, latents, none),
    out_specs=((none, terms_specs), specs),
    # An interpreted kernel has loops that jax cannot give these types.
    check_vma=implementation != 'pallas' or on_tpu,
  )

  def step(state: TrainState, raw_BD: jax.Array, peak: jax.Array):
    x_BD, _ = autoencoder.preprocess(config.sae, state.sae, raw_BD)
    dead_N = state.silent_N >= config.objective.dead_after_tokens
    (loss, terms), grads = gradients(state.sae, x_BD, dead_N, state.mse_of_mean)
    rate = (peak * share(state.step)).astype(loss.dtype)
    skips = config.on_nonfinite == 'skip'
    chosen = sparse.choose(
      config.sae.n_latents,
      config.sae.k,
      implementation,
      config.sae.d_model,
    )
    sae, optimizer_state, norm = optimizer.update(
      config.optimizer,
      state.sae,
      state.optimizer,
      grads,
      rate,
      only_if=jnp.isfinite(loss) if skips else None,
      implementation=chosen,
      mesh=mesh,
    )
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    # Saturates, so that a latent which is silent for long stays dead.
    silent_N = jnp.minimum(state.silent_N, 2**31 - 1 - raw_BD.shape[0])
    silent_N = jnp.where(terms.fired_N, 0, silent_N + raw_BD.shape[0])
    new = TrainState(
      sae=sae,
      optimizer=optimizer_state,
      silent_N=silent_N,
      mse_of_mean=state.mse_of_mean,
      step=state.step + 1,
      skipped=state.skipped,
    )
    values = {
      'loss': loss,
      'nmse': terms.nmse,
      'aux': terms.aux,
      'l0': terms.l0,
      'dead_fraction': dead_N.mean(),
      'learning_rate': rate,
      'grad_norm': norm,
      'finite': finite,
    }
    if config.objective.multi_topk:
      values['multi'] = terms.multi
    if config.sae.activation != 'topk':
      values['penalty'] = terms.penalty
    if chosen == 'pallas':
      values['redone'] = terms.redone
      if config.objective.topk_recall < 1:
        values['expected_recall'] = terms.recall
    if skips:
      new = new.replace(
        silent_N=jnp.where(finite, new.silent_N, state.silent_N),
        skipped=state.skipped + ~finite,
      )
      values['skipped'] = new.skipped
    return new, values

  # A step that is run again to find its NaN needs its arguments.
  return jax.jit(step, donate_argnums=() if debug_nans else 0)


def make_evaluation(
  config: TrainConfig, mesh: Mesh, average: bool = True
) -> Callable[[TrainState, jax.Array], metrics.Sums]:
  """The jitted sums of one held-out batch.

  Args:
    config: the run.
    mesh: where the state lies.
    average: whether under the averaged weights or the last ones.
  """
  return _evaluation(config.sae, config.optimizer, mesh, average)


@functools.lru_cache(maxsize=16)
def _evaluation(sae_config, optimizer_config, mesh, average):
  specs = _specs(_abstract_sae(sae_config))
  none = PartitionSpec()
  out = metrics.Sums(
    tokens=none,
    error=none,
    x_D=none,
    square_D=none,
    cosine=none,
    active=none,
    fired_N=mesh_lib.RULES.spec('N'),
  )
  sums = jax.shard_map(
    lambda sae, raw_BD: metrics.evaluate_batch(
      sae_config, sae, raw_BD, data_axis='data', latent_axis='latent'
    ),
    mesh=mesh,
    in_specs=(specs, mesh_lib.RULES.spec('BD')),
    out_specs=out,
  )

  def evaluate(state: TrainState, raw_BD: jax.Array) -> metrics.Sums:
    sae = state.sae
    if average:
      sae = optimizer.averaged(optimizer_config, sae, state.optimizer.ema)
    return sums(sae, raw_BD)

  # Whole on every process, so that each can read it.
  return jax.jit(evaluate, out_shardings=mesh_lib.sharding(mesh, ''))
