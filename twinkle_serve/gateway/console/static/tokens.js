// Texts of tokens, and tokens as a list of spans that are shaded by their logprobs.

import { post } from "./api.js";
import { $, attr, el, show } from "./dom.js";

const MAX_IDS = 5000; // of one request
const MAX_KNOWN = 300_000;
const PART = "\uFFFD";
const STEP = 8; // shades

const known = new Map(); // "sampler id": text
const details = new WeakMap(); // span: its token

/** Reads the texts of token ids that are not known yet. */
async function readTexts(sampler, ids, signal) {
  if (known.size > MAX_KNOWN) known.clear();
  const missing = [...new Set(ids)].filter((id) => !known.has(`${sampler} ${id}`));
  for (let i = 0; i < missing.length; i += MAX_IDS) {
    const part = missing.slice(i, i + MAX_IDS);
    const { text } = await decode(sampler, part.map((id) => [id]), signal);
    part.forEach((id, j) => known.set(`${sampler} ${id}`, text[j]));
  }
}

const decode = (sampler, ids, signal) => post("decode", { token_ids: ids, sampler }, { signal, timeoutS: 60 });

/**
 * Returns the tokens {id, text}. A character that several tokens make is the text of the first of them, and the others
 * have none.
 */
export async function texts(sampler, ids, alternatives = [], signal = undefined) {
  await readTexts(sampler, [...ids, ...alternatives], signal);
  const tokens = ids.map((id) => ({ id, text: textOf(sampler, id) }));
  const runs = [];
  tokens.forEach((token, i) => {
    if (!token.text.includes(PART)) return;
    const run = runs.at(-1);
    if (run && run.end === i) run.end = i + 1;
    else runs.push({ start: i, end: i + 1 });
  });
  const long = runs.filter((run) => run.end - run.start > 1);
  if (long.length) {
    const { text } = await decode(sampler, long.map((run) => ids.slice(run.start, run.end)), signal);
    long.forEach((run, i) => {
      for (let j = run.start; j < run.end; j++) tokens[j].text = j === run.start ? text[i] : "";
    });
  }
  return tokens;
}

export const textOf = (sampler, id) => known.get(`${sampler} ${id}`) ?? PART;

/** Class of a logprob: how unlikely its token was. */
const shade = (logprob) => (logprob > -0.05 ? 0 : Math.min(STEP - 1, 1 + Math.floor(-logprob * 1.3)));

/** What a person sees of a text whose blanks matter. */
const visible = (text) => (text === "" ? "·" : text.replaceAll("\n", "⏎\n").replaceAll("\t", "⇥\t"));

/**
 * Shows tokens, {text, id, sampled, logprob, version, top: [{id, text, logprob}]}, as a list that the arrow keys walk
 * through. `versions` are the labels whose colours they have, `mark` is the index of a token to mark.
 */
export function tokenList(tokens, { label, versions = [], mark = -1 }) {
  const list = el("div", { class: "tokens", role: "listbox", tabindex: 0, "aria-label": label });
  const spans = tokens.map((token, i) => {
    const classes = ["token", token.sampled ? "sampled" : "given"];
    if (typeof token.logprob === "number") classes.push(`u${shade(token.logprob)}`);
    if (token.sampled && token.version !== undefined) classes.push(`v${Math.max(0, versions.indexOf(token.version)) % 8}`);
    if (i === mark) classes.push("differs");
    const span = el("span", { class: classes.join(" "), role: "option", "aria-selected": "false" });
    span.textContent = visible(token.text);
    details.set(span, token);
    return span;
  });
  list.append(...spans);
  watch(list);
  return list;
}

function watch(list) {
  let current = null;
  const choose = (span) => {
    if (current) {
      attr(current, "id", null);
      attr(current, "aria-selected", "false");
    }
    current = span;
    attr(list, "aria-activedescendant", span ? "active-token" : null);
    if (!span) return hideInfo();
    const old = $("active-token");
    if (old) attr(old, "id", null);
    attr(span, "id", "active-token");
    attr(span, "aria-selected", "true");
    attr(span, "aria-label", describe(details.get(span)).join(", "));
    span.scrollIntoView({ block: "nearest" });
    showInfo(span);
  };
  list.addEventListener("focus", () => choose(current ?? list.querySelector(".sampled") ?? list.firstChild));
  list.addEventListener("blur", () => hideInfo());
  list.addEventListener("keydown", (event) => {
    const from = current ?? list.firstChild;
    const next = {
      ArrowRight: from?.nextSibling,
      ArrowLeft: from?.previousSibling,
      ArrowDown: stepFrom(list, from, 10),
      ArrowUp: stepFrom(list, from, -10),
      Home: list.firstChild,
      End: list.lastChild,
    };
    if (event.key === "Escape") return hideInfo();
    if (!(event.key in next)) return;
    event.preventDefault();
    if (next[event.key]) choose(next[event.key]);
  });
  list.addEventListener("pointerover", (event) => event.target !== list && showInfo(event.target));
  list.addEventListener("pointerleave", () => hideInfo());
  list.addEventListener("click", (event) => event.target !== list && choose(event.target));
}

function stepFrom(list, from, step) {
  const all = [...list.children];
  return all[Math.min(all.length - 1, Math.max(0, all.indexOf(from) + step))];
}

// -- the box beside a token -----------------------------------------------------------------------

function showInfo(span) {
  const token = details.get(span);
  if (!token) return;
  const box = $("token-info");
  const [name, ...lines] = describe(token, false);
  box.replaceChildren(el("p", {}, el("b", { class: "mono", text: name })), ...lines.map((line) => el("p", { text: line })));
  if (token.top?.length) box.append(alternatives(token));
  show(box, true);
  const at = span.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = box;
  const left = Math.max(8, Math.min(at.left, document.documentElement.clientWidth - width - 8));
  const below = at.bottom + 6;
  box.style.left = `${left}px`;
  box.style.top = `${below + height < window.innerHeight ? below : Math.max(8, at.top - height - 6)}px`;
}

function alternatives(token) {
  const rows = token.top.map((each) =>
    el(
      "tr",
      { class: each.id === token.id ? "chosen" : "" },
      el("td", { class: "mono", text: quoted(each.text) }),
      el("td", { text: each.logprob.toFixed(3) }),
      el("td", { text: chance(each.logprob) }),
    ),
  );
  return el("table", {}, el("tbody", {}, ...rows));
}

const hideInfo = () => show($("token-info"), false);

const quoted = (text) => JSON.stringify(text);

function chance(logprob) {
  const share = Math.exp(logprob);
  return share >= 0.001 ? `${(share * 100).toFixed(1)}%` : "< 0.1%";
}

/** Lines about a token: its text first. */
function describe(token, withTop = true) {
  const lines = [token.text === "" ? "part of the character before" : quoted(token.text), `token ${token.id}`];
  if (!token.sampled) lines.push("given, not sampled");
  if (typeof token.logprob === "number") lines.push(`logprob ${token.logprob.toFixed(3)}, ${chance(token.logprob)}`);
  if (token.version !== undefined) lines.push(`sampled by ${token.version}`);
  if (withTop && token.top?.length) lines.push(`alternatives: ${token.top.map((each) => `${quoted(each.text)} ${chance(each.logprob)}`).join(", ")}`);
  return lines;
}

/** Explains the shades, and the colours of versions. */
export function legend(versions, hasGiven) {
  const shades = Array.from({ length: STEP }, (_, i) => el("span", { class: `token u${i}`, "aria-hidden": "true", text: " " }));
  const parts = [el("span", {}, "likely ", el("span", { class: "scale" }, ...shades), " unlikely")];
  if (hasGiven) parts.push(el("span", {}, el("span", { class: "token sampled", text: "sampled" }), " ", el("span", { class: "token given", text: "given" })));
  versions.forEach((version, i) => parts.push(el("span", { class: `token sampled v${i % 8}`, text: version })));
  return parts;
}

window.addEventListener("scroll", hideInfo, { passive: true });
