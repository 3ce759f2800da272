// Point at a figure, or reach it with Tab and move with the arrow keys: the values of a layer appear.
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
function makePanel(plot, { title, box, layers }) {
  const [left, top, width, height] = box;
  const panel = add(plot, "panel", {
    left: percent(left), top: percent(top), width: percent(width), height: percent(height),
  });
  panel.tabIndex = 0;
  panel.setAttribute("role", "slider");
  panel.setAttribute("aria-label", title);
  panel.setAttribute("aria-valuemin", 0);
  panel.setAttribute("aria-valuemax", layers.length - 1);
  let at = 0;
  function show(index, clientY) {
    hide();
    at = index;
    const { name, x, values } = layers[at], place = plot.getBoundingClientRect();
    add(plot, "mark guide", { left: percent(x), top: percent(top), height: percent(height) });
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
    const place = plot.getBoundingClientRect(), x = (event.clientX - place.left) / place.width;
    const far = layers.map((layer) => Math.abs(layer.x - x));
    show(far.indexOf(Math.min(...far)), event.clientY + 12);
  }
  panel.addEventListener("pointermove", (event) => { if (event.pointerType !== "touch") point(event); });
  panel.addEventListener("click", point);
  panel.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") hide(); });
  panel.addEventListener("focus", () => { if (panel.matches(":focus-visible")) show(at); });
  panel.addEventListener("blur", hide);
  panel.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: at - 1, ArrowDown: at - 1, ArrowRight: at + 1, ArrowUp: at + 1, Home: 0, End: layers.length - 1 };
    if (!(event.key in moves)) return;
    show(Math.max(0, Math.min(moves[event.key], layers.length - 1)));
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
