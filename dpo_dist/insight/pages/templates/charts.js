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
      this.isTimed = Boolean(this.data.hours && hoursBox && hoursBox.checked);
      this.axis = this.isTimed ? this.data.hourAxis : this.data.stepAxis;
      const xs = this.isTimed ? this.data.hours : this.data.steps;
      this.points = this.data.lines.map(values => values
        .map((value, i) => ({x: xs[i], step: this.data.steps[i], value})).filter(point => point.value !== null));
      this.xs = [...new Set(this.points.flat().map(point => point.x))].sort((a, b) => a - b);
    }
    valueAt(pointer) {
      const area = this.svg.getBoundingClientRect();
      const [left, right] = this.data.box;
      const x = (pointer.clientX - area.left) / area.width * this.svg.viewBox.baseVal.width;
      return this.axis[0] + (x - left) / (right - left) * (this.axis[1] - this.axis[0]);
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
      const isEnd = x === null;
      const nearer = (best, each) => Math.abs(each - x) < Math.abs(best - x) ? each : best;
      this.at = isEnd ? null : this.xs.reduce(nearer);
      const at = isEnd ? this.xs[this.xs.length - 1] : this.at;
      for (const item of this.items) {
        item.output.textContent = item.lines.map(line => this.describe(line, at)).join(" \u00b7 mean ");
      }
      const point = this.points.flat().find(each => each.x === at);
      this.place.textContent = "step " + text(point.step) + (this.isTimed ? " \u00b7 " + text(at) + " h" : "");
      this.cursor.replaceChildren(...(isEnd ? [] : this.marks(at)));
    }
    marks(at) {
      const {box: [left, right, top, bottom], yAxis: [low, high, isLog]} = this.data;
      const x = between(at, this.axis, left, right);
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
    const legend = chart.figure.querySelector(".legend");
    const follow = event => showAll(chart, chart.valueAt(event));
    chart.svg.addEventListener("pointermove", follow);
    chart.svg.addEventListener("pointerdown", follow);
    chart.svg.addEventListener("pointerleave", event => {
      if (event.pointerType === "mouse") showAll(chart, null);
    });
    chart.figure.tabIndex = 0;
    chart.figure.addEventListener("focus", () => { legend.ariaLive = "polite"; });
    chart.figure.addEventListener("blur", () => { legend.ariaLive = "off"; showAll(chart, null); });
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
