"""What a loss is worth in training compute."""

from collections.abc import Callable
import csv
import io

from etils import epath
import numpy as np

from sae_jax import errors

_HEAD = ['compute', 'loss']


def read(url: str) -> Callable[[np.ndarray], np.ndarray]:
  """The compute that a loss takes, by a table of models of one family.

  Between the models of the table the logarithm of the compute is linear in the
  loss (Gao et al. 2024, section 4.1).

  Args:
    url: a CSV file with the columns `compute` and `loss`, a model each, of the
      loss that the subject has on the same kind of text; local path or URL.

  Returns:
    Losses -> compute, in the unit of the table; nan beyond its ends.

  Raises:
    UserError: if it cannot be read, or more compute does not have less loss.
  """
  try:
    text = epath.Path(url).read_text()
  except (OSError, UnicodeDecodeError) as error:
    raise errors.UserError(
      f'loss_curve {url} cannot be read: {errors.reason(error)}'
    ) from error
  rows = [row for row in csv.reader(io.StringIO(text)) if row]
  if not rows or [name.strip() for name in rows[0]] != _HEAD:
    raise errors.UserError(
      f'loss_curve {url} does not begin with the line compute,loss: give a '
      'line for each model, with its training compute and its loss'
    )
  try:
    numbers = np.array(rows[1:], np.float64)
    compute, loss = numbers.T
  except ValueError as error:
    raise errors.UserError(
      f'loss_curve {url} holds a line that is not two numbers '
      f'({errors.reason(error)}): mend it'
    ) from error
  order = np.argsort(compute)
  compute, loss = compute[order], loss[order]
  is_curve = (np.diff(loss) < 0).all() and (np.diff(compute) > 0).all()
  if len(compute) < 2 or not is_curve or compute[0] <= 0:
    raise errors.UserError(
      f'loss_curve {url} has {len(compute)} models, of which those with more '
      'compute do not all have less loss: give two or more, without outliers'
    )

  def worth(losses: np.ndarray) -> np.ndarray:
    return np.exp(
      np.interp(
        losses, loss[::-1], np.log(compute[::-1]), left=np.nan, right=np.nan
      )
    )

  return worth
