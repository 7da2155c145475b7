/** Probabilities of logits, in doubles, as the server has them. */
export function softmax(logits: ArrayLike<number>): number[] {
  const values = Array.from(logits);
  const highest = Math.max(...values);
  const powers = values.map((logit) => Math.exp(logit - highest));
  const sum = powers.reduce((total, power) => total + power, 0);
  return powers.map((power) => power / sum);
}

export function sigmoid(logit: number): number {
  return 1 / (1 + Math.exp(-logit));
}

/** The place of the largest number, the first of several. */
export function best(values: ArrayLike<number>): number {
  return Array.from(values).reduce((found, value, place, all) => (value > all[found]! ? place : found), 0);
}

export function dot(one: ArrayLike<number>, other: ArrayLike<number>): number {
  let sum = 0;
  for (let place = 0; place < one.length; place++) sum += one[place]! * other[place]!;
  return sum;
}

/** A vector brought to length 1, float32. */
export function unit(vector: Float32Array): Float32Array {
  const length = Math.max(Math.sqrt(dot(vector, vector)), 1e-12);
  return vector.map((value) => value / length);
}

/** Numbers by name. */
export function named(names: readonly string[], values: readonly number[]): Record<string, number> {
  return Object.fromEntries(names.map((name, place) => [name, values[place]!]));
}
