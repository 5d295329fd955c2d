"""What an evaluation gives."""

import dataclasses
from typing import Any

import numpy as np

from sae_jax.probing.suite.figures import Sample, Statistic


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What an evaluation gives.

  Attributes:
    samples: by what is scored, the autoencoder first, sums over units, of which
      figures and curves follow.
    points: the places of curves by what their x is.
    statistics: figures beside those that the evaluation always has.
    columns: columns of the feature table by name, with a row for each latent.
    remarks: sentences for readers of the report, such as why a figure is not
      there.
    tables: by title, rows of texts and numbers, the first of which is a head.
  """

  samples: dict[str, Sample]
  points: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  statistics: dict[str, Statistic] = dataclasses.field(default_factory=dict)
  columns: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  remarks: tuple[str, ...] = ()
  tables: dict[str, list[list[Any]]] = dataclasses.field(default_factory=dict)
