// The page: asks the server once a second while it is seen, and redraws what has changed.

import { showAdapters, showRuns } from "./adapters.js";
import { get, hasKey, KeyWanted, setKey } from "./api.js";
import { Chart } from "./charts.js";
import { Conversations } from "./conversations.js";
import { byId, counted, element, say } from "./dom.js";
import { showLearning, showState } from "./live.js";

const PERIOD_MS = 1000, AFTER_FAILURE_MS = 4000;
const SORTING_MS = 10_000; // What training waits for takes the server a look at all requests.
const NO_STORE = "This server stores nothing (storage.collect is false): figures are kept in memory until it stops, texts are not kept at all.";
const FROM_BEFORE = "These are from before: this server stores no new ones.";
const FIRST = `No requests yet: point an OpenAI client at ${location.origin}/v1, and its answers appear here.`;
const NO_ADAPTER = "No adapter yet: the draft is as it came. Training makes one when enough requests are stored; draftloop train does it now.";
const METRICS = [
  { key: "tokens_per_s", title: "Tokens a second", digits: 1, unit: " tok/s", least: 0 },
  { key: "alpha", title: "Alpha", digits: 3, unit: "", least: 0, most: 1 },
  { key: "tau", title: "Tau, tokens a round", note: "without suffix matches", digits: 2, unit: " tokens a round", least: 1 },
];

const charts = METRICS.map((metric) => new Chart(metric));
const conversations = new Conversations(fail);
let answered = null, learnt = null, sorted_ms = 0, timer = null;

byId("charts").append(...charts.map((chart) => chart.figure));
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(byId("key").value);
  byId("key").value = "";
  byId("key-form").hidden = true;
  poll();
});
document.addEventListener("visibilitychange", poll);
poll();

/** One look at the server, and the next one planned; an unseen page does not ask. */
async function poll() {
  clearTimeout(timer);
  if (document.hidden) return;
  let wait_ms = PERIOD_MS;
  try {
    await look();
    say(byId("notice"), "");
  } catch (error) {
    if (fail(error)) return;
    wait_ms = AFTER_FAILURE_MS;
  }
  clearTimeout(timer);
  timer = setTimeout(poll, wait_ms);
}

async function look() {
  const state = await get("state");
  showState(state);
  showLearning(state.learning);
  byId("main").hidden = false;
  const newAnswers = String(state.answered) !== answered, newAdapters = String(state.learnt) !== learnt;
  if (newAnswers || newAdapters) await showAnswers(state);
  if (newAdapters || (newAnswers && Date.now() - sorted_ms > SORTING_MS)) {
    await showAdapters(NO_ADAPTER, poll);
    await showRuns();
    sorted_ms = Date.now();
  }
  [answered, learnt] = [String(state.answered), String(state.learnt)];
}

async function showAnswers(state) {
  const history = await get("history"), empty = !history.points.length;
  const key = (kind, sign) => element("span", { class: `key ${kind}` }, sign);
  byId("over-note").replaceChildren(
    ...(state.storing ? [] : [`${NO_STORE} `]),
    ...(empty ? [history.requests ? `${counted(history.requests, "request")} answered, none of them with drafts.` : FIRST] : []),
    ...(history.marks.length ? [key("on", "▲"), " an adapter becomes active, ", key("back", "↩"), " one is taken back. The curve begins anew with each."] : []),
  );
  byId("charts").hidden = empty;
  if (!empty) for (const chart of charts) chart.draw(history);
  await conversations.refresh(state.storing
    ? { none: "No answer to read yet.", some: "" }
    : { none: `${NO_STORE} To read answers token by token, set storage.collect to true.`, some: FROM_BEFORE });
}

/** Say what went wrong; true where the page waits for a key. */
function fail(error) {
  const wanted = error instanceof KeyWanted;
  byId("status").textContent = wanted ? "key wanted" : "no answer";
  byId("status").className = "badge failed";
  say(byId("notice"), wanted ? (hasKey() ? "That key is not the server's." : "") : error.message);
  if (wanted) {
    byId("main").hidden = true;
    byId("key-form").hidden = false;
    byId("key").focus();
  }
  return wanted;
}
