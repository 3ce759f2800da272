// Point at a figure, or reach it with Tab and move with the arrow keys: its values appear.
const tip = document.body.appendChild(document.createElement("div"));
tip.id = "tip";
const add = (parent, className, style) => {
  const made = parent.appendChild(document.createElement("span"));
  made.className = className;
  Object.assign(made.style, style);
  return made;
};
const percent = (fraction) => `${100 * fraction}%`;
function hide() {
  tip.style.display = "none";
  for (const mark of document.querySelectorAll(".mark")) mark.remove();
}
// The points of a matrix are its cells, row by row from the bottom; in other panels, a place across has one point.
function makePanel(plot, { title, box, points, columns }) {
  const [left, top, width, height] = box;
  const panel = add(plot, "panel", {
    left: percent(left), top: percent(top), width: percent(width), height: percent(height),
  });
  panel.tabIndex = 0;
  panel.setAttribute("role", "slider");
  panel.setAttribute("aria-label", title);
  panel.setAttribute("aria-valuemin", 0);
  panel.setAttribute("aria-valuemax", points.length - 1);
  let at = 0;
  function show(index, clientY) {
    hide();
    at = index;
    const { name, x, values } = points[at], place = plot.getBoundingClientRect();
    if (!columns) add(plot, "mark guide", { left: percent(x), top: percent(top), height: percent(height) });
    tip.replaceChildren(document.createElement("b"));
    tip.firstChild.textContent = `${title}, ${name}`;
    for (const value of values) {
      if ("y" in value)
        add(plot, "mark dot", { left: percent(value.x), top: percent(value.y), borderColor: value.color });
      const line = tip.appendChild(document.createElement("div"));
      add(line, "swatch", { background: value.color });
      line.append(`${value.name} ${value.text}`);
    }
    panel.setAttribute("aria-valuenow", at);
    panel.setAttribute("aria-valuetext", [name, ...values.map((value) => `${value.name} ${value.text}`)].join(", "));
    tip.style.display = "block";
    const right = place.left + x * place.width + 14, room = innerWidth - 8;
    const start = right + tip.offsetWidth <= room ? right : right - tip.offsetWidth - 28;
    tip.style.left = `${Math.max(4, Math.min(start, room - tip.offsetWidth))}px`;
    const y = clientY ?? place.top + top * place.height;
    tip.style.top = `${Math.max(4, Math.min(y, innerHeight - tip.offsetHeight - 8))}px`;
  }
  function point(event) {
    const place = plot.getBoundingClientRect();
    const x = (event.clientX - place.left) / place.width, y = (event.clientY - place.top) / place.height;
    const far = points.map((one) => Math.abs(one.x - x) + (columns ? Math.abs(one.y - y) : 0));
    show(far.indexOf(Math.min(...far)), event.clientY + 12);
  }
  panel.addEventListener("pointermove", (event) => { if (event.pointerType !== "touch") point(event); });
  panel.addEventListener("click", point);
  panel.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") hide(); });
  panel.addEventListener("focus", () => { if (panel.matches(":focus-visible")) show(at); });
  panel.addEventListener("blur", hide);
  panel.addEventListener("keydown", (event) => {
    const up = columns ?? 1, end = points.length - 1;
    const moves = { ArrowLeft: at - 1, ArrowDown: at - up, ArrowRight: at + 1, ArrowUp: at + up, Home: 0, End: end };
    if (!(event.key in moves)) return;
    const to = moves[event.key];
    show(to < 0 || to > end ? at : to);
    event.preventDefault();
  });
}
for (const plot of document.querySelectorAll("[data-panels]"))
  for (const panel of JSON.parse(plot.dataset.panels)) makePanel(plot, panel);
addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
addEventListener("pointerdown", (event) => { if (!event.target.closest(".panel")) hide(); });
// To reach a panel with Tab may scroll; what it says then moves with it.
addEventListener("scroll", () => {
  const panel = document.activeElement;
  if (panel.matches(".panel:focus-visible")) panel.dispatchEvent(new Event("focus"));
  else hide();
}, true);
