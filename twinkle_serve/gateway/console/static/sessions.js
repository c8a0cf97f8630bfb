// Sessions and their trajectories: the tree of turns, and the tokens on the path to one of them.

import { Refused, get } from "./api.js";
import { showProblem } from "./dialogs.js";
import { $, Keyed, attr, el, factList, show, showFacts, text } from "./dom.js";
import { bytes, clock, plural, seconds } from "./format.js";
import { legend, texts, tokenList } from "./tokens.js";

const LIST_S = 15;
const MAX_LISTED = 200;
const MAX_TOKENS = 4000; // of a path, shown at first

let shared;
let refresh;
let list;
let listedAt = 0;
let opened = null; // {id, tree, sampler}
let failedId = null;
let turn = 0; // of the newest rendering of a path

export function begin(state, again) {
  shared = state;
  refresh = again;
  list = new Keyed($("session-rows"), makeSession);
  $("session-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const id = $("session-id").value.trim();
    if (id) open(id);
  });
  $("sessions-refresh").addEventListener("click", () => {
    listedAt = 0;
    opened = failedId = null;
    refresh();
  });
  $("tree").addEventListener("keydown", walk);
}

export function reset() {
  listedAt = 0;
  opened = failedId = null;
}

export function render() {}

function open(id) {
  failedId = null;
  location.hash = `#sessions/${encodeURIComponent(id)}`;
  if (shared.argument === id) refresh();
}

export async function poll(state, signal) {
  if (Date.now() - listedAt > LIST_S * 1000) await readList(state, signal);
  const id = state.argument;
  if (id && id !== opened?.id && id !== failedId) await readSession(id, state, signal);
}

async function readList(state, signal) {
  let sessions = [];
  try {
    ({ sessions } = await get("sessions", { signal, timeoutS: 60 }));
    showProblem($("sessions-problem"), "");
  } catch (error) {
    if (!(error instanceof Refused && error.status === 403)) throw error;
    showProblem($("sessions-problem"), "The list is shown to admins: this key has another scope. A session whose id you know can be opened.", true);
  }
  listedAt = Date.now();
  list.render(sessions.slice(-MAX_LISTED).reverse(), (session) => `${session.sampler}/${session.id}`);
  show($("no-sessions"), sessions.length === 0);
  const more = sessions.length > MAX_LISTED ? `, the last ${MAX_LISTED} of them here` : "";
  text($("sessions-summary"), sessions.length ? plural(sessions.length, "session") + more : "");
}

function makeSession({ id, sampler, created }) {
  const facts = el("span", { class: "muted" });
  const node = el("li", {}, el("a", { href: `#sessions/${encodeURIComponent(id)}` }, el("span", { class: "id", text: id }), facts));
  const update = (session) => {
    const of = shared.samplers.length > 1 ? sampler : "";
    const left = Math.max(0, session.expires - Date.now() / 1000);
    showFacts(facts, [of, bytes(session.size_bytes), `begun ${clock(created)}`, `ends in ${seconds(left)}`]);
    attr(node.firstChild, "aria-current", shared.argument === id ? "true" : null);
  };
  return { node, update };
}

// -- one session ----------------------------------------------------------------------------------

async function readSession(id, state, signal) {
  text($("h-session"), `Session ${id}`);
  for (const anchor of $("session-rows").querySelectorAll("a")) {
    attr(anchor, "aria-current", anchor.hash === `#sessions/${encodeURIComponent(id)}` ? "true" : null);
  }
  try {
    const tree = await readTree(id, state, signal);
    opened = { id, tree, sampler: state.sampler };
  } catch (error) {
    if (!(error instanceof Refused) || error.status === 401) throw error;
    opened = null;
    failedId = id;
    show($("session"), false);
    show($("session-empty"), true);
    text($("session-empty"), error.message);
    return;
  }
  show($("session-empty"), false);
  show($("session"), true);
  const { nodes, created, expires } = opened.tree;
  opened.versions = [...new Set(nodes.flatMap((node) => node.weight_versions.map(versionOf)))];
  text($("session-facts"), `${plural(nodes.length, "turn")}, begun ${clock(created)}, ends at ${clock(expires)} unless it is used.`);
  $("session-legend").replaceChildren(...legend(opened.versions, true));
  renderTree();
  if (nodes.length) await renderPath(nodes.at(-1).id);
}

/** Reads a session; of several samplers that have one of this id, that of the chosen sampler. */
async function readTree(id, state, signal) {
  const path = `session/${encodeURIComponent(id)}/trajectory`;
  try {
    return await get(path, { signal, query: { sampler: state.sampler }, timeoutS: 60 });
  } catch (error) {
    if (!(error instanceof Refused && error.status === 404) || state.samplers.length < 2) throw error;
    return await get(path, { signal, timeoutS: 60 });
  }
}

const versionOf = (span) => (span.adapter ? `${span.adapter} on ${span.weights}` : span.weights);

/** Shows the tree: a conversation without branches goes straight down, each branch begins a level of its own. */
function renderTree() {
  const children = Map.groupBy(opened.tree.nodes, (node) => node.parent);
  const rows = [];
  const waiting = (children.get(null) ?? []).map((node, i) => [node, 0, i > 0]).reverse();
  while (waiting.length) {
    const [node, level, starts] = waiting.pop();
    rows.push(makeTurn(node, level, starts));
    const next = children.get(node.id) ?? [];
    waiting.push(...next.map((child) => [child, level + (next.length > 1 ? 1 : 0), next.length > 1]).reverse());
  }
  $("tree").replaceChildren(...rows);
}

function makeTurn(node, level, starts) {
  const dots = [...new Set(node.weight_versions.map(versionOf))].map((version) =>
    el("i", { class: `dot v${opened.versions.indexOf(version) % 8}`, title: version }),
  );
  const facts = [
    `turn ${node.id}`,
    node.parent === null ? "begins" : `after ${node.parent}`,
    node.branch,
    node.sample ? `sample ${node.sample + 1}` : "",
    `${plural(node.sampled[1] - node.sampled[0], "token")}`,
    node.stop_reason,
  ];
  const button = el(
    "button",
    { type: "button", "data-node": node.id, tabindex: -1, onclick: () => renderPath(node.id) },
    el("span", { class: "said", text: said(node) || "(empty)" }),
    el("span", { class: "muted" }, ...dots, " ", ...factList(facts)),
  );
  return el("li", { "data-level": Math.min(level, 8), "data-starts": starts }, button);
}

function said(node) {
  if (node.kind === "raw") return node.text?.[1] ?? "";
  const message = node.shown ?? node.messages.at(-1) ?? {};
  const content = typeof message.content === "string" ? message.content : JSON.stringify(message.content ?? "");
  const called = (message.tool_calls ?? []).map((call) => `${call.function?.name ?? "tool"}(…)`).join(" ");
  return [content, called].filter(Boolean).join(" ").slice(0, 200);
}

/** Up and down move between the turns. */
function walk(event) {
  const buttons = [...$("tree").querySelectorAll("button")];
  const at = buttons.indexOf(document.activeElement);
  const next = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: buttons.length - 1 }[event.key];
  if (next === undefined || !buttons[next]) return;
  event.preventDefault();
  buttons[next].focus();
  buttons[next].click();
}

/** Shows the tokens from the beginning of the conversation to a turn. */
async function renderPath(id, whole = false) {
  const own = ++turn;
  for (const button of $("tree").querySelectorAll("button")) {
    const chosen = button.dataset.node === String(id);
    attr(button, "aria-current", chosen ? "true" : null);
    button.tabIndex = chosen ? 0 : -1;
  }
  const { sampler, tree, versions } = opened;
  const path = [];
  for (let node = tree.nodes[id]; node; node = node.parent === null ? null : tree.nodes[node.parent]) path.unshift(node);
  const all = path.flatMap(tokensOf);
  const tokens = whole ? all : all.slice(-MAX_TOKENS);
  let spelled;
  try {
    spelled = await texts(sampler, tokens.map((token) => token.id));
  } catch (error) {
    spelled = null;
    if (own === turn) $("path").replaceChildren(el("p", { class: "problem", text: error.message }));
  }
  if (spelled === null || own !== turn) return;
  tokens.forEach((token, i) => (token.text = spelled[i].text));
  const sampled = tokens.filter((token) => token.sampled).length;
  const label = `Path to turn ${id}: ${plural(tokens.length, "token")}, ${sampled} of them sampled`;
  const last = path.at(-1);
  const facts = [`${all.length} tokens`, last.engine, last.seed === null ? "" : `seed ${last.seed}`, last.adapter, last.stop_reason];
  text($("h-path"), `Path to turn ${id}`);
  $("path").replaceChildren(
    el("p", { class: "muted" }, ...factList(facts)),
    ...(tokens.length < all.length
      ? [el("button", { type: "button", text: `Show ${all.length - tokens.length} earlier tokens`, onclick: () => renderPath(id, true) })]
      : []),
    tokenList(tokens, { label, versions }),
  );
}

function tokensOf(node) {
  const [start, end] = node.sampled;
  return node.token_ids.map((id, i) => {
    const sampled = i >= start && i < end;
    const span = sampled ? node.weight_versions.find((each) => each.start <= i && i < each.end) : undefined;
    return { id, sampled, logprob: sampled ? node.logprobs?.[i - start] : undefined, version: span && versionOf(span) };
  });
}
