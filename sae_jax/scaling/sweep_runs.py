"""The finished runs of a sweep as cells."""

from collections.abc import Iterable, Mapping
import re
from typing import Any

from sae_jax.scaling.cells import Cell

_BLOCK = re.compile(r'blocks\.(\d+)\.')


def of_records(records: Iterable[Mapping[str, Any]]) -> list[Cell]:
  """The cells of a sweep's records, see `sweeps.cells.write`.

  The loss is the NMSE of test rows. Runs that failed are left out, and a
  learning rate that was given counts as that of the rule.
  """
  return [_cell(record) for record in records if not record['failure']]


def _cell(record: Mapping[str, Any]) -> Cell:
  score = record['scores']['test']
  block = _BLOCK.match(record['site'])
  factor = record['rate_factor']
  return Cell(
    n_latents=record['n_latents'],
    k=record['k'],
    d_model=record['d_model'],
    tokens=record['tokens'],
    seed=record['seed'],
    learning_rate=record['learning_rate'],
    learning_rate_factor=1.0 if factor is None else factor,
    loss=score['nmse'],
    metric='nmse',
    stop='convergence' if record['converge'] else 'tokens',
    flops=float(record['flops']),
    steps=record['steps'],
    dead_share=score['dead_fraction'],
    subject=record['subject'],
    layer=int(block[1]) if block else -1,
    site=record['site'],
    store=record['identity'],
  )
