import { FormatError, shown } from "./errors.js";

/** Checks that a value of a JSON file is what it should be; `where` names it in the FormatError. */
export type Check<T> = (value: unknown, where: string) => T;

function plain<T>(expected: string, fits: (value: unknown) => boolean): Check<T> {
  return (value, where) => {
    if (!fits(value)) throw new FormatError(`${where} is ${shown(value)}; expected ${expected}: export again`);
    return value as T;
  };
}

export const text = plain<string>("a text", (value) => typeof value === "string");
export const flag = plain<boolean>("true or false", (value) => typeof value === "boolean");
export const number = plain<number>("a finite number", Number.isFinite);
export const count = plain<number>(
  "a whole number from 0",
  (value) => Number.isSafeInteger(value) && Number(value) >= 0,
);

/** One of some words. */
export function among<T extends string>(...words: T[]): Check<T> {
  return plain(`one of ${words.join(", ")}`, (value) => words.includes(value as T));
}

/** A list of things that are alike. */
export function list<T>(item: Check<T>): Check<T[]> {
  const whole = plain<unknown[]>("a list", Array.isArray);
  return (value, where) => whole(value, where).map((one, index) => item(one, `${where}[${index}]`));
}

const object = plain<Record<string, unknown>>(
  "an object",
  (value) => typeof value === "object" && value !== null && !Array.isArray(value),
);

/** An object whose values are alike. */
export function mapping<T>(item: Check<T>): Check<Map<string, T>> {
  return (value, where) =>
    new Map(Object.entries(object(value, where)).map(([name, one]) => [name, item(one, `${where}.${name}`)]));
}

type Fields = Record<string, Check<unknown>>;

/** An object with these fields at least. */
export function fields<F extends Fields>(checks: F): Check<{ [Name in keyof F]: ReturnType<F[Name]> }> {
  return (value, where) => {
    const found = object(value, where);
    const checked = Object.entries(checks).map(([name, check]) => [name, check(found[name], `${where}.${name}`)]);
    return Object.fromEntries(checked) as { [Name in keyof F]: ReturnType<F[Name]> };
  };
}
