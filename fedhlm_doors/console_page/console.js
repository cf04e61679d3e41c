"use strict";
// The page of the console: the state comes whole when the connection begins, then what changes. It sends nothing, unless
// the console allows prompts.

const KINDS = {
  offline: "outages", online: "arrivals", restarted: "restarts", takeover: "takeovers", refused: "refusals",
  round: "rounds", moved: "moves",
};
const LOG_MAX = 400;

const $ = (id) => document.getElementById(id);
const parts = new Map();
const clusters = new Map();
const texts = new Map();
const routing = new Map();
const CHARTS_MS = 1000;  // between two drawings of the charts
let cost = { tokens: 0 }, past = true, pastDue = 0, waiting = null;
const cards = new Map();
const fresh = new Set();  // parts of which only figures are new
let fleet = true;  // whether the map is to be drawn anew
let log = [];
let budget = 0, confidence = 0.95, missing = [], length = null, opens = 0, began = 0;
let pending = false;

function say(node, text) { if (node.textContent !== text) node.textContent = text; }
function make(tag, name, text) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
}
function percent(share, digits = 1) { return `${(100 * share).toFixed(digits)} %`; }
function width(share) { return `${(100 * Math.max(0, Math.min(1, share))).toFixed(2)}%`; }
function clock(seconds) { return new Date(1000 * seconds).toLocaleTimeString([], { hour12: false }); }
function plural(count, word) { return `${count} ${word}${count === 1 ? "" : "s"}`; }

// What comes

function whole(state) {
  parts.clear();
  cards.clear();
  clusters.clear();
  routing.clear();
  $("ask").hidden = !state.asks;
  budget = state.budget;
  confidence = state.confidence;
  length = state.length;
  opens = state.opens;
  began = state.began;
  if (length !== null) { texts.clear(); drawn = 0; } else shown = "";
  log = length === null && state.log.length === 0 ? log : [];
  change(state);
}

function change(state) {
  if (state.parts) {
    const keys = new Set();
    for (const part of state.parts) {
      const key = `${part.cluster}/${part.name}`;
      keys.add(key);
      parts.set(key, part);
    }
    for (const key of parts.keys()) if (!keys.has(key)) parts.delete(key);
    missing = state.missing;
    fleet = true;
  }
  for (const figures of state.figures || []) {
    const key = `${figures.cluster}/${figures.name}`;
    parts.set(key, { ...parts.get(key), ...figures });
    fresh.add(key);
  }
  if (state.clusters) {
    for (const cluster of state.clusters) clusters.set(cluster.cluster, cluster);
    fleet = true;
  }
  for (const bucket of state.routing || []) routing.set(bucket.at, bucket);
  while (routing.size > 60) routing.delete(routing.keys().next().value);
  if (state.cost) cost = state.cost;
  past = past || Boolean(state.clusters || state.routing || state.cost);
  for (const text of state.texts || []) {
    const known = texts.get(text.id);
    const before = known && text.from > 0 ? known.tokens.slice(0, text.from) : [];
    if (text.from === 0 && shown === text.id) drawn = 0;
    if (!known || known.count !== text.count || known.finish !== text.finish) {
      texts.delete(text.id);  // the newest stands last; what is learnt of an old one does not make it new
      moved.set(text.id, performance.now());
    }
    texts.set(text.id, { ...text, tokens: before.concat(text.tokens) });
  }
  while (texts.size > 80) {
    const eldest = texts.keys().next().value;
    texts.delete(eldest);
    moved.delete(eldest);
  }
  if (state.log) log = state.log.slice().reverse().concat(log).slice(0, LOG_MAX);
  if (!pending) {
    pending = true;
    requestAnimationFrame(draw);
  }
}

function draw() {
  pending = false;
  if (fleet) {
    drawWrong();
    drawGauges();
    drawFleet();
    drawAgents();
  } else {
    for (const key of fresh) if (cards.has(key)) drawPart(cards.get(key), parts.get(key));
  }
  fleet = false;
  fresh.clear();
  drawChoice();
  drawText();
  drawLog();
  drawPast();
}

function drawPast() {
  const now = performance.now();
  if (!past || waiting) return;
  if (now < pastDue) {
    waiting = setTimeout(() => { waiting = null; drawPast(); }, pastDue - now);
    return;
  }
  past = false;
  pastDue = now + CHARTS_MS;
  drawRouting($("routing"), [...routing.values()]);
  drawAllRounds($("rounds"), clusters);
  drawCost(cost);
}

// Fleet

function drawWrong() {
  const lines = [...parts.values()].filter((p) => p.wrong)
    .map((p) => `${p.cluster} ${p.name}: ${p.wrong}. To do: ${p.remedy}`.trim());
  lines.push(...missing);
  const list = $("wrongs");
  if (list.dataset.lines === lines.join("\n")) return;
  list.dataset.lines = lines.join("\n");
  list.replaceChildren(...lines.map((line) => make("li", "", line)));
  $("well").hidden = lines.length > 0 || parts.size === 0;
}

function drawGauges() {
  const rows = [];
  for (const cluster of clusters.values()) {
    const best = cluster.errors[0];
    if (best) rows.push([cluster.cluster === "" ? "fleet" : `as cluster ${cluster.cluster} knows it`, best]);
  }
  const fleet = rows.filter(([name]) => name === "fleet");
  const told = fleet.length ? fleet : rows.slice(0, 1);
  $("no-gauge").hidden = told.length > 0;
  const box = $("gauges");
  while (box.children.length > told.length) box.lastChild.remove();
  told.forEach(([name, error], i) => {
    let gauge = box.children[i];
    if (!gauge) {
      gauge = make("div", "gauge");
      const words = make("div", "words");
      words.append(make("span", "name"), make("span", "value"));
      const track = make("div", "track");
      track.setAttribute("role", "meter");
      track.setAttribute("aria-valuemin", "0");
      track.append(make("div", "limit"), make("div", "hat"), make("div", "allowed"));
      gauge.append(words, track, make("p", "calm"));
      box.append(gauge);
    }
    const scale = Math.max(2 * budget, 1.1 * Math.min(error.limit, 1));
    const track = gauge.querySelector(".track");
    say(gauge.querySelector(".name"), name);
    say(gauge.querySelector(".value"), `error at most ${percent(error.limit)} at ${percent(confidence, 0)}`);
    say(gauge.querySelector("p"),
      `R-hat ${percent(error.estimate, 2)} (bar: its limit) of ${Math.round(error.tokens)} tokens; ` +
      `budget ${percent(budget)} (dashed line)`);
    track.classList.toggle("over", error.limit > budget);
    track.setAttribute("aria-valuemax", scale.toFixed(3));
    track.setAttribute("aria-valuenow", error.limit.toFixed(4));
    track.setAttribute("aria-label", `Limit of the error per token, ${name}; the budget is ${percent(budget)}`);
    track.children[0].style.width = width(error.limit / scale);
    track.children[1].style.left = width(error.estimate / scale);
    track.children[2].style.left = width(budget / scale);
  });
}

function drawFleet() {
  $("nobody").hidden = parts.size > 0;
  const names = [...new Set([...parts.values()].map((part) => part.cluster))].sort();
  const map = $("map");
  for (const section of [...map.children]) if (!names.includes(section.dataset.cluster)) section.remove();
  names.forEach((name, i) => {
    let section = [...map.children].find((child) => child.dataset.cluster === name);
    if (!section) {
      section = make("section");
      section.dataset.cluster = name;
      section.append(make("h3"), make("ul", "parts"));
      map.insertBefore(section, map.children[i] || null);
    }
    const round = clusters.get(name);
    const learnt = round ? ` · round ${round.round} of ${plural(round.members, "member")}` : "";
    say(section.querySelector("h3"), (name === "" ? "Cloud" : `Cluster ${name}`) + learnt);
    drawParts(section.querySelector("ul"), [...parts.values()].filter((part) => part.cluster === name));
  });
}

function drawParts(list, found) {
  const rank = { cloud: 0, edge: 1, agent: 2 };
  found.sort((a, b) => rank[a.role] - rank[b.role] || (a.name < b.name ? -1 : 1));
  while (list.children.length > found.length) list.lastChild.remove();
  found.forEach((part, i) => {
    let card = list.children[i];
    if (!card) {
      card = make("li", "part");
      const head = make("p", "head");
      head.append(make("span", "name"), make("span", "state"));
      card.append(head, make("p", "model"), make("p", "learnt"), make("p", "remedy"), make("div", "shares"));
      card.at = Object.fromEntries(["name", "state", "model", "learnt", "remedy", "shares"].map((name) => [name, card.querySelector(`.${name}`)]));
      list.append(card);
    }
    cards.set(`${part.cluster}/${part.name}`, card);
    drawPart(card, part);
  });
}

function drawPart(card, part) {
  card.classList.toggle("off", !part.online);
  card.classList.toggle("ill", part.online && part.wrong !== "");
  say(card.at.name, part.name);
  say(card.at.state, !part.online ? "○ offline" : part.link ? `● reaches ${part.link}` : "● online");
  const role = part.role === part.name ? "" : part.role;
  say(card.at.model, [role, part.model, part.software.replace("fedhlm ", "version ")].filter(Boolean).join(", "));
  const learnt = [];
  if (part.tau !== undefined) learnt.push(part.tau < 0 ? "every token is verified" : `threshold ${part.tau.toFixed(3)}`);
  if (part.risk_limit !== undefined) {
    learnt.push(part.risk_limit < 1 ? `error at most ${percent(part.risk_limit)} at ${percent(confidence, 0)}` : "no certificate yet");
  }
  say(card.at.learnt, learnt.join(", "));
  card.at.remedy.hidden = !part.wrong;
  say(card.at.remedy, part.wrong ? `${part.wrong}. To do: ${part.remedy}` : "");
  drawShares(card.at.shares, part.sources);
}

function drawShares(bar, sources) {
  bar.hidden = !sources;
  if (!sources) return;
  const total = Object.values(sources).reduce((a, b) => a + b, 0) || 1;
  const told = Object.entries(sources).filter(([, count]) => count > 0);
  const words = told.map(([name, count]) => `${WORDS[name]} ${percent(count / total, 0)}`).join(", ");
  if (bar.title === words) return;
  bar.setAttribute("role", "img");
  bar.setAttribute("aria-label", words);
  bar.title = words;
  for (const name of Object.keys(sources)) {
    let piece = [...bar.children].find((child) => child.className === name);
    if (!piece) bar.append((piece = make("span", name)));
    piece.style.width = width(sources[name] / total);
  }
}

// Events

function drawLog() {
  const kinds = new Set([...document.querySelectorAll("#kinds input:checked")].map((box) => box.value));
  const list = $("log");
  const entries = log.filter((entry) => kinds.has(entry.kind)).slice(0, 200);
  const mark = entries.length ? `${entries[0].n}/${entries.length}/${entries[0].at}` : "";
  if (list.dataset.mark === mark) return;
  list.dataset.mark = mark;
  list.replaceChildren(...entries.map((entry) => {
    const row = make("li");
    const when = make("time", "", clock(entry.at));
    when.dateTime = new Date(1000 * entry.at).toISOString();
    const cell = length === null ? when : make("a");
    if (length !== null) {
      cell.href = `#${linked({ at: Math.max(0, entry.at - began).toFixed(1) })}`;
      cell.append(when);
    }
    row.append(cell, make("span", entry.kind, `${entry.cluster} ${entry.who} ${entry.words}`.trim()));
    return row;
  }));
}

// Asking, where the console allows it

function drawAgents() {
  const found = [...parts.values()].filter((part) => part.asked && part.online).map((part) => `${part.cluster}/${part.name}`);
  const select = $("whom");
  if (select.dataset.names === found.join("\n")) return;
  select.dataset.names = found.join("\n");
  const before = select.value;
  select.replaceChildren(...found.map((name) => {
    const option = make("option", "", name);
    option.value = name;
    return option;
  }));
  if (found.includes(before)) select.value = before;
}

async function ask(event) {
  event.preventDefault();
  const [cluster, agent] = $("whom").value.split("/");
  $("send").disabled = true;
  say($("asked"), "sent");
  try {
    const answer = await fetch("ask", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ cluster, agent, text: $("words").value }),
    });
    const told = await answer.json();
    say($("asked"), answer.ok ? `${agent} has answered` : told.error);
  } catch {
    say($("asked"), "no answer from the console's server");
  }
  $("send").disabled = false;
}

// Time of a recording

let asked = null, asking = false, playing = null;

async function goto(second) {
  asked = Math.max(0, Math.min(length, second));
  $("slider").value = asked;
  say($("at"), `${asked.toFixed(1)} / ${length.toFixed(1)} s`);
  if (asking) return;
  asking = true;
  while (asked !== null) {
    const wanted = asked;
    asked = null;
    const answer = await fetch(`state?at=${wanted}`);
    if (answer.ok) whole(await answer.json());
  }
  asking = false;
}

function play(start) {
  if (playing !== null) clearInterval(playing);
  playing = null;
  if (start) {
    if (Number($("slider").value) >= length) $("slider").value = 0;
    playing = setInterval(() => {
      const next = Number($("slider").value) + 0.2;
      goto(next);
      if (next >= length) play(false);
    }, 200);
  }
  $("play").setAttribute("aria-pressed", String(start));
  say($("play"), start ? "Pause" : "Play");
}

function recorded() {
  $("time").hidden = length === null;
  if (length === null || $("slider").max === String(length)) return;
  $("slider").max = length;
  const wanted = new URLSearchParams(location.hash.slice(1)).get("at");
  goto(wanted === null ? opens : Number(wanted) || 0);
}

// Links: #text=AGENT/REQUEST shows a text, #at=12.5 a second of a recording, #hide=round,moved leaves out kinds of events.

function linked(changes) {
  const found = new URLSearchParams(location.hash.slice(1));
  for (const [name, value] of Object.entries(changes)) {
    if (value === "") found.delete(name); else found.set(name, value);
  }
  return found.toString().replaceAll("%2F", "/").replaceAll("%2C", ",");
}

function link(changes) { history.replaceState(null, "", `#${linked(changes)}`); }

function follow() {
  const found = new URLSearchParams(location.hash.slice(1));
  picked = found.get("text") || "";
  $("which").value = texts.has(picked) ? picked : "";
  const hidden = (found.get("hide") || "").split(",");
  for (const box of document.querySelectorAll("#kinds input")) box.checked = !hidden.includes(box.value);
  if (length !== null && found.has("at")) { play(false); goto(Number(found.get("at")) || 0); }
  drawText();
  drawLog();
}

// Start

function begin() {
  for (const [kind, word] of Object.entries(KINDS)) {
    const label = make("label");
    const box = make("input");
    box.type = "checkbox";
    box.value = kind;
    box.checked = true;
    box.addEventListener("change", () => {
      link({ hide: [...document.querySelectorAll("#kinds input:not(:checked)")].map((other) => other.value).join(",") });
      drawLog();
    });
    label.append(box, word);
    $("kinds").append(label);
  }
  drawLegend();
  follow();
  addEventListener("hashchange", follow);
  $("which").addEventListener("change", (event) => {
    picked = event.target.value;
    link({ text: picked });
    drawText();
  });
  const box = $("written");
  box.addEventListener("pointerover", (event) => { if (event.target.dataset.i) look(Number(event.target.dataset.i)); });
  box.addEventListener("click", (event) => { if (event.target.dataset.i) look(Number(event.target.dataset.i)); });
  box.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: box.children.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    look(to);
  });
  $("slider").addEventListener("input", (event) => { play(false); goto(Number(event.target.value)); });
  $("back").addEventListener("click", () => goto(Number($("slider").value) - 1));
  $("on").addEventListener("click", () => goto(Number($("slider").value) + 1));
  $("play").addEventListener("click", () => play(playing === null));

  $("ask").addEventListener("submit", ask);

  const source = new EventSource("events");
  source.onopen = () => { say($("link"), "connected"); $("link").className = ""; };
  source.onerror = () => {
    say($("link"), "no connection to the console's server: what stands here is old; trying again");
    $("link").className = "broken";
  };
  source.addEventListener("state", (event) => {
    whole(JSON.parse(event.data));
    say($("link"), length === null ? "live" : "recording");
    recorded();
  });
  source.addEventListener("change", (event) => change(JSON.parse(event.data)));
}

begin();
