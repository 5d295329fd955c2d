"""The forms that are fitted: sums of terms, each a power law.

A term is exp of a polynomial in the logarithms of its variables, so the loss
of an autoencoder with n latents of which k are active (Gao et al. 2024,
section 3) is a sum of two:

  L(n, k) = exp(a + bk ln k + bn ln n + g ln k ln n) + exp(z + e ln k)
"""

from collections.abc import Mapping
import dataclasses
import functools
import math
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Coefficient:
  """One coefficient of a term.

  Attributes:
    name: what it is called in reports.
    variables: what its logarithms' product is multiplied by; () for the
      constant of a term.
    least, most: where an exponent is looked for, as it is at the geometric
      means of the measured variables.
  """

  name: str
  variables: tuple[str, ...] = ()
  least: float = -math.inf
  most: float = math.inf


@dataclasses.dataclass(frozen=True)
class Form:
  """A sum of terms.

  Attributes:
    name: what it is called in reports.
    text: the formula.
    terms: the coefficients of each term, its constant first.
    floor: number of the term that is left where n grows without bound; None
      if there is none.
  """

  name: str
  text: str
  terms: tuple[tuple[Coefficient, ...], ...]
  floor: int | None = None

  @functools.cached_property
  def coefficients(self) -> tuple[Coefficient, ...]:
    """All coefficients, term after term."""
    return sum(self.terms, ())

  @functools.cached_property
  def term_P(self) -> np.ndarray:
    """The number of the term that each coefficient is of."""
    counts = [len(term) for term in self.terms]
    return np.repeat(np.arange(len(counts)), counts)

  @functools.cached_property
  def is_constant_P(self) -> np.ndarray:
    """Whether each coefficient is the constant of its term."""
    return np.array([not c.variables for c in self.coefficients])

  @functools.cached_property
  def bounds(self) -> tuple[np.ndarray, np.ndarray]:
    """Least and most of each coefficient, [P] each."""
    return (
      np.array([c.least for c in self.coefficients]),
      np.array([c.most for c in self.coefficients]),
    )

  def columns(self, logs: Mapping[str, Any]) -> np.ndarray:
    """The products of logarithms, [R, P], from the logarithms [R] by name."""
    size = np.broadcast_shapes(*(np.shape(log) for log in logs.values()))
    columns = []
    for coefficient in self.coefficients:
      column = np.ones(size)
      for variable in coefficient.variables:
        column = column * logs[variable]
      columns.append(column)
    return np.stack(columns, -1)

  def without(self, term: int) -> 'Form':
    """The form without one of its terms."""
    terms = self.terms[:term] + self.terms[term + 1 :]
    return dataclasses.replace(self, terms=terms, floor=None)


SURFACE = Form(
  'surface',
  'L(n, k) = exp(a + bk ln k + bn ln n + g ln k ln n) + exp(z + e ln k)',
  (
    (
      Coefficient('a'),
      Coefficient('bk', ('k',), -3, 3),
      Coefficient('bn', ('n',), -3, 0.5),
      Coefficient('g', ('k', 'n'), -1, 1),
    ),
    (Coefficient('z'), Coefficient('e', ('k',), -2, 2)),
  ),
  floor=1,
)
WIDTH = Form(
  'width',
  'L(N) = exp(a + bn ln N) + exp(z)',
  ((Coefficient('a'), Coefficient('bn', ('n',), -3, 0.5)), (Coefficient('z'),)),
  floor=1,
)
COMPUTE = Form(
  'compute',
  'L(n, T) = exp(a + bn ln n) + exp(b + bt ln T) + exp(z)',
  (
    (Coefficient('a'), Coefficient('bn', ('n',), -3, 0.5)),
    (Coefficient('b'), Coefficient('bt', ('tokens',), -3, 0.5)),
    (Coefficient('z'),),
  ),
  floor=2,
)
POWER = Form(
  'power',
  'y(n) = exp(a + b ln n)',
  ((Coefficient('a'), Coefficient('b', ('n',), -5, 5)),),
)


@dataclasses.dataclass(frozen=True)
class Published:
  """Coefficients that others have published.

  Attributes:
    source: where.
    coefficients: of `SURFACE`, in its order.
    domain: what they were measured on, in words.
  """

  source: str
  coefficients: tuple[float, ...]
  domain: str


PAPER = Published(
  'Gao et al. 2024, "Scaling and evaluating sparse autoencoders"',
  (-0.50, 0.26, -0.017, -0.042, -1.32, -0.085),
  'GPT-4 activations, small k, trained to convergence: another subject and '
  'another metric of loss, so that only its shape can be compared',
)


def log_terms(form: Form, theta_FP, columns_RP) -> np.ndarray:
  """The logarithm of each term, [F, R, J]."""
  return np.stack(
    [
      theta_FP[:, form.term_P == term] @ columns_RP[:, form.term_P == term].T
      for term in range(len(form.terms))
    ],
    -1,
  )


def log_value(form: Form, theta_FP, columns_RP) -> tuple[Any, Any]:
  """The logarithm of the form and its gradient.

  Args:
    form: the form.
    theta_FP: coefficients of F fits.
    columns_RP: from `Form.columns`.

  Returns:
    ln y [F, R], and its derivative by each coefficient [F, R, P].
  """
  log_FRJ = log_terms(form, theta_FP, columns_RP)
  total_FR = np.logaddexp.reduce(log_FRJ, -1)
  share_FRJ = np.exp(log_FRJ - total_FR[..., None])
  return total_FR, share_FRJ[..., form.term_P] * columns_RP


def value(form: Form, theta, **variables) -> np.ndarray:
  """The form at variables, broadcast against each other.

  Args:
    form: the form.
    theta: its P coefficients.
    **variables: the variables of the form, not their logarithms.
  """
  logs = {name: np.log(np.asarray(x, float)) for name, x in variables.items()}
  columns = form.columns(logs)
  flat_RP = columns.reshape(-1, columns.shape[-1])
  log_FR, _ = log_value(form, np.asarray(theta, float)[None], flat_RP)
  return np.exp(log_FR[0]).reshape(columns.shape[:-1])
