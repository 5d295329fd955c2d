"""An autoencoder that sparsify trains on stored activations, and its FVU.

  python -m experiments.interchange.sparsify_trained WORKDIR

It runs where sparsify is and sae_jax is not; `finetuned` calls it. WORKDIR has
asked.json and rows.npz; the autoencoder and fvu.json are written.
"""

import json
import pathlib
import sys

import numpy as np
import torch

from experiments.peers import torch_libraries


def main() -> None:
  workdir = pathlib.Path(sys.argv[1])
  asked = json.loads((workdir / 'asked.json').read_text())
  rows = np.load(workdir / 'rows.npz')
  train_RD, test_RD = (torch.from_numpy(rows[n]) for n in ('train', 'test'))
  torch.manual_seed(0)
  trainer = torch_libraries.sparsify(
    torch_libraries.shuffled(train_RD, asked['batch']),
    d=train_RD.shape[1],
    n=asked['n'],
    k=asked['k'],
    batch=asked['batch'],
    steps=asked['steps'],
  )
  sae = trainer.saes['site']
  with torch.no_grad():
    # Of all rows at once: its FVU is from the mean of what it is given.
    fvu = float(sae(test_RD).fvu)
  sae.save_to_disk(workdir / asked['folder'])
  (workdir / 'fvu.json').write_text(json.dumps({'fvu': fvu}))


if __name__ == '__main__':
  main()
