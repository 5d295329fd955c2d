"""Cells of a scaling table: one finished run each."""

from collections.abc import Iterable
import dataclasses
import math

from sae_jax import errors

METRICS = ('nmse', 'fvu')
STOPS = ('tokens', 'convergence')


@dataclasses.dataclass(frozen=True)
class Cell:
  """One finished run.

  Attributes:
    n_latents: latents, N.
    k: active latents of a token.
    d_model: width of the activations.
    tokens: tokens trained on.
    seed: of weights and order.
    learning_rate: the peak of its schedule.
    learning_rate_factor: that over the rate of the run's own rule.
    loss: on held-out tokens that are the same for all cells.
    metric: what the loss is, one of METRICS.
    stop: why it ended, one of STOPS: a fixed number of tokens, or a rule of
      convergence fixed beforehand.
    flops: spent in training; nan if it was not counted.
    steps: optimiser steps.
    dead_share: share of latents that are dead at the end; nan if unknown.
    subject: the language model.
    layer: number of its block; -1 if unknown.
    site: name of the activations, such as blocks.12.resid_post.
    store: identity of the store of activations.
  """

  n_latents: int
  k: int
  d_model: int
  tokens: int
  seed: int
  learning_rate: float
  learning_rate_factor: float
  loss: float
  metric: str
  stop: str
  flops: float = math.nan
  steps: int = 0
  dead_share: float = math.nan
  subject: str = ''
  layer: int = -1
  site: str = ''
  store: str = ''

  def __post_init__(self):
    for name, least in _LEAST.items():
      value = getattr(self, name)
      if not value >= least:
        raise errors.UserError(f'{name} {value} must be {least} or more')
    for name in ('loss', 'learning_rate', 'learning_rate_factor'):
      value = getattr(self, name)
      if not (value > 0 and math.isfinite(value)):
        raise errors.UserError(f'{name} {value} must be finite and above 0')
    for name, known in (('metric', METRICS), ('stop', STOPS)):
      value = getattr(self, name)
      if value not in known:
        raise errors.UserError(
          f'{name} {value!r} is not known: use {" or ".join(known)}'
        )
    if self.k > self.n_latents:
      raise errors.UserError(f'k {self.k} exceeds n_latents {self.n_latents}')
    if self.flops <= 0 or math.isinf(self.flops):
      raise errors.UserError(f'flops {self.flops} must be finite and above 0')

  @property
  def dense_flops(self) -> float:
    """6 n d T, what a dense trainer spends: the axis of the paper's figures."""
    return 6.0 * self.n_latents * self.d_model * self.tokens

  @property
  def spent_flops(self) -> float:
    """`flops`, and `dense_flops` where it was not counted."""
    return self.dense_flops if math.isnan(self.flops) else self.flops

  @property
  def fixed_tokens(self) -> int:
    """`tokens` where they were fixed; 0 where they are a result."""
    return self.tokens if self.stop == 'tokens' else 0

  @property
  def place(self) -> tuple[str, str, int, str]:
    """What was read: only cells of one place share a law."""
    return (self.subject, self.site, self.layer, self.store)


_LEAST = {
  'n_latents': 1,
  'k': 1,
  'd_model': 1,
  'tokens': 1,
  'steps': 0,
  'layer': -1,
}
# What makes two rows the same run.
_IDENTITY = (
  'n_latents', 'k', 'fixed_tokens', 'seed', 'learning_rate_factor', 'stop',
  'metric', 'place',
)  # fmt: skip


def identity(cell: Cell) -> tuple:
  """What no two runs of a table share."""
  return tuple(getattr(cell, name) for name in _IDENTITY)


def place_name(place: tuple[str, str, int, str]) -> str:
  """A place in words."""
  subject, site, layer, store = place
  layer_name = f'layer {layer}' if layer >= 0 and not site else ''
  parts = [part for part in (subject, site, layer_name, store) if part]
  return ', '.join(parts) or 'unnamed activations'


def by_place(cells: Iterable[Cell]) -> dict[tuple, list[Cell]]:
  """The cells of each place, in the order of the table."""
  groups = {}
  for cell in cells:
    groups.setdefault(cell.place, []).append(cell)
  return groups
