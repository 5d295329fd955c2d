"""The columns of the feature table, each declared once.

Their axes: N latents, H bins of the histograms, "M top", "M random", "M near"
and "M decile" examples, each a window of W tokens, "V up" and "V down" tokens
that a latent votes for and against.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import math

from sae_jax import errors

# Far more than the examples of a latent take: 16 windows of 100,000 tokens.
_LATENT_BYTES = 16 * 2**20
_SIZES = {'int32': 4, 'int64': 8, 'float32': 4}


@dataclasses.dataclass(frozen=True)
class Column:
  """The declaration of a column.

  Attributes:
    axes: a name for each axis; axes of the same name have the same size.
    dtype: the type it is stored in.
    meaning: the meaning of one entry.
    group: columns that a table has all or none of; '' if every table has it.
    is_token: whether entries are ids of the subject's vocabulary.
    is_latent: whether entries are latents.
    least: the least entry.
    most: the greatest entry.
    may_be_absent: whether an entry that is not finite stands for no number.
  """

  axes: tuple[str, ...]
  dtype: str
  meaning: str
  group: str = ''
  is_token: bool = False
  is_latent: bool = False
  least: float = -math.inf
  most: float = math.inf
  may_be_absent: bool = False

  @property
  def is_shared(self) -> bool:
    """Whether it is one array for all latents."""
    return self.axes[0] != 'N'

  def row(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Its shape for one latent, or whole if it is shared.

    Args:
      sizes: size of each axis but N.
    """
    axes = self.axes if self.is_shared else self.axes[1:]
    return tuple(
      sizes['H'] + 1 if axis == 'H + 1' else sizes[axis] for axis in axes
    )


MOMENTS = {
  'density': 'share of all tokens on which the latent fires',
  'max': 'largest activation',
  'mean': 'mean of the positive activations',
  'std': 'standard deviation of the positive activations',
  'skew': 'skewness of the positive activations',
}


def _examples(
  kind: str, meaning: str, group: str = '', axes: tuple[str, ...] = ()
) -> dict[str, Column]:
  """Declarations of the examples of one kind."""
  axes = ('N', *axes, f'M {kind}')
  return {
    f'{kind}_tokens': Column(
      (*axes, 'W'),
      'int32',
      f'token around {meaning}; -1 outside the window',
      group,
      is_token=True,
      least=-1,
    ),
    f'{kind}_acts': Column(
      (*axes, 'W'),
      'float32',
      "the latent's activation on that token; 0 if masked",
      group,
      least=0,
    ),
    f'{kind}_peak': Column(
      axes,
      'int32',
      "the example's place in its window; -1: no example",
      group,
      least=-1,
    ),
    f'{kind}_document': Column(
      axes,
      'int32',
      'document of the example; -1: no example',
      group,
      least=-1,
    ),
  }


def _votes(way: str) -> dict[str, Column]:
  """Declarations of the tokens that a latent votes up, or down."""
  axes = ('N', f'V {way}')
  return {
    f'vote_{way}_ids': Column(
      axes,
      'int32',
      f'token that the decoder row pushes {way} most; -1: no vote',
      is_token=True,
      least=-1,
    ),
    f'vote_{way}_logits': Column(
      axes, 'float32', "that token's logit, less the mean over all tokens"
    ),
  }


def _changed(way: str, moves: str) -> dict[str, Column]:
  """Declarations of the tokens that a latent makes likelier, or less likely."""
  axes = ('N', 'V effect')
  return {
    f'effect_{way}_ids': Column(
      axes,
      'int32',
      f'token whose probability {moves} most without the latent there; -1: '
      'none',
      'effects',
      is_token=True,
      least=-1,
    ),
    f'effect_{way}_changes': Column(
      axes,
      'float32',
      'its probability with the latent less that without it; mean over '
      'examples',
      'effects',
      least=-1,
      most=1,
    ),
  }


COLUMNS = {
  'latent_ids': Column(
    ('N',), 'int32', 'number of the latent: that of its row', least=0
  ),
  'count': Column(('N',), 'int64', 'tokens on which the latent fires', least=0),
  **{
    name: Column(
      ('N',),
      'float32',
      meaning,
      least=-math.inf if name == 'skew' else 0,
      most=1 if name == 'density' else math.inf,
      may_be_absent=True,
    )
    for name, meaning in MOMENTS.items()
  },
  'hist_edges': Column(('H + 1',), 'float32', 'activation at an edge of a bin'),
  'hist_counts': Column(
    ('N', 'H'), 'int64', 'positive activations in a bin', least=0
  ),
  **_examples('top', "one of the latent's highest activations, one a document"),
  **_examples('random', "a random one of the latent's positive activations"),
  **_votes('up'),
  **_votes('down'),
  'neighbour_ids': Column(
    ('N', 'neighbours'),
    'int32',
    'latent with a similar decoder row; -1: none',
    is_latent=True,
    least=-1,
  ),
  'neighbour_cosines': Column(
    ('N', 'neighbours'),
    'float32',
    'cosine of the two decoder rows',
    # Rounding reaches beyond one.
    least=-1.001,
    most=1.001,
  ),
  'rank_mean': Column(
    ('N',),
    'float32',
    "mean rank of the latent, from 0, among its tokens' active ones",
    'ranks',
    least=0,
    may_be_absent=True,
  ),
  'margin_mean': Column(
    ('N',),
    'float32',
    "mean of the activation less the token's k-th value",
    'ranks',
    least=0,
    may_be_absent=True,
  ),
  'near_count': Column(
    ('N',),
    'int64',
    'tokens that the latent nearly fires on: of rank k to 2k - 1',
    'near',
    least=0,
  ),
  **_examples(
    'near',
    'one of the highest near misses, one a document',
    'near',
  ),
  'near_values': Column(
    ('N', 'M near'),
    'float32',
    'value of the near miss; 0: no example',
    'near',
    least=0,
  ),
  **_examples(
    'decile',
    "one of the activations in a tenth of the latent's, the lowest tenth first",
    'deciles',
    ('deciles',),
  ),
  'token_ids': Column(
    ('N', 'tokens'),
    'int32',
    'token on which the latent fires, most frequent first; -1: none',
    'tokens',
    is_token=True,
    least=-1,
  ),
  'token_counts': Column(
    ('N', 'tokens'),
    'int64',
    'how often it fires on that token',
    'tokens',
    least=0,
  ),
  'token_shares': Column(
    ('N', 'tokens'),
    'float32',
    'share of that token on which it fires',
    'tokens',
    least=0,
    most=1,
  ),
  'partner_ids': Column(
    ('N', 'partners'),
    'int32',
    'latent that fires together with it, by the phi coefficient; -1: none',
    'partners',
    is_latent=True,
    least=-1,
  ),
  'partner_counts': Column(
    ('N', 'partners'),
    'int64',
    'on how many tokens both fire',
    'partners',
    least=0,
  ),
  'partner_scores': Column(
    ('N', 'partners'),
    'float32',
    'phi coefficient of the two; 0: no partner',
    'partners',
    least=0,
    # Rounding reaches beyond one.
    most=1.001,
  ),
  'probe_train_ce': Column(
    ('N', 'tasks'),
    'float32',
    "training cross-entropy, in nats, of the latent's logistic probe on a task",
    'probes',
    least=0,
  ),
  'effect_kl': Column(
    ('N',),
    'float32',
    'mean KL, in nats, of predictions without the latent from those with it, '
    'on its highest activations; nan: not measured',
    'effects',
    # Rounding reaches below 0.
    least=-1e-3,
    may_be_absent=True,
  ),
  'effect_ce': Column(
    ('N',),
    'float32',
    'how much higher the loss of a next token is without the latent there, in '
    'nats; nan: not measured',
    'effects',
    may_be_absent=True,
  ),
  **_changed('up', 'falls'),
  **_changed('down', 'rises'),
}
GROUPS = tuple(dict.fromkeys(c.group for c in COLUMNS.values() if c.group))


def of_groups(groups: Iterable[str] = ()) -> tuple[str, ...]:
  """The columns that every table has and those of some `GROUPS`, in order."""
  names = {'', *groups}
  return tuple(name for name, c in COLUMNS.items() if c.group in names)


def axes(names: Iterable[str]) -> tuple[str, ...]:
  """The axes of some columns but N; those that have one more give the one."""
  found = (axis.removesuffix(' + 1') for n in names for axis in COLUMNS[n].axes)
  return tuple(dict.fromkeys(axis for axis in found if axis != 'N'))


def check(names: Iterable[str], sizes: Mapping[str, int], where: str) -> None:
  """Checks columns and sizes of a table.

  Args:
    names: its columns.
    sizes: size of each axis but N.
    where: what says so, for the error.

  Raises:
    UserError: if columns are missing or not known, or a size is missing, not
      known or beyond what a latent can need.
  """
  names = tuple(names)
  groups = [COLUMNS[name].group for name in names if name in COLUMNS]
  wanted = of_groups(groups)
  wrong = sorted(set(names) ^ set(wanted))
  if wrong or len(set(names)) < len(names):
    lacking = [name for name in wrong if name in wanted]
    what = f'lack {", ".join(lacking)}' if lacking else f'have {wrong}'
    raise errors.UserError(
      f'{where}: features {what}: run sae-probe of this version'
    )
  if set(sizes) != set(axes(names)):
    wrong = sorted(set(sizes) ^ set(axes(names)))
    raise errors.UserError(
      f'{where}: sizes of the axes {", ".join(wrong)} are missing or of no '
      'column: run sae-probe again'
    )
  for name in names:
    row = COLUMNS[name].row(sizes)
    n_bytes = math.prod(row) * _SIZES[COLUMNS[name].dtype]
    if min(row, default=0) < 0 or n_bytes > _LATENT_BYTES:
      raise errors.UserError(
        f'{where}: {name} takes {n_bytes:,} bytes for a latent, not from 0 to '
        f'{_LATENT_BYTES:,}: run sae-probe with fewer or shorter examples'
      )
  if sizes['H'] < 1 or sizes['W'] < 1:
    raise errors.UserError(
      f'{where}: {sizes["H"]} bins and windows of {sizes["W"]} tokens: each '
      'must be 1 or more: run sae-probe again'
    )
