"""One metric for every trainer, in float64.

An autoencoder is four arrays in the units of the rows:

  codes  the k largest of w_enc_ND (x - b_dec_D) + b_enc_N, those below 0 at 0
  x^     codes w_dec_ND + b_dec_D

What else a library does between rows and reconstructions (a scale of its
inputs, norms of the decoder in the pre-activations) is folded into the arrays.
Numpy is all that it needs; `torch_cell` gives it torch's tensors, on which the
same passes are faster.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np

# Elements of a block of pre-activations: 128 MiB in float64.
_BLOCK_ELEMENTS = 2**24
# Of rows of norm 1: what rounding to float32 may change in a reconstruction,
# and how near pre-activations are between which it may choose another latent.
_ROUNDING = 1e-5
# Rows of such a check.
CHECKED_ROWS = 512


@dataclasses.dataclass(frozen=True)
class Arrays:
  """An autoencoder as every trainer's is scored, float64.

  Attributes:
    w_enc_ND: encoder.
    b_enc_N: latent bias.
    w_dec_ND: decoder.
    b_dec_D: subtracted before the encoder and added after the decoder.
    k: most active latents of a row.
  """

  w_enc_ND: np.ndarray
  b_enc_N: np.ndarray
  w_dec_ND: np.ndarray
  b_dec_D: np.ndarray
  k: int


class Pass(NamedTuple):
  """What an autoencoder makes of a block of rows.

  Attributes:
    output_BD: the reconstructions, an array of the rows' library.
    n_active: active latents, over all rows.
    fired_N: which latents are active for any row, bool, of numpy.
  """

  output_BD: Any
  n_active: int
  fired_N: np.ndarray


# From a block of rows [B, D] in float64.
Forward = Callable[[Any], Pass]
# Gives the blocks anew each time that it is called.
Blocks = Callable[[], Iterator[Any]]


def pre_activations(arrays: Arrays, x_BD: np.ndarray) -> np.ndarray:
  """What the k largest of are the codes, [B, N]."""
  return (x_BD - arrays.b_dec_D) @ arrays.w_enc_ND.T + arrays.b_enc_N


def forward(arrays: Arrays, x_BD: np.ndarray) -> Pass:
  """A pass by numpy."""
  pre_BN = pre_activations(arrays, x_BD)
  idx_BK = np.argpartition(pre_BN, -arrays.k, -1)[:, -arrays.k :]
  vals_BK = np.maximum(np.take_along_axis(pre_BN, idx_BK, -1), 0)
  output_BD = np.tile(arrays.b_dec_D, (len(x_BD), 1))
  for vals_B, idx_B in zip(vals_BK.T, idx_BK.T):
    output_BD += vals_B[:, None] * arrays.w_dec_ND[idx_B]
  fired_N = np.zeros(len(arrays.b_enc_N), bool)
  fired_N[idx_BK[vals_BK > 0]] = True
  return Pass(output_BD, int((vals_BK > 0).sum()), fired_N)


def check(
  arrays: Arrays, x_BD: np.ndarray, theirs_BD: np.ndarray, fvu: float
) -> float:
  """Compares a pass with a trainer's own forward, which is in float32.

  Args:
    arrays: the autoencoder.
    x_BD: rows of norm 1.
    theirs_BD: what the trainer's own code makes of them.
    fvu: the autoencoder's; that of one that diverged is large, and so are its
      roundings.

  Returns:
    The largest difference.

  Raises:
    ValueError: if it is not one of rounding.
  """
  limit = _ROUNDING * max(1, fvu)
  x_BD = np.asarray(x_BD, np.float64)
  pre_BN = np.sort(pre_activations(arrays, x_BD), -1)
  least_B, next_B = pre_BN[:, -arrays.k], pre_BN[:, -arrays.k - 1]
  # Of others rounding may choose another latent.
  clear_B = (least_B - next_B > limit) | (least_B < limit)
  difference_BD = np.abs(theirs_BD - forward(arrays, x_BD).output_BD)
  error = float(difference_BD[clear_B].max(initial=0))
  if not error < limit or clear_B.mean() < 0.5:
    raise ValueError(
      f"reconstructions differ by {error:.2g} from the trainer's own, of "
      f'{clear_B.sum()} rows of {len(clear_B)} whose latents are clear'
    )
  return error


def score(blocks: Blocks, passes: Forward) -> dict[str, float]:
  """How well an autoencoder reconstructs rows.

  Args:
    blocks: the rows.
    passes: the autoencoder's passes over them.

  Returns:
    fvu: the squared error over that of predicting the rows' mean.
    l0: mean number of active latents of a row.
    silent: share of the latents that are active for no row.
  """
  # 1. The mean of all rows, which the error is divided by that of.
  # 2. Both errors, and who fired, block by block.
  n_rows = sum(len(x_BD) for x_BD in blocks())
  mean_D = functools.reduce(
    lambda a, b: a + b, (x_BD.sum(0) / n_rows for x_BD in blocks())
  )
  error = spread = 0.0
  active, fired_N = 0, False
  for x_BD in blocks():
    done = passes(x_BD)
    error += float(((x_BD - done.output_BD) ** 2).sum())
    spread += float(((x_BD - mean_D) ** 2).sum())
    active += done.n_active
    fired_N = fired_N | done.fired_N
  return {
    'fvu': error / spread,
    'l0': active / n_rows,
    'silent': float(1 - fired_N.mean()),
  }


def silent_share(blocks: Blocks, passes: Forward) -> float:
  """The share of the latents that are active for none of the rows.

  Args:
    blocks: the rows; no more are read once all latents have been active.
    passes: see `score`.
  """
  fired_N = False
  for x_BD in blocks():
    fired_N = fired_N | passes(x_BD).fired_N
    if fired_N.all():
      break
  return float(1 - fired_N.mean())


def block_rows(n_latents: int) -> int:
  """Rows of a block."""
  return max(1, _BLOCK_ELEMENTS // n_latents)


def blocks(
  rows: np.ndarray, n_latents: int, numbers: np.ndarray | None = None
) -> Blocks:
  """Blocks of rows in float64, by numpy.

  Args:
    rows: [R, D] of any float type, in memory or mapped.
    n_latents: the fewer, the longer the blocks.
    numbers: numbers of the rows to take; None for all.
  """
  n_rows, size = (
    len(rows if numbers is None else numbers),
    block_rows(n_latents),
  )

  def read():
    for start in range(0, n_rows, size):
      block = slice(start, start + size)
      picked = rows[block] if numbers is None else rows[numbers[block]]
      yield np.asarray(picked, np.float64)

  return read
