"""Public PyTorch trainers of TopK autoencoders, each by its own loop.

It imports none of them until a function is called, and nothing of this package.
Batches come from an iterator of tensors [B, D] on the device.
"""

from collections.abc import Iterator
import itertools
from typing import Any


def shuffled(rows_RD: Any, batch: int) -> Iterator:
  """Whole batches [B, D] of rows, without end; torch orders each epoch anew.

  Args:
    rows_RD: at least `batch` rows.
    batch: B.
  """
  import torch

  for _ in itertools.count():
    for at in torch.randperm(len(rows_RD)).split(batch):
      if len(at) == batch:
        yield rows_RD[at]


def sparsify(
  batches: Iterator,
  *,
  d: int,
  n: int,
  k: int,
  batch: int,
  steps: int,
  device: str = 'cpu',
  **options: Any,
) -> Any:
  """Trains by sparsify's `Trainer.fit`, and returns the `Trainer`.

  Its one autoencoder is in `saes['site']`, with the weights that it would save.

  Args:
    batches: one batch a step.
    d: width.
    n: latents.
    k: active latents.
    batch: tokens of a step.
    steps: steps.
    device: torch's name of the device.
    **options: of its `TrainConfig`.
  """
  import sparsify
  import torch

  class Stub(torch.nn.Module):
    """Has what `Trainer` asks of a model; its one site gives the batches."""

    def __init__(self):
      super().__init__()
      self.device = torch.device(device)
      self.dummy_inputs = {'input_ids': torch.zeros(1, 1, dtype=torch.long)}
      self.site = torch.nn.Identity()
      # `Trainer.__init__` runs the model once, to learn the site's width.
      self.batches = iter([torch.zeros(1, d)])

    @property
    def base_model(self):
      return self

    def forward(self, input_ids):
      return self.site(next(self.batches)[None])

  class Trainer(sparsify.Trainer):
    # `fit` ends with a checkpoint, which would count in the last step.
    def save(self):
      pass

  model = Stub()
  tokens = torch.zeros(batch, dtype=torch.long)
  trainer = Trainer(
    sparsify.TrainConfig(
      sparsify.SparseCoderConfig(num_latents=n, k=k),
      batch_size=1,
      hookpoints=['site'],
      log_to_wandb=False,
      **options,
    ),
    [{'input_ids': tokens}] * steps,
    model,
  )
  model.batches = batches
  trainer.fit()
  for optimizer in trainer.optimizers:
    # As where it saves: the weights of a schedule-free one are an average.
    if hasattr(optimizer, 'eval'):
      optimizer.eval()
  return trainer


def saelens(
  batches: Iterator,
  *,
  d: int,
  n: int,
  k: int,
  batch: int,
  steps: int,
  device: str = 'cpu',
  bias: Any = None,
  options: dict[str, Any] | None = None,
  **trainer_options: Any,
) -> Any:
  """Trains by SAELens's `SAETrainer.fit`, and returns the `SAETrainer`.

  Its `sae` takes unscaled rows.

  Args:
    batches: see `sparsify`.
    d: see `sparsify`.
    n: see `sparsify`.
    k: see `sparsify`.
    batch: see `sparsify`.
    steps: see `sparsify`.
    device: see `sparsify`.
    bias: the initial b_dec [D], in the scale of training; None for zeros.
    options: of its `TopKTrainingSAEConfig`.
    **trainer_options: of its `SAETrainerConfig`.
  """
  from sae_lens.config import SAETrainerConfig
  from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
  from sae_lens.training.sae_trainer import SAETrainer

  sae = TopKTrainingSAE(
    TopKTrainingSAEConfig(
      d_in=d, d_sae=n, k=k, device=device, **(options or {})
    )
  )
  if bias is not None:
    sae.b_dec.data[:] = bias
  trainer = SAETrainer(
    SAETrainerConfig(
      total_training_samples=steps * batch,
      train_batch_size_samples=batch,
      device=device,
      # It must be set, but the default schedule, constant, does not read it.
      lr_end=3e-5,
      **trainer_options,
    ),
    sae,
    batches,
  )
  trainer.fit()
  return trainer


def dictionary_learning(
  batches: Iterator,
  *,
  d: int,
  n: int,
  k: int,
  steps: int,
  device: str = 'cpu',
  normalize: bool = False,
  **options: Any,
) -> Any:
  """Trains by `trainSAE`, and returns the `TopKTrainer`.

  Args:
    batches: see `sparsify`.
    d: see `sparsify`.
    n: see `sparsify`.
    k: see `sparsify`.
    steps: see `sparsify`.
    device: see `sparsify`.
    normalize: `trainSAE`'s `normalize_activations`: rows are divided by the
      root of their mean squared norm, here that of the first batch; the
      autoencoder that it leaves takes unscaled rows.
    **options: of its `TopKTrainer`.
  """
  from dictionary_learning.trainers.top_k import TopKTrainer
  from dictionary_learning.training import trainSAE

  trainers = []

  # `trainSAE` makes the trainer and does not return it.
  def make(**config):
    trainers.append(TopKTrainer(**config))
    return trainers[0]

  class Normalized:
    """Is read twice: the first batch for its norm, and all to train."""

    def __init__(self):
      first = next(batches)
      # Training divides its batches in place.
      self.readings = iter([[first.clone()], itertools.chain([first], batches)])

    def __iter__(self):
      return iter(next(self.readings))

  config = {
    'trainer': make,
    'steps': steps,
    'activation_dim': d,
    'dict_size': n,
    'k': k,
    'layer': 0,
    'lm_name': 'none',
    'device': device,
    **options,
  }
  trainSAE(
    Normalized() if normalize else batches,
    [config],
    steps,
    device=device,
    normalize_activations=normalize,
  )
  return trainers[0]
