"""Autoencoders that we write, loaded and evaluated by the libraries themselves.

  make test-peers

or, with a Python that has them (requirements.txt here and in ../peers):

  python -m experiments.interchange.compare --workdir=runs/interchange \\
    --torch_python=.venv-peers/bin/python

Written are those of tests/data/interchange, whose latents and reconstructions
are known from the library that each is from, and some of ours. Each library
then loads what was written in its format, computes latents and reconstruction
in float64, and saves what it loaded, which is read again. The table has the
largest relative difference of a library and format; one above 1e-5 fails.
--openai_model is the path of model.py of github.com/openai/sparse_autoencoder,
which is no package; without it the format is left out.
"""

from collections.abc import Collection
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import autoencoder, checkpoint, errors
from sae_jax import config as config_lib
from sae_jax import store as store_lib
from sae_jax.cli import flags
from sae_jax.interchange import folding, formats, imported, ours, registry
from sae_jax.storage import tensors

_ROOT = pathlib.Path(__file__).parents[2]
_GOLDEN = _ROOT / 'tests/data/interchange'
_FILES = {'openai': 'sae.pt', 'qwen_scope': 'layer0.sae.pt'}
_K = 4
# Ours by name: what is not as in a TopK autoencoder without preprocessing.
OWN = {
  'topk': {},
  'topk_output': {'pre_bias': 'output'},
  'topk_dataset': {'preprocessing': 'dataset'},
  'topk_layer_norm': {'preprocessing': 'layer_norm'},
  'topk_center_unit_norm': {'preprocessing': 'center_unit_norm'},
  'relu_unit_rms': {'activation': 'relu', 'preprocessing': 'unit_rms'},
  'jumprelu_dataset': {'activation': 'jumprelu', 'preprocessing': 'dataset'},
  'batchtopk': {'activation': 'batchtopk', 'preprocessing': 'none'},
  'gated': {'activation': 'gated', 'preprocessing': 'dataset'},
  'groupmax': {'activation': 'groupmax', 'preprocessing': 'none'},
  'relu_transcoder': {
    'activation': 'relu',
    'pre_bias': 'output',
    'preprocessing': 'dataset',
    'target_site': 'blocks.0.mlp_out',
    'skip': True,
  },
  'jumprelu_transcoder': {
    'activation': 'jumprelu',
    'pre_bias': 'output',
    'preprocessing': 'dataset',
    'target_site': 'blocks.0.mlp_out',
  },
}
MOST = 1e-5
_RESAVED = 'resaved'


@dataclasses.dataclass(frozen=True)
class CompareConfig(config_lib.Config):
  """The comparison."""

  torch_python: str = config_lib.option('', 'Python that has the libraries')
  openai_model: str = config_lib.option(
    '', "path of OpenAI's model.py; empty to leave its format out"
  )


@dataclasses.dataclass(frozen=True)
class Case:
  """An autoencoder and what it computes.

  Attributes:
    name: what it is called.
    autoencoder: what it is.
    x_BD: activations.
    z_BN: its latents.
    y_BD: its reconstruction.
  """

  name: str
  autoencoder: imported.Imported
  x_BD: np.ndarray
  z_BN: np.ndarray
  y_BD: np.ndarray


def golden_cases() -> list[Case]:
  """Those of other libraries."""
  cases = []
  for path in sorted(_GOLDEN.rglob('expected.npz')):
    name = str(path.parent.relative_to(_GOLDEN))
    if name == 'files':
      continue
    kind = name.partition('/')[0]
    given = imported.Given(k=_K) if kind == 'qwen_scope' else None
    one = registry.read(path.parent / _FILES.get(kind, ''), given)
    expected = np.load(path)
    cases.append(Case(name, one, expected['x'], expected['z'], expected['y']))
  return cases


def own_cases(names: Collection[str] = tuple(OWN)) -> list[Case]:
  """Those of ours of these names, with random arrays."""
  return [
    _own(f'sae_jax/{name}', {'preprocessing': 'none'} | OWN[name])
    for name in names
  ]


def _own(name: str, chosen: dict) -> Case:
  config = autoencoder.SaeConfig(d_model=16, n_latents=64, k=8, **chosen)
  rng = np.random.default_rng(len(name))
  sae = autoencoder.init_weights(config, jax.random.key(0))

  def drawn(path, array):
    noise = 0.3 * rng.standard_normal(array.shape)
    # Scales and thresholds are above 0.
    if 'scale' in str(path[-1]) or 'threshold' in str(path[-1]):
      return jnp.asarray(np.abs(noise) + 0.5, jnp.float32)
    return jnp.asarray(array + noise, jnp.float32)

  sae = jax.tree_util.tree_map_with_path(drawn, sae)
  trained = checkpoint.Trained(config, sae, 1.0, 0)
  x_BD = (2 * rng.standard_normal((50, 16)) + 0.5).astype(np.float32)
  codes = trained.encode(x_BD)
  held = jax.tree.map(lambda array: tensors.from_array(np.asarray(array)), sae)
  one = ours.described(checkpoint.Saved(config, held), name)
  if config.target_site:
    site = dataclasses.replace(one.provenance, site='blocks.0.mlp_in')
    one = dataclasses.replace(one, provenance=site)
  return Case(name, one, x_BD, codes.dense(), trained.decode(codes))


def write_all(cases: list[Case], workdir: str, kinds: list[str]) -> list[dict]:
  """Writes each in every format that holds it; a record of each is returned."""
  shutil.rmtree(workdir, ignore_errors=True)
  records = []
  for case in cases:
    for kind in kinds:
      if formats.of(kind).lack(case.autoencoder) is not None:
        continue
      folder = os.path.join(workdir, case.name.replace('/', '.'), kind)
      os.makedirs(folder)
      name = {'openai': 'sae.pt', 'circuit_tracer': 'sae/layer_0.safetensors'}
      url = os.path.join(folder, name.get(kind, 'sae'))
      registry.write(case.autoencoder, kind, url)
      np.save(os.path.join(folder, 'x.npy'), case.x_BD)
      records.append(
        {'case': case.name, 'format': kind, 'folder': folder, 'url': url}
      )
  text = config_lib.to_json({'records': records})
  pathlib.Path(workdir, 'records.json').write_text(text)
  return records


def difference(array: np.ndarray, expected: np.ndarray) -> float:
  """The largest, relative to the largest value."""
  return float(np.abs(array - expected).max() / np.abs(expected).max())


def compare(config: CompareConfig, workdir: str) -> list[dict]:
  """Writes, has the libraries load, compares.

  Returns:
    For each autoencoder and format the relative differences of latents,
    reconstruction, and the tensors that the library saves.

  Raises:
    UserError: if the libraries fail.
  """
  workdir = os.path.abspath(workdir)
  kinds = [kind for kind in formats.WRITTEN if kind != 'plain']
  if not config.openai_model:
    kinds.remove('openai')
  cases = golden_cases() + own_cases()
  records = write_all(cases, workdir, kinds)
  _run_libraries(config, workdir)
  by_name = {case.name: case for case in cases}
  return [
    record | _differences(record, by_name[record['case']]) for record in records
  ]


def _differences(record: dict, case: Case) -> dict:
  theirs = np.load(os.path.join(record['folder'], 'theirs.npz'))
  saved = record['url'].replace(
    record['folder'], os.path.join(record['folder'], _RESAVED)
  )
  written, again = (registry.read(url) for url in (record['url'], saved))
  if written.semantics != again.semantics:
    raise errors.UserError(
      f'{saved} has {again.semantics}, which was written as {written.semantics}'
    )
  # A decoder's norm may have moved: dictionary_learning loads one of unit norm.
  written, again = folding.folded(written), folding.folded(again)
  return {
    'latents': difference(theirs['z'], case.z_BN),
    'reconstruction': difference(theirs['y'], case.y_BD),
    'saved': max(
      difference(again.tensors[name].read(), tensor.read())
      for name, tensor in written.tensors.items()
    ),
  }


def _run_libraries(config: CompareConfig, workdir: str) -> None:
  run_module(
    config.torch_python,
    'experiments.interchange.loaded',
    [workdir, config.openai_model],
  )


def ask(
  python: str,
  module: str,
  place: pathlib.Path,
  store: store_lib.Store,
  asked: dict[str, Any],
  answer: str,
) -> dict[str, Any]:
  """What a module says of a store's rows, which it gets as a file.

  Args:
    python: Python that has its library.
    module: given `place`; it reads asked.json, and rows.npz with the finite
      rows `train` and `test` [R, D].
    place: folder, local.
    store: the activations.
    asked: content of asked.json.
    answer: name of the JSON file that the module writes.

  Raises:
    UserError: see `run_module`.
  """
  test = store.test_rows
  np.savez(
    place / 'rows.npz',
    train=store.finite_rows(0, store.n_train),
    test=store.finite_rows(test.start, test.stop),
  )
  (place / 'asked.json').write_text(config_lib.to_json(asked))
  run_module(python, module, [str(place)])
  return json.loads((place / answer).read_text())


def run_module(python: str, module: str, arguments: list[str]) -> None:
  """Runs a module with the Python that has the libraries.

  Raises:
    UserError: if that is none, or the module fails.
  """
  command = [os.path.abspath(python or 'python'), '-W', 'ignore', '-m', module]
  # Without it SAELens asks the hub for minutes as it is imported.
  environment = os.environ | {'HF_HUB_OFFLINE': '1'}
  try:
    done = subprocess.run(command + arguments, cwd=_ROOT, env=environment)
  except OSError as error:
    raise errors.UserError(
      f'cannot run {python!r}: {errors.reason(error)}: give the Python of '
      '`make test-peers`'
    ) from error
  if done.returncode:
    raise errors.UserError(
      f'the libraries failed, exit status {done.returncode}'
    )


def lines(rows: list[dict]) -> list[str]:
  """A table by format, of the largest difference and whose it is."""
  columns = ('latents', 'reconstruction', 'saved')
  table = ['format              written   ' + '   '.join(columns)]
  for kind in sorted({row['format'] for row in rows}):
    its = [row for row in rows if row['format'] == kind]
    cells = []
    for column in columns:
      worst = max(its, key=lambda row, column=column: row[column])
      cells.append(f'{worst[column]:.1e} ({worst["case"]})')
    table.append(f'{kind:20}{len(its):4}      {"   ".join(cells)}')
  return table


def main() -> None:
  """Entry point."""
  flags.define(CompareConfig)
  flags.define_url('workdir', 'local folder for what is written; emptied')

  def work():
    workdir = flags.url('workdir')
    rows = compare(flags.read(CompareConfig), workdir)
    path = pathlib.Path(workdir, 'compared.json')
    path.write_text(json.dumps(rows, indent=2) + '\n')
    print('\n'.join(lines(rows)))
    wrong = [
      row
      for row in rows
      if not max(row['latents'], row['reconstruction'], row['saved']) < MOST
    ]
    if wrong:
      raise errors.UserError(
        f'{len(wrong)} differ by more than {MOST:g}: '
        + ', '.join(f'{row["case"]} as {row["format"]}' for row in wrong[:9])
      )

  flags.run(work, __doc__)


if __name__ == '__main__':
  main()
