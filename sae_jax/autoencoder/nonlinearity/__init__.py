"""Nonlinearities, which turn pre-activations into codes: a module each.

A nonlinearity is a file here and one of the same name in `training/objective`.
The name is a value of `SaeConfig.activation`, whose help has the first line of
the file's docstring. `Nonlinearity` lists what the file defines.
"""

import ast
import functools
import importlib
import importlib.util
import pkgutil
from typing import Protocol

import jax
import jax.numpy as jnp

_DEFAULT = 'topk'
NAMES = tuple(
  sorted(
    (module.name for module in pkgutil.iter_modules(__path__)),
    key=lambda name: (name != _DEFAULT, name),
  )
)


class Nonlinearity(Protocol):
  """The functions and constants that every module of this folder defines.

  `config` is a `SaeConfig`, `sae` a `Sae` or this shard of it, and `axis` the
  mesh axis of the latents, inside shard_map.

  Attributes:
    TRAINED: names of those of its extra parameters that are trained. A name
      means the same in all modules.
  """

  TRAINED: tuple[str, ...]

  def active_per_token(self, config) -> int | None:
    """The most active latents of a token, None if any number may be."""

  def extra(self, config, dtype: jnp.dtype) -> dict[str, jax.Array]:
    """Its own parameters before they are fitted; their names end in axes."""

  def fit(
    self, config, sae, x_BD: jax.Array, mse_of_mean: jax.Array, axis: str | None
  ) -> dict[str, jax.Array]:
    """Its parameters, fitted to an autoencoder that is otherwise ready.

    Args:
      config: the autoencoder's config.
      sae: the autoencoder.
      x_BD: preprocessed tokens from the start of a run.
      mse_of_mean: squared distance of a token from the mean, on average.
      axis: mesh axis of the latents.
    """

  def follow(
    self, extra: dict[str, jax.Array], observed: dict[str, jax.Array]
  ) -> dict[str, jax.Array]:
    """Its parameters after a step, with the untrained ones updated.

    Args:
      extra: its parameters, after the optimizer.
      observed: values that its objective took from the batch.
    """

  def codes(
    self, config, sae, x_BD: jax.Array, axis: str | None
  ) -> tuple[jax.Array, jax.Array]:
    """vals_BK and idx_BK of preprocessed tokens, see `autoencoder.encode`."""


def of(name: str) -> Nonlinearity:
  """The module of a nonlinearity."""
  return importlib.import_module(f'{__name__}.{name}')


@functools.cache
def trained_names() -> frozenset[str]:
  """Names of all extra parameters that are trained."""
  return frozenset(name for module in NAMES for name in of(module).TRAINED)


def summary(name: str) -> str:
  """The first line of a module's docstring, without the full stop.

  Read from the source, not imported: the modules import the config whose help
  needs it.
  """
  loader = importlib.util.find_spec(f'{__name__}.{name}').loader
  text = ast.get_docstring(ast.parse(loader.get_source(f'{__name__}.{name}')))
  return text.splitlines()[0].rstrip('.')


def no_extra(config, dtype: jnp.dtype) -> dict[str, jax.Array]:
  """`Nonlinearity.extra` of one without parameters."""
  del config, dtype
  return {}


def keep_fitted(config, sae, x_BD, mse_of_mean, axis) -> dict[str, jax.Array]:
  """`Nonlinearity.fit` where nothing depends on the tokens."""
  del config, x_BD, mse_of_mean, axis
  return sae.extra


def keep(extra, observed) -> dict[str, jax.Array]:
  """`Nonlinearity.follow` where every parameter is trained."""
  del observed
  return extra


def any_number(config) -> None:
  """`Nonlinearity.active_per_token` where the tokens decide."""
  del config
