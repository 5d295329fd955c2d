"""Which loss goes with a nonlinearity: the file of this folder of its name."""

from collections.abc import Callable
import importlib
from typing import Any, Protocol

import jax

from sae_jax.autoencoder import Sae, SaeConfig
from sae_jax.training.objective.config import ObjectiveConfig
from sae_jax.training.objective.terms import Pass, Setting, Terms


class Method(Protocol):
  """What every file that is named after a nonlinearity defines.

  Attributes:
    AUXK: whether its dead latents learn by AuxK.
    SPARSE: whether its pass is `ops.autoencode`, of a fixed k; else it is made
      of dense products.
  """

  AUXK: bool
  SPARSE: bool

  def check(self, sae_config: SaeConfig, config: ObjectiveConfig) -> None:
    """Raises UserError for terms that do not go with the nonlinearity."""

  def second_weight(self, config: ObjectiveConfig) -> float:
    """Weight in the loss of the error of `Sums.multi`."""

  def prepare(self, setting: Setting, sae: Sae, x_BD: jax.Array) -> Any:
    """Values of the whole batch for all micro-batches, without a gradient.

    Args:
      setting: of the loss.
      sae: this device's parameters.
      x_BD: all of this device's tokens.
    """

  def sums(
    self,
    setting: Setting,
    sae: Sae,
    x_BD: jax.Array,
    prepared: Any,
    tally_N: jax.Array,
    candidates: int | None,
  ) -> Pass:
    """A pass over some tokens, which is differentiated.

    Args:
      setting: of the loss.
      sae: this device's parameters.
      x_BD: tokens.
      prepared: from `prepare`.
      tally_N: zeros, see `ops.autoencode`.
      candidates: number of candidates of each shard, None for all.
    """

  def fold(
    self, setting: Setting, run: Callable, start: Any, x_BD: jax.Array
  ) -> tuple[Any, Any]:
    """Runs over all tokens; arguments as in `ops.with_few_candidates`."""

  def logged(
    self,
    sae_config: SaeConfig,
    config: ObjectiveConfig,
    implementation: str | None,
    terms: Terms,
  ) -> dict[str, jax.Array]:
    """Metrics, by name, that a step logs beside those of every step."""


def of(name: str) -> Method:
  """The loss of a nonlinearity."""
  return importlib.import_module(f'{__package__}.{name}')


def check(sae_config: SaeConfig, config: ObjectiveConfig) -> None:
  """Raises UserError if objective and nonlinearity do not fit."""
  of(sae_config.activation).check(sae_config, config)
