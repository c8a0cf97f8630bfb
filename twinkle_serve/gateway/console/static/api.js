// The gateway's routes, with the key that the user has given.

const STORED = "twinkle-serve-key";
const TIMEOUT_S = 15;

/** The gateway has refused a request. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The gateway does not answer. */
export class Lost extends Error {}

export const key = {
  get: () => sessionStorage.getItem(STORED) ?? "",
  set: (value) => (value ? sessionStorage.setItem(STORED, value) : sessionStorage.removeItem(STORED)),
};

/**
 * Sends a request and returns the JSON of its answer. Raises Refused, Lost, or AbortError once `signal` is aborted.
 * `accept` are statuses besides 2xx whose answers are returned, too.
 */
export async function request(method, path, { query = {}, body, signal, timeoutS = TIMEOUT_S, accept = [] } = {}) {
  const limit = new AbortController();
  const timer = setTimeout(() => limit.abort(), timeoutS * 1000);
  const end = () => limit.abort();
  signal?.addEventListener("abort", end);
  const given = Object.entries(query).filter(([, value]) => value !== undefined && value !== null && value !== "");
  const search = given.length ? `?${new URLSearchParams(given)}` : "";
  const headers = {};
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  try {
    const answer = await fetch(path + search, {
      method,
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal: limit.signal,
      cache: "no-store",
      credentials: "omit",
    });
    const content = await answer.text();
    if (answer.ok || accept.includes(answer.status)) return JSON.parse(withExactSeeds(content));
    throw new Refused(answer.status, messageOf(content, answer.status));
  } catch (error) {
    if (error instanceof Refused) throw error;
    if (signal?.aborted) throw new DOMException("cancelled", "AbortError");
    if (limit.signal.aborted) throw new Lost(`no answer within ${timeoutS} s`);
    throw new Lost(error instanceof SyntaxError ? "an answer was cut off" : "the gateway cannot be reached");
  } finally {
    clearTimeout(timer);
    signal?.removeEventListener("abort", end);
  }
}

/** Makes text of seeds that numbers of JavaScript cannot hold. */
const withExactSeeds = (content) => content.replace(/"seed":(\d{16,})/g, '"seed":"$1"');

export const get = (path, options) => request("GET", path, options);
export const post = (path, body, options) => request("POST", path, { ...options, body });

function messageOf(content, status) {
  try {
    const message = JSON.parse(content).error.message;
    if (typeof message === "string") return message;
  } catch {
    // not of the gateway: a proxy's own answer
  }
  return `status ${status}`;
}
