"use strict";
(() => {
  const models = JSON.parse(document.getElementById("models").textContent);
  const detail = document.getElementById("detail");

  const make = (tag, text, cls) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (cls) node.className = cls;
    return node;
  };

  const bars = (name, values) => {
    const whole = make("div");
    whole.append(make("p", `${name}, block 0 to ${values.length - 1}`, "barname"));
    const row = make("div", undefined, "bars");
    row.setAttribute("role", "img");
    row.setAttribute("aria-label", `${name} by block: ${values.map((v) => v[0]).join(", ")}`);
    for (const [text, share] of values) {
      const bar = make("i", undefined, name.split(" ")[0].toLowerCase());
      bar.style.height = `${Math.round((share ?? 0) * 50)}px`;
      const column = make("span", values.length > 16 ? "" : text);
      column.append(bar);
      row.append(column);
    }
    whole.append(row);
    return whole;
  };

  const show = (id) => {
    const model = models[id];
    if (!model || !detail) return;
    const facts = make("dl", undefined, "facts");
    for (const [key, value] of Object.entries(model.facts)) facts.append(make("dt", key), make("dd", value));
    const plan = make("div");
    for (const [name, values] of Object.entries(model.bars)) plan.append(bars(name, values));
    if (!Object.keys(model.bars).length) plan.append(make("p", "Nothing is cut.", "muted"));
    const cols = make("div", undefined, "cols");
    cols.append(facts, plan);
    detail.replaceChildren(make("h3", `Trial ${model.id}`), cols);
    detail.dataset.shown = id;
    for (const point of document.querySelectorAll(".pt")) point.classList.toggle("chosen", point.dataset.id === String(id));
  };

  for (const svg of document.querySelectorAll("svg[role=group]")) {
    const points = [...svg.querySelectorAll(".pt")];
    const inOrder = [...points].sort((a, b) => a.dataset.macs - b.dataset.macs || a.dataset.id - b.dataset.id);
    if (inOrder.length) inOrder[0].tabIndex = 0;
    const go = (point) => {
      for (const other of points) other.tabIndex = -1;
      point.tabIndex = 0;
      point.focus();
    };
    for (const point of points) {
      point.addEventListener("pointerenter", () => show(point.dataset.id));
      point.addEventListener("focus", () => show(point.dataset.id));
      point.addEventListener("click", () => go(point));
      point.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
        const at = inOrder.indexOf(point);
        const next = event.key === "Home" ? 0 : event.key === "End" ? inOrder.length - 1 : at + (step ?? NaN);
        if (!inOrder[next]) return;
        event.preventDefault();
        go(inOrder[next]);
      });
    }
  }
  if (detail && detail.dataset.first) show(detail.dataset.first);

  addEventListener("beforeprint", () => {
    for (const closed of document.querySelectorAll("details")) closed.open = true;
  });

  for (const table of document.querySelectorAll("table.sortable")) {
    const headers = [...table.tHead.rows[0].cells];
    headers.forEach((header, column) => {
      const button = make("button", header.textContent);
      button.type = "button";
      header.replaceChildren(button);
      button.addEventListener("click", () => {
        const down = header.getAttribute("aria-sort") === "ascending";
        for (const other of headers) other.removeAttribute("aria-sort");
        header.setAttribute("aria-sort", down ? "descending" : "ascending");
        const key = (row) => {
          const raw = row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
          return raw === "" || Number.isNaN(Number(raw)) ? raw : Number(raw);
        };
        const rows = [...table.tBodies[0].rows].sort((a, b) => {
          const [x, y] = [key(a), key(b)];
          if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1; // what was not measured stays last
          const order = typeof x === "number" ? x - y : x.localeCompare(y);
          return down ? -order : order;
        });
        table.tBodies[0].append(...rows);
      });
    });
  }
})();
