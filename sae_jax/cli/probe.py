"""sae-probe: a checkpoint and a store -> report.json, features.npz, plots."""

from sae_jax.cli import flags
from sae_jax.probing import report


def define() -> None:
  """Defines this binary's flags."""
  flags.define(report.ProbeConfig)
  flags.define_url('checkpoint', 'the workdir of sae-train')
  flags.define_url('store', 'the store of activations it was trained on')
  flags.define_url('workdir', 'the folder that the results are written to')


def work() -> None:
  """Evaluates as the flags say."""
  figures = report.probe(
    flags.read(report.ProbeConfig),
    flags.url('checkpoint'),
    flags.url('store'),
    flags.url('workdir'),
  )
  for line in report.lines(figures):
    print(line)


def main() -> None:
  """Entry point of the console script."""
  define()
  flags.run(work, __doc__)


if __name__ == '__main__':
  main()
