// The list of stored requests, and one of them token by token.

import { get } from "./api.js";
import { adapterName, byId, counted, element, number, percent, probability, say, when } from "./dom.js";

const KINDS = {
  accepted: "accepted: the draft proposed it, the target kept it",
  recovered: "recovered: drawn by the target in place of a rejected proposal",
  bonus: "bonus: the target's own, after a round in which all was accepted",
  target: "target: nothing was proposed here",
  suffix: "suffix: kept of what a suffix match proposed",
};
const TOLD = "p: the target's probability at temperature 1. q: the draft's for its proposal, as the request was sampled.";

/** Page through the list; `opened` is the request that is read, `pages` the ids after which earlier pages begin. */
export class Conversations {
  constructor(fail) {
    this.fail = fail;
    this.pages = [null];
    this.opened = null;
    this.notes = { none: "", some: "" };
    byId("older").addEventListener("click", () => this.turn(() => this.pages.push(this.last)));
    byId("newer").addEventListener("click", () => this.turn(() => this.pages.pop()));
  }

  async turn(change) {
    change();
    await this.refresh().catch(this.fail);
    byId("list").querySelector("button")?.focus();
  }

  /** Load the page of the list that is shown. `notes` say why there is none, and what to know of those there are. */
  async refresh(notes = this.notes) {
    this.notes = notes;
    const before = this.pages.at(-1), answer = await get(`conversations${before === null ? "" : `?before=${before}`}`);
    const shown = answer.conversations;
    this.last = shown.at(-1)?.id;
    say(byId("said-note"), shown.length || before !== null ? notes.some : notes.none);
    const focused = document.activeElement?.dataset.id;
    byId("list").replaceChildren(...shown.map((one) => this.entry(one)));
    if (focused) byId("list").querySelector(`[data-id="${focused}"]`)?.focus();
    byId("list").closest(".conversations").hidden = !shown.length && before === null;
    byId("older").hidden = !answer.more;
    byId("newer").hidden = this.pages.length === 1;
    if (this.opened === null && shown.length) await this.open(shown[0].id);
  }

  entry(one) {
    const figures = `${when(one.time_s)} · ${counted(one.answer_tokens, "token")} · ${number(one.tokens_per_s, 1)} tok/s · tau ${number(one.tau, 2)}`;
    const open = () => this.open(one.id, true).catch(this.fail);
    return element("li", {}, element("button", { "data-id": one.id, "aria-pressed": String(one.id === this.opened), onclick: open },
      element("span", { class: "asked" }, one.prompt || "(an empty prompt)"),
      element("span", { class: "answered" }, one.answer || "(an empty answer)"),
      element("span", { class: "facts" }, figures)));
  }

  async open(id, byHand = false) {
    const conversation = await get(`conversations/${id}`);
    this.opened = id;
    for (const button of byId("list").querySelectorAll("button")) button.setAttribute("aria-pressed", String(Number(button.dataset.id) === id));
    byId("reading").replaceChildren(...shownConversation(conversation));
    if (byHand && getComputedStyle(byId("reading").parentElement).gridTemplateColumns.split(" ").length === 1) byId("reading").scrollIntoView({ block: "start" });
  }
}

function shownConversation(one) {
  const facts = [`request ${one.id}`, one.domain, adapterName(one.adapter), `temperature ${one.sampling.temperature}`, `ended by ${one.finish_reason}`];
  return [
    element("h3", {}, when(one.time_s)),
    element("p", { class: "facts" }, facts.filter(Boolean).join(" · ")),
    ...one.turns.map((turn) => element("div", { class: "turn" }, element("p", { class: "facts" }, turn.role || "prompt"), element("p", { class: "words" }, turn.text))),
    element("div", { class: "turn" }, element("p", { class: "facts" }, "answer"), answer(one.tokens)),
    legend(one.tokens),
    element("p", { class: "axis" }, `${TOLD} Arrow keys go from token to token.`),
  ];
}

function legend(tokens) {
  const counts = {};
  for (const { kind } of tokens) counts[kind] = (counts[kind] ?? 0) + 1;
  const entry = ([kind, words]) => element("li", { title: words }, element("span", { class: `token ${kind}` }, kind), ` ${number(counts[kind])} (${percent(counts[kind] / tokens.length)})`);
  return element("ul", { class: "legend" }, ...Object.entries(KINDS).filter(([kind]) => counts[kind]).map(entry));
}

/** The tokens as running text: one stop of the Tab key, arrows move between them. */
function answer(tokens) {
  const spans = tokens.map((token) => {
    const content = token.text || token.name, special = token.text ? "" : " special", broken = /^\s*\n\s*$/.test(token.text) ? " line-end" : "";
    return element("span", { class: `token ${token.kind}${special}${broken}`, tabindex: "-1" }, content);
  });
  spans[0]?.setAttribute("tabindex", "0");
  const place = element("p", { class: "words answer", role: "group", "aria-label": "The answer, token by token" }, ...spans);
  const over = (event) => {
    const span = event.target.closest(".token");
    if (span) tell(span, tokens[spans.indexOf(span)]);
  };
  place.addEventListener("pointerover", over);
  place.addEventListener("focusin", over);
  place.addEventListener("pointerleave", hush);
  place.addEventListener("focusout", hush);
  place.addEventListener("click", (event) => event.target.closest(".token")?.focus());
  place.addEventListener("keydown", (event) => {
    const at = spans.indexOf(event.target);
    const to = { ArrowLeft: at - 1, ArrowUp: at - 1, ArrowRight: at + 1, ArrowDown: at + 1, Home: 0, End: spans.length - 1 }[event.key];
    if (event.key === "Escape") hush();
    if (to === undefined || !spans[to]) return;
    event.preventDefault();
    event.target.setAttribute("tabindex", "-1");
    spans[to].setAttribute("tabindex", "0");
    spans[to].focus();
  });
  return place;
}

/** What both models thought, beside the token. */
function tell(span, token) {
  const p = token.p === null ? `< ${probability(token.p_below)}` : probability(token.p);
  const lines = [element("b", {}, token.name), KINDS[token.kind], `p ${p}${token.kind === "accepted" && token.q !== null ? ` · q ${probability(token.q)}` : ""}`];
  if (token.drafted !== null && token.kind !== "accepted") {
    const drafted = token.p_drafted === null ? "not among the target's likeliest" : probability(token.p_drafted);
    lines.push(element("span", {}, "the draft proposed ", element("b", {}, token.drafted)), `its q ${probability(token.q)} · its p ${drafted}`);
  }
  const tip = byId("tip");
  tip.replaceChildren(...lines.map((line) => element("div", {}, line)));
  tip.hidden = false;
  const at = span.getClientRects()[0], room = 8;
  const left = Math.min(Math.max(room, at.left), document.documentElement.clientWidth - tip.offsetWidth - room);
  const above = at.top - tip.offsetHeight - room;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 0 ? above : at.bottom + room}px`;
  span.setAttribute("aria-describedby", "tip");
}

function hush() {
  byId("tip").hidden = true;
}
