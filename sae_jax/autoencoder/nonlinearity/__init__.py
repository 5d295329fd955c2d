"""What makes codes of pre-activations: a module of this folder each.

A file here and one of the same name in `training/objective` are all there is
to a nonlinearity: `SaeConfig.activation` takes the file's name, and its help
the first line of the file's docstring. `Nonlinearity` says what it defines.
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
  """What every module of this folder defines.

  `config` is a `SaeConfig`, `sae` a `Sae` or this shard of it, and `axis` the
  mesh axis of the latents, inside shard_map.

  Attributes:
    TRAINED: names of those of its extra parameters that are trained. A name
      means the same in all modules.
  """

  TRAINED: tuple[str, ...]

  def active_per_token(self, config) -> int | None:
    """How many latents at most are active, None where any number may be."""

  def extra(self, config, dtype: jnp.dtype) -> dict[str, jax.Array]:
    """Its own parameters before they are fitted; names end in axes."""

  def fit(
    self, config, sae, x_BD: jax.Array, mse_of_mean: jax.Array, axis: str | None
  ) -> dict[str, jax.Array]:
    """Its parameters for an autoencoder that is otherwise ready.

    Args:
      config: the autoencoder's.
      sae: the autoencoder.
      x_BD: preprocessed tokens from the start of a run.
      mse_of_mean: squared distance of a token from the mean, on average.
      axis: of the latents.
    """

  def follow(
    self, extra: dict[str, jax.Array], observed: dict[str, jax.Array]
  ) -> dict[str, jax.Array]:
    """Its parameters after a step, of those that are not trained.

    Args:
      extra: its parameters, after the optimizer.
      observed: what its objective saw of the batch.
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
  """The first line of a module's docstring, in the form of a phrase.

  Read from its source: the modules use the config whose help this is.
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
