"""What the page does: hints, picking methods, sorting, the theme, saving the rows.

Without it all is still there: hints are the browser's own, and tables are in the rows' order.
"""

SCRIPT = r"""
"use strict";
const root = document.documentElement, all = (q, from = document) => [...from.querySelectorAll(q)];

// Hints: titles become our own, which show at once and on touch.
const tip = document.createElement("div");
tip.id = "tip"; tip.hidden = true; tip.setAttribute("aria-hidden", "true");
document.body.append(tip);
const hints = new Map();
for (const title of all("svg title")) {
  hints.set(title.parentNode, title.textContent); title.remove();
}
const point = event => {
  let at = event.target;
  while (at && at !== document && !hints.has(at)) at = at.parentNode;
  if (tip.hidden = !hints.has(at)) return;
  tip.textContent = hints.get(at);
  const {width, height} = tip.getBoundingClientRect(), gap = 14;
  const x = event.clientX + gap + width < innerWidth ? event.clientX + gap
    : Math.max(4, event.clientX - gap - width);
  const y = event.clientY - gap - height > 0 ? event.clientY - gap - height : event.clientY + gap;
  tip.style.transform = `translate(${x}px,${y}px)`;
};
tip.style.left = tip.style.top = "0";
for (const kind of ["pointermove", "pointerdown"]) document.addEventListener(kind, point);
document.addEventListener("scroll", () => { tip.hidden = true; }, {capture: true, passive: true});

// Picked methods keep their colours in all charts, the others fade.
const picked = new Set(), faded = document.createElement("style");
document.head.append(faded);
const pick = () => {
  const not = [...picked].map(m => `:not(.m${m})`).join("");
  const loud = [...picked].map(m => `.m${m}`).join(",");
  faded.textContent = picked.size ? `svg g.m${not},figure.m${not},tbody tr.m${not}{opacity:.13}
    .bar svg g.m{opacity:1!important}:is(${loud}) .line{stroke-width:2.75;opacity:1}` : "";
  for (const chip of all(".chip")) chip.setAttribute("aria-pressed", picked.has(chip.dataset.m));
};
for (const chip of all(".chip")) chip.addEventListener("click", () => {
  picked.delete(chip.dataset.m) || picked.add(chip.dataset.m); pick();
});
document.addEventListener("keydown", event => {
  if (event.key === "Escape") { picked.clear(); pick(); tip.hidden = true; }
});

// Sorting: by the full digits; what is not known stays last.
for (const button of all("th button")) button.addEventListener("click", () => {
  const head = button.parentNode, row = head.parentNode, at = [...row.children].indexOf(head);
  const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of row.children) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  const body = row.closest("table").tBodies[0], value = tr => {
    const {dataset: {v}, textContent} = tr.children[at];
    return at === 0 ? textContent : v === undefined ? NaN : Number(v);
  };
  body.append(...[...body.rows].sort((a, b) => {
    const x = value(a), y = value(b);
    if (at === 0) return sign * x.localeCompare(y);
    return Number.isNaN(x) - Number.isNaN(y) || sign * (x - y) || 0;
  }));
});

// The theme: the system's until somebody says otherwise; then what was said, in all reports.
const theme = document.getElementById("theme"), system = matchMedia("(prefers-color-scheme: dark)");
const stored = (...args) => {
  try { return localStorage[args.length ? "setItem" : "getItem"]("kvc-theme", ...args); }
  catch { return null; }  // a browser may keep nothing for files
};
const dark = () => (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
const said = () => {
  theme.textContent = dark() ? "Light" : "Dark";
  theme.setAttribute("aria-label", dark() ? "Light theme" : "Dark theme");
};
if (["dark", "light"].includes(stored())) root.dataset.theme = stored();
theme.addEventListener("click", () => {
  root.dataset.theme = dark() ? "light" : "dark"; stored(root.dataset.theme); said();
});
system.addEventListener("change", said); said();

document.getElementById("save").addEventListener("click", () => {
  const rows = document.getElementById("rows").textContent + "\n";
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([rows], {type: "application/jsonl"}));
  link.download = "rows.jsonl"; link.click(); URL.revokeObjectURL(link.href);
});
"""
