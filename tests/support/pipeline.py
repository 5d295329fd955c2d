"""Every stage of a toy under one URL, and what it leaves there."""

import dataclasses

import numpy as np
import pytest

from sae_jax.autoencoder import SaeConfig
from sae_jax.browser import index
from sae_jax.harvesting import harvest
from sae_jax.probing import report, tasks
from sae_jax.probing.examples import FeatureConfig
from sae_jax.training import train
from tests.support import planted, runs, toy

BATCH, STEPS = 64, 30
PROBE = report.ProbeConfig(
  features=FeatureConfig(1000, 4, 2, 4, 2, 5, 3),
  eval_rows=200,
  batch_rows=64,
  downstream_tokens=60,
  n_tasks=1,
  task_prompts=24,
)


def made_tasks(names, n_tasks, n_prompts, max_chars, seed):
  """Prompts of letters; stands in for the package's files."""
  rng = np.random.default_rng(seed)
  labels_P = np.arange(n_prompts, dtype=np.int32) % 2
  prompts = [
    ''.join(rng.choice(list('abcdefgh'), 12)) + 'xy'[label]
    for label in labels_P
  ]
  return [tasks.Task('1_end', tuple(prompts), labels_P, ('x', 'y'))]


def harvested(texts, url, family='llama', *sites):
  """A store of some thousand rows: chunks of 32, eight to a shard."""
  names = tuple(map(str, sites or (toy.SITE,)))
  plan = toy.config(texts, chunk_rows=32, shard_rows=256, sites=names)
  return harvest.harvest(plan, url, toy.subject(family))


def trained(store_url, workdir, steps=STEPS, site='', **fields):
  run = planted.train_config(
    sae=SaeConfig(n_latents=32, k=4, **fields),
    site=site,
    batch_size=BATCH,
    steps=steps,
  )
  return train.train(run, store_url, workdir)


def run(texts, root, family='llama', site=toy.SITE, target=None, suite=()):
  """Every stage, training in two parts; the folders are below the root.

  Args:
    texts: the texts.
    root: a folder or URL.
    family: of the subject, a key of `toy.FAMILIES`.
    site: of the subject.
    target: another site, for a transcoder with a skip.
    suite: evaluations.

  Returns:
    The report.
  """
  sites, fields = [site], {}
  if target:
    sites.append(target)
    fields = {'site': str(site), 'target_site': str(target), 'skip': True}
  harvested(texts, f'{root}/store', family, *sites)
  # The second part reads what the first one saved.
  trained(f'{root}/store', f'{root}/run', STEPS // 2, **fields)
  trained(f'{root}/store', f'{root}/run', **fields)
  subject = toy.subject(family)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(tasks, 'load_tasks', made_tasks)
    found = report.probe(
      dataclasses.replace(PROBE, suite=suite),
      f'{root}/run',
      f'{root}/store',
      f'{root}/probe',
      subject,
    )
  index.build_index(
    f'{root}/probe/features',
    found,
    [subject.tokenizer.decode([i]) for i in range(256)],
    f'{root}/page',
  )
  return found


def files(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file()
  }


def assert_as_on_disk(found, state, root):
  """Checks what every stage left in a bucket against a folder of a disk.

  Args:
    found: name below the pipeline's URL -> bytes.
    state: the last one that training saved there.
    root: the folder.
  """
  # Byte for byte: arrays, manifest, report, table, plots, the page.
  for stage in ('store', 'probe', 'page'):
    want = files(root / stage)
    assert len(want) > 4
    folder = f'{stage}/'
    assert want == {
      name.removeprefix(folder): data
      for name, data in found.items()
      if name.startswith(folder)
    }
  # Checkpoints hold the time they were made at, and TensorBoard's file too.
  for name in ('metrics.jsonl', 'config.json'):
    assert found[f'run/{name}'] == (root / 'run' / name).read_bytes()
  assert any(name.startswith('run/tensorboard/events') for name in found)
  assert int(state.step) == STEPS
  runs.assert_same_bits(state, runs.saved_state(str(root / 'run')))
  # Older checkpoints are deleted, and nothing is left of what failed.
  kept = {n.split('/')[2] for n in found if n.startswith('run/checkpoints/')}
  assert kept - {'metadata', ''} == {'20', '30'}
