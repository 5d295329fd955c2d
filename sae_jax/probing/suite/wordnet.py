"""Concepts from WordNet's own files: the names of the kinds of a thing."""

import re

from etils import epath

from sae_jax import errors

# Categories by the noun that they are the kinds or instances of. Where a noun
# has several senses those are taken that have kinds of this sort.
ROOTS = {
  'animals': ('animal', 1),
  'foods': ('food', 2),
  'elements': ('chemical_element', 1),
  'cities': ('city', 1),
}
_WORD = re.compile(r'[A-Za-z][a-z]*(?:[_-][A-Za-z][a-z]*)*')
# Pointers of a data file to kinds and to instances.
_BELOW = ('~', '~i')


def concepts(folder: str) -> dict[str, list[str]]:
  """Words by category, each in one, in the order of the alphabet.

  A word is taken if its first sense, the most frequent, is of the category, so
  that most of its uses mean it. Spaces stand between its parts.

  Args:
    folder: of `index.noun` and `data.noun`, such as /usr/share/wordnet of the
      Debian package wordnet-base; local path or URL.

  Raises:
    UserError: if they are not there, or are no files of WordNet.
  """
  try:
    first = _first_senses((epath.Path(folder) / 'index.noun').read_text())
    words, below = _synsets((epath.Path(folder) / 'data.noun').read_text())
    out = {
      category: _under(first[lemma][sense - 1], first, words, below)
      for category, (lemma, sense) in ROOTS.items()
    }
  except (OSError, UnicodeDecodeError) as error:
    raise errors.UserError(
      f'wordnet {folder} cannot be read ({errors.reason(error)}): give the '
      'folder of index.noun and data.noun, as of the Debian package '
      'wordnet-base'
    ) from error
  except (ValueError, KeyError, IndexError) as error:
    raise errors.UserError(
      f'wordnet {folder} does not hold WordNet as it should be: install it '
      'again'
    ) from error
  taken: set[str] = set()
  for category, own in out.items():
    out[category] = sorted(own - taken)
    taken |= own
  return out


def _first_senses(text: str) -> dict[str, list[str]]:
  """The synsets of each noun, its most frequent sense first.

  A line: lemma, part of speech, number of senses, number of pointer kinds, the
  kinds, two counts, and the offsets of the synsets.
  """
  out = {}
  for line in text.splitlines():
    if line.startswith(' '):
      continue  # the licence
    lemma, _, count, kinds, *rest = line.split()
    out[lemma] = rest[int(kinds) + 2 :][: int(count)]
  return out


def _synsets(text: str) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
  """Words of each synset by its offset, and the synsets below it.

  A line: offset, file, kind, number of words (hexadecimal), each word with a
  number, number of pointers, each of four fields, and the gloss.
  """
  words, below = {}, {}
  for line in text.splitlines():
    if line.startswith(' '):
      continue
    offset, _, _, count, *rest = line.partition(' | ')[0].split()
    n_words = int(count, 16)
    words[offset] = rest[: 2 * n_words : 2]
    pointers = rest[2 * n_words + 1 :]
    below[offset] = [
      pointers[at + 1]
      for at in range(0, 4 * int(rest[2 * n_words]), 4)
      if pointers[at] in _BELOW
    ]
  return words, below


def _under(root, first, words, below) -> set[str]:
  """Words of all synsets below one, whose first sense is there."""
  reached, todo = set(), [root]
  while todo:
    for offset in below[todo.pop()]:
      if offset not in reached:
        reached.add(offset)
        todo.append(offset)
  return {
    word.replace('_', ' ')
    for offset in reached
    for word in words[offset]
    # Symbols of elements are other words too.
    if len(word) > 2
    and _WORD.fullmatch(word)
    and first[word.lower()][0] in reached
  }
