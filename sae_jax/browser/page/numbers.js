// Numbers for people: three significant digits, thin units, no NaN.

const RAISED = { '-': '⁻', 0: '⁰', 1: '¹', 2: '²', 3: '³', 4: '⁴', 5: '⁵',
  6: '⁶', 7: '⁷', 8: '⁸', 9: '⁹' };

export function power(exponent) {
  return `10${[...String(exponent)].map((c) => RAISED[c]).join('')}`;
}

export function number(value, digits = 3) {
  if (value === null || value === undefined) return '–';
  if (value === 0) return '0';
  const size = Math.abs(value);
  if (size >= 1e15 || size < 1e-4) {
    const [head, tail] = value.toExponential(digits - 2).split('e');
    return `${head} × ${power(Number(tail))}`.replace('-', '−');
  }
  const whole = Math.max(0, digits - 1 - Math.floor(Math.log10(size)));
  return value.toLocaleString('en', {
    minimumFractionDigits: whole,
    maximumFractionDigits: whole,
  }).replace('-', '−');
}

export const integer = (value) => value.toLocaleString('en');

export function percent(share) {
  if (share === null || share === undefined) return '–';
  return share > 0 && share < 1e-6
    ? number(share, 3) : `${number(100 * share, share < 0.1 ? 2 : 3)} %`;
}
