// Numbers and times as people read them.

const whole = new Intl.NumberFormat("en");
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const day = { hour: "2-digit", minute: "2-digit", hourCycle: "h23" };
const clockFormat = new Intl.DateTimeFormat(undefined, { ...day, second: "2-digit" });
const minuteFormat = new Intl.DateTimeFormat(undefined, day);

export const NONE = "–";

export const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

export function count(value) {
  if (!isNumber(value)) return NONE;
  return Math.abs(value) < 100_000 ? whole.format(Math.round(value)) : compact.format(value);
}

/** A number that may be below 10, with one digit then. */
export function rate(value) {
  if (!isNumber(value)) return NONE;
  return value !== 0 && Math.abs(value) < 10 ? value.toFixed(1) : count(value);
}

export const short = (value) => (isNumber(value) ? compact.format(value) : NONE);

export const percent = (value) => (isNumber(value) ? `${Math.round(value * 100)}%` : NONE);

/** A duration in seconds. */
export function seconds(value) {
  if (!isNumber(value)) return NONE;
  if (value === 0) return "0 s";
  if (value < 0.0995) return `${(value * 1000).toFixed(value < 0.00995 ? 1 : 0)} ms`;
  if (value < 9.95) return `${value.toFixed(value < 0.995 ? 2 : 1)} s`;
  if (value < 600) return `${Math.round(value)} s`;
  if (value < 7200) return `${Math.round(value / 60)} min`;
  return `${(value / 3600).toFixed(1)} h`;
}

export const bytes = (value) =>
  value < 1024 ? `${value} B` : value < 2 ** 20 ? `${(value / 1024).toFixed(1)} KiB` : `${(value / 2 ** 20).toFixed(1)} MiB`;

/** A time, seconds since 1970. */
export const clock = (time) => clockFormat.format(time * 1000);
export const minute = (time) => minuteFormat.format(time * 1000);

export const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;

/** Labels of the current weights: one, or one of each track. */
export function weightsOf(status) {
  const tracks = Object.entries(status.tracks);
  return tracks.length > 1 ? tracks.map(([track, label]) => `${track} ${label}`).join(", ") : status.weights;
}

/** Whether engines belong to several tracks. */
export const hasTracks = (status) => Object.keys(status.tracks).length > 1;

/** Whether an engine in use has other weights than the current ones of its track. */
export const isBehind = (status, engine) => engine.weights !== status.tracks[engine.track];
