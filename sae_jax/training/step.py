"""One training step under jit."""

from collections.abc import Callable
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
import numpy as np

from sae_jax import autoencoder, ops
from sae_jax import mesh as mesh_lib
from sae_jax.autoencoder import nonlinearity
from sae_jax.training import defaults, objective, optimizer
from sae_jax.training import state as state_lib
from sae_jax.training.config import TrainConfig
from sae_jax.training.state import TrainState


def make_step(
  config: TrainConfig, mesh: Mesh, implementation: str | None = None
) -> Callable[[TrainState, jax.Array], tuple[TrainState, dict]]:
  """The jitted training step.

  Runs that differ in nothing but seed and learning rate share one program.

  Args:
    config: the run.
    mesh: axes ("data", "latent").
    implementation: of the sparse products, see `ops.decode`.

  Returns:
    A function of a state, which is donated, and raw_BD sharded over "data". It
    returns the new state and a dict of scalars: loss, nmse, aux, l0,
    dead_fraction, learning_rate, grad_norm, finite, skipped (with
    on_nonfinite 'skip') and those of the nonlinearity's objective: multi with
    Multi-TopK, penalty with a baseline, threshold with BatchTopK, redone (the
    share of tokens that were encoded twice) with kernels, and expected_recall
    if their top k is approximate.
  """
  peak = defaults.learning_rate(config)
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
  """The training step, lowered for compilation; it allocates no array.

  Args:
    config: the run, with d_model set.
    mesh: axes ("data", "latent"), also of TPUs that are not here, see
      `tpu.aot`.
    implementation: of the sparse products, see `ops.decode`.

  Returns:
    The program of a state, a batch of bfloat16 activations and the peak
    learning rate.
  """
  do = _program(_without_seed_and_rate(config), mesh, implementation, False)
  raw_BD = jax.ShapeDtypeStruct(
    (config.batch_size, config.sae.row_width),
    jnp.bfloat16,
    sharding=mesh_lib.sharding(mesh, 'BD'),
  )
  rate = jax.ShapeDtypeStruct(
    (), jnp.float32, sharding=mesh_lib.sharding(mesh, '')
  )
  with jax.set_mesh(mesh):
    return do.lower(state_lib.abstract_state(config, mesh), raw_BD, rate)


def _without_seed_and_rate(config):
  # Nor does a step depend on how the weights began.
  return dataclasses.replace(
    config,
    seed=0,
    optimizer=dataclasses.replace(config.optimizer, learning_rate=0.0),
    sae=dataclasses.replace(
      config.sae,
      encoder_init='transposed',
      decoder_init='random',
      bias_init='median',
      encoder_gain='norm',
    ),
  )


@functools.lru_cache(maxsize=16)
def _program(config, mesh, implementation, debug_nans):
  share = optimizer.schedule(config.optimizer, config.steps)
  dead_after = defaults.dead_after_tokens(config)
  specs = mesh_lib.specs(state_lib.abstract_sae(config.sae))
  latents, tokens = mesh_lib.RULES.spec('N'), mesh_lib.RULES.spec('BD')
  none = PartitionSpec()

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
    out_specs=((none, mesh_lib.specs_of(objective.Terms)), specs),
    # An interpreted kernel has loops that jax cannot give these types.
    check_vma=implementation != 'pallas' or on_tpu,
  )

  def step(state: TrainState, raw_BD: jax.Array, peak: jax.Array):
    x_BD, _ = autoencoder.tokens(config.sae, state.sae, raw_BD)
    dead_N = state.silent_N >= dead_after
    (loss, terms), grads = gradients(state.sae, x_BD, dead_N, state.mse_of_mean)
    rate = (peak * share(state.step)).astype(loss.dtype)
    skips = config.on_nonfinite == 'skip'
    chosen = ops.choose(
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
      unit_rows=config.sae.decoder_norm == 'unit',
      only_if=jnp.isfinite(loss) if skips else None,
      implementation=chosen,
      mesh=mesh,
    )
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    # Saturates, so that a latent that is silent for very long stays dead.
    silent_N = jnp.minimum(state.silent_N, 2**31 - 1 - raw_BD.shape[0])
    silent_N = jnp.where(terms.fired_N, 0, silent_N + raw_BD.shape[0])
    extra = nonlinearity.of(config.sae.activation).follow(
      sae.extra, terms.observed
    )
    new = TrainState(
      sae=sae.replace(extra=extra),
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
    values |= objective.of(config.sae.activation).logged(
      config.sae, config.objective, implementation, terms
    )
    if skips:
      # The optimizer's update has kept the old parameters already.
      extra, silent_N = jax.tree.map(
        lambda after, before: jnp.where(finite, after, before),
        (new.sae.extra, new.silent_N),
        (state.sae.extra, state.silent_N),
      )
      new = new.replace(
        sae=new.sae.replace(extra=extra),
        silent_N=silent_N,
        skipped=state.skipped + ~finite,
      )
      values['skipped'] = new.skipped
    return new, values

  # A step that is run again to find a NaN needs its arguments, undonated.
  return jax.jit(step, donate_argnums=() if debug_nans else 0)
