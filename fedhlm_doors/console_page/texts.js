"use strict";
// Texts, token by token: who decided each, how sure the device was, and what the LLM said later.

const WORDS = {
  local: "device kept", peer: "peer", neighbour: "neighbour cluster", cloud: "cloud", accepted: "cloud accepted",
  replaced: "cloud replaced", unverified: "unverified", mixed: "several, not told apart",
};
const LEGEND = ["local", "peer", "neighbour", "accepted", "replaced", "cloud", "unverified"];
const MARKS = { agreed: "verified later", missed: "verified later: the LLM differs", doubt: "bar: doubt u" };
const READ_MS = 4000;  // a finished text stays for so long before a newer one is shown
const STALLED_MS = 15000;  // and one that is not written on

let picked = "", shown = "", drawn = 0, at = -1;
const moved = new Map();  // when each text was last written on, by the browser's clock
let turning = null;

function drawChoice() {
  const select = $("which");
  const ids = [...texts.keys()].reverse();
  if (select.dataset.ids === ids.join("\n")) return;
  select.dataset.ids = ids.join("\n");
  const options = ids.map((id) => {
    const text = texts.get(id);
    const option = make("option", "", `${text.agent}: ${(text.prompt || text.id).replace(/\s+/g, " ").slice(0, 60)}`);
    option.value = id;
    return option;
  });
  select.replaceChildren(select.options[0], ...options);
  select.value = texts.has(picked) ? picked : "";
}

// The text to show: the one that was picked, or else the newest. One that is being written, or read, stays.
function choose() {
  if (texts.has(picked)) return picked;
  const newest = [...texts.keys()].pop();
  const text = texts.get(shown);
  if (!text || newest === shown) return newest;
  if ($("written").matches(":hover") || $("written") === document.activeElement) return shown;
  const left = (moved.get(shown) || 0) + (text.finish ? READ_MS : STALLED_MS) - performance.now();
  if (left <= 0) return newest;
  if (turning === null) turning = setTimeout(() => { turning = null; drawText(); }, left);
  return shown;
}

// The classes of a token: who decided it, and whether the LLM has looked at it later.
function classes([word, source, , draft, , later]) {
  const decided = source !== "cloud" || draft === null ? source : draft === word ? "accepted" : "replaced";
  return `t ${decided}${later === null ? "" : later ? " agreed" : " missed"}`;
}

function drawText() {
  const id = choose();
  const box = $("written");
  const text = id === undefined ? null : texts.get(id);
  if (id !== shown || text === null) {
    shown = id || "";
    drawn = 0;
    at = -1;
    say($("detail"), HINT);
  }
  if (text === null) {
    box.replaceChildren();
    say($("prompt"), "No text yet. Ask an agent: fedhlm ask AGENT TEXT");
    say($("figures"), "");
    return;
  }
  say($("prompt"), `${text.agent} in ${text.cluster} continues: ${text.prompt || "(the prompt was not seen)"}`);
  if (drawn === 0 || drawn > text.tokens.length) {
    box.replaceChildren();
    drawn = 0;
  }
  const low = box.scrollTop + box.clientHeight >= box.scrollHeight - 40;
  const fresh = document.createDocumentFragment();
  for (; drawn < text.tokens.length; drawn++) {
    const [word, source, doubt] = text.tokens[drawn];
    const token = make("span", classes(text.tokens[drawn]), word);
    if (doubt !== null && source !== "missing") token.style.setProperty("--u", doubt);
    token.dataset.i = drawn;
    fresh.append(token);
  }
  box.append(fresh);
  if (at >= 0) box.children[at]?.classList.add("at");
  if (low) box.scrollTop = box.scrollHeight;
  const s = text.statistics;
  const told = [plural(text.count, "token")];
  if (text.finish) told.push(text.error ? `${text.finish}: ${text.error}` : text.finish);
  if (s.uplink_bytes !== undefined) told.push(`${Math.round(s.uplink_bytes).toLocaleString()} bytes up`);
  if (s.round_trips !== undefined) told.push(plural(s.round_trips, "round trip"));
  if (s.rollbacks !== undefined) told.push(plural(s.rollbacks, "rollback"));
  if (s.wall_s !== undefined) told.push(`${s.wall_s.toFixed(2)} s`);
  say($("figures"), told.join(", "));
}

function look(index) {
  const text = texts.get(shown);
  const box = $("written");
  if (!text || index < 0 || index >= text.tokens.length) return;
  box.children[at]?.classList.remove("at");
  at = index;
  const token = box.children[at];
  token.classList.add("at");
  token.scrollIntoView({ block: "nearest" });
  say($("detail"), words(text, text.tokens[at]));
}

const HINT = "Point at a token, or move through the text with the arrow keys.";

// All that is known of a token, in words.
function words(text, token) {
  const [word, source, doubt, draft, score, later, ms] = token;
  if (source === "missing") return `Token ${at + 1}: ${doubt} tokens were not seen.`;
  const told = [`Token ${at + 1}, “${word}”: ${WORDS[classes(token).split(" ")[1]]}`];
  if (later !== null) told.push(later ? "the LLM has looked at it later and agrees" : "the LLM has looked at it later and would have written another");
  if (draft !== null && draft !== word) told.push(`the device had drafted “${draft}”`);
  const s = text.statistics;
  if (doubt !== null) told.push(`doubt u = ${doubt.toFixed(3)}`);
  if (s.tau !== undefined) told.push(s.tau < 0 ? "no threshold yet" : `threshold ${s.tau.toFixed(3)}`);
  if (score !== null) told.push(`peers' similarity ${score.toFixed(2)}`);
  told.push(`${ms.toLocaleString()} ms after the prompt`);
  if (s.uplink_bytes !== undefined && text.count) told.push(`${(s.uplink_bytes / text.count).toFixed(1)} bytes up per token of this text`);
  if (doubt === null && source !== "mixed") told.push("doubt and draft are known once the text has ended, where agents publish their journals");
  return told.join("; ") + ".";
}

function drawLegend() {
  for (const [name, said] of [...LEGEND.map((name) => [name, WORDS[name]]), ...Object.entries(MARKS)]) {
    const row = make("li");
    row.append(make("span", `t ${name}`, "word"), said);
    $("legend").append(row);
  }
}
