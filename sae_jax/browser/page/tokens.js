// How a token is written: always as text, with nothing in it invisible.

const NAMED = new Map([['\n', '↵'], ['\t', '⇥'], [' ', ' ']]);
const UNSEEN = /[\p{C}\p{Z}]/u;
const SMALLEST_SHADE = 0.08;
const LARGEST_SHADE = 0.85;

// A token's text in lines, each but the last with its newline.
const lines = (text) => text.split(/(?<=\n)/);

function visibleLine(text) {
  if (/^ +$/.test(text)) return '·'.repeat(text.length);
  let shown = /^\p{M}/u.test(text) ? '◌' : '';
  for (const character of text) {
    const code = character.codePointAt(0);
    if (NAMED.has(character)) shown += NAMED.get(character);
    else if (UNSEEN.test(character)) {
      shown += `⟨${code.toString(16).toUpperCase().padStart(2, '0')}⟩`;
    } else shown += character;
  }
  return shown;
}

export function visible(text) {
  return text === '' ? '∅' : lines(text).map(visibleLine).join('');
}

// For a token standing alone, where a leading space would not be seen.
export function alone(text) {
  const shown = visible(text);
  return shown.startsWith(' ') ? `·${shown.slice(1)}` : shown;
}

// The share of ink behind a token: linear in the activation, from a floor
// that keeps the weakest visible.
export function shade(activation, largest) {
  if (!(activation > 0)) return 0;
  const share = Math.min(1, activation / largest);
  return SMALLEST_SHADE + (LARGEST_SHADE - SMALLEST_SHADE) * share;
}

// A token in its context.
export function tokenSpan(text, alpha) {
  const span = document.createElement('span');
  span.className = 'token';
  span.classList.toggle('blank', !text.trim());
  span.classList.toggle('spaced', text.startsWith(' '));
  if (text.includes('\n')) {
    // The breaks are shown in full contexts only, before any indentation.
    for (const line of lines(text)) {
      span.append(visibleLine(line));
      if (line.endsWith('\n')) span.append(document.createElement('br'));
    }
  } else span.textContent = visible(text);
  if (alpha) {
    span.classList.add('on');
    span.style.setProperty('--shade', alpha.toFixed(4));
  }
  return span;
}

export function chip(text, marked = false) {
  const node = document.createElement('span');
  node.className = marked ? 'chip marked' : 'chip';
  node.textContent = alone(text);
  return node;
}
