"""Small autoencoders in the formats of others, made by their own libraries.

  python -m experiments.interchange.golden FOLDER OPENAI_MODEL

It runs where those libraries are and sae_jax is not; tests/data/interchange/
MADE.md names their versions. OPENAI_MODEL is the path of model.py of
github.com/openai/sparse_autoencoder, which is no package. Beside each
autoencoder stands expected.npz: activations x, and the latents z and the
reconstruction y that the library computes of them in float64.
"""

import functools
import importlib.util
import json
import pathlib
import sys

from circuit_tracer.transcoder import activation_functions
from circuit_tracer.transcoder import single_layer_transcoder as ct
from dictionary_learning import dictionary as dl
from dictionary_learning import utils as dl_utils
from dictionary_learning.trainers import (
  batch_top_k,
  matryoshka_batch_top_k,
  top_k,
)
import sae_lens
from safetensors.torch import save_file
from sparsify import SparseCoder
from sparsify.config import SparseCoderConfig
import torch

from experiments.interchange import releases
from experiments.interchange.drawn import (
  activations,
  D,
  draw,
  K,
  made,
  N,
  ROWS,
  save_expected,
)


def files(folder: pathlib.Path) -> None:
  """Files with every type and view, and their values as float64."""
  here = made(folder)
  base = torch.randn(7, 5)
  state = {
    'transposed': base.T,
    'row': base[3],
    'rows_skipped': base[1::2],
    'column': base[:, 2],
    'parameter': torch.nn.Parameter(torch.randn(3)),
    'scalar': torch.tensor(2.5),
    'empty': torch.zeros(0, 3),
    'deep': torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1),
    'inner': {'weight': torch.randn(2, 2)},
  }
  types = 'float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool'
  for name in types.split():
    state[name] = (torch.randn(4, 3) * 2).abs().to(getattr(torch, name))
  expected = {
    name: x.detach().double()
    for name, x in (state | {'inner.weight': state['inner']['weight']}).items()
    if name != 'inner'
  }
  save_expected(here, **expected)
  state |= {'step': 2**40, 'rate': 0.5, 'words': ['a', None, True], 'name': 'é'}
  torch.save(state, here / 'views.pt')
  torch.save(state, here / 'protocol4.pt', pickle_protocol=4)
  torch.save(state, here / 'legacy.pt', _use_new_zipfile_serialization=False)
  torch.save({'weight': base[:1].expand(4, 5)}, here / 'expanded.pt')
  torch.save(torch.nn.Linear(2, 2), here / 'module.pt')
  torch.save(base, here / 'tensor.pt')
  save_file(
    {name: state[name].contiguous() for name in types.split()},
    here / 'types.safetensors',
  )


def openai(folder: pathlib.Path, source: str) -> None:
  spec = importlib.util.spec_from_file_location('openai_model', source)
  model = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(model)
  for name, activation, normalize in (
    ('topk', model.TopK(K), True),
    ('relu', torch.nn.ReLU(), False),
  ):
    here = made(folder / name)
    sae = model.Autoencoder(N, D, activation, normalize=normalize)
    draw(sae)
    state = sae.state_dict()
    # With today's torch the activation is there twice, which is not read back.
    for key in [key for key in state if key.startswith('activation.')]:
      del state[key]
    torch.save(state, here / 'sae.pt')
    sae = model.Autoencoder.from_state_dict(
      torch.load(here / 'sae.pt')
    ).double()
    x = activations()
    z, info = sae.encode(x)
    save_expected(here, x=x, z=z, y=sae.decode(z, info))


def save_saelens(here: pathlib.Path, sae) -> None:
  """What SAELens reads back from the folder is evaluated."""
  sae = type(sae).load_from_disk(here, dtype='float64')
  x = activations()
  save_expected(here, x=x, z=sae.encode(x), y=sae(x))


def saelens(folder: pathlib.Path) -> None:
  both = dict(d_in=D, d_sae=N)
  metadata = sae_lens.saes.sae.SAEMetadata(
    model_name='gpt2-small',
    hook_name='blocks.3.hook_resid_post',
    context_size=128,
    prepend_bos=True,
  )
  transcoder = sae_lens.saes.transcoder
  classes = {
    'standard': (
      sae_lens.StandardSAE,
      sae_lens.StandardSAEConfig(**both, normalize_activations='layer_norm'),
    ),
    'topk': (
      sae_lens.TopKSAE,
      sae_lens.TopKSAEConfig(**both, k=K, rescale_acts_by_decoder_norm=True),
    ),
    'gated': (
      sae_lens.GatedSAE,
      sae_lens.GatedSAEConfig(
        **both, normalize_activations='constant_norm_rescale'
      ),
    ),
    'jumprelu': (
      sae_lens.JumpReLUSAE,
      sae_lens.JumpReLUSAEConfig(**both, apply_b_dec_to_input=False),
    ),
    'skip_transcoder': (
      transcoder.JumpReLUSkipTranscoder,
      transcoder.JumpReLUSkipTranscoderConfig(
        **both, d_out=D + 2, apply_b_dec_to_input=False
      ),
    ),
  }
  for name, (kind, config) in classes.items():
    here = made(folder / name)
    config.metadata = metadata
    sae = kind(config)
    draw(sae)
    sae.save_model(here)
    save_saelens(here, sae)
  here = made(folder / 'batchtopk')
  config = sae_lens.BatchTopKTrainingSAEConfig(
    **both, k=K, rescale_acts_by_decoder_norm=False
  )
  sae = sae_lens.BatchTopKTrainingSAE(config)
  draw(sae)
  sae.save_inference_model(here)
  save_saelens(here, sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(**both)))


def sparsify(folder: pathlib.Path) -> None:
  for name, settings in {
    'layers.1': dict(num_latents=N),
    'layers.2': dict(num_latents=N, activation='groupmax'),
    'layers.3.mlp': dict(
      expansion_factor=2, transcode=True, skip_connection=True
    ),
  }.items():
    here = made(folder / name)
    sae = SparseCoder(D, SparseCoderConfig(k=K, **settings))
    draw(sae)
    sae.save_to_disk(here)
    sae = SparseCoder.load_from_disk(here).double()
    x = activations()
    values, index, _ = sae.encode(x)
    z = torch.zeros(ROWS, sae.num_latents, dtype=x.dtype)
    save_expected(here, x=x, z=z.scatter_(-1, index, values), y=sae(x).sae_out)
  config = {'model': 'EleutherAI/pythia-70m', 'ctx_len': 64}
  (folder / 'config.json').write_text(json.dumps(config))


def dictionary_learning(folder: pathlib.Path) -> None:
  groups = [N // 4, N - N // 4]
  for name, sae in {
    'AutoEncoder': dl.AutoEncoder(D, N),
    'AutoEncoderNew': dl.AutoEncoderNew(D, N),
    'GatedAutoEncoder': dl.GatedAutoEncoder(D, N),
    'JumpReluAutoEncoder': dl.JumpReluAutoEncoder(D, N),
    'AutoEncoderTopK': top_k.AutoEncoderTopK(D, N, K),
    'BatchTopKSAE': batch_top_k.BatchTopKSAE(D, N, K),
    'MatryoshkaBatchTopKSAE': matryoshka_batch_top_k.MatryoshkaBatchTopKSAE(
      D, N, K, groups
    ),
  }.items():
    here = made(folder / name)
    draw(sae)
    torch.save(sae.state_dict(), here / 'ae.pt')
    trainer = {
      'dict_class': name,
      'activation_dim': D,
      'dict_size': N,
      'layer': 3,
      'lm_name': 'EleutherAI/pythia-70m',
      'submodule_name': 'resid_post_layer_3',
    }
    if hasattr(sae, 'k'):
      trainer['k'] = sae.k.item()
    (here / 'config.json').write_text(
      json.dumps({'trainer': trainer, 'buffer': {'ctx_len': 64}})
    )
    sae = dl_utils.load_dictionary(str(here), 'cpu')[0].double()
    x = activations()
    z = sae.encode(x)
    save_expected(here, x=x, z=z, y=sae.decode(z))


def circuit_tracer(folder: pathlib.Path) -> None:
  """With latents that are kept below zero."""
  k = N - K
  for name, activation, has_skip in (
    ('relu', torch.nn.functional.relu, True),
    ('topk', activation_functions.TopK(k), False),
    ('jumprelu', activation_functions.JumpReLU(torch.rand(N)), False),
  ):
    here = made(folder / name)
    make = functools.partial(
      ct.SingleLayerTranscoder, D, N, activation, 0, dtype=torch.float32
    )
    sae = make(skip_connection=has_skip)
    draw(sae)
    if name == 'jumprelu':
      activation.threshold -= 1
    sae.to_safetensors(str(here / 'layer_0.safetensors'))
    lines = [
      'model_name: meta-llama/Llama-3.2-1B',
      'model_kind: transcoder_set',
      'feature_input_hook: mlp.hook_in',
      'feature_output_hook: hook_mlp_out',
      f'activation: {name}',
    ]
    lines += [f'k: {k}'] * (name == 'topk')
    (here / 'config.yaml').write_text('\n'.join(lines) + '\n')
    x = activations()
    sae = sae.double()
    z = sae.encode(x)
    save_expected(here, x=x, z=z, y=sae.decode(z, x))


def main() -> None:
  folder, source = pathlib.Path(sys.argv[1]), sys.argv[2]
  torch.manual_seed(0)
  with torch.no_grad():
    openai(folder / 'openai', source)
    for make in (
      files,
      saelens,
      sparsify,
      dictionary_learning,
      circuit_tracer,
      releases.qwen_scope,
      releases.gemma_scope,
      releases.gemma_scope2,
      releases.llama_scope,
    ):
      make(folder / make.__name__)


if __name__ == '__main__':
  main()
