"""One law of a table: fit, noise, intervals, what is left out, what is open."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from sae_jax import errors
from sae_jax.scaling import bootstrap, findings, further, holdout
from sae_jax.scaling import law as law_lib
from sae_jax.scaling import noise as noise_lib
from sae_jax.scaling.cells import Cell
from sae_jax.scaling.config import FitConfig
from sae_jax.scaling.findings import Asked, Finding
from sae_jax.scaling.forms import Form
from sae_jax.scaling.further import Further
from sae_jax.scaling.holdout import Holdout
from sae_jax.scaling.law import Law
from sae_jax.scaling.noise import Misfit, Noise


@dataclasses.dataclass(frozen=True)
class Question:
  """A law that is asked of a table.

  Attributes:
    name: short and unique, such as width_k32.
    title: what it says, in words.
    form: what is fitted.
    variables: each of the form's variables, of the rows.
    y_R: what is fitted.
    cell_R: what each row shares with its other seeds.
    asked: function from the law to the figures that it is fitted for.
    left_out: variables whose largest value is left out and predicted.
    options: cells that could be run, for what is not identified.
    k: the k that all rows share; None if they have several.
  """

  name: str
  title: str
  form: Form
  variables: Mapping[str, Any]
  y_R: Any
  cell_R: Sequence
  asked: Callable[[Law], list[Asked]]
  left_out: tuple[str, ...] = ()
  options: tuple[further.Candidate, ...] = ()
  k: int | None = None


@dataclasses.dataclass(frozen=True)
class Study:
  """A question's answer.

  Attributes:
    question: the question.
    refusal: why nothing was fitted; '' if it was.
    law: the fit, with the scale that intervals rest on.
    noise: between seeds.
    misfit: what the form misses beyond that.
    findings: the figures.
    floor_curve: values of the first floor that were tried, by how much the
      best fit with each is worse, in units of what the interval allows, and
      the least loss measured among the runs that it is under.
    holdouts: predictions of what was left out.
    further: cells that would identify figures, by the figure's name.
  """

  question: Question
  refusal: str = ''
  law: Law | None = None
  noise: Noise | None = None
  misfit: Misfit | None = None
  findings: tuple[Finding, ...] = ()
  floor_curve: tuple[Any, Any, float] | None = None
  holdouts: tuple[Holdout, ...] = ()
  further: Mapping[str, Further] = dataclasses.field(default_factory=dict)

  def finding(self, name: str) -> Finding:
    """The finding of a name."""
    return next(item for item in self.findings if item.name == name)


def run(question: Question, config: FitConfig) -> Study:
  """Answers a question; where the rows do not do, with the reason."""
  y_R = np.asarray(question.y_R, float)
  try:
    fitted = law_lib.fit(
      question.form, question.variables, y_R, config.starts, config.seed
    )
  except errors.UserError as error:
    return Study(question, refusal=str(error))
  noise = noise_lib.between_seeds(question.cell_R, np.log(y_R))
  lack = noise_lib.misfit(fitted, question.cell_R, noise)
  law = noise_lib.with_misfit(fitted, lack)
  asked = question.asked(law)
  draws = bootstrap.draws(law, question.cell_R, config.draws, config.seed)
  pairs = findings.measure(law, asked, draws, config.widest, config.confidence)
  floors = [
    (walked.value_V, walked.excess_V, item.least_loss)
    for item, (_, walked) in zip(asked, pairs, strict=True)
    if item.kind == 'floor'
  ]
  return Study(
    question,
    law=law,
    noise=noise,
    misfit=lack,
    findings=tuple(finding for finding, _ in pairs),
    floor_curve=floors[0] if floors else None,
    holdouts=tuple(
      holdout.leave_largest_out(
        question.form,
        question.variables,
        y_R,
        variable,
        config.starts,
        config.seed,
        config.confidence,
      )
      for variable in question.left_out
    ),
    further=_further(
      law, asked, [f for f, _ in pairs], question.options, config
    ),
  )


def _further(law, asked, measured, options, config) -> dict:
  """Cells for each figure that is not identified, where they can be named."""
  chosen = {}
  for item, finding in zip(asked, measured, strict=True):
    if not finding.refusal or not options:
      continue
    at, value = law, finding.estimate
    if finding.kind == 'floor' and value < 0.01 * item.least_loss:
      # Where the best fit has no floor, nothing depends on it: a small one.
      at = dataclasses.replace(law, theta_P=law.branch_FP[1])
      value = float(np.exp(item.figure.measure(at.theta_P[None])[0][0]))
    wanted = config.widest * abs(value)
    if finding.kind == 'floor':
      # Room to 0 and to the least loss, on both sides of the estimate.
      wanted = min(wanted, 1.8 * max(item.least_loss - value, 0.0))
    plan = further.choose(at, item.figure, options, wanted, config.confidence)
    if plan is not None and plan.runs:
      chosen[item.name] = plan
  return chosen


def rows_of(cells: Sequence[Cell]) -> list[tuple]:
  """What each cell shares with its other seeds."""
  return [
    (cell.n_latents, cell.k, cell.learning_rate_factor, cell.fixed_tokens)
    for cell in cells
  ]


def column(cells: Sequence[Cell], name: str) -> np.ndarray:
  """A field of all cells, as floats."""
  return np.array([getattr(cell, name) for cell in cells], float)


def candidates(cells: Sequence[Cell], ks: Sequence[int]) -> tuple:
  """Cells that could be run, at as many tokens as the nearest size took."""
  n_latents = sorted({cell.n_latents for cell in cells})
  tokens = {
    n: float(np.median([c.tokens for c in cells if c.n_latents == n]))
    for n in n_latents
  }
  d_model = cells[0].d_model

  def flops(n, k):
    del k  # A dense trainer computes all pre-activations.
    nearest = min(n_latents, key=lambda size: abs(np.log(size / n)))
    return 6.0 * n * d_model * tokens[nearest]

  return tuple(further.candidates(n_latents, ks, flops))
