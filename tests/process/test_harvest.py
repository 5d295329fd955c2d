"""A harvest whose text other processes tokenize."""

from tests.support import toy


def test_processes_that_tokenize_change_nothing(texts, tmp_path):
  here = toy.run(toy.config(texts), tmp_path / 'here')
  there = toy.run(toy.config(texts, tokenizer_workers=2), tmp_path / 'there')
  assert here == there
  assert (
    toy.run(toy.config(texts, tokenizer_workers=1), tmp_path / 'there') == here
  )
