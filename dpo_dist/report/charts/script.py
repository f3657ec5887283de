"""Style sheet, script and axis switch of the charts of a page."""

LIGHT_COLORS = ("#0072b2", "#c85200", "#00805c", "#a3478c", "#8f6a00", "#5b6470")
"""Colours of lines on white that colour-blind people can distinguish: after Okabe and Ito
(https://jfly.uni-koeln.de/color/), darkened to a contrast of 4 to white."""
_DARK_COLORS = ("#5eb5f0", "#ff9447", "#33cfa3", "#e79bcb", "#e6c24a", "#b3bcc8")

AXIS_SWITCH = (
    '<fieldset class="axis-switch"><legend>Curves over</legend>'
    '<label><input type="radio" name="axis" id="axis-steps" checked> steps</label>'
    '<label><input type="radio" name="axis" id="axis-hours"> hours</label></fieldset>'
)


def _variables(colors: tuple[str, ...]) -> str:
    return ":root { " + " ".join(f"--c{index}: {color};" for index, color in enumerate(colors)) + " }"


STYLE = (
    f"""
{_variables(LIGHT_COLORS)}
@media (prefers-color-scheme: dark) {{ {_variables(_DARK_COLORS)} }}
"""
    + """
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); gap: 22px; }
.curves { margin: 0; min-width: 0; max-width: none; }
.curves figcaption { display: flex; justify-content: space-between; gap: 12px; font-size: 14px; }
.curves small, .curves .place { color: var(--quiet); font-weight: 400; font-size: 12px; }
.curves .place { white-space: nowrap; }
.curves svg { display: block; width: 100%; height: auto; touch-action: pan-y; }
.curves:focus-visible { outline: 2px solid var(--c0); outline-offset: 4px; border-radius: 4px; }
.curves text { font-size: 11px; fill: var(--quiet); }
.curves path { fill: none; vector-effect: non-scaling-stroke; }
.curves .grid { stroke: var(--line); stroke-width: 1; }
.curves .axis, .curves .tick { stroke: var(--quiet); stroke-width: 1; }
.curves .raw, .curves .smooth, .curves .evaluation { stroke: currentColor; stroke-linecap: round; }
.curves .raw, .curves .smooth, .curves .evaluation { stroke-linejoin: round; stroke-width: 2; }
.curves .light { stroke-width: 1; opacity: .38; }
.curves .evaluation { stroke-width: 1; stroke-dasharray: 3 3; }
.curves .dot { stroke-width: 5; }
.curves .mark, .curves .spike { stroke: currentColor; stroke-width: 8; stroke-linecap: round; }
.curves .hole { stroke: Canvas; stroke-width: 4; stroke-linecap: round; }
.curves .cursor line { stroke: var(--quiet); stroke-width: 1; }
.curves .cursor circle { fill: currentColor; stroke: Canvas; stroke-width: 1.5; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
.legend { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0 14px; }
.legend { font-size: 13px; font-variant-numeric: tabular-nums; }
.legend b { font-weight: 600; }
.legend li { overflow-wrap: anywhere; }
.legend i { display: inline-block; margin-right: 5px; vertical-align: middle; }
.stroke { width: 16px; border-top: 3px solid currentColor; }
.ring { width: 6px; height: 6px; border: 2px solid currentColor; border-radius: 9px; }
.gaps { display: block; }
.at-hours { display: none; }
:root:has(#axis-hours:checked) .timed .at-hours { display: inline; }
:root:has(#axis-hours:checked) .timed .at-steps { display: none; }
.axis-switch { border: 0; padding: 0; margin: 8px 0 14px; display: flex; gap: 14px; font-size: 14px; }
.axis-switch legend { float: left; margin-right: 14px; color: var(--quiet); padding: 0; }
"""
)

SCRIPT = """
"use strict";
(() => {
  const NS = "http://www.w3.org/2000/svg";
  const hoursBox = document.getElementById("axis-hours");
  const text = value => {
    const size = Math.abs(value);
    if (size >= 1e6 || (size > 0 && size < 1e-3)) {
      const [digits, exponent] = value.toExponential(2).split("e");
      return Number(digits) + "e" + Number(exponent);
    }
    return size >= 1000 ? Math.round(value).toLocaleString("en-US") : String(Number(value.toPrecision(4)));
  };
  const between = (value, [low, high], start, end) =>
    start + (value - low) / (high - low || 1) * (end - start);

  class Chart {
    constructor(figure) {
      this.figure = figure;
      this.svg = figure.querySelector("svg");
      this.cursor = figure.querySelector(".cursor");
      this.place = figure.querySelector(".place");
      this.items = [...figure.querySelectorAll(".legend li")].map(item => ({
        color: item.className, output: item.querySelector("b"),
        lines: item.dataset.lines.split(" ").map(Number),
      }));
      this.data = JSON.parse(figure.dataset.chart);
      this.at = null;
      this.order();
    }
    order() {
      this.isTimed = Boolean(this.data.hourAxis && hoursBox && hoursBox.checked);
      this.points = this.data.lines.map(line => {
        const xs = this.isTimed ? line.hours || [] : this.data.steps;
        return line.values.map((value, i) => ({x: xs[i], step: this.data.steps[i], value, i}))
          .filter(point => point.value !== null && typeof point.x === "number").sort((a, b) => a.x - b.x);
      });
      this.xs = [...new Set(this.points.flat().map(point => point.x))].sort((a, b) => a - b);
    }
    nearest(x) {
      const nearer = (best, each) => Math.abs(each - x) < Math.abs(best - x) ? each : best;
      return this.xs.reduce(nearer, this.xs[0]);
    }
    valueAt(pointer) {
      const area = this.svg.getBoundingClientRect();
      const [left, right] = this.data.box;
      const x = (pointer.clientX - area.left) / area.width * this.svg.viewBox.baseVal.width;
      const axis = this.isTimed ? this.data.hourAxis : this.data.stepAxis;
      return axis[0] + (x - left) / (right - left) * (axis[1] - axis[0]);
    }
    last(line, x) {
      return this.points[line].filter(point => point.x <= x).pop();
    }
    describe(line, x) {
      const point = this.last(line, x);
      if (!point) return "none yet";
      const value = point.value === "" ? "no value" : text(point.value);
      return point.x === x ? value : value + " at step " + text(point.step);
    }
    show(x) {
      if (!this.xs.length) return;
      const isEnd = x === null;
      this.at = isEnd ? null : this.nearest(x);
      const at = isEnd ? this.xs[this.xs.length - 1] : this.at;
      for (const item of this.items) {
        item.output.textContent = item.lines.map(line => this.describe(line, at)).join(" \\u00b7 mean ");
      }
      const point = this.points.flat().find(each => each.x === at);
      const hours = this.isTimed ? " \\u00b7 " + text(at) + " h" : "";
      this.place.textContent = "step " + text(point.step) + hours;
      this.cursor.replaceChildren(...(isEnd ? [] : this.marks(at)));
    }
    marks(at) {
      const {box: [left, right, top, bottom], stepAxis, hourAxis, yAxis: [low, high, isLog]} = this.data;
      const x = between(at, this.isTimed ? hourAxis : stepAxis, left, right);
      const scale = isLog ? Math.log10 : value => value;
      const made = (name, values) => {
        const element = document.createElementNS(NS, name);
        for (const [key, value] of Object.entries(values)) element.setAttribute(key, value);
        return element;
      };
      const dots = this.items.map(item => {
        const point = this.last(item.lines[item.lines.length - 1], at);
        if (!point || point.x !== at || point.value === "") return null;
        const y = between(scale(point.value), [scale(low), scale(high)], bottom, top);
        return made("circle", {cx: x, cy: y, r: 4, class: item.color});
      });
      return [made("line", {x1: x, x2: x, y1: top, y2: bottom}), ...dots.filter(Boolean)];
    }
    move(key) {
      const last = this.xs.length - 1;
      const now = this.at === null ? last : this.xs.indexOf(this.at);
      const to = {ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: last,
                  PageUp: now - 10, PageDown: now + 10}[key];
      return to === undefined ? undefined : this.xs[Math.min(Math.max(to, 0), last)];
    }
  }

  const charts = [...document.querySelectorAll("figure.curves")].map(figure => new Chart(figure));
  const showAll = (from, x) => {
    for (const chart of charts) if (chart.isTimed === from.isTimed) chart.show(x);
  };
  for (const chart of charts) {
    const follow = event => showAll(chart, chart.valueAt(event));
    chart.svg.addEventListener("pointermove", follow);
    chart.svg.addEventListener("pointerdown", follow);
    chart.svg.addEventListener("pointerleave", event => {
      if (event.pointerType === "mouse") showAll(chart, null);
    });
    chart.figure.tabIndex = 0;
    chart.figure.addEventListener("focus", () => chart.figure.querySelector(".legend").ariaLive = "polite");
    chart.figure.addEventListener("blur", () => {
      chart.figure.querySelector(".legend").ariaLive = "off";
      showAll(chart, null);
    });
    chart.figure.addEventListener("keydown", event => {
      const x = event.key === "Escape" ? null : chart.move(event.key);
      if (x === undefined) return;
      event.preventDefault();
      showAll(chart, x);
    });
  }
  for (const box of document.querySelectorAll("input[name=axis]")) {
    box.addEventListener("change", () => {
      for (const chart of charts) { chart.order(); chart.show(null); }
    });
  }
})();
"""
