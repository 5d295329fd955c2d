"""How often intervals of scaling laws hold the truth.

Draws tables from known coefficients (the paper's and two others), fits each and
counts the intervals that hold the true value, the tables whose irreducible loss
the fit refuses to name, and the CPU time of a fit. Prints a row for each grid,
noise and set of coefficients, as JSON lines:

  python -m experiments.scaling.coverage --draws=100
"""

import dataclasses
import json
import time

import numpy as np

from sae_jax import config as config_lib
from sae_jax.cli import flags
from sae_jax.scaling import findings, forms, profile
from sae_jax.scaling import law as law_lib

COEFFICIENTS = {
  'paper': forms.PAPER.coefficients,
  'steep': (0.6, -0.1, -0.25, -0.01, -2.0, -0.2),
  'low floor': (1.2, 0.1, -0.3, -0.02, -3.2, -0.3),
}
GRIDS = {
  '15 cells': (range(10, 15), (16, 32, 64)),
  '30 cells': (range(11, 17), (8, 16, 32, 64, 128)),
  '45 cells': (range(9, 18), (8, 16, 32, 64, 128)),
}
NOISES = (0.01, 0.002)
SIZES = (2**20, 2**24)
FIGURES = ('slope', 'floor', *(f'loss at {size:,}' for size in SIZES))


@dataclasses.dataclass(frozen=True)
class CoverageConfig(config_lib.Config):
  """How many tables are drawn."""

  draws: int = config_lib.option(100, 'number of tables of each kind', least=1)
  seed: int = config_lib.option(0, 'seed of the noise', least=0)


def truth(theta) -> tuple[float, ...]:
  """The figures, at k 32."""
  log_k = np.log(32.0)
  return (
    theta[2] + theta[3] * log_k,
    float(np.exp(theta[4] + theta[5] * log_k)),
    *(float(forms.value(forms.SURFACE, theta, n=n, k=32)) for n in SIZES),
  )


def grid(name: str) -> tuple[np.ndarray, np.ndarray]:
  """n and k of each cell of a grid."""
  powers, ks = GRIDS[name]
  n_R, k_R = np.meshgrid([2.0**power for power in powers], ks)
  return n_R.ravel(), k_R.ravel().astype(float)


def measure(
  coefficients: str, cells: str, noise: float, config: CoverageConfig
) -> dict:
  """One row of the table."""
  theta = COEFFICIENTS[coefficients]
  n_R, k_R = grid(cells)
  clean_R = forms.value(forms.SURFACE, theta, n=n_R, k=k_R)
  # Rows are drawn apart from each other.
  place = list(COEFFICIENTS).index(coefficients), list(GRIDS).index(cells)
  rng = np.random.default_rng([config.seed, *place, round(1e6 * noise)])
  true = truth(theta)
  holds = np.zeros(len(true), int)
  refused, seconds = 0, []
  widths = []
  for _ in range(config.draws):
    y_R = clean_R * np.exp(noise * rng.standard_normal(len(clean_R)))
    begun = time.process_time()
    law = law_lib.fit(forms.SURFACE, {'n': n_R, 'k': k_R}, y_R)
    seconds.append(time.process_time() - begun)
    figures = (
      profile.slope(law, 0, 'n', k=32),
      profile.term_size(law, 1, k=32),
      *(profile.prediction(law, n=n, k=32) for n in SIZES),
    )
    walks = [profile.profile(law, figure) for figure in figures]
    holds += [
      walk.low <= value <= walk.high
      for walk, value in zip(walks, true, strict=True)
    ]
    widths.append([walk.high - walk.low for walk in walks])
    floor = walks[1]
    refused += bool(
      findings.refusal_of(
        findings.Finding(
          'floor', 'the floor', 'floor', floor.estimate, floor.low, floor.high,
          np.nan, np.nan, '',
        ),
        y_R.min(),
        0.5,
      )
    )  # fmt: skip
  return {
    'coefficients': coefficients,
    'cells': cells,
    'noise': noise,
    'draws': config.draws,
    'covered': dict(zip(FIGURES, (holds / config.draws).tolist())),
    'median_width': dict(zip(FIGURES, np.median(widths, 0).tolist())),
    'truth': dict(zip(FIGURES, map(float, true))),
    'floor_refused': refused / config.draws,
    'cpu_seconds_of_a_fit': float(np.median(seconds)),
  }


def main() -> None:
  """Prints all rows."""
  config = flags.read(CoverageConfig)
  for noise in NOISES:
    for cells in GRIDS:
      for coefficients in COEFFICIENTS:
        row = measure(coefficients, cells, noise, config)
        print(json.dumps(row), flush=True)


if __name__ == '__main__':
  flags.define(CoverageConfig)
  flags.run(main, __doc__)
