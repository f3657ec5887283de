"use strict";
(() => {
  const text = value => {
    const size = Math.abs(value);
    if (size >= 1e6 || (size > 0 && size < 1e-3)) {
      const [digits, exponent] = value.toExponential(2).split("e");
      return Number(digits) + "e" + Number(exponent);
    }
    return size >= 1000 ? Math.round(value).toLocaleString("en-US") : String(Number(value.toPrecision(4)));
  };
  const style = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const quiet = () => style("--quiet");
  const line = () => style("--line");

  function lineOf(data, label, index) {
    const {role, color} = data.lines[index];
    const stroke = () => style("--c" + color % 6) + (role === "light" ? "60" : "");
    const isLine = !["spike", "point"].includes(role) || (role === "point" && data.lines[index].xs.length > 1);
    const dash = role === "evaluation" ? [3, 3] : color > 5 ? [8, 4] : [];
    const hasPoints = ["evaluation", "spike", "point"].includes(role) || data.lines[index].xs.length < 30;
    return {
      label, stroke, dash, width: role === "mean" || role === "line" ? 2 : 1,
      paths: isLine ? undefined : () => null,
      points: {
        show: hasPoints, size: 7, stroke,
        fill: () => role === "evaluation" ? style("--canvas") : stroke(),
      },
      // The last value up to the cursor, and where it is; without a cursor, the last of all.
      value: (chart, value, series) => {
        const values = chart.data[series], xs = chart.data[0];
        const now = chart.cursor.idx ?? xs.length - 1;
        let place = now;
        while (place >= 0 && values[place] === undefined) place -= 1;
        if (place < 0) return "none yet";
        const shown = values[place] === null ? "no value" : text(values[place]);
        return place === now || data.ticks ? shown : `${shown} at ${text(xs[place])}`;
      },
    };
  }

  // Intervals of values.
  function draw(data, chart) {
    const {ctx} = chart;
    const stroke = (color, from, to) => {
      ctx.save();
      ctx.beginPath();
      ctx.strokeStyle = color;
      ctx.lineWidth = 1.5 * devicePixelRatio;
      ctx.setLineDash([]);
      ctx.moveTo(...from);
      ctx.lineTo(...to);
      ctx.stroke();
      ctx.restore();
    };
    for (const each of data.lines) for (const [at, ends] of each.ends.entries()) {
      if (!ends) continue;
      // Beside each other, so that none hides another at the same value.
      const x = chart.valToPos(each.xs[at], "x", true) + 4 * devicePixelRatio * (each.color - (data.lines.length - 1) / 2);
      stroke(style("--c" + each.color % 6), [x, chart.valToPos(ends[0], "y", true)], [x, chart.valToPos(ends[1], "y", true)]);
    }
  }

  function show(figure) {
    const data = JSON.parse(figure.dataset.chart);
    const legend = figure.querySelector(".legend");
    const labels = [...legend.children];  // elements, so that the program escapes all texts
    legend.remove();
    // A missing value is a gap where a line has null, and none where the line has no point.
    const tables = data.lines.map(each => [each.xs, each.ys]);
    const joined = uPlot.join(tables, tables.map(() => [1, 1]));
    const ys = data.lines.flatMap(each => [...each.ys, ...each.ends.flat()]).filter(y => y !== null && (!data.hasLogValues || y > 0));
    const low = Math.min(...ys), high = Math.max(...ys);
    const room = 0.05 * (high - low) || 0.1 * Math.abs(high) || 1;
    const xs = joined[0], first = xs[0], last = xs[xs.length - 1];
    const edge = (data.ticks ? 0.05 : 0) * (last - first) || (first === last ? 1 : 0);
    const ends = data.isLog ? [first / 1.2, last * 1.2] : [first - edge, last + edge];
    const ticks = data.ticks && new Map(data.ticks);
    const written = value => value === null ? "" : ticks?.get(value) ?? text(value);
    const spaced = (scale, room) => (chart, splits) => {
      let before = Infinity;
      return splits.map(value => {
        const place = chart.valToPos(value, scale);
        if (Math.abs(place - before) < room) return null;
        before = place;
        return value;
      });
    };
    const size = () => ({width: figure.clientWidth, height: 220});
    const axis = {stroke: quiet, grid: {stroke: line, width: 1}, ticks: {stroke: quiet, size: 4, width: 1}, font: "11px system-ui, sans-serif"};
    const chart = new uPlot({
      ...size(),
      cursor: {sync: {key: data.over}, drag: {x: false, y: false}, y: false},
      scales: {
        x: {time: false, distr: data.isLog ? 3 : 1, range: ends},
        y: {distr: data.hasLogValues ? 3 : 1, range: data.hasLogValues ? [low / 1.2, high * 1.2] : [low - room, high + room]},
      },
      axes: [
        {
          ...axis, size: 28, space: 46, values: (chart, splits) => splits.map(written),
          ...(ticks && {splits: () => [...ticks.keys()], filter: spaced("x", 38)}),
        },
        {
          ...axis, size: 52, values: (chart, splits) => splits.map(value => value === null ? "" : text(value)),
          ...(data.hasLogValues && high < 100 * low && {filter: spaced("y", 16)}),  // else few values have a text
        },
      ],
      series: [
        {label: data.over, value: (chart, value) => written(value ?? last)},
        ...labels.map((label, index) => lineOf(data, label, index)),
      ],
      hooks: {draw: [chart => draw(data, chart)]},
    }, joined);
    figure.querySelector("figcaption").after(chart.root);
    addEventListener("resize", () => chart.setSize(size()));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => chart.redraw());
  }

  for (const figure of document.querySelectorAll("figure")) show(figure);

  // A field that shows only the answers that have some words, where there are many.
  const prompts = [...document.querySelectorAll(".prompt")];
  if (prompts.length > 4) {
    const search = Object.assign(document.createElement("input"), {type: "search", placeholder: "words of a prompt, a response or a label"});
    search.ariaLabel = search.placeholder;
    const found = document.createElement("small");
    const update = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const prompt of prompts) prompt.hidden = !words.every(word => prompt.textContent.toLowerCase().includes(word));
      found.textContent = ` ${prompts.filter(prompt => !prompt.hidden).length} of ${prompts.length} prompts`;
    };
    search.addEventListener("input", update);
    prompts[0].before(search, found);
    update();
  }

  const opened = performance.now(); // a key pressed twice must not judge the next comparison too
  document.addEventListener("keydown", event => {
    if (event.repeat || event.ctrlKey || event.altKey || event.metaKey || performance.now() - opened < 250) return;
    for (const button of document.querySelectorAll("button")) if (button.dataset.keys.split(" ").includes(event.key)) button.click();
  });
})();
