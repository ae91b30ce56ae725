// The figures of this moment, and how training fares.

import { byId, bytes, counted, duration, element, number, percent, say } from "./dom.js";

export function showState(state) {
  const { models, worn, active, queued } = state;
  const status = state.status === "ready" && active ? "answering" : state.status;
  if (byId("status").textContent !== status) byId("status").textContent = status;
  byId("status").className = `badge ${{ broken: "failed", "shutting down": "failed" }[status] ?? "active"}`;
  const drafts = models.draft === null ? "The target answers alone" : worn === null ? "The bare draft drafts" : `Adapter ${worn} drafts`;
  say(byId("headline"), drafts);
  byId("pair").replaceChildren("Target ", element("b", {}, models.target), ...(models.draft ? [element("br"), "Draft ", element("b", {}, models.draft)] : []));
  byId("tiles").replaceChildren(
    tile("Tokens a second", number(state.tokens_per_s, 1), state.mean_tokens_per_s === null ? "" : `all answers ${number(state.mean_tokens_per_s, 1)}`),
    tile("Alpha", number(state.alpha, 3), state.recent_rounds ? `last ${counted(state.recent_rounds, "round")}` : ""),
    tile("Tau", number(state.tau, 2), "tokens a round, suffix matches included"),
    tile("K chosen", mostOften(state.drafted_per_round), "drafted a round", bars(state.drafted_per_round)),
    tile("Queue", number(queued), active ? `${number(active)} being answered` : "nobody is answered"),
    tile("Requests", number(state.requests), `${counted(state.tokens, "token")} since the start`),
    tile("Caches", bytes(state.kv_bytes), "KV and kept prefixes"),
  );
}

function tile(label, value, note, picture = null) {
  return element("div", {}, element("dt", {}, label), element("dd", {}, value, picture), note ? element("dd", { class: "note" }, note) : null);
}

function mostOften(rounds) {
  const [most] = Object.entries(rounds).sort((a, b) => b[1] - a[1]);
  return most ? most[0] : "–";
}

/** How often each K was chosen, from 0 to the highest. */
function bars(rounds) {
  const highest = Math.max(...Object.keys(rounds).map(Number), 0), most = Math.max(...Object.values(rounds), 1);
  const total = Object.values(rounds).reduce((a, b) => a + b, 0);
  if (!total) return null;
  const columns = [];
  for (let k = 0; k <= highest; k++) {
    const bar = element("span", { class: "bar", title: `K = ${k}: ${percent((rounds[k] ?? 0) / total)}` }, element("i"), element("small", {}, String(k)));
    bar.firstChild.style.height = `${Math.round((22 * (rounds[k] ?? 0)) / most) + 1}px`;
    columns.push(bar);
  }
  const told = columns.map((bar) => bar.title).join(", ");
  return element("span", { class: "bars", role: "img", "aria-label": told }, ...columns);
}

export function showLearning(learning) {
  const place = byId("progress");
  byId("waits").hidden = !learning?.enabled; // Where learning is off nothing waits.
  if (learning === null) return place.replaceChildren(element("p", { class: "empty" }, "This server does not learn."));
  const parts = [], { phase, progress, last_outcome: outcome } = learning;
  const words = { waiting: "Waiting", preparing: "A run is being prepared", training: "Training", judging: "Judging the candidate on held-out requests" };
  if (!learning.enabled) parts.push(element("p", { class: "empty" }, `Learning is off: ${learning.why_off}.`.replace("..", ".")));
  else if (phase !== "waiting") parts.push(element("p", { class: "phase" }, words[phase], progress ? `, run ${progress.run}` : ""));
  if (progress) {
    const left = progress.eta_s === null ? "" : ` · about ${duration(progress.eta_s)} left`;
    const alpha = progress.validation_alpha === null ? "" : ` · validation alpha ${number(progress.validation_alpha, 3)}`;
    parts.push(element("progress", { max: progress.steps, value: progress.step, "aria-label": "Training" }));
    parts.push(element("p", { class: "facts" }, `step ${number(progress.step)} of ${number(progress.steps)}${left}${alpha}`));
  }
  if (outcome) parts.push(element("p", {}, `Last run of this server: ${outcome.status}. ${outcome.reason ?? ""}`));
  return place.replaceChildren(...parts);
}
