"""Steering: the subject writes on while latents are held up or down."""

from collections.abc import Mapping, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import autoencoder, errors
from sae_jax.checkpoint import Trained
from sae_jax.subject import capture, generate, Subject
from sae_jax.subject.formats import tokenizer as tokenizer_lib


@flax.struct.dataclass
class Push:
  """What is added to every token's activations.

  Attributes:
    vector_BD: in the space of the autoencoder, such as an activation times a
      decoder row: one for each sequence, or one for all.
    sae: an autoencoder without latents, for the preprocessing.
    config: its config.
  """

  vector_BD: jax.Array
  sae: autoencoder.Sae
  config: autoencoder.SaeConfig = flax.struct.field(pytree_node=False)


def push(
  config: autoencoder.SaeConfig,
  sae: autoencoder.Sae,
  vector_BD: np.ndarray | jax.Array,
) -> Push:
  """What adds vectors of an autoencoder's space, see `Push`."""
  empty_ND = jnp.zeros((0, config.d_model))
  without_latents = sae.replace(
    w_enc_ND=empty_ND, w_dec_ND=empty_ND, b_lat_N=jnp.zeros(0), extra={}
  )
  return Push(jnp.asarray(vector_BD, jnp.float32), without_latents, config)


def apply(push: Push, raw_BTD: jax.Array) -> jax.Array:
  """Raw activations with the vector added, at each token's own scale.

  All else stays: what other latents and the autoencoder's error stand for.
  """
  flat_BD = raw_BTD.reshape(-1, raw_BTD.shape[-1])
  _, affine = autoencoder.preprocess(push.config, push.sae, flat_BD)
  scale_BT1 = affine.scale.reshape(*raw_BTD.shape[:2], 1)
  moved_BTD = raw_BTD + scale_BT1 * push.vector_BD[:, None]
  return moved_BTD.astype(raw_BTD.dtype)


def steer(
  subject: Subject,
  trained: Trained,
  strengths: Mapping[int, float],
  prompts: str | Sequence[str],
  *,
  n_new: int = 40,
  temperature: float = 0.0,
  seed: int = 0,
) -> list[str]:
  """What the subject writes after prompts while latents are steered.

  At every token that it writes, each latent's decoder row is added to the
  activation that the autoencoder reads, times its strength; what the
  autoencoder does not explain stays as it is.

  Args:
    subject: the model that the autoencoder was trained on.
    trained: the autoencoder, from `sae_jax.load`.
    strengths: by latent, in units of its activation: the column `max` of the
      feature table is a strong one, negative ones push it down.
    prompts: one text, or several.
    n_new: tokens to write after each.
    temperature: 0 for the likeliest token each time.
    seed: of the draws, where the temperature is above 0.

  Returns:
    The new text after each prompt.

  Raises:
    UserError: if there is no such latent, the autoencoder is of another
      subject, or a prompt has no tokens.
  """
  n_latents = trained.config.n_latents
  for latent in strengths:
    if not 0 <= latent < n_latents:
      raise errors.UserError(
        f'there is no latent {latent}: give 0 to {n_latents - 1}'
      )
  dataset = trained.metadata.dataset
  if dataset['weights_sha256'] != subject.weights_sha256:
    raise errors.UserError(
      f'the autoencoder was trained on {dataset["subject"]} '
      f'({dataset["weights_sha256"][:8]}), not on {subject.name} '
      f'({subject.weights_sha256[:8]}): load the subject that it is of'
    )
  latents = np.array(list(strengths), np.int32)
  amounts = np.array(list(strengths.values()), np.float32)
  vector_1D = (amounts @ trained.sae.w_dec_ND[latents])[None]
  edit = generate.Edit(
    capture.parse_site(dataset['site'], subject.config),
    apply,
    push(trained.config, trained.sae, vector_1D),
    on_prompt=False,
  )
  texts = [prompts] if isinstance(prompts, str) else list(prompts)
  start = tokenizer_lib.context_start(
    subject.tokenizer, dataset.get('bos') or ''
  )
  first = [] if start is None else [start]
  ids = [first + tokenizer_lib.encode(subject.tokenizer, t) for t in texts]
  for text, own in zip(texts, ids):
    if not own:
      raise errors.UserError(f'prompt {text!r} has no tokens: give a word')
  longest = max(map(len, ids))
  tokens_BT = np.zeros((len(ids), longest), np.int32)
  for row, own in enumerate(ids):
    tokens_BT[row, : len(own)] = own
  new_BT = generate.generate(
    subject.config,
    subject.params,
    tokens_BT,
    n_new,
    length_B=np.array(list(map(len, ids))),
    sampling=generate.Sampling(temperature=temperature),
    edits=(edit,),
    seed=seed,
  )
  return [
    tokenizer_lib.decode(subject.tokenizer, own)
    for own in np.asarray(new_BT).tolist()
  ]
