"use strict";
(() => {
  const NS = "http://www.w3.org/2000/svg";
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
      this.points = this.data.lines.map(([steps, values]) =>
        steps.map((step, i) => ({step, value: values[i]})));
      this.steps = [...new Set(this.points.flat().map(point => point.step))].sort((a, b) => a - b);
      this.at = null;
    }
    valueAt(pointer) {
      const area = this.svg.getBoundingClientRect();
      const [left, right] = this.data.box;
      const x = (pointer.clientX - area.left) / area.width * this.svg.viewBox.baseVal.width;
      return between(x, [left, right], ...this.data.xAxis);
    }
    last(line, step) {
      return this.points[line].filter(point => point.step <= step).pop();
    }
    describe(line, step) {
      const point = this.last(line, step);
      if (!point) return "none yet";
      const value = point.value === null ? "no value" : text(point.value);
      return point.step === step ? value : `${value} at ${this.data.over} ${text(point.step)}`;
    }
    show(step) {
      const isEnd = step === null;
      const nearer = (best, each) => Math.abs(each - step) < Math.abs(best - step) ? each : best;
      this.at = isEnd ? null : this.steps.reduce(nearer);
      const at = isEnd ? this.steps[this.steps.length - 1] : this.at;
      for (const item of this.items) {
        item.output.textContent = item.lines.map(line => this.describe(line, at)).join(this.data.shared ? " \u00b7 " : " \u00b7 mean ");
      }
      this.place.textContent = this.data.over + " " + text(at);
      this.cursor.replaceChildren(...(isEnd ? [] : this.marks(at)));
    }
    marks(at) {
      const {box: [left, right, top, bottom], yAxis: [low, high, isLog]} = this.data;
      const x = between(at, this.data.xAxis, left, right);
      const scale = isLog ? Math.log10 : value => value;
      const made = (name, values) => {
        const element = document.createElementNS(NS, name);
        for (const [key, value] of Object.entries(values)) element.setAttribute(key, value);
        return element;
      };
      const shown = item => this.data.shared ? item.lines : item.lines.slice(-1);  // a mean is after its values
      const dots = this.items.flatMap(item => shown(item).map(line => {
        const point = this.last(line, at);
        if (!point || point.step !== at || point.value === null) return null;
        const y = between(scale(point.value), [scale(low), scale(high)], bottom, top);
        return made("circle", {cx: x, cy: y, r: 4, class: item.color});
      }));
      return [made("line", {x1: x, x2: x, y1: top, y2: bottom}), ...dots.filter(Boolean)];
    }
    move(key) {
      const last = this.steps.length - 1;
      const now = this.at === null ? last : this.steps.indexOf(this.at);
      const to = {ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: last,
                  PageUp: now - 10, PageDown: now + 10}[key];
      return to === undefined ? undefined : this.steps[Math.min(Math.max(to, 0), last)];
    }
  }

  const charts = [...document.querySelectorAll("figure.curves")].map(figure => new Chart(figure));
  const showAll = x => {
    for (const chart of charts) chart.show(x);
  };
  for (const chart of charts) {
    const legend = chart.figure.querySelector(".legend");
    const follow = event => showAll(chart.valueAt(event));
    chart.svg.addEventListener("pointermove", follow);
    chart.svg.addEventListener("pointerdown", follow);
    chart.svg.addEventListener("pointerleave", event => {
      if (event.pointerType === "mouse") showAll(null);
    });
    chart.figure.tabIndex = 0;
    chart.figure.addEventListener("focus", () => { legend.ariaLive = "polite"; });
    chart.figure.addEventListener("blur", () => { legend.ariaLive = "off"; showAll(null); });
    chart.figure.addEventListener("keydown", event => {
      const x = event.key === "Escape" ? null : chart.move(event.key);
      if (x === undefined) return;
      event.preventDefault();
      showAll(x);
    });
  }
})();
