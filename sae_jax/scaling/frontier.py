"""The compute-optimal frontier of L(n, T) = A n^bn + B T^bt + C.

Training costs 6 n d T FLOPs in a dense trainer. At the least loss for its
FLOPs, n grows like their power bt / (bn + bt), tokens like bn / (bn + bt), and
the loss above C falls like -bn bt / (bn + bt) (approach 3 of Hoffmann et al.
2022; the parabolas of approach 2 are biased even without noise).
"""

import dataclasses

import numpy as np

from sae_jax.scaling.law import Law
from sae_jax.scaling.profile import Figure


def exponents(law: Law) -> dict[str, Figure]:
  """Of n, of tokens and of the loss above the floor, as powers of FLOPs."""
  names = [c.name for c in law.form.coefficients]
  at_n, at_t = names.index('bn'), names.index('bt')

  def measured(function):
    def measure(theta_FP):
      value, by_n, by_t = function(theta_FP[:, at_n], theta_FP[:, at_t])
      gradient = np.zeros_like(theta_FP)
      gradient[:, at_n], gradient[:, at_t] = by_n, by_t
      return value, gradient

    return Figure(measure)

  def of_n(n, t):
    total = _apart(n + t)
    return t / total, -t / total**2, n / total**2

  def of_tokens(n, t):
    total = _apart(n + t)
    return n / total, t / total**2, -n / total**2

  def of_loss(n, t):
    total = _apart(n + t)
    return n * t / total, (t / total) ** 2, (n / total) ** 2

  return {
    'n': measured(of_n),
    'tokens': measured(of_tokens),
    'loss': measured(of_loss),
  }


def _apart(total):
  """A sum of two exponents, of which none is 0."""
  return np.where(np.abs(total) < 1e-9, -1e-9, total)


@dataclasses.dataclass(frozen=True)
class Optimum:
  """The best use of a number of FLOPs.

  Attributes:
    flops: dense-equivalent, 6 n d T.
    n_latents: best number of latents.
    tokens: tokens that the FLOPs are enough for.
    loss: what the law expects.
  """

  flops: float
  n_latents: float
  tokens: float
  loss: float


def optimum(law: Law, flops: float, d_model: int) -> Optimum | None:
  """The best n and tokens for FLOPs; None where a loss does not fall with both.

  Args:
    law: of `forms.COMPUTE`.
    flops: dense-equivalent.
    d_model: width of the activations.
  """
  theta = dict(zip([c.name for c in law.form.coefficients], law.coefficients_P))
  alpha, beta = -theta['bn'], -theta['bt']
  if alpha <= 0 or beta <= 0:
    return None
  # d/dln n of A n^-alpha + B (C / (6 d n))^-beta is 0 there.
  pairs = flops / (6.0 * d_model)
  log_n = (
    np.log(alpha / beta) + theta['a'] - theta['b'] + beta * np.log(pairs)
  ) / (alpha + beta)
  n_latents = float(np.exp(log_n))
  tokens = pairs / n_latents
  loss = float(law.value(n=n_latents, tokens=tokens))
  return Optimum(flops, n_latents, float(tokens), loss)
