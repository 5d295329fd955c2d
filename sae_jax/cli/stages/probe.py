"""sae-probe: a checkpoint and a store -> report.json, features.npz, plots."""

from sae_jax.cli import flags
from sae_jax.probing import report, summary


def define() -> None:
  """Defines this binary's flags."""
  flags.define(report.ProbeConfig)
  flags.define_url('checkpoint', 'workdir of the sae-train run to evaluate')
  flags.define_url('store', 'store of activations that the run was trained on')
  flags.define_url('workdir', 'folder to which the results are written')


def work() -> None:
  """Evaluates as the flags say."""
  figures = report.probe(
    flags.read(report.ProbeConfig),
    flags.url('checkpoint'),
    flags.url('store'),
    flags.url('workdir'),
  )
  for line in summary.lines(figures):
    print(line)
