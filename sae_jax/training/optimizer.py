"""Adam as the paper uses it: projected decoder gradients, unit rows, EMA."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from sae_jax import autoencoder, errors
from sae_jax import config as config_lib
from sae_jax.ops import adam, scopes
from sae_jax.ops.adam_rows import api as adam_rows

# The value of what is left to the run, see `training.defaults`.
_AUTO = -1
# What it is where nothing is known of the run, and in long ones (Gao et al.
# 2024, appendix A).
_PAPER = {
  'warmup_steps': 0,
  'decay_steps': 0,
  'adam_b1': 0.9,
  'ema_decay': 0.999,
}
DECAYS = ('linear', 'cosine')
# The parameter with unit rows, whose step is `ops.adam_rows`.
_DECODER = 'w_dec_ND'
# The array of each part that may be frozen.
_PARTS = {'decoder': _DECODER, 'encoder': 'w_enc_ND'}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(config_lib.Config):
  """Adam's settings (Gao et al. 2024, appendix A)."""

  learning_rate: float = config_lib.option(
    0.0,
    'learning rate after the warm-up; 0 for the rule of docs/training.md: 2e-4 '
    'sqrt(2^14 / n_latents) in runs of 2^33 tokens or more, else higher',
    least=0,
  )
  warmup_steps: int = config_lib.option(
    _AUTO,
    'number of first steps over which the learning rate rises linearly from 0;'
    ' 0 for no warm-up; -1 for a twentieth of the steps in short runs, else 0',
    least=_AUTO,
  )
  decay_steps: int = config_lib.option(
    _AUTO,
    'number of last steps over which the learning rate falls to 0; 0 for a '
    'constant rate; -1 for half of the steps in short runs, else 0',
    least=_AUTO,
  )
  decay: str = config_lib.option(
    'linear', 'shape of the fall of the learning rate over decay_steps', DECAYS
  )
  clip_norm: float = config_lib.option(
    0.0,
    'global norm to which larger gradients are scaled down; 0 for no clipping',
    least=0,
  )
  adam_b1: float = config_lib.option(
    float(_AUTO),
    "decay per step of Adam's first moment; -1 for 0.7 in short runs, else 0.9",
    least=_AUTO,
    most=0.999999,
  )
  adam_b2: float = config_lib.option(
    0.999,
    "decay per step of Adam's second moment",
    least=0,
    most=0.999999,
  )
  adam_eps: float = config_lib.option(
    6.25e-10, "Adam's epsilon, added to the root of the second moment", least=0
  )
  ema_decay: float = config_lib.option(
    float(_AUTO),
    "decay per step of the parameters' moving average, which evaluations use; "
    '0 for the last parameters themselves; -1 for 0 in short runs, whose rate '
    'falls to 0, else 0.999',
    least=_AUTO,
    most=0.999999,
  )
  project_gradient: bool = config_lib.option(
    True,
    "take from the decoder's gradient its component along each row, which the "
    'unit norm of rows undoes; a control without it',
  )
  freeze: str = config_lib.option(
    'none',
    'part whose weights keep their initial values, as a control: the decoder '
    '(w_dec_ND) or the encoder (w_enc_ND). Biases and thresholds are trained '
    'in any case, so that latents of a frozen encoder still learn when to fire',
    ('none', *_PARTS),
  )

  def __post_init__(self):
    super().__post_init__()
    for name in ('adam_b1', 'ema_decay'):
      value = getattr(self, name)
      if _AUTO < value < 0:
        raise errors.UserError(f'{name} {value} must be -1, or 0 or more')

  def with_defaults(self, **values: float) -> 'OptimizerConfig':
    """Values for the settings that are left to the run, by name.

    Those that are not named get the paper's.
    """
    left = {n: v for n, v in _PAPER.items() if getattr(self, n) == _AUTO}
    named = {n: v for n, v in values.items() if n in left}
    return dataclasses.replace(self, **left | named)


class OptimizerState(NamedTuple):
  """Moments of Adam and the moving average of the parameters.

  Attributes:
    adam: optax's state: count, mu and nu shaped as `unfrozen` parameters.
    ema: optax's state: count and the undebiased average, shaped likewise.
  """

  adam: optax.ScaleByAdamState
  ema: optax.EmaState


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """The share of the peak rate at each step: warm-up, constant, decay.

  Args:
    config: gives the lengths of warm-up and decay and the decay's shape.
    steps: length of the run.

  Raises:
    UserError: if warm-up and decay are longer than the run.
  """
  config = config.with_defaults()
  if config.warmup_steps + config.decay_steps > steps:
    raise errors.UserError(
      f'warmup_steps {config.warmup_steps} + decay_steps {config.decay_steps} '
      f'exceed the {steps} steps of the run: use fewer'
    )
  pieces, borders = [optax.constant_schedule(1.0)], []
  if config.warmup_steps:
    pieces.insert(
      0,
      optax.linear_schedule(
        1 / config.warmup_steps, 1.0, max(1, config.warmup_steps - 1)
      ),
    )
    borders.append(config.warmup_steps)
  if config.decay_steps:
    fall = {
      'linear': lambda steps: optax.linear_schedule(1.0, 0.0, steps),
      'cosine': lambda steps: optax.cosine_decay_schedule(1.0, steps),
    }[config.decay]
    pieces.append(fall(config.decay_steps))
    borders.append(steps - config.decay_steps)
  return optax.join_schedules(pieces, borders)


def unfrozen(
  config: OptimizerConfig, sae: autoencoder.Sae
) -> dict[str, jax.Array]:
  """The parameters that a step changes, by name: all but a frozen part.

  A part is the vectors of the latents alone, as in the frozen baselines of
  Korznikov et al. 2026, section 4.1 (arXiv:2602.14111): with a frozen decoder
  encoder and biases are learned, with a frozen encoder the decoder and what
  sets each latent's threshold (b_lat, b_pre and the nonlinearity's own). The
  frozen vectors have neither moments nor an average: `autoencoder.averaged`
  takes what it has no average of as it is.
  """
  frozen = _PARTS.get(config.freeze)
  params = autoencoder.trained(sae)
  return {name: array for name, array in params.items() if name != frozen}


def init(config: OptimizerConfig, sae: autoencoder.Sae) -> OptimizerState:
  """Zero moments and a zero average."""
  config = config.with_defaults()
  params = unfrozen(config, sae)
  return OptimizerState(
    adam=optax.scale_by_adam().init(params),
    ema=optax.ema(config.ema_decay).init(params),
  )


@jax.named_scope(scopes.OPTIMIZER)
def update(
  config: OptimizerConfig,
  sae: autoencoder.Sae,
  state: OptimizerState,
  grads: autoencoder.Sae,
  rate: jax.Array,
  *,
  unit_rows: bool = True,
  only_if: jax.Array | None = None,
  implementation: str | None = None,
  mesh: Mesh | None = None,
) -> tuple[autoencoder.Sae, OptimizerState, jax.Array]:
  """One step: project, clip, Adam, unit rows, moving average.

  Nothing of a frozen part is read but the part itself.

  Args:
    config: Adam's and the average's settings, and the part that is frozen.
    sae: parameters.
    state: the optimiser's state.
    grads: gradients, shaped as `sae`.
    rate: this step's learning rate.
    unit_rows: whether decoder rows have unit norm and keep it; otherwise the
      decoder is a parameter as others are.
    only_if: a bool; unless it is true and the norm finite, parameters and state
      come back unchanged. None takes the step in any case.
    implementation: of the decoder's step, see `ops.adam_rows.api`: 'pallas'
      for one pass over it; another, or None, for plain JAX.
    mesh: mesh over which the latents are sharded, None for one device; only
      'pallas' needs it.

  Returns:
    The new parameters, with `unit_rows` decoder rows of unit norm again, the
    new state, and
    the global norm of the projected gradients before clipping, without those
    of a frozen part.
  """
  config = config.with_defaults()
  params, gradients = unfrozen(config, sae), unfrozen(config, grads)
  trees = (params, state.adam.mu, state.adam.nu, state.ema.ema, gradients)
  arrays = {name: [tree[name] for tree in trees] for name in params}
  # None if it is frozen.
  decoder = arrays.pop(_DECODER, None) if unit_rows else None
  where = {'implementation': implementation, 'mesh': mesh}
  squares = {name: jnp.sum(g * g) for name, (*_, g) in arrays.items()}

  def global_norm():
    # Summed in the order of the names, as optax sums a tree.
    return jnp.sqrt(optax.tree.sum(squares))

  norm, scale, take = None, 1.0, None
  if config.clip_norm or only_if is not None:
    # The norm must be known before the step overwrites anything.
    if decoder:
      squares[_DECODER] = adam_rows.squared_norm(
        decoder[0], decoder[-1], project=config.project_gradient, **where
      )
    norm = global_norm()
    if config.clip_norm:
      # With a norm of 0 the quotient is inf, and the minimum 1.
      scale = jnp.minimum(1, config.clip_norm / norm)
    if only_if is not None:
      take = only_if & jnp.isfinite(norm)
  settings = _settings(config)
  corrections = adam.corrections(
    state.adam.count, config.adam_b1, config.adam_b2
  )
  shared = (rate, corrections, scale, take)
  new = {
    name: adam.step(*own, *shared, **settings) for name, own in arrays.items()
  }
  if decoder:
    *new[_DECODER], decoder_squares = adam_rows.adam_rows(
      *decoder,
      *shared,
      project=config.project_gradient,
      **settings,
      **where,
    )
    squares.setdefault(_DECODER, decoder_squares)
  params, mu, nu, ema = ({name: new[name][i] for name in new} for i in range(4))
  state = OptimizerState(
    optax.ScaleByAdamState(_counted(state.adam.count, take), mu, nu),
    optax.EmaState(_counted(state.ema.count, take), ema),
  )
  norm = global_norm() if norm is None else norm
  return autoencoder.with_arrays(sae, params), state, norm


def _settings(config):
  """Adam's settings by the names of `ops.adam`."""
  return {
    'b1': config.adam_b1,
    'b2': config.adam_b2,
    'eps': config.adam_eps,
    'ema_decay': config.ema_decay,
  }


def _counted(count, take):
  """The count of steps after this one, if it is taken."""
  steps = optax.safe_increment(count)
  return steps if take is None else jnp.where(take, steps, count)
