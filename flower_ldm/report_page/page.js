// Every chart gets a cross-hair with values, by mouse, touch and keyboard. Pictures open large. Commands can be copied.
// Without this script the page shows the same content.
"use strict";

function format(value) {
  if (Number.isInteger(value) || Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en-US").replace("-", "−");
  return String(Number(value.toPrecision(4))).replace("e+", "e").replaceAll("-", "−");
}

function nearest(points, x) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] <= x) low = middle; else high = middle;
  }
  return x - points[low][0] <= points[high][0] - x ? points[low] : points[high];
}

function makeChart(figure) {
  const { x: [left, right], y: [bottom, top], log, xName, series } = JSON.parse(figure.dataset.chart);
  const plot = figure.querySelector(".plot"), area = figure.querySelector(".area"), axis = figure.querySelector(".axis");
  const outputs = [...figure.querySelectorAll("output")], atRest = outputs.map(output => output.textContent);
  const xs = [...new Set(series.flatMap(one => one.points.map(point => point[0])))].sort((a, b) => a - b);
  const scale = log ? Math.log : value => value;
  const across = x => 100 * (x - left) / (right - left);
  const up = y => 100 * (scale(y) - scale(bottom)) / (scale(top) - scale(bottom));
  const cursor = document.createElement("div");
  cursor.className = "cursor";
  const dots = series.map((one, index) => {
    const dot = document.createElement("div");
    dot.className = "point " + [...figure.querySelectorAll(".line")][index].classList[1];
    return dot;
  });
  let current = xs.length - 1;

  function show(x) {
    const at = nearest(xs.map(value => [value]), x)[0], said = [];
    current = xs.indexOf(at);
    area.append(cursor, ...dots);
    cursor.style.left = across(at) + "%";
    series.forEach((one, index) => {
      const [pointX, y] = nearest(one.points, at);
      dots[index].style.left = across(pointX) + "%";
      dots[index].style.bottom = up(y) + "%";
      outputs[index].textContent = format(y) + (pointX === at ? "" : " at " + format(pointX));
      said.push(one.name + " " + outputs[index].textContent);
    });
    axis.textContent = xName + " " + format(at);
    plot.setAttribute("aria-valuenow", at);
    plot.setAttribute("aria-valuetext", axis.textContent + ": " + said.join(", "));
  }

  function rest() {
    cursor.remove();
    dots.forEach(dot => dot.remove());
    outputs.forEach((output, index) => { output.textContent = atRest[index]; });
    axis.textContent = xName;
  }

  const group = () => figure.dataset.group ? charts.filter(one => one.group === figure.dataset.group) : [self];
  const showAll = x => group().forEach(one => one.show(x));
  const restAll = () => group().forEach(one => one.rest());
  const follow = event => {
    const box = area.getBoundingClientRect();
    showAll(left + (right - left) * (event.clientX - box.left) / box.width);
  };
  plot.addEventListener("pointermove", follow);
  plot.addEventListener("pointerdown", follow);
  plot.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") restAll(); });
  plot.addEventListener("blur", restAll);
  plot.addEventListener("focus", () => { if (plot.matches(":focus-visible")) showAll(xs[current]); });
  plot.addEventListener("keydown", event => {
    const far = Math.max(1, Math.round(xs.length / 10));
    const moves = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -far, PageUp: far, Home: -xs.length, End: xs.length };
    if (event.key === "Escape") restAll();
    if (!(event.key in moves)) return;
    event.preventDefault();
    showAll(xs[Math.min(xs.length - 1, Math.max(0, current + moves[event.key]))]);
  });
  plot.tabIndex = 0;
  plot.setAttribute("role", "slider");
  plot.setAttribute("aria-valuemin", xs[0]);
  plot.setAttribute("aria-valuemax", xs[xs.length - 1]);
  plot.setAttribute("aria-valuenow", xs[current]);
  plot.setAttribute("aria-valuetext", plot.getAttribute("aria-label"));
  const self = { group: figure.dataset.group, show, rest };
  return self;
}

const charts = [...document.querySelectorAll(".chart")].map(makeChart);

const dialog = document.querySelector("dialog");
for (const image of document.querySelectorAll(".picture img")) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "zoom";
  button.setAttribute("aria-label", "Enlarge: " + image.alt);
  const picture = image.closest("picture") || image;
  picture.replaceWith(button);
  button.append(picture);
  button.addEventListener("click", () => {
    const large = dialog.querySelector("img");
    large.src = image.currentSrc;
    large.alt = image.alt;
    dialog.showModal();
  });
}
dialog.addEventListener("click", () => dialog.close());
if (document.querySelector(".zoom")) {
  const hint = document.createElement("p");
  hint.className = "hint";
  hint.textContent = "Every picture opens large when it is clicked or tapped.";
  document.querySelector("nav").append(hint);
}

for (const command of document.querySelectorAll(".command")) {
  if (!navigator.clipboard) break;  // some browsers have none for a page opened from a file
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(command.querySelector("code").textContent);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
  command.append(button);
}

addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(one => { one.open = true; }));
