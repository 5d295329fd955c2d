"""Adam and the moving average of its parameters, an array at a time."""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
import optax

Corrections = tuple[jax.Array, jax.Array]


def corrections(count: jax.Array, b1: float, b2: float) -> Corrections:
  """The divisors 1 - b^t that correct both moments for starting from zeros.

  Compute them once for all arrays of a step: XLA divides several arrays by a
  scalar, but multiplies a single one by its reciprocal, which rounds
  differently.

  Args:
    count: steps done before this one, t - 1.
    b1: decay of the first moment.
    b2: decay of the second moment.
  """
  steps = optax.safe_increment(count)
  return _correction(b1, steps), _correction(b2, steps)


# Compiled even where the rest is not, as in optax: the last bits of the powers
# depend on it.
@functools.partial(jax.jit, inline=True)
def _correction(decay, steps):
  return 1 - decay**steps


def step(
  p: jax.Array,
  mu: jax.Array,
  nu: jax.Array,
  ema: jax.Array,
  g: jax.Array,
  rate: jax.Array,
  corrections: Corrections,
  scale: jax.Array | float = 1.0,
  only_if: jax.Array | None = None,
  *,
  b1: float,
  b2: float,
  eps: float,
  ema_decay: float,
  constrain: Callable[[jax.Array], jax.Array] = lambda p: p,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """One step of Adam (Kingma and Ba 2015, algorithm 1), and of the average.

  The result equals that of `optax.scale_by_adam` and `optax.ema` for a tree of
  several arrays to the last bit.

  Args:
    p: parameters, of any shape; the next four are shaped likewise.
    mu: first moments.
    nu: second moments.
    ema: undebiased moving average of the parameters.
    g: gradients.
    rate: this step's learning rate.
    corrections: see `corrections`.
    scale: of the gradients.
    only_if: a bool; if it is false nothing changes. None takes the step.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    ema_decay: decay of the average.
    constrain: maps the parameters to those that are allowed, after the step.

  Returns:
    The new p, mu, nu and ema.
  """

  def select(new, old):
    return new if only_if is None else jnp.where(only_if, new, old)

  g = scale * g
  new_mu = optax.tree.update_moment(g, mu, b1, 1)
  new_nu = optax.tree.update_moment_per_elem_norm(g, nu, b2, 2)
  mean, square = map(_divided, (new_mu, new_nu), corrections)
  change = rate * (mean / (jnp.sqrt(square) + eps))
  # Select before averaging: then nothing else reads the rejected parameters,
  # and XLA fuses the select instead of materialising both.
  new_p = select(constrain(p - change.astype(p.dtype)), p)
  new_ema = optax.tree.update_moment(new_p, ema, ema_decay, 1)
  return new_p, select(new_mu, mu), select(new_nu, nu), select(new_ema, ema)


def _divided(array, scalar):
  scalar = scalar.astype(array.dtype)
  # Broadcast by itself, so that a step that is not compiled divides too.
  return array / jnp.broadcast_to(scalar, array.shape)
