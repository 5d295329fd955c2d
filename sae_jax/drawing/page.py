"""Pages of one HTML file."""

from collections.abc import Sequence
import html as html_lib

from matplotlib.figure import Figure

from sae_jax.drawing import figures

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2330; max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.3rem; margin-top: 2.5rem; }
h3 { font-size: 1.05rem; margin-top: 2rem; }
figure { margin: 0; }
table { border-collapse: collapse; margin: 0.8rem 0; display: block;
  overflow-x: auto; font-size: 0.9rem; }
th, td { text-align: left; padding: 0.25rem 0.8rem 0.25rem 0;
  border-bottom: 1px solid #e2e5ea; vertical-align: top; }
td.open { color: #a13f12; } code { font-size: 0.9rem; }
p.open { color: #a13f12; } svg { max-width: 100%; height: auto; }
dt { font-weight: 600; } dd { margin: 0 0 0.5rem 1rem; }
"""


def document(title: str, parts: Sequence[str]) -> str:
  """A page of parts that are HTML; its heading is the title."""
  body = '\n'.join([f'<h1>{text(title)}</h1>', *parts])
  return (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    '<link rel="icon" href="data:,">\n'
    f'<title>{text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n'
    f'<body>\n{body}\n</body>\n</html>\n'
  )


def text(words: object) -> str:
  """Words as HTML shows them."""
  return html_lib.escape(str(words))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table; a cell that begins with `!` is shown as open."""
  lines = ['<table>', '<tr>' + ''.join(f'<th>{text(h)}</th>' for h in head)]
  for row in rows:
    cells = ''.join(
      f'<td class="open">{text(cell[1:])}</td>'
      if cell.startswith('!')
      else f'<td>{text(cell)}</td>'
      for cell in row
    )
    lines.append(f'<tr>{cells}')
  return '\n'.join([*lines, '</table>'])


def picture(name: str, figure: Figure) -> str:
  """A figure, drawn within the page."""
  # An SVG within a page has no prologue.
  _, _, drawing = figures.svg(figure, name).partition('<svg')
  return f'<figure aria-label="{text(name)}"><svg{drawing}</figure>'
