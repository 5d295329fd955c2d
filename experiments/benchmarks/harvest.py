"""Times a harvest beside transformers with hooks, same model, text and batches.

Needs torch and transformers beside this package:

    pip install torch transformers
    python -m experiments.benchmarks.harvest --workdir=runs/harvest

Prints one JSON line last. In turns, --repeats times, in one process and with
all cores:

  harvest    `harvest` as it is: tokens, forward passes up to the site, norms,
             mask, checksums, a store on disk
  forward    its forward passes alone, activations on the host
  hooks      the transformers model on the same batches, all blocks (no
             unembedding), a forward hook on the site's block that copies
  stopped    the same, ended by the hook with an exception

Rates are tokens a second that the store keeps, so that padding counts for none;
`harvest_over_hooks` and the like are medians of the ratios of each repeat.
`difference` is the largest between a kept activation of the two, over the norm
of its row. The batches have contexts of like length, right-padded: with causal
attention no mask is needed, and transformers takes its fused attention.
"""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import shutil
import statistics
import time

import jax
import numpy as np

from sae_jax import config as config_lib
from sae_jax import errors, mesh
from sae_jax import subject as subject_lib
from sae_jax.cli import flags, huge_pages
from sae_jax.harvesting import harvest, pools, source
from sae_jax.harvesting.config import HarvestConfig
from sae_jax.subject import capture
from sae_jax.text import contexts as contexts_lib

try:
  import torch
  import transformers
except ImportError:
  torch = transformers = None


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig(config_lib.Config):
  """A harvest, and how often it is timed."""

  subject: str = config_lib.option(
    'smollm2-135m',
    'language model: a packaged subject, a .gguf file, or a folder as '
    'transformers saves it',
  )
  block: int = config_lib.option(
    14, 'number of the block whose output is stored', least=0
  )
  n_tokens: int = config_lib.option(20_000, 'activations to store', least=1)
  batch_contexts: int = config_lib.option(
    16, 'contexts in a forward pass', least=1
  )
  context_length: int = config_lib.option(
    128, 'most tokens of a context', least=2
  )
  repeats: int = config_lib.option(
    3, 'times that each way is measured', least=1
  )


class _Stop(Exception):
  """Ends a forward pass."""


def torch_model(name: str):
  """The same weights in transformers, without the unembedding."""
  path = pathlib.Path(subject_lib.find(name))
  folder, file = (path.parent, path.name) if path.is_file() else (path, None)
  return transformers.AutoModel.from_pretrained(
    folder, gguf_file=file, dtype=torch.float32
  ).eval()


def pools_of(
  config: HarvestConfig, subject: subject_lib.Subject
) -> list[list[contexts_lib.Context]]:
  """The contexts of a harvest, in pools."""
  contexts_by_pool, rows = [], 0
  text = source.documents(config)
  with contextlib.closing(source.contexts(config, text, subject)) as contexts:
    while rows < config.n_tokens:
      pool = list(itertools.islice(contexts, pools.size(config)))
      if not pool:
        break
      contexts_by_pool.append(pool)
      rows += sum(pools.expected(config, context) for context in pool)
  return contexts_by_pool


def with_hooks(model, block: int, batches: list, stop: bool) -> list:
  """The block's output of each batch, by a hook."""
  kept = []

  def hook(module, inputs, output):
    del module, inputs
    hidden = output[0] if isinstance(output, tuple) else output
    kept.append(hidden.numpy().copy())
    if stop:
      raise _Stop

  handle = model.layers[block].register_forward_hook(hook)
  try:
    with torch.inference_mode():
      for tokens_BT in batches:
        with contextlib.suppress(_Stop):
          model(input_ids=torch.from_numpy(tokens_BT).long(), use_cache=False)
  finally:
    handle.remove()
  return kept


def kept_rows(
  config: HarvestConfig, batches: list, outputs: list
) -> np.ndarray:
  """Activations of the tokens whose positions a harvest keeps, [R, D]."""
  rows = []
  for (pool, batch, _), rows_CTD in zip(batches, outputs):
    for row, i in enumerate(batch):
      keep = pools.allowed(config, pool[i].positions)
      rows.append(rows_CTD[row, : len(keep)][keep])
  return np.concatenate(rows)


def measure(config: BenchmarkConfig, workdir: pathlib.Path) -> dict:
  """Rates of each way, and how far its activations are from ours."""
  harvesting = HarvestConfig(
    subject=config.subject,
    sites=(f'blocks.{config.block}.resid_post',),
    n_tokens=config.n_tokens,
    batch_contexts=config.batch_contexts,
    context_length=config.context_length,
    # All tokens but the first of a context are compared.
    mask_norm_multiple=0.0,
  )
  subject = subject_lib.load(config.subject)
  model = torch_model(config.subject)
  site = capture.parse_site(harvesting.sites[0], subject.config)
  forward = pools.Forward(harvesting, subject, (site,), mesh.make_mesh())
  pooled = pools_of(harvesting, subject)
  batches = [
    (pool, batch, tokens_CT)
    for pool in pooled
    for batch, tokens_CT in pools.batches(harvesting, pool)
  ]
  tokens = [tokens_CT for _, _, tokens_CT in batches]
  rows = sum(pools.expected(harvesting, c) for pool in pooled for c in pool)

  folder = workdir / 'harvest_store'

  def run_harvest():
    return harvest.harvest(harvesting, str(folder), subject).n_rows

  def run_forward():
    ours = []
    for pool in pooled:
      for _, outputs in forward.dispatch(pool):
        ours.append(np.asarray(outputs[str(site)][0]))
    return ours

  ways = {
    'harvest': run_harvest,
    'forward': run_forward,
    'hooks': lambda: with_hooks(model, config.block, tokens, stop=False),
    'stopped': lambda: with_hooks(model, config.block, tokens, stop=True),
  }
  # Once before: compilation, and what the comparison needs.
  shutil.rmtree(folder, ignore_errors=True)
  stored = ways['harvest']()
  ours_RD = kept_rows(harvesting, batches, ways['forward']())
  theirs_RD = kept_rows(harvesting, batches, ways['hooks']())
  norm_R = np.linalg.norm(theirs_RD, axis=-1)
  turns = []
  for _ in range(config.repeats):
    turn = {}
    for name, run in ways.items():
      shutil.rmtree(folder, ignore_errors=True)
      began = time.perf_counter()
      run()
      # A harvest ends with the context in which it has enough.
      n = stored if name == 'harvest' else rows
      turn[name] = n / (time.perf_counter() - began)
    turns.append(turn)
    print(json.dumps(turn), flush=True)

  def over(name, other):
    return statistics.median(turn[name] / turn[other] for turn in turns)

  return (
    dataclasses.asdict(config)
    | {
      'rows': rows,
      'padded_share': 1 - rows / sum(batch_CT.size for batch_CT in tokens),
      'device': jax.devices()[0].device_kind,
      'torch': torch.__version__,
      'transformers': transformers.__version__,
    }
    | {
      f'{name}_tokens_per_s': statistics.median(turn[name] for turn in turns)
      for name in ways
    }
    | {
      'harvest_over_hooks': over('harvest', 'hooks'),
      'harvest_over_stopped': over('harvest', 'stopped'),
      'forward_over_stopped': over('forward', 'stopped'),
      'difference': float((np.abs(ours_RD - theirs_RD).max(-1) / norm_R).max()),
    }
  )


def work() -> None:
  """Measures as the flags say."""
  if torch is None:
    raise errors.UserError(
      'torch and transformers are not here: pip install torch transformers'
    )
  workdir = pathlib.Path(flags.url('workdir'))
  print(json.dumps(measure(flags.read(BenchmarkConfig), workdir)))


if __name__ == '__main__':
  huge_pages.use_huge_pages()
  flags.define(BenchmarkConfig)
  flags.define_url(
    'workdir', 'folder in which harvest_store/ is written, replacing an old one'
  )
  flags.run(work, __doc__)
