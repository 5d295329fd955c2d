"""SAELens's own metrics of autoencoders on stored activations.

  python -m experiments.interchange.saelens_metrics WORKDIR

It runs where SAELens is and sae_jax is not; `evaluated` calls it. WORKDIR has
asked.json and rows.npz; SAELens trains one more autoencoder, and writes it and
metrics.json.
"""

import json
import pathlib
import sys

import numpy as np
import sae_lens
from sae_lens import evals
import torch

from experiments.peers import torch_libraries

# The token that is left out, and how much larger its activations are.
_BOS, _LARGER = 0, 100.0
_ROWS = 1000


class Stored:
  """Stored activations in place of a model and of its store of activations.

  Batches are one context each, which begins with a token of id `_BOS`.
  """

  def __init__(self, rows_RD: torch.Tensor, site: str):
    self.batches = rows_RD.split(_ROWS)
    self._left = iter(self.batches)
    self._site = site

  def get_batch_tokens(self, n_contexts: int) -> torch.Tensor:
    self._rows_BD = next(self._left)
    tokens_BL = torch.ones(n_contexts, 1 + len(self._rows_BD), dtype=torch.long)
    tokens_BL[:, 0] = _BOS
    return tokens_BL

  def run_with_cache(self, tokens_BL: torch.Tensor, **_) -> tuple[None, dict]:
    first_1D = _LARGER * self._rows_BD[:1]
    return None, {self._site: torch.cat([first_1D, self._rows_BD])[None]}


def metrics(
  sae: sae_lens.SAE, rows_RD: torch.Tensor, ignored: list[int]
) -> dict[str, float]:
  """What SAELens's `get_sparsity_and_variance_metrics` says."""
  stored = Stored(rows_RD, sae.cfg.metadata.hook_name)
  scalars, of_latents = evals.get_sparsity_and_variance_metrics(
    sae,
    stored,
    stored,
    sae_lens.training.activation_scaler.ActivationScaler(),
    n_batches=len(stored.batches),
    compute_l2_norms=True,
    compute_sparsity_metrics=True,
    compute_variance_metrics=True,
    compute_featurewise_density_statistics=True,
    eval_batch_size_prompts=1,
    model_kwargs={},
    ignore_tokens=ignored,
  )
  silent = np.mean(np.array(of_latents['feature_density']) == 0)
  return scalars | {'share of feature_density 0': float(silent)}


def train(folder: pathlib.Path, rows_RD: torch.Tensor, asked: dict) -> None:
  """An autoencoder by SAELens's trainer, saved as it saves one to use."""
  torch.manual_seed(0)
  trainer = torch_libraries.saelens(
    torch_libraries.shuffled(rows_RD, asked['batch']),
    d=rows_RD.shape[1],
    n=asked['n'],
    k=asked['k'],
    batch=asked['batch'],
    steps=asked['steps'],
    options={
      'metadata': sae_lens.saes.sae.SAEMetadata(hook_name=asked['site'])
    },
  )
  trainer.sae.save_inference_model(folder)


def main() -> None:
  workdir = pathlib.Path(sys.argv[1])
  asked = json.loads((workdir / 'asked.json').read_text())
  rows = np.load(workdir / 'rows.npz')
  train_RD, test_RD = (torch.from_numpy(rows[n]) for n in ('train', 'test'))
  train(workdir / asked['own'], train_RD, asked)
  result = {}
  for name in (*asked['folders'], asked['own']):
    sae = sae_lens.SAE.load_from_disk(workdir / name)
    with torch.no_grad():
      result[name] = metrics(sae, test_RD, [_BOS])
      result[f'{name}: all tokens'] = metrics(sae, test_RD, [])
      sae.b_dec.zero_()
      result[f'{name}: without b_dec'] = metrics(sae, test_RD, [_BOS])
      sae = sae_lens.SAE.load_from_disk(workdir / name)
      sae.W_dec.copy_(sae.W_dec.roll(1, 0))
      result[f'{name}: rows moved'] = metrics(sae, test_RD, [_BOS])
  (workdir / 'metrics.json').write_text(json.dumps(result))


if __name__ == '__main__':
  main()
