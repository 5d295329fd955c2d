"""Pools of contexts through the subject, and which of their tokens are kept."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import config as config_lib
from sae_jax.activations import layout, tokenized
from sae_jax.subject import capture

# Contexts are grouped by length within so many batches; the stream keeps
# their order.
BATCHES = 8
# Batches are padded to one of so many lengths, each compiled once.
_LENGTHS = 4
_MASK = 'mask.json'


@dataclasses.dataclass(frozen=True)
class Mask:
  """Which norms are kept, of each site; `mask.json`, of the first pool."""

  median_norm: tuple[float, ...]
  norm_limit: tuple[float, ...]


def expected(config: Any, context: tokenized.Context) -> int:
  """Rows that a context should give, before the norm rule."""
  return len(context.tokens) - config.mask_first


def allowed(config: Any, positions: np.ndarray) -> np.ndarray:
  """Which tokens are kept by their place in the context, bool [l]."""
  return positions > 0 if config.mask_first else np.ones(len(positions), bool)


@functools.partial(jax.jit, static_argnames=('config', 'sites', 'dtype'))
def _residuals(config, params, tokens_BT, sites, dtype):
  """Site -> activations as they are stored, and their norms."""
  found = {}
  captured = capture.capture_many(config, params, tokens_BT, sites)
  for site, resid_BTD in captured.items():
    norm_BT = jnp.linalg.norm(resid_BTD.astype(jnp.float32), axis=-1)
    found[str(site)] = resid_BTD.astype(dtype), norm_BT
  return found


def dispatch(
  config: Any,
  subject: Any,
  sites: tuple[capture.Site, ...],
  pool: list[tokenized.Context],
) -> list:
  """Starts the forward passes of a pool, contexts of like length together.

  Args:
    config: the HarvestConfig.
    subject: the language model.
    sites: where it is read.
    pool: contexts, of which a batch takes `batch_contexts`.

  Returns:
    What `collect` takes, while the device works.
  """
  unit = math.ceil(config.context_length / _LENGTHS)
  by_length = sorted(range(len(pool)), key=lambda i: -len(pool[i].tokens))
  batches = []
  for start in range(0, len(pool), config.batch_contexts):
    batch = by_length[start : start + config.batch_contexts]
    longest = len(pool[batch[0]].tokens)
    length = min(math.ceil(longest / unit) * unit, config.context_length)
    tokens_BT = np.zeros((config.batch_contexts, length), np.int32)
    for row, i in enumerate(batch):
      tokens_BT[row, : len(pool[i].tokens)] = pool[i].tokens
    outputs = _residuals(
      subject.config, subject.params, tokens_BT, sites, config.dtype
    )
    batches.append((batch, outputs))
  return batches


def collect(
  pool: list[tokenized.Context], batches: list, name: str
) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """What a site holds of each context of a pool, in the pool's order.

  Args:
    pool: the contexts.
    batches: of `dispatch`, which are waited for.
    name: of the site.

  Returns:
    Activations [l, D] and their norms [l] of each context.
  """
  resid, norms = [None] * len(pool), [None] * len(pool)
  for batch, outputs in batches:
    resid_BTD, norm_BT = (np.asarray(array) for array in outputs[name])
    for row, i in enumerate(batch):
      length = len(pool[i].tokens)
      resid[i], norms[i] = resid_BTD[row, :length], norm_BT[row, :length]
  return resid, norms


def fit_mask(
  config: Any,
  subject: Any,
  sites: tuple[capture.Site, ...],
  pool: list[tokenized.Context],
  writer: Any,
) -> Mask:
  """The mask that the store has, or that its first pool gives.

  Raises:
    UserError: if a site of the pool is finite nowhere.
  """
  found = layout.read_json(writer.url, _MASK, Mask)
  if found is not None:
    return found
  batches, medians = dispatch(config, subject, sites, pool), []
  for name in writer.plan.sites:
    _, norms = collect(pool, batches, name)
    positions = np.concatenate([context.positions for context in pool])
    finite = np.concatenate(norms)[allowed(config, positions)]
    finite = finite[np.isfinite(finite)]
    if not len(finite):
      raise config_lib.UserError(
        f'no activation at {name} of the first contexts is finite: '
        "check the subject's weights"
      )
    medians.append(float(np.median(finite)))
  multiple = config.mask_norm_multiple
  limits = [multiple * median if multiple else math.inf for median in medians]
  return writer.agree(_MASK, Mask(tuple(medians), tuple(limits)))
