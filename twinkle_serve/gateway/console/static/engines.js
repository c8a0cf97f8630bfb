// Engines as cards, and what an operator does with them.

import { confirm, operate } from "./dialogs.js";
import { $, Keyed, attr, el, show, text, toast } from "./dom.js";
import { count, hasTracks, isBehind, isNumber, percent, plural, rate } from "./format.js";

export const STATES = ["ready", "catching up", "starting", "draining", "drained", "dead"];

/** Signs of the states, so that colour is not all that tells them apart. */
export const SIGNS = {
  ready: "●",
  "catching up": "◑",
  starting: "◌",
  draining: "◐",
  drained: "○",
  dead: "✕",
};

const MAX_CHIPS = 4;

const pending = new Map(); // name of an engine: what is being done with it
let shared; // the state of the page
let cards;

export function begin(state) {
  shared = state;
  cards = new Keyed($("engine-cards"), makeCard);
  $("engine-filter").append(
    el("option", { value: "", text: "all" }),
    el("option", { value: "trouble", text: "not ready, or lost before" }),
    ...STATES.map((name) => el("option", { value: name, text: name })),
  );
  $("engine-filter").addEventListener("change", () => shared.status && render(shared));
  $("engine-name").addEventListener("input", () => shared.status && render(shared));
}

export function render(state) {
  const all = Object.entries(state.status.engines);
  const shown = all.filter(isWanted);
  cards.render(shown, ([name]) => name);
  text($("engine-summary"), summary(all));
  show($("no-engines"), shown.length === 0);
}

/** Number of engines in each state, as text. */
export function summary(engines) {
  const states = STATES.map((name) => [name, engines.filter(([, engine]) => engine.state === name).length]);
  return states.flatMap(([name, number]) => (number ? [`${number} ${name}`] : [])).join(", ");
}

function isWanted([name, engine]) {
  const filter = $("engine-filter").value;
  if (!name.includes($("engine-name").value.trim())) return false;
  if (filter === "trouble") return engine.state !== "ready" || Boolean(engine.last_failure);
  return !filter || engine.state === filter;
}

function makeCard([name]) {
  const badge = el("span", { class: "badge" });
  const speed = el("strong");
  const meters = { batch_fill: meter("Batch"), kv_cache: meter("KV cache"), prefix_hits: meter("Prefix hits") };
  const facts = { track: fact("Track"), weights: fact("Weights"), sequences: fact("Sequences"), device: fact("Device") };
  const chips = el("ul", { class: "chips", "aria-label": "Adapters" });
  const failure = el("p", { class: "failure" });
  const putOff = el("p", { class: "muted" });
  const buttons = {
    drain: el("button", { type: "button", text: "Drain…", onclick: () => drain(name) }),
    undrain: el("button", { type: "button", text: "Undrain", onclick: () => undrain(name) }),
    restart: el("button", { type: "button", text: "Restart…", onclick: () => restart(name) }),
  };
  const doing = el("span", { class: "muted", role: "status" });
  const title = el("h3", { text: name, id: `engine ${name}`.replaceAll(" ", "-") });
  const node = el(
    "li",
    { class: "card", "data-engine": name },
    el("div", { class: "head" }, title, badge),
    el("p", { class: "speed" }, speed, el("span", { class: "muted", text: " tokens/s" })),
    ...Object.values(meters).map((each) => each.node),
    el("dl", { class: "facts" }, ...Object.values(facts).map((each) => each.node)),
    chips,
    putOff,
    failure,
    el("div", { class: "buttons", role: "group", "aria-label": `Operate ${name}` }, ...Object.values(buttons), doing),
  );
  const update = ([, engine]) => {
    attr(node, "data-state", engine.state);
    text(badge, `${SIGNS[engine.state] ?? "?"} ${engine.state}`);
    text(speed, rate(engine.tokens_per_s));
    for (const [field, each] of Object.entries(meters)) each.update(engine[field]);
    show(facts.track.node, hasTracks(shared.status));
    facts.track.update(engine.track);
    const behind = engine.weights !== undefined && isBehind(shared.status, engine);
    facts.weights.update(engine.weights === undefined ? "–" : engine.weights + (behind ? " (behind)" : ""), behind);
    facts.sequences.update(
      count(engine.sequences) + (engine.max_num_seqs ? ` of ${count(engine.max_num_seqs)}` : ""),
    );
    facts.device.update([engine.engine, engine.device].filter(Boolean).join(" on ") || "–");
    showChips(chips, engine.adapters ?? []);
    text(failure, engine.last_failure ? `Last failure: ${engine.last_failure}` : "");
    show(failure, Boolean(engine.last_failure));
    text(putOff, `${plural(engine.preemptions ?? 0, "preemption")} for lack of KV cache`);
    show(putOff, Boolean(engine.preemptions));
    const busy = pending.get(name);
    text(doing, busy ?? "");
    show(buttons.undrain, engine.state === "drained");
    show(buttons.drain, engine.state !== "drained");
    for (const button of Object.values(buttons)) button.disabled = busy !== undefined;
    buttons.drain.disabled ||= engine.state !== "ready" && engine.state !== "catching up";
    buttons.restart.disabled ||= engine.state === "starting";
  };
  return { node, update };
}

function meter(label) {
  const value = el("span", { class: "value" });
  const bar = el("span", { class: "bar" });
  const track = el("span", { class: "track", role: "meter", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 100 }, bar);
  const node = el("div", { class: "meter" }, el("span", { class: "muted", text: label }), track, value);
  const update = (share) => {
    show(node, isNumber(share));
    if (!isNumber(share)) return;
    const full = Math.min(100, Math.round(share * 100));
    attr(track, "aria-valuenow", full);
    attr(track, "aria-valuetext", percent(share));
    attr(track, "data-full", share > 0.9);
    const width = `${full}%`;
    if (bar.style.width !== width) bar.style.width = width;
    text(value, percent(share));
  };
  return { node, update };
}

function fact(label) {
  const value = el("dd");
  const node = el("div", {}, el("dt", { text: label }), value);
  return {
    node,
    update: (given, warns = false) => {
      text(value, given);
      attr(value, "class", warns ? "warns" : null);
    },
  };
}

function showChips(chips, labels) {
  const shown = labels.length > MAX_CHIPS ? [...labels.slice(-MAX_CHIPS), `and ${labels.length - MAX_CHIPS} more`] : labels;
  const joined = shown.join("\n");
  if (chips.dataset.shown === joined) return;
  chips.dataset.shown = joined;
  chips.replaceChildren(...shown.map((label) => el("li", { text: label })));
  show(chips, shown.length > 0);
  attr(chips, "title", labels.length > MAX_CHIPS ? labels.join(", ") : null);
}

// -- operations -----------------------------------------------------------------------------------

async function drain(name) {
  const others = Object.entries(shared.status.engines).filter(([other, engine]) => other !== name && engine.state === "ready");
  const last = others.length ? "" : " No other engine is ready: calls will wait, within their deadlines.";
  const answer = await confirm({
    title: `Drain ${name}?`,
    body: `It gets no new prompts. What it has not finished in time is sampled by other engines.${last}`,
    action: "Drain",
    limit: true,
  });
  if (answer) await change(name, "draining…", "drain", answer.limitS, `${name} is drained.`);
}

async function restart(name) {
  const answer = await confirm({
    title: `Restart ${name}?`,
    body: "It is drained, then its process is replaced. Samples that it has not finished in time are sampled by other engines.",
    action: "Restart",
    limit: true,
  });
  if (answer) await change(name, "restarting…", "restart", answer.limitS, `${name} is in use again.`);
}

const undrain = (name) => change(name, "undraining…", "undrain", 60, `${name} is used again.`);

async function change(name, doing, operation, limitS, done) {
  pending.set(name, doing);
  render(shared);
  try {
    const body = { engine: name, timeout_s: limitS, sampler: shared.sampler };
    await operate(`engines/${operation}`, body, limitS + 700);
    toast(done);
  } catch (error) {
    toast(`${name}: ${error.message}`);
  } finally {
    pending.delete(name);
    render(shared);
  }
}
