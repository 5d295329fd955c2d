"""From a table of finished cells to fits, figures and a report."""

from collections.abc import Sequence
import dataclasses
import math
import os

from etils import epath

from sae_jax import config as config_lib
from sae_jax import errors
from sae_jax.drawing import figures as drawing
from sae_jax.scaling import advise as advise_lib
from sae_jax.scaling import cells as cells_lib
from sae_jax.scaling import page, plots, questions, record, study
from sae_jax.scaling import table as table_lib
from sae_jax.scaling.cells import Cell
from sae_jax.scaling.config import FitConfig
from sae_jax.scaling.record import PlaceFits
from sae_jax.storage import files
from sae_jax.storage import workdir as workdir_lib

STAGE = 'sae-sweep'


def fit(table: str, workdir: str, config: FitConfig) -> list[PlaceFits]:
  """Fits the laws of a table and writes what they say.

  Writes cells.csv (and cells.parquet where pyarrow is installed), fits.json,
  plots as PNG and SVG, report.html, and made_from.json, which says from what.

  Args:
    table: URL of the table of cells.
    workdir: URL of the folder to write to.
    config: what the fit is told.

  Returns:
    The fits of each place.

  Raises:
    UserError: if the table is none, or has too few cells for any law, or the
      folder is in use, another's, or of another table or config.
  """
  cells = table_lib.read(table)
  made_from = config_lib.through_json(
    {
      'version': record.FITS_VERSION,
      'cells_sha256': table_lib.sha256(cells),
      'config': dataclasses.asdict(config),
    }
  )
  with workdir_lib.hold(workdir, STAGE, made_from):
    places = [
      of_place(place, group, config)
      for place, group in cells_lib.by_place(cells).items()
    ]
    if not any(item.law for fits in places for item in fits.studies):
      refusals = [item.refusal for fits in places for item in fits.studies]
      reason = refusals[0] if refusals else 'no cell has a factor of 1'
      raise errors.UserError(f'{table} has cells for no law: {reason}')
    workdir_lib.sign(workdir, STAGE, made_from)
    _write(workdir, places, cells, os.path.basename(table), config)
  return places


def _write(workdir, places, cells, table_name, config) -> None:
  metric = cells[0].metric
  folder = epath.Path(workdir)
  table_lib.write(cells, folder / 'cells.csv')
  if table_lib.has_parquet():
    table_lib.write(cells, folder / 'cells.parquet')
  figures = plots.of_places(places, metric)
  drawing.save(folder, figures)
  files.write_text(
    folder / 'report.html', page.html(places, figures, metric, config)
  )
  # Last: where it is there, all else is.
  facts = record.of_places(places, table_name, metric)
  files.write_text(folder / 'fits.json', config_lib.to_json(facts))


def of_place(
  place: tuple, cells: Sequence[Cell], config: FitConfig
) -> PlaceFits:
  """The laws of the cells of one place, and advice if a budget is given.

  Raises:
    UserError: if its cells differ in d_model.
  """
  widths = sorted({cell.d_model for cell in cells})
  if len(widths) > 1:
    raise errors.UserError(
      f'{cells_lib.place_name(place)} has cells of d_model {widths[0]} and '
      f'{widths[1]}: name the stores that they read'
    )
  studies = tuple(
    study.run(question, config) for question in questions.all_of(cells, config)
  )
  shares = [c.flops / c.dense_flops for c in cells if not math.isnan(c.flops)]
  return PlaceFits(
    place,
    tuple(cells),
    studies,
    _advice(cells, studies, config),
    (min(shares), max(shares)) if shares else None,
  )


def _advice(cells, studies, config) -> tuple[advise_lib.Advice, ...]:
  d_model = cells[0].d_model
  flops = config.flops(d_model)
  if not flops:
    return ()
  laws = {item.question.name: item for item in studies if item.law is not None}

  def by_k(kind):
    return {
      item.question.k: item.law
      for name, item in laws.items()
      if name.startswith(f'{kind}_k')
    }

  convergence = by_k('convergence')
  return tuple(
    advise_lib.advise(
      flops,
      d_model,
      max(cell.n_latents for cell in cells),
      by_k('compute'),
      laws['surface'].law if 'surface' in laws else None,
      convergence,
      tuple(sorted({cell.k for cell in cells})),
      config.confidence,
    )
  )
