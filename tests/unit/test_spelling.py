"""Tokens as text that a terminal shows as it is."""

import pytest

from sae_jax.probing import spelling


@pytest.mark.parametrize(
  'tokens, shown',
  [
    (['a', ' b'], 'a b'),
    (['a\n\tb'], 'a↵⇥b'),
    (['\x1b[31m', '\x7f'], '⟨1B⟩[31m⟨7F⟩'),
    # A bidirectional override and a no-break space.
    (['\u202e', '\xa0'], '⟨202E⟩⟨A0⟩'),
    # A character of two tokens, and bytes that are none.
    ([b'\xe2\x82', b'\xac'], '€'),
    ([b'\xe2', 'a', b'\xff'], '⟨xE2⟩a⟨xFF⟩'),
    (['\ud800'], '⟨xED⟩⟨xA0⟩⟨x80⟩'),
  ],
)
def test_nothing_invisible_is_shown(tokens, shown):
  assert spelling.visible(tokens) == shown
  assert shown.isprintable()


@pytest.mark.parametrize(
  'token, shown',
  [
    (' the', '·the'),
    ('  ', '··'),
    ('', '∅'),
    (b'', '∅'),
    ('\u0301', '◌\u0301'),
  ],
)
def test_a_token_alone_shows_its_spaces(token, shown):
  assert spelling.alone(token) == shown


@pytest.mark.parametrize('text', ['abcdef', '日本語', 'ábc', '日a本b', ''])
def test_a_cut_text_fits(text):
  whole = spelling.columns(text)
  for most in range(whole + 2):
    left, right = spelling.cut(text, most), spelling.cut_left(text, most)
    for part in (left, right):
      assert spelling.columns(part) <= most
      # A wide character may leave a column.
      assert part == text or spelling.columns(part) >= most - 1
    if whole > most > 0:
      assert text.startswith(left[:-1]) and left[-1] == '…'
      assert text.endswith(right[1:]) and right[0] == '…'
    elif most >= whole:
      assert left == right == text
