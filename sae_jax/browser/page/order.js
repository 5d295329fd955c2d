// Which latents the list shows and in what order. No page, only columns.

// A small seeded generator (mulberry32): a shuffle that can be told again.
export function generator(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

// A query is words that all have to match. A word of three letters or more
// matches tokens that contain it, a shorter one whole tokens; "quoted" is
// one word matched exactly, case and spaces too (spaces around are forgiven).
// `texts` are those of the vocabulary's tokens; `said` tells for each word
// whether an explanation has it.
export function parseQuery(query, texts) {
  const text = query.trim();
  if (!text) return null;
  const jump = text.match(/^#?(\d+)$/);
  const quoted = text.match(/^"(.+)"$/);
  const words = quoted ? [quoted[1]] : text.toLowerCase().split(/\s+/);
  const sets = words.map((word) => {
    const matches = quoted
      ? (token) => token === word || token.trim() === word
      : (token) => {
        const folded = token.toLowerCase();
        return word.length < 3 ? folded.trim() === word
          : folded.includes(word);
      };
    const found = new Set();
    texts.forEach((token, id) => { if (matches(token)) found.add(id); });
    return found;
  });
  const said = words.map((word) => (explanation) => {
    if (quoted) return explanation.includes(word);
    const folded = explanation.toLowerCase();
    return word.length < 3 ? folded.split(/[^\p{L}\p{N}]+/u).includes(word)
      : folded.includes(word);
  });
  return { latent: jump ? Number(jump[1]) : null, words: sets, said };
}

// Tokens of one latent that a parsed query may match.
function tokensOf(columns, place, where) {
  if (where === 'top') return columns.top[place];
  if (where === 'votes') return columns.votes[place];
  if (where === 'said') return [];
  return columns.top[place].concat(columns.votes[place]);
}

function matchesQuery(columns, place, query, where) {
  if (query.latent === columns.latent[place]) return true;
  const tokens = tokensOf(columns, place, where);
  const text = ['both', 'said'].includes(where)
    ? columns.said.get(place)?.text ?? '' : '';
  return query.words.every((set, i) => query.said[i](text)
    || tokens.some((token) => set.has(token)));
}

// Places in the columns, filtered and sorted. Silent latents have no
// activations to compare, so they come last whichever way a figure is sorted.
export function arrange(columns, { query, where, alive, low, high, sort,
  ascending, seed }) {
  const kept = [];
  for (let place = 0; place < columns.latent.length; place += 1) {
    const density = columns.density[place];
    if (alive && !columns.count[place]) continue;
    if (low !== null && density < low) continue;
    if (high !== null && density > high) continue;
    if (query && !matchesQuery(columns, place, query, where)) continue;
    kept.push(place);
  }
  if (sort === 'random') {
    const draw = generator(seed);
    for (let i = kept.length - 1; i > 0; i -= 1) {
      const j = Math.floor(draw() * (i + 1));
      [kept[i], kept[j]] = [kept[j], kept[i]];
    }
    return kept;
  }
  const sign = ascending ? 1 : -1;
  const values = columns[sort];
  const silent = (place) => sort !== 'latent'
    && (!columns.count[place] || values[place] === null);
  return kept.sort((a, b) => silent(a) - silent(b)
    || (silent(a) ? 0 : sign * (values[a] - values[b]))
    || columns.latent[a] - columns.latent[b]);
}
