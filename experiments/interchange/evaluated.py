"""SAELens's metrics and sae-probe's, of the same autoencoders and rows.

  make test-peers

or, with a Python that has SAELens:

  python -m experiments.interchange.evaluated --workdir=runs/evaluated \\
    --torch_python=.venv-peers/bin/python

Two of ours, trained shortly on a store of the packaged subject, are converted
to SAELens; one that SAELens trains on the same rows is converted to ours.
sae-probe evaluates all three on the store's test rows, SAELens's own code on
the same rows. The table has each pair of metrics and how much they differ; one
of the same definition that differs by more than 1e-4 fails, and so do controls
that agree: an autoencoder without its b_dec, one whose decoder rows are moved
to the next latent, and tokens that SAELens was to ignore.
"""

from collections.abc import Callable
import dataclasses
import json
import os
import pathlib
import shutil

from experiments.interchange import compare
import sae_jax
from sae_jax import config as config_lib
from sae_jax import errors
from sae_jax.cli import flags

SITE = 'blocks.4.resid_post'
# Ours by name, and its preprocessing.
OURS = {'ours_dataset': 'dataset', 'ours_of_token': 'center_unit_norm'}
OWN = 'of_saelens'
MOST = 1e-4
CONTROLS = ('without b_dec', 'rows moved', 'all tokens')
_OF_TOKEN = 'ours is of tokens centred and scaled one by one'


@dataclasses.dataclass(frozen=True)
class EvaluatedConfig(config_lib.Config):
  """The autoencoders that are evaluated."""

  torch_python: str = config_lib.option('', 'Python that has SAELens')
  n_tokens: int = config_lib.option(24_000, 'number of activations to store')
  n: int = config_lib.option(512, 'number of latents, N', least=1)
  k: int = config_lib.option(16, 'number of active latents of a token, K')
  batch: int = config_lib.option(1024, 'number of rows in a batch', least=1)
  steps: int = config_lib.option(200, 'number of training steps', least=1)


@dataclasses.dataclass(frozen=True)
class Pair:
  """A metric of SAELens beside what sae-probe says of the same.

  Attributes:
    theirs: its name in SAELens.
    ours: what of the report it is, in words.
    value: that, of a report, the constant that its NMSE divides by, in squares
      of raw activations, and the preprocessing.
    why_not: by the preprocessing, why the definitions differ; '' if they agree.
  """

  theirs: str
  ours: str
  value: Callable[[dict, float], float]
  why_not: Callable[[str], str]


def _of_token(preprocessing: str) -> str:
  return _OF_TOKEN if preprocessing == 'center_unit_norm' else ''


def _centred(preprocessing: str) -> str:
  if preprocessing == 'dataset':
    return "ours is from the dataset's mean, theirs from 0"
  return _of_token(preprocessing)


PAIRS = (
  Pair('l0', 'l0', lambda report, _: report['l0'], lambda _: ''),
  Pair(
    'explained_variance',
    '1 - fvu',
    lambda report, _: 1 - report['fvu'],
    _of_token,
  ),
  Pair(
    'explained_variance_legacy',
    '1 - fvu',
    lambda report, _: 1 - report['fvu'],
    lambda _: "theirs is the mean of each token's ratio",
  ),
  Pair(
    'mse',
    'nmse x its constant',
    lambda report, constant: report['nmse'] * constant,
    _of_token,
  ),
  Pair('cossim', 'cosine', lambda report, _: report['cosine'], _centred),
  Pair(
    'l2_ratio', 'norm_ratio', lambda report, _: report['norm_ratio'], _centred
  ),
  Pair(
    'share of feature_density 0',
    'dead_fraction',
    lambda report, _: report['dead_fraction'],
    lambda _: '',
  ),
)


def compared(
  name: str,
  preprocessing: str,
  theirs: dict[str, dict[str, float]],
  report: dict,
  constant: float,
) -> list[dict]:
  """A row for each pair of metrics of an autoencoder, and for each control.

  Args:
    name: of the autoencoder in `theirs`.
    preprocessing: of ours.
    theirs: from saelens_metrics.
    report: of sae-probe.
    constant: see `Pair.value`.
  """
  rows = []
  for pair in PAIRS:
    value = pair.value(report, constant)
    rows.append(
      _row(name, pair, theirs[name], value, pair.why_not(preprocessing))
    )
  variance = PAIRS[1]
  # Where the definitions differ so do the values, whatever is evaluated.
  for control in CONTROLS * (not variance.why_not(preprocessing)):
    damaged = theirs[f'{name}: {control}']
    value = variance.value(report, constant)
    rows.append(_row(f'{name}: {control}', variance, damaged, value, 'control'))
  return rows


def _row(name, pair, theirs, value, why_not) -> dict:
  metric = theirs[pair.theirs]
  return {
    'of': name,
    'theirs': pair.theirs,
    'ours': pair.ours,
    'values': [metric, value],
    'difference': abs(metric - value) / max(abs(value), 1e-12),
    'why_not': why_not,
  }


def wrong(rows: list[dict]) -> list[dict]:
  """Those that should agree and do not, or should not and do."""
  return [
    row
    for row in rows
    if (not row['why_not'] and not row['difference'] < MOST)
    or (row['why_not'] == 'control' and row['difference'] < 10 * MOST)
  ]


def lines(rows: list[dict]) -> list[str]:
  """A table."""
  table = [f'{"":29}{"SAELens":>12}{"sae-probe":>12}  difference']
  name = None
  for row in rows:
    if row['of'] != name:
      name = row['of']
      table.append(name)
    theirs, ours = row['values']
    label = row['theirs']
    if row['ours'] != label:
      label += f', {row["ours"]}'
    table.append(
      f'  {label:40}{theirs:12.6g}{ours:12.6g}  {row["difference"]:.1e}  '
      f'{row["why_not"]}'.rstrip()
    )
  return table


def evaluate(config: EvaluatedConfig, workdir: str) -> list[dict]:
  """Harvests, trains, converts and evaluates; the rows of the table.

  Raises:
    UserError: if SAELens fails.
  """
  place = pathlib.Path(os.path.abspath(workdir))
  shutil.rmtree(place, ignore_errors=True)
  url = str(place / 'store')
  sae_jax.harvest(
    sae_jax.HarvestConfig(
      sites=(SITE,), n_tokens=config.n_tokens, mask_norm_multiple=10.0
    ),
    url,
  )
  for name, preprocessing in OURS.items():
    run = sae_jax.TrainConfig(
      sae=sae_jax.SaeConfig(
        n_latents=config.n, k=config.k, preprocessing=preprocessing
      ),
      batch_size=config.batch,
      steps=config.steps,
    )
    sae_jax.train(run, url, str(place / f'run_{name}'))
    converting = sae_jax.ConvertConfig(to='saelens')
    sae_jax.convert(converting, str(place / f'run_{name}'), str(place / name))
  theirs = _saelens(config, place, sae_jax.open_store(url))
  sae_jax.convert(
    sae_jax.ConvertConfig(), str(place / OWN), str(place / f'run_{OWN}'), url
  )
  rows = []
  for name in (*OURS, OWN):
    report = sae_jax.probe(
      sae_jax.ProbeConfig(n_tasks=1, task_prompts=40, downstream_tokens=512),
      str(place / f'run_{name}'),
      url,
      str(place / f'probe_{name}'),
    )
    trained = sae_jax.load(str(place / f'run_{name}'))
    constant = trained.mse_of_mean * float(trained.sae.data_scale) ** 2
    rows += compared(
      name, trained.config.preprocessing, theirs, report, constant
    )
  return rows


def _saelens(config, place, store) -> dict[str, dict[str, float]]:
  """SAELens's metrics by autoencoder, or autoencoder and control."""
  shape = {name: getattr(config, name) for name in ('n', 'k', 'batch', 'steps')}
  return compare.ask(
    config.torch_python,
    'experiments.interchange.saelens_metrics',
    place,
    store,
    {'folders': list(OURS), 'own': OWN, 'site': SITE} | shape,
    'metrics.json',
  )


def main() -> None:
  """Entry point."""
  flags.define(EvaluatedConfig)
  flags.define_url('workdir', 'local folder for what is written; emptied')

  def work():
    workdir = flags.url('workdir')
    rows = evaluate(flags.read(EvaluatedConfig), workdir)
    path = pathlib.Path(workdir, 'evaluated.json')
    path.write_text(json.dumps(rows, indent=2) + '\n')
    print('\n'.join(lines(rows)))
    bad = wrong(rows)
    if bad:
      raise errors.UserError(
        f'{len(bad)} metrics do not agree where they should, or do where they '
        'should not: '
        + ', '.join(f'{row["theirs"]} of {row["of"]}' for row in bad[:9])
      )

  flags.run(work, __doc__)


if __name__ == '__main__':
  main()
