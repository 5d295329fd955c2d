// A list that may be taller than browsers let a box be. No page.
//
// The box then has the height that they allow. Near its ends a pixel of it is
// one of the list; between them it is several, so that a jump of the scroll bar
// reaches everything, while the list follows small steps (a wheel, a finger, a
// key) pixel by pixel.

// Firefox ends at 17.9 million, Chromium and Safari at 33.5 million.
const TALLEST = 15e6;
const EDGE = 1e6;
const STEP = 2; // what is more than so many views is a jump

export function scrolling(row, tallest = TALLEST, edge = EDGE) {
  let whole = 0;
  let at = 0;
  let seen = 0;
  let jumps = false;
  const height = () => Math.min(whole, tallest);
  const squeeze = (view) =>
    (whole - view - 2 * edge) / (height() - view - 2 * edge);

  // The list's pixel at a pixel of the box, and back.
  function atTop(top, view) {
    const below = height() - view - top;
    if (whole <= tallest || top <= edge) return top;
    if (below <= edge) return whole - view - below;
    return Math.round(edge + (top - edge) * squeeze(view));
  }
  function topAt(place, view) {
    const below = whole - view - place;
    if (whole <= tallest || place <= edge) return place;
    if (below <= edge) return height() - view - below;
    return Math.round(edge + (place - edge) / squeeze(view));
  }

  return {
    height,
    resize(rows) {
      whole = rows * row;
      at = 0;
      seen = 0;
      jumps = false;
    },
    // Where the list is when the box has been scrolled to `top`.
    follow(top, view) {
      const by = top - seen;
      seen = top;
      if (by === 0) return at;
      jumps ||= Math.abs(by) > STEP * view;
      at = jumps || whole <= tallest ? atTop(top, view)
        : Math.max(0, Math.min(whole - view, at + by));
      return at;
    },
    // Where the box has to be scrolled to, once it stands still.
    settle(view) {
      jumps = false;
      return topAt(at, view);
    },
    // Where the box has to be scrolled to for the list to be at a place.
    moveTo(place, view) {
      at = Math.max(0, Math.min(whole - view, place));
      jumps = false;
      return topAt(at, view);
    },
    // The box has been scrolled to `top` as told; the list stays.
    told(top) { seen = top; },
  };
}
