"use strict";
(() => {
  const search = document.getElementById("search"), label = document.getElementById("label");
  const found = document.getElementById("found"), list = document.querySelector(".prompts");
  if (!search) return;
  const items = [...list.children].map(element => ({
    element, labels: element.dataset.labels.split("|"), order: Number(element.dataset.order),
    text: element.textContent.toLowerCase(),
  }));
  const update = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const item of items) {
      const fits = !label.value || item.labels.includes(label.value);
      item.element.hidden = !(fits && words.every(word => item.text.includes(word)));
      shown += !item.element.hidden;
    }
    found.textContent = shown + " of " + items.length + " prompts";
  };
  const sort = document.getElementById("sort");
  sort.addEventListener("change", () => {
    const sorted = sort.checked ? [...items].sort((a, b) => a.order - b.order) : items;
    list.append(...sorted.map(item => item.element));
  });
  document.querySelector(".filters").hidden = false;
  search.addEventListener("input", update);
  label.addEventListener("change", update);
  update();
})();
