"""What the experiments share: where a run's held-out figures are."""

import json

from etils import epath

from sae_jax import config as config_lib
from sae_jax import errors


def heldout(workdir: str) -> dict[str, float]:
  """The held-out metrics at the end of a finished run, averaged weights.

  Raises:
    UserError: if the run is not finished.
  """
  folder = epath.Path(workdir)
  steps = config_lib.read_json(folder / 'config.json')['steps']
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  found = [row for row in map(json.loads, lines) if 'heldout_nmse' in row]
  if not found or found[-1]['step'] < steps:
    raise errors.UserError(
      f'{workdir} was stopped before step {steps}: run it again to go on'
    )
  return found[-1]
