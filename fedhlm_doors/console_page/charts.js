"use strict";
// What happened over time, drawn as SVG: shares of routing, thresholds and learnt curves by round. Figures stand beside
// every chart in words, for those who do not see it.

const SVG = document.getElementById("blank").namespaceURI;
const WIDE = 600, HIGH = 90;
const CURVES = ["0.1", "0.5", "0.9"];  // the doubts u at which m(u) is drawn

function shape(tag, attributes) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

function chart(words) {
  const svg = shape("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img", "aria-label": words, preserveAspectRatio: "none" });
  svg.append(shape("line", { x1: 0, y1: HIGH - 0.5, x2: WIDE, y2: HIGH - 0.5, class: "axis" }));
  return svg;
}

// Shares of tokens by source, one bar for each ten seconds.
function drawRouting(box, buckets) {
  const told = buckets.map((bucket) => ({ at: bucket.at, counts: Object.entries(bucket).filter(([name]) => name !== "at") }))
    .map((bucket) => ({ ...bucket, total: bucket.counts.reduce((sum, [, count]) => sum + count, 0) }))
    .filter((bucket) => bucket.total > 0);
  if (!told.length) return;
  const last = told[told.length - 1];
  const words = last.counts.filter(([, count]) => count > 0)
    .map(([name, count]) => `${WORDS[name]} ${percent(count / last.total, 0)}`).join(", ");
  const svg = chart(`Shares of tokens by source, every ten seconds. The last: ${words}`);
  const step = WIDE / Math.max(told.length, 12);
  told.forEach((bucket, i) => {
    let top = HIGH;
    for (const [name, count] of bucket.counts) {
      if (!count) continue;
      const height = HIGH * count / bucket.total;
      top -= height;
      svg.append(shape("rect", { x: (i * step).toFixed(1), y: top.toFixed(1), width: (step - 1).toFixed(1), height: height.toFixed(1), class: name }));
    }
  });
  box.replaceChildren(svg, make("p", "calm", `${clock(told[0].at)} to ${clock(last.at + 10)}; the last ten seconds: ${words}`));
}

// The threshold and m(u) of one cluster, by round.
function drawRounds(box, cluster) {
  const rounds = cluster.rounds.filter((round) => round.tau !== null || round.m !== null);
  if (!rounds.length) return;
  const last = rounds[rounds.length - 1];
  const lines = [["tau", (round) => round.tau], ...CURVES.map((u, i) => [`u${i}`, (round) => (round.m ? round.m[i] : null)])];
  const told = [];
  if (last.tau !== null) told.push(`threshold ${last.tau.toFixed(3)}`);
  if (last.m) told.push(`m(u) ${last.m.map((m, i) => `${m.toFixed(2)} at u = ${CURVES[i]}`).join(", ")}`);
  const name = cluster.cluster === "" ? "All clusters" : `Cluster ${cluster.cluster}`;
  const words = `${name}, round ${last.round}: ${told.join("; ")}`;
  const svg = chart(`Threshold and learnt curve by round. ${words}`);
  const step = WIDE / Math.max(rounds.length - 1, 1);
  for (const [kind, read] of lines) {
    const points = rounds.map((round, i) => [i * step, read(round)]).filter(([, value]) => value !== null)
      .map(([x, value]) => `${x.toFixed(1)},${(HIGH - 1 - (HIGH - 2) * Math.max(0, Math.min(1, value))).toFixed(1)}`);
    if (points.length === 1) points.push(`${WIDE},${points[0].split(",")[1]}`);
    if (points.length) svg.append(shape("polyline", { points: points.join(" "), class: `line ${kind}` }));
  }
  box.replaceChildren(svg, make("p", "calm", words));
}

function drawAllRounds(box, known) {
  const names = [...known.keys()].sort().slice(0, 8);
  while (box.children.length > names.length) box.lastChild.remove();
  names.forEach((name, i) => {
    if (!box.children[i]) box.append(make("div", "chart"));
    drawRounds(box.children[i], known.get(name));
  });
}

// Bytes to the cloud per token, beside two other ways.
function drawCost(cost) {
  const has = cost.tokens > 0;
  $("cost").hidden = !has;
  $("no-cost").hidden = has;
  if (!has) return;
  const per = (bytes) => `${(bytes / cost.tokens).toLocaleString(undefined, { maximumFractionDigits: 1 })}`;
  say($("cost-sent"), per(cost.sent));
  say($("cost-text"), per(cost.text));
  say($("cost-law"), cost.law ? `${per(cost.law)} or more` : "the vocabulary is not known");
  say($("cost-trips"), (cost.trips / cost.tokens).toFixed(2));
}
