"""sae-browse: probing's results -> a static page of all features."""

from sae_jax.browser import build, index
from sae_jax.cli import flags


def define() -> None:
  """Defines this binary's flags."""
  flags.define(index.BrowseConfig)
  flags.define_url('probe', 'workdir of the sae-probe run to show')
  flags.define_url('workdir', 'folder to which the page is written')


def work() -> None:
  """Builds the page as the flags say."""
  page = build.browse(
    flags.read(index.BrowseConfig), flags.url('probe'), flags.url('workdir')
  )
  print(f'{page}\nserve it: python -m http.server -d {flags.url("workdir")}')
