"use strict";

// A slider shows one of the frames below it.
for (const pictures of document.querySelectorAll(".pictures")) {
  const slider = pictures.querySelector("input[type=range]");
  if (!slider) continue;
  const frames = pictures.querySelectorAll(".frame");
  const show = () => {
    frames.forEach((frame, index) => { frame.hidden = index !== Number(slider.value); });
    const words = frames[slider.value].dataset.words;
    slider.setAttribute("aria-valuetext", words);
    pictures.querySelector("output").textContent = words;
  };
  slider.addEventListener("input", show);
  show(); // browsers keep a slider's place when a page is loaded again
}

// A switch shows or hides a group of curves in every chart.
for (const input of document.querySelectorAll(".switch")) {
  const apply = () => {
    for (const curve of document.querySelectorAll(`.series[data-group="${input.dataset.group}"]`)) {
      curve.style.display = input.checked ? "" : "none";
    }
  };
  input.addEventListener("change", apply);
  apply();
}

// A chart tells the value under the pointer, or where the arrow keys have brought its cursor.
for (const svg of document.querySelectorAll("figure svg")) {
  const cursor = svg.querySelector(".cursor");
  const reading = svg.closest("figure").querySelector(".reading");
  const curves = [...svg.querySelectorAll(".series")].map((element) => ({
    element,
    name: element.dataset.name,
    places: element.dataset.places.split(" ").filter(Boolean).map((place) => place.split(",").map(Number)),
    values: element.dataset.values.split(" ").map((value) => value.split(":")),
  })).filter((curve) => curve.places.length);
  const visible = () => curves.filter((curve) => curve.element.style.display !== "none");
  let at = null; // { curve, index }

  const point = (curve, index) => {
    at = { curve, index };
    const [x, y] = curve.places[index];
    const [step, value] = curve.values[index];
    cursor.setAttribute("cx", x);
    cursor.setAttribute("cy", y);
    cursor.setAttribute("visibility", "visible");
    const name = curves.length > 1 ? `${curve.name} · ` : "";
    reading.textContent = `${name}${svg.dataset.x} ${step}: ${value}${svg.dataset.unit}`;
  };
  const leave = () => {
    cursor.setAttribute("visibility", "hidden");
    reading.textContent = "";
  };
  svg.addEventListener("pointermove", (event) => {
    const mouse = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    let best = Infinity;
    let found = null;
    for (const curve of visible()) {
      // The nearest in steps first, then the nearest curve: a pointer far above a curve still reads it.
      curve.places.forEach(([x, y], index) => {
        const distance = 9 * (x - mouse.x) ** 2 + (y - mouse.y) ** 2;
        if (distance < best) { best = distance; found = [curve, index]; }
      });
    }
    if (found) point(...found);
  });
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", (event) => {
    const shown = visible();
    const along = { ArrowRight: 1, ArrowLeft: -1 }[event.key] ?? 0;
    const across = { ArrowDown: 1, ArrowUp: -1 }[event.key] ?? 0;
    if (!shown.length || !(along || across)) return;
    event.preventDefault();
    if (!at || !shown.includes(at.curve)) return point(shown[0], shown[0].places.length - 1);
    const curve = shown[(shown.indexOf(at.curve) + across + shown.length) % shown.length];
    point(curve, Math.max(0, Math.min(curve.places.length - 1, at.index + along)));
  });
}

// In print everything is open.
addEventListener("beforeprint", () => {
  for (const fold of document.querySelectorAll("details:not([open])")) {
    fold.open = true;
    addEventListener("afterprint", () => { fold.open = false; }, { once: true });
  }
});
