// The dialogs: the key of the service, and the confirmation of what changes it.

import { Refused, key, post } from "./api.js";
import { $, show, text } from "./dom.js";

let changed = () => {};

/** Calls a function when another key is given. */
export function onKey(listener) {
  changed = listener;
}

/** Asks for a key. Unless the user has asked for the dialog, it stays open while it is open. */
export function askForKey(why, asked = false) {
  const dialog = $("key-dialog");
  text($("key-why"), why);
  show($("key-why"), why !== "");
  show($("key-forget"), key.get() !== "");
  if (dialog.open || (!asked && $("confirm").open)) return;
  $("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  $("key").focus();
}

$("key-close").addEventListener("click", () => $("key-dialog").close());
$("key-dialog").addEventListener("close", () => {
  const { returnValue } = $("key-dialog");
  const given = $("key").value.trim();
  $("key").value = "";
  if (returnValue === "forget") key.set("");
  else if (returnValue === "save" && given) key.set(given);
  else return;
  changed();
});

/**
 * Asks for a confirmation. Returns null, or {limitS}.
 * `limit`: whether to ask for the time that running samples may take.
 */
export function confirm({ title, body, action, limit = false }) {
  const dialog = $("confirm");
  text($("confirm-title"), title);
  text($("confirm-text"), body);
  text($("confirm-yes"), action);
  show($("confirm-limit-label"), limit);
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    const answer = () =>
      resolve(dialog.returnValue === "yes" ? { limitS: Number($("confirm-limit").value) } : null);
    dialog.addEventListener("close", answer, { once: true });
  });
}

/** Posts what only an admin may do. Asks for a key if the gateway refuses the one that is there, and raises. */
export async function operate(path, body, timeoutS) {
  try {
    return await post(path, body, { timeoutS });
  } catch (error) {
    if (error instanceof Refused && (error.status === 401 || error.status === 403)) askForKey(error.message);
    throw error;
  }
}

/** Shows in a view that its data needs another key. An empty message hides it. */
export function showProblem(node, message, withKey = false) {
  if (node.dataset.message === message) return;
  node.dataset.message = message;
  node.replaceChildren();
  if (!message) return;
  const line = document.createElement("p");
  line.className = "problem";
  line.textContent = `${message} `;
  if (withKey) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Give a key…";
    button.addEventListener("click", () => askForKey("", true));
    line.append(button);
  }
  node.append(line);
}
