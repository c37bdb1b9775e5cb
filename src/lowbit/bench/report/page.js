"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const root = document.documentElement;
  const data = JSON.parse(byId("data").textContent);
  root.classList.add("js");

  // ---- light and dark
  const theme = byId("theme");
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches);
  const label = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
  theme.hidden = false;
  label();
  prefersDark.addEventListener("change", label);
  theme.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; label(); });

  // ---- one tooltip for everything that has a title
  const tip = byId("tip");
  const element = (name, text) => {
    const made = document.createElement(name);
    made.textContent = text;
    return made;
  };
  const place = (x, y) => {
    const box = tip.getBoundingClientRect();
    const left = Math.max(6, Math.min(x + 14, innerWidth - box.width - 6));
    const top = y + 18 + box.height > innerHeight ? y - box.height - 12 : y + 18;
    tip.style.transform = `translate(${left}px, ${Math.max(6, top)}px)`;
  };
  const say = (head, lines, x, y) => {
    tip.replaceChildren(element("b", head));
    for (const [name, value] of lines) {
      const line = document.createElement("span");
      line.append(element("i", name), element("span", value));
      tip.append(line);
    }
    tip.hidden = false;
    place(x, y);
  };
  const hush = () => { tip.hidden = true; };
  // The browser's own tooltip would show beside ours: the titles become labels.
  for (const title of document.querySelectorAll("svg title")) {
    title.parentNode.setAttribute("aria-label", title.textContent);
    title.remove();
  }
  const cells = [...document.querySelectorAll("#heat > rect")];
  const index = new Map(cells.map((cell, at) => [cell, at]));
  const describe = (at) => data.metrics.map((metric) => [metric.title, metric.texts[at] || "not known"]);
  const show = (target, x, y) => {
    const at = index.get(target);
    if (at !== undefined) { say(data.names[at], describe(at), x, y); return; }
    const [head, ...rest] = target.getAttribute("aria-label").split(": ");
    say(head, rest.length ? [["", rest.join(": ")]] : [], x, y);
  };
  const marks = "svg [aria-label]";
  document.addEventListener("pointermove", (event) => {
    const target = event.target instanceof Element ? event.target.closest(marks) : null;
    if (target) show(target, event.clientX, event.clientY); else hush();
  });
  document.addEventListener("pointerleave", hush);
  document.addEventListener("scroll", hush, true);

  // ---- what the colours of the map show
  const switches = [...document.querySelectorAll("[data-metric]")];
  const choose = (number) => {
    const metric = data.metrics[number];
    cells.forEach((cell, at) => {
      const step = metric.steps[at];
      cell.setAttribute("class", step === null ? "h-" : `h${step}`);
      cell.setAttribute("aria-label", `${data.names[at]}: ${metric.texts[at] || "not known"}`);
    });
    byId("legend-low").textContent = metric.low;
    byId("legend-high").textContent = metric.high;
    byId("heat-title").textContent = metric.title;
    for (const button of switches) button.setAttribute("aria-pressed", String(Number(button.dataset.metric) === number));
  };
  for (const button of switches) {
    button.parentNode.hidden = false;
    button.addEventListener("click", () => choose(Number(button.dataset.metric)));
  }

  // ---- from a cell to its row, by mouse and by keyboard
  const goTo = (at) => {
    const row = byId(`l${data.rows[at]}`);
    for (const found of document.querySelectorAll("tr.found")) found.classList.remove("found");
    if (row.hidden) { byId("filter").value = ""; filter(); }
    row.classList.add("found");
    hush();
    row.scrollIntoView({ block: "center" });
  };
  const map = byId("heat-scroll");
  let current = -1;
  const focusOn = (at) => {
    cells[current]?.classList.remove("on");
    current = at;
    const cell = cells[at];
    cell.classList.add("on");
    cell.scrollIntoView({ block: "nearest", inline: "nearest", behavior: "instant" });
    const box = cell.getBoundingClientRect();
    // After the events of that scrolling, which hide the tooltip.
    requestAnimationFrame(() => requestAnimationFrame(() => show(cell, box.x + box.width, box.y + box.height)));
  };
  const step = (rows, columns) => {
    const [row, column] = data.at[current];
    let best = -1;
    let distance = Infinity;
    data.at.forEach(([otherRow, otherColumn], at) => {
      const along = rows ? (otherRow - row) * rows : (otherColumn - column) * columns;
      const across = Math.abs(rows ? otherColumn - column : otherRow - row);
      if (along > 0 && along + 1000 * across < distance) { best = at; distance = along + 1000 * across; }
    });
    return best < 0 ? current : best;
  };
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  if (map) {
    map.addEventListener("click", (event) => { if (index.has(event.target)) goTo(index.get(event.target)); });
    map.addEventListener("keydown", (event) => {
      if (event.key in moves) {
        event.preventDefault();
        focusOn(current < 0 ? 0 : step(...moves[event.key]));
      } else if (event.key === "Enter" && current >= 0) goTo(current);
      else if (event.key === "Escape") hush();
    });
    map.addEventListener("blur", () => { cells[current]?.classList.remove("on"); hush(); });
  }

  // ---- the table
  const table = byId("table");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const valueOf = (cell) => (cell.dataset.v === undefined ? cell.textContent : Number(cell.dataset.v));
  const compare = (left, right) => {
    const numbers = typeof left === "number" && typeof right === "number";
    return numbers ? left - right : String(left).localeCompare(String(right), undefined, { numeric: true });
  };
  const sort = (column, head) => {
    const isNumber = head.classList.contains("num");
    const before = head.getAttribute("aria-sort");
    const down = before === null ? isNumber : before === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const unknown = (row) => isNumber && row.cells[column].dataset.v === undefined;
    const sorted = [...rows].sort((left, right) => {
      // What isn't known comes last, whichever way.
      if (unknown(left) || unknown(right)) return unknown(left) - unknown(right);
      const order = compare(valueOf(left.cells[column]), valueOf(right.cells[column]));
      return down ? -order : order;
    });
    body.append(...sorted);
  };
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = element("button", head.textContent);
    button.type = "button";
    button.title = head.title;
    head.replaceChildren(button);
    button.addEventListener("click", () => sort(column, head));
  });
  const filter = () => {
    const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      count += row.hidden ? 0 : 1;
    }
    byId("shown").textContent = count === rows.length ? `${count} rows` : `${count} of ${rows.length} rows`;
  };
  byId("filter").addEventListener("input", filter);
  document.querySelector(".tools").hidden = false;

  const quoted = (cell) => {
    if (cell.dataset.v !== undefined && cell.classList.contains("num")) return cell.dataset.v;
    // A spreadsheet takes text that begins so for a formula.
    const text = cell.textContent.replace(/^[=+\-@\t\r]/, "'$&");
    return `"${text.replaceAll('"', '""')}"`;
  };
  byId("csv").addEventListener("click", () => {
    const lines = [table.tHead.rows[0], ...body.rows].filter((row) => !row.hidden);
    const text = lines.map((row) => [...row.cells].map(quoted).join(",")).join("\r\n");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = "layers.csv";
    link.click();
    URL.revokeObjectURL(link.href);
  });
  addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("details")) part.open = true;
  });
})();
