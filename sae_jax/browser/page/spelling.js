// How tokens are spelled: always as text, with nothing in it invisible. A token
// is its text, or a list of its bytes where they are not whole characters.

const NAMED = new Map([['\n', '↵'], ['\t', '⇥'], [' ', ' ']]);
const PLAIN = /^[ -~]+$/; // of ASCII
const UNSEEN = /[\p{C}\p{Z}]/u;
// Zero-width joiner and non-joiner, and the letters of flags of regions: a
// character's look depends on them.
const JOINER = /^[\u200c\u200d\u{e0020}-\u{e007f}]$/u;
const USES_JOINERS = new RegExp('^[\\p{Extended_Pictographic}' + ['Arab',
  'Syrc', 'Mong', 'Deva', 'Beng', 'Guru', 'Gujr', 'Orya', 'Taml', 'Telu',
  'Knda', 'Mlym', 'Sinh', 'Khmr', 'Mymr', 'Tibt']
  .map((script) => `\\p{Script=${script}}`).join('') + ']', 'u');
const RIGHT_TO_LEFT = new RegExp('[\\u0590-\\u08ff\\ufb1d-\\ufdff' +
  '\\ufe70-\\ufefc\\u{10800}-\\u{10fff}\\u{1e800}-\\u{1efff}]', 'u');
const LEFT_TO_RIGHT = /[\p{L}⟨]/u;

const utf8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });
const graphemes = globalThis.Intl?.Segmenter
  ? new Intl.Segmenter('en', { granularity: 'grapheme' }) : null;

function utf8Length(lead) {
  if (lead < 0x80) return 1;
  if (lead < 0xc2) return 0;
  if (lead < 0xe0) return 2;
  if (lead < 0xf0) return 3;
  return lead < 0xf5 ? 4 : 0;
}

// The character that begins at a byte, or null.
function characterAt(bytes, at) {
  const length = utf8Length(bytes[at]);
  if (!length || at + length > bytes.length) return null;
  try {
    return utf8.decode(new Uint8Array(bytes.slice(at, at + length)));
  } catch {
    return null;
  }
}

const hex = (code) => code.toString(16).toUpperCase().padStart(2, '0');

// The characters of tokens in a row: {text, byte, first, last}, where `byte`
// is one that is in no character, and first and last number the tokens.
function characters(tokens) {
  const row = [];
  for (let i = 0; i < tokens.length;) {
    if (typeof tokens[i] === 'string') {
      for (const text of tokens[i]) row.push({ text, first: i, last: i });
      i += 1;
      continue;
    }
    const bytes = [];
    const owners = [];
    // Between bytes there may be tokens without any.
    for (; i < tokens.length
      && (!tokens[i].length || typeof tokens[i] !== 'string'); i += 1) {
      for (const byte of tokens[i]) {
        bytes.push(byte);
        owners.push(i);
      }
    }
    for (let at = 0; at < bytes.length;) {
      const text = characterAt(bytes, at);
      const end = at + (text === null ? 1 : utf8Length(bytes[at]));
      row.push({ text: text ?? '', byte: text === null ? bytes[at] : null,
        first: owners[at], last: owners[end - 1] });
      at = end;
    }
  }
  return row;
}

const joins = ({ text }) => text !== ''
  && (!UNSEEN.test(text) || JOINER.test(text));

// Characters that are one to a reader (marks with their letter, emoji of
// several) become one.
function clusters(row) {
  if (!graphemes || row.every(({ text }) => text < '\u0300')) return row;
  const joined = [];
  for (let i = 0; i < row.length;) {
    let end = i;
    let text = '';
    while (end < row.length && joins(row[end])) {
      text += row[end].text;
      end += 1;
    }
    if (end === i) {
      joined.push(row[i]);
      i += 1;
      continue;
    }
    for (const { segment } of graphemes.segment(text)) {
      const { first } = row[i];
      let rest = segment.length;
      for (; rest > 0; i += 1) rest -= row[i].text.length;
      joined.push({ text: segment, first, last: row[i - 1].last });
    }
  }
  return joined;
}

function shownCluster({ text, byte }) {
  if (Number.isInteger(byte)) return `⟨x${hex(byte)}⟩`;
  if (NAMED.has(text)) return NAMED.get(text);
  const letters = [...text];
  const isPicture = /^\p{Extended_Pictographic}/u.test(text);
  const shown = letters.map((letter, i) => {
    const kept = i > 0 && JOINER.test(letter) && USES_JOINERS.test(text)
      && !(letter === '\u200d' && i + 1 === letters.length && isPicture);
    return UNSEEN.test(letter) && !kept
      ? `⟨${hex(letter.codePointAt(0))}⟩` : letter;
  }).join('');
  // A mark without a letter needs something to stand on.
  return (/^\p{M}/u.test(text) ? '◌' : '') + shown;
}

// The way that shown text runs: 'rtl', 'ltr', '' where it has none of its own.
function direction(shown) {
  if (RIGHT_TO_LEFT.test(shown)) return 'rtl';
  return LEFT_TO_RIGHT.test(shown) ? 'ltr' : '';
}

const dots = (part) => (/^ +$/.test(part) ? '·'.repeat(part.length) : part);

function finish(unit) {
  unit.lines = unit.lines.map(dots);
  unit.direction = direction(unit.lines.join(''));
  return unit;
}

// Tokens in a row as units: {raw, lines, tokens, direction}. A unit is one
// token's text, or one character that is of several tokens: `tokens` numbers
// them. Each of `lines` but the last ends with its newline's sign.
export function spell(tokens) {
  const units = [];
  // Most tokens need no look at their characters, nor at what follows them.
  const isPlain = (token) => typeof token === 'string' && PLAIN.test(token);
  const isAlone = (i) => isPlain(tokens[i])
    && (i + 1 === tokens.length || isPlain(tokens[i + 1]));
  for (let i = 0; i < tokens.length;) {
    if (isAlone(i)) {
      const text = tokens[i];
      units.push({ raw: text, lines: [dots(text)], tokens: [i],
        direction: /[A-Za-z]/.test(text) ? 'ltr' : '' });
      i += 1;
      continue;
    }
    const start = i;
    while (i < tokens.length && !isAlone(i)) i += 1;
    for (const unit of spellTogether(tokens.slice(start, i))) {
      unit.tokens = unit.tokens.map((number) => start + number);
      units.push(unit);
    }
  }
  return units;
}

function spellTogether(tokens) {
  const units = [];
  let unit = null;
  let next = 0;
  const add = (raw, lines, numbers) => {
    unit = { raw, lines, tokens: numbers };
    units.push(unit);
  };
  // A token without characters has a sign.
  const skipTo = (number) => {
    for (; next < number; next += 1) {
      if (!tokens[next].length) add('', ['∅'], [next]);
    }
  };
  for (const cluster of clusters(characters(tokens))) {
    const { first, last } = cluster;
    const shown = shownCluster(cluster);
    const text = cluster.text || shown;
    skipTo(first);
    if (first === last && unit?.tokens.length === 1
      && unit.tokens[0] === first) {
      unit.raw += text;
      unit.lines[unit.lines.length - 1] += shown;
    } else {
      const numbers = [];
      for (let i = first; i <= last; i += 1) {
        if (tokens[i].length) numbers.push(i);
      }
      add(text, [shown], numbers);
    }
    if (text === '\n') unit.lines.push('');
    next = last + 1;
  }
  skipTo(tokens.length);
  for (const one of units) {
    // What follows the last newline may be nothing.
    if (one.lines.length > 1 && one.lines.at(-1) === '') one.lines.pop();
  }
  return units.map(finish);
}

// Units in runs: right-to-left ones are together with what stands between
// them, and with what stands between them and an end of the line.
export function runs(units) {
  const parts = [];
  for (let i = 0; i < units.length;) {
    let end = i;
    let last = -1;
    const isEnd = (unit) => unit.raw.includes('\n');
    while (end < units.length && units[end].direction !== 'ltr'
      && !isEnd(units[end])) {
      if (units[end].direction === 'rtl') last = end;
      end += 1;
    }
    if (units[end]?.direction === 'rtl') {
      last = end;
      end += 1;
    }
    if (last < 0) {
      parts.push(...units.slice(i, Math.max(end, i + 1))
        .map((unit) => ({ direction: '', units: [unit] })));
      i = Math.max(end, i + 1);
      continue;
    }
    let first = i;
    if (i > 0 && !isEnd(units[i - 1])) {
      while (units[first].direction !== 'rtl') first += 1;
    }
    if (end === units.length || isEnd(units[end])) {
      last = Math.max(last, end - 1);
    }
    parts.push(...units.slice(i, first)
      .map((unit) => ({ direction: '', units: [unit] })));
    parts.push({ direction: 'rtl', units: units.slice(first, last + 1) });
    i = last + 1;
  }
  return parts;
}

export function visible(token) {
  return spell([token]).flatMap((unit) => unit.lines).join('');
}

// For a token standing alone, where a leading space would not be seen.
export function alone(token) {
  const shown = visible(token);
  return shown.startsWith(' ') ? `·${shown.slice(1)}` : shown;
}
