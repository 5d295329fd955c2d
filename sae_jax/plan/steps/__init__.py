"""The programs that can be planned: a module each, of the functions of `Step`.

`of` finds the module by the type of a config. Every config has `sae`,
`batch_size`, `mesh_data`, `mesh_latent` and `micro_batches`.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import jax
from jax.sharding import AbstractMesh, Mesh

from sae_jax.plan.steps import probing, training
from sae_jax.tpu.slices import Slices

_BY_CONFIG = {
  training.TrainConfig: training,
  probing.PassConfig: probing,
}


class Step(Protocol):
  """What the planner must know of a program.

  Attributes:
    NAME: of the program, a value of --program.
    ARGUMENTS: what a table calls each of its arguments.
    CASES: what data may ask for, the names that a plan may assume.
  """

  NAME: str
  ARGUMENTS: dict[str, str]
  CASES: tuple[str, ...]

  def check_mesh(self, config: Any, mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError, with sizes that fit, unless a mesh divides evenly."""

  def arguments(self, config: Any, mesh: Mesh) -> dict[str, Any]:
    """Shapes and shardings of what is in memory before a step and after it.

    'parameters' and 'batch' are two of them.
    """

  def lowered(
    self, config: Any, mesh: Mesh, implementation: str | None
  ) -> jax.stages.Lowered:
    """The step, lowered for compilation; it allocates no array."""

  def expected(
    self, config: Any, mesh: Mesh, implementation: str | None
  ) -> frozenset[str]:
    """The parts that the program must have, see `program.parts`."""

  def branch(self, case: str, choice: str, branches: int) -> int | None:
    """The branch to assume in a case; None for the cheapest.

    Args:
      case: one of CASES.
      choice: whose choice it is, see `parts.choice`.
      branches: how many there are.
    """

  def runs(self, config: Any, mesh: Mesh, part: str, case: str) -> float | None:
    """How often to run a part's loop whose length depends on data.

    None to leave it out.
    """

  def guess(
    self,
    config: Any,
    slices: Slices,
    mesh: Mesh,
    implementation: str | None,
    held: dict[str, int],
  ) -> tuple[float, float]:
    """Bytes of temporaries and seconds of a step, by arithmetic.

    Args:
      held: bytes of the arguments on a device.
    """

  def lasting(self, held: dict[str, int], data: int) -> float:
    """A guess of bytes of temporaries that fewer tokens do not shrink.

    Args:
      held: bytes of the arguments on a device.
      data: shards of the batch.
    """

  def rank(self, data: int, step_s: float) -> tuple:
    """What meshes that fit are ordered by, the best first."""

  def smaller(self, config: Any) -> Iterator[tuple[str, Any]]:
    """Flags and configs that work on fewer tokens at a time."""

  def fewest_latents(self, config: Any) -> int:
    """The fewest latents that the config can have."""

  def state_bytes(self, held: dict[str, int]) -> float:
    """Bytes that more shards of the latents share."""

  def settings(self, config: Any) -> str:
    """Settings of the run for a table, beyond those of all programs."""

  def figures(self, plan: Any) -> dict[str, Any]:
    """Figures of its own, for JSON."""

  def lines(self, plan: Any) -> list[str]:
    """Figures of its own, for a table."""

  def assumptions(self, plan: Any) -> list[str]:
    """What a plan assumes of data."""


def of(config: Any) -> Step:
  """The program of a config."""
  return _BY_CONFIG[type(config)]


def seconds_of_products(config: Any, slices: Slices) -> float:
  """Least seconds of the encoder's product with a batch, and nothing else."""
  flops = 2 * config.batch_size * config.sae.n_latents * config.sae.d_model
  return flops / len(slices.devices) / slices.device.flops
