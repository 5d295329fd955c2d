"""The four binaries, one after another, on a small GGUF file."""

import json
import pathlib
import shutil
import subprocess
import sys

from tests.support import binaries, gguf_models


def test_the_binaries_walk_the_same_path(tmp_path):
  text = tmp_path / 'texts.jsonl'
  text.write_text(
    ''.join(
      json.dumps({'text': f'In chapter {i} the {word} was left at sea. ' * 4})
      + '\n'
      for i, word in enumerate(('ship', 'captain', 'whale', 'harpoon') * 8)
    )
  )
  model = gguf_models.write(tmp_path / 'm.gguf', gguf_models.of_bytes())
  place = {n: f'{tmp_path}/{n}' for n in ('store', 'train', 'probe', 'page')}
  commands = {
    'harvest': {
      'store': place['store'], 'sources': text, 'n_tokens': 900,
      # Relative to where it is harvested.
      'subject': 'm.gguf', 'sites': 'blocks.1.resid_post', 'context_length': 32,
    },
    'train': {
      'store': place['store'], 'workdir': place['train'], 'n_latents': 64,
      'k': 8, 'batch_size': 64, 'steps': 30,
    },
    'probe': {
      'store': place['store'], 'checkpoint': place['train'],
      'workdir': place['probe'], 'n_tasks': 1, 'task_prompts': 16,
      'downstream_tokens': 64,
    },
    'browse': {'probe': place['probe'], 'workdir': place['page']},
  }  # fmt: skip
  said = {}
  for name, flags in commands.items():
    found = subprocess.run(
      [
        pathlib.Path(sys.executable).parent / f'sae-{name}',
        *(f'--{flag}={value}' for flag, value in flags.items()),
      ],
      capture_output=True,
      text=True,
      cwd=tmp_path,
    )
    assert found.returncode == 0, found.stderr
    said[name] = found.stdout
  manifest = json.loads((tmp_path / 'store' / 'manifest.json').read_text())
  assert (
    f'{manifest["n_rows"]} rows of width {manifest["d_model"]}'
    in said['harvest']
  )
  report = json.loads((tmp_path / 'probe' / 'report.json').read_text())
  assert f'NMSE {report["nmse"]:.4f}' in said['probe']
  assert f'{place["page"]}/index.html' in said['browse']
  columns = json.loads(
    (tmp_path / 'page' / 'data' / 'columns.json').read_text()
  )
  assert len(columns['latent']) == 64
  assert manifest['subject'] == model
  # What is lost is made again, and nothing else, by a model that was moved.
  moved = shutil.move(model, tmp_path / 'moved.gguf')
  lost = (
    tmp_path / 'probe/features/top_acts/c/0/0/0',
    tmp_path / 'page/data/columns.json',
  )
  before = [path.read_bytes() for path in lost]
  for path in lost:
    path.unlink()
  for name in ('probe', 'browse'):
    flags = [f'--{flag}={value}' for flag, value in commands[name].items()]
    refused = binaries.run(f'sae-{name}', *flags)
    assert refused.returncode == 2
    assert 'is not there: say with --subject where it is' in refused.stderr
    flags.append(f'--subject={moved}')
    assert binaries.run(f'sae-{name}', *flags).returncode == 0
  assert [path.read_bytes() for path in lost] == before
