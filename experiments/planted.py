"""Which evaluations tell a true dictionary from worse ones.

A small subject is made whose residual stream is a sum of known directions, and
text that it writes itself. Every evaluation of the suite is then done of four
autoencoders: the true directions ("oracle"), one that is trained, one that is
trained with a frozen random decoder, and an untrained one. A figure is of use
where it orders oracle, trained and random, in units of the smallest difference
that it can show.

Prints the table of docs/evaluation.md, and a line of JSON. What orders is what
`Statistic.orders` says; the others are not in the summary of a report.

  python -m experiments.planted --workdir=runs/planted
"""

import dataclasses
import json
from typing import Any

from absl import logging
from etils import epath
import jax
import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

import sae_jax
from sae_jax import checkpoint
from sae_jax import mesh as mesh_lib
from sae_jax import store as store_lib
from sae_jax import subject as subject_lib
from sae_jax.cli import flags, huge_pages
from sae_jax.probing import reconstruction
from sae_jax.probing.scan import run as scan_lib
from sae_jax.probing.scan.config import ScanConfig
from sae_jax.probing.suite import context as context_lib
from sae_jax.probing.suite import evaluations, figures
from sae_jax.probing.suite import scored as scored_lib
from sae_jax.subject import transformer

ORACLE, TRAINED, FROZEN, RANDOM = 'oracle', 'trained', 'frozen', 'random'
SITE = 'blocks.0.resid_post'
# As many directions as dimensions, at right angles, so that a linear encoder
# finds them exactly: the oracle has no error of its own.
DIRECTIONS, ACTIVE, VOCABULARY = 64, 4, 1500
# Tokens that each direction makes likelier, and by how much.
_PROMOTED, _LOGIT = 12, 5.0
# Of a token's directions, after the final norm has made their squares 64.
_GAIN = 0.4
_DOCUMENTS, _TOKENS = 3000, 64
_STEPS, _BATCH = 3000, 1024

CONFIG = transformer.TransformerConfig(
  n_layers=2, d_model=DIRECTIONS, n_heads=1, n_kv_heads=1, d_head=8, d_ff=8,
  vocab_size=VOCABULARY, rope_base=1e4, norm_eps=1e-5, rope_pairs='half',
  tied=False,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Planted:
  """A subject and what it is made of.

  Attributes:
    subject: its blocks do nothing: the stream is the embedding throughout.
    directions_FD: orthonormal rows.
    codes_VF: how much of each direction each token has.
  """

  subject: subject_lib.Subject
  directions_FD: np.ndarray
  codes_VF: np.ndarray


def make_subject(seed: int = 0) -> Planted:
  """The subject: sums of directions, each of which promotes a few tokens."""
  rng = np.random.default_rng(seed)
  directions, _ = np.linalg.qr(rng.standard_normal((DIRECTIONS, DIRECTIONS)))
  # Some directions are frequent, as features are.
  weight = 1 / np.arange(1, DIRECTIONS + 1) ** 0.5
  chance = np.log(weight) + rng.gumbel(size=(VOCABULARY, DIRECTIONS))
  chosen = np.argsort(-chance, 1)[:, :ACTIVE]
  codes = np.zeros((VOCABULARY, DIRECTIONS))
  size = rng.uniform(0.5, 1.5, chosen.shape)
  np.put_along_axis(codes, chosen, size, axis=1)
  promoted = np.zeros((VOCABULARY, DIRECTIONS))
  for direction in range(DIRECTIONS):
    tokens = rng.choice(VOCABULARY, _PROMOTED, replace=False)
    promoted[tokens, direction] = _LOGIT
  params = transformer.init(CONFIG, jax.random.key(seed))
  blocks = params['blocks']
  for name in ('attn_out', 'down'):
    blocks[name] = np.zeros_like(blocks[name])
  params |= {
    'embed': np.float32(codes @ directions),
    'unembed': np.float32(promoted @ directions * _GAIN),
  }
  words = {f'w{i}': i for i in range(VOCABULARY)}
  tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token='w0'))
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  subject = subject_lib.Subject(
    'planted', CONFIG, jax.tree.map(np.asarray, params), tokenizer, 'f' * 64
  )
  return Planted(subject, directions, codes)


def write_text(planted: Planted, path: epath.Path, seed: int = 1) -> None:
  """Documents that the subject writes: each token is drawn from its own."""
  rng = np.random.default_rng(seed)
  params = planted.subject.params
  logits = transformer.unembed(CONFIG, params, params['embed'][None])[0]
  cumulative_VV = np.cumsum(np.asarray(jax.nn.softmax(logits), np.float64), 1)
  token_C = rng.integers(0, VOCABULARY, _DOCUMENTS)
  tokens = [token_C]
  for _ in range(_TOKENS - 1):
    chance_C = rng.random(_DOCUMENTS)
    rows_CV = cumulative_VV[token_C]
    token_C = (rows_CV < chance_C[:, None] * rows_CV[:, -1:]).sum(1)
    tokens.append(token_C)
  lines = [
    json.dumps({'text': ' '.join(f'w{t}' for t in document)})
    for document in np.stack(tokens, 1)
  ]
  path.write_text('\n'.join(lines) + '\n')


def prepared(workdir: epath.Path) -> Planted:
  """The subject, with its folder, its store and both runs in the workdir."""
  workdir.mkdir(parents=True, exist_ok=True)
  planted = make_subject()
  folder = workdir / 'subject'
  if not (folder / 'subject.json').exists():
    subject_lib.save(planted.subject, str(folder))
    write_text(planted, workdir / 'text.jsonl')
  sae_jax.harvest(
    sae_jax.HarvestConfig(
      subject=str(folder),
      sites=(SITE,),
      sources=(str(workdir / 'text.jsonl'),),
      n_tokens=_DOCUMENTS * _TOKENS // 2,
      context_length=_TOKENS,
      holdout_fraction=0.2,
    ),
    str(workdir / 'store'),
  )
  for name, freeze in ((TRAINED, 'none'), (FROZEN, 'decoder')):
    sae_jax.train(
      sae_jax.TrainConfig(
        sae=sae_jax.SaeConfig(
          n_latents=DIRECTIONS, k=ACTIVE, preprocessing='none',
          decoder_init='random',
        ),
        steps=_STEPS,
        batch_size=_BATCH,
        optimizer=sae_jax.OptimizerConfig(freeze=freeze),
      ),
      str(workdir / 'store'),
      str(workdir / name),
    )  # fmt: skip
  return planted


def oracle(planted: Planted, like: checkpoint.Trained) -> checkpoint.Trained:
  """The true directions, by which it encodes and decodes."""
  sae = like.sae.replace(
    w_enc_ND=np.float32(planted.directions_FD),
    w_dec_ND=np.float32(planted.directions_FD),
    b_lat_N=np.zeros(DIRECTIONS, np.float32),
    b_pre_D=np.zeros(DIRECTIONS, np.float32),
  )
  return dataclasses.replace(like, sae=jax.tree.map(jax.numpy.asarray, sae))


def measure(workdir: epath.Path, seed: int = 0) -> dict[str, Any]:
  """Figures of all autoencoders, and the gaps between them."""
  planted = prepared(workdir)
  mesh = mesh_lib.one_device()
  store = store_lib.open_store(str(workdir / 'store'), in_order=True)
  trained, frozen = (
    checkpoint.load(str(workdir / name), mesh=mesh)
    for name in (TRAINED, FROZEN)
  )
  sample_BD = store.finite_rows(0, 10_000)
  scored = {
    ORACLE: oracle(planted, trained),
    TRAINED: trained,
    FROZEN: frozen,
    RANDOM: reconstruction.untrained(trained.config, sample_BD, 1, mesh),
  }
  rows = []
  for name in evaluations.NAMES:
    evaluation = evaluations.of(name)
    samples = {}
    for who, of in scored.items():
      # Each as the one that is evaluated: some evaluations are of that alone.
      context = _context(planted.subject, store, mesh, sample_BD, of, who, seed)
      try:
        outcome = evaluation.measure(context)
      except context_lib.CannotMeasure as error:
        logging.warning('%s: %s', name, error)
        break
      samples[who] = outcome.samples[who]
    if len(samples) == len(scored):
      for key, statistic in evaluation.STATISTICS.items():
        if statistic.better and not statistic.points:
          rows.append(_row(name, key, statistic, samples))
  return {'rows': rows}


def _context(subject, store, mesh, sample_BD, trained, who, seed):
  """The context of one autoencoder, with what a scan says of it."""
  workdir = epath.Path(f'{store.url}.{who}.scan')
  config = ScanConfig(pca_rows=1000, eval_rows=1000, save_every_rows=10**9)
  result = scan_lib.scan(config, trained, store, str(workdir), mesh, {})
  counts_N, max_N = result.counts_and_maxima()
  context = context_lib.Context(
    scored={who: scored_lib.of(trained, mesh, ACTIVE)},
    subject=subject,
    store=store,
    mesh=mesh,
    mean_D=sample_BD.mean(0),
    seed=seed,
    size=evaluations.QUICK,
    counts_N=counts_N,
    max_N=max_N,
    top_rows=result.top_rows,
  )
  workdir.rmtree()
  return context


def _row(name, key, statistic, samples) -> dict[str, Any]:
  """A figure of all, and its gaps in units of the least that it can show."""
  of = {who: figures.figure(statistic, s) for who, s in samples.items()}
  sign = 1 if statistic.better == 'high' else -1

  def gap(one, other):
    values = [of[who].value for who in (one, other)]
    least = max(of[who].least_difference or 0 for who in (one, other))
    if None in values or not least:
      return None
    return sign * (values[0] - values[1]) / least

  gaps = [gap(ORACLE, TRAINED), gap(TRAINED, RANDOM), gap(TRAINED, FROZEN)]
  return {
    'evaluation': name,
    'figure': key,
    'title': statistic.title,
    'better': statistic.better,
    'values': {who: figure.value for who, figure in of.items()},
    'gaps': gaps,
    'orders': all(g is not None and g > 1 for g in gaps[:2]),
  }


def lines(rows: list[dict[str, Any]]) -> list[str]:
  """The table, in Markdown."""
  head = ['figure', 'better', ORACLE, TRAINED, FROZEN, RANDOM]
  head += ['oracle from trained', 'trained from random', 'trained from frozen']
  out = ['| ' + ' | '.join([*head, 'orders?']) + ' |', '|---' * 10 + '|']
  for row in rows:
    cells = [f'{row["evaluation"]}: {row["title"]}', row['better']]
    cells += [_number(row['values'][who]) for who in head[2:6]]
    cells += [_number(gap, '.1f') for gap in row['gaps']]
    cells.append('yes' if row['orders'] else 'no')
    out.append('| ' + ' | '.join(cells) + ' |')
  return out


def _number(value: float | None, form: str = '.3g') -> str:
  return 'none' if value is None else format(value, form)


def work() -> None:
  """Measures and prints."""
  result = measure(epath.Path(flags.url('workdir')))
  print('\n'.join(lines(result['rows'])))
  for row in result['rows']:
    statistic = evaluations.of(row['evaluation']).STATISTICS[row['figure']]
    if statistic.orders != row['orders']:
      print(f'{row["evaluation"]}: {row["title"]}: orders is not as declared')
  print(json.dumps(result))


def main() -> None:
  """Entry point."""
  flags.define_url('workdir', 'folder for subject, store and runs')
  flags.run(work, __doc__)


if __name__ == '__main__':
  huge_pages.use_huge_pages()
  main()
