// The page: its views, its polls, and its connection to the gateway.

import { Lost, Refused, get, key } from "./api.js";
import * as calls from "./calls.js";
import { askForKey, onKey } from "./dialogs.js";
import { $, announce, attr, el, show, text } from "./dom.js";
import * as engines from "./engines.js";
import { clock, seconds, weightsOf } from "./format.js";
import { History } from "./history.js";
import * as overview from "./overview.js";
import * as playground from "./playground.js";
import * as sessions from "./sessions.js";
import * as weights from "./weights.js";

const POLL_S = 3;
const SAMPLERS_S = 30;

const VIEWS = { overview, engines, calls, weights, sessions, playground };

/** What the views show. `status` and `calls` are null until they are known. */
const state = {
  sampler: "",
  samplers: [],
  view: "overview",
  argument: "",
  status: null,
  history: new History(),
};

let timer;
let poll = null;
let samplersAt = 0;
let lostAt = null;
let updatedAt = null;

// -- polls ----------------------------------------------------------------------------------------

function schedule(delayS) {
  clearTimeout(timer);
  if (!document.hidden) timer = setTimeout(refresh, delayS * 1000);
}

/** Reads everything that the view needs, and shows it. */
async function refresh() {
  clearTimeout(timer);
  poll?.abort();
  const own = (poll = new AbortController());
  try {
    await readSamplers(own.signal);
    await readState(own.signal);
    if (own.signal.aborted) return;
    connected();
    render();
    await VIEWS[state.view].poll?.(state, own.signal);
  } catch (error) {
    if (own.signal.aborted) return;
    failed(error);
  }
  if (poll === own) schedule(POLL_S);
}

async function readSamplers(signal) {
  if (state.samplers.length && Date.now() - samplersAt < SAMPLERS_S * 1000) return;
  const { samplers } = await get("readyz", { signal, accept: [503] });
  samplersAt = Date.now();
  state.samplers = Object.keys(samplers);
  if (!state.samplers.includes(state.sampler)) {
    const last = sessionStorage.getItem("twinkle-serve-sampler");
    choose(state.samplers.includes(last) ? last : state.samplers[0]);
  }
  const select = $("sampler");
  if (select.options.length !== state.samplers.length) {
    select.replaceChildren(...state.samplers.map((name) => el("option", { value: name, text: name })));
    select.value = state.sampler;
  }
  show($("sampler-choice"), state.samplers.length > 1);
}

async function readState(signal) {
  const { sampler, history } = state;
  const query = { sampler };
  const [status, report] = await Promise.all([
    get("status", { query, signal }),
    get("telemetry", { query: { sampler, since: history.since }, signal }),
  ]);
  if (signal.aborted) return;
  sayChanges(state.status, status);
  state.status = status;
  history.add(report);
}

function choose(sampler) {
  state.sampler = sampler;
  state.status = null;
  state.history = new History();
  for (const view of Object.values(VIEWS)) view.reset?.();
}

/** Has screen readers say what has changed since the last poll. */
function sayChanges(before, after) {
  if (before === null) return;
  const changes = Object.entries(after.engines)
    .filter(([name, engine]) => before.engines[name]?.state !== engine.state)
    .map(([name, engine]) => `${name} is ${engine.state}`);
  if (changes.length > 3) changes.splice(3, changes.length, `${changes.length - 3} more engines have changed`);
  if (weightsOf(before) !== weightsOf(after)) changes.push(`the weights are ${weightsOf(after)}`);
  if (before.paused !== after.paused) changes.push(after.paused ? "the engines are paused" : "the engines go on");
  announce(changes.join(", "));
}

// -- connection -----------------------------------------------------------------------------------

function connected() {
  const banner = $("banner");
  if (lostAt !== null) {
    lostAt = null;
    banner.dataset.state = "back";
    text(banner, "Connected again.");
    setTimeout(() => lostAt === null && show(banner, false), 4000);
  }
  updatedAt = Date.now();
  link("live", "Live");
  document.body.classList.remove("stale");
}

function failed(error) {
  if (error instanceof Refused && (error.status === 401 || error.status === 403)) {
    link("locked", "Key needed");
    askForKey(key.get() ? error.message : "This service asks for a key.");
    return;
  }
  if (!(error instanceof Lost || error instanceof Refused)) console.error(error);
  lostAt ??= Date.now();
  const since = clock(lostAt / 1000);
  const what =
    error instanceof Lost
      ? `Connection lost at ${since}: ${error.message}.`
      : `The gateway answers, but its sampler does not, since ${since}: ${error.message}`;
  const banner = $("banner");
  banner.dataset.state = "lost";
  text(banner, `${what} Trying again every ${POLL_S} s; the figures below are from before.`);
  show(banner, true);
  link("lost", "Lost");
  document.body.classList.add("stale");
}

function link(name, label) {
  attr($("link"), "data-state", name);
  text($("link"), label);
}

// -- views ----------------------------------------------------------------------------------------

function render() {
  text($("model"), state.status.model_id);
  text($("updated"), `Updated at ${clock(updatedAt / 1000)}; every ${POLL_S} s while this tab is visible.`);
  attr($("updated"), "title", `Deadline of calls: ${seconds(state.status.request_timeout_s)}`);
  VIEWS[state.view].render(state);
}

function navigate() {
  const [name, ...rest] = location.hash.slice(1).split("/");
  if (name !== state.view) window.scrollTo(0, 0);
  state.view = name in VIEWS ? name : "overview";
  state.argument = rest.map(decodeURIComponent).join("/");
  for (const view of Object.keys(VIEWS)) show($(`view-${view}`), view === state.view);
  for (const anchor of $("nav").children) {
    attr(anchor, "aria-current", anchor.hash === `#${state.view}` ? "page" : null);
    if (anchor.hash === `#${state.view}`) document.title = `${anchor.textContent} · Twinkle Serve`;
  }
  if (state.status !== null) render();
  schedule(0);
}

for (const view of Object.values(VIEWS)) view.begin?.(state, refresh);
onKey(refresh);
window.addEventListener("hashchange", navigate);
window.addEventListener("online", refresh);
document.addEventListener("visibilitychange", () => {
  clearTimeout(timer);
  if (document.hidden) poll?.abort();
  else refresh();
});
$("skip").addEventListener("click", () => $("main").focus());
$("key-button").addEventListener("click", () => askForKey("", true));
$("sampler").addEventListener("change", (event) => {
  sessionStorage.setItem("twinkle-serve-sampler", event.target.value);
  choose(event.target.value);
  refresh();
});
navigate();
