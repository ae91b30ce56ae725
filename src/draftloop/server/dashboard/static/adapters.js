// Adapters and training runs; promote and revert.

import { get, post } from "./api.js";
import { byId, element, say, svg } from "./dom.js";

export async function showAdapters(nothing, changed) {
  const { active, adapters } = await get("adapters");
  const act = (path, question, yes) => change(path, question, yes, changed);
  byId("revert").hidden = active === null;
  byId("revert").textContent = `Revert ${active}`;
  byId("revert").onclick = () => act("revert", `Take ${active} back? Its parent, or the bare draft, drafts from the next request on.`, "Revert");
  byId("adapters").replaceChildren(...adapters.map((one) => card(one, one.name === active, act)));
  if (!adapters.length) byId("adapters").append(element("li", { class: "empty" }, nothing));
}

function card(one, isActive, act) {
  const gate = one.status === "promoted" || isActive ? "" : ` The gate's word on it: ${one.word}.`;
  const promote = () => act(`adapters/${encodeURIComponent(one.name)}/promote`, `Promote ${one.name}? It drafts from the next request on.${gate}`, "Promote");
  const figures = [one.alpha && `alpha ${one.alpha}`, one.tau && `tau ${one.tau}`].filter(Boolean).join(" · ");
  return element("li", {},
    element("div", {}, element("h3", {}, one.name, " ", element("span", { class: `badge ${one.status}` }, one.word)), element("p", { class: "facts" }, one.facts)),
    element("div", {}, one.gain ? element("p", { class: "gain" }, one.gain) : null, one.interval ? interval(one) : null, figures ? element("p", { class: "facts" }, figures) : null),
    element("div", {}, element("p", { class: "reason" }, one.reason), isActive ? null : element("p", {}, element("button", { onclick: promote }, `Promote ${one.name}`))));
}

/** The gain with its 95 % interval; the upright line is no gain. */
function interval({ interval: { low, value, high, zero }, gain }) {
  const path = (kind, d) => svg("path", { class: kind, d });
  return svg("svg", { class: "interval", viewBox: "0 0 100 10", preserveAspectRatio: "none", role: "img", "aria-label": `gain ${gain}` },
    path("zero", `M${zero} 0V10`), path("whisker", `M${low} 5H${high}`), path("dot", `M${value} 5h0`));
}

/** Ask, do it, and show what the server says of it. */
async function change(path, question, yes, changed) {
  if (!(await confirmed(question, yes))) return;
  const message = byId("adapter-message");
  try {
    say(message, (await post(path)).message);
    message.classList.remove("bad");
  } catch (error) {
    say(message, error.message || "The server asks for its API key.");
    message.classList.add("bad");
  }
  await changed();
}

function confirmed(question, yes) {
  const dialog = byId("confirm");
  say(byId("confirm-text"), question);
  byId("confirm-yes").textContent = yes;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((decide) => dialog.addEventListener("close", () => decide(dialog.returnValue === "yes"), { once: true }));
}

export async function showRuns() {
  const { waiting, runs } = await get("training");
  say(byId("waiting"), waiting);
  byId("runs").replaceChildren(...runs.map((run) => element("li", { class: "run" },
    element("h3", {}, run.title, " ", element("span", { class: `badge ${run.status}` }, run.word)),
    element("p", { class: "facts" }, run.facts), run.reason ? element("p", { class: "reason" }, run.reason) : null)));
}
