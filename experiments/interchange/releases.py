"""Autoencoders in the formats of releases, evaluated by SAELens's loaders."""

import json
import pathlib

import numpy as np
import sae_lens
from sae_lens.loading import pretrained_sae_loaders as loaders
from safetensors.torch import save_file
import torch

from experiments.interchange.drawn import (
  activations,
  D,
  K,
  made,
  N,
  save_expected,
)


def as_saelens(config: dict, state: dict):
  config = loaders.handle_config_defaulting(config)
  kind, config_class = sae_lens.registry.get_sae_class(config['architecture'])
  sae = kind(config_class.from_dict(config))
  sae.load_state_dict({name: x.double() for name, x in state.items()})
  return sae.to(torch.float64)


def weights(names: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
  return {
    name: torch.rand(shape) if 'threshold' in name else torch.randn(shape) * 0.5
    for name, shape in names.items()
  }


def qwen_scope(folder: pathlib.Path) -> None:
  here = made(folder)
  state = weights(
    {'W_enc': (N, D), 'W_dec': (D, N), 'b_enc': (N,), 'b_dec': (D,)}
  )
  torch.save(state, here / 'layer0.sae.pt')
  local(here)
  sae = as_saelens(
    *loaders.qwen_scope_sae_huggingface_loader(
      f'Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}',
      'layer0.sae.pt',
      cfg_overrides={'d_in': D, 'd_sae': N, 'dtype': 'float64'},
    )[:2]
  )
  x = activations()
  save_expected(here, x=x, z=sae.encode(x), y=sae(x))


def local(folder: pathlib.Path) -> None:
  """Has SAELens take the files of a repository from a folder."""
  loaders.hf_hub_download = lambda repo_id, filename, subfolder='', **_: str(
    folder / subfolder / filename
  )


def gemma_scope(folder: pathlib.Path) -> None:
  here = made(folder)
  shapes = {'W_enc': (D, N), 'W_dec': (N, D), 'b_enc': (N,), 'b_dec': (D,)}
  state = weights(shapes | {'threshold': (N,)})
  np.savez(here / 'params.npz', **{k: v.numpy() for k, v in state.items()})
  sae = as_saelens(
    {
      'architecture': 'jumprelu',
      'd_in': D,
      'd_sae': N,
      'apply_b_dec_to_input': False,
      'hook_name': 'blocks.0.hook_resid_post',
      'dtype': 'float64',
    },
    state,
  )
  x = activations()
  save_expected(here, x=x, z=sae.encode(x), y=sae(x))


def gemma_scope2(folder: pathlib.Path) -> None:
  name = 'transcoder/layer_3_width_16k_l0_small_affine'
  here = made(folder / name)
  state = weights(
    {
      'w_enc': (D, N),
      'w_dec': (N, D),
      'b_enc': (N,),
      'b_dec': (D,),
      'threshold': (N,),
      'affine_skip_connection': (D, D),
    }
  )
  save_file(state, here / 'params.safetensors')
  config = {
    'architecture': 'jump_relu',
    'type': 'transcoder',
    'model_name': 'google/gemma-3-1b-pt',
    'width': N,
    'l0': 10,
    'affine_connection': True,
    'hf_hook_point_in': 'model.layers.3.pre_feedforward_layernorm.output',
    'hf_hook_point_out': 'model.layers.3.post_feedforward_layernorm.output',
  }
  (here / 'config.json').write_text(json.dumps(config))
  local(folder)
  loaders.get_safetensors_tensor_shapes = lambda repo, file: {
    key: list(value.shape) for key, value in state.items()
  }
  sae = as_saelens(
    *loaders.gemma_3_sae_huggingface_loader(
      'google/gemma-scope-2-1b-pt', name, cfg_overrides={'dtype': 'float64'}
    )[:2]
  )
  x = activations()
  save_expected(here, x=x, z=sae.encode(x), y=sae(x))


def llama_scope(folder: pathlib.Path) -> None:
  """With a decoder of unit norm, and one norm: SAELens knows no others."""
  here = made(folder / 'L0R')
  made(here / 'checkpoints')
  state = weights(
    {
      'encoder.weight': (N, D),
      'encoder.bias': (N,),
      'decoder.weight': (D, N),
      'decoder.bias': (D,),
    }
  )
  state['decoder.weight'] /= state['decoder.weight'].norm(dim=0)
  save_file(state, here / 'checkpoints/final.safetensors')
  norm = 7.5
  config = {
    'd_model': D,
    'd_sae': N,
    'act_fn': 'jumprelu',
    'jump_relu_threshold': 0.4,
    'norm_activation': 'dataset-wise',
    'dataset_average_activation_norm': {'in': norm, 'out': norm},
    'sparsity_include_decoder_norm': True,
    'use_decoder_bias': True,
    'apply_decoder_bias_to_pre_encoder': False,
    'use_glu_encoder': False,
    'top_k': K,
    'hook_point_in': 'blocks.0.hook_resid_post',
    'hook_point_out': 'blocks.0.hook_resid_post',
  }
  (here / 'hyperparams.json').write_text(json.dumps(config))
  local(folder)
  sae = as_saelens(
    *loaders.llama_scope_sae_huggingface_loader(
      'fnlp/x', 'L0R', cfg_overrides={'dtype': 'float64'}
    )[:2]
  )
  sae.fold_activation_norm_scaling_factor(D**0.5 / norm)
  x = activations()
  save_expected(here, x=x, z=sae.encode(x), y=sae(x))
