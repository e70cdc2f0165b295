// The page of a family: which axis is shown, which sizes are within the limits, and the best of them.
// page.py documents the data. Every trace of the plot but the last two is a learngene; these are front and best.
"use strict";

const family = JSON.parse(document.getElementById("family").textContent);
const plot = document.getElementById("plot");
const byId = (id) => document.getElementById(id);
const pick = (values, members) => members.map((member) => values[member]);
let axis = family.axes[0];

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// The sizes within all limits, of the learngenes that the legend has not hidden.
function fitting() {
  const shown = plot.data.slice(0, -2).map((trace) => trace.visible !== "legendonly");
  return family.members.flatMap((member, i) =>
    shown[member.learngene] && family.axes.every((one) => one.rank[i] <= one.slider.valueAsNumber) ? [i] : []);
}

function bestOf(members) {
  const params = family.axes[0].values;
  const better = (a, b) => family.members[b].accuracy - family.members[a].accuracy || params[a] - params[b];
  return [...members].sort(better)[0];
}

function draw(fit, best) {
  const [front, ring] = [axis.front, best === undefined ? [] : [best]];
  const accuracies = family.members.map((member) => member.accuracy);
  const traces = plot.data.map((trace, i) => {
    const members = i < plot.data.length - 2 ? trace.customdata : i === plot.data.length - 2 ? front : ring;
    const moved = { ...trace, x: pick(axis.values, members), y: pick(accuracies, members) };
    if (!trace.customdata) {
      return i === plot.data.length - 2 ? { ...moved, text: front.map((member) => `\u2002${family.members[member].size}`) } : moved;
    }
    const spread = (far) => members.map((member) => Math.abs(axis[far][member] - axis.values[member]));
    const opacity = members.map((member) => (fit.includes(member) ? 1 : 0.2));
    return {
      ...moved,
      marker: { ...trace.marker, opacity },
      error_x: { ...trace.error_x, array: spread("high"), arrayminus: spread("low") },
    };
  });
  const title = axis.title + (axis.unit ? `, ${axis.unit}` : "");
  const xaxis = { ...plot.layout.xaxis, title: { text: title }, tickformat: axis.ticks };
  Plotly.react(plot, traces, { ...plot.layout, xaxis });
}

function describe(best) {
  const member = family.members[best];
  byId("best").textContent = member ? member.title : "No size fits these limits";
  byId("numbers").replaceChildren(
    ...(member ? member.numbers : []).flatMap(([what, number]) =>
      [element("dt", { textContent: what }), element("dd", { textContent: number })]));
  byId("recipe").hidden = !member;
  byId("command").textContent = member ? member.command : "";
  byId("python").textContent = member ? member.python : "";
}

function refresh() {
  for (const one of family.axes) {
    const at = one.slider.valueAsNumber;
    const member = one.rank.indexOf(at);
    one.shown.value = at === Number(one.slider.max) ? "any" : (one.most ? "≥ " : "≤ ") + one.texts[member];
  }
  const fit = fitting();
  const best = bestOf(fit);
  describe(best);
  draw(fit, best);
}

function choose(chosen) {
  axis = chosen;
  Object.assign(plot.layout.xaxis, { autorange: true });
  refresh();
}

for (const one of family.axes) {
  const radio = element("input", { type: "radio", name: "axis", checked: one === axis, onchange: () => choose(one) });
  byId("axes").append(element("label", {}, radio, ` ${one.name}`));
  const loosest = String(Math.max(...one.rank));
  one.slider = element("input", { type: "range", min: "0", max: loosest, value: loosest, oninput: refresh });
  one.shown = element("output");
  byId("limits").append(element("label", { className: "limit" }, element("span", {}, one.title), one.shown, one.slider));
}
for (const button of document.querySelectorAll("[data-copies]")) {
  button.onclick = () => {
    // navigator.clipboard is missing in pages that come over http
    window.getSelection().selectAllChildren(byId(button.dataset.copies));
    button.textContent = document.execCommand("copy") ? "Copied" : "Press Ctrl+C";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  };
}
plot.on("plotly_restyle", refresh); // a click on the legend
refresh();
