"""Real shapes: what kernels are compiled for and compared at."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
  """One chip's share of a training step.

  Attributes:
    name: what reports call it.
    batch: tokens.
    d_model: width of an activation.
    n_latents: latents that the chip holds.
    k: candidates a token has on the chip.
    active: the share of them that turn out to be active; less than 1 where
      latents are sharded.
  """

  name: str
  batch: int
  d_model: int
  n_latents: int
  k: int
  active: float = 1.0


SHAPES = (
  Shape('32k', 4096, 768, 32_768, 32),
  Shape('128k', 4096, 768, 131_072, 32),
  Shape('1m', 131_072, 768, 1_048_576, 32),
  Shape('wide', 4096, 4096, 131_072, 64),
  # One shard of 256 of 16,777,216 latents, of which 256 are active.
  Shape('16m shard', 131_072, 768, 65_536, 16, 1 / 16),
)
