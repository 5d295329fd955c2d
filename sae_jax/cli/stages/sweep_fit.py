"""sae-sweep: `fit` takes a table of finished cells to scaling laws.

Fits with intervals, figures and a report are written to --workdir.
"""

from sae_jax.cli import flags
from sae_jax.scaling import config as config_lib
from sae_jax.scaling import fit, summary


def define() -> None:
  """Defines this binary's flags."""
  flags.define(config_lib.FitConfig)
  flags.define_url(
    'table',
    'table of finished runs, .csv or .parquet, or the folder of a sweep',
  )
  flags.define_url('workdir', 'folder to which fits and report are written')


def work() -> None:
  """Fits as the flags say."""
  places = fit.fit(
    flags.url('table'), flags.url('workdir'), flags.read(config_lib.FitConfig)
  )
  for line in summary.lines(places):
    print(line)
