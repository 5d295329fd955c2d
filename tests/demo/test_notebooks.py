"""A model of one's own in the notebook for TPUs, on a CPU."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.colab import device
import sae_jax
from sae_jax.probing import tasks
from tests.support import hf_folder, notebooks


@pytest.fixture(scope='module')
def settings(tmp_path_factory):
  """A random model in the format of Hugging Face, texts, and folders."""
  folder = tmp_path_factory.mktemp('mine')
  rng = np.random.default_rng(0)
  texts = [
    ' '.join(f'w{i}' for i in rng.integers(1, 97, rng.integers(20, 60)))
    for _ in range(60)
  ]
  path = folder / 'texts.jsonl'
  path.write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
  return {
    'model': hf_folder.write(folder / 'model', hf_folder.golden()['qwen2']),
    'sources': (str(path),),
    **{
      name: str(folder / name)
      for name in ('store', 'checkpoint', 'results', 'page')
    },
  }


def made_tasks(names, n_tasks, n_prompts, max_chars, seed):
  """Prompts of the model's words; stands in for the package's files."""
  rng = np.random.default_rng(seed)
  labels_P = np.arange(24, dtype=np.int32) % 2
  prompts = [
    ' '.join(f'w{i}' for i in [*rng.integers(9, 97, 6), 1 + label])
    for label in labels_P
  ]
  return [tasks.Task('1_end', tuple(prompts), labels_P, ('one', 'two'))]


def test_a_model_of_one_s_own_becomes_a_page(settings, monkeypatch, capsys):
  monkeypatch.setattr(tasks, 'load_tasks', made_tasks)
  small = device.Budget(1500, 64, 4, 128, 20)
  monkeypatch.setitem(device.BUDGETS, '', small)
  cells = notebooks.cells('your_model_on_a_tpu.ipynb')
  # Control: without a harvest there is nothing to train on.
  left = [cell for cell in cells if 'sae_jax.harvest(' not in cell]
  with pytest.raises(sae_jax.UserError, match=settings['store']):
    notebooks.execute(left, settings)
  capsys.readouterr()
  space = notebooks.execute(cells, settings)
  shown = capsys.readouterr().out
  assert space['report']['n_latents'] == 64
  assert space['report']['site'] == 'blocks.2.resid_post'
  assert 'no TPU' in shown and 'of the memory of a device' in shown
  assert 'FVU' in shown and settings['page'] in shown


@dataclasses.dataclass(frozen=True)
class _Chip:
  """A device as jax describes those of a TPU."""

  device_kind: str
  limit: int | None = None
  platform: str = 'tpu'
  id: int = 0
  process_index: int = 0
  coords: tuple[int, ...] = (0, 0, 0)
  core_on_chip: int = 0

  def memory_stats(self):
    return None if self.limit is None else {'bytes_limit': self.limit}


@pytest.mark.parametrize(
  ('kind', 'chip', 'gib'),
  [
    ('TPU v5 lite', 'v5e', 15.75),
    ('TPU v6 lite', 'v6e', 31.24),
    ('TPU v9', '', None),
  ],
)
def test_the_chips_of_colab_are_known(kind, chip, gib):
  found = device.find([_Chip(kind)])
  assert (found.chip, found.count) == (chip, 1)
  assert found.memory == (gib and int(gib * 2**30))
  said = ' '.join(device.lines(found))
  assert kind in said
  assert (f'a TPU {chip}: ' in said) == bool(chip)
  assert ('other than v5e and v6e' in said) != bool(chip)
  # What the device says itself counts more.
  assert device.find([_Chip(kind, 2**30)]).memory == 2**30


def test_a_run_that_does_not_fit_is_refused():
  found = device.find([_Chip('TPU v5 lite')])
  training = device.config(found, device.BUDGETS['v5e'])
  *_, last = device.plan_lines(found, training, 576)
  assert last.endswith('of the memory of a device')
  small = device.find([_Chip('TPU v5 lite', 2**28)])
  with pytest.raises(sae_jax.UserError, match='use fewer latents'):
    list(device.plan_lines(small, training, 576))
